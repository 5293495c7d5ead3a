"""The demo measures what it says: shares, tokens a pass, texts alike, and the cost of passes that leave no trace."""

import argparse
import json

from shared.errors import BadInput

import pytest
import torch

import checkpoint
import model as trunk
from demos import speculative
from demos.speculative import SIZES, Job, alike, compare, decode, pass_costs
from extras.speculative import LookUp
from hf import Opened
from model import GPT, ModelConfig
from sample import SampleConfig
from tokenizer import CharTokenizer

LETTERS = "".join(map(chr, range(32, 127))) + "\n"


def tiny(vocab_size):
    torch.manual_seed(0)
    sizes = {"block_size": 512, "n_embd": 12, "n_head": 2, "n_kv_head": 1, "n_layer": 2}
    return GPT(ModelConfig(vocab_size, **sizes))


class Args:
    drafted, rounds, tokens = [2, 3], 2, 20


def test_rows_count_what_happened():
    """A model that repeats one token: all is taken, a pass gives n + 1 tokens, and the texts are alike to the end."""
    dull = tiny(7)
    dull.head.weight.data.zero_()  # all scores are equal: the first token, always
    ids, ticks, drafts = [3, 1, 0, 0, 0], [], {"look-up": lambda: LookUp(7)}
    rows = compare(Job(dull, "dull", ids, drafts, SampleConfig(temperature=0)), Args, ticks.append)
    assert [(row["draft"], row["n"]) for row in rows] == [("none", 0), ("look-up", 2), ("look-up", 3)]
    assert [row["tokens a pass"] for row in rows] == [1, 3, 4], "a pass gives one token and those that it accepts"
    assert [row["taken"] for row in rows] == [None, 1, 1] and {row["alike"] for row in rows} == {20}
    assert {row["tokens"] for row in rows} == {20} and len(ticks) == 2 * 3, "each takes its turn in each round"
    assert all(0 <= row["drafting"] < 1 for row in rows) and rows[0]["speed-up"] == 1
    drawn = compare(Job(dull, "drawn", ids, drafts, SampleConfig()), Args, ticks.append)
    assert drawn[1]["alike"] is None, "drawn texts cannot be compared"
    assert drawn[2]["taken"] < 0.6 and drawn[2]["tokens a pass"] < 3, "of 7 tokens at random about one in 7 is guessed"


def test_the_first_token_is_not_timed(monkeypatch):
    """Seconds go from the first token to the last, so the prefill counts for neither; `alike` by hand."""
    now = iter([100.0, 103.5])
    monkeypatch.setattr(speculative.time, "perf_counter", lambda: next(now))
    assert decode(iter([torch.tensor([5]), 6, 7, 8]), 3) == ([5, 6, 7], 3.5)
    assert alike([1, 2, 3], [1, 2, 4]) == 2 and alike([1, 2], [1, 2, 4]) == 2 and alike([3], [1]) == 0


def test_passes_are_timed_at_one_place(monkeypatch):
    """Every timed pass reads its tokens behind the same text: what it read is taken back."""
    model, seen, forward = tiny(7), [], GPT.forward

    def note(self, idx, cache=None, *more, **how):
        seen.append((idx.shape[1], int(cache.lengths)))
        return forward(self, idx, cache, *more, **how)

    monkeypatch.setattr(trunk.GPT, "forward", note)
    costs = pass_costs(model, [1, 2, 3], 2)
    assert seen[1:] == [(size, 3) for _ in range(3) for size in SIZES], "passes of all sizes take turns after 3 tokens"
    assert list(costs) == list(SIZES) and min(costs.values()) > 0


def test_the_demo_runs(text, out, monkeypatch, capsys):
    """The demo trains where there is no run, prints costs and rows, writes its figure; bad flags are one line."""
    opened = Opened(tiny(len(LETTERS)), CharTokenizer(LETTERS))
    monkeypatch.setattr(speculative, "load", lambda name, dtype: opened)
    words = ["--model", "tiny", "--corpus", str(text), "--tokens", "6", "--rounds", "1", "--steps", "2"]
    speculative.main([*words, "--drafted", "2", "3"])
    summary = json.loads((out / "speculative" / "summary.json").read_text("utf-8"))
    found = {(row["text"], row["draft"], row["n"]) for row in summary["rows"]}
    real = {(name, "look-up", n) for name in ("repeats", "corrects", "explains", "goes on") for n in (2, 3)}
    own = {("own model", draft, n) for draft in ("look-up", "counts", "model") for n in (2, 3)}
    assert real | own | {("goes on", "counts", 2)} <= found and len(found) == 4 + 8 + 2 + 1 + 6
    assert set(summary["costs"]) == {"tiny", "own model"}
    assert (out / "speculative" / "speculative.png").is_file() and "there is no run default" in capsys.readouterr().out
    path, args = out / "default" / "model.pt", {"corpus": str(text)}
    path.parent.mkdir()
    checkpoint.save(path, opened.model, opened.tokenizer, optimizer={}, args=args, step=1, seconds=1.0)
    model, data = speculative.own(argparse.Namespace(name="default", corpus=None, steps=1))
    assert torch.equal(model.head.weight, opened.model.head.weight), "there is a run, and its model was not taken"
    assert data.tokenizer.decode(data.train[:9]) == text.read_text("utf-8")[:9], "not the run's text, in its tokens"
    for flags, names in (
        (["--drafted", "2", "0"], "--drafted 0"), (["--tokens", "1"], "--tokens 1"), (["--rounds", "0"], "--rounds 0"),
        (["--steps", "0"], "--steps 0"), (["--temperature", "-1"], "temperature"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=names):
            speculative.main([*words, *flags])
