"""Attention by tiles: FlashAttention's forward and backward pass in plain PyTorch, in memory that is linear in T.

    uv run stages run 08 extras/flash.py
    uv run stages run 08 extras/flash.py --tile 64 --longest 4096

Plain attention holds a T x S matrix of weights for each head, and keeps it for the backward pass. Here a tile of
queries meets the keys tile by tile, and no more than one tile of weights is held at a time. Two ideas make it possible:

- The online softmax (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018). A softmax needs the
  highest score of the whole row, which is not known before the last tile. So the highest score so far is used. When a
  later tile has a higher one, what was summed up until then is multiplied by exp(old highest - new highest).
- Weights are computed again (Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023). One number for each
  query is kept, the logarithm of the sum of its exponentials ("log-sum-exp"). From it the backward pass gets each
  weight back: exp(score - lse). That costs one more product, and saves the T x S matrix.

On a GPU this is also much faster: a tile fits into the small memory next to the arithmetic units, and the T x S numbers
are never written to the large, slow one. `extras/flash_triton.py` is the forward pass as a program for a GPU. On a CPU
a tile costs a dozen calls from Python, so small tiles are much slower than plain attention (try --tile 16). Large tiles
can be faster: plain attention computes the scores of the future and then hides them, and here half of the tiles are in
the future and are left out. torch's own kernel goes by tiles as well, without Python in between.

The table shows the most bytes that are alive at once, without the inputs, and the best of `--repeats` times. "Both
passes" are forward and backward.

Shapes: B sequences, T queries, S keys, H heads of queries, K heads of keys and values, each read by G = H / K heads of
queries, D channels; t queries and s keys in a tile. The queries are the last T of the S positions.
"""

import argparse
import sys
import weakref
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import attention


def check(q, k, v, tile: int, window: int | None) -> None:
    """Raises BadInput for shapes that do not fit together, and for a tile or a window of no positions."""
    shapes = f"queries {list(q.shape)}, keys {list(k.shape)}, values {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise BadInput(f"{shapes}: they must be [B, H, T, D], [B, K, S, D] and [B, K, S, D], with one B and one D")
    if 0 in (*q.shape, *k.shape) or q.shape[1] % k.shape[1]:
        raise BadInput(f"{shapes}: none may be empty, and H must be a multiple of K")
    if q.shape[2] > k.shape[2]:
        raise BadInput(f"{shapes}: the queries are the last of the keys' positions, so there cannot be more of them")
    if tile < 1 or (window is not None and window < 1):
        raise BadInput(f"tile {tile}, window {window}: both must be at least 1 position")


def flash_attention(q, k, v, tile: int = 128, window: int | None = None):
    """Causal attention by tiles: q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D]. Raises BadInput.

    The last query sees all keys, or the last `window` of them, and each query before it one key less. Query heads
    0 ... H / K - 1 read key-value head 0, and so on. `tile` is the number of queries and of keys in a tile.
    """
    check(q, k, v, tile, window)
    return FlashAttention.apply(q, k, v, tile, k.shape[2] if window is None else window)


class FlashAttention(torch.autograd.Function):
    """Joins the two passes. What it keeps between them grows with T: the inputs, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, tile, window):
        out, lse = forward_tiles(*grouped(q, k, v), tile, window)
        ctx.tile, ctx.window = tile, window
        ctx.save_for_backward(q, k, v, out.flatten(1, 2), lse)
        return out.flatten(1, 2)  # [B, H, T, D]

    @staticmethod
    @once_differentiable  # a gradient of the gradient is refused; autograd would take it for zero
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        out, d_out = (x.unflatten(1, (k.shape[1], -1)) for x in (out, d_out))  # [B, K, G, T, D]
        dq, dk, dv = backward_tiles(*grouped(q, k, v), out, lse, d_out, ctx.tile, ctx.window)
        return dq.flatten(1, 2), dk.squeeze(2), dv.squeeze(2), None, None


def grouped(q, k, v):
    """Query heads that share a head of keys become an axis of their own: [B, K, G, T, D], [B, K, 1, S, D] x 2."""
    return q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)


def tiles(begin: int, end: int, size: int) -> list[slice]:
    """The positions begin ... end - 1 in pieces: tiles(4, 10, 4) -> [slice(4, 8), slice(8, 10)]."""
    return [slice(i, min(i + size, end)) for i in range(begin, end, size)]


def key_tiles(rows: slice, T: int, S: int, tile: int, window: int) -> list[slice]:
    """The tiles of keys that the queries `rows` have to meet. Those in the future are left out, and cost nothing.

    Query i stands at position i + S - T. With T = S = 8, tiles of 4 and window 8, queries 0 ... 3 meet keys 0 ... 3
    only, and queries 4 ... 7 all.
    """
    first = max(0, rows.start + S - T - window + 1)  # the first key that the first of the queries sees
    return tiles(first // tile * tile, rows.stop + S - T, tile)


def part(x, where: slice):
    """Some positions of x, [..., T, D] -> [..., t, D], in float32 at least: bfloat16's 8 bits make no long sums."""
    return x[..., where, :].to(torch.promote_types(x.dtype, torch.float32))


