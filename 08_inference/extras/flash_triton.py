"""The forward pass of `extras/flash.py` as one program for a GPU, in Triton.

    TRITON_INTERPRET=1 uv run stages run 08 extras/flash_triton.py --device cpu
    uv run stages run 08 extras/flash_triton.py --device cuda

A kernel is a program that runs many times side by side, here once for each tile of queries of each head. Unlike the
version in PyTorch:

- there is no loop over tiles of queries: `tl.program_id` says which tile is this program's;
- what stands between two loads or stores never leaves the chip: scores, weights, the sums of a row;
- memory is a row of numbers without axes. The program works out where its numbers lie, and says by a mask which of them
  exist: tiles are powers of two, and T, S and D need not be.

Without a GPU, Triton's interpreter runs the same lines with numpy, slowly. It must be asked for before Triton is
imported, by the variable TRITON_INTERPRET. Its products in bfloat16 are wrong (Triton 3.8): use float32 there.
Triton exists for Linux; torch's builds for GPUs bring it along. Tillet et al., "Triton" (2019).
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch

from extras.flash import check, inputs
from model import attention

try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ImportError:
    sys.exit("error: Triton is not installed: it comes with torch's builds for GPUs, on Linux")

LOG2_E = 1.4426950408889634  # exp(x) is exp2(x log2(e)), and exp2 is what a GPU has in hardware


@triton.jit
def kernel(q, k, v, out, lse, T, S, group, window, scale, log2_e, D: tl.constexpr, WIDTH: tl.constexpr,
           TILE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """One tile of queries of one head: q, out [B H, T, D], k, v [B K, S, D], lse [B H, T], each given by its address.

    WIDTH is D or the next power of two, WIDE the type of the sums. The names are those of `forward_tiles`.
    """
    head, first_row = tl.program_id(1).to(tl.int64), tl.program_id(0) * TILE
    rows, channels = first_row + tl.arange(0, TILE), tl.arange(0, WIDTH)
    there = (rows < T)[:, None] & (channels < D)[None, :]  # [t, WIDTH]
    where = (head * T + rows)[:, None] * D + channels[None, :]
    q_i = tl.load(q + where, there, other=0.0)  # [t, WIDTH]
    k += head // group * S * D  # b H + h divided by G is b K + h / G: the head of keys that this head reads
    v += head // group * S * D
    at = rows + S - T  # the mask is aligned bottom-right
    total = tl.zeros([TILE], WIDE)
    mix = tl.zeros([TILE, WIDTH], WIDE)
    highest = tl.full([TILE], -1e30, WIDE)  # not -inf: -inf - -inf would be nan
    first_key = tl.maximum(0, first_row + S - T - window + 1) // TILE * TILE
    for start in range(first_key, tl.minimum(first_row + TILE, T) + S - T, TILE):
        keys = start + tl.arange(0, TILE)
        where_j = keys[:, None] * D + channels[None, :]
        there_j = (keys < S)[:, None] & (channels < D)[None, :]  # [s, WIDTH]
        k_j = tl.load(k + where_j, there_j, other=0.0)
        v_j = tl.load(v + where_j, there_j, other=0.0)
        # "ieee": without it a GPU multiplies float32 with 10 bits of precision.
        scores = tl.dot(q_i, tl.trans(k_j), input_precision="ieee").to(WIDE) * (scale * log2_e)  # [t, s]
        seen = (keys[None, :] <= at[:, None]) & (keys[None, :] > at[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mix = mix * shrink[:, None] + tl.dot(weights.to(v_j.dtype), v_j, input_precision="ieee").to(WIDE)
        highest = higher
    tl.store(out + where, (mix / total[:, None]).to(out.dtype.element_ty), there)
    tl.store(lse + head * T + rows, (highest + tl.log2(total)) / log2_e, rows < T)


def flash_forward(q, k, v, tile: int = 64, window: int | None = None):
    """The output and the log-sum-exp of each query: q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D], [B, H, T].

    Which keys a query sees is said in `extras.flash.flash_attention`. Raises BadInput, also for what the interpreter
    cannot compute. There is no backward pass.
    """
    check(q, k, v, tile, window)
    if tile < 16 or tile & (tile - 1):
        raise BadInput(f"tile {tile}: a GPU multiplies tiles of 16, 32, 64 ... positions")
    if not q.is_cuda and isinstance(kernel, triton.runtime.JITFunction):
        raise BadInput("a kernel needs a GPU: set TRITON_INTERPRET=1 before the program starts to run it on a CPU")
    if not q.is_cuda and q.dtype == torch.bfloat16:
        raise BadInput("Triton's interpreter multiplies bfloat16 wrongly: use float32 on a CPU")
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    q, k, v = (x.detach().contiguous() for x in (q, k, v))  # a slice has gaps in memory, which the kernel would read
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), torch.empty(B, H, T, dtype=wide, device=q.device)
    grid = (triton.cdiv(T, tile), B * H)
    width, types = max(16, triton.next_power_of_2(D)), {torch.float32: tl.float32, torch.float64: tl.float64}
    kernel[grid](q, k, v, out, lse, T, S, H // K, window or S, D**-0.5, LOG2_E, D, width, tile, types[wide])
    return out, lse


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--length", type=int, default=100, help="positions; the interpreter is slow (default: 100)")
    args = parser.parse_args(argv)
    if args.length < 1:
        raise BadInput(f"--length {args.length}: it must be at least 1")
    device = setup(args.device)
    q, k, v = (x.detach().to(device) for x in inputs(args.length, n_head=4, n_kv_head=2))
    apart = (flash_forward(q, k, v)[0] - attention(q, k, v)).abs().max().item()
    say(f"{args.length} positions on {device}: the kernel is at most {apart:.1e} away from plain attention")
    if device.type == "cuda":
        q, k, v = (x.bfloat16() for x in (q, k, v))
        for name, function in (("kernel", flash_forward), ("torch's kernel", attention)):
            took = triton.testing.do_bench(lambda run=function: run(q, k, v))  # milliseconds
            say(f"{name}: {1e3 * took:.0f} microseconds in bfloat16")


if __name__ == "__main__":
    run_program(main)
