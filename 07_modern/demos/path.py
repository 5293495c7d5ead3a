"""From GPT-2 to this stage's model, one change at a time, and back again.

    uv run stages run 07 demos/path.py
    uv run stages run 07 demos/path.py --steps 1500 --n-embd 128 --block-size 128

Forwards: the first row is GPT-2, each row after it adds one change and keeps those above; "difference" is from the row
above. Backwards: the first row is this stage's model with its training, each row after it takes one change back and
leaves the others; "difference" is from the first row. The two need not agree. What a change is worth depends on what is
there already: a norm on queries and keys is worth more where an optimiser takes large steps.

Every model has the same channels, heads and blocks and reads the same tokens. The numbers of parameters differ a
little: biases go, heads share keys and values, and the three matrices of SwiGLU together are as large as GPT-2's two
but for rounding. Each recipe is a whole: GPT-2's rate is the one that was good for GPT-2 with AdamW, and Muon brings
its own. Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019); Yang et al., "Qwen3
Technical Report" (2025).
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

from demos import ablation
from demos.ablation import Scale, join
from model import GPT, ModelConfig, RMSNorm, variance_scaling_
from train import TrainConfig

CHANGES = ("RMSNorm", "no biases", "RoPE", "SwiGLU", "shared keys", "QK-norm", "Muon", "schedule")
ADAMW = {"lr": 8e-3}  # GPT-2's recipe at this size: one rate for all weights
LONG_WARMUP = 0.25  # GPT-2's schedule here: the rate rises over this share of the steps and falls over all of the rest


class GeluFeedForward(nn.Module):
    """GPT-2's: two layers with a GELU between them, [..., C] -> [..., 4C] -> [..., C]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        variance_scaling_(self.fc)
        variance_scaling_(self.proj, gain=2**0.5)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class WithPositions(nn.Module):
    """Tokens [B, T] -> their vectors, to each of which its position's vector is added: [B, T, C]."""

    def __init__(self, tokens: nn.Embedding, positions: torch.Tensor):
        super().__init__()
        self.tokens = tokens
        self.positions = positions  # [T, C]: a parameter, or a fixed table

    def forward(self, idx):
        return self.tokens(idx) + self.positions[:idx.shape[1]]


def learn_positions(model: GPT):
    """GPT-2's positions: a learned vector for each, added once to the token's, and none in the blocks."""
    vectors = torch.randn(model.config.block_size, model.config.n_embd) * model.config.n_embd**-0.5
    model.tok_emb = WithPositions(model.tok_emb, nn.Parameter(vectors))
    model.config.nope_every = 1  # no layer turns its queries and keys


def layer_norm(norm: RMSNorm) -> nn.LayerNorm:
    """GPT-2's norm in the place of an RMSNorm: it also takes the mean away and adds a shift; the scale is kept."""
    made = nn.LayerNorm(norm.weight.shape[0], eps=1e-5)
    made.weight.data.copy_(norm.weight.data)
    return made


def build(modern: frozenset[str], scale: Scale, vocab_size: int, seed: int) -> GPT:
    """The model with the changes in `modern` and with GPT-2's part in the place of every other."""
    torch.manual_seed(seed)
    config = ablation.shape(scale, vocab_size, n_kv_head=1 if "shared keys" in modern else scale.n_head,
                   qk_norm="QK-norm" in modern)
    model = GPT(config)
    for block in model.blocks:
        if "SwiGLU" not in modern:
            block.ffn = join(model, GeluFeedForward(config))
        if "RMSNorm" not in modern:
            block.norm1, block.norm2 = layer_norm(block.norm1), layer_norm(block.norm2)
    if "RMSNorm" not in modern:
        model.norm = layer_norm(model.norm)
    if "RoPE" not in modern:
        learn_positions(model)
    if "no biases" not in modern:
        for layer in model.blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    return model


def training(modern: frozenset[str], scale: Scale, seed: int) -> TrainConfig:
    """The recipe with the changes in `modern`, which are of the optimiser and of the schedule."""
    warmup = max(1, round(LONG_WARMUP * scale.steps))
    changes = {} if "Muon" in modern else dict(ADAMW)
    if "schedule" not in modern:
        changes |= {"warmup": warmup, "decay": max(0.01, 1 - warmup / scale.steps)}  # the fall begins as the rise ends
    return ablation.recipe(scale, seed, **changes)


def plan() -> dict[str, dict[str, frozenset[str]]]:
    """The changes that each row of the two tables has: {"forwards": {row: changes}, "backwards": {row: changes}}."""
    every = frozenset(CHANGES)
    forwards = {"GPT-2": frozenset()} | {f"+ {name}": frozenset(CHANGES[:i + 1]) for i, name in enumerate(CHANGES)}
    backwards = {"all": every} | {f"- {name}": every - {name} for name in CHANGES}
    return {"forwards": forwards, "backwards": backwards}


def steps_of(values: dict[str, list[float]]) -> list[dict]:
    """The rows of the way forwards: the differences are from the row above, seed by seed."""
    rows, above = [], None
    for name, found in values.items():
        gaps = [mine - other for mine, other in zip(found, above or found, strict=True)]
        rows.append({
            "change": name, "val loss": mean(found), "spread": ablation.spread(found),
            "difference": mean(gaps) if above else None, "its spread": ablation.spread(gaps) if above else None,
        })
        above = found
    return rows


def draw(ways: dict[str, dict[str, list[float]]]) -> Figure:
    """The two ways side by side."""
    fig = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (way, values) in zip(fig.subplots(1, 2, sharex=True), ways.items(), strict=True):
        ablation.dots(axes, values, "validation loss, nats per character", way)
    return fig


def main(argv: list[str] | None = None) -> None:
    args = ablation.parser(__doc__).parse_args(argv)
    setup("cpu")
    scale, data, log = ablation.start(__file__, "path", args)
    ways = plan()
    names = {}  # a row's name for each set of changes; two of them stand in both tables, and are trained once
    for rows in ways.values():
        for row, modern in rows.items():
            names.setdefault(modern, row)

    def job(modern, seed):
        return lambda tick: ablation.fit_text(
            build(modern, scale, len(data.tokenizer), seed), data, training(modern, scale, seed), tick,
            muon="Muon" in modern,
        )

    jobs = {(row, seed): job(modern, seed) for modern, row in names.items() for seed in range(scale.seeds)}
    results = ablation.run_all(log, jobs, scale.steps, data)
    losses, params = ablation.by_variant(results), ablation.by_variant(results, "params")
    found = {way: {row: losses[names[modern]] for row, modern in rows.items()} for way, rows in ways.items()}
    backwards = ablation.compare(found["backwards"], "all", "change")
    lines = {"forwards": steps_of(found["forwards"]), "backwards": backwards}
    for way, rows in lines.items():
        for row in rows:
            row["parameters"] = params[names[ways[way][row["change"]]]][0]
        ablation.show(f"{way}: {ablation.title(data, scale)}", rows)
    ablation.done(log, draw(found), "path", lines["forwards"], backwards=backwards)


if __name__ == "__main__":
    run_program(main)
