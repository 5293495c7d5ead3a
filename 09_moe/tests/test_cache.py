"""Checkpoints of the cache: scores against a model that remembers nothing, each query worked out alone in float64."""

from shared.errors import BadInput

import naive
import pytest
import torch
from torch import nn

import model as trunk
from cache import Cache
from model import GPT, ModelConfig

# In the last two, texts of 23 tokens run over the end of block_size, and the oldest tokens are forgotten.
KINDS = {
    "full": {"block_size": 23},
    "window": {"window": 5},
    "window and sinks": {"window": 4, "n_sink": 2},
    "window of one": {"window": 1, "n_sink": 1},
    "as many sinks as window": {"window": 3, "n_sink": 3},
    "layers without positions": {"window": 4, "n_sink": 2, "nope_every": 2, "n_layer": 3},
    "without QK-norm, untied": {"window": 6, "n_sink": 1, "qk_norm": False, "tied": False},
    "multi-query": {"window": 5, "n_sink": 1, "n_kv_head": 1},
    "runs over": {"block_size": 9},
    "runs over, sinks": {"block_size": 9, "n_sink": 2},
}
T = 23


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Angles in float64, and the same weights and texts each time."""
    monkeypatch.setattr(trunk, "rope_table", naive.angles)
    torch.manual_seed(0)


def build(**changes):
    """A model in float64 with every weight off its start, and no two sizes equal."""
    shape = {"vocab_size": 11, "block_size": 40, "n_embd": 12, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 2}
    model = GPT(ModelConfig(**shape | {"n_hidden": 20} | changes)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.requires_grad_(False)


def texts(*lengths):
    return [torch.randint(11, (length,)) for length in lengths]


def used_memory(model, batch_size, most):
    """A cache in whose memory nan was left by others."""
    cache = Cache(model, batch_size, most)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def pad_left(rows, filler=7):
    """The rows as one batch [B, T] that ends where they end, and how many tokens of each are padding [B]."""
    longest = max(map(len, rows))
    pad = torch.tensor([longest - len(row) for row in rows])
    return torch.stack([nn.functional.pad(row, (longest - len(row), 0), value=filler) for row in rows]), pad


def read(model, idx, cache, sizes, pad=None):
    """Scores [B, T, V] of a batch that is read in pieces of the given sizes."""
    scores, start = [], 0
    for size in sizes:
        part = None if pad is None else (pad - start).clamp(0, size)
        scores.append(model(idx[:, start:start + size], cache, part))
        start += size
    assert start == idx.shape[1], "the test itself reads too little"
    return torch.cat(scores, dim=1)


def pieces(length, size):
    """How many tokens each piece has: pieces(7, 3) -> [3, 3, 1]."""
    return [size] * (length // size) + [length % size] * (length % size > 0)


def assert_scores(found, expected, what):
    """What was found [B, n, V] are the last n of each text's scores, or all that it has."""
    for b, scores in enumerate(expected):
        n = min(found.shape[1], len(scores))
        torch.testing.assert_close(
            found[b, -n:], scores[-n:], rtol=1e-9, atol=1e-9, msg=lambda m, b=b: f"text {b}: {what}\n{m}"
        )


