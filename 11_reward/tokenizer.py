"""Text to integers, three ways: characters, byte pairs learned from a text (BPE), and bytes: no pair learned yet."""

import heapq
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise

from shared.errors import BadInput

import regex
import tiktoken

END = "<|endoftext|>"  # the special token between documents, never the result of encoding ordinary text

# Pieces that merges never cross: contractions, a word with the space before it, digits, punctuation, runs of spaces.
# The pattern of GPT-2 (Radford et al. 2019): without it "dog.", "dog!" and "dog?" would each take a place.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class CharTokenizer:
    """The distinct characters of a text, numbered in sorted order.

    CharTokenizer("hello").chars == "ehlo", so "hole" encodes to [1, 3, 2, 0].
    """

    def __init__(self, text: str, special: tuple[str, ...] = ()):
        self.chars = "".join(sorted(set(text)))
        self.index = {char: i for i, char in enumerate(self.chars)}
        self.special = {name: i for i, name in enumerate(special, len(self.chars))}
        self.texts = [*self.chars, *self.special]

    def __len__(self):
        return len(self.chars) + len(self.special)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text of N characters -> N token ids; with `special`, the name of a special token is that one token.

        Raises BadInput for a character that is not in the vocabulary.
        """
        if special and self.special:
            return encode_special(self, text)
        try:
            return [self.index[char] for char in text]
        except KeyError as error:
            raise BadInput(f"character {error.args[0]!r} is not among the {len(self)} known: {self.chars!r}") from None

    def decode(self, ids) -> str:
        """Token ids, a list or a tensor [N] -> text."""
        return "".join(self.texts[i] for i in ids)

    def state(self) -> dict:
        """All that `from_state` needs, as plain data."""
        return {"kind": "char", "text": self.chars, "special": tuple(self.special)}


class BPETokenizer:
    """Byte-level byte-pair encoding. Sennrich, Haddow & Birch (2016); on bytes: Radford et al. (2019).

    `ranks` gives each byte string of the vocabulary its id, lower for those that were learned earlier: encoding merges,
    again and again, the neighbours whose joined bytes rank lowest. `special` tokens have ids of their own. Any text can
    be encoded, in any language, since any text is bytes. `form` is the Unicode normal form that a model's texts were
    brought into (NFC: "e" and an accent become "é").
    """

    def __init__(
        self, ranks: dict[bytes, int], special: dict[str, int], pattern: str = PATTERN, form: str | None = None,
    ):  # fmt: skip
        self.ranks, self.special, self.pattern, self.form = ranks, special, pattern, form
        self.fast = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.unknown = {byte for byte in range(256) if bytes([byte]) not in ranks}

    def __len__(self):
        return self.fast.n_vocab  # the highest id and one: ids may have gaps

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text -> token ids, by tiktoken's encoder (compiled, the same answer as `encode_slowly`).

        With `special`, the name of a special token stands for that token, as in the text that a chat template makes.
        Without, it is text like any other: a document that quotes the name must not end there. This holds for words
        that were added to the vocabulary, too (Qwen3's <think>), which other programs meet in any text.
        """
        if special and self.special:
            return encode_special(self, text)
        # Not before the names are found: NFC would make one character of a name's last ">" and a mark that follows it.
        text = unicodedata.normalize(self.form, text) if self.form else text
        if self.unknown and not self.unknown.isdisjoint(text.encode("utf-8", "replace")):
            return self.encode_slowly(text)
        return self.fast.encode_ordinary(text)

    def encode_slowly(self, text: str) -> list[int]:
        """The same in plain Python. The traps: merge by rank, not from left to right, and never across pieces.

        A byte without a token is left out, as SmolLM2 leaves out the 21 bytes that it has none for.
        """
        ids = []
        for piece in regex.findall(self.pattern, unicodedata.normalize(self.form, text) if self.form else text):
            if (whole := piece.encode("utf-8")) in self.ranks:  # no merges may lead there, as in Llama 3's vocabulary
                ids.append(self.ranks[whole])
                continue
            parts = [bytes([byte]) for byte in whole if byte not in self.unknown]
            while len(parts) > 1:
                ranks = [self.ranks.get(a + b, float("inf")) for a, b in pairwise(parts)]
                best = min(ranks)
                if best == float("inf"):  # no two neighbours form a token
                    break
                i = ranks.index(best)
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            ids.extend(self.ranks[part] for part in parts)
        return ids

    def decode(self, ids) -> str:
        """Token ids, a list or a tensor [N] -> text. Bytes that are no UTF-8 (a young model) become U+FFFD."""
        return self.fast.decode([int(i) for i in ids])

    def state(self) -> dict:
        """All that `from_state` needs, as plain data."""
        return {
            "kind": "bpe", "ranks": self.ranks, "special": self.special, "pattern": self.pattern, "form": self.form,
        }


