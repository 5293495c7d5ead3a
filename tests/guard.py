"""`uv run stages guard N`: which of a stage's definitions could be missing without a checkpoint noticing.

Each function and method that is new or changed since the stage before is blanked alone, in a copy of the stage, and the
checkpoints run until one fails: then the definition is guarded. So it is when the module cannot be imported any more.
Constants, and what a class says outside its methods, are left alone: there the value matters, which traps.toml is for.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing import active_children
from pathlib import Path

from shared.console import progress, say
from shared.errors import BadInput
from shared.options import Parser
from shared.program import run_program
from shared.stages.blank import Target, blank, choose, targets
from shared.stages.check import BARE
from shared.stages.checkpoints import test_id
from shared.stages.repo import Stage, find
from shared.stages.uses import Uses

import isolated
from traps import copy

PATIENCE = 600  # seconds for all checkpoints of a stage


class First:
    """A pytest plugin: the tests with these ids come first, in this order."""

    def __init__(self, ids: list[str]):
        self.place = {name: i for i, name in enumerate(ids)}

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.place.get(test_id(item), len(self.place)))


def run_checkpoints(ids: list[str]) -> int:
    """pytest in this process, which ends at the first failure: the files of the tests `ids`, and if they pass all."""
    import pytest

    os.environ |= BARE
    words = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    files = dict.fromkeys(name.split("::")[0] for name in ids)
    return (files and pytest.main([*words, *files], plugins=[First(ids)])) or pytest.main(words)


def verdict(whole: Path, uses: Uses, target: Target) -> str:
    """Blank the target in a copy of the folder `whole`: what is wrong with its checkpoints, "" if they notice."""
    file, name = target
    nearest = ["::".join(test) for test in uses.concern([target])]
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(whole, Path(scratch) / whole.name)
        (folder / file).write_text(blank((folder / file).read_text("utf-8-sig"), [name]), "utf-8")
        code = isolated.call(run_checkpoints, folder, Path(scratch) / "output.txt", nearest, timeout=PATIENCE)
    if code in (1, 2):  # a test fails, or a test file cannot be imported
        return ""
    told = {0: "no checkpoint fails", None: f"a checkpoint runs for more than {PATIENCE} s"}
    return told.get(code, f"pytest ends with {code}")


def at_once(jobs: dict[str, Callable], title: str) -> dict:
    """What the functions `jobs` return, by name: called as many at a time as there are cores, with a progress line."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress(len(jobs), title) as bar:
        running = {pool.submit(job): name for name, job in jobs.items()}
        try:
            for done, job in enumerate(as_completed(running), 1):
                bar.update(done, text=running[job])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():  # none, unless it was Ctrl-C
                isolated.kill(process)
    return {name: job.result() for job, name in running.items()}


def verdicts(whole: Path, chosen: list[Target]) -> dict[str, Callable]:
    """A job for each target: its verdict."""
    uses = Uses(whole)
    return {" ".join(target): partial(verdict, whole, uses, target) for target in chosen}


def unguarded(stage: Stage, chosen: list[Target]) -> dict[str, str]:
    """The verdict on each target that is not guarded. Raises BadInput where the checkpoints fail as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        say(f"guard {stage.name}: all checkpoints as they are")
        # What they compile is copied with the stage, which is why they run in a copy too.
        whole = copy(stage.path, Path(scratch))
        if isolated.call(run_checkpoints, whole, Path(scratch) / "output.txt", [], timeout=PATIENCE) != 0:
            raise BadInput(f"the checkpoints of {stage.name} fail as it is: mend it first")
        found = at_once(verdicts(whole, chosen), f"guard {stage.name}")
    return {target: why for target, why in found.items() if why}


def main() -> int:
    """1 when a definition is not guarded."""
    parser = Parser(description="List the definitions of a stage that no checkpoint misses.")
    parser.add_argument("stage", metavar="N", help="a stage: 6, 06 or 06_gpt")
    parser.add_argument("definitions", metavar="DEFINITION", nargs="*", help="only these: schedule, GPT.forward, GPT")
    args = parser.parse_args()
    stage = find(args.stage)
    chosen = choose(targets(stage), args.definitions)
    found = unguarded(stage, chosen)
    for target, why in found.items():
        say(f"not guarded: {target} ({why})")
    say(f"{stage.name}: {len(chosen) - len(found)} of {len(chosen)} new or changed definitions are guarded")
    return 1 if found else 0


if __name__ == "__main__":
    run_program(main)
