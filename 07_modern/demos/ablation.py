"""What the ablations share: small models trained on equal tokens, for several seeds, and runs that outlive a stop.

A variant is this stage's model with a part put in place of another, or its training with another recipe. With one seed
every variant sees the same batches in the same order, so variants are compared seed by seed: the differences spread
less than the losses do. The recipe stands here in full, so that a comparison stays what it is when the default recipe
of the stage is tuned.

Every run that is finished is kept in the demo's folder under out/. A demo that was stopped makes the missing ones only;
after a change of flags, text or code it makes all of them again.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from shared import options
from shared.atomic import write
from shared.console import progress, say, table
from shared.errors import BadInput
from shared.program import command
from shared.runlog import RunLog, dumps

import torch
from torch import nn

from data import Dataset, batches, load_data
from model import GPT, ModelConfig
from optim import Muon, Together
from train import TrainConfig, evaluate, gradient, train

STAGE = Path(__file__).parent.parent
SOURCES = ["model.py", "optim.py", "train.py", "data.py", "demos/ablation.py"]  # what every run depends on
FREE = ("seeds", "rates", "rounds")  # flags that ask for more runs or timings and change none that is there


@dataclass
class Scale:
    """How large each model and each run is. Raises BadInput for a size that cannot be."""

    steps: int = 300  # training steps of each model
    seeds: int = 3  # models of each kind; each seed has weights and batches of its own
    batch_size: int = 16  # windows in a batch
    block_size: int = 64  # positions in a window
    n_embd: int = 64  # channels
    n_head: int = 2  # heads
    n_layer: int = 4  # blocks

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise BadInput(f"--{name.replace('_', '-')} {value}: it must be at least 1")


def parser(description: str, **defaults) -> options.Parser:
    """A parser with the flags of `Scale`, of which `defaults` may change some, and --corpus."""
    made = options.Parser(description=description.split("\n\n")[0])
    made.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    options.add(made, Scale)
    made.set_defaults(**defaults)
    return made


def start(script: str, name: str, args) -> tuple[Scale, Dataset, RunLog]:
    """What a demo on text begins with: its sizes, its corpus and its record."""
    scale, data = options.build(Scale, args), load_data(args.corpus)
    args.corpus = data.name  # a default may find another text the next time
    return scale, data, RunLog(script, name, vars(args))


def shape(scale: Scale, vocab_size: int, **changes) -> ModelConfig:
    """The stage's model at this scale, with a key-value head for each head unless `changes` say otherwise."""
    sizes = {name: getattr(scale, name) for name in ("block_size", "n_embd", "n_head", "n_layer")}
    return ModelConfig(**{"vocab_size": vocab_size, **sizes, "n_kv_head": scale.n_head} | changes)


