"""Checkpoints of the tokenizers: byte pairs against a trainer that recounts everything and against Hugging Face's."""

import io
import random
import unicodedata
from collections import Counter
from itertools import pairwise

from shared.errors import BadInput

import pytest
import regex
import tokenizers
import torch

from tokenizer import (
    END,
    PATTERN,
    BPETokenizer,
    CharTokenizer,
    extend,
    from_state,
    learn_tokens,
    learn_tokens_slowly,
    merge,
    train_tokenizer,
)

PROSE = """It was the baker's third attempt, and the bread still wouldn't rise. "We'll try again," she said; they'd
tried twelve times in 2019 alone.  The others watched the oven, the clock, the street - anything but the bread.\r\n
\tAt four it rose. Nobody cheered: they were tired, the baker's boy was asleep, and the cat had eaten the butter!!!
""" * 2
FOREIGN = """Straße und Öl, naïve café; 東京都は東京です。 Привет, привет! ελληνικά 🙂🙂👩‍🚀
e\u0301e\u0301  \u00a0\u3000x\n\n
""" * 3
TIES = "zebra,apple;mango!kiwi?zebra.mango,apple|kiwi-ab;ba,abba:baab,abab/baba,bbaa,aabb"  # no spaces: see below
RUNS = "aaaa aaaaaaa a aa aaa aaaaab baaaaa bbbbbb      x\n\n\n\n\n    aaaaaaaaaaaaaaaaaaaaa"


def slow_tokens(text: str, n_tokens: int, alphabet=range(256)) -> list[bytes]:
    """Byte-pair training by counting all pairs again for every merge. Ids number the alphabet, then what is learned."""
    tokens = [bytes([byte]) for byte in alphabet]
    ids = {token: i for i, token in enumerate(tokens)}
    words = [word for document in text.split(END) for word in regex.findall(PATTERN, document)]
    pieces = [[ids[bytes([byte])] for byte in word.encode("utf-8")] for word in words]
    while len(tokens) < n_tokens:
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))  # the most frequent; of those that tie, lowest ids
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == pair:
                    piece[i:i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens


def slow_encode(text: str, tokens: list[bytes]) -> list[int]:
    """Encoding as the training went: every merge in the order it was learned, through the whole text."""
    pieces = [[bytes([byte]) for byte in word.encode("utf-8")] for word in regex.findall(PATTERN, text)]
    for token in tokens[256:]:
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if piece[i] + piece[i + 1] == token:
                    piece[i:i + 2] = [token]
                i += 1
    return [tokens.index(part) for piece in pieces for part in piece]


def characters_of_bytes() -> dict[int, str]:
    """The character that GPT-2's files, and Hugging Face's, write for each byte: itself where it can be printed."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def hugging_face(text: str, n_tokens: int):
    """Hugging Face's byte-level BPE trained on the text -> (its tokens, a function that cuts a text into tokens)."""
    byte_of = {char: byte for byte, char in characters_of_bytes().items()}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=n_tokens, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([text], trainer)
    vocab = theirs.get_vocab()
    return (
        [bytes(byte_of[char] for char in token) for token in sorted(vocab, key=vocab.get)],
        lambda text: [bytes(byte_of[char] for char in token) for token in theirs.encode(text).tokens],
    )


def random_text(rng: random.Random, length: int) -> str:
    """Characters from all of Unicode, with ASCII, spaces and line breaks among them more often than chance has it.

    Only what Unicode 3.2 knew: of younger characters the two libraries that split a text into pieces may have different
    tables.
    """
    chars = []
    while len(chars) < length:
        char = chr(rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000), 32, 10]))
        if unicodedata.ucd_3_2_0.category(char) not in ("Cn", "Cs"):
            chars += char * rng.choice([1, 1, 1, 2, 5])
    return "".join(chars)


BYTES = [bytes([byte]) for byte in range(256)]


def byte_pairs(*tokens: bytes) -> BPETokenizer:
    """The bytes, then these tokens, then the mark between documents."""
    ranks = {token: i for i, token in enumerate([*BYTES, *tokens])}
    return BPETokenizer(ranks, special={END: len(ranks)})


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer("bpe", PROSE + FOREIGN, 400)


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


