"""`stages check [N...]`: the checkpoints of a stage, each shown by what it claims, live."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from shared.console import console, say
from shared.errors import BadInput
from shared.stages import hints, practice, repo, warm
from shared.stages.finished import finished
from shared.stages.results import Progress, record_progress
from shared.stages.run import run_child

from rich.markup import escape

# What else is installed into pytest costs time at the start, and no checkpoint needs it. The user's own options may be
# those of a plugin that is then missing.
BARE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}


def check(folder: Path, verbose: bool = False, plugin: str = "checkpoints", tests: Sequence[str] = ()) -> Progress:
    """Run the checkpoints in `folder` (a stage, or a practice copy of one), which the plugin shows live.

    They run in a process of their own: same-named modules of two stages never meet in one. Where only some `tests` are
    asked for it is a fork of the warm process, if there can be one. Raises BadInput when pytest itself cannot run;
    Ctrl-C passes through, once pytest is gone.
    """
    words = ["-p", f"shared.stages.{plugin}", "--continue-on-collection-errors", *(["-v"] if verbose else [])]
    words += dict.fromkeys(test.split("::")[0] for test in tests)
    with tempfile.TemporaryDirectory() as scratch:
        result, complaint = Path(scratch) / "result.json", Path(scratch) / "complaint.txt"
        with complaint.open("wb") as sink:
            env = os.environ | BARE | {"STAGES_RESULT": str(result), "STAGES_TESTS": "\n".join(tests)}
            stderr = None if verbose else sink
            code = warm.run(words, folder, env, stderr, patience=5) if tests else None
            if code is None:
                cold = [sys.executable, "-m", "pytest", *words]
                code = run_child(cold, patience=5, cwd=folder, env=env, stderr=stderr)
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
    waiting = 0 if result.failed else result.total - result.passed - result.skipped  # only in a practice copy
    parts += [f"{waiting} wait for what is not written yet"] if waiting else []
    style = "green" if result.complete else "red" if result.failed else "yellow"
    return f"\n[{style}]{name}: {', '.join(parts)}[/{style}] [dim]in {seconds:.0f} s[/dim]"


def chosen(names: list[str], top: Path) -> list[repo.Stage]:
    """The stages asked for; without a name the one we stand in, at the root all of them."""
    if names:
        return [repo.find(name, top) for name in names]
    everything = repo.stages(top)
    return [stage for stage in everything if Path.cwd().is_relative_to(stage.path)] or everything


def practised(names: list[str], top: Path) -> repo.Stage:
    """The one stage whose practice copy is meant: it is named, or we stand in it. Raises BadInput."""
    here, everything = Path.cwd(), repo.stages(top)
    found = [repo.find(name, top) for name in names] or [
        stage for stage in everything if here.is_relative_to(stage.path) or here.is_relative_to(practice.copy_of(stage))
    ]
    for stage in everything:
        if not names and here.is_relative_to(f"{practice.copy_of(stage)}_bug"):
            raise BadInput(f"this is the copy of a bug hunt: check it with uv run stages bughunt {stage.name[:2]}")
    if len(found) != 1:
        raise BadInput("name one stage, as in `stages check 5 --practice` or `stages check 5 --practice attention`")
    return found[0]


def check_practice(stage: repo.Stage, args: argparse.Namespace) -> int:
    """Check the copy, or blank a definition in it, give a hint, show the course's; 1 when something is left to do."""
    for act, word in (practice.reset, args.reset), (practice.solution, args.solution):
        if word:
            act(stage, word)
    if args.hint:
        hints.hint(stage, args.practice or "")
    if args.reset or args.solution or args.hint:
        return 0
    practice.unwritten(stage)  # refuses a file that is not Python
    tests = practice.tests(stage, args.practice)
    start = time.monotonic()
    console.print(f"\n[bold]practice/{stage.name}[/bold]  {escape(stage.title)}")
    result = check(practice.copy_of(stage), args.verbose, "waits", tests)
    hints.remember(stage, result.failed)
    console.print(conclusion(args.practice or stage.name, result, time.monotonic() - start), soft_wrap=True)
    if result.complete and not args.practice:
        say(finished(stage))
    elif not result.failed:
        say(practice.next_step(stage, args.practice))
    elif args.practice:
        say(f"a hint: uv run stages check {stage.name[:2]} --practice {args.practice} --hint")
    return 0 if result.complete else 1


def command(args: argparse.Namespace) -> int:
    """Check each stage, or the practice copy that is asked for or in which we stand; 1 when a checkpoint fails."""
    top, complete = repo.root(), True
    in_copy = not args.stages and Path.cwd().is_relative_to(top / "practice")
    if in_copy or args.practice is not None or args.reset or args.solution or args.hint:
        return check_practice(practised(args.stages, top), args)
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
    parser.add_argument("--practice", metavar="NAME", nargs="?", const="", help="of the practice copy: all, or of NAME")
    parser.add_argument("--hint", action="store_true", help="of NAME in the practice copy: one of three, then one more")
    parser.add_argument("--reset", metavar="NAME", help="blank this definition of the practice copy again")
    parser.add_argument("--solution", metavar="NAME", help="show this definition: yours and the course's")
    parser.set_defaults(func=command)
