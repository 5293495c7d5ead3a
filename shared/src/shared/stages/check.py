"""`stages check [N...]`: the checkpoints of a stage, each shown by what it claims, live."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from shared.errors import BadInput
from shared.stages import repo
from shared.stages.results import Progress, record_progress

MESSAGE_LINES = 6  # of a failure: enough for the idea, too few for a dump of two tensors


class View:
    """Turns the events of `report.py` into lines on the screen and, at the end, into a Progress.

    `quiet` keeps the books without drawing, for when pytest's own output is on the screen.
    """

    def __init__(self, console: Console, quiet: bool = False):
        self.console = console
        self.quiet = quiet
        self.file = ""  # the test file whose heading is on the screen
        self.claims: dict[str, str] = {}
        self.wanted: Counter[str] = Counter()  # runs still to come, by test: one for each parameter
        self.ends: dict[str, list[dict]] = {}
        self.broken: dict[tuple, list[str]] = {}  # (file, line, error, code): test files that it stops

    def draw(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True)

    def on_collected(self, tests: list[dict]) -> None:
        self.claims = {test["id"]: test["claim"] for test in tests}
        self.wanted = Counter(test["id"] for test in tests)

    def on_broken(self, tests: str, file: str, line: int, error: str, code: str) -> None:
        self.broken.setdefault((file, line, error, code), []).append(tests)

    def on_start(self, id: str) -> None:
        pass  # the spinner shows it

    def on_end(self, id: str, **end) -> None:
        ends = self.ends.setdefault(id, [])
        ends.append(end)
        if len(ends) == self.wanted[id]:
            self.draw_test(id, ends)

    def draw_test(self, id: str, ends: list[dict]) -> None:
        """One line for a test, all its parameters folded, and below it why it failed."""
        if self.file != (file := id.split("::")[0]):
            self.file = file
            self.draw(f"\n[bold]{escape(file)}[/bold]")
        count = sum(end["outcome"] == "passed" for end in ends)
        folded = f" [dim]({count}/{len(ends)})[/dim]" if len(ends) > 1 else ""
        mark = {"passed": "[green]✓[/green]", "failed": "[red]✗[/red]", "skipped": "[yellow]–[/yellow]"}[worst(ends)]
        self.draw(f"  {mark} {escape(self.claims[id])}{folded}")
        told = [end for end in ends if end["outcome"] == worst(ends) != "passed"][0:1]
        for end in told:
            lines = end["message"].splitlines()[:MESSAGE_LINES]
            lines[-1:] = [f"{lines[-1]}  ({end['where']})"] if lines and end["where"] else lines[-1:]
            style = "red" if end["outcome"] == "failed" else "dim"
            for line in lines:
                self.draw(f"      [{style}]{escape(line)}[/{style}]")

    def draw_broken(self) -> None:
        """One block for each slip that keeps test files from being imported at all."""
        for (file, line, error, code), tests in self.broken.items():
            self.draw(f"\n[red]✗[/red] [bold]{escape(f'{file}, line {line}' if file else 'cannot start')}[/bold]")
            for text in [*filter(None, [code]), *error.splitlines()[:MESSAGE_LINES]]:
                self.draw(f"      [red]{escape(text)}[/red]")
            self.draw(f"      [dim]stops {escape(', '.join(tests))}[/dim]")

    def progress(self, folder: Path) -> Progress:
        """The result. Test files that could not be imported count with all the tests they define."""
        stopped = [file for files in self.broken.values() for file in files]
        lost = sum(len(re.findall(r"^\s*def test_", (folder / f).read_text("utf-8"), re.M)) for f in stopped)
        outcomes = {id: worst(ends) for id, ends in self.ends.items()}
        counts = Counter(outcomes.values())
        return Progress(
            total=len(self.wanted) + lost,
            passed=counts["passed"],
            skipped=counts["skipped"],
            failed=[*stopped, *(id for id, outcome in outcomes.items() if outcome == "failed")],
        )


def worst(ends: list[dict]) -> str:
    """The outcome of a test over all its parameters: one failure fails it, one pass beats a skip."""
    return min((end["outcome"] for end in ends), key=["failed", "passed", "skipped"].index)


@contextmanager
def pytest_run(folder: Path, verbose: bool) -> Iterator[tuple[subprocess.Popen, Path, Path]]:
    """pytest in its own process in `folder`: yields it with the files of its events and of its output.

    Same-named modules of two stages never meet in one process. On the way out the process is gone.
    """
    with tempfile.TemporaryDirectory() as scratch:
        events, output = Path(scratch) / "events.jsonl", Path(scratch) / "output.txt"
        events.touch()
        words = [sys.executable, "-m", "pytest", "-p", "shared.stages.report", "--continue-on-collection-errors"]
        with output.open("wb") as sink:
            child = subprocess.Popen(
                [*words, *(["-v"] if verbose else [])],
                cwd=folder,
                env=os.environ | {"STAGES_REPORT": str(events)},
                stdout=None if verbose else sink,
                stderr=None if verbose else subprocess.STDOUT,
            )
            try:
                yield child, events, output
            finally:
                try:
                    child.wait(5)  # Ctrl-C has reached it as well
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


def follow(child: subprocess.Popen, file: Path) -> Iterator[dict]:
    """The events of a running process, as they are written."""
    rest = ""
    with file.open(encoding="utf-8") as stream:
        while True:
            ended = child.poll() is not None  # asked before reading, so that nothing is missed
            *lines, rest = (rest + stream.read()).split("\n")
            yield from map(json.loads, lines)
            if ended:
                return
            time.sleep(0.05)


def check(folder: Path, verbose: bool = False, console: Console | None = None) -> Progress:
    """Run the checkpoints in `folder` (a stage, or a practice copy of one) and show them live.

    Raises BadInput when pytest itself cannot run; Ctrl-C passes through, once pytest is gone.
    """
    console = console or Console()
    view = View(console, quiet=verbose)
    with pytest_run(folder, verbose) as (child, events, output), console.status("") as status:
        if verbose:
            status.stop()
        status.update("collecting the checkpoints")
        for event in follow(child, events):
            getattr(view, "on_" + event.pop("event"))(**event)
            if "id" in event:
                status.update(escape(view.claims[event["id"]]))
        view.draw_broken()
        # pytest: 0 all passed, 1 some failed, 2 interrupted or broken test files, 5 nothing collected
        if child.returncode not in (0, 1, 2) or not (view.wanted or view.broken):
            if child.returncode == 5:
                raise BadInput(f"{folder.name} has no checkpoints: tests/ holds no test")
            tail = "\n".join(output.read_text("utf-8", errors="replace").splitlines()[-15:])
            raise BadInput(f"pytest cannot run in {folder.name}: it ended with {child.returncode}\n{tail}".rstrip())
    return view.progress(folder)


def conclusion(name: str, result: Progress, seconds: float) -> str:
    """The last line of a check."""
    parts = [f"{result.passed} of {result.total} checkpoints passed"]
    parts += [f"{result.skipped} skipped"] if result.skipped else []
    style = "green" if result.complete else "red"
    return f"\n[{style}]{name}: {', '.join(parts)}[/{style}] [dim]in {seconds:.0f} s[/dim]"


def chosen(names: list[str], top: Path) -> list[repo.Stage]:
    """The stages asked for; without a name the one we stand in, at the root all of them."""
    if names:
        return [repo.find(name, top) for name in names]
    everything = repo.stages(top)
    return [stage for stage in everything if Path.cwd().is_relative_to(stage.path)] or everything


def command(args: argparse.Namespace) -> int:
    """Check each stage; 1 when a checkpoint fails."""
    top, console, complete = repo.root(), Console(), True
    for stage in chosen(args.stages, top):
        start = time.monotonic()
        console.print(f"\n[bold]{stage.name}[/bold]  {escape(stage.title)}", highlight=False)
        result = check(stage.path, args.verbose, console)
        record_progress(top, stage.name, result)
        console.print(conclusion(stage.name, result, time.monotonic() - start), highlight=False)
        complete = complete and result.complete
    return 0 if complete else 1


def add(subparsers) -> None:
    """Register `stages check`."""
    parser = subparsers.add_parser(
        "check",
        help="run the checkpoints of a stage (without N: of this stage, at the root of all)",
        usage="stages check [N...] [--verbose]",
    )
    parser.add_argument("stages", nargs="*", metavar="N", help="stages: 6, 06 or 06_gpt")
    parser.add_argument("--verbose", action="store_true", help="show pytest's own output, with tracebacks")
    parser.set_defaults(func=command)
