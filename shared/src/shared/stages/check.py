"""`stages check [N...]`: the checkpoints of a stage, each shown by what it claims, live."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.console import console
from shared.errors import BadInput
from shared.stages import repo
from shared.stages.results import Progress, record_progress
from shared.stages.view import View

from rich.markup import escape


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
                # What else is installed into pytest costs time at the start, and no checkpoint needs it. The user's own
                # options may be those of a plugin that is then missing.
                env=os.environ
                | {"STAGES_REPORT": str(events), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
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


def check(folder: Path, verbose: bool = False) -> Progress:
    """Run the checkpoints in `folder` (a stage, or a practice copy of one) and show them live.

    Raises BadInput when pytest itself cannot run; Ctrl-C passes through, once pytest is gone.
    """
    view = View(quiet=verbose)
    with pytest_run(folder, verbose) as (child, events, output), console.status("") as status:
        if verbose:
            status.stop()
        status.update("collecting the checkpoints")
        for event in follow(child, events):
            kind = event.pop("event")
            if kind == "start":
                status.update(escape(view.claims[event["id"]]))
            else:
                getattr(view, "on_" + kind)(**event)
        view.draw_broken()
        # pytest: 0 all passed, 1 some failed, 2 test files that cannot be imported, 5 nothing collected
        if child.returncode == 5 and not view.broken:
            raise BadInput(f"{folder.name} has no checkpoints: its tests/ holds no test")
        if child.returncode not in (0, 1, 2) or not (view.wanted or view.broken):
            tail = "\n".join(output.read_text("utf-8", errors="replace").splitlines()[-15:])
            raise BadInput(f"pytest broke down in {folder.name} (exit code {child.returncode})\n{tail}".rstrip())
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
    top, complete = repo.root(), True
    for stage in chosen(args.stages, top):
        start = time.monotonic()
        console.print(f"\n[bold]{stage.name}[/bold]  {escape(stage.title)}")
        result = check(stage.path, args.verbose)
        record_progress(top, stage.name, result)
        console.print(conclusion(stage.name, result, time.monotonic() - start))
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
