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
    """The text cut into stretches of `block_size` tokens, and for every position the token that follows it.

    data [N] -> x, y [(N - 1) // block_size, block_size]: [1, 2, 3, 4, 5, 6] with block_size 2 gives
    x = [[1, 2], [3, 4]], y = [[2, 3], [4, 5]]. Raises BadInput when no window fits.
    """
    if len(data) <= block_size:
        raise BadInput(f"a text of {len(data)} tokens has no window of {block_size} + 1: use a longer text")
    end = (len(data) - 1) // block_size * block_size
    return data[:end].view(-1, block_size), data[1:end + 1].view(-1, block_size)


def batches(data: torch.Tensor, block_size: int, batch_size: int, seed: int):
    """Minibatches without end: each pass over the text draws every window once, in a new order.

    Yields x, y [batch_size, block_size]. A pass begins at a random offset below block_size, drawn anew, and has as many
    whole batches as fit behind the largest one; raises BadInput for a text where that is none. Drawing windows
    independently would show some three times before others once.
    """
    per_pass = (len(data) - block_size) // block_size // batch_size  # whole batches, wherever the windows begin
    if per_pass < 1:
        raise BadInput(f"{len(data)} tokens do not fill a batch of {batch_size} windows of {block_size}: "
                       "use a longer text, a smaller batch_size or a smaller block_size")
    generator = torch.Generator().manual_seed(seed)
    while True:
        # Cut at other places in each pass, so that every token is sometimes early in its window and sometimes late.
        offset = torch.randint(block_size, (1,), generator=generator).item()
        x, y = windows(data[offset:], block_size)
        order = torch.randperm(len(x), generator=generator)
        for place in range(per_pass):
            rows = order[place * batch_size:(place + 1) * batch_size]
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
