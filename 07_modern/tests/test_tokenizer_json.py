"""Checkpoints of tokenizer.json: the ids of Hugging Face's library, for each way in which open models cut a text."""

import json

from shared.errors import BadInput

import pytest
import tokenizers
from random_texts import random_texts, same_ids
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenizer import END, PATTERN, BPETokenizer, CharTokenizer, from_state, train_tokenizer
from tokenizer_json import PATTERNS, byte_alphabet, read_tokenizer, write_tokenizer

NAMES = ["<|a", "<|a|>", "<think>", "café"]  # two begin alike, one is changed by NFD
# The patterns in the tokenizer.json of Llama 3 and of Qwen3, as published.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False)
WAYS = {  # how a text is cut, and the normal form
    "GPT-2": (LETTERS, None),
    "SmolLM2": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LETTERS]), None),
    "Llama 3": (split(LLAMA), None),
    "Qwen3": (split(QWEN), normalizers.NFC()),
    "decomposed": (split(PATTERN), normalizers.NFD()),
    "with gaps": (split(r"\p{L}{1,3}|\d\d"), None),  # what lies between two matches is a piece too
}


@pytest.fixture(params=WAYS)
def theirs(request):
    """A tokenizer of 700 tokens that Hugging Face's library has learned from random texts, with the special NAMES."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, normal = WAYS[request.param]
    if normal:
        made.normalizer = normal
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(random_texts(1500, [""], 5), trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[tokenizers.AddedToken(NAMES[0], special=True, normalized=False)],
    ))  # fmt: skip
    made.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in NAMES[1:]])
    return made


def test_the_byte_alphabet_is_hugging_faces():
    """Each byte has the printable character that the files spell it with."""
    found = byte_alphabet()
    assert len(found) == 256 and sorted(found.values()) == list(range(256)), "one character for each byte"
    assert set(found) == set(pre_tokenizers.ByteLevel.alphabet()), "the characters are not those of the files"
    for char, byte in (("!", 33), ("Ġ", 32), ("Ċ", 10), ("Ā", 0), ("ÿ", 255), ("ł", 160), ("Ń", 173)):
        assert found[char] == byte, f"{char} stands for byte {byte}, not {found[char]}"


def test_ids_are_those_of_the_library(theirs, tmp_path):
    """However a text is cut and normalised: the same ids, special tokens as such and as text, and the same way back."""
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, start = read_tokenizer(tmp_path / "tokenizer.json")
    assert start == [] and set(ours.special) == set(NAMES) and len(ours) == theirs.get_vocab_size()
    same_ids(ours, theirs, 1000, NAMES)
    for text in random_texts(50, [], 3):
        if not ours.form:  # a normal form is not taken back
            assert ours.decode(ours.encode(text)) == text, "the way back is another text"
        assert from_state(ours.state()).encode(text) == ours.encode(text) == ours.encode_slowly(text), f"{text!r}"


def test_named_patterns_are_the_published_ones():
    """A GGUF file only names its pattern: under this name stands here what the models were published with."""
    for name, pattern in (("llama-bpe", LLAMA), ("qwen2", QWEN)):
        assert PATTERNS[name] == pattern, f"{name} is {PATTERNS[name]}, and the published pattern is {pattern}"


def test_added_tokens_need_not_be_special(tmp_path):
    """What was added as a word of its own, as Qwen3's <think>, is found like a special token."""
    theirs = tokenizers.Tokenizer(models.BPE(byte_alphabet(), []))
    theirs.pre_tokenizer, theirs.decoder = LETTERS, decoders.ByteLevel()
    theirs.add_tokens([tokenizers.AddedToken("<think>", normalized=True)])  # nothing is normalised here
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, _ = read_tokenizer(tmp_path / "tokenizer.json")
    assert ours.encode("a<think>b", special=True) == theirs.encode("a<think>b").ids == [97, 256, 98]


def test_a_written_tokenizer_gives_the_same_ids(theirs, tmp_path):
    """What we write, the library reads: the same ids as ours, and ours is the same after being read again."""
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, _ = read_tokenizer(tmp_path / "tokenizer.json")
    again = tmp_path / "again.json"
    again.write_text(json.dumps(write_tokenizer(ours)), encoding="utf-8")
    same_ids(ours, tokenizers.Tokenizer.from_file(str(again)), 400, NAMES)
    back, _ = read_tokenizer(again)
    assert (back.ranks, back.special, back.form) == (ours.ranks, ours.special, ours.form), "not what was written"


