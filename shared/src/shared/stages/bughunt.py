"""`stages bughunt [N]`: find the one mistake in a copy of a stage.

The copy, `practice/05_transformer_bug/`, is the whole stage, right but for one of the mistakes that its traps.toml
lists. The learner is told which checkpoint fails, looks for the line, mends it, and checks by the same command again.

What is planted and what was found stands in `.stages/bughunt.json`, where a mistake is a mark that tells nobody
which one it is: {"05_transformer": {"planted": "5f0c12ab", "checks": 2, "found": ["9e07d1c4"], ...}}
"""

import argparse
import hashlib
import json
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from shared.atomic import write
from shared.console import console, say, table
from shared.errors import BadInput
from shared.stages import diff, repo
from shared.stages.check import check
from shared.stages.definitions import Change, compare_stages
from shared.stages.practice import WITHOUT, fresh, text
from shared.stages.repo import Stage
from shared.stages.uses import Uses

FIELDS = {"name", "file", "find", "replace", "caught_by", "hint"}
Trap = dict[str, str]


@dataclass
class Hunt:
    """What is remembered of one stage."""

    planted: str = ""  # the mark of the mistake in the copy; "" when nobody looks for one
    checks: int = 0  # since it was planted
    hinted: bool = False
    order: int = field(default_factory=lambda: random.randrange(2**32))  # in which the mistakes come
    found: list[str] = field(default_factory=list)
    revealed: list[str] = field(default_factory=list)


def traps(stage: Path) -> list[Trap]:
    """The mistakes that the stage in a folder lists; none where the file is not there. Raises BadInput."""
    file = stage / "traps.toml"
    return repo.settings(file).get("trap", []) if file.exists() else []


def plant(stage: Path, trap: Trap) -> str:
    """Make the mistake in the folder `stage`; what is wrong with the trap itself, or "" when it is planted."""
    if set(trap) != FIELDS or not all(str(trap[key]).strip() for key in FIELDS - {"replace"}):
        return f"a trap has the fields {', '.join(sorted(FIELDS))}, all filled in"
    file = stage / trap["file"]
    if not file.is_file():
        return f"there is no file {trap['file']}"
    source = file.read_text("utf-8")
    if source.count(trap["find"]) != 1:
        return f"`find` occurs {source.count(trap['find'])} times in {trap['file']}, not once"
    file.write_text(source.replace(trap["find"], trap["replace"]), encoding="utf-8")
    return ""


def copy_of(stage: Stage) -> Path:
    """Where the mistake is planted: beside the copy in which the stage is practised."""
    return stage.path.parent / "practice" / f"{stage.name}_bug"


def where(stage: Stage, file: str = "") -> str:
    """The copy, or a file of it, as it is shown."""
    return (copy_of(stage) / file).relative_to(stage.path.parent).as_posix()


def mark(trap: Trap) -> str:
    """What stands for a mistake in the record."""
    return hashlib.sha256(trap["name"].encode("utf-8")).hexdigest()[:8]


def is_kept(stage: Stage, file: str) -> bool:
    """Whether a test file stays in the copy, which has neither demos nor extras."""
    return not WITHOUT.search(text(stage.path / file))


def test_file(test: str) -> str:
    """tests/test_model.py::test_mask -> tests/test_model.py"""
    return test.partition("::")[0]


def plantable(stage: Stage) -> list[Trap]:
    """The mistakes of the trunk: those that can be planted in the copy, and noticed there."""
    trunk = {file.name for file in stage.trunk()}
    found = [trap for trap in traps(stage.path) if trap["file"] in trunk]
    return [trap for trap in found if is_kept(stage, test_file(trap["caught_by"]))]


def record_file(stage: Stage) -> Path:
    return stage.path.parent / ".stages" / "bughunt.json"


