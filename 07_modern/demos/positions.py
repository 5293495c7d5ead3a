"""Positions: none, learned, sinusoidal, RoPE and PoPE, on the text as trained and on windows up to eight times as long.

    uv run stages run 07 demos/positions.py
    uv run stages run 07 demos/positions.py --steps 1500 --n-embd 128 --block-size 128

Each model is trained on windows of T positions and then reads windows of 8 T. "1x" is its loss on positions 0 ... T - 1
of these, "2x" on T ... 2 T - 1, "4x" on 2 T ... 4 T - 1, "8x" on 4 T ... 8 T - 1. A model that makes use of a longer
past gets better from left to right; one that has never met such positions gets worse. Learned positions end at T: there
is no vector for position T, so there is nothing to measure.

PoPE, polar coordinate positions (Gopalakrishnan et al., "Decoupling the What and Where with Polar Coordinate Positional
Embedding", arXiv 2509.10534, 2025), differs from RoPE in one thing. RoPE makes D / 2 complex numbers of a query's D
channels, each with a length and an angle, and turns them by the position. So the angle holds both what the query is
looking for and where it stands. PoPE makes D complex numbers of the D channels. Their lengths are softplus of the
channels (equation 3), which is what; their angles come from the position alone (equation 4), which is where. There are
as many frequencies as channels, theta_c = base^(-(c - 1) / D) for c = 1 ... D. The score of a query at position t for a
key at s is the real part of the product (equation 6), with a learned phase delta_c for each channel of each head:

    a(t, s) = sum over c of softplus(q_tc) softplus(k_sc) cos((s - t) theta_c + delta_c)

As in the paper, delta starts at 0 and is held between -2 pi and 0. Queries and keys are normed first, in all kinds
alike, as in the stage's model; the paper's models have no such norm. `demos/indexing.py` has the paper's other task.
"""

import math
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared.console import say
from shared.device import setup
from shared.program import run_program

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from data import windows
from demos import ablation
from demos.path import WithPositions, learn_positions
from model import GPT, CausalSelfAttention, ModelConfig, attention

KINDS = ("none", "learned", "sinusoidal", "RoPE", "PoPE")
LONGER = 8  # windows that are scored are so many times as long as those trained on


def sinusoids(T: int, config: ModelConfig):
    """One fixed vector for each position, as long on average as a token's: [T, C].

    Channels 2i and 2i + 1 hold sin and cos of position / 10000^(2i / C). Vaswani et al. (2017), section 3.5.
    """
    rate = 10_000 ** (-torch.arange(0, config.n_embd, 2) / config.n_embd)  # [C / 2]
    angles = torch.arange(T)[:, None] * rate  # [T, C / 2]
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :config.n_embd]  # [T, C]
    return waves * math.sqrt(2 / config.n_embd)  # the mean square of a wave is 1 / 2