def test_an_exported_bpe_gives_the_same_ids(tmp_path):
    """10,000 random texts get the same ids from a BPE that this stage has learned and from the library's copy."""
    ours = train_tokenizer("bpe", "".join(random_texts(1500, [END], 7)), 1000)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(write_tokenizer(ours)), encoding="utf-8")
    theirs = tokenizers.Tokenizer.from_file(str(file))
    assert len(ours) == 1000 == theirs.get_vocab_size() and ours.special == {END: 999}
    same_ids(ours, theirs, 10_000, [END])
    for text in random_texts(200, [END], 8):
        assert theirs.decode(ours.encode(text, special=True), skip_special_tokens=False) == text, f"lost: {text!r}"


def test_exported_characters_are_the_same(tmp_path):
    """A vocabulary of characters: the library gives the same ids, the same text, and an error for an unknown one."""
    ours = CharTokenizer("hello, World!\n\t'é東🙂  ", special=(END,))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(write_tokenizer(ours)), encoding="utf-8")
    theirs = tokenizers.Tokenizer.from_file(str(file))
    text = "  Wolle 東🙂\n\n\té, '!' hello  "
    assert theirs.encode(text).ids == ours.encode(text), "other ids"
    assert theirs.decode(ours.encode(text)) == text, "decoded to another text"
    assert theirs.encode(f"he{END}o").ids == [*ours.encode("he"), ours.special[END], *ours.encode("o")]
    with pytest.raises(Exception, match="(?i)unk"):
        theirs.encode("x")
    again, start = read_tokenizer(file)
    assert (again.chars, again.special, start) == (ours.chars, ours.special, [])


def test_a_whole_piece_is_a_token_where_the_file_says_so(tmp_path):
    """Llama 3's rule: a piece that is a token is taken as it is, even if no merge leads there; others are merged."""
    vocab = {char: i for char, i in byte_alphabet().items()}
    vocab |= {"ab": 256, "abc": 257, "xyz": 258, "bc": 259}
    merges = [["a", "b"], ["ab", "c"], ["a", "bc"], ["b", "c"]]  # each way to cut a token, as Llama 3's file has them
    theirs = tokenizers.Tokenizer(models.BPE(vocab, [tuple(pair) for pair in merges], ignore_merges=True))
    theirs.pre_tokenizer, theirs.decoder = split(PATTERNS["llama-bpe"]), decoders.ByteLevel()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, _ = read_tokenizer(tmp_path / "tokenizer.json")
    for text in ("xyz", "xyzz", "abc", "abcabc", "bcab", "aabc"):
        assert ours.encode(text) == theirs.encode(text).ids == ours.encode_slowly(text), text
    assert ours.encode("xyz") == [258] and len(ours.encode("xyzz")) == 4
    about = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    about["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(BadInput, match="xyz"):
        read_tokenizer(tmp_path / "tokenizer.json")
    assert write_tokenizer(ours)["model"]["ignore_merges"] is True, "what no merge makes is met as a whole piece only"


def test_ids_before_a_text_are_read(tmp_path):
    """The post-processor's token before each text is found, alone or after a step that moves none."""
    theirs = tokenizers.Tokenizer(models.BPE(byte_alphabet(), []))
    theirs.pre_tokenizer, theirs.decoder = LETTERS, decoders.ByteLevel()
    theirs.add_special_tokens(["<|end|>", "<|start|>"])
    before = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 257)])
    for step, start in (
        (before, [257]), (processors.Sequence([processors.ByteLevel(), before]), [257]), (processors.ByteLevel(), []),
    ):  # fmt: skip
        theirs.post_processor = step
        theirs.save(str(tmp_path / "tokenizer.json"))
        ours, found = read_tokenizer(tmp_path / "tokenizer.json")
        assert found == start and [*found, *ours.encode("so")] == theirs.encode("so").ids
    theirs.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 256)]
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match="after the text"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_normal_forms_and_names_do_not_meet():
    """A name is found before the text is normalised: a mark after it does not make another character of its end."""
    ranks = {bytes([i]): i for i in range(256)}
    ours = BPETokenizer(ranks, {"<|end|>": 256, "<|end|>>": 257}, form="NFC")
    assert ours.encode("<|end|>\u0338", special=True) == [256, 0xCC, 0xB8], "the mark joined the name"
    assert ours.encode("a<|end|>>b<|end|>", special=True) == [97, 257, 98, 256], "the longer name comes first"
    assert ours.encode("e\u0301") == list("é".encode()) == ours.encode_slowly("e\u0301"), "not in the normal form"
    assert ours.encode("<|end|>") == list(b"<|end|>"), "what a document says is no special token"


