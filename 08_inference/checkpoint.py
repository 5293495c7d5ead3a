"""A trained model in a file: its shape, its weights and its tokenizer."""

import io
from dataclasses import asdict
from pathlib import Path

from shared.atomic import write
from shared.errors import BadInput
from shared.program import command

import torch

from model import GPT, ModelConfig
from tokenizer import from_state

# What a checkpoint holds, and what each part must be.
PARTS = {"config": dict, "tokenizer": dict, "model": dict}
PARTS |= {"optimizer": dict, "args": dict, "step": int, "seconds": float}  # what a run needs to go on


def save(path: Path, model, tokenizer, **run):
    """Write what `load` needs, under the names of PARTS. The file appears whole or not at all."""
    state = {"config": asdict(model.config), "tokenizer": tokenizer.state(), "model": model.state_dict(), **run}
    content = io.BytesIO()
    torch.save(state, content)
    write(path, content.getvalue())


def damaged(path: Path, reason) -> BadInput:
    """The error for a file that does not hold what it should: one line, which names the file."""
    return BadInput(f"{path} is damaged or from another version ({reason}): train again")


def read(path: Path, device="cpu") -> dict:
    """What `save` put into the file. Raises BadInput when there is no file or it is damaged.

    Where there is none, the error tells the command that trains this run, which the file's folder is named after.
    """
    if not path.is_file():
        train = command(Path(__file__).parent.name, "train.py", "--name", path.parent.name)
        raise BadInput(f"no checkpoint at {path}: train first, with {train}")
    content = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(content, map_location=device, weights_only=True)  # a stranger's file runs no code
    except Exception as error:  # what torch raises for a torn file has no common type
        raise damaged(path, type(error).__name__) from None
    if not isinstance(state, dict) or not all(isinstance(state.get(part), kind) for part, kind in PARTS.items()):
        raise damaged(path, "something is missing")
    return state


def load(path: Path, device="cpu"):
    """A checkpoint that `save` wrote -> (model, tokenizer, all that was saved).

    Raises BadInput when there is none or it is damaged. Only reading is guarded: a mistake in the model's own code is
    no damage of the file, and keeps its traceback.
    """
    state = read(path, device)
    try:
        config, tokenizer = ModelConfig(**state["config"]), from_state(state["tokenizer"])
    except (TypeError, ValueError) as error:
        raise damaged(path, error) from None
    if len(tokenizer) != config.vocab_size:
        raise damaged(path, f"a tokenizer of {len(tokenizer)}, a model of {config.vocab_size} tokens")
    model = GPT(config).to(device)
    try:
        model.load_state_dict(state["model"])
    except (TypeError, RuntimeError) as error:
        raise damaged(path, " ".join(str(error).split())) from None
    return model, tokenizer, state
