"""A Python source as its definitions: the unit in which stages are diffed, carried, practised and checked.

    split(source)        pieces in order: their texts, joined, are the source again, byte for byte
    definitions(source)  {qualified name: Definition}: all pieces of one name taken together
    compare(old, new)    which definitions are new, changed or removed

    # how tokens meet           <- a comment belongs to the definition below it
    @torch.no_grad()
    def generate(...): ...      "generate", function
    class GPT(nn.Module):       "GPT", class: header, docstring and every statement that is no method
        def forward(...): ...   "GPT.forward", method
    BLOCK = 8                   "BLOCK", constant

Four names are made up: `docstring` (the module's), `imports`, `main guard` and `module code`.
"""

import ast
import difflib
import functools
import io
from dataclasses import dataclass, replace
from pathlib import Path

from shared.errors import BadInput
from shared.stages.repo import Stage

WHOLE = "(whole file)"
PSEUDO = ("docstring", "imports", "main guard")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Piece:
    """A run of whole lines that belongs to one definition. A class shell has one piece per gap between methods."""

    name: str  # qualified: "GPT.forward"
    kind: str  # function, method, class, constant, code, or one of PSEUDO
    text: str  # the comments above, the code, the blank lines below
    start: int  # first line, counted from 1
    end: int  # last line

    @property
    def tail(self) -> str:
        """The blank lines below the code."""
        return self.text[len(self.text.rstrip()) :].partition("\n")[2]

    @property
    def code(self) -> str:
        """The text without the blank lines below it; always ends in a line break."""
        code = self.text[: len(self.text) - len(self.tail)]
        return code if code.endswith(("\n", "\r")) else code + "\n"


@dataclass(frozen=True)
class Definition:
    """Everything that a source says under one qualified name (a property's setter belongs to the property)."""

    name: str
    kind: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The code of all pieces: blank lines between definitions do not count."""
        return "".join(piece.code for piece in self.pieces)


@dataclass(frozen=True)
class Change:
    """What became of one definition. `old` and `new` are its texts, "" where it does not exist."""

    file: str
    name: str
    kind: str
    old: str
    new: str

    @property
    def status(self) -> str:
        """new, changed or removed."""
        return "new" if not self.old else "changed" if self.new else "removed"

    @property
    def counts(self) -> tuple[int, int]:
        """Lines added and lines removed."""
        old, new = self.old.splitlines(), self.new.splitlines()
        same = sum(block.size for block in difflib.SequenceMatcher(None, old, new, False).get_matching_blocks())
        return len(new) - same, len(old) - same


@functools.lru_cache(maxsize=128)  # the trunk and the tests of a stage, the trunks of its copy and of its predecessor
def parse(source: str) -> ast.Module:
    """The tree of a source, which nobody may change: it is read once. Raises SyntaxError."""
    return ast.parse(source)


def targets(node: ast.expr) -> list[str]:
    """The names that an assignment to `node` binds: `a, (b, *c)` -> ["a", "b", "c"]."""
    if isinstance(node, ast.Starred):
        return targets(node.value)
    if isinstance(node, (ast.Tuple, ast.List)):
        return [name for element in node.elts for name in targets(element)]
    return [ast.unparse(node)]


def binds(node: ast.AST) -> list[str]:
    """The names that a module-level statement binds, those inside `if`, `try`, `with` and `for` included."""
    match node:
        case ast.Assign():
            return [name for target in node.targets for name in targets(target)]
        case ast.AnnAssign() | ast.AugAssign():
            return targets(node.target)
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
    blocks = [getattr(node, field, []) for field in ("body", "handlers", "orelse", "finalbody", "cases")]
    return list(dict.fromkeys(name for block in blocks for child in block for name in binds(child)))


def label(node: ast.stmt, first: bool) -> tuple[str, str]:
    """Name and kind of a module-level statement that is neither a function nor a class."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())) if first:
            return "docstring", "docstring"
        case ast.Import() | ast.ImportFrom():
            return "imports", "imports"
        case ast.If() | ast.Try() if all(isinstance(child, (ast.Import, ast.ImportFrom)) for child in node.body):
            return "imports", "imports"  # `if TYPE_CHECKING:`, and a package that may be missing
        case ast.If() if ast.unparse(node.test) == "__name__ == '__main__'":
            return "main guard", "main guard"
        case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
            return ", ".join(binds(node)), "constant"
    return ", ".join(binds(node)) or "module code", "code"


