"""`stages diff A [B]`: what changed from one stage to the next, definition by definition."""

import argparse
import difflib
from pathlib import Path

from shared.atomic import write
from shared.console import console, say, table
from shared.errors import BadInput
from shared.stages import html
from shared.stages.definitions import Change, compare_stages, fold
from shared.stages.repo import Stage, before, find, root

from rich.syntax import Syntax
from rich.text import Text

COLOURS = {"new": "green", "changed": "yellow", "removed": "red"}
CONTEXT = 3  # unchanged lines around a change


def pair(first: str, second: str | None) -> tuple[Stage, Stage]:
    """The two stages to compare: `A B` as they stand, `N` alone with the stage before it. Raises BadInput."""
    new = find(second or first)
    old = find(first) if second else before(new)
    if old is None:
        raise BadInput(f"there is no stage before {new.name}: name two stages, as in `stages diff 1 2`")
    return old, new


def only(changes: list[Change], name: str, old: Stage, new: Stage) -> list[Change]:
    """The changes in one file, "model.py" or "model". Raises BadInput for a file that neither stage has."""
    files = sorted({path.name for path in [*old.trunk(), *new.trunk()]})
    name = f"{name.removesuffix('.py')}.py"
    if name not in files:
        raise BadInput(f"neither {old.name} nor {new.name} has {name!r}: choose from {', '.join(files)}")
    return [change for change in changes if change.file == name]


def overview(changes: list[Change]) -> list[dict]:
    """The rows of the table."""
    rows = []
    for change in changes:
        added, removed = change.counts
        status = Text(change.status, style=COLOURS[change.status])
        rows.append({"file": change.file, "definition": change.name, "status": status, "+": added, "-": removed})
    return rows


def lines(change: Change) -> Text:
    """The definition whole if it is new, else a unified diff of it, an ellipsis between hunks."""
    if not change.old:
        text = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(change.new)
    else:
        text = Text()
        diff = difflib.unified_diff(change.old.splitlines(), change.new.splitlines(), n=CONTEXT, lineterm="")
        for i, line in enumerate(list(diff)[2:]):
            if line.startswith("@@"):
                text.append("  ...\n" if i else "", style="dim")
            else:
                text.append(f"{line}\n", style={"+": "green", "-": "red"}.get(line[0], ""))
    text.rstrip()
    return text


def show(changes: list[Change]) -> None:
    """Print the changes file by file; of removed definitions only the names."""
    for file in dict.fromkeys(change.file for change in changes):
        mine = [change for change in changes if change.file == file]
        console.print(Text(f"\n=== {file} ===", style="bold"), soft_wrap=True)
        for change in mine:
            if change.status != "removed":
                status = change.status, COLOURS[change.status]
                console.print(Text.assemble("\n--- ", (change.name, "bold"), " ", status, " ---"), soft_wrap=True)
                console.print(lines(change), soft_wrap=True)
        removed = [change.name for change in mine if change.status == "removed"]
        if removed:
            console.print(Text(f"\nremoved: {', '.join(removed)}", style="dim"), soft_wrap=True)


def save(name: str, text: str) -> None:
    """Write the page, whole or not at all; one without a folder into the course's `out`, which git does not look at.

    Raises BadInput where it cannot be written.
    """
    file = Path(name)
    try:
        if name and name == file.name:
            file = root() / "out" / name
            file.parent.mkdir(exist_ok=True)
        if file.is_dir():
            raise BadInput(f"{file} is a folder: name a file in it")
        write(file, text)
    except OSError as error:
        raise BadInput(f"cannot write {file} ({error.strerror}): choose another path") from None
    say(f"wrote {file}")


def command(args: argparse.Namespace) -> int:
    old, new = pair(args.first, args.second)
    changes = fold(compare_stages(old, new), new)
    if args.file:
        changes = only(changes, args.file, old, new)
    if args.html is not None:
        save(args.html, html.page(old, new, changes))
    elif not changes:
        say(f"no definition {f'of {args.file} ' if args.file else ''}differs between {old.name} and {new.name}")
    else:
        table(f"{old.name} -> {new.name}: {new.title}", overview(changes))
        if not args.stat:
            show(changes)
    return 0


def add(subparsers) -> None:
    parser = subparsers.add_parser("diff", help="what changed from one stage to the next, by definition")
    parser.add_argument("first", metavar="A", help="a stage; alone: what changed in it")
    parser.add_argument("second", metavar="B", nargs="?", help="the stage to compare A with")
    parser.add_argument("--stat", action="store_true", help="only the table")
    parser.add_argument("--file", metavar="model.py", help="only this file")
    parser.add_argument("--html", metavar="FILE", help="write a page, old and new side by side; a bare name: into out/")
    parser.set_defaults(func=command)
