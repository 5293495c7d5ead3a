"""Tokenizers as `tokenizer.json` keeps them, the file that open weights come with: read into ours, and written.

The file is a list of steps: normalise the text, split it into pieces, merge bytes within each piece. Ours does the same
steps, in three places otherwise, and each is a trap:

1. tokens are bytes, written in the file as printable characters: a space is spelled "Ġ";
2. the file lists the merges, ours merges what has the lowest id: the two agree only where ids are in merge order;
3. the file may split twice, first digits, then words; ours has one pattern, which must give the same pieces.
"""

from pathlib import Path

from shared.errors import BadInput

import regex

from config_json import only, read_json
from tokenizer import PATTERN, BPETokenizer, CharTokenizer

# How open models cut a text into pieces.
PATTERNS = {
    "gpt-2": PATTERN,
    # GPT-2's after each digit was set apart. A piece then ends before a digit: the space before it stands alone, and a
    # run of spaces is not cut as it is before a word.
    "smollm": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+""",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}  # fmt: skip
CHARACTER = r"[\s\S]"  # every character is a piece

BYTES_TO_TEXT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in the files -> the byte: {"!": 33, ..., "Ā": 0, ..., "Ġ": 32, ...}.

    Printable characters of Latin-1 stand for themselves. For the other 68, in order, come those from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(other)}


def make_bpe(
    vocab: dict[str, int], merges: list, special: dict[str, int], pattern: str, where, form: str | None = None,
    whole_pieces: bool = False,
) -> BPETokenizer:  # fmt: skip
    """A tokenizer from tokens {text: id} and the pairs of tokens that are merged, first merges first.

    With `whole_pieces` a piece that is a token is taken as it is, whether or not merges lead there (Llama 3).
    Raises BadInput where merging what has the lowest id would not give what the merges give.
    """
    alphabet = byte_alphabet()
    ids = [*{**vocab, **special}.values()]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
        raise BadInput(f"{where}: two tokens have the same id, or an id is no whole number of 31 bits")
    try:
        spelled = {name: bytes(alphabet[char] for char in name) for name in vocab if name not in special}
        made = [vocab[a + b] for a, b in merges if a in spelled and b in spelled]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where}: {error} in vocabulary or merges is no byte, token or pair") from None
    if len(made) < len(merges):
        raise BadInput(f"{where}: the merges join what is no token")
    if made != sorted(made):
        raise BadInput(f"{where}: the merges are in another order than the ids, so merging by id gives other tokens")
    ranks = {token: vocab[name] for name, token in spelled.items()}
    if len(ranks) < len(spelled) or not ranks or b"" in ranks:
        raise BadInput(f"{where}: a token is empty, or there is none")
    learned = set(made)
    for token, i in ranks.items():
        if len(token) > 1 and i not in learned:
            joined = any(token[:cut] in ranks and token[cut:] in ranks for cut in range(1, len(token)))
            if joined or not whole_pieces:
                raise BadInput(f"{where}: no merge makes the token {token!r}, so merging by id gives other tokens")
    try:
        if regex.compile(pattern).groups:
            raise ValueError("it has groups")
        return BPETokenizer(ranks, special, pattern, form)
    except (ValueError, regex.error) as error:
        raise BadInput(f"{where}: {pattern!r} is no pattern ({error})") from None


def read_pattern(steps, where) -> str:
    """The one pattern that splits as the file's pre-tokenizer does. Raises BadInput for one that is not understood."""
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]):
        raise BadInput(f"{where}: the pre-tokenizer {' and '.join(kinds)} is not understood")
    splits = kinds != ["Split", "ByteLevel"]  # whether ByteLevel brings GPT-2's pattern
    only({"add_prefix_space": True, "use_regex": True} | steps[-1], {
        "type": None, "add_prefix_space": (False,), "trim_offsets": None, "use_regex": (splits,),
    }, where)
    if kinds == ["ByteLevel"]:
        return PATTERN
    if kinds[0] == "Digits":
        only({"individual_digits": False} | steps[0], {"type": None, "individual_digits": (True,)}, where)
        return PATTERNS["smollm"]
    only(steps[0], {"type": None, "pattern": None, "behavior": ("Isolated",), "invert": (False,)}, where)
    only(steps[0]["pattern"], {"Regex": None}, where)
    pattern = steps[0]["pattern"]["Regex"]
    if not isinstance(pattern, str):
        raise BadInput(f"{where}: the pattern {pattern!r} is no text")
    if pattern in PATTERNS.values():
        return pattern
    # The file makes a piece of what lies between two matches as well, ours would leave it out.
    return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"