def tile_scores(q_i, k_j, rows: slice, keys: slice, T: int, S: int, window: int):
    """A tile's scores, -inf where a query may not look: q_i [..., t, D], scaled, k_j [..., s, D] -> [..., t, s]."""
    # With fewer queries than keys the last query still is the last position: the mask is aligned bottom-right.
    at = torch.arange(rows.start, rows.stop, device=q_i.device)[:, None] + S - T  # [t, 1]
    key = torch.arange(keys.start, keys.stop, device=q_i.device)  # [s]
    return (q_i @ k_j.mT).masked_fill((key > at) | (key <= at - window), -torch.inf)


def forward_tiles(q, k, v, tile: int, window: int):
    """The output and the log-sum-exp of each query's scores: [B, K, G, T, D], [B, K, G, T, 1].

    q [B, K, G, T, D], k and v [B, K, 1, S, D]. Dao (2023), algorithm 1. By hand, one query and two tiles of keys with
    the scores (ln 1, ln 3 | ln 4) and the values (8, 16 | 4), so that the weights are 1/8, 3/8 and 4/8:

        after tile 1: highest ln 3, total 1/3 + 1 = 4/3, mix 8/3 + 16 = 56/3
        after tile 2: highest ln 4, total 4/3 * 3/4 + 1 = 2, mix 56/3 * 3/4 + 4 = 18
        output 18 / 2 = 9, log-sum-exp ln 4 + ln 2 = ln 8
    """
    T, S, scale = q.shape[-2], k.shape[-2], q.shape[-1] ** -0.5
    out, lse = torch.empty_like(q), torch.empty_like(part(q, slice(T))[..., :1])
    for rows in tiles(0, T, tile):  # on a GPU these run side by side
        q_i = part(q, rows) * scale  # [..., t, D]
        total, mix = torch.zeros_like(q_i[..., :1]), torch.zeros_like(q_i)  # [..., t, 1], [..., t, D]
        # Not -inf: where a query sees no key in its first tile, -inf - -inf would be nan.
        highest = torch.full_like(total, torch.finfo(total.dtype).min)  # [..., t, 1]
        for keys in key_tiles(rows, T, S, tile, window):
            scores = tile_scores(q_i, part(k, keys), rows, keys, T, S, window)  # [..., t, s]
            higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
            shrink = (highest - higher).exp()  # 1 if the highest score stays, less if there is a higher one
            weights = (scores - higher).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            mix = mix * shrink + weights @ part(v, keys)
            highest = higher
        out[..., rows, :] = mix / total  # divided once, at the end, and not after each tile
        lse[..., rows, :] = highest + total.log()
    return out, lse


