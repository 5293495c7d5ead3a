"""Attention by tiles gives torch's numbers and gradients, in memory that is linear in the length of the text."""

import math

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

from extras import flash
from extras.flash import LiveBytes, flash_attention
from model import attention

CASES = [  # B, H, K, T, S, D, tile, window
    (2, 6, 3, 33, 33, 8, 8, None),  # the last tile has one position
    (2, 6, 2, 37, 50, 4, 16, None),  # fewer queries than keys, and no tile ends where the text does
    (3, 4, 1, 5, 29, 8, 8, None),
    (2, 4, 2, 1, 19, 6, 4, None),  # one query: what a cache is read with
    (2, 4, 2, 7, 9, 4, 64, None),  # all in one tile
    (2, 4, 2, 9, 9, 4, 1, None),  # tiles of one position
    (2, 4, 2, 40, 40, 8, 16, 10),  # a window that begins in the middle of tiles
    (2, 6, 3, 21, 30, 8, 4, 5),
    (2, 4, 2, 12, 20, 4, 8, 1),  # each query sees itself alone
]


def tensors(B, H, K, T, S, D, seed=0):
    """Queries, keys, values and a gradient for the output, in float64. Scores differ much from key to key."""
    torch.manual_seed(seed)
    q, k, v, d_out = (torch.randn(B, heads, n, D, dtype=torch.float64)
                      for heads, n in ((H, T), (K, S), (K, S), (H, T)))  # fmt: skip
    return [2 * x.requires_grad_() for x in (q, k)] + [v.requires_grad_(), d_out]


def seen(T, S, window):
    """Which key each query may look at, one by one: [T, S]."""
    window = S if window is None else window
    return torch.tensor([[0 <= (i + S - T) - j < window for j in range(S)] for i in range(T)])


def both(case):
    """(output, dq, dk, dv) by tiles, and by torch."""
    *shape, tile, window = case
    q, k, v, d_out = tensors(*shape)
    ours = flash_attention(q, k, v, tile, window)
    theirs = F.scaled_dot_product_attention(q, k, v, seen(*shape[3:5], window), enable_gqa=True)
    return [(out, *torch.autograd.grad(out, (q, k, v), d_out)) for out in (ours, theirs)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_torchs(case):
    """The output is that of plain attention to 1e-10: any tile, fewer queries than keys, shared heads, windows."""
    (ours, *_), (theirs, *_) = both(case)
    error = (ours - theirs).abs().max().item()
    assert ours.shape == theirs.shape and error < 1e-10, (
        f"off by {error:.1e}: when a higher score comes, are the sum and the mix scaled down? "
        "Is the last query the last position? Is a tile without visible keys nan?"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_torchs(case):
    """The gradients of queries, keys and values are those of plain attention to 1e-10."""
    (_, *ours), (_, *theirs) = both(case)
    ideas = {
        "queries": "is delta taken off, and is the scale in it?",
        "keys": "is delta taken off, is the scale in it, and is it the sum over the heads that share them?",
        "values": "are the weights those of the forward pass, and is it the sum over the heads that share them?",
    }
    for (name, idea), a, b in zip(ideas.items(), ours, theirs, strict=True):
        error = (a - b).abs().max().item()
        assert a.shape == b.shape and error < 1e-10, f"the gradient of the {name} is off by {error:.1e}: {idea}"


def test_online_softmax_by_hand():
    """Scores (ln 1, ln 3 | ln 4) and values (8, 16 | 4) in two tiles: 1/8, 3/8 and 4/8 of them are 9, lse is ln 8."""
    k = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64).log().view(1, 1, 1, 3, 1)
    v = torch.tensor([8.0, 16.0, 4.0], dtype=torch.float64).view(1, 1, 1, 3, 1)
    q = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    out, lse = flash.forward_tiles(q, k, v, tile=2, window=3)
    assert lse.item() == pytest.approx(math.log(8)), "the sum is not scaled down when the higher score ln 4 comes"
    assert out.item() == pytest.approx(9), "the mix is not scaled down when the higher score ln 4 comes"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
def test_scores_of_a_thousand_do_not_overflow(order):
    """Scores of 0, 1000, 2000 and 3000 in any order: the highest takes all, and nothing is inf or nan."""
    q, k = torch.ones(1, 1, 1, 1), 1000 * torch.tensor(order).float().view(1, 1, 4, 1)
    q, k, v = (x.requires_grad_() for x in (q, k, torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)))
    out = flash_attention(q, k, v, tile=1)
    assert out.item() == 1 + order.index(3), f"{out.item()}: is the highest score taken off before the exponential?"
    d_v = torch.autograd.grad(out.sum(), v)[0].flatten().tolist()
    assert d_v == [float(score == 3) for score in order], f"{d_v}: is the log-sum-exp taken off before it?"


