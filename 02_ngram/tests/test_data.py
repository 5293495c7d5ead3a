"""Checkpoints of the data: an honest split, every window once, words kept apart."""

import math
from collections import Counter
from itertools import pairwise

from shared.errors import BadInput

import pytest
import torch

from data import Dataset, forget, load_data, shuffle_lines, split, windows
from tokenizer import CharTokenizer

COUNT = torch.arange(23)  # a text in which every token says where it stands
WORDS = ["ann", "bo", "cid", "dan", "eva", "flo", "a", "gus", "hal", "anna", "ida", "joe", "kit", "bob", "leo", "max"]


def test_the_split_is_by_position():
    """The first 90 % of the text train and the rest validates: in order, nothing lost, nothing on both sides."""
    text = "".join(chr(200 + i) for i in range(1000))
    train, val = split(text)
    assert train + val == text, "the split loses, repeats or reorders characters"
    assert len(train) == 900, "nine characters of ten are for training"
    assert split("0123456789abc") == ("0123456789a", "bc"), "a broken ninth goes to the validation text"


def test_windows_are_contexts_and_the_next_token():
    """Each window is block_size tokens in text order, and its target is the one token that comes after them."""
    x, y = windows(torch.tensor([1, 2, 3, 4]), 2)
    assert x.tolist() == [[1, 2], [2, 3]] and y.tolist() == [3, 4], "the target is the token after the context"
    for block_size in (1, 3, 7, 22):
        x, y = windows(COUNT, block_size)
        assert x.shape == (23 - block_size, block_size), "one window ends before every token but the first block_size"
        for i in range(len(x)):
            assert x[i].tolist() == list(range(i, i + block_size)), f"window {i} is not the stretch that starts at {i}"
            assert y[i] == i + block_size, f"the target of window {i} is not the token right after it: off by one"


@pytest.mark.parametrize("length", [0, 1, 4])
def test_short_texts_are_refused(length):
    """A text without a whole window is refused in words; one window is enough."""
    with pytest.raises(BadInput, match="no window"):
        windows(torch.arange(length), 4)
    x, y = windows(torch.arange(5), 4)
    assert x.tolist() == [[0, 1, 2, 3]] and y.tolist() == [4], "five tokens hold one window of four and its target"


def test_no_window_reaches_across_the_split(tmp_path):
    """The text is split before windows are cut, so no window mixes training and validation characters."""
    file = tmp_path / "text.txt"
    file.write_text("a" * 180 + "b" * 20, encoding="utf-8")
    data = load_data(str(file))
    a, b = data.tokenizer.encode("ab")
    x, y = windows(data.train, 5)
    assert y.numel() == 175 and x.unique().tolist() == y.unique().tolist() == [a], "validation text leaks into training"
    x, y = windows(data.val, 5)
    assert y.numel() == 15 and x.unique().tolist() == y.unique().tolist() == [b], "training text leaks into validation"


def test_bits_per_byte():
    """Bits per byte is the loss divided by ln 2 and by the bytes per character, so accents make no text harder."""
    data = Dataset("", CharTokenizer("ab"), COUNT, COUNT, bytes_per_char=1.0)
    assert data.bits_per_byte(math.log(2)) == pytest.approx(1.0), "ln 2 nats are one bit"
    assert data.bits_per_byte(1.5) == pytest.approx(2.164042561), "1.5 nats / 0.693147181"
    wide = Dataset("", CharTokenizer("ab"), COUNT, COUNT, bytes_per_char=2.0)
    assert wide.bits_per_byte(1.5) == pytest.approx(1.082021281), "one character in two bytes: half the bits on each"


