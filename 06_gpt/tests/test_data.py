"""Checkpoints of the data: token files, an honest split, every window once, losses in comparable units."""

import itertools
import math
import signal

from shared.errors import BadInput

import numpy as np
import pytest
import torch

from data import Dataset, batches, encode, in_file, load_data, split, windows
from tokenizer import END, BPETokenizer, CharTokenizer

COUNT = torch.arange(23)  # a text in which every token says where it stands


def byte_pairs(*tokens: bytes) -> BPETokenizer:
    """The bytes, then these tokens, then the mark between documents."""
    ranks = {token: i for i, token in enumerate([*(bytes([byte]) for byte in range(256)), *tokens])}
    return BPETokenizer(ranks, special={END: len(ranks)})


@pytest.fixture
def prepare(tmp_path):
    """A function: text -> the Dataset that load_data makes of a file with it."""

    def load(text, **how):
        file = tmp_path / "text.txt"
        file.write_text(text, encoding="utf-8", newline="")
        return load_data(str(file), **how)

    return load


def test_the_split_is_by_position():
    """The first 90 % of the text train and the rest validates: in order, nothing lost, nothing on both sides."""
    text = "".join(chr(200 + i) for i in range(1000))
    train, val = split(text)
    assert train + val == text, "the split loses, repeats or reorders characters"
    assert len(train) == 900, "nine characters of ten are for training"
    assert split("0123456789abc") == ("0123456789a", "bc"), "a broken ninth goes to the validation text"


def test_windows_shift_by_one():
    """Windows cut the text without gap or overlap, and each position's target is the token that follows it."""
    x, y = windows(torch.tensor([1, 2, 3, 4, 5, 6]), 2)
    assert x.tolist() == [[1, 2], [3, 4]] and y.tolist() == [[2, 3], [4, 5]], "targets are the inputs shifted by one"
    for block_size in (1, 3, 7, 22):
        x, y = windows(COUNT, block_size)
        count = 22 // block_size  # the last token has no token after it
        assert x.shape == y.shape == (count, block_size), f"{count} windows of {block_size} have a next token"
        assert x.flatten().tolist() == list(range(count * block_size)), "each window starts where the one before ends"
        assert torch.equal(y, x + 1), "a position's target is not the token right after it: off by one"


@pytest.mark.parametrize("length", [0, 1, 4])
def test_short_texts_are_refused(length):
    """A text without a whole window is refused in words, by windows and by batches; one window is enough."""
    with pytest.raises(BadInput, match="no window"):
        windows(torch.arange(length), 4)
    with pytest.raises(BadInput, match="use a longer text"):
        next(batches(torch.arange(length), 4, 2, seed=1))
    x, y = windows(torch.arange(5), 4)
    assert x.tolist() == [[0, 1, 2, 3]] and y.tolist() == [[1, 2, 3, 4]], "five tokens hold one window of four"


