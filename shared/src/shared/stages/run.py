"""`stages run N [script] [args...]`: runs a script of a stage in the stage's folder; and how programs are started."""

import argparse
import os
import subprocess
import sys
from contextlib import suppress

from shared.errors import BadInput
from shared.stages.repo import Stage, find


def scripts(stage: Stage) -> list[str]:
    """Everything in the stage that runs as a program, e.g. ["sample.py", "train.py", "demos/moons.py"]."""
    files = [*stage.trunk(), *sorted(stage.path.glob("extras/*.py")), *sorted(stage.path.glob("demos/*.py"))]
    # Bytes, because a file in another encoding is no reason to leave the others out.
    return [f.relative_to(stage.path).as_posix() for f in files if b"\nif __name__ ==" in f.read_bytes()]


def choose(stage: Stage, words: list[str]) -> tuple[str, list[str]]:
    """Split what follows the stage into a script and its arguments.

    [] -> ("train.py", []), ["--steps", "9"] -> ("train.py", ["--steps", "9"]), ["sample"] -> ("sample.py", []),
    and ["moons"] -> ("demos/moons.py", []). Raises BadInput for an unknown script.
    """
    if not words or words[0].startswith("-"):
        return stage.main, words
    for name in (folder + words[0] + end for folder in ("", "extras/", "demos/") for end in ("", ".py")):
        file = (stage.path / name).resolve()
        if file.suffix == ".py" and file.is_file() and file.is_relative_to(stage.path.resolve()):
            return file.relative_to(stage.path.resolve()).as_posix(), words[1:]
    raise BadInput(f"{stage.name} has no script {words[0]!r}: choose from {', '.join(scripts(stage))}")


def command(args: argparse.Namespace) -> int:
    stage = find(args.stage)
    script, rest = choose(stage, args.words)
    os.environ["STAGES_FROM"] = os.getcwd()  # paths were typed here, and the script runs there
    os.chdir(stage.path)
    return become([sys.executable, script, *rest])


def become(words: list[str]) -> int:
    """Hand the process over to a program: its exit code and Ctrl-C are then its own business."""
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(sys.executable, words)
    # Windows cannot replace a process. Ctrl-C reaches the child too, which may need time to save its checkpoint.
    child = subprocess.Popen(words)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def run_child(words: list[str], patience: float, **options) -> int:
    """The exit code of the program `words`, which is gone whatever happens meanwhile.

    Ctrl-C reaches it too: it has `patience` seconds to save its work and to end, or until the second Ctrl-C.
    `options` are those of Popen.
    """
    child = subprocess.Popen(words, **options)
    try:
        return child.wait()
    finally:
        try:
            with suppress(subprocess.TimeoutExpired):
                child.wait(patience)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run a stage's main script, or another of its scripts",
        usage="stages run N [script] [args...]",
        allow_abbrev=False,
    )
    parser.add_argument("stage", metavar="N", help="a stage: 6, 06 or 06_gpt")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="a script, then its arguments")
    parser.set_defaults(func=command)