def walk(body: list[ast.stmt], scope: str = ""):
    """Yield (statement, name, kind) for every statement that starts a definition or goes on with one."""
    for i, node in enumerate(body):
        if isinstance(node, FUNCTIONS):
            yield node, scope + node.name, "method" if scope else "function"
        elif isinstance(node, ast.ClassDef):
            yield node, scope + node.name, "class"
            yield from walk(node.body, f"{scope}{node.name}.")
        elif scope:
            yield node, scope[:-1], "class"
        else:
            yield node, *label(node, first=i == 0)


def first_line(node: ast.stmt, lines: list[str], above: int) -> int:
    """Where the statement begins, its decorators and the comments above it included.

    `above` is the last line that is taken. A comment indented deeper than the statement belongs to what is above.
    """
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    while getattr(node, "decorator_list", []) and not lines[first - 1].lstrip().startswith("@"):
        first -= 1  # `@(` on a line of its own
    for row in range(first - 1, above, -1):
        line = lines[row - 1]
        comment = line.lstrip().startswith("#")
        if line.strip() and not (comment and len(line) - len(line.lstrip()) <= node.col_offset):
            break
        if comment:
            first = row
    return first


def split(source: str) -> list[Piece]:
    """The pieces of `source`, in order and without a gap. Raises SyntaxError."""
    lines = list(io.StringIO(source, newline=""))  # the lines that ast counts; str.splitlines knows more breaks
    marks = []  # (first line, name, kind)
    above = 0
    for node, name, kind in walk(parse(source).body):
        # `a = 1; b = 2` cannot be cut in two: the line stays with `a`.
        if node.lineno > above and (not marks or name != marks[-1][1]):
            marks.append((first_line(node, lines, above), name, kind))
        above = node.lineno if isinstance(node, ast.ClassDef) else node.end_lineno
    if lines:
        marks = [(1, *marks[0][1:]), *marks[1:]] if marks else [(1, "module code", "code")]
    ends = [start - 1 for start, *_ in marks[1:]] + [len(lines)]
    return [
        Piece(name, kind, "".join(lines[start - 1 : end]), start, end)
        for (start, name, kind), end in zip(marks, ends, strict=False)
    ]


def definitions(source: str) -> dict[str, Definition]:
    """The definitions of `source` by qualified name, in the order of their first pieces. Raises SyntaxError."""
    found: dict[str, Definition] = {}
    for piece in split(source):
        known = found.get(piece.name)
        pieces = (*known.pieces, piece) if known else (piece,)
        found[piece.name] = Definition(piece.name, pieces[0].kind, pieces)
    return found


def load(path: Path) -> dict[str, Definition]:
    """The definitions of a file; none if it does not exist. Raises BadInput for what is not Python."""
    if not path.is_file():
        return {}
    try:
        return definitions(path.read_text("utf-8-sig"))  # some editors write a mark before the first character
    except (SyntaxError, ValueError) as error:  # ValueError: not UTF-8, or a NUL byte, which has no line
        where = f" line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise BadInput(f"{path.parent.name}/{path.name}{where} is not valid Python ({error}): mend it first") from None


def compare(old: dict[str, Definition], new: dict[str, Definition], file: str = "") -> list[Change]:
    """New and changed definitions in the order of `new`, then the removed ones in the order of `old`."""
    gone = [name for name in old if name not in new]
    changes = []
    for name in [*new, *gone]:
        before, after = old.get(name), new.get(name)
        texts = before.text if before else "", after.text if after else ""
        if texts[0] != texts[1]:
            changes.append(Change(file, name, (after or before).kind, *texts))
    return changes


def compare_stages(old: Stage, new: Stage) -> list[Change]:
    """What changed in the trunk from one stage to another, file by file."""
    files = sorted({path.name for path in [*old.trunk(), *new.trunk()]})
    return [change for file in files for change in compare(load(old.path / file), load(new.path / file), file)]


def fold(changes: list[Change], new: Stage) -> list[Change]:
    """The same changes as a reader takes them in: a new or removed class in one, a removed file in one (WHOLE)."""
    whole = {(change.file, change.name) for change in changes if change.status != "changed"}
    folded: dict[tuple[str, str], Change] = {}
    for change in changes:
        parts = change.name.split(".")
        scopes = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        name = next((scope for scope in scopes if (change.file, scope) in whole), change.name)
        name = name if (new.path / change.file).is_file() else WHOLE
        above = folded.get((change.file, name), replace(change, old="", new=""))
        texts = ["\n".join(filter(None, pair)) for pair in ((above.old, change.old), (above.new, change.new))]
        folded[change.file, name] = Change(change.file, name, above.kind, *texts)
    return list(folded.values())
