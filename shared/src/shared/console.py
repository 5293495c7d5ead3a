"""What a run shows: a live progress line, tables, plain lines.

On a terminal the progress line is redrawn in place, at most five times a second and only from `update()`: no thread
competes with the training for a core. Where stdout is a file or a pipe, a plain line appears now and then instead.
Under `torchrun` only rank 0 speaks.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from numbers import Integral
from time import perf_counter

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")
REDRAW = 0.2  # seconds between two redraws on a terminal
PLAIN = 10.0  # seconds, and PLAIN_SHARE of the steps, between two lines elsewhere
PLAIN_SHARE = 0.1
BAR, SHORT_BAR = 20, 4  # columns of the bar, and those below which it says nothing

if hasattr(sys.stdout, "reconfigure"):
    # A character that an old Windows code page lacks must not end a run that has trained for minutes.
    sys.stdout.reconfigure(errors="replace")


def say(text: str = "", end: str = "\n") -> None:
    """Print one line, or with `end=""` a part of it, as it is: no markup, no wrapping. Fine beside a progress line."""
    console.print(text, markup=False, emoji=False, soft_wrap=True, end=end)


def number(value) -> str:
    """A number as a person reads it: 1.234, 52,100, 3.0e-04; None as "-"; anything else as its `str`."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return "-" if value is None else str(value)
    if isinstance(value, Integral):
        return f"{value:,}"
    value = float(value)
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.1e}"


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def table(title: str, rows: list[dict]) -> None:
    """Print `rows`, a column for each key in order of first appearance; numbers are formatted and set to the right.

    A cell may also be a rich renderable. Away from a terminal the table is as wide as it needs to be.
    """
    out = Table(title=Text(title), title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for key in columns:
        numeric = all(hasattr(row[key], "__float__") for row in rows if row.get(key) is not None)
        out.add_column(Text(str(key)), justify="right" if numeric else "left")
    for row in rows:
        cells = [row.get(key) for key in columns]
        out.add_row(*(cell if hasattr(cell, "__rich_console__") else Text(number(cell)) for cell in cells))
    (console if console.is_terminal else Console(width=10_000, quiet=console.quiet)).print(out)


class Progress:
    """The state behind one progress line. Made by `progress()`."""

    def __init__(self, total: int, title: str, live: Live | None = None):
        self.total, self.title, self.live = total, title, live
        self.step, self.fields = 0, {}
        self.begin = perf_counter()
        self.first = None  # (time, step, tokens) at the first update: a resumed run does not start at zero
        self.next = self.begin if live else self.begin + PLAIN  # no redraw before this time
        self.shown = 0  # the step of the last plain line

    def update(self, step: int, **fields) -> None:
        """`step` of `total` steps are done.

        `tokens` is the count since the start of training and is shown per second; `text` is shown as it is; every
        other field is shown as "name value". Fields keep their value until they are given again. They are formatted
        only when the line is redrawn: a loss may be a tensor, but a detached one, or it keeps its graph alive.
        """
        self.step = step
        self.fields.update(fields)
        now = perf_counter()
        if self.first is None:
            self.first = now, step, self.fields.get("tokens", 0)
        if now < self.next:
            return
        if self.live or abs(step - self.shown) >= PLAIN_SHARE * self.total:
            self.next, self.shown = now + (REDRAW if self.live else PLAIN), step
            self.show(now)

    def show(self, now: float) -> None:
        """Redraw the line, or print it."""
        if self.live:
            self.live.update(self.draw(now), refresh=True)
        else:
            say(self.line(now))

    def parts(self, now: float, rate: bool = True) -> list[str]:
        """What the line says after the bar, with tokens per second or without; the time left is the last."""
        parts = [f"{self.step:,}/{self.total:,}"]
        parts += [f"{key} {number(value)}" for key, value in self.fields.items() if key not in ("tokens", "text")]
        time, step, tokens = self.first or (now, 0, 0)
        if rate and "tokens" in self.fields and now > time:
            parts.append(f"{(self.fields['tokens'] - tokens) / (now - time):,.0f} tokens/s")
        parts.append(clock(now - self.begin))
        if step < self.step < self.total:
            parts.append(f"{clock((now - time) * (self.total - self.step) / (self.step - step))} left")
        return parts

    def text(self) -> list[str]:
        """The field `text`, on one line."""
        return [" ".join(str(self.fields["text"]).split())] if self.fields.get("text") else []

    def line(self, now: float) -> str:
        """The plain line."""
        return "  ".join([self.title, *self.parts(now), *self.text()])

    def draw(self, now: float) -> Table:
        """The line with its bar, as wide as the terminal: the step and the time left stay whatever the width.

        Where there is no room for all, tokens per second go first, then the bar shrinks and goes, then the time so far
        and the other fields, the last one first. `text` is cut off, and the title where nothing else helps.
        """
        parts, room = self.parts(now), console.width - len(self.title) - 1
        if len("  ".join(parts)) > room - BAR - 1:
            parts = self.parts(now, rate=False)
        bar = min(BAR, room - len("  ".join(parts)) - 1)
        bar = bar if bar >= SHORT_BAR else 0
        while len("  ".join(parts)) > room and len(parts) > 2:
            del parts[-2]
        cells = [Text(self.title, style="bold"), Text("  ".join([*parts, *self.text()]))]
        cells[0].truncate(max(1, console.width - len("  ".join(parts)) - 1), overflow="ellipsis")
        room = console.width - len(cells[0]) - 1
        if bar:
            cells.insert(1, ProgressBar(total=max(self.total, 1), completed=self.step, width=bar))
            room -= bar + 1
        cells[-1].truncate(max(1, room), overflow="ellipsis")
        grid = Table.grid(padding=(0, 1))
        grid.add_row(*cells)
        return grid


@contextmanager
def progress(total: int, title: str) -> Iterator[Progress]:
    """Show the progress of `total` steps; yields a `Progress` whose `update()` costs next to nothing between redraws.

    The last state stays on the screen. Printing through `console`, `say` or `print` meanwhile is fine, and after
    Ctrl-C or an error the cursor is back.
    """
    # FORCE_COLOR makes rich call a pipe a terminal; a pipe still must not be redrawn.
    redrawn = sys.stdout.isatty() and console.is_interactive and not console.quiet
    with Live(console=console, auto_refresh=False) if redrawn else nullcontext() as live:
        bar = Progress(total, title, live)
        try:
            yield bar
        finally:
            bar.show(perf_counter())
