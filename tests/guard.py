"""`uv run stages guard N`: which of a stage's definitions could be missing without a checkpoint noticing.

Each function and method that is new or changed since the stage before is blanked alone, in a copy of the stage, and the
checkpoints run until one fails: then the definition is guarded. So it is when the module cannot be imported any more.
Constants, and what a class says outside its methods, are left alone: there the value matters, which traps.toml is for.
"""

import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from inspect import getsource
from multiprocessing import active_children
from pathlib import Path

from shared.console import progress, say
from shared.errors import BadInput
from shared.options import Parser
from shared.program import run_program
from shared.stages.blank import Target, blank, choose, targets
from shared.stages.check import BARE
from shared.stages.repo import Stage, find

import isolated
from traps import copy

PATIENCE = 600  # seconds for all checkpoints of a stage


class Nearest:
    """A pytest plugin: tests whose source names the blanked definition come first, then those of its file."""

    def __init__(self, file: str, name: str):
        self.file = f"test_{file}"
        self.names = [part for part in name.split(".") if not part.startswith("__")]

    def distance(self, item) -> tuple[int, bool]:
        text = getsource(item.function)
        return -sum(bool(re.search(rf"\b{name}\b", text)) for name in self.names), item.path.name != self.file

    def pytest_collection_modifyitems(self, items):
        items.sort(key=self.distance)


def run_checkpoints(target: Target) -> int:
    """pytest in this process, which ends at the first failure."""
    import pytest

    os.environ |= BARE
    return pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider"], plugins=[Nearest(*target)])


def verdict(whole: Path, target: Target) -> str:
    """Blank the target in a copy of the folder `whole`: what is wrong with its checkpoints, "" if they notice."""
    file, name = target
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(whole, Path(scratch) / whole.name)
        (folder / file).write_text(blank((folder / file).read_text("utf-8-sig"), [name]), "utf-8")
        code = isolated.call(run_checkpoints, folder, Path(scratch) / "output.txt", target, timeout=PATIENCE)
    return {0: "no checkpoint fails", None: f"a checkpoint runs for more than {PATIENCE} s"}.get(code, "")


def unguarded(stage: Stage, chosen: list[Target]) -> dict[Target, str]:
    """The verdict on each target that is not guarded. Raises BadInput where the checkpoints fail as it is."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(len(chosen), f"guard {stage.name}") as bar,
    ):
        bar.update(0, text="all checkpoints as they are")
        # What they compile is copied with the stage, which is why they run in a copy too.
        whole = copy(stage.path, Path(scratch))
        if isolated.call(run_checkpoints, whole, Path(scratch) / "output.txt", ("", ""), timeout=PATIENCE) != 0:
            raise BadInput(f"the checkpoints of {stage.name} fail as it is: mend it first")
        jobs = {pool.submit(verdict, whole, target): target for target in chosen}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                bar.update(done, text=" ".join(jobs[job]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():  # none, unless it was Ctrl-C
                isolated.kill(process)
    return {target: job.result() for job, target in jobs.items() if job.result()}


def main() -> int:
    """1 when a definition is not guarded."""
    parser = Parser(description="List the definitions of a stage that no checkpoint misses.")
    parser.add_argument("stage", metavar="N", help="a stage: 6, 06 or 06_gpt")
    parser.add_argument("definitions", metavar="DEFINITION", nargs="*", help="only these: schedule, GPT.forward, GPT")
    args = parser.parse_args()
    stage = find(args.stage)
    chosen = choose(targets(stage), args.definitions)
    found = unguarded(stage, chosen)
    for (file, name), why in found.items():
        say(f"not guarded: {file} {name} ({why})")
    say(f"{stage.name}: {len(chosen) - len(found)} of {len(chosen)} new or changed definitions are guarded")
    return 1 if found else 0


if __name__ == "__main__":
    run_program(main)
