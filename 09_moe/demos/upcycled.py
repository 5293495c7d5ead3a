"""Upcycled or from scratch: a mixture that begins as copies of a dense model, one that begins with random weights.

    uv run stages run 09 demos/upcycled.py
    uv run stages run 09 demos/upcycled.py --steps 600 --n-expert 4

Each model makes `--steps` steps in all, on the same batches in the same order:

- "dense": a dense model; after `--dense-steps` steps it is trained on with new optimisers.
- "upcycled": the same dense model after `--dense-steps` steps. Then each feed-forward becomes a mixture whose experts
  are copies of it, with a random router. Weights of the chosen that sum to 1 give exactly the dense model's scores, so
  nothing is lost. The copies become different because each learns from other positions.
- "from scratch": a mixture of the same shape from random weights, with one schedule for all steps.

A mixture of whole copies does more work for a token than the dense model: `--n-active` feed-forwards. `work` sums the
parameters that a token uses over all steps, as a multiple of the dense model's sum. `after the dense steps` is the
validation loss when the second part begins. `cosine` says how alike the experts are at the end: the mean over pairs of
experts of a layer, each expert's weights as one vector; 1 for copies. In all three the rates fall over the last steps,
as many as make up four fifths of the second part, so that all end alike.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (2022).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import Dataset, batches, load_data, windows
from demos import ablation
from demos.ablation import Scale
from extras.upcycle import upcycle
from model import GPT, ModelConfig
from moe import count
from train import mixtures

KINDS = ("dense", "upcycled", "from scratch")
FALL = 0.8  # share of the second part over which the rates fall


@dataclass
class Sizes:
    """The mixture and the two parts. Raises BadInput for a size that cannot be."""

    n_expert: int = 8  # experts, each as large as the dense feed-forward
    n_active: int = 2  # of which a position uses so many
    dense_steps: int = 200  # steps of the first part; the second has the rest of --steps

    def __post_init__(self):
        if self.n_expert < 1 or self.dense_steps < 1:
            raise BadInput(f"--n-expert {self.n_expert} --dense-steps {self.dense_steps}: both must be at least 1")


def build(kind: str, fields: dict, sizes: Sizes, seed: int) -> GPT:
    """The model that the first step begins with."""
    torch.manual_seed(seed)
    config = ModelConfig(**fields)
    if kind == "from scratch":
        more = {"n_expert": sizes.n_expert, "n_active": sizes.n_active, "expert_hidden": config.n_hidden}
        config = ModelConfig(**fields | more)
    return GPT(config)


@torch.no_grad()
def cosine(model) -> float | None:
    """The mean cosine of two experts of a layer, each taken as one vector of all its weights; none without experts."""
    found = []
    for layer in mixtures(model):
        E = layer.config.n_expert
        experts = torch.cat([matrices.flatten(1) for matrices in (layer.gate, layer.fc, layer.proj)], dim=1)
        cosines = F.cosine_similarity(experts[:, None], experts[None], dim=-1)  # [E, E]
        found.append((cosines.sum().item() - E) / max(1, E * (E - 1)))
    return mean(found) if found else None


def run(kind: str, fields: dict, sizes: Sizes, data: Dataset, scale: Scale, seed: int, tick) -> dict:
    """Train one model in one part or two -> what `ablation.fit` gives for the last part, with the losses of all steps.

    "before" is the validation loss at the end of the first part, where there are two. "work" is the sum over steps of
    the parameters that a token uses. "cosine" is that of the experts at the end.
    """
    model, first, second = build(kind, fields, sizes, seed), sizes.dense_steps, scale.steps - sizes.dense_steps
    if kind == "from scratch":
        found = ablation.fit(model, data, scale, seed, tick, decay=FALL * second / scale.steps)
        return found | {"work": scale.steps * count(model, active=True), "cosine": cosine(model)}
    early = ablation.fit(model, data, scale, seed, tick, steps=first, decay=0.0)
    work = first * count(model)
    if kind == "upcycled":
        model = upcycle(model, sizes.n_expert, sizes.n_active)

    def later(step, loss):
        tick(first + step, loss)

    found = ablation.fit(model, data, scale, seed, later, start=first, steps=second, decay=FALL)
    return found | {"losses": early["losses"] + found["losses"], "before": early["val loss"],
                    "work": work + second * count(model, active=True), "cosine": cosine(model)}


def draw(curves: dict[str, list[float]], dense_steps: int) -> Figure:
    """Training loss, smoothed, by step."""
    fig = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = fig.subplots()
    for kind, losses in curves.items():
        width = max(1, len(losses) // 40)
        ends = range(width, len(losses) + 1, width)
        axes.plot(ends, [mean(losses[end - width:end]) for end in ends], label=kind)
    axes.axvline(dense_steps, color="gray", lw=0.8, ls=":")
    axes.set(xlabel="step (dotted: where the second part begins)", ylabel="training loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    options.add(parser, Sizes)
    args = parser.parse_args(argv)
    setup("cpu")
    scale, sizes, data = options.build(Scale, args), options.build(Sizes, args), load_data(args.corpus)
    args.corpus = data.name  # a default may find another text the next time
    if sizes.dense_steps >= scale.steps:
        raise BadInput(f"--dense-steps {sizes.dense_steps} of --steps {scale.steps}: leave some for the second part")
    # Sizes that cannot be and a text that is too short are refused now, not after the training.
    fields = {name: getattr(scale, name) for name in ("block_size", "n_embd", "n_head", "n_layer")}
    fields |= {"vocab_size": len(data.tokenizer), "n_kv_head": 1}
    build("from scratch", fields, sizes, 0)
    windows(data.val, scale.block_size)
    next(batches(data.train, scale.block_size, scale.batch_size, 0))
    log = RunLog(__file__, "upcycled", vars(args))

    def job(kind, seed):
        return lambda tick: run(kind, fields, sizes, data, scale, seed, tick)

    jobs = {(kind, seed): job(kind, seed) for seed in range(scale.seeds) for kind in KINDS}
    results = ablation.run_all(log, jobs, scale.steps, data, ["extras/upcycle.py"])
    runs = {kind: [results[kind, seed] for seed in range(scale.seeds)] for kind in KINDS}
    rows = ablation.compare({kind: [one["val loss"] for one in mine] for kind, mine in runs.items()}, "dense")
    for row in rows:
        mine = runs[row["variant"]]
        row |= {"after the dense steps": mean(one["before"] for one in mine) if "before" in mine[0] else None,
                "cosine": None if row["variant"] == "dense" else mean(one["cosine"] for one in mine),
                "params": mine[0]["params"], "work, times dense": mine[0]["work"] / runs["dense"][0]["work"]}
    ablation.show(f"{data.name}: {scale.steps} steps, seeds: {scale.seeds}, losses in nats per character", rows)
    curves = {kind: [mean(at) for at in zip(*(one["losses"] for one in mine), strict=True)]
              for kind, mine in runs.items()}
    ablation.done(log, draw(curves, sizes.dense_steps), "upcycled", rows)


if __name__ == "__main__":
    run_program(main)