@pytest.fixture
def limit():
    """Ten seconds, after which a loop that yields nothing fails instead of running on."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def stop(number, frame):
        raise AssertionError("no batch comes, however long one waits: each pass must yield at least one")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 10)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_pass_predicts_every_token_once(limit):
    """Minibatches are drawn without replacement: a pass predicts every token once, in a new order each time."""
    stream = batches(COUNT, block_size=3, batch_size=2, seed=3)  # 6 or 7 windows, 3 batches a pass
    orders = []
    for _ in range(20):
        seen = []
        for x, y in itertools.islice(stream, 3):
            assert x.shape == y.shape == (2, 3), "batch_size windows of block_size tokens, one target for each token"
            assert torch.equal(y, x + 1), "inputs and targets got separated"
            seen += y.flatten().tolist()
        assert len(set(seen)) == 18, "in one pass some tokens are predicted twice"
        assert len({begin % 3 for begin in seen[::3]}) == 1, "the windows of one pass are cut at the same places"
        orders.append(tuple(seen))
    assert len(set(orders)) == 20, "every pass draws the windows in a new order"
    assert not any(order == tuple(sorted(order)) for order in orders), "windows in text order: neighbours are alike"


def test_each_pass_cuts_at_other_places(limit):
    """Windows begin at another offset in each pass: a token is sometimes early in its window and sometimes late."""
    stream = batches(COUNT, block_size=3, batch_size=2, seed=3)
    places = {}  # token -> its places in the windows it was drawn in
    for x, _ in itertools.islice(stream, 200):
        for place, token in itertools.product(range(3), range(2)):
            places.setdefault(x[token, place].item(), set()).add(place)
    stuck = [token for token in range(2, 20) if places.get(token, set()) != {0, 1, 2}]
    assert not stuck, f"tokens {stuck} never change their place in the window, and the first place has no past"


def test_batches_leave_the_odd_ones_for_another_pass(limit):
    """Batches are always full: windows left over at the end of a pass wait."""
    stream = batches(COUNT, block_size=3, batch_size=4, seed=3)  # 6 or 7 windows: 1 batch, the others wait
    drawn = [y.flatten().tolist() for _, y in itertools.islice(stream, 60)]
    assert all(len(y) == 12 for y in drawn), "a smaller batch would give its windows more weight"
    assert set(sum(drawn, [])) == set(range(1, 23)), "the windows that wait must be others in other passes"


def test_a_text_must_fill_a_batch():
    """Fewer windows than batch_size, wherever they are cut, are refused with the remedy; just enough are one batch."""
    with pytest.raises(BadInput, match="use a longer text"):
        next(batches(COUNT, block_size=3, batch_size=7, seed=3))  # cut at an offset of 2, the text has 6 windows
    x, _ = next(batches(COUNT, block_size=3, batch_size=6, seed=3))
    assert x.shape == (6, 3), "six windows fit wherever they are cut"


def test_batches_repeat_with_their_seed(limit):
    """The same seed gives the same batches, whatever else draws random numbers; another seed gives others."""
    first = [y.tolist() for _, y in itertools.islice(batches(COUNT, 3, 2, seed=3), 20)]
    torch.rand(7)
    again = [y.tolist() for _, y in itertools.islice(batches(COUNT, 3, 2, seed=3), 20)]
    other = [y.tolist() for _, y in itertools.islice(batches(COUNT, 3, 2, seed=4), 20)]
    assert first == again, "batches have a generator of their own, seeded by `seed`"
    assert first != other, "the seed is not used"


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_no_window_reaches_across_the_split(kind, prepare):
    """The text is split before windows are cut, so no window mixes training and validation characters."""
    data = prepare("a" * 180 + "b" * 20, kind=kind, vocab_size=259)
    x, y = windows(data.train, 5)
    letters = set(data.tokenizer.decode([*x.flatten().tolist(), *y.flatten().tolist()]))
    assert letters == {"a"}, "validation text leaks into training"
    x, y = windows(data.val, 5)
    letters = set(data.tokenizer.decode([*x.flatten().tolist(), *y.flatten().tolist()]))
    assert letters == {"b"}, "training text leaks into validation"


def test_bits_per_byte():
    """Bits per byte is the loss divided by ln 2 and by the bytes per character, so accents make no text harder."""
    data = Dataset("", CharTokenizer("ab"), COUNT, COUNT, tokens_per_char=1.0, bytes_per_char=1.0)
    assert data.bits_per_byte(math.log(2)) == pytest.approx(1.0), "ln 2 nats are one bit"
    assert data.bits_per_byte(1.5) == pytest.approx(2.164042561), "1.5 nats / 0.693147181"
    wide = Dataset("", CharTokenizer("ab"), COUNT, COUNT, tokens_per_char=1.0, bytes_per_char=2.0)
    assert wide.bits_per_byte(1.5) == pytest.approx(1.082021281), "one character in two bytes: half the bits on each"


def test_load_data_counts_bytes_of_the_validation_text(tmp_path):
    """A corpus is split, encoded with one tokenizer, and measured in bytes per character of the validation text."""
    file = tmp_path / "text.txt"
    file.write_text("a" * 90 + "äöü" * 2 + "bbbb", encoding="utf-8")
    data = load_data(str(file))
    assert data.tokenizer.chars == "abäöü", "one tokenizer for both sides, or the same id would mean two characters"
    assert data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val) == "a" * 90 + "äöü" * 2 + "bbbb"
    assert data.bytes_per_char == pytest.approx(16 / 10), "six letters of two bytes and four of one, in ten characters"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b" \n ", "holds no text"), (b"\xff\xfe\x00", "not UTF-8"), (None, "no corpus or file")],
    ids=["empty", "blank", "no UTF-8", "missing"],
)
def test_a_text_that_cannot_be_used_is_refused(content, message, tmp_path):
    """A missing, empty or unreadable text is refused in one line that names the file."""
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        load_data(str(file))


@pytest.mark.parametrize("text", ["a", "a" * 90 + END, END * 20], ids=["one letter", "no validation", "only marks"])
def test_a_text_that_cannot_be_split_is_refused(text, prepare):
    """A text that leaves no character to train on or to validate on is refused with the remedy."""
    with pytest.raises(BadInput, match="use a longer text"):
        prepare(text)


def test_the_split_never_cuts_a_mark():
    """Where the cut would fall inside <|endoftext|>, it moves behind it: half a mark would be read as text."""
    moved = 0
    for before in range(870, 920):
        text = "x" * before + END + "y" * (1000 - len(END) - before)
        train, val = split(text)
        assert train + val == text, "the split loses, repeats or reorders characters"
        assert train.count(END) + val.count(END) == 1, f"{train[-15:]!r} | {val[:15]!r}: the mark is cut"
        assert 900 <= len(train) < 900 + len(END), "the cut moves no further than to the end of the mark"
        moved += len(train) != 900
    assert moved == len(END) - 1, "the cut moves only where it falls between the mark's first and last letter"


def test_documents_are_separated_by_the_special_token():
    """Each <|endoftext|> of the text is one special token, and nothing is merged across it."""
    ids = encode(f"ab{END}c{END}{END}a", CharTokenizer("abc", special=(END,)))
    assert ids.tolist() == [0, 1, 3, 2, 3, 3, 0], "a mark stands after each document but the last; one may be empty"
    ids = encode(f"aba{END}b", byte_pairs(b"ab"))
    assert ids.tolist() == [256, ord("a"), 257, ord("b")], "the mark is one token, not its 13 letters"
    with pytest.raises(BadInput, match="made without"):
        encode(f"ab{END}c", CharTokenizer("abc"))


def test_tokens_have_two_bytes_each(tmp_path):
    """Tokens take 16 bits each, up to id 65,535, and a file of them reads back as it was written."""
    ids = [0, 1, 255, 256, 1000, 32_767, 32_768, 65_535]
    alphabet = "".join(chr(0x10000 + i) for i in range(65_536))
    tokens = encode("".join(alphabet[i] for i in ids), CharTokenizer(alphabet))
    assert tokens.dtype == torch.uint16 and tokens.tolist() == ids, "ids from 32,768 on need all 16 bits, without sign"
    path = tmp_path / "text.bin"
    assert in_file(path, tokens).tolist() == ids, "the file holds other tokens than the text"
    assert path.stat().st_size == 2 * len(ids), "a file has two bytes a token and nothing else"
    assert np.fromfile(path, dtype=np.uint16).tolist() == ids, "plain 16-bit numbers, which any program can read"
    assert [file.name for file in path.parent.iterdir()] == ["text.bin"], "half-written files are left behind"


def test_tokens_of_a_large_vocabulary_have_four_bytes_each(tmp_path):
    """Ids beyond 65,535, as open models have, are kept whole, in memory and in a file."""
    tokens = encode(f"a{END}b", BPETokenizer({bytes([byte]): byte for byte in range(256)}, {END: 151_643}))
    assert tokens.tolist() == [97, 151_643, 98], "16 bits are too few for these ids"
    assert in_file(tmp_path / "text.bin", tokens).tolist() == [97, 151_643, 98], "the file is read as 16-bit numbers"


def test_token_files_are_mapped_and_not_loaded(tmp_path):
    """Tokens are fetched from the file when they are looked at; changing them in memory leaves the file alone."""
    path = tmp_path / "text.bin"
    ids = in_file(path, encode("abcd" * 5000, CharTokenizer("abcd")))
    with path.open("r+b") as file:
        file.seek(2 * 19_999)
        file.write(b"\x02\x00")
    assert ids[-1] == 2, "the whole text was read into memory: map the file"
    ids[0] = 3
    assert path.read_bytes()[:2] == b"\x00\x00", "training must not be able to change the text on disk"


def test_batches_of_a_token_file(tmp_path):
    """Batches drawn from a memory-mapped file are what they are from a tensor, as integers that an embedding takes."""
    data = in_file(tmp_path / "text.bin", COUNT.to(torch.uint16))
    both = zip(batches(data, 3, 2, 3), batches(COUNT, 3, 2, 3), strict=True)
    for (x, y), (a, b) in itertools.islice(both, 20):
        assert torch.equal(x, a) and torch.equal(y, b), "the file holds other tokens than the text"
        assert x.dtype == y.dtype == torch.long, "uint16 is how tokens are stored, int64 is what a model takes"


def test_batches_go_on_anywhere(limit):
    """A stream that starts at batch k gives what a stream from 0 gives after k batches, within a pass and across."""
    whole = [(x.tolist(), y.tolist()) for x, y in itertools.islice(batches(COUNT, 3, 2, seed=3), 30)]  # 10 passes
    for start in range(20):
        stream = batches(COUNT, 3, 2, seed=3, start=start)
        rest = [(x.tolist(), y.tolist()) for x, y in itertools.islice(stream, 10)]
        assert rest == whole[start:start + 10], f"resumed at batch {start} a run sees other batches than it would have"


def test_no_two_seeds_share_a_pass(limit):
    """Each pass of each seed has an order of its own: the second pass of one seed is not the first of the next."""
    data, passes = torch.arange(200), {}
    for seed in range(4):
        stream = batches(data, block_size=3, batch_size=60, seed=seed)  # 65 or 66 windows: one batch a pass
        for turn, (x, _) in enumerate(itertools.islice(stream, 6)):
            first = passes.setdefault(tuple(x.flatten().tolist()), (seed, turn))
            assert first == (seed, turn), f"pass {turn} of seed {seed} is pass {first[1]} of seed {first[0]}"
    for seed in (-1, 2**62):
        assert next(batches(COUNT, 3, 2, seed))[0].shape == (2, 3), "any seed that torch takes"


def test_the_tokenizer_does_not_know_the_validation_text(prepare):
    """Byte pairs are learned from the training text alone; characters alone are taken from the whole text."""
    text = "the cat sat. " * 70 + "zq" * 50
    learned = list(prepare(text, kind="bpe", vocab_size=300).tokenizer.ranks)[256:]
    assert b" sat" in learned, "a word that stands 70 times in the training text is worth a token"
    assert not [token for token in learned if b"z" in token or b"q" in token], (
        "the most frequent pair of the validation text became a token: the tokenizer has seen it"
    )
    data = prepare(text, kind="char")
    assert data.tokenizer.chars == " .acehqstz", "a character of the validation text alone could not be encoded"
    assert data.tokenizer.decode(data.train.tolist()) + data.tokenizer.decode(data.val.tolist()) == text, (
        "the two parts are not the text"
    )


def test_a_given_tokenizer_is_used(prepare):
    """A run that goes on encodes with the tokenizer it began with, and does not learn another."""
    tokenizer = byte_pairs(b"ca")
    data = prepare("the cat sat. " * 20, kind="bpe", vocab_size=300, tokenizer=tokenizer)
    assert data.tokenizer is tokenizer, "another tokenizer was learned: ids would change their meaning"
    assert 256 in data.train.tolist(), "the given tokenizer's tokens are not used"


def test_nats_per_character_by_hand(prepare):
    """A loss per token becomes a loss per character by the tokens and characters that were predicted: by hand."""
    data = prepare("x" * 90 + "the the hé", tokenizer=byte_pairs(b"th", b"the"))
    assert data.val.tolist() == [257, 32, 257, 32, 104, 0xC3, 0xA9], "the, space, the, space, h, two bytes of é"
    # the first token is never predicted: 6 tokens are, and they are 7 characters
    assert data.tokens_per_char == pytest.approx(6 / 7), "tokens that are predicted, for each character predicted"
    assert data.nats_per_char(3.5) == pytest.approx(3.0), "3.5 nats for each of 6 tokens are 21, over 7 characters: 3"
    assert data.bytes_per_char == pytest.approx(11 / 10), "ten characters, one of them of two bytes"
    assert data.bits_per_byte(3.0) == pytest.approx(3 / math.log(2) / 1.1), "nats to bits, characters to bytes"

    data = prepare("x" * 90 + "the the hé", kind="byte")
    assert data.tokens_per_char == pytest.approx(10 / 9), "11 bytes, 10 of them predicted: 9 characters"
    data = prepare("x" * 90 + "the the hé", kind="char")
    assert data.tokens_per_char == 1, "a character for a character"


def test_marks_between_documents_are_no_characters(prepare):
    """A mark between documents costs nats, for the model has to predict it, but it is no character of the text."""
    data = prepare("x" * 900 + f"ab{END}" + "é" * 85, kind="char")  # 1,000 characters, the last 100 for validation
    assert len(data.val) == 88 and data.val[2] == data.tokenizer.special[END], "87 characters and one mark"
    assert data.tokens_per_char == pytest.approx(87 / 86), "87 tokens are predicted, of which 86 are characters"
    assert data.bytes_per_char == pytest.approx(172 / 87), "the mark's 13 letters are not in the text"
    data = prepare("x" * 950 + END + END + "y" * 84, kind="char")  # the cut would fall inside the first mark
    assert len(data.val) == 85 and data.val[0] == data.tokenizer.special[END], "a mark and 84 characters"
    assert data.tokens_per_char == 1, "the first token, here the mark, is not predicted: 84 tokens, 84 characters"