def test_bytes_without_a_token_are_left_out():
    """Where a byte has no token, its neighbours meet, as in the library: what is left of a piece is merged."""
    letters = {char: i for char, i in byte_alphabet().items() if i not in (4, 0xF1)}
    vocab, merges = {char: n for n, char in enumerate(letters)}, [("=", "=")]
    vocab["=="] = len(vocab)
    theirs = tokenizers.Tokenizer(models.BPE(vocab, merges))
    theirs.pre_tokenizer = LETTERS
    alphabet = byte_alphabet()
    ours = BPETokenizer({bytes(alphabet[char] for char in name): i for name, i in vocab.items()}, {})
    for text in ("=\x04=", "a\x04b", "\x04", "\U00040000=", "=\U00040000\x04= =="):
        assert ours.encode(text) == theirs.encode(text).ids, f"{text!r}"
    assert ours.encode("=\x04=") == [vocab["=="]]


def change(about, path, value):
    """Set a value deep inside: "model.type" -> about["model"]["type"]. A number is a place in a list."""
    *before, last = path.split(".")
    for key in before:
        about = about[int(key) if key.isdigit() else key]
    about[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        ("secret", 1, "secret"),
        ("truncation", {"max_length": 5}, "truncation"),
        ("padding", {"length": 5}, "padding"),
        ("normalizer", {"type": "Lowercase"}, "Lowercase"),
        ("normalizer", {"type": "Sequence", "normalizers": []}, "Sequence"),
        ("decoder", {"type": "WordPiece"}, "WordPiece"),
        ("decoder", None, "damaged"),
        ("post_processor", {"type": "BertProcessing"}, "BertProcessing"),
        ("model.type", "Unigram", "Unigram"),
        ("model", [], "damaged"),
        ("model.dropout", 0.1, "dropout"),
        ("model.unk_token", "a", "unk_token"),
        ("model.byte_fallback", True, "byte_fallback"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix"),
        ("model.merges", [["t", "h"], ["t", "h", "e"]], "values"),
        ("model.merges", [["th", "e"], ["t", "h"]], "order"),
        ("model.merges", [["t", "h"]], "no merge makes"),
        ("model.merges", [["t", "h"], ["th", "e"], ["q", "z"]], "'qz'"),
        ("model.merges", [["t", "h"], ["th", "e"], 7], "merges"),
        ("model.vocab.t", 10**12, "31 bits"),
        ("model.vocab.t", -1, "31 bits"),
        ("model.vocab.t", "5", "31 bits"),
        ("model.vocab.t", True, "31 bits"),
        ("model.vocab.h", 116, "same id"),
        ("model.vocab.東", 300, "東"),
        ("model.vocab", {}, "merges"),
        ("added_tokens.0.lstrip", True, "lstrip"),
        ("added_tokens.0.single_word", True, "single_word"),
        ("added_tokens.0.id", 116, "same id"),
        ("added_tokens.0.content", "", "empty"),
        ("added_tokens.0.content", "the", "another id"),
        ("added_tokens.0.content", 5, "damaged"),
        ("added_tokens", {"a": 1}, "damaged"),
        ("pre_tokenizer.type", "Metaspace", "Metaspace"),
        ("pre_tokenizer.add_prefix_space", True, "add_prefix_space"),
        ("pre_tokenizer.use_regex", False, "use_regex"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 2}, "ByteLevel and Byte"),
        ("pre_tokenizer", None, "damaged"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused(path, value, names, tmp_path):
    """Another step, an unknown field, ids that do not say what merges first: one line that names the place."""
    theirs = tokenizers.Tokenizer(models.BPE(byte_alphabet() | {"th": 256, "the": 257}, [("t", "h"), ("th", "e")]))
    theirs.pre_tokenizer, theirs.decoder = LETTERS, decoders.ByteLevel()
    theirs.add_special_tokens(["<|end|>"])
    file = tmp_path / "tokenizer.json"
    theirs.save(str(file))
    assert read_tokenizer(file)[0].encode("the") == [257]
    about = json.loads(file.read_text("utf-8"))
    change(about, path, value)
    file.write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        read_tokenizer(file)
    assert names in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("step", "names"),
    [
        ({"behavior": "Removed"}, "behavior"), ({"invert": True}, "invert"), ({"pattern": {"String": " "}}, "String"),
        ({"pattern": {"Regex": "("}}, "pattern"), ({"pattern": {"Regex": r"(\w)|."}}, "groups"),
        ({"pattern": {"Regex": 5}}, "pattern"),
    ],
    ids=str,
)  # fmt: skip
def test_patterns_that_split_otherwise_are_refused(step, names, tmp_path):
    """A pattern that is none, or is used in another way than to find pieces, is one line."""
    about = write_tokenizer(BPETokenizer({bytes([i]): i for i in range(256)}, {}))
    about["pre_tokenizer"]["pretokenizers"][0] |= step
    (tmp_path / "tokenizer.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(BadInput, match=names):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_names_that_are_tokens_already_are_not_written():
    """A special token that is spelled as another token would change the other's id in the file."""
    with pytest.raises(BadInput, match="spelled"):
        write_tokenizer(BPETokenizer({bytes([i]): i for i in range(256)}, {"a": 256}))
