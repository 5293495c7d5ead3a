"""`uv run stages gate [N...]`: can a stage be practised, and does a checkpoint stand behind all that is written there?

For each stage, in a practice copy of it:

1. As the learner gets it nothing is done. Checkpoints wait for blanks; none fails otherwise, and none passes although
   it calls a blank (as `pytest.raises(Exception)` does).
2. With the blanks filled in as the course has them, every checkpoint passes.
3. Each new or changed definition, blanked alone, makes a checkpoint fail, as `stages guard` has it.
"""

import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

from shared.console import say
from shared.options import Parser
from shared.program import run_program
from shared.stages import practice, repo
from shared.stages.blank import targets
from shared.stages.check import BARE
from shared.stages.checkpoints import test_id
from shared.stages.repo import Stage
from shared.stages.results import Progress

import isolated
from guard import PATIENCE, at_once, verdicts
from traps import copy


class Met:
    """A pytest plugin: writes the tests that pass although they have called a blank into a file, one a line."""

    def __init__(self, file: Path):
        self.file, self.calls, self.test = file, 0, ""

    def pytest_collection_finish(self, session):
        """Give each module a NotImplementedError of its own, which counts how often it is raised."""

        def count(error, *args):
            self.calls += 1

        mine = type("NotImplementedError", (NotImplementedError,), {"__init__": count})
        for path in session.config.rootpath.glob("*.py"):
            if path.stem in sys.modules:
                sys.modules[path.stem].NotImplementedError = mine

    def pytest_runtest_setup(self, item):
        self.calls, self.test = 0, test_id(item)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed and self.calls:
            with self.file.open("a", encoding="utf-8") as sink:
                sink.write(f"{self.test}\n")


def run_checkpoints(plugin: str, ids: list[str], result: Path, met: Path) -> int:
    """pytest in this process, for the tests `ids`; the plugin of shared.stages writes the result."""
    import pytest

    os.environ |= BARE | {"STAGES_RESULT": str(result), "STAGES_TESTS": "\n".join(ids)}
    words = ["-q", "-p", f"shared.stages.{plugin}", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return pytest.main([*words, *dict.fromkeys(name.split("::")[0] for name in ids)], plugins=[Met(met)])


def run(folder: Path, plugin: str, ids: list[str]) -> tuple[Progress | None, list[str]]:
    """How the tests `ids` end in this folder, None if they never do, and those that pass although they call a blank."""
    with tempfile.TemporaryDirectory() as scratch:
        result, met = Path(scratch) / "result.json", Path(scratch) / "met.txt"
        isolated.call(run_checkpoints, folder, Path(scratch) / "out.txt", plugin, ids, result, met, timeout=PATIENCE)
        ends = Progress(**json.loads(result.read_text("utf-8"))["progress"]) if result.exists() else None
        return ends, list(dict.fromkeys(met.read_text("utf-8").splitlines())) if met.exists() else []


def as_shipped(folder: Path, ids: list[str]) -> tuple[int, list[str]]:
    """How many checkpoints wait in a fresh copy, and what is wrong there."""
    ends, met = run(folder, "waits", ids)
    if ends is None:
        return 0, ["the checkpoints of the fresh copy never end, or pytest breaks down"]
    waiting = ends.total - ends.passed - ends.skipped - len(ends.failed)
    wrong = [f"{name} fails, though nothing is written yet" for name in ends.failed]
    wrong += [f"{name} passes, though it calls a blank" for name in met]
    return waiting, wrong if waiting else [*wrong, "no checkpoint waits for a blank"]


def filled_in(whole: Path, ids: list[str]) -> tuple[int, list[str]]:
    """How many checkpoints there are in a copy without blanks, and what is wrong there."""
    with tempfile.TemporaryDirectory() as scratch:
        ends, _ = run(shutil.copytree(whole, Path(scratch) / whole.name), "checkpoints", ids)
    if ends is None:
        return 0, ["with the blanks filled in the checkpoints never end, or pytest breaks down"]
    return ends.total, [f"{name} fails with the blanks filled in" for name in ends.failed]


def copies(stage: Stage, scratch: Path) -> tuple[Path, Path, list[str]]:
    """A practice copy as it is made, one with its blanks filled in, and the ids of their tests."""
    for one in filter(None, (repo.before(stage), stage)):
        copy(one.path, scratch)
    there = repo.find(stage.name, scratch)
    known = practice.exercises(there)
    practice.make(there, practice.usual(known))
    fresh, whole = (
        practice.copy_of(there),
        Path(shutil.copytree(practice.copy_of(there), scratch / "filled" / stage.name)),
    )
    for file in there.trunk():
        names = [name for other, name in known if other == file.name]
        text = practice.graft(practice.text(whole / file.name), names, practice.text(file))
        (whole / file.name).write_text(text, "utf-8")
    return fresh, whole, practice.tests(there)


def problems(stage: Stage) -> list[str]:
    """What is wrong with the stage, after one line on what is right."""
    start, chosen = perf_counter(), targets(stage)
    with tempfile.TemporaryDirectory() as scratch:
        fresh, whole, ids = copies(stage, Path(scratch))
        jobs = {"as shipped": partial(as_shipped, fresh, ids), "filled in": partial(filled_in, whole, ids)}
        found = at_once(jobs | verdicts(whole, chosen), f"gate {stage.name}")
    (waiting, wrong), (total, more) = found.pop("as shipped"), found.pop("filled in")
    loose = [f"{target} is not guarded ({why})" for target, why in found.items() if why]
    say(
        f"{stage.name}: {waiting} checkpoints wait in the fresh copy, {total - len(more)} of {total} pass once it is "
        f"filled in, {len(found) - len(loose)} of {len(found)} definitions are guarded ({perf_counter() - start:.0f} s)"
    )
    return [*wrong, *more, *loose]


def main() -> int:
    """1 when something is wrong."""
    parser = Parser(description="See whether stages can be practised, and whether a checkpoint guards each definition.")
    parser.add_argument("stages", metavar="N", nargs="*", help="stages: 6, 06 or 06_gpt; by default all")
    names = parser.parse_args().stages
    chosen = [repo.find(name) for name in names] or repo.stages()
    red = []
    for stage in chosen:
        for problem in problems(stage):
            red.append(f"{stage.name}: {problem}")
            say(f"  {problem}")
    say(f"{'red' if red else 'green'}: {len(red) or 'no'} problems in {len(chosen)} stages")
    return 1 if red else 0


if __name__ == "__main__":
    run_program(main)
