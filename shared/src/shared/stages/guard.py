"""`stages guard N [DEFINITION...]`, for contributors: hands over to the course's own `tests/guard.py`."""

import argparse
import sys

from shared.stages import repo
from shared.stages.run import become


def command(args: argparse.Namespace) -> int:
    stage = repo.find(args.stage)
    return become([sys.executable, str(stage.path.parent / "tests" / "guard.py"), stage.name, *args.definitions])


def add(subparsers) -> None:
    parser = subparsers.add_parser("guard", help="for contributors: which definition could be blanked unnoticed?")
    parser.add_argument("stage", metavar="N", help="a stage: 6, 06 or 06_gpt")
    parser.add_argument("definitions", metavar="DEFINITION", nargs="*", help="only these: schedule, GPT.forward, GPT")
    parser.set_defaults(func=command)
