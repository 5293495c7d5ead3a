"""A text as tokens, split in two, and the examples a model learns from: some context and the token that follows."""

import math
from dataclasses import dataclass

from shared import corpus
from shared.errors import BadInput

import torch

from tokenizer import CharTokenizer


def split(text: str) -> tuple[str, str]:
    """The first 90 % of the characters to train on, the rest to validate on.

    By position, before any window is cut: a random split of windows would put nearly the same stretch of text
    on both sides, and the validation loss would reward learning by heart.
    """
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def shuffle_lines(text: str, seed: int) -> str:
    """A word list in random order, since a split by position would be unfair to a sorted one.

    A line break before each word and one after the last: every word begins and ends with the same boundary token.
    Empty lines are left out.
    """
    words = text.split()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))
    return "\n".join(["", *(words[i] for i in order.tolist()), ""])


def forget(x, boundary: int):
    """Contexts x [N, T] with everything before the last boundary token replaced by it, as if the text began there.

    So no context reaches into the word before. With boundary 0: [3, 4, 0, 5] -> [0, 0, 0, 5].
    """
    past = (x == boundary).flip(1).cumsum(1).flip(1) > 0  # counted from the right: a boundary here or later
    return x.masked_fill(past, boundary)


def windows(data: torch.Tensor, block_size: int):
    """Every stretch of `block_size` tokens and the token that follows it.

    data [N] -> x [N - block_size, block_size], y [N - block_size]: [1, 2, 3, 4] with block_size 2 gives
    x = [[1, 2], [2, 3]], y = [3, 4]. Raises BadInput when no window fits.
    """
    if len(data) <= block_size:
        raise BadInput(f"a text of {len(data)} tokens has no window of {block_size} + 1: use a longer text")
    rows = data.unfold(0, block_size + 1, 1)  # a view: the text is not copied once per window
    return rows[:, :-1], rows[:, -1]


@dataclass
class Dataset:
    """A corpus, ready for a model."""

    name: str
    tokenizer: CharTokenizer
    train: torch.Tensor  # token ids of the first 90 % of the text
    val: torch.Tensor  # token ids of the rest
    bytes_per_char: float  # of the validation text in UTF-8: 1 for plain English

    def bits_per_byte(self, nats_per_char: float) -> float:
        """A loss in the unit that compares across vocabularies and with compressors: bits per byte of text."""
        return nats_per_char / math.log(2) / self.bytes_per_char


def load_data(name: str | None = None, words: bool = False, seed: int = 1337) -> Dataset:
    """The corpus called `name`, split and encoded; `words` says that it is a word list, one word a line."""
    source = corpus.load(name)
    text = shuffle_lines(source.text, seed) if words else source.text
    tokenizer = CharTokenizer(text)
    train, val = split(text)
    train_ids, val_ids = (torch.tensor(tokenizer.encode(part), dtype=torch.long) for part in (train, val))
    title = f"{source.name}, shuffled words" if words else source.name  # another text: its losses do not compare
    return Dataset(title, tokenizer, train_ids, val_ids, bytes_per_char=len(val.encode("utf-8")) / len(val))
