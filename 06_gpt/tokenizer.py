"""Text to integers, three ways: characters, bytes, and byte pairs learned from a text (BPE).

All three encode and decode, know their special token if they have one, and can be written down as plain data.
A byte tokenizer is a byte-pair tokenizer that has learned nothing yet.
"""

import heapq
from collections import Counter, defaultdict
from itertools import pairwise

from shared.errors import BadInput

import regex
import tiktoken

END = "<|endoftext|>"  # stands between documents; one special token, never the result of encoding ordinary text

# Pieces that merges never cross: contractions, a word with the space before it, digits, punctuation, runs of spaces.
# The pattern of GPT-2 (Radford et al. 2019): without it "dog.", "dog!" and "dog?" would each take a place.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class CharTokenizer:
    """The characters of a text, numbered in sorted order; the special token comes last, if there is one.

    CharTokenizer("ehlo").encode("hole") == [1, 3, 2, 0].
    """

    def __init__(self, chars: str, special: bool = False):
        self.chars = chars
        self.index = {char: i for i, char in enumerate(chars)}
        self.end = len(chars) if special else None

    def __len__(self):
        return len(self.chars) + (self.end is not None)

    def encode(self, text: str) -> list[int]:
        """Text of N characters -> N token ids. Raises BadInput for a character that is not in the vocabulary."""
        try:
            return [self.index[char] for char in text]
        except KeyError as error:
            raise BadInput(f"character {error.args[0]!r} is not among the {len(self)} known: {self.chars!r}") from None

    def decode(self, ids: list[int]) -> str:
        return "".join(END if i == self.end else self.chars[i] for i in ids)

    def state(self) -> dict:
        """All that `from_state` needs, as plain data."""
        return {"kind": "char", "chars": self.chars, "special": self.end is not None}


class BPETokenizer:
    """Byte-level byte-pair encoding. Sennrich, Haddow & Birch (2016); on bytes: Radford et al. (2019).

    `tokens` are the byte strings of the vocabulary in the order they were learned, the 256 single bytes first. A
    token's place is its id and its rank: encoding merges, again and again, the neighbours whose joined bytes rank
    lowest. The special token comes last. Any text can be encoded, in any language, since any text is bytes.
    """

    def __init__(self, tokens: list[bytes]):
        self.tokens = tokens
        self.ranks = {token: rank for rank, token in enumerate(tokens)}
        self.end = len(tokens)
        self.fast = tiktoken.Encoding(
            "bpe", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={END: self.end}
        )

    def __len__(self):
        return len(self.tokens) + 1

    def encode(self, text: str) -> list[int]:
        """Text -> token ids, by tiktoken's encoder (compiled, the same answer as `encode_slowly`)."""
        return self.fast.encode_ordinary(text)

    def encode_slowly(self, text: str) -> list[int]:
        """The same in plain Python. The traps: merge by rank, not from left to right, and never across pieces."""
        ids = []
        for piece in regex.findall(PATTERN, text):
            parts = [bytes([byte]) for byte in piece.encode("utf-8")]
            while len(parts) > 1:
                ranks = [self.ranks.get(a + b, len(self.tokens)) for a, b in pairwise(parts)]
                best = min(ranks)
                if best == len(self.tokens):  # no two neighbours form a token
                    break
                i = ranks.index(best)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            ids.extend(self.ranks[part] for part in parts)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Token ids -> text. Bytes that are no UTF-8 (a cut character, a young model) become U+FFFD."""
        return self.fast.decode(ids)

    def state(self) -> dict:
        """All that `from_state` needs, as plain data."""
        return {"kind": "bpe", "tokens": [token.hex() for token in self.tokens]}


def merge(piece: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Every `pair` in the piece replaced by `new`, from the left: [1, 1, 1, 2], (1, 1), 9 -> [9, 1, 2]."""
    merged, i = [], 0
    while i < len(piece):
        if i + 1 < len(piece) and (piece[i], piece[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(piece[i])
            i += 1
    return merged


def learn_tokens(text: str, n_tokens: int) -> list[bytes]:
    """Byte-pair training: start from the 256 bytes and join the most frequent pair of neighbours until there are
    `n_tokens`, or until every piece is one token. Of pairs that tie, the one with the lower ids is joined first.

    Recounting the text for every merge takes minutes. Three ideas make it a second: count each distinct piece once and
    weigh it, remember which pieces hold a pair, and keep the pairs in a heap that is corrected only where it is read.
    """
    words = Counter(piece for document in text.split(END) for piece in regex.findall(PATTERN, document))
    pieces, weights = [list(word.encode("utf-8")) for word in words], list(words.values())
    counts, where = Counter(), defaultdict(set)
    for i, piece in enumerate(pieces):
        for pair in pairwise(piece):
            counts[pair] += weights[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < n_tokens and heap:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # the count fell since this entry was made: put it back where it belongs now
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        # subtle: no other pair will ever spell this token, "ab" + "c" as well as "a" + "bc". Equal bytes that no merge
        # joins to their surroundings are cut alike at every step, so all of them go the same way.
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        touched = set()
        for i in where.pop(pair):
            old, pieces[i] = pieces[i], merge(pieces[i], pair, new)
            for gone in pairwise(old):
                counts[gone] -= weights[i]
            for found in pairwise(pieces[i]):
                counts[found] += weights[i]
                where[found].add(i)
                touched.add(found)
        for other in touched:
            heapq.heappush(heap, (-counts[other], other))
    return tokens


def train_tokenizer(kind: str, text: str, vocab_size: int):
    """A tokenizer of the kind "char", "byte" or "bpe" for `text`; `vocab_size` counts the special token and is for bpe.

    Raises BadInput for another kind, or a vocabulary that does not hold the 256 bytes or not fit into 16 bits.
    """
    if kind == "char":
        chars = "".join(sorted(set(text.replace(END, ""))))
        return CharTokenizer(chars, special=END in text)
    if kind == "byte":
        return BPETokenizer(learn_tokens("", 256))
    if kind != "bpe":
        raise BadInput(f"tokenizer {kind!r}: choose char, byte or bpe")
    if not 257 <= vocab_size <= 2**16:
        raise BadInput(f"vocab_size {vocab_size}: bpe needs the 256 bytes and {END}, and ids of 16 bits: 257 to 65536")
    return BPETokenizer(learn_tokens(text, vocab_size - 1))


def from_state(state: dict):
    """The tokenizer that `state()` described."""
    if state["kind"] == "char":
        return CharTokenizer(state["chars"], state["special"])
    return BPETokenizer([bytes.fromhex(token) for token in state["tokens"]])