class PolarAttention(CausalSelfAttention):
    """Attention with PoPE: [B, T, C] -> [B, T, C].

    The phase delta belongs to the key's angle in the paper (equation 8). Here it is taken from the query's, which gives
    the same score and lets heads that share a key have phases of their own.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.rope_base = config.rope_base
        self.phase = nn.Parameter(torch.zeros(config.n_head, 1, config.head_dim))  # delta [H, 1, D]

    def forward(self, x, rope=None):
        q, k, v = (self.split_heads(layer(x)) for layer in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)
        angles = self.angles(x.shape[1]).to(x.device)  # [T, D]
        q = polar(q, angles - self.phase.clamp(-2 * math.pi, 0))  # [B, H, T, 2 D]
        k = polar(k, angles)
        # `attention` divides by the root of the channels it sees. They are 2 D now, but the terms of a score are D.
        return self.proj(self.merge_heads(attention(q * math.sqrt(2), k, v)))

    def angles(self, T: int):
        """t theta_c: [T, D]."""
        theta = self.rope_base ** (-torch.arange(self.head_dim) / self.head_dim)
        return torch.arange(T)[:, None] * theta


def polar(x, angles):
    """Complex numbers of length softplus(x) and with these angles, real parts before imaginary ones: [..., 2 D].

    x [..., T, D], angles [..., T, D]. The dot product of two such vectors is the real part of the complex product of
    one with the other's conjugate (equation 10).
    """
    length = F.softplus(x)
    return torch.cat([length * angles.cos(), length * angles.sin()], dim=-1).type_as(x)


def build(kind: str, config: ModelConfig, seed: int) -> GPT:
    """A model that knows positions in this way, from the same weights for each kind but for what the kind adds."""
    torch.manual_seed(seed)
    model = GPT(config)
    if kind != "RoPE":
        model.config.nope_every = 1  # no layer turns its queries and keys
    if kind == "learned":
        learn_positions(model)
    if kind == "sinusoidal":
        model.tok_emb = WithPositions(model.tok_emb, sinusoids(LONGER * config.block_size, config))
    if kind == "PoPE":
        for block in model.blocks:
            polar_attention = PolarAttention(config)
            polar_attention.load_state_dict(block.attn.state_dict(), strict=False)  # all but the phases
            block.attn = polar_attention
    return model


@torch.no_grad()
def by_position(model, data, T: int, rows: int = 8) -> list[float]:
    """The mean loss at each place [T] in all windows of `T` tokens of the text `data` [N], `rows` windows at a time."""
    x, y = (part.long() for part in windows(data, T))
    total = torch.zeros(T)
    for a, b in zip(x.split(rows), y.split(rows), strict=True):
        total += F.cross_entropy(model(a).transpose(1, 2), b, reduction="none").sum(0)
    return (total / len(x)).tolist()


def stretches(losses: list[float], T: int) -> dict[str, float]:
    """The mean loss on the first T positions, and on those up to twice, four and eight times as far."""
    found, begin = {}, 0
    for times in (1, 2, 4, 8):
        found[f"{times}x"] = mean(losses[begin:times * T])
        begin = times * T
    return found


def draw(curves: dict[str, list[float]], T: int) -> Figure:
    """Loss by position, averaged over stretches that grow with the distance, on a logarithmic axis."""
    fig = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = fig.subplots()
    for kind, losses in curves.items():
        edges = sorted({round(2 ** (i / 2)) for i in range(2 * int(math.log2(len(losses))) + 1)})
        means = [mean(losses[a - 1:b - 1]) for a, b in zip(edges, edges[1:], strict=False)]
        axes.plot(edges[:-1], means, label=kind)
    axes.axvline(T, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="position in the window (the line: the length trained on)",
             ylabel="validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return fig


def main(argv: list[str] | None = None) -> None:
    args = ablation.parser(__doc__).parse_args(argv)
    setup("cpu")
    scale, data, log = ablation.start(__file__, "positions", args)
    T = scale.block_size
    windows(data.val, LONGER * T)  # a text that is too short is refused now, not after the training

    def job(kind, seed):
        def run(tick):
            model = build(kind, ablation.shape(scale, len(data.tokenizer)), seed)
            found = ablation.fit_text(model, data, ablation.recipe(scale, seed), tick)
            if kind != "learned":  # which has no vectors for more
                model.config.block_size = LONGER * T
            return found | {"by position": by_position(model, data.val, model.config.block_size)}

        return run

    jobs = {(kind, seed): job(kind, seed) for kind in KINDS for seed in range(scale.seeds)}
    results = ablation.run_all(log, jobs, scale.steps, data, sources=["demos/path.py"])
    rows = ablation.compare(ablation.by_variant(results), "RoPE", "positions")
    curves = {kind: [mean(place) for place in zip(*found, strict=True)]
              for kind, found in ablation.by_variant(results, "by position").items()}
    for row in rows:
        if row["positions"] != "learned":
            row |= stretches(curves[row["positions"]], T)
    ablation.show(ablation.title(data, scale), rows)
    say(f"learned positions have no vector for position {T}, so they cannot read further")
    ablation.done(log, draw(curves, T), "positions", rows)


if __name__ == "__main__":
    run_program(main)
