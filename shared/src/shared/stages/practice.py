"""`stages practice N [DEFINITION...]`: a copy of a stage in which the learner writes what the stage adds.

The copy, `practice/05_transformer/`, has the stage's trunk, tests and README. A body that is new or changed since the
stage before is a blank: signature and docstring, which say what it has to do, and `raise NotImplementedError`. Whoever
has written a body deletes that line; nothing else records what is written and what is not.
"""

import argparse
import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path

from shared.console import console, say
from shared.errors import BadInput
from shared.stages import repo
from shared.stages.blank import blanked, choose, header_end, is_blank, is_todo, targets
from shared.stages.definitions import FUNCTIONS, binds, first_line, load, parse, walk
from shared.stages.repo import Stage
from shared.stages.uses import Key, uses_of
from shared.stages.wording import wordings

# What gives the answers away, and what runs leave behind.
LEFT_OUT = shutil.ignore_patterns("traps.toml", "demos", "extras", "out", "__pycache__", ".pytest_cache")
WITHOUT = re.compile(r"^\s*(from|import) (demos|extras)\b", re.M)  # a test file that needs it stays behind too
GIVEN = ("__post_init__", "arguments", "main")  # unless they are named
UNMANAGED = "[tool.uv]\nmanaged = false  # the environment is the course's\n"  # else `uv run` would make one here
# Imports what it is told to import; where a blank stops it, prints the blank's place.
TRY = """
import importlib, sys, traceback
sys.path.insert(0, "")
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except NotImplementedError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        sys.exit(f"{frame.filename}\\n{frame.lineno}")
"""


def copy_of(stage: Stage) -> Path:
    """Where the stage is practised."""
    return stage.path.parent / "practice" / stage.name


def functions(source: str) -> dict[str, list[ast.FunctionDef]]:
    """The functions and methods of a source by qualified name; a property and its setter share one."""
    found = {}
    for node, name, _ in walk(parse(source).body):
        if isinstance(node, FUNCTIONS):
            found.setdefault(name, []).append(node)
    return found


def assigned(source: str) -> set[str]:
    """What the assignments of a source bind, by qualified name: `__radd__ = __add__` in Value is "Value.__radd__"."""
    found = set()
    for node, name, kind in walk(parse(source).body):
        if isinstance(node, ast.Assign):
            found |= {f"{name}.{bound}" if kind == "class" else bound for bound in binds(node)}
    return found


def hollow(source: str, names: Collection[str], words: Mapping[str, list[str]], old: str = "") -> str:
    """`source` with the bodies of `names` blanked; below a blank stands the body that it has in `old`, if it has one.

    Above it stands what checkpoints look for in its errors, which is in `words`.

    In `__init__` the statements that assign something stay, and with them `super().__init__()`, buffers and registered
    parts: checkpoints use attributes by name, and nobody should have to guess `tok_emb` or `norm1`. What goes is what
    is done to them afterwards, mostly how the weights start. Raises SyntaxError.
    """
    lines, before = list(io.StringIO(source, newline="")), list(io.StringIO(old, newline=""))
    earlier = functions(old)
    for node, name, _ in reversed(list(walk(parse(source).body))):
        if isinstance(node, FUNCTIONS) and name in names and not is_given(node):
            text = blanked(node, lines)
            if name in words and node.body[0].lineno != header_end(node, lines)[0]:
                text[-1:-1] = comment(words[name], node.body[0].col_offset)
            if node.name == "__init__":
                text[-1:-1] = [line for start, end in kept(node, lines) for line in lines[start:end]]
            elif len(earlier.get(name, [])) == 1 and node.body[0].lineno != header_end(node, lines)[0]:
                text += body(earlier[name][0], before)
            lines[node.lineno - 1 : node.end_lineno] = text
    return "".join(lines)


def comment(words: list[str], indent: int) -> list[str]:
    """The lines that tell the words of a definition's errors."""
    quoted = ", ".join(f'"{word}"' for word in words)
    told = f"What checkpoints look for in its errors (regular expressions): {quoted}"
    start = f"{' ' * indent}# "
    lines = textwrap.wrap(told, 120, initial_indent=start, subsequent_indent=start, break_long_words=False)
    return [f"{line}\n" for line in lines]


def is_given(node: ast.FunctionDef) -> bool:
    """Whether nothing of the function is taken out: it is empty, or an `__init__` that only assigns."""
    return is_blank(node) or (node.name == "__init__" and all(stays(child) for child in node.body))