def test_the_special_token_of_characters():
    """With documents, the character tokenizer has one more token, the last, which no text encodes to."""
    tokenizer = train_tokenizer("char", f"bcd{END}ab", 0)
    assert tokenizer.chars == "abcd", "the letters of the mark itself are no characters of the text"
    assert len(tokenizer) == 5 and tokenizer.special == {END: 4}, "the special token is the last"
    assert tokenizer.decode([0, 4, 1]) == f"a{END}b", "it decodes to its name"
    assert train_tokenizer("char", "hello", 0).special == {}, "a text without documents needs no special token"
    two = CharTokenizer("ab", special=("<|user|>", END))
    assert two.special == {"<|user|>": 2, END: 3} and len(two) == 4, "several are numbered in the order they are given"
    spelled = CharTokenizer(END, special=(END,))
    assert spelled.special[END] not in spelled.encode(END), "text that spells the mark is ordinary text"


def test_merge_by_hand():
    """Merging a pair replaces it from left to right, without overlap."""
    assert merge([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2], "of three in a row the first two are joined"
    assert merge([1, 1, 1, 1], (1, 1), 9) == [9, 9], "a token cannot be used twice"
    assert merge([1, 2, 3, 1, 2], (1, 2), 9) == [9, 3, 9], "every occurrence, the last one too"
    assert merge([2, 1], (1, 2), 9) == [2, 1], "the order of the pair counts"
    assert merge([], (1, 2), 9) == [] and merge([1], (1, 1), 9) == [1], "nothing to join"


def test_training_by_hand():
    """On "aaabdaaabac", Wikipedia's worked example, both trainers join aa, ab and aaab."""
    # aa occurs 4 times (overlaps count); then (aa, a) and (a, b) twice each: the lower ids are those of a and b
    for learn in (learn_tokens_slowly, learn_tokens):
        found = learn("aaabdaaabac", 259)[256:]
        assert found == [b"aa", b"ab", b"aaab"], f"{learn.__name__} joins {found}: the most frequent pair comes first"
        assert learn("aaabdaaabac", 256) == BYTES, "first of all, the 256 bytes"
        # ba, bc and cb twice each: the lowest ids come first, wherever they stand in the text
        found = learn("cb,cb;bc,bc!ba?ba", 259)[256:]
        assert found == [b"ba", b"bc", b"cb"], f"{learn.__name__}: of pairs that tie, the lowest ids come first"


@pytest.mark.parametrize("text", [PROSE, FOREIGN, TIES, RUNS], ids=["prose", "foreign", "ties", "runs"])
def test_training_equals_counting_again_and_again(text):
    """The merges are those of a trainer that recounts the whole text for each of them, up to the last possible one."""
    slow = slow_tokens(text, 10_000)
    for learn in (learn_tokens_slowly, learn_tokens):
        ours = learn(text, 10_000)
        for i, (a, b) in enumerate(zip(ours, slow, strict=False)):
            assert a == b, (
                f"{learn.__name__}: merge {i - 256} is {a!r}, not {b!r}: a count that is out of date, or another rule "
                "for ties"
            )
        assert len(ours) == len(slow), f"{learn.__name__} ends when every piece is one token, and not before"
        assert learn(text, 300) == ours[:300], f"{learn.__name__}: a smaller vocabulary is not a larger one's beginning"


def test_training_equals_counting_on_many_small_texts():
    """On 150 random texts of two or three letters, where nearly all is ties and overlaps, no merge differs."""
    rng = random.Random(0)
    for _ in range(150):
        letters = rng.choice(["ab", "abc", "aab"])
        words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(2, 25))]
        text = rng.choice([",", " ", "\n"]).join(words)
        tokens = learn_tokens(text, 10_000)
        assert tokens == slow_tokens(text, 10_000), f"merges differ on {text!r}"
        assert tokens == learn_tokens_slowly(text, 10_000), f"the trainer that recounts learns others on {text!r}"
        assert len(set(tokens)) == len(tokens), f"two tokens spell the same on {text!r}: decoding has two answers"


