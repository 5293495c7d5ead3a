"""Checkpoints of the checkpoint: whole or not at all, read without trust, and a bug is not taken for damage."""

import os
import pickle

from shared.errors import BadInput

import pytest
import torch

import checkpoint
from checkpoint import load, save
from model import GPT, ModelConfig
from tokenizer import CharTokenizer, train_tokenizer
from train import TrainConfig, make_optimizer

RUN = {"optimizer": {}, "step": 7, "seconds": 1.5, "args": {"lr": 0.1, "board": None}}  # what a run needs to go on


@pytest.fixture
def saved(tmp_path):
    """A model with its tokenizer, and the file that save wrote of them."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer("the cat sat\n")
    model = GPT(ModelConfig(vocab_size=len(tokenizer), block_size=3, n_embd=4, n_head=2, n_layer=1))
    path = tmp_path / "model.pt"
    save(path, model, tokenizer, **RUN)
    return model, tokenizer, path


def test_a_checkpoint_comes_back_as_it_was(saved):
    """What save wrote, load reads: same shape, same weights, same characters, and nothing else on disk."""
    model, tokenizer, path = saved
    again, characters, *_ = load(path)
    assert again.config == model.config, "the shape is saved with the weights"
    assert characters.chars == tokenizer.chars, "ids mean nothing without the tokenizer they were made with"
    idx = torch.randint(len(tokenizer), (5, 3))
    assert torch.equal(again(idx), model(idx)), "a weight changed on its way through the file"
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"], "the partial file is renamed, not left behind"


@pytest.mark.parametrize("part", ["write_bytes", "replace"])
def test_a_failed_save_keeps_the_old_checkpoint(part, saved, monkeypatch):
    """A save that breaks off half-way leaves the checkpoint of before untouched, and no half of a new one."""
    model, tokenizer, path = saved
    before = path.read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path) if part == "write_bytes" else os, part, full_disk)
    with pytest.raises(OSError):
        save(path, model, tokenizer, **RUN)
    monkeypatch.undo()
    assert path.read_bytes() == before, "write to another file and rename it: the old one stays until the new is whole"
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"], "half a checkpoint fills the disk for nothing"


def test_a_missing_checkpoint_is_explained(tmp_path):
    """Without a checkpoint the message says where it was looked for and the whole command that makes one."""
    with pytest.raises(BadInput) as caught:
        load(tmp_path / "tiny" / "model.pt")
    assert str(tmp_path / "tiny" / "model.pt") in str(caught.value), "where was it looked for?"
    assert "train.py --name tiny" in str(caught.value), "the command that makes this checkpoint, with the run's name"


def damage(path, model, tokenizer):
    """Names and contents of files that are no checkpoint of this model."""
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    yield from {"empty": b"", "text": b"ROMEO:\n", "pickle": pickle.dumps([1, 2])}.items()
    yield from ((f"{share} %", whole[:len(whole) * share // 100]) for share in (1, 50, 99))
    changes = {
        "no weights": {"model": None}, "no shape": {"config": None}, "no tokenizer": {"tokenizer": None},
        "another shape": {"config": state["config"] | {"n_embd": 12}},
        "unknown field": {"config": state["config"] | {"n_unknown": 4}},
        "impossible shape": {"config": state["config"] | {"vocab_size": 0}},
        "a letter missing": {"tokenizer": CharTokenizer(tokenizer.chars[1:]).state()},
        "more tokens": {"tokenizer": train_tokenizer("byte", "", 0).state()}, "no kind": {"tokenizer": {}},
        "characters alone": {"tokenizer": tokenizer.chars}, "no step": {"step": None}, "no flags": {"args": None},
        "no pattern": {"tokenizer": {"kind": "bpe", "ranks": {b"a": 0}, "special": {}, "pattern": "("}},
        "no letters": {"tokenizer": {"kind": "char"}}, "no bytes": {"tokenizer": {"kind": "bpe"}},
    }
    others = {"list": [1, 2], "tensor": torch.zeros(3), "incomplete": {"config": state["config"]}}
    for part in ("config", "tokenizer", "model", "optimizer", "step", "seconds", "args"):
        others[f"without {part}"] = {key: state[key] for key in state.keys() - {part}}
    for name, content in (others | {name: state | change for name, change in changes.items()}).items():
        torch.save(content, path)
        yield name, path.read_bytes()


@pytest.mark.filterwarnings("ignore")  # torch grumbles about them before it gives up
def test_damaged_checkpoints_are_refused(saved):
    """A file that was cut short, overwritten, or holds something else is refused in one line."""
    model, tokenizer, path = saved
    for name, content in damage(path, model, tokenizer):
        path.write_bytes(content)
        try:
            load(path)
        except BadInput as error:
            assert str(path) in str(error) and "\n" not in str(error), f"{name}: one line that names the file"
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__} instead of one clear line") from error
        else:
            raise AssertionError(f"{name}: read without complaint")


@pytest.mark.parametrize("place", ["the model", "its shape"])
@pytest.mark.parametrize("error", [KeyError, RuntimeError, NotImplementedError])
def test_a_bug_in_the_model_is_not_called_damage(place, error, saved, monkeypatch):
    """A mistake in the model's own code surfaces as itself: no training would mend it."""

    def bug(*args, **kwargs):
        raise error("a slip of the pen")

    monkeypatch.setattr(*((checkpoint, "GPT") if place == "the model" else (ModelConfig, "__post_init__")), bug)
    try:
        load(saved[-1])
    except BadInput as told:
        raise AssertionError(f"a {error.__name__} in {place} is read as damage of the file: {told}") from None
    except error:
        return
    raise AssertionError(f"a {error.__name__} in {place} was swallowed")


