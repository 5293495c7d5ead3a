"""`stages site FOLDER`: the course as pages that need no server and no network, to read or to put on a screen.

A stage is one page. Its README is rendered (formulas as MathML), and three things are added to it:

    What changed    each row of the table opens the two sides of the definition that it explains
    Checkpoints     every test by what it claims, folded
    Traps           the classic mistakes of traps.toml, folded, for they are what `stages bughunt` plants

The front page is the root README with a map of the files and with the ladder as a figure that can be sorted. Nothing
is written before every page is ready.
"""

import argparse
from pathlib import Path

from shared.atomic import write
from shared.console import say
from shared.errors import BadInput
from shared.stages.repo import root

SIGN = '<meta name="generator" content="stages site">'  # in site.html: such a folder may be written again


def place_for(name: str) -> Path:
    """The folder to write into. Raises BadInput for one that holds anything but an earlier site."""
    folder = Path(name)
    try:
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{folder} is a file: name a folder")
        front = folder / "index.html"
        mine = front.is_file() and SIGN in front.read_text("utf-8", errors="replace")
        if folder.is_dir() and any(folder.iterdir()) and not mine:
            raise BadInput(f"{folder} is not empty and holds no earlier site: name a new or an empty folder")
    except OSError as error:
        raise BadInput(f"cannot read {folder} ({error.strerror}): choose another folder") from None
    return folder


def command(args: argparse.Namespace) -> int:
    from shared.stages import pages  # here: no other command needs to wait for what renders Markdown and formulas

    folder = place_for(args.folder)
    site = pages.build(root())
    try:
        for name, content in site.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, content)
    except OSError as error:
        raise BadInput(f"cannot write to {folder} ({error.strerror}): choose another folder") from None
    count = sum(name.endswith(".html") for name in site)
    say(f"wrote {count} pages: open {folder / 'index.html'} in a browser")
    return 0


def add(subparsers) -> None:
    parser = subparsers.add_parser("site", help="the course as pages to read, with no server and no network")
    parser.add_argument("folder", metavar="FOLDER", help="where to: a new or empty folder, or an earlier site")
    parser.set_defaults(func=command)
