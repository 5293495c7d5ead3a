"""The demo of byte-pair encoding compares two trainers that do the same, and extrapolates what it says it does."""

import json

from shared.errors import BadInput

import pytest

import tokenizer
from demos import bpe

TEXT = "peter piper picked a peck of pickled peppers; how many pickled peppers did peter piper pick? " * 3


def test_the_extrapolation_counts_what_the_naive_trainer_reads(monkeypatch):
    """The reads that are extrapolated are the reads of a naive trainer that runs to the end, within 3 %."""
    read, merge = [], tokenizer.merge
    monkeypatch.setattr(tokenizer, "merge", lambda piece, *pair: read.append(len(piece)) or merge(piece, *pair))
    tokens = tokenizer.learn_tokens_slowly(TEXT, 285)
    lengths = {size: len(bpe.of_size(tokens, size).encode(TEXT)) for size in range(257, 287)}
    estimate = bpe.all_reads(lengths)
    assert abs(estimate / sum(read) - 1) < 0.03, f"read {sum(read)}, extrapolated {estimate}"


def test_the_naive_trainer_ends_when_nothing_is_left():
    """A text of one piece has a last merge, and asking for more does not loop."""
    assert tokenizer.learn_tokens_slowly("abab", 1000)[256:] == [b"ab", b"abab"]


def test_a_vocabulary_has_the_size_asked_for():
    """A tokenizer of a size has the first tokens, in the order in which they were learned, and the special one."""
    tokens = tokenizer.learn_tokens(TEXT, 285)
    small = bpe.of_size(tokens, 270)
    assert len(small) == 270 and [small.decode([i]).encode() for i in range(256, 269)] == tokens[256:269]


def test_the_demo_runs(text, out, capsys):
    """More tokens shorten the text, the sentence is shown at several sizes, and wrong sizes are refused."""
    bpe.main(["--corpus", str(text), "--vocab-size", "400", "--naive-merges", "2", "--sentence", "the cat"])
    summary = json.loads((out / "bpe" / "summary.json").read_text("utf-8"))
    shorter = [row["val"] for row in summary["rows"]]
    assert shorter[0] == 1.0, "without merges a token is a byte"
    assert shorter == sorted(shorter) and shorter[-1] > 3, shorter
    assert (out / "bpe" / "bytes_per_token.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "t|h|e| |c|a|t" in shown and "the| cat" in shown and "extrapolated" in shown
    bpe.main(["--corpus", str(text), "--vocab-size", "258", "--sentence", "the cat"])  # fewer than the naive merges
    with pytest.raises(BadInput, match="--vocab-size"):
        bpe.main(["--vocab-size", "257"])