RAN = []


def explode(word):
    RAN.append(word)


class Bomb:
    """Unpickling this calls a function: what a hostile checkpoint does."""

    def __reduce__(self):
        return explode, ("boom",)


def test_opening_a_checkpoint_never_runs_code(saved):
    """A checkpoint is data: one that carries code is refused, and the code does not run."""
    path = saved[-1]
    torch.save({"config": Bomb()}, path)
    torch.load(path, weights_only=False)
    assert RAN == ["boom"], "the bomb of this test must be a live one"
    RAN.clear()
    with pytest.raises(BadInput):
        load(path)
    assert RAN == [], "opening a stranger's file ran the code in it: load weights only"


def test_a_checkpoint_holds_what_a_run_needs_to_go_on(saved):
    """Beside the weights a checkpoint holds the step, the flags and the optimiser's moments, all to the last bit."""
    model, tokenizer, path = saved
    optimizer = make_optimizer(model, TrainConfig())
    model(torch.randint(len(tokenizer), (5, 3))).square().sum().backward()
    optimizer.step()
    save(path, model, tokenizer, **RUN | {"optimizer": optimizer.state_dict()})
    again, _, state = load(path)
    for key in ("step", "seconds", "args"):
        assert state[key] == RUN[key], f"{key} came back as {state[key]!r}, not {RUN[key]!r}"
    other = make_optimizer(again, TrainConfig())
    other.load_state_dict(state["optimizer"])
    moments = {"muon": ["momentum"], "adamw": ["exp_avg", "exp_avg_sq", "step"]}
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        kind = "muon" if name.startswith("blocks.") and "norm" not in name else "adamw"
        before, after = optimizer.optimizers[kind].state[a], other.optimizers[kind].state[b]
        for moment in moments[kind]:
            assert torch.equal(before[moment], after[moment]), f"the optimiser's {moment} of {name} is lost"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_every_tokenizer_travels_with_its_model(kind, tmp_path):
    """A checkpoint knows its tokenizer, be it of characters, bytes or byte pairs."""
    tokenizer = train_tokenizer(kind, "the cat sat on the mat " * 9, 270)
    model = GPT(ModelConfig(vocab_size=len(tokenizer), block_size=3, n_embd=4, n_head=2, n_layer=1))
    save(tmp_path / "model.pt", model, tokenizer, **RUN)
    _, again, _ = load(tmp_path / "model.pt")
    assert again.encode("the mat") == tokenizer.encode("the mat"), "other ids than those the model was trained on"
    assert again.state() == tokenizer.state(), "a part of the tokenizer was lost"


def test_a_disk_that_is_really_full(saved):
    """Where the system writes no more bytes, saving raises OSError and the checkpoint of before stays."""
    resource = pytest.importorskip("resource", reason="no limits to the size of files on this system")
    model, tokenizer, path = saved
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError):
            save(path, model, tokenizer, **RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before, "the checkpoint of before is lost"
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"], "half a checkpoint fills the disk for nothing"
