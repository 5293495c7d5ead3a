"""How the checkpoints of a stage look on the screen while they run."""

import re
from collections import Counter
from pathlib import Path

from shared.console import console
from shared.stages.results import Progress

from rich.markup import escape

MARKS = {"passed": "[green]✓[/green]", "failed": "[red]✗[/red]", "skipped": "[yellow]–[/yellow]"}
MESSAGE_LINES = 6  # of a failure: enough for the idea, too few for a dump of two tensors


class View:
    """Turns the events of `report.py` into lines on the screen and, at the end, into a Progress.

    `quiet` keeps the books without drawing, for when pytest's own output is on the screen.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.file = ""  # the test file whose heading is on the screen
        self.claims: dict[str, str] = {}
        self.wanted: Counter[str] = Counter()  # runs still to come, by test: one for each parameter
        self.ends: dict[str, list[dict]] = {}
        self.broken: dict[tuple, list[str]] = {}  # (file, line, error, code): test files that it stops

    def draw(self, text: str) -> None:
        if not self.quiet:
            console.print(text, soft_wrap=True)

    def on_collected(self, tests: list[dict]) -> None:
        self.claims = {test["id"]: test["claim"] for test in tests}
        self.wanted = Counter(test["id"] for test in tests)

    def on_broken(self, tests: str, file: str, line: int, error: str, code: str) -> None:
        self.broken.setdefault((file, line, error, code), []).append(tests)

    def on_end(self, id: str, **end) -> None:
        ends = self.ends.setdefault(id, [])
        ends.append(end)
        if len(ends) == self.wanted[id]:
            self.draw_test(id, ends)

    def draw_test(self, id: str, ends: list[dict]) -> None:
        """One line for a test, all its parameters folded, and below it why it failed."""
        if self.file != (file := id.split("::")[0]):
            self.file = file
            self.draw(f"\n[bold]{escape(file)}[/bold]")
        count = sum(end["outcome"] == "passed" for end in ends)
        folded = f" [dim]({count}/{len(ends)})[/dim]" if len(ends) > 1 else ""
        self.draw(f"  {MARKS[worst(ends)]} {escape(self.claims[id])}{folded}")
        if worst(ends) != "passed":
            end = next(end for end in ends if end["outcome"] == worst(ends))
            style = "red" if end["outcome"] == "failed" else "dim"
            where = f"  [dim]{escape(end['where'])}[/dim]" if end["where"] else ""
            lines = [f"      [{style}]{escape(line)}[/{style}]" for line in said(end["message"])]
            self.draw("\n".join(lines) + where)

    def draw_broken(self) -> None:
        """One block for each slip that keeps test files from being imported at all."""
        for (file, line, error, code), tests in self.broken.items():
            self.draw(f"\n[red]✗[/red] [bold]{escape(f'{file}, line {line}' if file else 'cannot start')}[/bold]")
            for text in [*filter(None, [code]), *said(error)]:
                self.draw(f"      [red]{escape(text)}[/red]")
            self.draw(f"      [dim]stops {escape(', '.join(tests))}[/dim]")

    def progress(self, folder: Path) -> Progress:
        """The result. Test files that could not be imported count with all the tests they define."""
        stopped = [file for files in self.broken.values() for file in files]
        texts = [(folder / file).read_text("utf-8") for file in stopped if (folder / file).is_file()]
        lost = sum(len(re.findall(r"^\s*def test_", text, re.M)) for text in texts)
        outcomes = {id: worst(ends) for id, ends in self.ends.items()}
        counts = Counter(outcomes.values())
        return Progress(
            total=len(self.wanted) + lost,
            passed=counts["passed"],
            skipped=counts["skipped"],
            failed=[*stopped, *(id for id, outcome in outcomes.items() if outcome == "failed")],
        )


def worst(ends: list[dict]) -> str:
    """The outcome of a test over all its parameters: one failure fails it, one pass beats a skip."""
    return min((end["outcome"] for end in ends), key=["failed", "passed", "skipped"].index)


def said(message: str) -> list[str]:
    """The first lines of a message, blank ones left out."""
    return [line for line in message.splitlines() if line.strip()][:MESSAGE_LINES]