def encode_special(tokenizer, text: str) -> list[int]:
    """The ids of a text in which the names of special tokens stand for these tokens."""
    longest_first = sorted(tokenizer.special, key=len, reverse=True)  # of two names that begin alike
    pieces = regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text)
    known = tokenizer.special
    return [i for piece in pieces for i in ([known[piece]] if piece in known else tokenizer.encode(piece))]


def extend(tokenizer, text: str, special: tuple[str, ...]):
    """A tokenizer that has the tokens `special` besides, and if it is one of characters, those of `text`.

    Returns it, and the new id of each old one: byte pairs keep theirs, characters are numbered in sorted order.
    """
    more = [name for name in special if name not in tokenizer.special]
    if isinstance(tokenizer, CharTokenizer):
        new = CharTokenizer(tokenizer.chars + text, (*tokenizer.special, *more))
        return new, [new.texts.index(each) for each in tokenizer.texts]
    special = tokenizer.special | {name: i for i, name in enumerate(more, len(tokenizer))}
    new = BPETokenizer(tokenizer.ranks, special, tokenizer.pattern, tokenizer.form)
    return new, list(range(len(tokenizer)))


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


def learn_tokens_slowly(text: str, n_tokens: int, pattern: str = PATTERN) -> list[bytes]:
    """Byte-pair training: start from the 256 bytes and join the most frequent pair of neighbours until there are
    `n_tokens`, or until every piece is one token. Of pairs that tie, the one with the lower ids is joined first.
    """
    pieces = [list(piece.encode("utf-8")) for document in text.split(END) for piece in regex.findall(pattern, document)]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < n_tokens:
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not counts:
            break
        pair = min(counts.items(), key=lambda item: (-item[1], item[0]))[0]
        pieces = [merge(piece, pair, len(tokens)) for piece in pieces]
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


def learn_tokens(text: str, n_tokens: int, pattern: str = PATTERN) -> list[bytes]:
    """The same tokens in a second where recounting the text for every merge takes minutes.

    Three ideas: count each distinct piece once and weigh it, remember which pieces hold a pair, and keep the pairs in a
    heap that is corrected only where it is read.
    """
    words = Counter(piece for document in text.split(END) for piece in regex.findall(pattern, document))
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
        return CharTokenizer(text.replace(END, ""), special=(END,) if END in text else ())
    if kind not in ("byte", "bpe"):
        raise BadInput(f"tokenizer {kind!r}: choose char, byte or bpe")
    if kind == "bpe" and not 257 <= vocab_size <= 2**16:
        raise BadInput(f"vocab_size {vocab_size}: bpe needs the 256 bytes and {END}, and ids of 16 bits: 257 to 65536")
    tokens = learn_tokens(text, 256 if kind == "byte" else vocab_size - 1)
    return BPETokenizer({token: i for i, token in enumerate(tokens)}, special={END: len(tokens)})


def from_state(state: dict):
    """The tokenizer that `state()` described. Raises TypeError or ValueError for what describes none."""
    state = dict(state)
    return {"char": CharTokenizer, "bpe": BPETokenizer}.get(state.pop("kind", None))(**state)
