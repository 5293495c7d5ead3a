"""`stages watch N`: each time a file of the practice copy is saved, the checkpoints of what was changed in it."""

import argparse
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from shared.console import console, say
from shared.errors import BadInput
from shared.stages import hints, practice, repo, warm
from shared.stages.check import check, conclusion
from shared.stages.definitions import load
from shared.stages.finished import finished
from shared.stages.uses import Key

from rich.markup import escape

KEYS = 100  # milliseconds between two looks at the keyboard
SETTLED = 20  # milliseconds without another change: then a save is over


class Watch:
    """What is on the screen: the definitions whose checkpoints were run last, none of them for every checkpoint."""

    def __init__(self, stage: repo.Stage, keyboard: bool):
        self.stage, self.keyboard = stage, keyboard
        self.known = practice.exercises(stage)
        self.texts: dict[Key, str] | None = None  # what was saved last, as far as it was Python
        self.shown: list[Key] = []
        self.failed = False

    def saved(self) -> None:
        """Run the checkpoints of what was changed; if that is none, once more those that failed, or the next ones."""
        self.clear()
        try:
            left, texts = self.left(), definitions(practice.copy_of(self.stage))
            before = texts if self.texts is None else self.texts
            changed = [key for key in self.known if before.get(key) != texts.get(key)]
            self.shown = self.order(changed) or (self.shown if self.failed else left[:1])
            self.texts = texts
            self.run()
        except BadInput as error:
            console.print(f"[red]✗[/red] {escape(str(error))}", soft_wrap=True)
        self.draw_keys()

    def press(self, key: str) -> bool:
        """Do what a key says; False for the one that ends it."""
        try:
            if key == "n":
                left = self.left()
                place = max((left.index(shown) + 1 for shown in self.shown if shown in left), default=0)
                self.shown = left[place : place + 1] or left[:1]
                self.clear()
                self.run()
                self.draw_keys()
            elif key == "h" and self.shown:
                say()
                hints.hint(self.stage, self.label(self.shown[0]))
        except BadInput as error:
            console.print(f"[red]✗[/red] {escape(str(error))}", soft_wrap=True)
        return key != "q"

    def run(self) -> None:
        """Run the checkpoints, and say what comes next. Raises BadInput."""
        start, names = time.monotonic(), [self.label(key) for key in self.shown]
        title = ", ".join(names) or "every checkpoint"
        written = practice.progress(self.stage)
        console.print(f"[bold]practice/{self.stage.name}  {escape(title)}[/bold]  {written} written", soft_wrap=True)
        result = check(practice.copy_of(self.stage), plugin="waits", tests=practice.tests(self.stage, *names))
        hints.remember(self.stage, result.failed)
        self.failed = bool(result.failed)
        console.print(conclusion(title, result, time.monotonic() - start), soft_wrap=True)
        left = self.left()
        if self.failed:
            return
        if left:
            file, name = key = self.shown[0] if self.shown and self.shown[0] in left else left[0]
            row = practice.learners(self.stage, file).get(name, [None])[0]
            say(f"next: {self.label(key)} in practice/{self.stage.name}/{file}" + (f":{row.lineno}" if row else ""))
        elif self.shown:
            say("all is written" + (": n runs every checkpoint" if self.keyboard else ""))
        elif result.complete:
            say(finished(self.stage))

    def order(self, keys: list[Key]) -> list[Key]:
        """Definitions in the order in which they can be written."""
        return practice.in_order(self.stage, keys)

    def left(self) -> list[Key]:
        """What is not written yet. Raises BadInput for a broken file."""
        return self.order(practice.unwritten(self.stage))

    def label(self, key: Key) -> str:
        return practice.label(key, self.known)

    def clear(self) -> None:
        if console.is_terminal:
            console.clear()

    def draw_keys(self) -> None:
        if self.keyboard:
            console.print("\n[dim]n next definition · h hint · q quit[/dim]")


def definitions(folder: Path) -> dict[Key, str]:
    """The texts of all definitions in a folder's modules. Raises BadInput for a file that is not Python."""
    return {(f.name, name): found.text for f in sorted(folder.glob("*.py")) for name, found in load(f).items()}


@contextmanager
def keyboard() -> Iterator[Callable[[], str] | None]:
    """Yield a function that returns the key that was pressed, or "" ; None where there is no terminal.

    Keys are then not echoed and need no Enter. Afterwards the terminal is as before.
    """
    if not (sys.stdin and sys.stdin.isatty() and console.is_terminal):
        yield None
    elif os.name == "nt":
        import msvcrt

        yield lambda: msvcrt.getwch() if msvcrt.kbhit() else ""
    else:
        import termios
        import tty

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
        try:
            tty.setcbreak(number)  # Ctrl-C still interrupts
            yield lambda: os.read(number, 1).decode("ascii", "replace") if select.select([number], [], [], 0)[0] else ""
        finally:
            termios.tcsetattr(number, termios.TCSADRAIN, before)


def command(args: argparse.Namespace) -> int:
    """Follow the practice copy until q or Ctrl-C."""
    from watchfiles import PythonFilter, watch  # only here: it costs the start of every other command

    stage = repo.find(args.stage)
    folder = practice.began(stage)
    with keyboard() as key, warm.reach(stage.path.parent) or nullcontext():  # held, it does not end for being idle
        shown, first = Watch(stage, key is not None), True
        times = {"step": SETTLED, "rust_timeout": KEYS, "yield_on_timeout": True}
        for changes in watch(folder, watch_filter=PythonFilter(), **times):
            practice.began(stage)  # it may have been moved away, which is no change in it
            if changes or first:  # the first turn comes after KEYS: what is saved from then on is not missed
                shown.saved()
                first = False
            while key and (pressed := key()):
                if not shown.press(pressed):
                    return 0
    return 0


def add(subparsers) -> None:
    parser = subparsers.add_parser("watch", help="run the checkpoints of what you write, each time you save it")
    parser.add_argument("stage", metavar="N", help="a stage that you practise: 6, 06 or 06_gpt")
    parser.set_defaults(func=command)
