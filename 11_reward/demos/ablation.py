"""What the demos of this stage share: tasks and pairs for several seeds, models that learn from them, and their scores.

All models begin with the weights of one policy. Another seed means other tasks, other mistakes in them and another
order of the pairs. Words that are held out are held out in every seed, and the policy has not seen them either.
With one seed, all variants have the same tasks, unless tasks are what a variant changes. So variants are compared seed
by seed: the differences spread less than the shares do.

Every run that is finished is kept in the demo's folder under out/. A demo that was stopped makes the missing ones only;
after a change of flags, policy, text or code it makes all of them again.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev

from shared import corpus, options
from shared.atomic import write
from shared.console import progress, say
from shared.device import setup
from shared.errors import BadInput
from shared.program import command
from shared.runlog import RunLog, dumps

import reward
import tasks
from hf import Opened
from preferences import KINDS, against_gold, both, corrupted, draw_answers, open_policy
from reward import RewardConfig

STAGE = Path(__file__).parent.parent
LENGTH = 24  # most tokens of a drawn answer: the longest right one, 8 letters with dashes, has 16 with its end
FREE = ("seeds",)  # flags that ask for more runs and change none that is there


@dataclass
class Scale:
    """How large each run is. Raises BadInput for a size that cannot be."""

    steps: int = 250  # steps of training a reward model
    seeds: int = 3  # runs of each kind
    batch_size: int = 32  # pairs per step
    pairs: int = 8000  # pairs to train on
    test: int = 300  # held-out tasks, of all families in turn; each gives a pair of each kind

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise BadInput(f"--{name.replace('_', '-')} {value}: it must be at least 1")
        if self.pairs < self.batch_size:
            raise BadInput(f"--pairs {self.pairs}: a step takes {self.batch_size}, which --batch-size says")


class World:
    """The tasks of one seed, and what the policy answers to them. The policy is asked when it is first needed."""

    def __init__(self, policy: Opened, args, scale: Scale, seed: int):
        known = tasks.words(corpus.load(args.corpus).text)
        self.policy, self.scale, self.seed = policy, scale, seed
        # One list for all seeds, of which each has its own part.
        self.records, self.test = (tasks.make(known, name, (seed + 1) * count)[seed * count:]
                                   for name, count in (("train", scale.pairs), ("words", scale.test)))

    @cached_property
    def drawn(self) -> list[list[str]]:
        """Four answers of the policy to each of the first quarter of the tasks to train on."""
        return draw_answers(self.policy, self.records[:len(self.records) // 4], 4, seed=self.seed, length=LENGTH)

    @cached_property
    def drawn_test(self) -> list[list[str]]:
        """Four answers of the policy to each held-out task."""
        return draw_answers(self.policy, self.test, 4, seed=1000 + self.seed, length=LENGTH)

    def pairs(self) -> list[dict]:
        """`scale.pairs` pairs to train on, mixed: most of a right answer against one with a mistake, the kinds in turn.

        At most a fifth is of the right answer against a wrong one of the policy, as in reward.py.
        """
        made = corrupted(self.records, seed=self.seed) + against_gold(self.drawn, self.records[:len(self.drawn)])
        return random.Random(self.seed).sample(made, min(len(made), self.scale.pairs))

    @cached_property
    def held_out(self) -> dict[str, list[dict]]:
        """Pairs of the held-out tasks: by the kind of mistake, and "sampled", right against what the policy wrote."""
        kinds = {kind: corrupted(self.test, (kind,), self.seed) for kind in KINDS}
        return kinds | {"sampled": against_gold(self.drawn_test, self.test)}


def parser(description: str) -> options.Parser:
    """A parser with the flags of `Scale`, --policy, --corpus and --device."""
    made = options.Parser(description=description.split("\n\n")[0])
    made.add_argument("--policy", default="lazy", help="a tuned model (default: lazy, which is tuned where needed)")
    made.add_argument("--corpus", help="where the tasks' words are from (default: shakespeare)")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    options.add(made, Scale)
    return made


def policy(args) -> Opened:
    """The policy that --policy names, on --device. Raises BadInput where there is none."""
    return open_policy(args, setup(args.device))


def recipe(scale: Scale, seed: int, **more) -> RewardConfig:
    """The default recipe of reward.py at this scale; `more` are fields that differ."""
    return RewardConfig(**{"steps": scale.steps, "batch_size": scale.batch_size, "seed": seed} | more)


def learn(policy: Opened, pairs: list[dict], config: RewardConfig, tick: Callable) -> tuple[Opened, list[float]]:
    """A reward model that is trained on the pairs, and its losses; `tick(step, loss)` is called after each step."""
    opened, losses = reward.judge(policy, config.both_ways), []
    rows = reward.encode(opened, [talk for each in pairs for talk in both(each)])
    for step, loss in reward.fit(opened.model, list(zip(rows[0::2], rows[1::2], strict=True)), config):
        losses.append(round(loss, 5))
        tick(step, loss)
    return opened, losses


def right(opened: Opened, held_out: dict[str, list[dict]]) -> dict[str, float]:
    """The share of pairs that are ranked right, by kind, and their mean as "mean". A kind without pairs is left out."""
    found = {kind: reward.accuracy(*reward.score_pairs(opened, pairs)) for kind, pairs in held_out.items() if pairs}
    return found | {"mean": mean(found.values())}


def digest(log: RunLog, opened: Opened) -> str:
    """A short name for all that a run depends on beside its variant and seed: flags, policy, text and code."""
    settings = {name: value for name, value in log.config.items() if name not in FREE}
    found = hashlib.sha256(dumps([settings, opened.tokenizer.state()]).encode("utf-8"))
    found.update(corpus.load(log.config["corpus"]).text.encode("utf-8"))
    for tensor in opened.model.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    for source in sorted([*STAGE.glob("*.py"), Path(__file__), STAGE / log.script]):
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
    with progress(len(jobs) * steps, "learning to judge") as bar:
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


def shown(rows: list[dict]) -> list[dict]:
    """Rows for `table`: all to three places, a difference with its sign, and no -0.000."""
    return [{key: format(round(value, 3) + 0.0, "+.3f" if key == "difference" else ".3f")
             if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def done(log: RunLog, fig, name: str, rows: list[dict], **headline) -> None:
    """Draw the figure, write the summary, say where the figure is."""
    file = log.figure(fig, name)
    log.finish(rows=rows, **headline)
    say(f"figure: {file}")
