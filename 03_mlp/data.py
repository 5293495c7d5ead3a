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


def windows(data: torch.Tensor, block_size: int):
    """Every stretch of `block_size` tokens and the token that follows it.

    data [N] -> x [N - block_size, block_size], y [N - block_size]: [1, 2, 3, 4] with block_size 2 gives
    x = [[1, 2], [2, 3]], y = [3, 4]. Raises BadInput when no window fits.
    """
    if len(data) <= block_size:
        raise BadInput(f"a text of {len(data)} tokens has no window of {block_size} + 1: use a longer text")
    rows = data.unfold(0, block_size + 1, 1)  # a view: the text is not copied once per window
    return rows[:, :-1], rows[:, -1]


def batches(data: torch.Tensor, block_size: int, batch_size: int, seed: int):
    """Minibatches without end: each pass over the text draws every window once, in a new order.

    Yields x [batch_size, block_size], y [batch_size]; a text with fewer windows is one batch. The few windows that do
    not fill a batch at the end of a pass are left out of it. Drawing windows independently would show some three times
    before others once.
    """
    x, y = windows(data, block_size)
    batch_size = min(batch_size, len(x))
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for first in range(0, len(x) - batch_size + 1, batch_size):  # the odd few at the end wait for another pass
            rows = order[first:first + batch_size]
            yield x[rows], y[rows]


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


def load_data(name: str | None = None) -> Dataset:
    """The corpus called `name`, split and encoded."""
    source = corpus.load(name)
    tokenizer = CharTokenizer(source.text)
    train, val = split(source.text)
    train_ids, val_ids = (torch.tensor(tokenizer.encode(part), dtype=torch.long) for part in (train, val))
    return Dataset(source.name, tokenizer, train_ids, val_ids, bytes_per_char=len(val.encode("utf-8")) / len(val))
