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


def test_windows_are_contexts_and_the_next_token():
    """Each window is block_size tokens in text order, and its target is the one token that comes after them."""
    x, y = windows(torch.tensor([1, 2, 3, 4]), 2)
    assert x.tolist() == [[1, 2], [2, 3]] and y.tolist() == [3, 4], "the target is the token after the context"
    for block_size in (1, 3, 7, 22):
        x, y = windows(COUNT, block_size)
        assert x.shape == (23 - block_size, block_size), "one window ends before every token but the first block_size"
        for i in range(len(x)):
            assert x[i].tolist() == list(range(i, i + block_size)), f"window {i} is not the stretch that starts at {i}"
            assert y[i] == i + block_size, f"the target of window {i} is not the token right after it: off by one"


@pytest.mark.parametrize("length", [0, 1, 4])
def test_short_texts_are_refused(length, limit):
    """A text without a whole window is refused in words, by windows and by batches; one window is enough."""
    with pytest.raises(BadInput, match="no window"):
        windows(torch.arange(length), 4)
    with pytest.raises(BadInput, match="no window"):
        next(batches(torch.arange(length), 4, 2, seed=1))
    x, y = next(batches(torch.arange(5), 4, 2, seed=1))
    assert x.tolist() == [[0, 1, 2, 3]] and y.tolist() == [4], "five tokens hold one window of four and its target"


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


def test_a_pass_draws_every_window_once(limit):
    """Minibatches are drawn without replacement: every window comes once in each pass, in a new order each time."""
    stream = batches(COUNT, block_size=3, batch_size=5, seed=3)  # 20 windows: 4 batches a pass
    orders = []
    for _ in range(10):
        seen = []
        for x, y in itertools.islice(stream, 4):
            assert x.shape == (5, 3) and y.shape == (5,), "batch_size windows of block_size tokens, one target each"
            assert torch.equal(y, x[:, -1] + 1), "context and target got separated"
            seen += y.tolist()
        assert sorted(seen) == list(range(3, 23)), "in one pass some windows come twice and others never"
        orders.append(tuple(seen))
    assert len(set(orders)) == 10, "every pass draws the windows in a new order"
    assert tuple(range(3, 23)) not in orders, "windows in text order: neighbours are alike and teach the same twice"


def test_batches_leave_the_odd_ones_for_another_pass(limit):
    """Batches are always full: windows left over at the end of a pass wait, unless there are fewer than one batch."""
    stream = batches(COUNT, block_size=3, batch_size=6, seed=3)  # 20 windows: 3 batches, 2 windows wait
    drawn = [y.tolist() for _, y in itertools.islice(stream, 60)]
    assert all(len(y) == 6 for y in drawn), "a smaller batch would give its windows more weight"
    for i in range(0, 60, 3):
        assert len(set(sum(drawn[i:i + 3], []))) == 18, "a window came twice in one pass"
    assert set(sum(drawn, [])) == set(range(3, 23)), "the windows that wait must be others in other passes"
    x, _ = next(batches(COUNT, block_size=3, batch_size=100, seed=3))
    assert len(x) == 20, "with fewer windows than batch_size the batch holds them all"


def test_batches_repeat_with_their_seed(limit):
    """The same seed gives the same batches, whatever else draws random numbers; another seed gives others."""
    first = [y.tolist() for _, y in itertools.islice(batches(COUNT, 3, 5, seed=3), 20)]
    torch.rand(7)
    again = [y.tolist() for _, y in itertools.islice(batches(COUNT, 3, 5, seed=3), 20)]
    other = [y.tolist() for _, y in itertools.islice(batches(COUNT, 3, 5, seed=4), 20)]
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
