"""The pytest plugin of `checkpoints.py` for a practice copy, where some bodies are still to be written.

The tests that $STAGES_TESTS names, one a line, run in this order. One that ends in a blank is no failure: it waits for
that definition. Of the failures only the first is shown whole, since the others are often the same mistake once more.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from shared.stages.checkpoints import Checkpoints, End, configure, test_id, worst
from shared.stages.definitions import split
from shared.stages.results import Progress

import pytest
from rich.markup import escape


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    configure(config, Waiting)


class Waiting(Checkpoints):
    """Draws what passes, the first failure, and in the end what waits."""

    def __init__(self, top: Path, quiet: bool):
        super().__init__(top, quiet)
        self.waits: dict[str, str] = {}  # a test, and the definition that it waits for
        self.folded = 0  # failures that are not shown
        self.failing = False

    def pytest_collection_modifyitems(self, items):
        place = {name: i for i, name in enumerate(os.environ["STAGES_TESTS"].splitlines())}
        items[:] = sorted((item for item in items if test_id(item) in place), key=lambda item: place[test_id(item)])

    def draw_test(self, name: str, ends: list[End]) -> None:
        blanks = {blank(self.top, end): None for end in ends if end.outcome == "failed"}
        if blanks and None not in blanks:
            self.waits[name] = next(iter(blanks))
        elif worst(ends).outcome == "failed" and self.failing:
            self.folded += 1
        else:
            self.failing = self.failing or worst(ends).outcome == "failed"
            super().draw_test(name, [end for end in ends if not blank(self.top, end)])

    def draw_broken(self) -> None:
        slips = self.broken
        for (file, line, _, error), stopped in slips.items():  # a test file may call a blank while it is imported
            if name := blank(self.top, End(message=error, where=f"{file}:{line}")):
                self.waits |= dict.fromkeys(stopped, name)
        self.broken = {slip: stopped for slip, stopped in slips.items() if not self.waits.keys() >= {*stopped}}
        super().draw_broken()
        self.broken = slips
        if self.folded:
            self.draw(f"\n[red]✗[/red] {self.folded} more fail: mend the first, then check again")
        if self.waits:
            self.draw("\n[bold]not written yet[/bold]")
        for name, count in Counter(self.waits.values()).items():
            self.draw(f"  [yellow]–[/yellow] {escape(name)} [dim]({count} wait for it)[/dim]")

    def progress(self) -> Progress:
        """What waits has not failed."""
        result = super().progress()
        return replace(result, failed=[name for name in result.failed if name not in self.waits])


def blank(top: Path, end: End) -> str | None:
    """The definition whose blank ended a test; None if it ended otherwise."""
    file, _, row = end.where.rpartition(":")
    if end.message != "NotImplementedError" or not (top / file).is_file():
        return None
    text = (top / file).read_text("utf-8-sig")
    if "raise NotImplementedError" not in text.splitlines()[int(row) - 1]:
        return None  # torch says the same of a module without `forward`
    return next(piece.name for piece in split(text) if piece.start <= int(row) <= piece.end)
