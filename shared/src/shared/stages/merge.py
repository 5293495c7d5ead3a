"""Three-way merge of a Python file, definition by definition: `base` became `theirs`, do the same to `ours`.

Unlike `git merge-file`, which compares the files as runs of lines:

- a change to a definition that `ours` does not have is dropped, not a conflict;
- a change beside it in `ours` cannot get in its way, and a similar line elsewhere cannot attract it.

Where `ours` has changed the same definition, `git merge-file` merges its text.
"""

import subprocess
import tempfile
from itertools import groupby
from pathlib import Path

from shared.stages.definitions import WHOLE, Piece, compare, definitions, split

PRESENT, DROPPED, CARRIED, MERGED, CONFLICT = "already there", "dropped", "carried", "merged", "conflict"
RANK = (PRESENT, DROPPED, CARRIED, MERGED, CONFLICT)  # the last one counts for a definition in several pieces
KEPT = "kept: differs here"  # a file that the fix deletes
SKIPPED = "skipped: only order or blank lines"

Key = tuple[str, int]  # a definition's name, and which of its pieces


def keyed(source: str) -> dict[Key, Piece]:
    """The pieces of a source by key, in order."""
    pieces: dict[Key, Piece] = {}
    for piece in split(source):
        pieces[piece.name, sum(name == piece.name for name, _ in pieces)] = piece
    return pieces


def merge_text(ours: str, base: str, theirs: str, labels: tuple[str, str], union: bool = False) -> tuple[str, str]:
    """Merge one text; what came of it. An empty text stands for none.

    With `union`, lines that both sides only added are no conflict where they meet: ours stand above theirs.
    """
    if ours == theirs:
        return ours, PRESENT
    if ours == base:
        return theirs, CARRIED
    grown = all(set(base.splitlines()) <= set(side.splitlines()) for side in (ours, theirs))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("ours", "base", "theirs")]
        for file, text in zip(files, (ours, base, theirs), strict=True):
            file.write_bytes(text.encode("utf-8"))
        names = [word for label in (labels[0], "before the fix", labels[1]) for word in ("-L", label)]
        options = ["-p", "-q", *(["--union"] if union and grown else [])]
        done = subprocess.run(["git", "merge-file", *options, *names, *files], capture_output=True)
    if not 0 <= done.returncode < 128:  # below: the number of conflicts
        raise OSError(f"git merge-file failed: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout.decode("utf-8"), CONFLICT if done.returncode else MERGED


class Parts:
    """`ours` taken apart into [key, code, blank lines below], to be replaced, taken out and put in."""

    def __init__(self, source: str):
        self.parts = [[key, piece.code, piece.tail] for key, piece in keyed(source).items()]
        self.bare = source != "" and not source.endswith(("\n", "\r"))  # no line break at the end of the file

    def find(self, key: Key) -> int | None:
        return next((i for i, part in enumerate(self.parts) if part[0] == key), None)

    def replace(self, i: int, code: str) -> None:
        """Put `code` in the place of part `i`; empty code takes the part out."""
        self.parts[i][1] = code
        if not code:
            tail = self.parts.pop(i)[2]
            if i:
                self.parts[i - 1][2] = tail

    def insert(self, key: Key, theirs: dict[Key, Piece]) -> None:
        """Put a part of `theirs` below the part that precedes it there, or else the nearest one before that."""
        piece = theirs[key]
        before = list(theirs)[: list(theirs).index(key)]
        i = next((i for other in reversed(before) if (i := self.find(other)) is not None), None)
        if i is None:
            self.parts.insert(0, [key, piece.code, piece.tail])
            return
        # What is no part of the preceding method's class must not end up in the middle of that class.
        scope = piece.name if piece.kind == "class" and key[1] else piece.name.rpartition(".")[0]
        outer = f"{scope}." if scope else ""
        inner = self.parts[i][0][0].removeprefix(outer).partition(".")[0]
        while i + 1 < len(self.parts) and f"{self.parts[i + 1][0][0]}.".startswith(f"{outer}{inner}."):
            i += 1
        self.parts.insert(i + 1, [key, piece.code, self.parts[i][2]])
        self.parts[i][2] = theirs[before[-1]].tail

    def text(self) -> str:
        text = "".join(code + tail for _, code, tail in self.parts)
        return text.removesuffix("\n").removesuffix("\r") if self.bare else text

    def sound(self) -> bool:
        """Whether the text is Python with these definitions in this order, none of them torn out of its class."""
        try:
            pieces = split(self.text())
        except SyntaxError:
            return False
        return [piece.name for piece in pieces] == [name for name, _ in groupby(key[0] for key, *_ in self.parts)]


def merge_definitions(
    ours: str, base: str, theirs: str, labels: tuple[str, str], names: list[str]
) -> tuple[str, dict[str, str]]:
    """Do to `ours` what turned the definitions `names` of `base` into those of `theirs`."""
    old, new, mine = keyed(base), keyed(theirs), Parts(ours)
    found: dict[str, str] = {}
    for key in [*new, *(key for key in old if key not in new)]:
        name, scope = key[0], key[0].rpartition(".")[0]
        before, after = (side[key].code if key in side else "" for side in (old, new))
        if before == after or name not in names:
            continue
        i = mine.find(key)
        if i is not None:
            code, what = merge_text(mine.parts[i][1], before, after, labels, union=name == "imports")
            mine.replace(i, code)
        elif before or (scope and mine.find((scope, 0)) is None):
            what = DROPPED if after else PRESENT
        else:
            mine.insert(key, new)
            what = CARRIED
        found[name] = max(found.get(name, what), what, key=RANK.index)
    if CONFLICT not in found.values() and not mine.sound():
        text, what = merge_text(ours, base, theirs, labels)
        return text, {WHOLE: what}
    return mine.text(), found


def merge(
    ours: str | None, base: str | None, theirs: str | None, labels: tuple[str, str]
) -> tuple[str | None, dict[str, str]]:
    """The merged file and what came of each changed definition, or of the WHOLE file.

    None is a file that does not exist. Raises SyntaxError where one of the three is not Python.
    """
    names = [change.name for change in compare(definitions(base or ""), definitions(theirs or ""))]
    if base == theirs:
        return ours, {}
    if ours == theirs:
        return ours, dict.fromkeys(names or [WHOLE], PRESENT)
    if ours is None and base is not None:
        return None, {WHOLE: DROPPED}
    if theirs is None:
        return (None, {WHOLE: CARRIED}) if ours == base else (ours, {WHOLE: KEPT})
    if ours == base:
        return theirs, dict.fromkeys(names if names and base is not None else [WHOLE], CARRIED)
    if not names:
        return ours, {WHOLE: SKIPPED}
    return merge_definitions(ours or "", base or "", theirs, labels, names)
