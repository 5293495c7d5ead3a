"""Three ways to send positions through their experts: the same numbers, at very different speeds.

    uv run stages run 09 demos/dispatch.py
    uv run stages run 09 demos/dispatch.py --tokens 4096 --experts 8 64

- "token by token": for each position, for each of its experts, one row goes through the expert. Everybody understands
  it, and a processor hates it: each product fetches whole matrices for a single row.
- "expert by expert": for each expert, a mask finds the positions that chose it, and they go through it together.
- "grouped", the stage's own: positions are sorted by expert once, and all experts are one call.
- "dense" is no mixture: one feed-forward with as many units as a position's experts have together. It does the same
  arithmetic without a choice. What "grouped" takes longer is the price of choosing.

`forward` and `backward` are milliseconds, the median over `--rounds` in which all ways take turns. `slower` is how many
times as long as "grouped" a way takes, forward and backward together. `differs` is the largest difference from "token
by token", in the output or in any gradient, as a share of the largest number in that tensor.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from model import FeedForward, ModelConfig
from moe import Mixture


def separate(layer: Mixture) -> list[tuple]:
    """Gate, fc and proj of each expert. Taken apart once: the gradient of `gate[e]` is as large as that of all E."""
    return list(zip(layer.gate.unbind(), layer.fc.unbind(), layer.proj.unbind(), strict=True))


def feed_forward(x, gate, fc, proj):
    """What an expert makes of positions [n, C]: [n, C]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, fc), proj)


def token_by_token(layer: Mixture, x, chosen, weights):
    """One row at a time: x [N, C], chosen and weights [N, k] -> [N, C]."""
    experts, rows = separate(layer), []
    for row, weight, mine in zip(x.unbind(), weights.unbind(), chosen.tolist(), strict=True):
        rows.append(sum(weight[i] * feed_forward(row, *experts[e]) for i, e in enumerate(mine)))
    return torch.stack(rows)


def expert_by_expert(layer: Mixture, x, chosen, weights):
    """One expert at a time, with all positions that chose it: x [N, C], chosen and weights [N, k] -> [N, C]."""
    y = torch.zeros_like(x)
    for e, weight in enumerate(separate(layer)):
        n, i = (chosen == e).nonzero(as_tuple=True)  # positions, and which of their choices it was
        y = y.index_add(0, n, weights[n, i, None] * feed_forward(x[n], *weight))
    return y


WAYS = {"token by token": token_by_token, "expert by expert": expert_by_expert, "grouped": Mixture.experts}


def run(way, parts: list, upstream):
    """Call `way()` and differentiate -> seconds forward, seconds backward, [the output, the gradient of each part]."""
    begin = perf_counter()
    y = way()
    middle = perf_counter()
    found = torch.autograd.grad(y, parts, upstream)
    return middle - begin, perf_counter() - middle, [y.detach(), *found]


def difference(found: list, expected: list) -> float:
    """The largest difference of two lists of tensors, each as a share of the largest number expected in it."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def compare(config: ModelConfig, tokens: int, rounds: int, tick=lambda: None) -> list[dict]:
    """A table row for each way, for a mixture of the shape `config` and `tokens` positions; the ways take turns."""
    torch.manual_seed(0)
    layer = Mixture(config, FeedForward)
    dense = FeedForward(config, config.n_active * config.expert_hidden)
    x, upstream = torch.randn(tokens, config.n_embd, requires_grad=True), torch.randn(tokens, config.n_embd)
    with torch.no_grad():
        chosen, weights = layer.route(x)
    weights.requires_grad_()
    parts = [x, weights, layer.gate, layer.fc, layer.proj]
    calls = {name: (lambda way=way: way(layer, x, chosen, weights), parts) for name, way in WAYS.items()}
    calls["dense"] = (lambda: dense(x), [x, *dense.parameters()])
    seconds, results = {name: [] for name in calls}, {}
    for _ in range(rounds):
        for name, (way, wanted) in calls.items():
            *times, results[name] = run(way, wanted, upstream)
            seconds[name].append(times)
            tick()
    forward, backward = ({name: median(column) for name, column in zip(calls, columns, strict=True)} for columns in (
        [[times[i] for times in seconds[name]] for name in calls] for i in (0, 1)
    ))  # fmt: skip
    whole = {name: forward[name] + backward[name] for name in calls}
    return [
        {"experts": config.n_expert, "way": name, "forward": 1000 * forward[name], "backward": 1000 * backward[name],
         "slower": whole[name] / whole["grouped"],
         "differs": None if name == "dense" else difference(results[name], results["token by token"])}
        for name in calls
    ]  # fmt: skip


def draw(rows: list[dict]) -> Figure:
    """Milliseconds forward and backward by the number of experts, a line for each way."""
    fig = Figure(figsize=(6.2, 3.8), layout="constrained")
    axes = fig.subplots()
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        axes.plot([row["experts"] for row in mine], [row["forward"] + row["backward"] for row in mine], "o-", label=way)
    experts = sorted({row["experts"] for row in rows})
    axes.set(xlabel="experts", ylabel="ms, forward and backward", yscale="log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(experts, [str(e) for e in experts])
    axes.grid(alpha=0.3)
    axes.legend()
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64], help="how many (default: 8 to 64)")
    parser.add_argument("--active", type=int, default=2, help="experts of a position (default: 2)")
    parser.add_argument("--n-embd", type=int, default=128, help="channels (default: 128)")
    parser.add_argument("--expert-hidden", type=int, default=168, help="units of an expert (default: 168)")
    parser.add_argument("--tokens", type=int, default=1024, help="positions (default: 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way runs (default: 5)")
    args = parser.parse_args(argv)
    for flag in ("n_embd", "tokens", "rounds", "active"):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag.replace('_', '-')} {getattr(args, flag)}: it must be at least 1")
    if min(args.experts) < args.active:
        raise BadInput(f"--experts {min(args.experts)}: a position uses {args.active}, so there must be as many")
    setup("cpu")
    sizes = {"n_embd": args.n_embd, "n_head": 1, "head_dim": 2, "expert_hidden": args.expert_hidden}
    shapes = [ModelConfig(1, **sizes, n_expert=E, n_active=args.active, renormalise=args.active > 1)
              for E in args.experts]  # fmt: skip
    log, rows, steps = RunLog(__file__, "dispatch", vars(args)), [], 0
    with progress(len(shapes) * args.rounds * (len(WAYS) + 1), "dispatching") as bar:

        def tick():
            nonlocal steps
            steps += 1
            bar.update(steps)

        for config in shapes:
            rows += compare(config, args.tokens, args.rounds, tick)
    title = f"{args.tokens:,} positions of {args.n_embd} channels, {args.active} experts of {args.expert_hidden} units"
    table(f"{title} each, in ms", rows)
    say(f"figure: {log.figure(draw(rows), 'dispatch')}")
    log.finish(rows=rows)


if __name__ == "__main__":
    run_program(main)
