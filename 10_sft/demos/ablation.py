"""What the demos of this stage share: a base, copies of it that are tuned for several seeds, and their scores.

With one seed, all variants begin with the same weights and see the same conversations in the same order, unless that is
what a variant changes. So variants are compared seed by seed: the differences spread less than the scores do. Another
seed means other words for training and test, other vectors for the new tokens and another order.

Every run that is finished is kept in the demo's folder under out/. A demo that was stopped makes the missing ones only;
after a change of flags, base, text or code it makes all of them again.
"""

import copy
import hashlib
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from shared import corpus, options
from shared.atomic import write
from shared.console import progress, say
from shared.device import setup
from shared.errors import BadInput
from shared.program import command
from shared.runlog import RunLog, dumps

import torch

import sft
import tasks
from chat import ours, with_tags
from data import Example
from evaluate import score
from hf import Opened
from sft import SFTConfig, fitting, open_base, passes
from train import make_optimizer

STAGE = Path(__file__).parent.parent
LENGTH = 24  # most tokens of an answer: the longest right one, a word of 8 letters with dashes, has 16 with its end
# Sorting and sums take more steps than a demo with many runs has, and would hide what it compares.
FAMILIES = ("repeat", "reverse", "upper", "first", "last", "spell")
CHARACTERS = string.ascii_letters + string.digits + " ',-.:!?"  # all that instructions and answers are written in
FREE = ("seeds", "rounds")  # flags that ask for more runs or timings and change none that is there


@dataclass
class Scale:
    """How large each run is. Raises BadInput for a size that cannot be."""

    steps: int = 300  # steps of tuning
    seeds: int = 3  # runs of each kind
    batch_size: int = 32  # conversations per step
    records: int = 6000  # tasks to train on
    test: int = 180  # tasks of each test set, of all families in turn

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise BadInput(f"--{name.replace('_', '-')} {value}: it must be at least 1")


@dataclass
class World:
    """What the runs of one seed have in common."""

    opened: Opened  # the base, with tags and the characters of the tasks: begin with a copy of it
    records: list[dict]  # to train on
    examples: list[Example]  # the same as tokens
    tests: dict[str, list[dict]]  # records that are held out, by the name of their set


def parser(description: str) -> options.Parser:
    """A parser with the flags of `Scale`, --base, --corpus and --device."""
    made = options.Parser(description=description.split("\n\n")[0])
    made.add_argument("--base", default="base", help="a run of train.py (default: base, which is trained)")
    made.add_argument("--corpus", help="the text of the base, where the tasks' words are from (default: shakespeare)")
    made.add_argument("--families", nargs="+", default=list(FAMILIES), help=f"of tasks (default: {' '.join(FAMILIES)})")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    options.add(made, Scale)
    return made


def base(args) -> Opened:
    """The base that --base names, on --device, trained where there is none.

    Raises BadInput for a model that is tuned already.
    """
    opened = open_base(args, setup(args.device))
    if opened.template is not None:
        raise BadInput(f"{args.base} answers already: the demos begin with a base, which train.py makes")
    return opened


def records(args, scale: Scale, seed: int, families=None) -> dict[str, list[dict]]:
    """The tasks of one seed, by the name of their set, by default of --families.

    Words of a test set are new to all families. Raises BadInput for an unknown family.
    """
    known, families = tasks.words(corpus.load(args.corpus).text), tuple(families or args.families)
    return {name: tasks.make(known, name, scale.records if name == "train" else scale.test, families, seed)
            for name in tasks.SETS}


def world(opened: Opened, args, scale: Scale, seed: int) -> World:
    """The tasks of one seed, and a copy of the base made ready for them; the seed draws the new tokens' vectors."""
    made = records(args, scale, seed)
    torch.manual_seed(seed)
    ready = ours(*with_tags(copy.deepcopy(opened.model), opened.tokenizer, CHARACTERS))
    train = made.pop("train")
    return World(ready, train, fitting(ready, train, "training"), made)


def worlds(opened: Opened, args, scale: Scale) -> list[World]:
    """A world for each seed. Raises BadInput for fewer records than a batch, before anything is trained on them."""
    made = [world(opened, args, scale, seed) for seed in range(scale.seeds)]
    next(passes(made[0].examples, recipe(scale, 0)))
    return made


def part(world: World, args, scale: Scale, seed: int, families: list[str]) -> World:
    """The same world with tasks of these families alone."""
    made = records(args, scale, seed, families)
    train = made.pop("train")
    return replace(world, records=train, examples=fitting(world.opened, train, "training"), tests=made)


