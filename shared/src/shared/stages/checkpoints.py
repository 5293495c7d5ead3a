"""A pytest plugin: each checkpoint is shown by what it claims, as soon as it has run.

It draws in the place of pytest's own report, which `-v` brings back. In the end it writes what it knows as JSON into
the file that $STAGES_RESULT names:

    {"progress": {"total": 3, "passed": 2, "skipped": 0, "failed": ["tests/test_model.py::test_mask"]},
     "ends": {"tests/test_model.py::test_mask": [{"outcome": "failed", "message": "...", "where": "model.py:12"}]},
     "broken": {"tests/test_data.py": "SyntaxError: invalid syntax"}}

A parametrised test is one checkpoint, with one end for each parameter. Broken are test files that cannot be imported,
mostly because of a slip in the module they test.
"""

import json
import os
import re
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.atomic import write
from shared.console import Console
from shared.stages.results import Progress

import pytest
from rich.live import Live
from rich.markup import escape
from rich.text import Text

MARKS = {"passed": "[green]✓[/green]", "failed": "[red]✗[/red]", "skipped": "[yellow]–[/yellow]"}
MESSAGE_LINES = 6  # of a failure: enough for the idea, too few for a dump of two tensors


@dataclass
class End:
    """How one run of a test ended."""

    outcome: str = "passed"  # or failed, or skipped
    message: str = ""
    where: str = ""  # "model.py:12"


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    configure(config, Checkpoints)


def configure(config, Plugin) -> None:
    """Let `Plugin` take the place of pytest's report, unless that was asked for."""
    verbose = config.option.verbose > 0
    if not verbose:
        config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(Plugin(config.rootpath, quiet=verbose))


