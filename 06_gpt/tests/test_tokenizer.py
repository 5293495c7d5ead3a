"""Checkpoints of the tokenizer: characters to integers and back."""

from shared.errors import BadInput

import pytest
import torch

from tokenizer import CharTokenizer


def test_characters_are_numbered_in_order():
    """A tokenizer knows each character of the text once, sorted, numbered from 0."""
    tokenizer = CharTokenizer("hello")
    assert tokenizer.chars == "ehlo" and len(tokenizer) == 4, "the distinct characters, sorted"
    assert tokenizer.encode("hole") == [1, 3, 2, 0], "a character's id is its place among the sorted characters"
    assert tokenizer.encode("") == [], "no text, no ids"
    assert CharTokenizer("ooh, hello").chars == " ,ehlo", "order does not depend on where a character occurs first"


def test_decode_undoes_encode():
    """Decoding what was encoded gives the text back, characters beyond ASCII included."""
    text = "Wörter,\n\tmots & 言葉 🙂 words"
    tokenizer = CharTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text, "encode and decode must be each other's inverse"
    ids = torch.tensor(tokenizer.encode(text))
    assert tokenizer.decode(ids) == text, "a tensor of ids serves as well as a list"


def test_an_unknown_character_is_refused():
    """A character that the vocabulary lacks is refused by name, not replaced in silence."""
    with pytest.raises(BadInput, match="'x' is not among the 4 known"):
        CharTokenizer("hello").encode("helxo")
