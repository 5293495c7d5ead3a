"""The feed-forward: ReLU, GELU, GLU, SwiGLU and ReLU^2, all with the same number of parameters.

    uv run stages run 07 demos/feed_forward.py
    uv run stages run 07 demos/feed_forward.py --steps 1500 --n-embd 128 --block-size 128

A gated feed-forward has three matrices where a plain one has two. So that all have equally many parameters, the gated
ones get F units and the plain ones 3/2 F. Every kind starts with outputs of the same size: its last matrix makes up for
what its non-linearity takes away. "silent" is the share of units whose output is almost nothing (under a hundredth of
the typical size) on validation text: a unit that rests costs as much to multiply as one that works.

GLU (Dauphin et al., 2017) opens and closes each unit with a sigmoid, SwiGLU with silu(z) = z sigmoid(z) (Shazeer, "GLU
Variants Improve Transformer", 2020). ReLU^2 is the square of a ReLU (So et al., "Primer", 2021).
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared.device import setup
from shared.program import run_program

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from data import windows
from demos import ablation
from demos.ablation import Scale, join
from model import GPT, FeedForward, ModelConfig, variance_scaling_

PLAIN = {  # two matrices: proj(f(fc(x)))
    "ReLU": F.relu,
    "GELU": lambda z: F.gelu(z, approximate="tanh"),
    "ReLU^2": lambda z: F.relu(z).square(),
}
GATED = {  # three matrices: proj(f(gate(x)) * fc(x))
    "GLU": torch.sigmoid,
    "SwiGLU": F.silu,
}


def gain(f) -> float:
    """1 / sqrt(E[f(z)^2]) for a standard normal z: how much larger `proj` starts, to give back what f takes away."""
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    return ((density.sum() / (density * f(z).square()).sum()) ** 0.5).item()


class PlainFeedForward(nn.Module):
    """Two matrices and a non-linearity between them: [..., C] -> [..., 3/2 F] -> [..., C]."""

    def __init__(self, config: ModelConfig, f):
        super().__init__()
        n_hidden = 3 * config.n_hidden // 2  # exact: the stage's n_hidden is even
        self.fc = nn.Linear(config.n_embd, n_hidden, bias=False)
        self.proj = nn.Linear(n_hidden, config.n_embd, bias=False)
        self.f = f
        variance_scaling_(self.fc)
        variance_scaling_(self.proj, gain(f))

    def hidden(self, x):
        return self.f(self.fc(x))

    def forward(self, x):
        return self.proj(self.hidden(x))


class GatedFeedForward(FeedForward):
    """The stage's, with another gate: [..., C] -> [..., F] -> [..., C]."""

    def __init__(self, config: ModelConfig, f):
        super().__init__(config)
        self.f = f
        variance_scaling_(self.proj, gain(f))  # gate(x) and fc(x) are independent, and E[fc(x)^2] is 1

    def hidden(self, x):
        return self.f(self.gate(x)) * self.fc(x)

    def forward(self, x):
        return self.proj(self.hidden(x))


def build(kind: str, scale: Scale, vocab_size: int, seed: int) -> GPT:
    """A model with this kind of feed-forward in every block."""
    torch.manual_seed(seed)
    model = GPT(ablation.shape(scale, vocab_size))
    for block in model.blocks:
        part = PlainFeedForward(model.config, PLAIN[kind]) if kind in PLAIN else \
            GatedFeedForward(model.config, GATED[kind])
        block.ffn = join(model, part)
    return model


@torch.no_grad()
def silent(model, x) -> float:
    """The share of the units' outputs on x [B, T] that are under a hundredth of the root mean square of their layer."""
    shares = []

    def look(layer, args):
        [hidden] = args
        shares.append((hidden.abs() < 0.01 * hidden.square().mean().sqrt()).float().mean().item())

    hooks = [block.ffn.proj.register_forward_pre_hook(look) for block in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    return mean(shares)


def main(argv: list[str] | None = None) -> None:
    args = ablation.parser(__doc__).parse_args(argv)
    setup("cpu")
    scale, data, log = ablation.start(__file__, "feed_forward", args)
    x = windows(data.val, scale.block_size)[0][:64].long()

    def job(kind, seed):
        def run(tick):
            model = build(kind, scale, len(data.tokenizer), seed)
            return ablation.fit_text(model, data, ablation.recipe(scale, seed), tick) | {"silent": silent(model, x)}

        return run

    jobs = {(kind, seed): job(kind, seed) for kind in [*PLAIN, *GATED] for seed in range(scale.seeds)}
    results = ablation.run_all(log, jobs, scale.steps, data)
    losses = ablation.by_variant(results)
    rows = ablation.compare(losses, "SwiGLU", "feed-forward")
    for row in rows:
        row["silent"] = mean(ablation.by_variant(results, "silent")[row["feed-forward"]])
        row["parameters"] = ablation.by_variant(results, "params")[row["feed-forward"]][0]
    ablation.show(ablation.title(data, scale), rows)
    fig = Figure(figsize=(6, 3), layout="constrained")
    ablation.dots(fig.subplots(), losses, "validation loss, nats per character")
    ablation.done(log, fig, "feed_forward", rows)


if __name__ == "__main__":
    run_program(main)
