"""Why the scores are divided by sqrt(D), and what attention costs as the text grows longer.

    uv run stages run 05 demos/scaling.py
    uv run stages run 05 demos/scaling.py --lengths 64 128 256

First table: queries and keys of independent standard normals, as at the start of training. A dot product of D such
terms has standard deviation sqrt(D). Softmax over 32 scores of that size puts nearly all weight on one of them; and
where one weight is 1 and the others 0, the derivative of softmax, w_i (1 if i = j else 0) - w_i w_j, is 0 as well, and
nothing is learned. Divided by sqrt(D), neither the choice nor the gradient depends on D.

Second table: time per position of attention and of the feed-forward layer in one block. The feed-forward layer does
the same for each position, however many there are. Attention compares each with all: twice the length, twice the work
per position, four times the work in all.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F

from model import Block, ModelConfig, attention

CHANNELS = (4, 16, 64, 256, 1024)
KEYS = 32


def softness(D: int, scale: float, queries: int = 2000) -> tuple[float, float, float]:
    """Of softmax over scores of random queries and keys: scores' deviation, largest weight, length of the gradient.

    The gradient is that of the output towards the scores: the length of softmax's derivative, a matrix [KEYS, KEYS].
    """
    generator = torch.Generator().manual_seed(D)
    q, k = torch.randn(queries, 1, D, generator=generator), torch.randn(queries, KEYS, D, generator=generator)
    scores = (q @ k.transpose(1, 2))[:, 0] * scale  # [queries, KEYS]
    weights = F.softmax(scores, dim=-1)
    slope = weights.diag_embed() - weights[:, :, None] * weights[:, None, :]
    return scores.std().item(), weights.amax(-1).mean().item(), slope.flatten(1).norm(dim=1).mean().item()


def seconds(call, repeats: int) -> float:
    """The shortest of several times: what else the machine does can only add."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def cost(T: int, tokens: int, repeats: int) -> dict:
    """Microseconds per position in one block of 128 channels: texts of T positions, about `tokens` in all."""
    config = ModelConfig(vocab_size=1, block_size=T, n_embd=128, n_head=4)
    block, B = Block(config), max(1, tokens // T)
    x = torch.randn(B, T, config.n_embd)
    q, k, v = (torch.randn(B, config.n_head, T, config.n_embd // config.n_head) for _ in range(3))
    parts = {"attention(q, k, v)": lambda: attention(q, k, v), "feed-forward": lambda: block.ffn(x)}
    return {"positions": T} | {name: 1e6 * seconds(call, repeats) / (B * T) for name, call in parts.items()}


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="default: 128 512 2048")
    parser.add_argument("--repeats", type=int, default=5, help="times each is measured; the best counts (default: 5)")
    args = parser.parse_args(argv)
    if min(args.lengths) < 1 or args.repeats < 1:
        raise BadInput(f"--lengths {args.lengths} --repeats {args.repeats}: all must be at least 1")
    setup("cpu")
    log = RunLog(__file__, "scaling", vars(args))

    rows = []
    for D in CHANNELS:
        for name, scale in (("no", 1.0), ("yes", D**-0.5)):
            spread, largest, slope = softness(D, scale)
            rows.append({"D": D, "scaled": name, "scores' std": spread, "largest weight": largest, "gradient": slope})
    table(f"Softmax over {KEYS} random keys", rows)
    times = [cost(T, max(args.lengths), args.repeats) for T in args.lengths]
    table("Microseconds per position, forward, 128 channels in 4 heads", times)
    log.finish(softness=rows, cost=times)


if __name__ == "__main__":
    run_program(main)