def read(stage: Stage) -> dict[str, Hunt]:
    """What is remembered, by stage. A missing or damaged record counts as none."""
    try:
        return {name: Hunt(**entry) for name, entry in json.loads(record_file(stage).read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(stage: Stage, hunt: Hunt) -> None:
    """Write down how the stage's hunt stands; the file is always whole."""
    entries = {name: asdict(entry) for name, entry in (read(stage) | {stage.name: hunt}).items()}
    record_file(stage).parent.mkdir(exist_ok=True)
    write(record_file(stage), json.dumps(entries, indent=1) + "\n")


def planted(stage: Stage, hunt: Hunt) -> Trap | None:
    """The mistake that is being looked for; None where nobody looks for one."""
    known = {mark(trap): trap for trap in plantable(stage)}
    return known.get(hunt.planted) if copy_of(stage).is_dir() else None


def choose(stage: Stage, hunt: Hunt, seed: int | None) -> list[Trap]:
    """The mistakes in the order to try: the seed's, else the learner's own without what is found. Raises BadInput."""
    known = plantable(stage)
    if not known:
        raise BadInput(f"{stage.name} has no mistake to look for: its traps.toml lists none")
    random.Random(hunt.order if seed is None else seed).shuffle(known)
    if seed is None:
        known = [trap for trap in known if mark(trap) not in hunt.found]
        known.sort(key=lambda trap: mark(trap) in hunt.revealed)  # what was given up comes last, once more
    if not known:
        number = stage.name[:2]
        raise BadInput(f"all mistakes of {stage.name} are found; again, by chance: stages bughunt {number} --seed 1")
    return known


def make(stage: Stage, hunt: Hunt, trap: Trap) -> None:
    """Plant the mistake in a fresh copy, or in that of the hunt before, whose files become the course's again.

    Raises BadInput where a folder is in the way that no hunt made, and where nothing can be written.
    """
    folder = copy_of(stage)
    if folder.exists() and stage.name not in read(stage):
        raise BadInput(f"{where(stage)} is there, but not from a hunt that is remembered: move it away")
    hunt.planted, hunt.checks, hunt.hinted = "", 0, False
    try:
        remember(stage, hunt)
        fresh(stage, folder)
        if wrong := plant(folder, trap):
            raise BadInput(f"{stage.name}/traps.toml: {trap['name']}: {wrong}")
        hunt.planted = mark(trap)
        remember(stage, hunt)  # last: stopped before, the next command makes the copy once more
    except OSError as error:
        why = error.strerror or "not every file can be replaced"  # shutil.Error has a list in its place
        raise BadInput(f"cannot write {folder} ({why}): make the course's folder writable") from None


def passes(stage: Stage, tests: list[str]) -> bool:
    """Run these checkpoints of the copy, and show how they end. Raises BadInput where one is not the course's."""
    for file in dict.fromkeys(map(test_file, tests)):
        mine = copy_of(stage) / file
        if not mine.is_file() or mine.read_text("utf-8-sig", errors="replace") != text(stage.path / file):
            raise BadInput(f"{where(stage, file)} was changed, and the mistake is not there: copy it from {stage.name}")
    return check(copy_of(stage), plugin="waits", tests=tests).complete


def others(stage: Stage) -> list[str]:
    """The checkpoints that concern what in the copy is not as in the course; none where all is. Raises BadInput."""
    changes = compare_stages(stage, replace(stage, path=copy_of(stage)))
    tests = Uses(stage.path).concern([(change.file, change.name) for change in changes])
    return [f"{file}::{name}" for file, name in tests if is_kept(stage, file)]


def again(stage: Stage) -> str:
    """What to do while a mistake is not found."""
    return f"mend it, then: uv run stages bughunt {stage.name[:2]} (--hint helps, --reveal gives up)"


def begin(stage: Stage, hunt: Hunt, seed: int | None) -> int:
    """Plant a mistake and show the checkpoint that fails. Raises BadInput."""
    files = ", ".join(sorted({trap["file"] for trap in plantable(stage)}))
    for trap in choose(stage, hunt, seed):
        make(stage, hunt, trap)
        say(f"{where(stage)} is {stage.name} with one mistake in one of {files}")
        if not passes(stage, [trap["caught_by"]]):
            say(f"\nnext: find the mistake and {again(stage)}")
            return 0
        say("\nthis machine cannot run that checkpoint: here is another mistake")
    hunt.planted = ""
    remember(stage, hunt)
    raise BadInput(f"this machine can run none of the checkpoints that would find a mistake in {stage.name}")


def go_on(stage: Stage, hunt: Hunt, trap: Trap) -> int:
    """Check what the learner did: 0 when the mistake is found."""
    number = stage.name[:2]
    passed = passes(stage, [trap["caught_by"]])
    rest = others(stage) if passed else []  # what was mended in the course's own words is right
    if rest:
        say("\nit passes, in other words than the course's: do the others that concern them pass too?")
    mended = passed and (not rest or passes(stage, rest))
    hunt.checks += 1
    if not mended:
        remember(stage, hunt)
        still = "that checkpoint passes, but the mistake is still there, or a new one" if passed else "not found yet"
        say(f"\n{still}: {again(stage)}")
        return 1
    hunt.planted = ""
    hunt.found = [*dict.fromkeys([*hunt.found, mark(trap)])]
    hunt.revealed = [other for other in hunt.revealed if other != mark(trap)]
    remember(stage, hunt)
    checks, hints = f"{hunt.checks} check{'s' * (hunt.checks != 1)}", "the hint" if hunt.hinted else "no hint"
    say(f"\nfound: {trap['name']} ({trap['file']}), with {checks} and {hints}")
    say(f"{len(hunt.found)} of {len(plantable(stage))} found; the next, in a new copy: uv run stages bughunt {number}")
    return 0


def hint(stage: Stage, hunt: Hunt, trap: Trap) -> int:
    """Print the question that leads to the mistake."""
    hunt.hinted = True
    remember(stage, hunt)
    say(f"hint: {trap['hint']}")
    return 0


def reveal(stage: Stage, hunt: Hunt, trap: Trap) -> int:
    """Print the lines as they were planted and as they should be; the hunt is given up."""
    right = text(stage.path / trap["file"])
    row = right[: right.index(trap["find"])].count("\n") + 1
    change = Change(trap["file"], "", "", right.replace(trap["find"], trap["replace"]), right)
    hunt.planted = ""
    hunt.revealed = [*dict.fromkeys([*hunt.revealed, *({mark(trap)} - {*hunt.found})])]
    remember(stage, hunt)
    say(f"{trap['name']}: {where(stage, trap['file'])}:{row}, planted (-) and right (+)")
    console.print(diff.lines(change), soft_wrap=True)
    say(f"the next, in a new copy: uv run stages bughunt {stage.name[:2]}")
    return 0


def score(stages: list[Stage]) -> int:
    """Print what is found and what was given up, stage by stage."""
    rows = []
    for stage in stages:
        hunt = read(stage).get(stage.name, Hunt())
        marks = [mark(trap) for trap in plantable(stage)]
        found, revealed = (sum(mark in marks for mark in which) for which in (hunt.found, hunt.revealed))
        now = where(stage) if planted(stage, hunt) else ""
        rows.append({"stage": stage.name, "mistakes": len(marks), "found": found, "revealed": revealed, "now": now})
    table("bug hunt", rows)
    say("one more: uv run stages bughunt N")
    return 0


def command(args: argparse.Namespace) -> int:
    """Begin a hunt, go on with the one that is under way, or show the score; 1 while a mistake is not found."""
    if args.stage is None:
        if args.seed is not None or args.hint or args.reveal:
            raise BadInput("name a stage, as in `stages bughunt 5 --hint`")
        return score(repo.stages())
    stage = repo.find(args.stage)
    hunt = read(stage).get(stage.name, Hunt())
    trap, number = planted(stage, hunt), stage.name[:2]
    if trap is None and (args.hint or args.reveal):
        raise BadInput(f"no mistake is planted in {stage.name}: uv run stages bughunt {number}")
    if trap is None:
        return begin(stage, hunt, args.seed)
    if args.seed is not None:
        raise BadInput(f"a hunt is under way in {where(stage)}: find the mistake or give up (--reveal) before the next")
    act = hint if args.hint else reveal if args.reveal else go_on
    return act(stage, hunt, trap)


def add(subparsers) -> None:
    parser = subparsers.add_parser("bughunt", help="find the mistake that is planted in a copy of a stage")
    parser.add_argument("stage", metavar="N", nargs="?", help="a stage: 6, 06 or 06_gpt; without one: the score")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--seed", type=int, metavar="S", help="the same mistake for all who give the same number")
    ways.add_argument("--hint", action="store_true", help="a question that leads to the mistake")
    ways.add_argument("--reveal", action="store_true", help="give up: show the lines")
    parser.set_defaults(func=command)