def one_apart(args, new: str) -> list[str]:
    """The families without the new one, which is taught later. Raises BadInput where it is none of them, or alone."""
    old = [family for family in args.families if family != new]
    if new not in args.families or not old:
        raise BadInput(f"--new {new} must be one of --families, {' '.join(args.families)}, and not the only one")
    return old


def copied(opened: Opened) -> Opened:
    """The same with a copy of the model."""
    return replace(opened, model=copy.deepcopy(opened.model))


def recipe(scale: Scale, seed: int, **more) -> SFTConfig:
    """The default recipe of sft.py at this scale; `more` are fields that differ."""
    return SFTConfig(**{"steps": scale.steps, "batch_size": scale.batch_size, "seed": seed} | more)


def adamw(model, lr: float):
    """AdamW for whatever is not frozen, without decay: what LoRA is tuned with."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def tune(model, examples: list[Example], config: SFTConfig, tick: Callable, optimizer=None, stream=None) -> list[float]:
    """Tune `model` in place, by default as sft.py does; `tick(step, loss)` after each step -> the losses."""
    losses = []
    stream = passes(examples, config) if stream is None else stream
    optimizer = make_optimizer(model, config) if optimizer is None else optimizer
    for step, loss in sft.tune(model, stream, config, optimizer):
        losses.append(round(loss, 5))
        tick(step, loss)
    return losses


def exact(opened: Opened, tests: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Exact match on each test set, by family: {"words": {"repeat": 0.9, ..., "mean": 0.8}, ...}."""
    return {name: {row["family"]: row["exact"] for row in score(opened, part, LENGTH)} for name, part in tests.items()}


def digest(log: RunLog, opened: Opened) -> str:
    """A short name for all that a run depends on beside its variant and seed: flags, base, text and code."""
    settings = {name: value for name, value in log.config.items() if name not in FREE}
    found = hashlib.sha256(dumps([settings, opened.tokenizer.state()]).encode("utf-8"))
    found.update(corpus.load(log.config["corpus"]).text.encode("utf-8"))
    for tensor in opened.model.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    for source in sorted([*STAGE.glob("*.py"), *STAGE.glob("extras/*.py"), Path(__file__), STAGE / log.script]):
        found.update(source.read_bytes())
    return found.hexdigest()[:12]


def run_all(log: RunLog, jobs: dict[tuple, Callable], steps: int, opened: Opened) -> dict[tuple, dict]:
    """The result of each job {(variant, seed): job}, from the folder or by calling `job(tick)`.

    A result is what JSON can hold; `steps` are those of a job. Raises BadInput when the file of kept runs cannot be
    read; Ctrl-C loses the run under way and no other.
    """
    file = log.folder / f"runs-{digest(log, opened)}.json"
    try:
        kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError:
        raise BadInput(f"{file} is damaged: delete it, and its runs are made again") from None
    with progress(len(jobs) * steps, "tuning") as bar:
        for i, (name, job) in enumerate(jobs.items()):
            key = ", ".join(map(str, name))
            if key not in kept:
                try:
                    kept[key] = job(lambda step, loss, i=i, key=key: bar.update(i * steps + step, loss=loss, text=key))
                except KeyboardInterrupt:
                    again = f"go on with the same flags: {command(log.stage, log.script)}"
                    raise KeyboardInterrupt(f"stopped: {len(kept)} runs are kept in {file}, {again}") from None
                write(file, dumps(kept))
            bar.update((i + 1) * steps)
    return {name: json.loads(dumps(kept[", ".join(map(str, name))])) for name in jobs}


def spread(values: list[float]) -> float | None:
    """The standard deviation over seeds; none for a single seed."""
    return stdev(values) if len(values) > 1 else None


def compare(values: dict[str, list[float]], first: str, what: str = "exact") -> list[dict]:
    """A table row for each variant: the mean of `what` over seeds, and its mean difference from the variant `first`.

    The difference is worked out seed by seed. "spread" is the standard deviation over seeds of the column before it.
    """
    rows = []
    for variant, found in values.items():
        gaps = [mine - other for mine, other in zip(found, values[first], strict=True)]
        same = variant == first
        rows.append({
            "variant": variant, what: mean(found), "spread": spread(found),
            "difference": None if same else mean(gaps), "its spread": None if same else spread(gaps),
        })
    return rows


def shown(rows: list[dict]) -> list[dict]:
    """Rows for `table`: differences and taxes with their sign, all to three places."""
    signed = ("difference", "tax")
    return [{key: format(value, "+.3f") if key in signed and value is not None else value
             for key, value in row.items()} for row in rows]


def done(log: RunLog, fig, name: str, rows: list[dict], **headline) -> None:
    """Draw the figure, write the summary, say where the figure is."""
    file = log.figure(fig, name)
    log.finish(rows=rows, **headline)
    say(f"figure: {file}")
