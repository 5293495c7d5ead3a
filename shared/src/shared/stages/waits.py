"""The pytest plugin of `checkpoints.py` for a practice copy, where some bodies are still to be written.

The tests that $STAGES_TESTS names, one a line, run in this order. One that ends in a blank is no failure: it waits for
that definition. The first failure is shown, with what was compared or the line that raised, and nothing below it: other
failures are often the same mistake once more.
"""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from shared.stages.checkpoints import Checkpoints, End, configure, first_words, place, test_id, worst
from shared.stages.compared import Memory
from shared.stages.definitions import split
from shared.stages.diagnosis import Diagnosis
from shared.stages.results import Progress

import pytest
from rich.markup import escape

# The end of a traceback that someone else printed: a process that the test started, or the example of a docstring.
PRINTED = re.compile(r'File "([^"]+)", line (\d+), in .*\n\s*raise NotImplementedError')


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    configure(config, Waiting)


class Waiting(Checkpoints):
    """Draws what passes, the first failure, and in the end what waits."""

    def __init__(self, top: Path, quiet: bool):
        super().__init__(top, quiet)
        self.waits: dict[str, str] = {}  # a test, and the definition that it waits for
        self.folded: Counter[str] = Counter()  # what is not shown, by its outcome
        self.failing = False
        self.met: dict[BaseException, str] = {}  # a failure, and the place of the blank of which it came
        self.memory = Memory()
        self.diagnosis = Diagnosis(top, top.parent.parent / top.name)
        self.shown: list[str] | None = None  # what the first failure is told by, below its first line

    def pytest_collection_modifyitems(self, items):
        place = {name: i for i, name in enumerate(os.environ["STAGES_TESTS"].splitlines())}
        items[:] = sorted((item for item in items if test_id(item) in place), key=lambda item: place[test_id(item)])

    def pytest_collection_finish(self, session):
        super().pytest_collection_finish(session)
        if not self.quiet:
            self.memory.watch()  # what the tests need is loaded by now

    def pytest_assertrepr_compare(self, op, left, right):
        """Called by pytest for `assert left == right` that fails."""
        self.memory.compare(op, left, right)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        """Say why the first failure failed, while its frames are there."""
        report = yield from super().pytest_runtest_makereport(item, call)
        end = self.ends[test_id(item)][-1]
        if end.outcome == "failed" and call.excinfo and (where := self.printed(call.excinfo.value, report)):
            end.message, end.where = "NotImplementedError", where
        first = not self.quiet and self.shown is None
        if first and end.outcome == "failed" and call.excinfo and not self.blank(end):
            (end.message, *self.shown), end.where = self.diagnosis.of(call.excinfo.value, test_id(item), self.memory)
        return report

    def printed(self, error: BaseException, report) -> str:
        """Where the blank is, "model.py:12", that was met by a process of the test, or whose error the test caught.

        It stands in what was printed, or behind the error that the test made of it. Tests of a fixture share its error.
        """
        if cause := error.__cause__ or error.__context__:
            file, row, _ = place(cause, self.top)
            if self.blank(End(message=first_words(cause), where=f"{file}:{row}")):
                self.met[error] = f"{file}:{row}"
        told = "\n".join([str(error), *(text for _, text in report.sections)])
        for file, row in PRINTED.findall(told):
            if Path(file).is_relative_to(self.top):
                self.met[error] = f"{Path(file).relative_to(self.top).as_posix()}:{row}"
        return self.met.get(error, "")

    def blank(self, end: End) -> str | None:
        """The definition whose blank ended a test; None if it ended otherwise."""
        file, _, row = end.where.rpartition(":")
        text = self.diagnosis.texts.get(self.top / file)  # as it was imported: another one may be saved by now
        if end.message != "NotImplementedError" or text is None:
            return None
        if "raise NotImplementedError" not in "".join(text.splitlines()[int(row) - 1 : int(row)]):
            return None  # torch says the same of a module without `forward`
        return next(piece.name for piece in split(text) if piece.start <= int(row) <= piece.end)

    def pytest_sessionfinish(self):
        self.memory.forget()
        super().pytest_sessionfinish()

    def draw_test(self, name: str, ends: list[End]) -> None:
        blanks = {self.blank(end): None for end in ends if end.outcome == "failed"}
        if blanks and None not in blanks:
            self.waits[name] = next(iter(blanks))
        elif self.failing:  # what stands below the first failure would hide it
            self.folded[worst(ends).outcome] += 1
        else:
            super().draw_test(name, [end for end in ends if not self.blank(end)])
            if worst(ends).outcome == "failed":
                self.failing = True
                for line in self.shown or []:
                    self.draw(f"      {escape(line)}")

    def draw_broken(self) -> None:
        slips = self.broken
        for (file, line, _, error), stopped in slips.items():  # a test file may call a blank while it is imported
            if name := self.blank(End(message=error, where=f"{file}:{line}")):
                self.waits |= dict.fromkeys(stopped, name)
        self.broken = {slip: stopped for slip, stopped in slips.items() if not self.waits.keys() >= {*stopped}}
        super().draw_broken()
        self.broken = slips
        if self.folded["passed"]:
            self.draw(f"\n[green]✓[/green] {self.folded['passed']} more pass")
        if self.folded["failed"]:
            self.draw(f"\n[red]✗[/red] {self.folded['failed']} more fail: mend the first, then check again")
        if self.waits:
            self.draw("\n[bold]not written yet[/bold]")
        for name, count in Counter(self.waits.values()).items():
            self.draw(f"  [yellow]–[/yellow] {escape(name)} [dim]({count} wait for it)[/dim]")

    def progress(self) -> Progress:
        """What waits has not failed."""
        result = super().progress()
        return replace(result, failed=[name for name in result.failed if name not in self.waits])