def recipe(scale: Scale, seed: int, **changes) -> TrainConfig:
    """How a model of this scale is trained, `changes` aside."""
    return TrainConfig(**{
        "steps": scale.steps, "batch_size": scale.batch_size, "micro_batch": scale.batch_size, "seed": seed,
        "lr": 5e-3, "muon_lr": 0.02, "momentum": 0.95, "warmup": max(1, scale.steps // 10), "decay": 0.8,
        "weight_decay": 0.1, "beta2": 0.99, "clip": 1.0, "precision": "bfloat16",
    } | changes)


def make_optimizer(model, config: TrainConfig, muon: bool = True):
    """The stage's optimiser, for models whose parts have been replaced; without `muon`, AdamW for all of it.

    The stage goes by names, and a part from elsewhere brings names of its own. So here Muon takes the weights of the
    linear layers inside the blocks. Other matrices (embeddings, positions, head) decay under AdamW; vectors do not.
    """
    linear = {id(layer.weight) for layer in model.blocks.modules() if isinstance(layer, nn.Linear)}
    inner, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        inside = name.startswith("blocks.")
        (inner if id(p) in linear else tables if p.ndim >= 2 and not inside else vectors).append(p)
    groups = [{"params": tables if muon else inner + tables, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
    if not muon:
        return adamw
    how = {"lr": config.muon_lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    return Together(muon=Muon(inner, **how), adamw=adamw)


def join(model: GPT, part: nn.Module) -> nn.Module:
    """A new branch of a block: its `proj` starts smaller, because the stream sums 2 n_layer of such outputs.

    The stage does this when it makes its own branches. Forgotten here, each replaced part would seem worse than it is.
    """
    part.proj.weight.data /= math.sqrt(2 * model.config.n_layer)
    return part


def fit(model, stream, config: TrainConfig, optimizer, tick: Callable) -> list[float]:
    """Train `model` on the batches of `stream`; `tick(step, loss)` after each step -> the loss of each step."""
    losses = []
    for step, loss in train(model, stream, config, optimizer):
        losses.append(round(loss, 5))
        tick(step, loss)
    return losses


def fit_text(model, data: Dataset, config: TrainConfig, tick: Callable, muon: bool = True) -> dict:
    """Train `model` on the training text, score it on the whole validation text, in nats per character."""
    stream = batches(data.train, model.config.block_size, config.batch_size, config.seed)
    losses = fit(model, stream, config, make_optimizer(model, config, muon), tick)
    val_loss = data.nats_per_char(evaluate(model, data.val, precision=config.precision))
    return {"val loss": val_loss, "losses": losses, "params": sum(p.numel() for p in model.parameters())}


def step_times(models: dict[str, GPT], scale: Scale, rounds: int) -> dict[str, float]:
    """Median milliseconds of a training step of each model.

    They take turns, a step each, so that whatever else the machine does hits all of them. The first round, which warms
    up, does not count.
    """
    config, times = recipe(scale, 0), {name: [] for name in models}
    optimizers = {name: make_optimizer(model, config) for name, model in models.items()}
    vocab_size = next(iter(models.values())).config.vocab_size
    x = torch.randint(vocab_size, (scale.batch_size, scale.block_size + 1))
    with progress(rounds + 1, "timing") as bar:
        for i in range(rounds + 1):
            for name, model in models.items():
                begin = time.perf_counter()
                gradient(model, x[:, :-1], x[:, 1:], config)
                optimizers[name].step()
                optimizers[name].zero_grad()
                times[name].append(1000 * (time.perf_counter() - begin))
            bar.update(i + 1)
    return {name: median(found[1:]) for name, found in times.items()}


def digest(log: RunLog, data: Dataset | None, sources: list[str]) -> str:
    """A short name for all that a run depends on beside its variant, rate and seed: flags, text and code."""
    settings = {name: value for name, value in log.config.items() if name not in FREE}
    found = hashlib.sha256(dumps(settings).encode("utf-8"))
    if data:
        found.update(data.train.numpy().tobytes() + data.val.numpy().tobytes())
    for source in dict.fromkeys([*SOURCES, log.script, *sources]):
        found.update((STAGE / source).read_bytes())
    return found.hexdigest()[:12]


def run_all(
    log: RunLog, jobs: dict[tuple, Callable], steps: int, data: Dataset | None = None, sources: list[str] = (),
) -> dict[tuple, dict]:
    """The result of each job {(variant, ..., seed): job}, from the folder or by calling `job(tick)`.

    A result is what JSON can hold. `sources` are files of the stage that these runs depend on beside the usual ones.
    Raises BadInput when the file of kept runs cannot be read; Ctrl-C loses the run under way and no other.
    """
    file = log.folder / f"runs-{digest(log, data, sources)}.json"
    try:
        kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError:
        raise BadInput(f"{file} is damaged: delete it, and its runs are made again") from None
    results = {}
    with progress(len(jobs) * steps, "training") as bar:
        for i, (name, job) in enumerate(jobs.items()):
            key = ", ".join(map(str, name))
            if key not in kept:
                try:
                    kept[key] = job(lambda step, loss, i=i, key=key: bar.update(i * steps + step, loss=loss, text=key))
                except KeyboardInterrupt:
                    again = f"go on with the same flags: {command(log.stage, log.script)}"
                    raise KeyboardInterrupt(f"stopped: {len(kept)} runs are kept in {file}, {again}") from None
                write(file, dumps(kept))
            results[name] = json.loads(dumps(kept[key]))
            bar.update((i + 1) * steps)
    return results


def by_variant(results: dict[tuple, dict], key: str = "val loss") -> dict[str, list[float]]:
    """{(variant, seed): result} -> {variant: [result[key] of each seed]}, in order of first appearance."""
    found = {}
    for (variant, _), result in results.items():
        found.setdefault(variant, []).append(result[key])
    return found


def spread(values: list[float]) -> float | None:
    """The standard deviation over seeds; none for a single seed."""
    return stdev(values) if len(values) > 1 else None


def compare(values: dict[str, list[float]], base: str, what: str = "variant") -> list[dict]:
    """A table row for each variant: its mean over seeds, and the mean of its differences from `base`, seed by seed.

    "spread" is the standard deviation over seeds of the column before it.
    """
    rows = []
    for variant, found in values.items():
        gaps = [mine - other for mine, other in zip(found, values[base], strict=True)]
        same = variant == base
        rows.append({
            what: variant, "val loss": mean(found), "spread": spread(found),
            "difference": None if same else mean(gaps), "its spread": None if same else spread(gaps),
        })
    return rows


def title(data: Dataset, scale: Scale) -> str:
    """What a table of losses on text says above its columns."""
    return f"{data.name}: {scale.steps} steps, seeds: {scale.seeds}, losses in nats per character"


def show(title: str, rows: list[dict]) -> None:
    """Print the rows with differences signed and spreads plain, all to three places."""
    forms = {"difference": "+.3f", "its spread": ".3f", "spread": ".3f"}
    table(title, [
        {key: format(value, forms[key]) if key in forms and value is not None else value for key, value in row.items()}
        for row in rows
    ])


def dots(axes, values: dict[str, list[float]], label: str, title: str = "") -> None:
    """Draw a line for each variant, the first at the top: a dot for each seed and a bar at their mean."""
    for place, found in enumerate(values.values()):
        axes.plot(found, [place] * len(found), "o", color="tab:blue", markersize=4, alpha=0.6)
        axes.plot([mean(found)], [place], "|", color="black", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set(xlabel=label, title=title)


def done(log: RunLog, fig, name: str, rows: list[dict], **headline) -> None:
    """Draw the figure, write the summary, say where the figure is."""
    file = log.figure(fig, name)
    log.finish(rows=rows, **headline)
    say(f"figure: {file}")