def test_merges_stay_within_pieces():
    """No token joins a word to what comes after it, or reaches from one document into the next."""
    for learn in (learn_tokens_slowly, learn_tokens):
        tokens = learn("dog. dog! dog? " * 50, 10_000)[256:]
        assert b"dog" in tokens and b" dog" in tokens, "words are worth a token, with the space before them too"
        crossing = [token for token in tokens if b"g." in token or b"g!" in token]
        assert not crossing, f"{crossing}: a word and a full stop are two pieces, which no merge joins"
        tokens = learn(END.join(["ab"] * 50), 10_000)[256:]
        assert tokens == [b"ab"], "documents are pieces of their own, and the mark between them is no text"
    assert regex.findall(PATTERN, "I'll say: 'tis 42x  two\n") == [
        "I", "'ll", " say", ":", " '", "tis", " 42", "x", " ", " two", "\n",
    ], "contractions, words, digits, the rest; the last of some spaces goes to the word"


def test_the_same_merges_as_hugging_face():
    """Hugging Face's trainer learns the very same tokens in the same order, ties included, and encodes alike."""
    # Both break ties by ids, but Hugging Face numbers the bytes by the characters it writes for them, and writes Ġ for
    # a space: there a space comes after all letters. Without spaces and line breaks the two orders are one.
    text = TIES + PROSE.replace(" ", ",").replace("\r", "").replace("\n", ";").replace("\t", "|")
    tokens = learn_tokens(text, 10_000)
    theirs, encode = hugging_face(text, 10_000)
    assert len(tokens) > 400, "merge until nothing is left to merge: towards the end all is ties"
    assert tokens[256:] == theirs[256:], "the merges differ from Hugging Face's"
    other = "the-baker;tried,again:they,watched?the,bread!2019.zebra,abab/kiwi"
    ours = byte_pairs(*tokens[256:])
    assert [tokens[i] for i in ours.encode(other)] == encode(other), "the same merges, applied to another text"


@pytest.mark.parametrize("text", [PROSE, FOREIGN, RUNS], ids=["prose", "foreign", "runs"])
def test_hugging_face_differs_in_ties_alone(text):
    """On any text Hugging Face's merges are byte-pair training as here, but for the order in which it numbers bytes."""
    chars = characters_of_bytes()
    theirs, _ = hugging_face(text, 400)
    assert theirs == slow_tokens(text, 400, alphabet=sorted(range(256), key=chars.get)), (
        "with the bytes in Hugging Face's order the slow trainer of this file learns Hugging Face's tokens"
    )


@pytest.mark.parametrize("seed", range(4))
def test_three_encoders_agree(bpe, seed):
    """Tiktoken's encoder, our own slow one and "apply the merges in the order they were learned" give the same ids."""
    rng = random.Random(seed)
    texts = [random_text(rng, 300), PROSE[seed * 50:][:300], RUNS, FOREIGN[:100], "", " ", "\n \n", "aaaab"]
    letters = "".join(rng.choices("aabt he\n", k=300))
    for text in [*texts, letters]:
        slow = slow_encode(text, list(bpe.ranks))
        assert bpe.encode_slowly(text) == slow, f"merge by rank, the lowest first, wherever it stands: {text!r}"
        assert bpe.encode(text) == slow, f"tiktoken has other merges or other pieces: {text!r}"


def test_rank_decides_and_not_position():
    """Of two merges that compete for a letter the one learned first wins, even when it stands further right."""
    tokenizer = byte_pairs(b"bc", b"ab", b"abc")
    for encode in (tokenizer.encode, tokenizer.encode_slowly):
        assert encode("abcd") == [258, ord("d")], "bc was learned before ab: first a bc, then abc"
        assert encode("abab") == [257, 257], "without a c, ab is the best there is"
    tokenizer = byte_pairs(b"bc", b"ab")
    for encode in (tokenizer.encode, tokenizer.encode_slowly):
        assert encode("abc") == [ord("a"), 256], "ab comes first in the text, bc in the training: a, bc"


def test_any_text_comes_back(bpe):
    """Whatever the text, of any language, emoji, lone spaces or nothing at all: decoding its tokens gives it back."""
    rng = random.Random(5)
    texts = ["", " ", "   ", "\n\n \t", "\x00\x7f", "\u200d\ufeff\U0010ffff", "👩‍🚀🏳️‍🌈", "e\u0301"]
    texts += [FOREIGN, PROSE, RUNS]
    texts += ["".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(200))
              for _ in range(10)]
    for tokenizer in (bpe, train_tokenizer("byte", "", 0)):
        for text in texts:
            assert tokenizer.decode(tokenizer.encode(text)) == text, f"{text!r} does not come back"
            assert tokenizer.decode(tokenizer.encode_slowly(text)) == text, f"{text!r} does not come back, slowly"