def stays(node: ast.stmt) -> bool:
    """Whether a statement of `__init__` is given."""
    if isinstance(node, ast.Expr):
        code = ast.unparse(node)
        parts = ("super().", "self.register_", "self.add_module(", "setattr(self")
        return isinstance(node.value, ast.Constant) or code.startswith(parts)
    return any(isinstance(child, (ast.Assign, ast.AnnAssign)) for child in ast.walk(node))


def kept(node: ast.FunctionDef, lines: list[str]) -> list[tuple[int, int]]:
    """The lines of the statements that are given, from and to, with the comments above them."""
    described = ast.get_docstring(node) is not None
    above, found = node.body[0].end_lineno if described else header_end(node, lines)[0], []
    for child in node.body[described:]:
        if stays(child):
            found.append((first_line(child, lines, above) - 1, child.end_lineno))
        above = child.end_lineno
    return found


def body(node: ast.FunctionDef, lines: list[str]) -> list[str]:
    """The lines of a function below its docstring; none where it stands in its first line."""
    start = node.body[0].end_lineno if ast.get_docstring(node) is not None else header_end(node, lines)[0]
    return [] if node.body[0].lineno == header_end(node, lines)[0] else lines[start : node.end_lineno]


def graft(source: str, names: Collection[str], other: str) -> str:
    """`source` with the functions `names` as they are in `other`. Raises SyntaxError."""
    lines, theirs, given = list(io.StringIO(source, newline="")), list(io.StringIO(other, newline="")), functions(other)
    pairs = [
        (mine, new)
        for name, nodes in functions(source).items()
        for mine, new in zip(nodes, given.get(name, []), strict=False)
        if name in names
    ]
    for mine, new in sorted(pairs, key=lambda pair: -pair[0].lineno):
        lines[span(mine)] = theirs[span(new)]
    return "".join(lines)


def span(node: ast.FunctionDef) -> slice:
    """The lines of a function, its decorators included."""
    return slice(min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno)


def text(file: Path) -> str:
    """What is in a file, without the mark that some editors write before the first character."""
    return file.read_text("utf-8-sig")


def exercises(stage: Stage) -> list[Key]:
    """What can be written by a learner of the stage: new or changed, and not given."""
    nodes = {file.name: functions(text(file)) for file in stage.trunk()}
    return [(file, name) for file, name in targets(stage) if not all(map(is_given, nodes[file][name]))]


def usual(chosen: list[Key]) -> list[Key]:
    """Without what has to be named: the flags, files and words of the command line are no part of the lesson."""
    return [(file, name) for file, name in chosen if name.rpartition(".")[2] not in GIVEN]


def asked(stage: Stage) -> list[Key]:
    """What the copy was made for: all, or the definitions that were named. Raises BadInput for a broken file."""
    about = repo.settings(copy_of(stage) / "pyproject.toml").get("tool", {}).get("practice", {})
    known = exercises(stage)
    named = about.get("definitions")
    return usual(known) if named is None else [key for key in known if " ".join(key) in named]


def unwritten(stage: Stage) -> list[Key]:
    """What is still blank in the copy, or missing from it. Raises BadInput for a file that is not Python."""
    found, wanted = [], exercises(stage)
    for file in dict.fromkeys(file for file, _ in wanted):
        mine = learners(stage, file)
        aliases = assigned(text(began(stage) / file)) - {*mine}
        names = [name for other, name in wanted if other == file and name not in aliases]
        found += [(file, name) for name in names if any(map(is_open, mine.get(name, [None])))]
    return found


def learners(stage: Stage, file: str) -> dict[str, list[ast.FunctionDef]]:
    """The functions of a file of the copy. Raises BadInput where it is not Python, or not there."""
    path, where = began(stage) / file, f"practice/{stage.name}/{file}"
    try:
        return functions(text(path))
    except SyntaxError as error:
        raise BadInput(f"{where}, line {error.lineno}, is not valid Python ({error.msg}): mend it first") from None
    except (FileNotFoundError, ValueError) as error:  # ValueError: not UTF-8, or a NUL byte
        raise BadInput(f"{where} cannot be read ({error}): mend it, or copy it from {stage.name}") from None


def is_open(node: ast.FunctionDef | None) -> bool:
    """Whether a function has still to be written: it is missing, empty, or says so somewhere."""
    return node is None or is_blank(node) or any(map(is_todo, node.body))


