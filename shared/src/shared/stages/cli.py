"""`uv run stages`: the command line of the learner's tool. One module per command, each with `add(subparsers)`."""

import argparse

from shared import errors
from shared.errors import BadInput
from shared.stages import check, doctor, ladder, overview, run


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line that says what is allowed."""

    def error(self, message: str):
        """Raises BadInput with argparse's message and the usage, folded to one line."""
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise BadInput(f"{message}: use `{usage}`")


def parser() -> Parser:
    """The whole command line; parsed arguments hold `func(args) -> exit code`."""
    top = Parser(prog="stages", description="Follow the course: without a command, where you are and what comes next.")
    top.set_defaults(func=overview.show)
    commands = top.add_subparsers(metavar="command")
    for module in (doctor, run, check, ladder):
        module.add(commands)
    return top


def main() -> None:
    """The `stages` program."""
    def command() -> int:
        args = parser().parse_args()
        return args.func(args)

    errors.cli(command)