def backward_tiles(q, k, v, out, lse, d_out, tile: int, window: int):
    """The gradients of q, k and v from that of the output, [B, K, G, T, D]. Dao (2023), algorithm 2.

    With weights P, scores S and a row's output o = P v, the chain rule says:

        dV = P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q

    The softmax subtracts delta = sum over keys of P dP, one number for each query. It needs all keys of the row, but
    sum of P (dO v) = dO (sum of P v) = dO o: the output, which is at hand, is enough.
    """
    T, S, scale = q.shape[-2], k.shape[-2], q.shape[-1] ** -0.5
    whole = slice(T)
    delta = (part(d_out, whole) * part(out, whole)).sum(-1, keepdim=True)  # [..., T, 1]
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(part(x, slice(S))) for x in (k, v))  # [B, K, 1, S, D] x 2
    for rows in tiles(0, T, tile):
        q_i, d_out_i = part(q, rows) * scale, part(d_out, rows)  # [..., t, D] x 2
        dq_i = torch.zeros_like(q_i)
        for keys in key_tiles(rows, T, S, tile, window):
            k_j, v_j = part(k, keys), part(v, keys)  # [B, K, 1, s, D] x 2
            scores = tile_scores(q_i, k_j, rows, keys, T, S, window)
            weights = (scores - lse[..., rows, :]).exp()  # [..., t, s], those of the forward pass
            d_scores = weights * (d_out_i @ v_j.mT - delta[..., rows, :])  # [..., t, s]
            dq_i += d_scores @ k_j
            # All heads of the group read these keys and values, so their gradients are added up.
            dk[..., keys, :] += (d_scores.mT @ q_i).sum(2, keepdim=True)  # q_i is scaled already
            dv[..., keys, :] += (weights.mT @ d_out_i).sum(2, keepdim=True)
        dq[..., rows, :] = dq_i * scale
    return dq, dk.type_as(k), dv.type_as(v)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it and still alive, and their peak.

    The count is exact and the same in each run. What a kernel uses inside for itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes of each piece of memory, by its address
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (where := x.untyped_storage().data_ptr()) not in given:  # no view
                self.alive[where] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.alive.pop, where, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def inputs(T: int, n_head: int = 9, n_kv_head: int = 3, head_dim: int = 64) -> list[torch.Tensor]:
    """Random q [1, H, T, D], k and v [1, K, T, D]; the default is the shape of a layer of SmolLM2-135M."""
    return [torch.randn(1, heads, T, head_dim, requires_grad=True) for heads in (n_head, n_kv_head, n_kv_head)]


def memory(function, T: int, **shape) -> tuple[int, int]:
    """The most bytes alive at once in the forward pass and in both passes, inputs not counted, gradients counted."""
    q_k_v = inputs(T, **shape)
    with LiveBytes() as count:
        out = function(*q_k_v)
        forward = count.peak
        out.sum().backward()
    return forward, count.peak


def seconds(function, T: int) -> tuple[float, float]:
    """Seconds of the forward pass and of both passes."""
    q_k_v, begin = inputs(T), perf_counter()
    out = function(*q_k_v)
    forward = perf_counter() - begin
    out.sum().backward()
    return forward, perf_counter() - begin


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=2048, help="positions, after 1/8, 1/4 and 1/2 (default: 2048)")
    parser.add_argument("--tile", type=int, default=128, help="queries and keys in a tile (default: 128)")
    parser.add_argument("--window", type=int, default=256, help="keys that a query sees in a window (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="the best time of so many, in turns (default: 3)")
    args = parser.parse_args(argv)
    if args.longest < 8 or args.repeats < 1:
        raise BadInput(f"--longest {args.longest} --repeats {args.repeats}: 8 and 1 are the least")
    setup("cpu")
    kinds = {
        "plain": attention,
        "tiles": lambda *x: flash_attention(*x, args.tile),
        "tiles in a window": lambda *x: flash_attention(*x, args.tile, args.window),
        "torch's kernel": lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True),
    }  # fmt: skip
    lengths, rows = [args.longest // share for share in (8, 4, 2, 1)], []
    with progress(len(lengths), "attention") as bar:
        for step, T in enumerate(lengths, 1):
            peaks = {kind: memory(function, T) for kind, function in kinds.items()}  # the first calls warm up, too
            turns = [[seconds(function, T) for function in kinds.values()] for _ in range(args.repeats)]
            for kind, times in zip(kinds, zip(*turns, strict=True), strict=True):
                peak, best = [size / 1e6 for size in peaks[kind]], [min(each) for each in zip(*times, strict=True)]
                rows.append({"T": T, "attention": kind, "forward, MB": peak[0], "both passes, MB": peak[1],
                             "forward, s": best[0], "both passes, s": best[1]})  # fmt: skip
            bar.update(step)
    table(f"one layer of SmolLM2-135M, tiles of {args.tile}, a window of {args.window}, float32", rows)
    half, full = ({row["attention"]: row for row in rows if row["T"] == T} for T in lengths[-2:])
    for kind in kinds:
        grown = full[kind]["both passes, MB"] / half[kind]["both passes, MB"]
        slower = full[kind]["both passes, s"] / full["plain"]["both passes, s"]
        say(f"{kind}: twice the text takes {grown:.2f} times the memory; {slower:.2f} times the seconds of plain")


if __name__ == "__main__":
    run_program(main)
