"""A text as tokens, split in two, and the examples a model learns from: some context and the token that follows.

The tokens stand in a file, of which a memory map loads only the pages that a batch touches.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from shared import corpus
from shared.atomic import write
from shared.errors import BadInput

import numpy as np
import torch

from tokenizer import END, train_tokenizer


def split(text: str) -> tuple[str, str]:
    """The first 90 % of the characters to train on, the rest to validate on.

    By position, before any window is cut: a random split of windows would put nearly the same stretch of text
    on both sides, and the validation loss would reward learning by heart.
    """
    cut = int(0.9 * len(text))
    mark = text.find(END, max(0, cut - len(END) + 1), cut + len(END) - 1)
    if mark >= 0:  # the cut goes through an end mark
        cut = mark + len(END)
    return text[:cut], text[cut:]


def encode(text: str, tokenizer) -> torch.Tensor:
    """The tokens of `text` -> [N]; an end token follows each document but the last, or BadInput without one.

    Two bytes each (uint16), or four where the vocabulary has more than 65,536 tokens.
    """
    ids = []
    for i, document in enumerate(text.split(END)):
        if i:
            if END not in tokenizer.special:
                raise BadInput(f"the text holds {END}, but its tokenizer was made without: train a new one")
            ids.append(tokenizer.special[END])
        ids.extend(tokenizer.encode(document))
    return torch.from_numpy(np.array(ids, dtype=np.uint16 if len(tokenizer) <= 2**16 else np.int32))


def in_file(path: Path, data: torch.Tensor) -> torch.Tensor:
    """The tokens `data` [N], written to `path` as they are, and read from there as they are needed."""
    ids = data.numpy()
    write(path, ids.tobytes())
    return torch.from_numpy(np.memmap(path, dtype=ids.dtype, mode="c"))  # "c": torch wants it writable, the file is not


def windows(data: torch.Tensor, block_size: int):
    """The text cut into stretches of `block_size` tokens, and for every position the token that follows it.

    data [N] -> x, y [(N - 1) // block_size, block_size]: [1, 2, 3, 4, 5, 6] with block_size 2 gives
    x = [[1, 2], [3, 4]], y = [[2, 3], [4, 5]]. Raises BadInput when no window fits.
    """
    if len(data) <= block_size:
        raise BadInput(f"a text of {len(data)} tokens has no window of {block_size} + 1: use a longer text")
    end = (len(data) - 1) // block_size * block_size
    return data[:end].view(-1, block_size), data[1:end + 1].view(-1, block_size)


def batches(data: torch.Tensor, block_size: int, batch_size: int, seed: int, start: int = 0):
    """Minibatches without end: each pass over the text draws every window once, in a new order.

    Yields x, y [batch_size, block_size]. A pass begins at a random offset below block_size, drawn anew, and has as many
    whole batches as fit behind the largest one; raises BadInput for a text where that is none. Drawing windows
    independently would show some three times before others once.
    Each pass has a generator of its own, so that a run goes on at batch `start` as if it had never stopped.
    """
    per_pass = (len(data) - block_size) // block_size // batch_size  # whole batches, wherever the windows begin
    if per_pass < 1:
        raise BadInput(f"{len(data)} tokens do not fill a batch of {batch_size} windows of {block_size}: "
                       "use a longer text, a smaller batch_size or a smaller block_size")
    for turn in itertools.count(start // per_pass):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + turn) % 2**63)
        # Cut at other places in each pass, so that every token is sometimes early in its window and sometimes late.
        offset = torch.randint(block_size, (1,), generator=generator).item()
        x, y = windows(data[offset:], block_size)
        order = torch.randperm(len(x), generator=generator)
        for place in range(start % per_pass if turn == start // per_pass else 0, per_pass):
            rows = order[place * batch_size:(place + 1) * batch_size]
            yield x[rows].long(), y[rows].long()


@dataclass
class Dataset:
    """A corpus, ready for a model."""

    name: str
    tokenizer: object  # a CharTokenizer or BPETokenizer
    train: torch.Tensor  # token ids of the first 90 % of the text
    val: torch.Tensor  # token ids of the rest
    tokens_per_char: float  # validation tokens to predict for each character: 1 for characters, fewer for byte pairs
    bytes_per_char: float  # of the validation text in UTF-8: 1 for plain English

    def nats_per_char(self, nats_per_token: float) -> float:
        """A loss per token says little of a vocabulary whose tokens hold more or fewer characters: per character."""
        return nats_per_token * self.tokens_per_char

    def bits_per_byte(self, nats_per_char: float) -> float:
        """A loss in the unit that compares across vocabularies and with compressors: bits per byte of text."""
        return nats_per_char / math.log(2) / self.bytes_per_char


def load_data(name: str | None = None, kind: str = "char", vocab_size: int = 1024, tokenizer=None) -> Dataset:
    """The corpus called `name`, split and encoded.

    The tokenizer is learned from the training text, or given. Characters are the exception: a character that only the
    validation text has must have an id as well. Raises BadInput for a text that leaves nothing on one side.
    """
    source = corpus.load(name)
    train, val = split(source.text)
    plain = val.replace(END, "")
    if not (train and plain):
        raise BadInput(f"a text of {len(source.text)} characters cannot be split: use a longer text")
    tokenizer = tokenizer or train_tokenizer(kind, source.text if kind == "char" else train, vocab_size)
    train_ids, val_ids = encode(train, tokenizer), encode(val, tokenizer)
    # The first token is never predicted, so its characters are not counted either.
    predicted = len(plain) - len(tokenizer.decode(val_ids[:1]).replace(END, ""))
    return Dataset(
        source.name, tokenizer, train_ids, val_ids,
        tokens_per_char=(len(val_ids) - 1) / max(predicted, 1), bytes_per_char=len(plain.encode("utf-8")) / len(plain),
    )