def test_bytes_that_are_no_text_decode_to_a_mark(bpe):
    """Tokens in any order can be decoded: what is no UTF-8 becomes U+FFFD, the rest is kept."""
    assert bpe.decode([ord("a"), 0xFF, ord("b")]) == "a\ufffdb", "a byte that no text contains"
    cut = "é".encode()[:1]
    assert bpe.decode([*cut, ord("x")]) == "\ufffdx", "half a character"
    rng = random.Random(0)
    for _ in range(50):
        assert isinstance(bpe.decode([rng.randrange(len(bpe)) for _ in range(30)]), str), "any ids decode"


def test_bytes_are_byte_pairs_before_any_merge():
    """The byte tokenizer's ids are the bytes of the text in UTF-8, with one special token beyond them."""
    tokenizer = train_tokenizer("byte", PROSE, 5000)
    assert tokenizer.encode("é€ a") == list("é€ a".encode()), "one id for each byte, the byte itself"
    assert len(tokenizer) == 257 and tokenizer.special == {END: 256}, "256 bytes and the mark between documents"


def test_text_cannot_spell_the_special_token(bpe):
    """Text that contains the letters <|endoftext|> is encoded as those letters: nobody can smuggle the token in."""
    for encode in (bpe.encode, bpe.encode_slowly):
        for text in (END, f"a{END}b", f" {END}\n{END}"):
            ids = encode(text)
            assert bpe.special[END] not in ids, "the special token came out of ordinary text"
            assert bpe.decode(ids) == text, "text that spells the special token is lost on the way"
    assert bpe.special == {END: len(bpe) - 1}, "the special token is the last of the vocabulary"
    assert bpe.decode([len(bpe) - 1]) == END, "the special token decodes to its name"


def other_pattern() -> BPETokenizer:
    """Unlike what is trained here in all that it may: special tokens first, ids with a gap, lines for pieces, NFC."""
    ranks = {token: 300 + 2 * i for i, token in enumerate([*BYTES, b"o ", b"lo", b"lo "])}
    return BPETokenizer(ranks, special={"<|start|>": 0, "<|end|>": 1}, pattern=r"[^\n]+|\n", form="NFC")


def test_pattern_and_special_tokens_are_the_tokenizers_own():
    """A tokenizer takes any pattern, any special tokens and any ids: an open model brings its own."""
    tokenizer = other_pattern()
    assert tokenizer.pattern == r"[^\n]+|\n", "the pattern is an attribute of the tokenizer"
    assert tokenizer.special == {"<|start|>": 0, "<|end|>": 1}, "so are the special tokens, by name"
    assert len(tokenizer) == 817, "a model needs a place for every id, gaps included: the highest id is 816"
    end_of_line = 300 + 2 * ord("\n")
    for encode in (tokenizer.encode, tokenizer.encode_slowly):
        assert encode("lo w") == [816, 300 + 2 * ord("w")], "a merge crosses a space, where the pattern lets it"
        assert encode("low") == [814, 300 + 2 * ord("w")], "no space follows: lo is the best there is"
        assert encode("\n\n") == [end_of_line] * 2, "ids are those of `ranks`, whatever numbers they are"
        assert tokenizer.decode([0, *encode("low\n"), 1]) == "<|start|>low\n<|end|>", "special tokens have texts"
        assert 0 not in encode("<|start|>"), "no text encodes to a special token"
    pieces = learn_tokens("a b\na b\n" * 9, 260, pattern=r"[^\n]+|\n")[256:]
    assert b"a b" in pieces, "the trainer cuts the text with the pattern that it is given"
    assert pieces == learn_tokens_slowly("a b\na b\n" * 9, 260, pattern=r"[^\n]+|\n")[256:], "both trainers do"