class Checkpoints:
    """The books of one run, and its lines on the screen. `quiet` keeps the books without drawing."""

    def __init__(self, top: Path, quiet: bool):
        self.top, self.quiet = top, quiet
        self.file = ""  # the test file whose heading is on the screen
        self.claims: dict[str, str] = {}
        self.wanted: Counter[str] = Counter()  # runs of each test: one for each parameter
        self.ends: dict[str, list[End]] = {}
        self.broken: dict[tuple, list[str]] = {}  # (file, line, code, error): the test files that it stops
        # A console of its own, because the tests may print through the shared one. Redrawn between tests only, when
        # pytest does not capture what is printed, and without a thread: a test may fork.
        self.screen = Console(highlight=False, quiet=quiet)
        self.live = Live(
            console=self.screen, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def pytest_sessionstart(self):
        self.live.start()
        self.now("collecting the checkpoints")

    def pytest_exception_interact(self, node, call, report):
        """A test file that cannot be imported."""
        if isinstance(report, pytest.CollectReport):
            error = call.excinfo.value.__cause__ or call.excinfo.value  # pytest wraps what went wrong
            slip = *place(error, self.top), first_words(error)
            self.broken.setdefault(slip, []).append(node.nodeid)

    def pytest_collection_finish(self, session):
        self.claims = {test_id(item): claim(item) for item in session.items}
        self.wanted = Counter(map(test_id, session.items))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        """One run of a test, from set-up to tear-down: the worst of the three is its end."""
        name = test_id(item)
        self.now(self.claims[name])
        ends = self.ends.setdefault(name, [])
        ends.append(End())
        result = yield
        if len(ends) == self.wanted[name]:
            self.draw_test(name, ends)
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        """Remember a failure with its message and place, or a skip with its reason."""
        report = yield
        end, error = self.ends[test_id(item)][-1], call.excinfo and call.excinfo.value
        if report.failed and end.outcome != "failed":
            end.outcome = "failed"
            end.message = first_words(error) if error else str(report.longrepr)  # a strict xfail that passed
            file, line, _ = place(error, self.top) if error else ("", 0, "")
            end.where = f"{file}:{line}" if file else ""
        elif report.skipped and end.outcome == "passed":
            end.outcome, end.message = "skipped", str(error or getattr(report, "wasxfail", ""))
        return report

    def pytest_sessionfinish(self):
        self.live.stop()
        self.draw_broken()
        if os.environ.get("STAGES_RESULT"):
            result = {
                "progress": asdict(self.progress()),
                "ends": {name: list(map(asdict, ends)) for name, ends in self.ends.items()},
                "broken": {file: error for (*_, error), files in self.broken.items() for file in files},
            }
            write(Path(os.environ["STAGES_RESULT"]), json.dumps(result))

    def now(self, text: str) -> None:
        """Show what is being done, on a terminal."""
        self.live.update(Text(text, style="dim", no_wrap=True, overflow="ellipsis"), refresh=True)

    def draw(self, text: str) -> None:
        self.screen.print(text, soft_wrap=True)

    def draw_test(self, name: str, ends: list[End]) -> None:
        """One line for a test, all its parameters folded, and below it why it failed."""
        if self.file != (file := name.split("::")[0]):
            self.file = file
            self.draw(f"\n[bold]{escape(file)}[/bold]")
        end = worst(ends)
        count = sum(end.outcome == "passed" for end in ends)
        folded = f" [dim]({count}/{len(ends)})[/dim]" if len(ends) > 1 else ""
        self.draw(f"  {MARKS[end.outcome]} {escape(self.claims[name])}{folded}")
        if end.outcome != "passed":
            style = "red" if end.outcome == "failed" else "dim"
            where = f"  [dim]{escape(end.where)}[/dim]" if end.where else ""
            self.draw("\n".join(f"      [{style}]{escape(line)}[/{style}]" for line in said(end.message)) + where)

    def draw_broken(self) -> None:
        """One block for each slip that keeps test files from being imported at all."""
        for (file, line, code, error), tests in self.broken.items():
            self.draw(f"\n[red]✗[/red] [bold]{escape(f'{file}, line {line}' if file else 'cannot start')}[/bold]")
            for text in [*filter(None, [code]), *said(error)]:
                self.draw(f"      [red]{escape(text)}[/red]")
            self.draw(f"      [dim]stops {escape(', '.join(tests))}[/dim]")

    def progress(self) -> Progress:
        """The result. Test files that could not be imported count with all the tests they define."""
        stopped = [file for files in self.broken.values() for file in files]
        texts = [(self.top / file).read_text("utf-8") for file in stopped if (self.top / file).is_file()]
        lost = sum(len(re.findall(r"^\s*def test_", text, re.M)) for text in texts)
        outcomes = {name: worst(ends).outcome for name, ends in self.ends.items()}
        counts = Counter(outcomes.values())
        return Progress(
            total=len(self.wanted) + lost,
            passed=counts["passed"],
            skipped=counts["skipped"],
            failed=[*stopped, *(name for name, outcome in outcomes.items() if outcome == "failed")],
        )


def test_id(item) -> str:
    """The test's id without its parameters: `tests/test_a.py::test_b[3]` -> `tests/test_a.py::test_b`."""
    return item.nodeid.split("[")[0]


def claim(item) -> str:
    """The first line of the test's docstring, or its name."""
    text = (getattr(item.obj, "__doc__", None) or "").strip()
    return text.splitlines()[0] if text else item.name.split("[")[0]


def worst(ends: list[End]) -> End:
    """What a test came to over all its parameters: one failure fails it, one pass beats a skip."""
    return min(ends, key=lambda end: ["failed", "passed", "skipped"].index(end.outcome))


def said(message: str) -> list[str]:
    """The first lines of a message, blank ones left out."""
    return [line for line in message.splitlines() if line.strip()][:MESSAGE_LINES]


def first_words(error: BaseException) -> str:
    """What an exception says: an assertion's own message, without pytest's explanation below it."""
    text = str(error).split("\nassert ")[0].strip()
    if isinstance(error, AssertionError):
        return text or "assertion failed"
    if isinstance(error, SyntaxError):
        text = error.msg
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place(error: BaseException, top: Path) -> tuple[str, int, str]:
    """File, line number and code where `error` came up: the deepest frame in `top`, or ("", 0, "")."""
    frames = [(frame.filename, frame.lineno, frame.line) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno, error.text))
    for file, line, code in reversed(frames):
        if Path(file).is_relative_to(top):
            return Path(file).relative_to(top).as_posix(), line or 0, (code or "").strip()
    return "", 0, ""
