"""`stages check [N...]`: the checkpoints of a stage, each shown by what it claims, live."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from shared.console import console
from shared.errors import BadInput
from shared.stages import repo
from shared.stages.results import Progress, record_progress
from shared.stages.run import run_child

from rich.markup import escape

# What else is installed into pytest costs time at the start, and no checkpoint needs it. The user's own options may be
# those of a plugin that is then missing.
BARE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}


def check(folder: Path, verbose: bool = False) -> Progress:
    """Run the checkpoints in `folder` (a stage, or a practice copy of one), which `checkpoints.py` shows live.

    They run in a process of their own: same-named modules of two stages never meet in one. Raises BadInput when pytest
    itself cannot run; Ctrl-C passes through, once pytest is gone.
    """
    words = [sys.executable, "-m", "pytest", "-p", "shared.stages.checkpoints", "--continue-on-collection-errors"]
    with tempfile.TemporaryDirectory() as scratch:
        result, complaint = Path(scratch) / "result.json", Path(scratch) / "complaint.txt"
        with complaint.open("wb") as sink:
            env = os.environ | BARE | {"STAGES_RESULT": str(result)}
            stderr = None if verbose else sink
            code = run_child([*words, *(["-v"] if verbose else [])], patience=5, cwd=folder, env=env, stderr=stderr)
        console.show_cursor()  # a process that was killed leaves it hidden
        # pytest: 0 all passed, 1 some failed or cannot be imported, 5 nothing collected
        if code == 5:
            raise BadInput(f"{folder.name} has no checkpoints: its tests/ holds no test")
        if code not in (0, 1):
            tail = "\n".join(complaint.read_text("utf-8", errors="replace").splitlines()[-15:])
            raise BadInput(f"pytest broke down in {folder.name} (exit code {code})\n{tail}".rstrip())
        return Progress(**json.loads(result.read_text("utf-8"))["progress"])


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
    parser = subparsers.add_parser("check", help="run the checkpoints of stages N, by default of this one or of all")
    parser.add_argument("stages", nargs="*", metavar="N", help="stages: 6, 06 or 06_gpt")
    parser.add_argument("--verbose", action="store_true", help="show pytest's own output, with tracebacks")
    parser.set_defaults(func=command)
