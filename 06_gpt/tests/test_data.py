"""Checkpoints of the data: characters to integers and back, an honest split, every window once."""

import itertools
import math
import signal

from shared.errors import BadInput

import pytest
import torch

from data import Dataset, batches, load_data, split, windows
from tokenizer import CharTokenizer

COUNT = torch.arange(23)  # a text in which every token says where it stands


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


def test_no_window_reaches_across_the_split(tmp_path):
    """The text is split before windows are cut, so no window mixes training and validation characters."""
    file = tmp_path / "text.txt"
    file.write_text("a" * 180 + "b" * 20, encoding="utf-8")
    data = load_data(str(file))
    a, b = data.tokenizer.encode("ab")
    x, y = windows(data.train, 5)
    assert y.numel() == 175 and x.unique().tolist() == y.unique().tolist() == [a], "validation text leaks into training"
    x, y = windows(data.val, 5)
    assert y.numel() == 15 and x.unique().tolist() == y.unique().tolist() == [b], "training text leaks into validation"


def test_bits_per_byte():
    """Bits per byte is the loss divided by ln 2 and by the bytes per character, so accents make no text harder."""
    data = Dataset("", CharTokenizer("ab"), COUNT, COUNT, bytes_per_char=1.0)
    assert data.bits_per_byte(math.log(2)) == pytest.approx(1.0), "ln 2 nats are one bit"
    assert data.bits_per_byte(1.5) == pytest.approx(2.164042561), "1.5 nats / 0.693147181"
    wide = Dataset("", CharTokenizer("ab"), COUNT, COUNT, bytes_per_char=2.0)
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