def test_names_stand_for_special_tokens_when_asked():
    """With special=True, as for a chat template's text, the names of special tokens become their tokens."""
    ranks = {token: i for i, token in enumerate([*BYTES, b"lo"])}
    tokenizer = BPETokenizer(ranks, special={"<|end|>": 300, "<|end|><|end|>": 301, "[x]": 302}, form="NFC")
    text = "lo<|end|>lo [x]<|end|><|end|>"
    expected = [256, 300, 256, ord(" "), 302, 301]
    assert tokenizer.encode(text, special=True) == expected, "a name is its token, of two that begin alike the longer"
    assert tokenizer.decode(expected) == text, "the names come back as text"
    assert not {300, 301, 302} & set(tokenizer.encode(text)), "without being asked, a name is text like any other"
    assert tokenizer.encode("[x", special=True) == list(b"[x"), "half a name is text"
    assert tokenizer.encode("<|end|>\u0338", special=True) == [300, *"\u0338".encode()], (
        "> and the mark U+0338 are one character in NFC: look for names before the text is brought into its form"
    )


def test_characters_too_know_names_when_asked():
    """A tokenizer of characters as well reads the name of a special token as one token, and only when asked."""
    tokenizer = CharTokenizer("<|>abend", special=("<|end|>", "<|end|><|end|>", END))
    ids = tokenizer.encode("ab<|end|>a<|end|><|end|>|", special=True)
    # "<" is 0, ">" 1, a 2, b 3, d 4, e 5, n 6, "|" 7, and the names follow.
    assert ids == [2, 3, 8, 2, 9, 7], "a name is one token, of two that begin alike the longer one"
    assert tokenizer.decode(ids) == "ab<|end|>a<|end|><|end|>|", "the names come back as text"
    plain = tokenizer.encode("ab<|end|>")
    assert len(plain) == 9 and max(plain) < 8, "without being asked, a name is text like any other"
    with pytest.raises(BadInput, match="'x'"):
        tokenizer.encode("ab<|end|>x", special=True)
    assert CharTokenizer("<|>end").encode("<|end|>", special=True) == [0, 5, 3, 4, 2, 5, 1], "it has no special tokens"


