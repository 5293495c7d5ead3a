"""`uv run stages`: the command line of the learner's tool. One module per command, each with `add(subparsers)`."""

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from shared.errors import BadInput
from shared.program import run_program
from shared.stages import (
    bughunt,
    carry,
    check,
    diff,
    doctor,
    guard,
    ladder,
    overview,
    practice,
    run,
    site,
    start,
    watch,
)


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line that says what is allowed."""

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but what a command does not know is that command's error, not the whole program's."""
        found, unknown = super().parse_known_args(args, namespace)
        return (found, unknown) if not unknown else self.error(f"unrecognized arguments: {' '.join(unknown)}")

    def error(self, message: str):
        """Raises BadInput with argparse's message and the usage, folded to one line."""
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise BadInput(f"{message}: use `{usage}`")


def parser() -> Parser:
    """The whole command line; parsed arguments hold `func(args) -> exit code`."""
    top = Parser(prog="stages", description="Follow the course: without a command, where you are and what comes next.")
    top.set_defaults(func=overview.show)
    commands = top.add_subparsers(metavar="command")
    for module in (start, doctor, run, check, diff, practice, watch, bughunt, guard, carry, ladder, site):
        module.add(commands)
    return top


def main(words: Sequence[str] | None = None) -> NoReturn:
    """The `stages` program with the arguments `words`, by default those of the process."""

    def command() -> int:
        args = parser().parse_args(words)
        for name in ("STAGES_DATA", "STAGES_OUT"):  # typed here, and what runs a stage runs in the stage's folder
            if os.environ.get(name):
                os.environ[name] = os.path.abspath(os.environ[name])
        return args.func(args)

    run_program(command)