def test_a_tile_without_visible_keys_changes_nothing():
    """With a window of 2, query 7 meets keys 0 ... 3 in its tile and sees none of them: no nan, and no part of them."""
    q, k = torch.zeros(2, 2, 8, 3), torch.randn(2, 1, 8, 3)
    v = torch.arange(1.0, 9.0).expand(2, 1, 3, 8).mT.clone().requires_grad_()  # 1 ... 8: equal weights give means
    out = flash_attention(q, k, v, tile=4, window=2)
    expected = [1.0, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    assert out[1, 1, :, 2].tolist() == expected, f"{out[1, 1, :, 2].tolist()}: nan comes from -inf - -inf"
    d_v = torch.autograd.grad(out.sum(), v)[0][1, 0, :, 2].tolist()
    assert d_v == [3.0, *[2.0] * 6, 1.0], f"{d_v}: each of 2 heads gives 1/2 for each query that sees the key"


def test_sums_are_kept_in_float32():
    """In bfloat16 a sum of ones ends at 256. Of 1,024 equal weights half meet a 1, and the output is 1/2."""
    v = (torch.arange(1024) >= 512).bfloat16().view(1, 1, 1024, 1).expand(2, 1, -1, 2)
    out = flash_attention(torch.zeros(2, 2, 1, 2).bfloat16(), torch.zeros_like(v), v, tile=1)
    assert out.dtype == torch.bfloat16 and (out == 0.5).all(), f"{out[0, 0, 0, 0].item()}: the sum stopped growing"


def test_what_is_kept_is_no_matrix():
    """Between the passes the inputs, the output and one number for each query are kept, and no weights."""
    kept = []
    q, k, v, _ = tensors(2, 6, 3, 40, 50, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        flash_attention(q, k, v, tile=8)
    expected = [2 * 6 * 40 * 4, 2 * 3 * 50 * 4, 2 * 3 * 50 * 4, 2 * 6 * 40 * 4, 2 * 6 * 40]
    assert sorted(kept) == sorted(expected), f"kept are {kept} numbers, not {expected}: weights are computed again"


def test_live_bytes_by_hand():
    """The counter counts what is made and alive: not what was there, not a view, and not what is gone."""
    there = torch.zeros(100)  # 400 bytes
    with LiveBytes() as count:
        there.add_(1).view(10, 10)
        assert count.peak == 0, "in place and as a view nothing is made"
        a = there + 1
        b = (a * 2).view(10, 10)[:5]
        assert sum(count.alive.values()) == 800, "two tensors of 100 numbers, of which b is a view of one"
        del a
        c = b.double()
        assert sum(count.alive.values()) == 400 + 400 and count.peak == 800, "b keeps all its 400 bytes, and a is gone"
        del b, c
    assert not count.alive, "all is gone"


def test_memory_is_linear():
    """Peak memory of forward and backward: by tiles each further position costs the same, plain the square."""
    lengths, shape = (256, 512, 1024, 2048), {"n_head": 4, "n_kv_head": 2, "head_dim": 8}
    tiled = [flash.memory(lambda *x: flash_attention(*x, tile=128), T, **shape) for T in lengths]
    plain = [flash.memory(attention, T, **shape) for T in lengths]
    for i, name in enumerate(("forward", "both passes")):
        a, b, c, d = (peak[i] for peak in tiled)
        steps = f"{name}: {[peak[i] for peak in tiled]} bytes at {lengths} positions"
        assert c - b == pytest.approx(2 * (b - a), rel=0.01), f"{steps}: something grows with the square of T"
        assert d - c == pytest.approx(2 * (c - b), rel=0.01), f"{steps}: something grows with the square of T"
        one = 2048 * 2048 * 4
        assert d < one / 3, f"{name}: {d} bytes, a third of a matrix of weights of one head is {one / 3:.0f}"
        a, b, c, d = (peak[i] for peak in plain)
        assert d > 3.5 * c > 3.5 * 3.5 * b and d > 4 * one, f"{name}: plain attention holds 4 heads of T x T weights"


def test_no_gradient_of_the_gradient():
    """A second derivative, which the backward pass cannot have, is an error and not a wrong number."""
    q, k, v, d_out = tensors(2, 4, 2, 5, 6, 4)
    d_q = torch.autograd.grad(flash_attention(q, k, v, tile=2), q, d_out, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(d_q.sum(), k)


@pytest.mark.parametrize(
    "shapes, more, message",
    [
        ([(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)], {"tile": 0}, "tile 0"),
        ([(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)], {"window": 0}, "window 0"),
        ([(2, 4, 5, 8), (2, 2, 6, 4), (2, 2, 6, 4)], {}, "one D"),
        ([(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 7, 8)], {}, "must be"),
        ([(2, 4, 5, 8), (3, 2, 6, 8), (3, 2, 6, 8)], {}, "one B"),
        ([(4, 5, 8), (2, 6, 8), (2, 6, 8)], {}, "must be"),
        ([(2, 4, 5, 8), (2, 3, 6, 8), (2, 3, 6, 8)], {}, "multiple of K"),
        ([(2, 4, 7, 8), (2, 2, 6, 8), (2, 2, 6, 8)], {}, "cannot be more"),
        ([(2, 4, 0, 8), (2, 2, 6, 8), (2, 2, 6, 8)], {}, "empty"),
    ],
    ids=str,
)
def test_nonsense_is_refused(shapes, more, message):
    """Shapes that do not fit together, more queries than keys, a tile or a window of nothing: one line says why."""
    with pytest.raises(BadInput, match=message):
        flash_attention(*(torch.zeros(shape) for shape in shapes), **more)


def test_the_script_shows_memory_and_seconds(capsys):
    """The script prints memory and seconds of four kinds at four lengths; bad flags are refused."""
    flash.main(["--longest", "64", "--tile", "16", "--window", "8", "--repeats", "1"])
    printed = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.count("│") > 3]
    assert len(rows) == 4 * 4 and {int(row[0]) for row in rows} == {8, 16, 32, 64}, printed
    assert all(0 < float(row[2]) <= float(row[3]) for row in rows), "both passes take at least what the first takes"
    assert printed.count("times the memory") == 4, printed
    for flags in (["--longest", "7"], ["--repeats", "0"], ["--tile", "0"]):
        with pytest.raises(BadInput):
            flash.main(flags)