def of_file(words: dict[Key, list[str]], file: str) -> dict[str, list[str]]:
    """The part of `wordings` that is about one file, by the names of definitions."""
    return {name: texts for (other, name), texts in words.items() if other == file}


def fresh(stage: Stage, folder: Path) -> None:
    """Write the stage's files into `folder`, without what gives answers away and without what runs leave behind."""
    # New dates for all: in a bug hunt the one file that is younger than the others would be the one with the mistake.
    shutil.copytree(stage.path, folder, ignore=LEFT_OUT, copy_function=shutil.copy, dirs_exist_ok=True)
    about = text(folder / "pyproject.toml")
    about = about if "[tool.uv]\n" in about else f"{about}\n[tool.uv]\n"
    (folder / "pyproject.toml").write_text(about.replace("[tool.uv]\n", UNMANAGED), "utf-8")
    for file in folder.glob("tests/**/*.py"):
        if WITHOUT.search(text(file)):
            file.unlink()


def make(stage: Stage, chosen: list[Key], from_previous: bool = False) -> list[Key]:
    """Make the copy with `chosen` blanked, whole or not at all: what had to be given back, or no import would work.

    Raises BadInput where a copy is already, and where none can be written.
    """
    folder = copy_of(stage)
    if folder.exists():
        go_on = f"go on with it (uv run stages check {stage.name[:2]} --practice), or move it away to start again"
        raise BadInput(f"practice/{stage.name} is there already and is never overwritten: {go_on}")
    old, given = repo.before(stage) if from_previous else None, []
    words = wordings(uses_of(stage.path))
    try:
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            new = Path(scratch) / stage.name
            fresh(stage, new)
            for file in stage.trunk():
                names = [name for other, name in chosen if other == file.name]
                before = text(old.path / file.name) if old and (old.path / file.name).is_file() else ""
                (new / file.name).write_text(hollow(text(file), names, of_file(words, file.name), before), "utf-8")
            while (stop := stopped(new)) in {*chosen} - {*given}:
                given.append(stop)
                file, name = stop
                (new / file).write_text(graft(text(new / file), [name], text(stage.path / file)), "utf-8")
            todo = json.dumps([f"{file} {name}" for file, name in chosen if (file, name) not in given])
            with (new / "pyproject.toml").open("a", encoding="utf-8") as sink:
                sink.write(f"\n[tool.practice]\ndefinitions = {todo}\n")
            new.rename(folder)
    except OSError as error:
        raise BadInput(f"cannot write {folder} ({error.strerror}): make the course's folder writable") from None
    return given


def stopped(folder: Path) -> Key | None:
    """The blank that keeps a module of the copy from being imported, found by trying; None if there is none."""
    words = [sys.executable, "-B", "-c", TRY, *(file.stem for file in sorted(folder.glob("*.py")))]
    place = subprocess.run(words, cwd=folder, capture_output=True, encoding="utf-8", errors="replace").stderr
    match = re.search(r"^(.+)\n(\d+)\n?\Z", place, re.M)
    file = Path(match[1]) if match else Path()
    if not match or file.resolve().parent != folder.resolve():
        return None
    names = functions(text(file)).items()
    row = int(match[2])
    return next(((file.name, name) for name, nodes in names for n in nodes if n.lineno <= row <= n.end_lineno), None)


def began(stage: Stage) -> Path:
    """The copy. Raises BadInput where there is none."""
    if not copy_of(stage).is_dir():
        raise BadInput(f"{stage.name} is not practised yet: uv run stages practice {stage.name[:2]}")
    return copy_of(stage)


def reset(stage: Stage, word: str) -> None:
    """Blank a definition again. Raises BadInput for an unknown name, and where it is no longer in the copy."""
    for file, name in choose(exercises(stage), [word]):
        course, mine = text(stage.path / file), began(stage) / file
        if name not in learners(stage, file):
            raise BadInput(f"practice/{stage.name}/{file} has no {name}: copy its `def` line from {stage.name}/{file}")
        words = of_file(wordings(uses_of(stage.path)), file)
        mine.write_text(graft(text(mine), [name], hollow(course, [name], words)), "utf-8")
        say(f"{name} is blank again in practice/{stage.name}/{file}")