def alone(model, rows, last=None):
    """The scores of each text, worked out alone, without a cache and query by query."""
    return [naive.logits(model, row, last) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_read_in_pieces_is_scored_like_the_whole(kind):
    """Whole, token by token, or in pieces of any size: with a cache each position has the scores it has without."""
    model, rows = build(**KINDS[kind]), texts(T, T, T)
    expected = alone(model, rows)
    for sizes in ([T], pieces(T, 1), pieces(T, 5), [6, 1, 1, 7, 1, 2, 5]):
        what = (
            f"read in pieces of {max(sizes)} and less, the scores are others. Does each new token stand behind those "
            "that were kept, and find all that its window still needs?"
        )
        found = read(model, torch.stack(rows), used_memory(model, 3, max(sizes)), sizes)
        assert_scores(found, expected, what)
        found = read(model, rows[0][None], used_memory(model, 1, max(sizes)), sizes)
        assert_scores(found, expected[:1], f"alone, {what}")
        with torch.no_grad():
            found = read(model, torch.stack(rows), used_memory(model, 3, max(sizes)), sizes)
        assert_scores(found, expected, f"without gradients, {what}")


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_different_lengths_stand_in_one_batch(kind):
    """Filled up on the left, read in pieces and gone on with, every text has the scores that it has alone."""
    model, rows, new = build(**KINDS[kind]), texts(T, 9, 14, 1), torch.randint(11, (4, 8))
    idx, pad = pad_left(rows)
    expected = alone(model, rows)
    longer = alone(model, [torch.cat(pair) for pair in zip(rows, new, strict=True)])
    for size in (1, 4, 6, T):  # in pieces of 4 and 6, some rows begin with a piece that is padding only
        cache = used_memory(model, 4, size)
        found = read(model, idx, cache, pieces(T, size), pad)
        assert found.isfinite().all(), "the scores of padding are nan: it sees nothing, or what lay in memory before"
        assert_scores(found, expected, f"in pieces of {size}: padding is looked at, or it moves the positions")
        assert cache.lengths.tolist() == [T, 9, 14, 1], "padding is no token: every text has a length of its own"
        assert_scores(read(model, new, cache, [1] * 8), longer, "its next position is its own length")
        found = read(model, idx[1:2], used_memory(model, 1, size), pieces(T, size), pad[1:2])
        assert_scores(found, expected[1:2], f"a batch of one text, in pieces of {size}: padding is kept")


def test_without_a_cache_padding_is_not_looked_at_either():
    """In one pass without a cache, filled up on the left, every text has the scores that it has alone."""
    for kind, change in KINDS.items():
        model, rows = build(**change | {"block_size": 40}), texts(T, 9, 14, 1)
        idx, pad = pad_left(rows)
        found = model(idx, pad=pad)
        assert found.isfinite().all(), f"{kind}: the scores of padding are nan, and so is the gradient of all"
        assert_scores(found, alone(model, rows), f"{kind}: padding is looked at, or it moves the positions")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_taken_back_never_happened(kind):
    """Rewound, each text to a length of its own, and gone on with, the texts have the scores of those that stayed."""
    model, rows = build(**KINDS[kind]), texts(15, 6, 11)
    idx, pad = pad_left(rows)
    caches = used_memory(model, 3, 5), used_memory(model, 1, 5)  # the second for the first text alone
    read(model, idx, caches[0], pieces(15, 5), pad)
    read(model, idx[:1], caches[1], pieces(15, 5))
    for taken in ([4, 0, 2], [1, 3, 0], [2, 2, 4]):  # of 5 that were tried
        tried, instead = torch.randint(11, (3, 5)), torch.randint(11, (3, 3))
        rows = [torch.cat([row, more[:n]]) for row, more, n in zip(rows, tried, taken, strict=True)]
        after = [torch.cat(pair) for pair in zip(rows, instead, strict=True)]
        for cache in caches:
            B = len(cache.lengths)
            model(tried[:B], cache)
            cache.rewind(torch.tensor([len(row) for row in rows[:B]]))
            found = read(model, instead[:B], cache, [2, 1])
            assert_scores(found, alone(model, after[:B]), "a token that was taken back is looked at, or counted")
        rows = after


def test_each_position_has_its_slot():
    """With one sink and room for three more, the sink keeps its slot and the others take turns, text by text."""
    cache = Cache(build(window=3, n_sink=1), 2)
    one, pad = torch.zeros(2, 1, dtype=torch.long), torch.tensor([[0], [-1]])
    steps = [
        (pad, [0, -1], [[0], [-1]]),  # the second text has not begun yet
        (pad, [1, -1], [[0, 1], [-1, -1]]),
        (one, [2, 0], [[0, 1, 2], [0, -1, -1]]),
        (one, [3, 1], [[0, 1, 2, 3], [0, 1, -1, -1]]),
        (one, [4, 2], [[0, 4, 2, 3], [0, 1, 2, -1]]),
        (one, [5, 3], [[0, 4, 5, 3], [0, 1, 2, 3]]),
        (one, [6, 4], [[0, 4, 5, 6], [0, 4, 2, 3]]),
        (one, [7, 5], [[0, 7, 5, 6], [0, 4, 5, 3]]),
    ]
    for new, expected, kept in steps:
        positions, places = cache.advance(new)
        assert positions.flatten().tolist() == expected, "a token stands behind its own text's tokens; padding nowhere"
        assert places.tolist() == kept, "the newest takes the place of the oldest, and sinks stay where they are"
        k = v = torch.zeros(2, 2, 1, 4, dtype=torch.float64)
        assert [tuple(x.shape) for x in cache.update(0, k, v)] == 2 * [(2, 2, len(kept[0]), 4)], (
            "only slots that some text has filled are read: a short text must not pay for a long one's room"
        )


def test_a_rolling_buffer_needs_no_more_memory():
    """Through a buffer of 256, 10,000 tokens go in the memory of 256, and the last scores are exact.

    To save time 9,000 of them are read, nine in a pass; the others are written, each the likeliest after those before.
    """
    model = build(window=244, n_sink=4, block_size=256, n_layer=1, n_head=2, n_kv_head=1, head_dim=2)
    cache = Cache(model, most=9)
    # 2 x layers x K x D numbers of 8 bytes for each slot: the sinks, the window, eight companions, and the spare one
    assert cache.nbytes == 2 * 1 * 1 * 2 * 8 * (4 + 244 + 8 + 1), "the cache holds other numbers than keys and values"
    where, size, [text] = (cache.keys.data_ptr(), cache.values.data_ptr()), cache.nbytes, texts(9_000)
    scores, text = read(model, text[None], cache, pieces(9_000, 9))[0, -1], text.tolist()
    while len(text) < 10_000:
        text.append(int(scores.argmax()))
        scores = model(torch.tensor([text[-1:]]), cache)[0, -1]
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == where, "the cache was copied: it grows with the text"
    assert cache.nbytes == size and cache.used == 256, "the cache has grown"
    assert sorted(cache.places[0, :256].tolist()) == [*range(4), *range(10_000 - 252, 10_000)], (
        "it holds the sinks and the newest tokens, each once"
    )
    expected = naive.logits(model, torch.tensor(text), last=1)[0]  # one layer: the last token asks nobody else's keys
    torch.testing.assert_close(
        scores, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"after 10,000 tokens the scores have drifted\n{m}"
    )


def test_what_left_the_window_speaks_through_the_layers():
    """A text of 1,500 tokens read in pieces through a window of 12 has the scores of the whole text in one pass."""
    model, [row] = build(window=12, n_sink=4), texts(1500)
    found = read(model, row[None], used_memory(model, 1, 64), pieces(1500, 64))
    assert_scores(found[:, -100:], alone(model, [row], 100), "behind the window something is lost, or lasts too long")
    torch.testing.assert_close(
        model(row[None]), found, rtol=1e-9, atol=1e-9, msg=lambda m: f"one pass without a cache differs\n{m}"
    )


def test_a_window_as_long_as_the_text_is_no_window():
    """A window that the text does not fill gives the scores and the gradient of full attention."""
    idx, found = torch.randint(11, (2, 9)), {}
    for window in (None, 9, 12):
        torch.manual_seed(1)
        model = build(window=window).requires_grad_()
        for way, more in {"plain": {}, "masked": {"pad": torch.zeros(2, dtype=torch.long)}}.items():
            model.zero_grad()
            scores = model(idx, **more)
            scores.square().sum().backward()
            found[window, way] = torch.cat([scores.flatten(), *(p.grad.flatten() for p in model.parameters())])
    for key, result in found.items():
        torch.testing.assert_close(
            result, found[None, "plain"], rtol=1e-9, atol=1e-9,
            msg=lambda m, key=key: f"window {key[0]}, {key[1]}: a window of n hides what is n - 1 positions back\n{m}",
        )


@pytest.mark.parametrize(("batch_size", "most"), [(0, 1), (3, 0), (-1, 1), (2, -4)])
def test_a_cache_for_nothing_is_refused(batch_size, most):
    """A cache for no text, or for no token at once, is refused by name."""
    with pytest.raises(BadInput, match=f"{batch_size} texts and {most} tokens"):
        Cache(build(), batch_size, most)


def test_more_tokens_at_once_than_there_is_room_for_are_refused():
    """More tokens in one pass than the cache was made for are refused, and it can be gone on with."""
    model, [row] = build(window=4), texts(9)
    cache = Cache(model, 1, most=3)
    read(model, row[None, :6], cache, [3, 3])
    with pytest.raises(BadInput, match="4 tokens at once"):
        model(row[None, :4], cache)
    assert_scores(read(model, row[None, 6:], cache, [3]), alone(model, [row]), "the refused tokens were counted")


def test_a_bfloat16_model_keeps_bfloat16():
    """Keys and values are kept in the type of the weights, in half the memory where that is bfloat16."""
    wide, narrow = (build(window=5, n_sink=1).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    narrow.load_state_dict(wide.state_dict())
    caches = [Cache(model, 2, most=4) for model in (wide, narrow)]
    assert caches[1].nbytes * 2 == caches[0].nbytes, "bfloat16 takes two bytes, float32 four"
    idx = torch.stack(texts(12, 12))
    exact, rough = (read(m, idx, cache, [4, 1, 4, 3]) for m, cache in zip((wide, narrow), caches, strict=True))
    assert rough.dtype == torch.bfloat16, f"scores in {rough.dtype}: what comes out of the cache is wider"
    error = ((rough.float() - exact).norm() / exact.norm()).item()
    assert 0 < error < 0.1, f"the scores are off by {100 * error:.1f} %: 8 bits of precision cost a few per cent"


def test_two_caches_of_one_model_are_apart():
    """Two texts that are read in turns by the same model, each with its own cache, know nothing of one another."""
    model, rows = build(window=5, n_sink=1), texts(12, 12)
    caches = [Cache(model, 1, most=4) for _ in rows]
    parts = [[], []]
    for start in range(0, 12, 4):
        for row, cache, found in zip(rows, caches, parts, strict=True):
            found.append(model(row[None, start:start + 4], cache))
    for row, found in zip(rows, parts, strict=True):
        assert_scores(torch.cat(found, dim=1), alone(model, [row]), "what one text said came into the other")


@pytest.mark.parametrize("B", [1, 2])
def test_autocast_may_compute_in_another_type(B):
    """Where autocast makes keys and values bfloat16, the cache keeps them in the type of the weights."""
    model = build().float()
    cache = Cache(model, B, most=5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(torch.arange(5).expand(B, 5))
        found = model(torch.arange(5).expand(B, 5), cache)
    assert cache.keys.dtype == torch.float32, "the cache took another type than the weights have"
    near = {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(
        found, expected, **near, msg=lambda m: f"rounding apart, the scores are those without a cache\n{m}"
    )