def read_start(step, where) -> list[int]:
    """The ids that the file's post-processor puts before a text. Raises BadInput where it does anything else."""
    start = []
    for part in step["processors"] if step and step["type"] == "Sequence" else [step] if step else []:
        if part["type"] == "TemplateProcessing":
            *before, text = part["single"]
            if list(text) != ["Sequence"] or not all(list(token) == ["SpecialToken"] for token in before):
                raise BadInput(f"{where}: the post-processor puts tokens after the text, which is not understood")
            start += [i for token in before for i in part["special_tokens"][token["SpecialToken"]["id"]]["ids"]]
        elif part["type"] != "ByteLevel":  # which moves no token
            raise BadInput(f"{where}: the post-processor {part['type']} is not understood")
    return start


def read_tokenizer(path: Path):
    """A tokenizer.json -> (our tokenizer, the ids that it puts before a text). Raises BadInput."""
    about = read_json(path)
    try:
        return read_steps(about, path)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} is damaged ({type(error).__name__}: {error}): fetch it again") from None


def read_steps(about: dict, path: Path):
    """What `read_tokenizer` does, where every name and type is as it should be; other errors where not."""
    only(about, dict.fromkeys(
        ("version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
    ) | {"truncation": (None,), "padding": (None,)}, path)
    model, special = about["model"], {}
    for token in about["added_tokens"]:
        # A token that is matched after the text is normalised is met elsewhere; one that takes spaces with it as well.
        only(token, {
            "id": None, "content": None, "special": None, "single_word": (False,), "lstrip": (False,),
            "rstrip": (False,), "normalized": (False,) if about.get("normalizer") else None,
        }, path)
        special[token["content"]] = token["id"]
    if "" in special or any(model["vocab"].get(name, i) != i for name, i in special.items()):
        raise BadInput(f"{path}: an added token is empty, or has another id in the vocabulary")
    if model["type"] == "WordLevel":
        tokenizer = CharTokenizer("".join(name for name in model["vocab"] if name not in special), tuple(special))
        if write_tokenizer(tokenizer) != about:
            raise BadInput(f"{path}: WordLevel is only understood as `export` writes it, a token for each character")
        return tokenizer, []
    only(model, {
        "type": ("BPE",), "vocab": None, "merges": None, "ignore_merges": None, "dropout": (None, 0), "fuse_unk": None,
        "unk_token": (None,), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
        "byte_fallback": (False,),
    }, path)
    form = about.get("normalizer")
    if form:
        only(form, {"type": ("NFC", "NFD", "NFKC", "NFKD")}, path)
    if about["decoder"]["type"] != "ByteLevel":
        raise BadInput(f"{path}: the decoder {about['decoder']['type']} is not understood")
    # Older files write a pair as one text. No token holds a space: it is spelled otherwise.
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokenizer = make_bpe(
        model["vocab"], merges, special, read_pattern(about["pre_tokenizer"], path), path,
        form["type"] if form else None, bool(model.get("ignore_merges")),
    )  # fmt: skip
    return tokenizer, read_start(about.get("post_processor"), path)


def write_tokenizer(tokenizer) -> dict:
    """What to write into a tokenizer.json, so that `tokenizers` gives the same ids and the same text."""
    about = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for name, i in tokenizer.special.items()
    ]}  # fmt: skip
    if isinstance(tokenizer, CharTokenizer):
        split, rest, decoder, form = CHARACTER, [], {"type": "Fuse"}, None
        vocab, model = tokenizer.index, {"type": "WordLevel", "unk_token": "<unk>"}
    else:
        split, rest, decoder, form = tokenizer.pattern, [BYTES_TO_TEXT], BYTES_TO_TEXT, tokenizer.form
        letters = {byte: char for char, byte in byte_alphabet().items()}
        spelled = {token: "".join(letters[byte] for byte in token) for token in tokenizer.ranks}
        vocab = {spelled[token]: i for token, i in tokenizer.ranks.items()}
        # Ours joins any two neighbours whose bytes together are a token: so each way to cut a token in two is a merge.
        merges = [
            [spelled[token[:cut]], spelled[token[cut:]]]
            for token in sorted(tokenizer.ranks, key=tokenizer.ranks.get) for cut in range(1, len(token))
            if token[:cut] in spelled and token[cut:] in spelled
        ]  # fmt: skip
        model = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "merges": merges,
            "ignore_merges": {text for text in vocab if len(text) > 1} > {a + b for a, b in merges},
        }  # fmt: skip
    if vocab.keys() & tokenizer.special.keys():
        raise BadInput("a special token is spelled like another token: no other program could tell them apart")
    # Special tokens too: those that stood in the list above alone would be numbered anew, from the end on.
    model["vocab"] = vocab | tokenizer.special
    split = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    return about | {
        "normalizer": {"type": form} if form else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, *rest]},
        "post_processor": None, "decoder": decoder, "model": model,
    }  # fmt: skip
