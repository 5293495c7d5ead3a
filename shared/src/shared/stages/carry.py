"""`stages carry N`: an uncommitted fix in stage N, carried through every later stage.

Carried are the trunk and the trunk's tests (`tests/test_model.py` for `model.py`). From stage to stage: what turned the
committed text of a definition into its present text is done to the same definition of the next stage, then on from
there. What else is uncommitted in a later stage stays there. Each stage is written only when all of it is merged. At a
conflict the markers are written and the state is kept in `.stages/carry.json`, so that the carry goes on once they are
gone.
"""

import argparse
import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.atomic import write
from shared.console import say, table
from shared.errors import BadInput
from shared.stages.merge import CARRIED, CONFLICT, MERGED, merge
from shared.stages.repo import Stage, find, root, stages

MARKERS = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)


@dataclass
class State:
    """How far a carry has come."""

    fix: str  # the stage that was mended
    at: str  # the stage that the change has reached
    commit: str  # what the working files are compared with: a commit made at a conflict changes nothing
    changes: dict[str, tuple[str | None, str | None]]  # by file: its text before and after, None where it is not there


def git(top: Path, *words: str) -> bytes | None:
    """What git prints; None if it fails. Raises BadInput without git."""
    try:
        done = subprocess.run(["git", "-C", str(top), *words], capture_output=True)
    except FileNotFoundError:
        raise BadInput("git is not installed: `stages carry` needs it") from None
    return None if done.returncode else done.stdout


def decode(data: bytes, path: str, remedy: str) -> str:
    """The text of a file. Raises BadInput where it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start:,}): {remedy}") from None


class Tree:
    """The course's files as they are committed and as they are now."""

    def __init__(self, top: Path, commit: str, dry: bool):
        self.top, self.commit, self.dry = top, commit, dry
        self.prefix = (git(top, "rev-parse", "--show-prefix") or b"").decode("utf-8").strip()
        self.planned: dict[str, str | None] = {}  # what a dry run would have written

    def files(self, stage: str) -> list[str]:
        """The stage's trunk and the trunk's tests, committed or present: ["model.py", "tests/test_model.py"]."""
        listed = git(self.top, "ls-tree", "-r", "--name-only", "-z", self.commit, f"{stage}/") or b""
        folder = self.top / stage
        present = [path.relative_to(folder).as_posix() for path in [*folder.glob("*.py"), *folder.glob("tests/*.py")]]
        paths = {*present, *(path.removeprefix(f"{stage}/") for path in listed.decode("utf-8").split("\0"))}
        trunk = sorted(path for path in paths if re.fullmatch(r"[^/]+\.py", path))
        return [path for file in trunk for path in (file, f"tests/test_{file}") if path in paths]

    def committed(self, path: str) -> str | None:
        """The text at the commit, with the line ends that a checkout gives it."""
        data = git(self.top, "cat-file", "--filters", f"{self.commit}:{self.prefix}{path}")
        return None if data is None else decode(data, f"{path} as committed", "commit it as UTF-8 first")

    def present(self, path: str) -> str | None:
        """The text now. Raises BadInput where a conflict is not resolved."""
        file = self.top / path
        text = self.planned.get(path, decode(file.read_bytes(), path, "save it as UTF-8") if file.is_file() else None)
        if text and (marker := MARKERS.search(text)):
            line = text.count("\n", 0, marker.start()) + 1
            raise BadInput(f"{path} line {line} has a conflict marker: resolve the conflict first")
        return text

    def put(self, path: str, text: str | None) -> None:
        """Write or, for None, delete the file."""
        file = self.top / path
        if self.dry:
            self.planned[path] = text
        elif text is None:
            file.unlink()
        else:
            mode = file.stat().st_mode if file.is_file() else None
            file.parent.mkdir(exist_ok=True)
            write(file, text)
            if mode:
                file.chmod(mode)


def refuse_uncommitted(tree: Tree, state: State, later: list[Stage]) -> None:
    """Raises BadInput for a file that the carry may change and git does not know: it could not be undone."""
    for file in state.changes:
        for stage in later:
            path = f"{stage.name}/{file}"
            copies = (None, tree.present(f"{state.fix}/{file}"))  # not there, or carried before
            if tree.committed(path) is None and tree.present(path) not in copies:
                raise BadInput(f"{path} is not committed: commit it first")


def step(tree: Tree, state: State, onto: Stage) -> list[dict]:
    """Carry the change from the stage it has reached on to the next; returns the rows of the report."""
    rows, merged, changes = [], {}, {}
    for file, (base, theirs) in state.changes.items():
        source, target = f"{state.at}/{file}", f"{onto.name}/{file}"
        ours, committed = tree.present(target), tree.committed(target)
        change = base, theirs, (onto.name, f"{state.at} with the fix")
        try:
            text, found = merge(ours, *change)
            alone, told = merge(committed, *change) if ours != committed else (text, found)
        except SyntaxError as error:
            raise BadInput(f"{source} or {target} is not valid Python ({error}): mend it first") from None
        rows += [{"stage": onto.name, "file": file, "definition": name, "result": found[name]} for name in found]
        if text != ours:
            merged[target] = text
        if found:
            # What goes on is the change to the committed text: what was under way in `ours` stays behind. Where that is
            # a conflict, it is the change to `ours`, which a person has to finish or has made already.
            changes[file] = committed, alone
            if CONFLICT in {*found.values(), *told.values()}:
                changes[file] = ours if text != ours else committed, text
    for path, text in merged.items():
        tree.put(path, text)
    state.at, state.changes = onto.name, changes
    return rows