def test_load_data_counts_bytes_of_the_validation_text(tmp_path):
    """A corpus is split, encoded with one vocabulary, and measured in bytes per character of the validation text."""
    file = tmp_path / "text.txt"
    file.write_text("a" * 90 + "äöü" * 2 + "bbbb", encoding="utf-8")
    data = load_data(str(file))
    assert data.tokenizer.chars == "abäöü", "one tokenizer for both sides, or the same id would mean two characters"
    assert data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val) == "a" * 90 + "äöü" * 2 + "bbbb"
    assert data.bytes_per_char == pytest.approx(16 / 10), "six letters of two bytes and four of one, in ten characters"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b" \n ", "holds no text"), (b"\xff\xfe\x00", "not UTF-8"), (None, "no corpus or file")],
    ids=["empty", "blank", "no UTF-8", "missing"],
)
def test_a_text_that_cannot_be_used_is_refused(content, message, tmp_path):
    """A missing, empty or unreadable text is refused in one line that names the file."""
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        load_data(str(file))


def test_a_word_list_is_shuffled_whole():
    """A word list is put in a random order that its seed decides, and no word is lost, doubled or joined to another."""
    text = "\n".join(WORDS) + "\n"
    mixed = shuffle_lines(text, seed=1)
    assert mixed[0] == mixed[-1] == "\n", "every word, the first and the last too, has a boundary on both sides"
    assert "\n\n" not in mixed, "an empty line is a word of no letters"
    assert Counter(mixed[1:-1].split("\n")) == Counter(WORDS), "the words are not those of the list"
    assert mixed[1:-1].split("\n") != WORDS, "in sorted order the validation words all begin with late letters"
    assert mixed == shuffle_lines(text, seed=1) != shuffle_lines(text, seed=2), "the seed decides the order"


def test_forget_keeps_what_follows_the_last_boundary():
    """Of a context only the part after the last boundary is kept, whatever came before; without one all of it is."""
    x = torch.tensor([[3, 4, 0, 5], [3, 0, 4, 5], [0, 3, 0, 0], [3, 4, 5, 6], [0, 3, 4, 5], [3, 4, 5, 0]])
    kept = [[0, 0, 0, 5], [0, 0, 4, 5], [0, 0, 0, 0], [3, 4, 5, 6], [0, 3, 4, 5], [0, 0, 0, 0]]
    assert forget(x, 0).tolist() == kept, "a context is cut at its last boundary, not at its first"
    assert forget(x - 3, -3).tolist() == [[i - 3 for i in row] for row in kept], "the boundary is any token, not only 0"
    assert x[0].tolist() == [3, 4, 0, 5], "the windows share memory with the text: forgetting must not write into it"


@pytest.mark.parametrize("block_size", [1, 2, 3, 6])
def test_contexts_never_cross_a_word(block_size, tmp_path):
    """In a word list each letter is predicted from its own word: the letters before it, padded with boundaries."""
    file = tmp_path / "words.txt"
    file.write_text("\n".join(WORDS), encoding="utf-8")
    data = load_data(str(file), words=True, seed=5)
    text = data.tokenizer.decode(data.train)
    x, y = windows(data.train, block_size)
    x = forget(x, data.tokenizer.index["\n"])
    expected = []
    for end in range(block_size, len(text)):
        word = text[:end].rpartition("\n")[2] if "\n" in text[end - block_size:end] else text[end - block_size:end]
        expected.append((word[-block_size:].rjust(block_size, "\n"), text[end]))
    decode = data.tokenizer.decode
    found = [(decode(context), decode([target])) for context, target in zip(x, y, strict=True)]
    assert found == expected, "a context holds letters of the word before, or lost some of its own"


def test_bigrams_of_a_word_list_match_a_counter(tmp_path):
    """The pairs of a word list are those of its words with the boundary before and after each, as makemore counts."""
    file = tmp_path / "words.txt"
    file.write_text("\n".join(WORDS), encoding="utf-8")
    data = load_data(str(file), words=True)
    x, y = windows(torch.cat([data.train, data.val]), 1)
    befores, afters = (data.tokenizer.decode(ids.flatten()).replace("\n", ".") for ids in (x, y))
    pairs = Counter(zip(befores, afters, strict=True))
    padded = ["." + word + "." for word in WORDS]
    assert pairs == Counter(pair for word in padded for pair in pairwise(word)), "a word lost its begin or its end"
