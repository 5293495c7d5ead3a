"""Losses of several tokenizers in one table, in units that compare."""

import json
import math

from shared.errors import BadInput

import pytest

from demos import bits_per_byte

SMALL = ["--n-layer", "1", "--n-embd", "8", "--n-head", "2", "--block-size", "16"]


def test_the_units_of_a_row_fit_together(text, out):
    """Loss per character is loss per token over characters per token; bits per byte is that over ln 2."""
    names = ["char", "byte", "bpe:280"]
    bits_per_byte.main(["--corpus", str(text), "--steps", "4", "--tokenizers", *names, *SMALL])
    rows = json.loads((out / "bits_per_byte" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["tokenizer"] for row in rows] == names
    for row in rows:
        assert math.isclose(row["nats per char"], row["nats per token"] / row["chars per token"]), row
        assert math.isclose(row["bits per byte"], row["nats per char"] / math.log(2)), "one byte a character here"
    assert [row["chars per token"] for row in rows[:2]] == [1, 1] and rows[2]["chars per token"] > 1.3
    assert rows[1]["tokens"] == 257 and rows[2]["tokens"] == 280
    assert (out / "bits_per_byte" / "bits_per_byte.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["bpe", "word", "char:12", "bpe:many"])
def test_an_unknown_tokenizer_is_refused(name):
    """A tokenizer that does not exist, or a size where none belongs, is refused before anything is trained."""
    with pytest.raises(BadInput, match=name):
        bits_per_byte.main(["--tokenizers", name])
