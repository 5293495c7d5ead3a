"""The demo of byte-pair encoding compares two trainers that do the same, and extrapolates what it says it does."""

import json

from shared.errors import BadInput

import pytest

from demos import bpe
from tokenizer import BPETokenizer, learn_tokens

TEXT = "peter piper picked a peck of pickled peppers; how many pickled peppers did peter piper pick? " * 3


def test_the_extrapolation_counts_what_the_naive_trainer_reads():
    """The reads that are extrapolated are the reads of a naive trainer that runs to the end, within 3 %."""
    tokens, read = bpe.naive(TEXT, 285)
    assert tokens == learn_tokens(TEXT, 285), "the naive trainer learned other tokens"
    lengths = {size: len(BPETokenizer(tokens[:size - 1]).encode(TEXT)) for size in range(257, 287)}
    estimate = bpe.all_reads(lengths)
    assert abs(estimate / read - 1) < 0.03, f"read {read}, extrapolated {estimate}"


def test_the_naive_trainer_ends_when_nothing_is_left():
    """A text of one piece has a last merge, and asking for more does not loop."""
    tokens, _ = bpe.naive("abab", 1000)
    assert tokens[256:] == [b"ab", b"abab"]


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
    with pytest.raises(BadInput, match="--vocab-size"):
        bpe.main(["--vocab-size", "257"])
