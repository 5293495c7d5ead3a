"""What an ablation needs: small models trained on equal tokens, for several seeds, and runs that outlive a stop.

With one seed every variant sees the same batches in the same order, so variants are compared seed by seed: the
differences spread less than the losses do. The recipe is the default of train.py.

Every run that is finished is kept in the demo's folder under out/. A demo that was stopped makes the missing ones only;
after a change of flags, text or code it makes all of them again.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from shared import options
from shared.atomic import write
from shared.console import progress, say, table
from shared.errors import BadInput
from shared.program import command
from shared.runlog import RunLog, dumps

from data import Dataset, batches
from train import TrainConfig, evaluate, make_optimizer, train

STAGE = Path(__file__).parent.parent
SOURCES = ["model.py", "moe.py", "optim.py", "train.py", "data.py", "demos/ablation.py"]  # what every run depends on
FREE = ("seeds", "rounds")  # flags that ask for more runs or timings and change none that is there


@dataclass
class Scale:
    """How large each model and each run is. Raises BadInput for a size that cannot be."""

    steps: int = 400  # training steps of each model
    seeds: int = 3  # models of each kind; each seed has weights and batches of its own
    batch_size: int = 12  # windows in a batch
    block_size: int = 128  # positions in a window
    n_embd: int = 128  # channels
    n_head: int = 4  # heads of queries
    n_layer: int = 4  # blocks

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise BadInput(f"--{name.replace('_', '-')} {value}: it must be at least 1")


def parser(description: str) -> options.Parser:
    """A parser with the flags of `Scale`, and --corpus."""
    made = options.Parser(description=description.split("\n\n")[0])
    made.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    options.add(made, Scale)
    return made


def fit(model, data: Dataset, scale: Scale, seed: int, tick: Callable, start: int = 0, **recipe) -> dict:
    """Train `model` on the training text, score it on the whole validation text; `tick(step, loss)` after each step.

    `recipe` are fields of TrainConfig other than the default's. A run that goes on from another one begins to read at
    batch `start`. -> "val loss" in nats per character, "losses" of the steps in nats per token, "params".
    """
    config = TrainConfig(**{"steps": scale.steps, "batch_size": scale.batch_size, "seed": seed} | recipe)
    stream = batches(data.train, model.config.block_size, config.batch_size, seed, start)
    losses = []
    for step, loss in train(model, stream, config, make_optimizer(model, config)):
        losses.append(round(loss, 5))
        tick(step, loss)
    return {"val loss": data.nats_per_char(evaluate(model, data.val)), "losses": losses,
            "params": sum(p.numel() for p in model.parameters())}


def digest(log: RunLog, data: Dataset, sources: list[str]) -> str:
    """A short name for all that a run depends on beside its variant and seed: flags, text and code."""
    settings = {name: value for name, value in log.config.items() if name not in FREE}
    found = hashlib.sha256(dumps(settings).encode("utf-8"))
    found.update(data.train.numpy().tobytes() + data.val.numpy().tobytes())
    for source in dict.fromkeys([*SOURCES, log.script, *sources]):
        found.update((STAGE / source).read_bytes())
    return found.hexdigest()[:12]


def run_all(
    log: RunLog, jobs: dict[tuple, Callable], steps: int, data: Dataset, sources: list[str] = (),
) -> dict[tuple, dict]:
    """The result of each job {(variant, seed): job}, from the folder or by calling `job(tick)`.

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


def spread(values: list[float]) -> float | None:
    """The standard deviation over seeds; none for a single seed."""
    return stdev(values) if len(values) > 1 else None


def compare(values: dict[str, list[float]], base: str) -> list[dict]:
    """A table row for each variant: its mean over seeds, and the mean of its differences from `base`, seed by seed.

    "spread" is the standard deviation over seeds of the column before it.
    """
    rows = []
    for variant, found in values.items():
        gaps = [mine - other for mine, other in zip(found, values[base], strict=True)]
        same = variant == base
        rows.append({
            "variant": variant, "val loss": mean(found), "spread": spread(found),
            "difference": None if same else mean(gaps), "its spread": None if same else spread(gaps),
        })
    return rows


def show(title: str, rows: list[dict]) -> None:
    """Print the rows with differences signed and spreads plain, all to three places."""
    forms = {"difference": "+.3f", "its spread": ".3f", "spread": ".3f"}
    table(title, [
        {key: format(value, forms[key]) if key in forms and value is not None else value for key, value in row.items()}
        for row in rows
    ])


def done(log: RunLog, fig, name: str, rows: list[dict], **headline) -> None:
    """Draw the figure, write the summary, say where the figure is."""
    file = log.figure(fig, name)
    log.finish(rows=rows, **headline)
    say(f"figure: {file}")
