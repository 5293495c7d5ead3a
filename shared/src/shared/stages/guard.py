"""`stages guard N [DEFINITION...]` and `stages gate [N...]`, for contributors: the course's own tests do the work."""

import argparse
import sys

from shared.stages import repo
from shared.stages.run import become


def guard(args: argparse.Namespace) -> int:
    """Run `tests/guard.py`, with the stage by its folder's name."""
    stage = repo.find(args.stage)
    return become([sys.executable, str(stage.path.parent / "tests" / "guard.py"), stage.name, *args.definitions])


def gate(args: argparse.Namespace) -> int:
    """Run `tests/gate.py`."""
    return become([sys.executable, str(repo.root() / "tests" / "gate.py"), *args.stages])


def add(subparsers) -> None:
    parser = subparsers.add_parser("guard", help="for contributors: which definition could be blanked unnoticed?")
    parser.add_argument("stage", metavar="N", help="a stage: 6, 06 or 06_gpt")
    parser.add_argument("definitions", metavar="DEFINITION", nargs="*", help="only these: schedule, GPT.forward, GPT")
    parser.set_defaults(func=guard)
    parser = subparsers.add_parser("gate", help="for contributors: can each stage be practised, is all of it guarded?")
    parser.add_argument("stages", metavar="N", nargs="*", help="stages: 6, 06 or 06_gpt; by default all")
    parser.set_defaults(func=gate)