def proceed(top: Path, state: State, dry: bool) -> int:
    """Carry on to the last stage or the first conflict: exit code 0 or 1."""
    record = top / ".stages" / "carry.json"
    tree = Tree(top, state.commit, dry)
    reached = [stage.name for stage in stages(top) if state.fix <= stage.name <= state.at]
    for file, (base, theirs) in state.changes.items():
        if theirs and MARKERS.search(theirs):
            state.changes[file] = base, tree.present(f"{state.at}/{file}")  # refused if it is not resolved
    rows, conflicts = [], []
    for onto in stages(top):
        if onto.number > find(state.at, top).number and not conflicts:
            rows += step(tree, state, onto)
            conflicts = [row for row in rows if row["result"] == CONFLICT]
    if rows:
        table(f"{'would carry' if dry else 'carried'} the fix in {state.fix}", rows)
    for row in conflicts:
        say(f"conflict in {row['stage']}/{row['file']}, definition {row['definition']}")
    if dry:
        say("nothing was written")
    elif conflicts:
        record.parent.mkdir(exist_ok=True)
        write(record, json.dumps(asdict(state), indent=1) + "\n")
        say("choose between the marks <<<<<<< and >>>>>>>, delete the marks, then: uv run stages carry --continue")
    else:
        record.unlink(missing_ok=True)
        changed = [row["stage"] for row in rows if row["result"] in (CARRIED, MERGED)]
        numbers = dict.fromkeys(name[:2] for name in [*reached, *changed])
        say(f"done: see `git diff`, then uv run stages check {' '.join(numbers)}")
    return 1 if conflicts else 0


def begin(top: Path, stage: Stage, dry: bool) -> int:
    """A new carry of the fix in `stage`."""
    later = [other for other in stages(top) if other.number > stage.number]
    if not later:
        raise BadInput(f"{stage.name} is the last stage: there is none to carry a fix to")
    commit = git(top, "rev-parse", "--verify", "HEAD")
    if commit is None:
        raise BadInput(f"{top} has no commit to compare with: `stages carry` needs a git repository")
    state = State(stage.name, stage.name, commit.decode().strip(), {})
    tree = Tree(top, state.commit, dry)
    for file in tree.files(stage.name):
        old, new = tree.committed(f"{stage.name}/{file}"), tree.present(f"{stage.name}/{file}")
        if old != new:
            state.changes[file] = old, new
    if not state.changes:
        say(f"nothing to carry: the trunk of {stage.name} and its tests are as committed")
        return 0
    refuse_uncommitted(tree, state, later)
    return proceed(top, state, dry)


def read_state(top: Path) -> State | None:
    """The carry that stopped at a conflict, if there is one. Raises BadInput for a damaged record."""
    try:
        return State(**json.loads((top / ".stages" / "carry.json").read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise BadInput(".stages/carry.json is damaged: forget it with `stages carry --abort`") from None


def abort(top: Path, dry: bool) -> int:
    """Forget a carry that stopped at a conflict, even one whose record is damaged."""
    record = top / ".stages" / "carry.json"
    if not record.exists():
        say("nothing to forget: no carry has stopped at a conflict")
    elif dry:
        say("would forget the carry that stopped at a conflict; nothing was written")
    else:
        record.unlink()
        say("forgotten; the files stay as they are: `git diff` shows them, `git restore FILE` takes one back")
    return 0


def command(args: argparse.Namespace) -> int:
    top = root()
    if args.abort:
        return abort(top, args.dry_run)
    state = read_state(top)
    if not args.stage and not args.resume:
        raise BadInput("no stage: name the one that was mended, as in `stages carry 3`")
    stage = find(args.stage, top) if args.stage else None
    if state and stage and stage.name != state.fix:
        raise BadInput(f"the carry of {state.fix} stopped in {state.at}: finish with --continue or forget with --abort")
    if state:
        return proceed(top, state, args.dry_run)
    if args.resume:
        raise BadInput("no carry has stopped at a conflict: begin one with `stages carry N`")
    return begin(top, stage, args.dry_run)


def add(subparsers) -> None:
    parser = subparsers.add_parser("carry", help="carry an uncommitted fix in a stage through all later ones")
    parser.add_argument("stage", metavar="N", nargs="?", help="the stage that was mended")
    parser.add_argument("--dry-run", action="store_true", help="show what would be carried, write nothing")
    parser.add_argument("--continue", dest="resume", action="store_true", help="go on after a conflict is resolved")
    parser.add_argument("--abort", action="store_true", help="forget a carry that stopped at a conflict")
    parser.set_defaults(func=command)