def test_text_is_brought_into_the_models_form():
    """With form NFC an e and an accent are the tokens of é, and a tokenizer without a form leaves text as it is."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    plain, formed = BPETokenizer(ranks, special={}), BPETokenizer(ranks, special={}, form="NFC")
    for ours in (formed.encode, formed.encode_slowly):
        assert ours("e\u0301") == list("é".encode()), "the model knows é as one character"
    for ours in (plain.encode, plain.encode_slowly):
        assert ours("e\u0301") == list("e\u0301".encode()), "nobody asked for another form: any text comes back"


def test_a_byte_without_a_token_is_left_out():
    """Where the vocabulary has no token for a byte, the byte is left out, and its neighbours may be merged."""
    tokens = [bytes([byte]) for byte in range(256) if byte not in (0xF1, 0xFF, ord("z"))] + [b"ab"]
    tokenizer = BPETokenizer({token: i for i, token in enumerate(tokens)}, special={})
    for encode in (tokenizer.encode, tokenizer.encode_slowly):
        assert tokenizer.decode(encode("xzy")) == "xy", "z has no token"
        assert encode("azb") == [tokens.index(b"ab")], "without the z, a and b are neighbours"
        assert encode("zzz") == [], "nothing is left"


@pytest.mark.parametrize("kind", ["char", "char with documents", "byte", "bpe", "another pattern"])
def test_a_tokenizer_comes_back_from_its_state(kind):
    """A tokenizer is saved as plain data: read back without trust it has the same ids for everything."""
    text = PROSE + FOREIGN + (f"{END}more" if kind == "char with documents" else "")
    tokenizer = other_pattern() if kind == "another pattern" else train_tokenizer(kind.split()[0], text, 300)
    file = io.BytesIO()
    torch.save(tokenizer.state(), file)
    file.seek(0)
    again = from_state(torch.load(file, weights_only=True))
    assert type(again) is type(tokenizer) and len(again) == len(tokenizer), "another tokenizer came back"
    assert again.special == tokenizer.special, "the special tokens are part of the state"
    sentence = "the naïve baker's cat\nslept"
    assert again.encode(sentence) == tokenizer.encode(sentence), "ids changed their meaning on the way"
    ids = [*tokenizer.encode(sentence), *tokenizer.special.values()]
    assert [again.decode([i]) for i in ids] == [tokenizer.decode([i]) for i in ids], "ids decode to something else"
    assert again.state() == tokenizer.state(), "a part of the state was lost"
    state = tokenizer.state()
    from_state(state)
    assert state == tokenizer.state(), "reading a state uses it up: it could not be saved again"


@pytest.mark.parametrize(
    "state", [None, [], "abc", {}, {"kind": "word"}, {"kind": "char"}, {"kind": "bpe", "ranks": {}}], ids=str
)
def test_a_state_of_no_tokenizer_is_refused(state):
    """What describes no tokenizer is a TypeError or a ValueError: a checkpoint with it can be called damaged."""
    with pytest.raises((TypeError, ValueError)):
        from_state(state)


@pytest.mark.parametrize("vocab_size", [257, 258, 300])
def test_vocabulary_sizes(vocab_size):
    """The size asked for counts bytes, merges and the special token; a text may have fewer merges to offer."""
    tokenizer = train_tokenizer("bpe", PROSE, vocab_size)
    assert len(tokenizer) == vocab_size, "256 bytes, the merges and one special token"
    assert len(train_tokenizer("bpe", "abc", 300)) == 259, "of abc only two merges can be learned"
    assert len(train_tokenizer("bpe", "", 300)) == 257, "of nothing, none"


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("bpe", 256, "257"), ("bpe", 0, "257"), ("bpe", -5, "257"), ("bpe", 65_537, "16 bits"), ("word", 1000, "byte"),
    ],
)
def test_impossible_vocabularies_are_refused(kind, size, message):
    """A vocabulary smaller than the bytes or larger than 16 bits, and an unknown kind, are refused with the reason."""
    with pytest.raises(BadInput, match=message):
        train_tokenizer(kind, PROSE, size)


@pytest.mark.parametrize("special", [(), (END,)], ids=["no mark", "with a mark"])
def test_characters_and_tags_are_added(special):
    """A longer alphabet is sorted again: each old token is told its new id, and new ones take the other places."""
    old = CharTokenizer("hello", special)
    new, places = extend(old, "ok, hum", ("<|user|>", END, "<|end|>"))
    assert new.chars == " ,ehklmou", "the characters of both, sorted"
    tags = [*special, *(name for name in ("<|user|>", END, "<|end|>") if name not in special)]
    assert new.special == {name: 9 + i for i, name in enumerate(tags)}, "a tag that is there already stays one"
    assert places == [2, 3, 5, 7, *(9 + i for i in range(len(special)))], "e, h, l and o moved: to where?"
    text = "hello"
    assert [places[i] for i in old.encode(text)] == new.encode(text), "old ids through the list are the new ids"
    assert new.decode(new.encode("ok, <|end|>hum", special=True)) == "ok, <|end|>hum", "what was added is not known"
    assert old.chars == "ehlo" and len(old) == 4 + len(special), "the old tokenizer itself was changed"


def test_byte_pairs_keep_their_ids():
    """To byte pairs only tags are added, behind the highest id, and all that they were is kept."""
    old = other_pattern()  # ids with gaps, a pattern and a form of its own
    new, places = extend(old, "東京", ("<|end|>", "<|user|>", "<|more|>"))
    assert new.special == {"<|start|>": 0, "<|end|>": 1, "<|user|>": 817, "<|more|>": 818}, "816 was the highest id"
    assert places == list(range(817)), "byte pairs stay where they are, gaps included"
    for text in ("lo w", "low\ne\u0301", "東京"):
        assert new.encode(text) == old.encode(text), f"{text!r} has other tokens: pattern, form or merges are lost"
    assert new.encode("lo <|user|>lo ", special=True) == [816, 817, 816], "a tag is a token"
    assert old.special == {"<|start|>": 0, "<|end|>": 1} and len(old) == 817, "the old tokenizer itself was changed"
    again = from_state(new.state())
    assert again.encode("<|more|>", special=True) == [818], "the tags are part of the state"
    assert len(extend(new, "", ("<|end|>", "<|user|>"))[0]) == len(new), "nothing is new, and nothing is added"
