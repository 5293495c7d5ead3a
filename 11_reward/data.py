"""A text as tokens, split in two, and the examples a model learns from: some context and the token that follows.

The tokens stand in a file, of which a memory map loads only the pages that a batch touches.

Unlike a text, conversations are many short examples of different lengths, and only a part of each is to be learned.
They become batches by padding, or by packing several into a row.
"""

import itertools
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from shared import corpus
from shared.atomic import write
from shared.errors import BadInput

import numpy as np
import torch

from look import Look, hidden
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


ROLES = ("system", "user", "assistant")


def messages_of(record) -> list[dict]:
    """The conversation [{"role": "user", "content": "Hi"}, ...] of a record in one of the usual forms.

    `messages`; `prompt` and `completion`, as texts or as messages; `instruction`, `input` and `output` (Alpaca). Spaces
    around a text are dropped: with BPE, one before an answer would melt into its first token. Raises ValueError.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no object with fields")
    if "messages" in record:
        talk = record["messages"]
    elif {"prompt", "completion"} <= record.keys():
        sides = zip(("user", "assistant"), (record["prompt"], record["completion"]), strict=True)
        sides = [[{"role": role, "content": text}] if isinstance(text, str) else text for role, text in sides]
        talk = sides[0] + sides[1] if all(isinstance(side, list) for side in sides) else None
    elif {"instruction", "output"} <= record.keys():
        asked, more = record["instruction"], record.get("input") or ""
        if not (isinstance(asked, str) and isinstance(more, str)):
            raise ValueError("instruction and input must be texts")
        asked = f"{asked}\n\n{more}" if more else asked
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
    else:
        raise ValueError("it has no messages, no prompt and completion, and no instruction and output")
    if not isinstance(talk, list) or not talk or not all(isinstance(message, dict) for message in talk):
        raise ValueError("messages must be a list of objects with role and content")
    for message in talk:
        if message.get("role") not in ROLES:
            raise ValueError(f"the role {message.get('role')!r} is none of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise ValueError(f"the content of the message of {message['role']} is no text, or empty")
    if talk[0]["role"] == "assistant" or talk[-1]["role"] != "assistant":
        raise ValueError("a conversation begins with a question and ends with an answer of the assistant")
    return [{"role": message["role"], "content": message["content"].strip()} for message in talk]


def with_messages(record) -> dict:
    """The record with its conversation in "messages". Raises ValueError for a form that is not known."""
    return {"messages": messages_of(record), **{key: value for key, value in record.items() if key != "messages"}}


def read_records(path: str | Path, understand=with_messages) -> list[dict]:
    """The records of a file, JSON lines or one JSON list, as `understand` gives them back.

    Raises BadInput that names the line, or the number in the list, of the first one for which that raises ValueError.
    """
    path = Path(os.environ.get("STAGES_FROM", "."), path)  # where it was typed
    try:
        text = path.read_text("utf-8")
        whole = text.lstrip().startswith("[")
        found = json.loads(text) if whole else text.split("\n")  # not splitlines(): a text may hold U+2028
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read ({error}): give a file with a record in each line") from None
    records = []
    for i, record in enumerate(found, 1):
        if whole or record.strip():
            try:
                records.append(understand(record if whole else json.loads(record)))
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, {'record' if whole else 'line'} {i}: {error}") from None
    if not records:
        raise BadInput(f"{path} has no records")
    return records


@dataclass
class Example:
    """A conversation as tokens, and which of them are to be learned: those of answers and what ends each."""

    ids: list[int]  # N
    learned: list[bool]  # N


@dataclass
class Batch:
    """Conversations in R rows of T tokens."""

    x: torch.Tensor  # [R, T]
    y: torch.Tensor  # [R, T], the token that follows each
    learned: torch.Tensor  # [R, T], True where y is to be learned
    part: torch.Tensor  # [R, T], which conversation of its row a token belongs to; -1: padding
    position: torch.Tensor  # [R, T], where in its conversation a token stands; -1: padding

    def to(self, device):
        """The same on another device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def packed(lengths: list[int], room: int) -> list[list[int]]:
    """Which examples share a row of `room` tokens: the longest first, each into the first row that still has room.

    lengths [5, 3, 4, 2] and room 7 give [[0, 3], [2, 1]].
    """
    rows, left = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, free in enumerate(left) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(i)
        left[row] -= lengths[i]
    return rows


def collate(examples: list[Example], room: int | None = None) -> Batch:
    """Examples as one batch: each in a row of its own, padded on the right, or packed into rows of `room` tokens.

    The last token of a conversation is never read, so one of N tokens takes N - 1 places, and no place predicts the
    beginning of another conversation. Of two conversations with ids [5, 6, 7] and [8, 9]:

        padded   x = [[5, 6], [8, 0]]   y = [[6, 7], [9, 0]]   part = [[0, 0], [0, -1]]   position = [[0, 1], [0, -1]]
        packed   x = [[5, 6, 8]]        y = [[6, 7, 9]]        part = [[0, 0, 1]]         position = [[0, 1, 0]]

    Padded rows are as long as the longest, up to the next multiple of 16. Raises BadInput for a conversation that is
    longer than `room`.
    """  # fmt: skip
    lengths = [len(example.ids) - 1 for example in examples]
    if room is not None and max(lengths) > room:
        raise BadInput(f"a conversation of {max(lengths) + 1} tokens does not fit into rows of {room}")
    rows = [[i] for i in range(len(examples))] if room is None else packed(lengths, room)
    # A multiple of 16: for every new shape of a product, a CPU's library makes a new program.
    T = math.ceil(max(lengths) / 16) * 16 if room is None else room
    fill = {"x": 0, "y": 0, "learned": 0, "part": -1, "position": -1}
    filled = {name: np.full((len(rows), T), value) for name, value in fill.items()}
    for r, row in enumerate(rows):
        start = 0
        for part, i in enumerate(row):
            place = slice(start, start := start + lengths[i])
            ids, learned = examples[i].ids, examples[i].learned
            values = (ids[:-1], ids[1:], learned[1:], part, range(lengths[i]))
            for name, value in zip(fill, values, strict=True):
                filled[name][r, place] = value
    batch = Batch(*map(torch.from_numpy, filled.values()))
    batch.learned = batch.learned.bool()
    return batch


def apart(model, batch: Batch) -> Look:
    """What each token of a packed row may look at: those of its own conversation up to itself, from position 0 on.

    The model's window and its sinks hold within each conversation.
    """
    other = batch.part[:, None, :, None] != batch.part[:, None, None, :]  # [R, 1, T, T]
    real = batch.part >= 0  # padding sees everything: it is not read, but a softmax over nothing would be nan
    unseen = (hidden(batch.position, batch.position, model.config) | other) & real[:, None, :, None]
    look = Look(model.rope(batch.position[:, None]), unseen, real=real)
    if model.config.n_sink == 0:
        return look
    far = batch.position.clamp(max=model.config.span + model.config.n_sink - 1)
    sink = (batch.position < model.config.n_sink)[:, None, None]
    return replace(look, far=model.rope(far[:, None]), sink=sink)
