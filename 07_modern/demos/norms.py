"""Norms: RMSNorm against LayerNorm, and where in the block the norm stands.

    uv run stages run 07 demos/norms.py
    uv run stages run 07 demos/norms.py --steps 1500 --n-layer 8 --rates 0.01 0.02 0.04

Which norm: the loss; the length of the whole gradient before clipping ("gradient": the median over all steps,
"largest": the largest after the warm-up); and the time of a training step. The kinds take turns in the timing, a step
each, so that whatever else the machine does hits all of them; the medians count. RMSNorm computes less than LayerNorm.
Whether it takes less time depends on how it is written, so each is timed twice: as several operations of torch, the
way the stage writes RMSNorm, and as torch's own single kernel.

Where: "pre" is the stage's block, the norm at the entrance of each branch. "post" norms the sum after each branch, as
first published (Vaswani et al., 2017). "output" norms what the branch brings, before it is added (OLMo 2, 2024). Each
is trained at several rates of Muon, because a place that is good at one rate only is a place that needs care.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared.console import table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from demos import ablation
from demos.ablation import Scale
from model import GPT, Block, RMSNorm


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 over the channels, then a learned scale and shift, operation by operation."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.weight = nn.Parameter(norm.weight.data.clone())
        self.bias = nn.Parameter(torch.zeros_like(norm.weight))
        self.eps = norm.eps

    def forward(self, x):
        wide = x.float()
        wide = wide - wide.mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * self.weight + self.bias


class FusedLayerNorm(LayerNorm):
    """The same numbers from torch's kernel."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)


class FusedRMSNorm(RMSNorm):
    """The stage's RMSNorm from torch's kernel."""

    def __init__(self, norm: RMSNorm):
        super().__init__(norm.weight.shape[0], norm.eps)
        self.weight.data.copy_(norm.weight.data)

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


KINDS = {  # what stands in the place of each RMSNorm; none: it stays
    "RMSNorm": None,
    "LayerNorm": LayerNorm,
    "RMSNorm, torch's kernel": FusedRMSNorm,
    "LayerNorm, torch's kernel": FusedLayerNorm,
}


class PostNormBlock(Block):
    """The norm after each addition puts the sum back on scale."""

    def forward(self, x, rope=None):
        x = self.norm1(x + self.attn(x, rope))
        x = self.norm2(x + self.ffn(x))
        return x


class OutputNormBlock(Block):
    """The norm at the exit of each branch: the stream itself is never normed, what is added to it always is."""

    def forward(self, x, rope=None):
        x = x + self.norm1(self.attn(x, rope))
        x = x + self.norm2(self.ffn(x))
        return x


PLACES = {"pre": Block, "post": PostNormBlock, "output": OutputNormBlock}


def build(scale: Scale, vocab_size: int, seed: int, kind: str = "RMSNorm", place: str = "pre") -> GPT:
    """A model with these norms at this place; with one seed, all start from the same weights."""
    torch.manual_seed(seed)
    model = GPT(ablation.shape(scale, vocab_size))
    for block in model.blocks:
        block.__class__ = PLACES[place]  # the same weights, another forward
        if place == "output":  # a normed output has size 1, whatever proj's size: the norm's scale has to shrink it
            for norm in (block.norm1, block.norm2):
                nn.init.constant_(norm.weight, (2 * scale.n_layer) ** -0.5)
    if KINDS[kind]:
        replaced = [(owner, name, child) for owner in model.modules() for name, child in owner.named_children()
                    if isinstance(child, RMSNorm)]
        for owner, name, norm in replaced:
            setattr(owner, name, KINDS[kind](norm))
    return model


def watch_gradient(model) -> list[float]:
    """A list to which each backward pass will add the length of the whole gradient, before anything clips it."""
    lengths, squares, names = [], [], list(model.parameters())

    def add(p):
        squares.append(p.grad.pow(2).sum())
        if len(squares) == len(names):  # the last of them: the pass is over
            lengths.append(torch.stack(squares).sum().sqrt().item())
            squares.clear()

    for p in names:
        p.register_post_accumulate_grad_hook(add)
    return lengths


def fit_watched(model, data, config, tick) -> dict:
    """Train and score the model, with the median and the largest length of its gradient."""
    lengths = watch_gradient(model)
    found = ablation.fit_text(model, data, config, tick)
    return found | {"gradient": statistics.median(lengths), "largest": max(lengths[config.warmup:] or lengths)}


def draw(norms: dict[str, list[float]], places: dict[str, list[float]]) -> Figure:
    """Loss by norm, and by place and rate."""
    fig = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    ablation.dots(left, norms, "validation loss, nats per character", "which norm")
    ablation.dots(right, places, "validation loss, nats per character", "where it stands, rate of Muon")
    return fig


def main(argv: list[str] | None = None) -> None:
    flags = ablation.parser(__doc__)
    flags.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.04],
                       help="rates of Muon for each place (default: 0.01 0.02 0.04)")
    flags.add_argument("--rounds", type=int, default=30, help="steps timed of each kind (default: 30)")
    args = flags.parse_args(argv)
    if args.rounds < 1 or not min(args.rates) > 0:
        raise BadInput(f"--rounds {args.rounds} --rates {args.rates}: at least 1 round, and rates above 0")
    setup("cpu")
    scale, data, log = ablation.start(__file__, "norms", args)
    V = len(data.tokenizer)

    def job(seed, kind, place="pre", **changes):
        config = ablation.recipe(scale, seed, **changes)
        return lambda tick: fit_watched(build(scale, V, seed, kind, place), data, config, tick)

    seeds = range(scale.seeds)
    jobs = {("norm", kind, seed): job(seed, kind) for kind in ("RMSNorm", "LayerNorm") for seed in seeds}
    jobs |= {(place, rate, seed): job(seed, "RMSNorm", place, muon_lr=rate)
             for place in PLACES for rate in args.rates for seed in seeds}
    results = ablation.run_all(log, jobs, scale.steps, data)
    times = ablation.step_times({kind: build(scale, V, 0, kind) for kind in KINDS}, scale, args.rounds)

    def values(first, second, key="val loss"):
        return [results[first, second, seed][key] for seed in seeds]

    norms = {kind: values("norm", kind) for kind in ("RMSNorm", "LayerNorm")}
    rows = ablation.compare(norms, "RMSNorm", "norm")
    for row in rows:
        row |= {key: statistics.mean(values("norm", row["norm"], key)) for key in ("gradient", "largest")}
        row |= {"ms": times[row["norm"]], "ms, torch's kernel": times[f"{row['norm']}, torch's kernel"]}
    ablation.show(ablation.title(data, scale), rows)
    places = {f"{place}, {rate:g}": values(place, rate) for place in PLACES for rate in args.rates}
    lines = [
        {"place": place, "rate": rate, "val loss": statistics.mean(values(place, rate)),
         "worst seed": max(values(place, rate)), "gradient": statistics.mean(values(place, rate, "gradient")),
         "largest": statistics.mean(values(place, rate, "largest"))}
        for place in PLACES for rate in args.rates
    ]
    table("where the norm stands, by the rate of Muon", lines)
    ablation.done(log, draw(norms, places), "norms", rows, places=lines)


if __name__ == "__main__":
    run_program(main)
