"""Attention that keeps less, trained at equal budget: loss, bytes of cache and decode speed of each variant.

    uv run stages run 08 demos/variants.py
    uv run stages run 08 demos/variants.py --steps 1350 --batch-size 16 --seeds 1

All are trained with the default recipe of train.py on the same batches. A variant with fewer parameters in its
attention gets more units in its feed-forward, so that all have about the same number. Variants "at decode" are the
trained MHA models: only what they keep while they read the validation text is cut down. The columns:

- "cache, bytes": what a text of block_size positions keeps, divided by the positions, by formula; "counted": the same
  from the tensors that are there after such a text was read. A number has 4 bytes. Windows of block_size positions are
  read, so a window of a quarter of them keeps a quarter.
- "decode, tokens/s": of `--texts` texts side by side, each with a context of block_size. The variants take turns, a
  token each, and the median counts.

Heavy hitters are scored by decoding: the validation text goes in token by token, with an eviction after each.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress
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
from extras.attention_variants import (
    CrossLayerGPT,
    HeavyConfig,
    HeavyHitterGPT,
    SparseConfig,
    SparseGPT,
    cache_bytes,
    cache_for,
    kept_bytes,
)
from extras.mla import LatentConfig, LatentGPT
from model import GPT, ModelConfig
from sample import evaluation
from train import evaluate

EXTRAS = ["cache.py", "extras/attention_variants.py", "extras/mla.py"]


@dataclass
class Sizes:
    """How little the variants keep, and how speed is measured. Raises BadInput for a size that cannot be."""

    window: int = 32  # positions of a window, sinks included, of a block, or of the budget for heavy hitters
    sinks: int = 4  # first positions that stay beside the window
    recent: int = 16  # newest positions that heavy hitters leave in the budget
    stride: int = 16  # strided attention sees so many newest positions, and each so many-th one before
    d_latent: int = 48  # channels of the latent vector
    d_rope: int = 16  # channels of the key beside it
    texts: int = 32  # texts that are decoded side by side when speed is measured
    rounds: int = 50  # tokens of each that are timed

    def __post_init__(self):
        for name in ("texts", "rounds"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: it must be at least 1")
        if not 1 <= self.sinks < self.window:
            raise BadInput(f"--sinks {self.sinks}: it must be at least 1, and below the --window of {self.window}")


@dataclass
class Variant:
    """A way to attend."""

    make: Callable[[dict], GPT]  # the model, from the fields of a ModelConfig
    formula: str = "MHA"  # its name in `cache_bytes`
    weights: str | None = None  # the variant whose trained weights it takes; none: it is trained itself


def variants(scale: Scale, sizes: Sizes) -> dict[str, Variant]:
    """All that are compared, the first being what the others are compared with."""
    latent, absorbed = {"d_latent": sizes.d_latent, "d_rope": sizes.d_rope}, {"absorbed": True}
    window, sinks = {"window": sizes.window}, {"window": sizes.window - sizes.sinks, "n_sink": sizes.sinks}
    strided = {"pattern": "strided", "block": sizes.stride}
    heavy = {"budget": sizes.window, "recent": sizes.recent}

    def stage(**more):
        return lambda fields: GPT(ModelConfig(**fields | more))

    return {
        "MHA": Variant(stage()),
        "GQA": Variant(stage(n_kv_head=max(1, scale.n_head // 2))),
        "MQA": Variant(stage(n_kv_head=1)),
        "CLA": Variant(lambda fields: CrossLayerGPT(ModelConfig(**fields)), "CLA"),
        "MLA": Variant(lambda fields: LatentGPT(LatentConfig(**fields, **latent)), "MLA"),
        "MLA, absorbed": Variant(lambda fields: LatentGPT(LatentConfig(**fields, **latent | absorbed)), "MLA", "MLA"),
        "window": Variant(stage(**window)),
        "window + sinks": Variant(stage(**sinks)),
        "block-local": Variant(lambda fields: SparseGPT(SparseConfig(**fields, block=sizes.window))),
        "strided": Variant(lambda fields: SparseGPT(SparseConfig(**fields, **strided))),
        "window, at decode": Variant(stage(**window), weights="MHA"),
        "window + sinks, at decode": Variant(stage(**sinks), weights="MHA"),
        "H2O, at decode": Variant(lambda fields: HeavyHitterGPT(HeavyConfig(**fields, **heavy)), "H2O", "MHA"),
    }


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def build(variant: Variant, fields: dict, params: int, seed: int) -> GPT:
    """The variant's model, with as many units in its feed-forward as bring it nearest to `params` parameters."""
    torch.manual_seed(seed)
    model = variant.make(fields)
    config = model.config
    more = (params - count(model)) / (3 * config.n_embd * config.n_layer)  # a unit has 3 C parameters in each block
    n_hidden = config.n_hidden + 8 * round(more / 8)  # a multiple of 8 is quicker to multiply with
    return model if n_hidden == config.n_hidden else variant.make(fields | {"n_hidden": n_hidden})


@torch.no_grad()
def decoded_loss(model, data, rows: int = 256, tick=lambda: None) -> float:
    """The mean loss, in nats per token, on the windows of `data` [N], read token by token through the model's cache."""
    x, y = (part.long() for part in windows(data, model.config.block_size))
    total = 0.0
    with evaluation(model):
        for a, b in zip(x.split(rows), y.split(rows), strict=True):
            cache = cache_for(model, len(a))
            for t in range(a.shape[1]):
                total += F.cross_entropy(model(a[:, t:t + 1], cache)[:, -1], b[:, t], reduction="sum").item()
                tick()
    return total / y.numel()