def solution(stage: Stage, word: str) -> None:
    """Print a definition as the learner has it and as the course has it. Raises BadInput for an unknown name."""
    from rich.syntax import Syntax  # only here: it costs the start of every other command

    for file, name in choose(exercises(stage), [word]):
        learners(stage, file)  # refuses what is not Python
        for whose, path in ("yours", began(stage) / file), ("the course's", stage.path / file):
            say(f"--- {name}, {whose}: {path.relative_to(stage.path.parent).as_posix()}")
            if definition := load(path).get(name):
                code = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(definition.text)
                console.print(code, soft_wrap=True)


def tests(stage: Stage, *words: str) -> list[str]:
    """The ids of the copy's tests, in the order to pass them in; with names of definitions those that concern one.

    Raises BadInput for an unknown name and where there is no test.
    """
    uses, known = uses_of(stage.path), exercises(stage)
    asked_for = choose(known, [*filter(None, words)])
    chosen = uses.concern(asked_for) if any(words) else uses.in_order(usual(known))
    if any(words):  # a test of another file may blame what the definition is a part of
        own = {f"tests/test_{file}" for file, _ in asked_for}
        chosen = sorted(chosen, key=lambda test: test[0] not in own)
    found = [f"{file}::{name}" for file, name in chosen if (began(stage) / file).is_file()]
    if not found:
        names, number = ", ".join(words), stage.name[:2]
        raise BadInput(f"no checkpoint is about {names}: uv run stages check {number} --practice runs all")
    return found


def label(key: Key, known: list[Key]) -> str:
    """How to name a definition on the command line: "attention", or "train.main" where other files have a main too."""
    file, name = key
    return f"{file[:-3]}.{name}" if sum(name == other for _, other in known) > 1 else name


def in_order(stage: Stage, chosen: list[Key]) -> list[Key]:
    """Definitions in the order of the list that `stages practice` shows."""
    return [key for key in uses_of(stage.path).order(exercises(stage)) if key in chosen]


def next_step(stage: Stage, word: str = "") -> str:
    """One line: what to write next, `word` before others. Raises BadInput for a file that is not Python."""
    known, number = exercises(stage), stage.name[:2]
    left = in_order(stage, unwritten(stage))
    left = [key for key in left if word and key in choose(known, [word])] or left
    if not left and word:
        return f"all is written; every checkpoint: uv run stages check {number} --practice"
    if not left:
        return f"all is written; the course's own text of a definition: uv run stages check {number} --solution NAME"
    name, file = label(left[0], known), f"practice/{stage.name}/{left[0][0]}"
    return f"next: write {name} in {file}, then: uv run stages check {number} --practice {name}"


def progress(stage: Stage) -> str:
    """How many definitions are written in the stage's copy: "3/17"; "" without a copy, "?" where a file is broken."""
    if not copy_of(stage).is_dir():
        return ""
    try:
        everything, left = asked(stage), unwritten(stage)
    except (BadInput, OSError):  # the learner's file may hold anything, or be gone
        return "?"
    everything = {*everything, *left}
    return f"{len(everything) - len(left)}/{len(everything)}"


def command(args: argparse.Namespace) -> int:
    """Make the copy, list what is to be written."""
    stage = repo.find(args.stage)
    known = exercises(stage)
    chosen = in_order(stage, choose(known, args.definitions) if args.definitions else usual(known))
    given = make(stage, chosen, args.from_previous)
    todo = [key for key in chosen if key not in given]
    say(f"practice/{stage.name}: {len(todo)} definitions to write, in this order")
    for i, key in enumerate(todo, 1):
        row = learners(stage, key[0])[key[1]][0].lineno
        say(f"{i:4}  {label(key, known):40} practice/{stage.name}/{key[0]}:{row}")
    if given:
        say(f"given, because the modules cannot be imported without: {', '.join(name for _, name in given)}")
    if not args.definitions:
        say(f"given unless you name them: {', '.join(GIVEN)}")
    say("Each docstring says what its definition has to do; write it in place of `raise NotImplementedError`.")
    say(next_step(stage))
    return 0


def add(subparsers) -> None:
    parser = subparsers.add_parser("practice", help="make a copy of a stage whose new parts you write yourself")
    parser.add_argument("stage", metavar="N", help="a stage: 6, 06 or 06_gpt")
    parser.add_argument("definitions", metavar="DEFINITION", nargs="*", help="only these: attention, GPT.forward, GPT")
    parser.add_argument("--from-previous", action="store_true", help="below a changed one's blank: its previous body")
    parser.set_defaults(func=command)
