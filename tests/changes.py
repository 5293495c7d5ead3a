"""A README's "What changed" table against what changed: `uv run python tests/changes.py 03`.

Prints what the table lacks and what it has too much, and then the table as it should be, ready to paste, with the
reasons that the README already gives. `tests/test_changes.py` holds every README to it.

A row names one definition. Or it names a class and covers its methods: its status is then that of the class, "changed"
if any part of it changed. Or its definition is `(whole file)` and it covers a file that is wholly new or removed.
"""

import argparse
import re
from dataclasses import dataclass

from shared.errors import BadInput
from shared.program import run_program
from shared.stages.definitions import PSEUDO, WHOLE, Change, compare_stages, load
from shared.stages.repo import Stage, before, find

STATUSES = ("new", "changed", "removed")
HEADER = "| file | definition | new/changed/removed | why |\n|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """One row of the table, without its backticks."""

    file: str
    name: str
    status: str
    why: str = ""

    def __str__(self) -> str:
        name = self.name if self.name == WHOLE else f"`{self.name}`"
        return f"| `{self.file}` | {name} | {self.status} | {self.why} |"

    @property
    def key(self) -> tuple[str, str]:
        return self.file, self.name


def section(readme: str, title: str) -> str:
    """What stands in a README under the heading of the second level that begins with `title`, "" if none does."""
    found = re.search(rf"^## +{title}.*?$(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def parse(readme: str) -> list[Row]:
    """The rows of the table; a cell that is not there is empty."""
    rows = []
    for line in section(readme, "What changed").splitlines():
        if not line.lstrip().startswith("|"):
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:])] + 3 * [""]
        file, name, status, why = (cell.strip("`") if i < 2 else cell for i, cell in enumerate(cells[:4]))
        if file.lower() == "file" or not file.strip("-: "):
            continue  # the header and the line below it
        rows.append(Row(file, WHOLE if name in ("*", "-") else name, status, why))
    return rows


def covers(changes: list[Change], old: Stage, new: Stage) -> dict[tuple[str, str], tuple[str, list[Change]]]:
    """Every row that may be written: (file, name) -> (its status, the changes that it covers)."""
    allowed = {(change.file, change.name): (change.status, [change]) for change in changes}
    for file in dict.fromkeys(change.file for change in changes):
        mine = [change for change in changes if change.file == file]
        before, after = load(old.path / file), load(new.path / file)
        for name in {**before, **after}:
            if (after if name in after else before)[name].kind != "class":
                continue
            parts = [change for change in mine if f"{change.name}.".startswith(f"{name}.")]
            if parts:
                status = "new" if name not in before else "removed" if name not in after else "changed"
                allowed[file, name] = status, parts
        if not (old.path / file).is_file() or not (new.path / file).is_file():
            allowed[file, WHOLE] = mine[0].status, mine
    return allowed


def problems(readme: str, old: Stage, new: Stage) -> list[str]:
    """Where the table and the difference of the two stages disagree: one line each, empty if they agree."""
    changes = compare_stages(old, new)
    allowed = covers(changes, old, new)
    rows, found, covered = parse(readme), [], set()
    for row in rows:
        if row.status not in STATUSES or not row.why:
            found.append(f"unreadable: {row}  (write | file | definition | {'/'.join(STATUSES)} | why |)")
        if row.key not in allowed:
            found.append(f"surplus: {row}  (nothing of that name is new, changed or removed)")
            continue
        status, parts = allowed[row.key]
        covered.update((part.file, part.name) for part in parts)
        if status != row.status and row.status in STATUSES:
            found.append(f"wrong status: {row}  (it is {status})")
        if sum(other.key == row.key for other in rows) > 1:
            found.append(f"surplus: {row}  (the table names it twice)")
    for change in changes:
        if (change.file, change.name) not in covered and change.kind not in PSEUDO:
            found.append(f"missing: {Row(change.file, change.name, change.status)}")
    return found


def skeleton(readme: str, old: Stage, new: Stage) -> str:
    """The shortest table that is right, with the reasons that `readme` gives already."""
    whys = {row.key: row.why for row in parse(readme)}
    changes = compare_stages(old, new)
    allowed = covers(changes, old, new)
    lines, covered = [HEADER], set()
    for change in changes:
        if change.kind in PSEUDO or (change.file, change.name) in covered:
            continue
        scopes = [change.name[: dot.start()] for dot in re.finditer(r"\.", change.name)]
        for name in (WHOLE, *scopes, change.name):
            status, parts = allowed.get((change.file, name), ("changed", []))
            if parts and (status != "changed" or name == change.name):
                break
        covered.update((part.file, part.name) for part in parts)
        lines.append(str(Row(change.file, name, status, whys.get((change.file, name), ""))))
    return "\n".join(lines)


def main() -> int:
    """Exit code 1 if the README's table is not the difference."""
    parser = argparse.ArgumentParser(description="Check a README's table of changes against what changed.")
    parser.add_argument("stage", help="a stage: 3, 03 or 03_mlp")
    new = find(parser.parse_args().stage)
    old = before(new)
    if old is None:
        raise BadInput(f"{new.name} is the first stage: nothing changed before it")
    file = new.path / "README.md"
    readme = file.read_text("utf-8") if file.is_file() else ""
    found = problems(readme, old, new)
    print(*found or [f"{new.name}: the README's table is what changed since {old.name}"], sep="\n")
    if found:
        print(f"\n{skeleton(readme, old, new)}")
    return 1 if found else 0


if __name__ == "__main__":
    run_program(main)