def taken(taker: GPT, model: GPT, data: Dataset, tick=lambda: None) -> float:
    """The loss, in nats per character, of the weights of `model` in `taker`, on the whole validation text."""
    taker.load_state_dict(model.state_dict())
    if isinstance(taker, HeavyHitterGPT):  # a text that is read in one pass evicts nothing
        return data.nats_per_char(decoded_loss(taker, data.val, tick=tick))
    return data.nats_per_char(evaluate(taker, data.val))


@torch.no_grad()
def decode(models: dict[str, GPT], texts: int, rounds: int) -> dict[str, tuple[float, float]]:
    """What each model keeps of a text of block_size positions, in bytes, and how many tokens it then decodes a second.

    The models take turns, a token each, so that whatever else the machine does hits all of them. Weights do not matter.
    """
    caches = {name: cache_for(model, texts) for name, model in models.items()}
    T = next(iter(models.values())).config.block_size
    seconds, kept = {name: [] for name in models}, {}
    idx = torch.randint(next(iter(models.values())).config.vocab_size, (texts, T + rounds))
    with progress(T + rounds, "decoding") as bar:
        for t in range(T + rounds):
            for name, model in models.items():
                begin = time.perf_counter()
                model(idx[:, t:t + 1], caches[name])
                seconds[name].append(time.perf_counter() - begin)
                if t == T - 1:
                    kept[name] = kept_bytes(caches[name]) / texts
            bar.update(t + 1)
    return {name: (kept[name], texts / median(found[T:])) for name, found in seconds.items()}


def draw(rows: list[dict], losses: dict[str, list[float]]) -> Figure:
    """Loss against bytes: a dot for each variant, a line from its best seed to its worst, and its name."""
    fig = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = fig.subplots()
    least, most = min(map(min, losses.values())), max(map(max, losses.values()))
    gap, ends = (most - least) / 22 or 1.0, {}  # names that share a column keep this far apart
    for row in sorted(rows, key=lambda row: row["val loss"]):
        name, x, y = row["variant"], row["cache, bytes"], row["val loss"]
        color = "tab:orange" if "at decode" in name else "tab:blue"
        axes.plot([x, x], [min(losses[name]), max(losses[name])], color=color, linewidth=1)
        axes.plot([x], [y], "o", color=color, markersize=5)
        column = round(4 * math.log2(x))  # near ones share a column
        ends[column] = max(y, ends.get(column, -1e9) + gap)
        axes.annotate(name, (x, y), (1.06 * x, ends[column]), fontsize=8, va="center", color=color,
                      arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": color, "relpos": (0, 0.5)})
    axes.set(xlabel="bytes of cache for each token of the context",
             ylabel="validation loss, nats per character")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(right=2 * max(row["cache, bytes"] for row in rows))  # room for the names
    axes.grid(alpha=0.3)
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    options.add(parser, Sizes)
    args = parser.parse_args(argv)
    setup("cpu")
    scale, sizes, data = options.build(Scale, args), options.build(Sizes, args), load_data(args.corpus)
    args.corpus = data.name  # a default may find another text the next time
    log = RunLog(__file__, "variants", vars(args))
    T, found = scale.block_size, variants(scale, sizes)
    shape = {name: getattr(scale, name) for name in ("block_size", "n_embd", "n_head", "n_layer")}
    fields = {"vocab_size": len(data.tokenizer), "n_kv_head": scale.n_head} | shape
    # Sizes that cannot be and a text that is too short are refused now, not after the training.
    windows(data.val, T)
    next(batches(data.train, T, scale.batch_size, 0))
    params = count(GPT(ModelConfig(**fields)))
    models = {name: build(variant, fields, params, 0) for name, variant in found.items()}

    def job(name, seed):
        def run(tick):
            model = build(found[name], fields, params, seed)
            result = ablation.fit(model, data, scale, seed, tick)
            takers = {other: build(variant, fields, params, seed) for other, variant in found.items()
                      if variant.weights == name}
            again = partial(tick, scale.steps, result["losses"][-1])  # the bar is alive, though no step is made
            return result | {"takers": {other: taken(taker, model, data, again) for other, taker in takers.items()}}

        return run

    trained = [name for name, variant in found.items() if variant.weights is None]
    jobs = {(name, seed): job(name, seed) for seed in range(scale.seeds) for name in trained}
    results = ablation.run_all(log, jobs, scale.steps, data, EXTRAS)
    losses = {}
    for name, variant in found.items():
        own = [results[variant.weights or name, seed] for seed in range(scale.seeds)]
        losses[name] = [result["takers"].get(name, result["val loss"]) for result in own]
    speeds = decode(models, sizes.texts, sizes.rounds)
    rows = ablation.compare(losses, "MHA")
    for row in rows:
        name = row["variant"]
        kept, speed = speeds[name]
        formula = cache_bytes(found[name].formula, models[name].config)
        row |= {"params": count(models[name]), "cache, bytes": formula // T, "counted": round(kept / T),
                "decode, tokens/s": round(speed)}
    ablation.show(f"{data.name}: {scale.steps} steps, seeds: {scale.seeds}, losses in nats per character", rows)
    ablation.done(log, draw(rows, losses), "variants", rows)


if __name__ == "__main__":
    run_program(main)
