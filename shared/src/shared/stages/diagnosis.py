"""Why a checkpoint of a practice copy failed, in few lines: only what was seen, never a guess.

Either the idea, which is the assertion's message, and what was compared; or the definition in which an exception came
up, and what it worked on:

    the mask lets attention see the future            in attention_weights, model.py:85: scores = q @ k
    got holds nan at [0, 3], where 0.25 is expected   RuntimeError: Expected size for first two dimensions of ...
                                                      q is float64 of shape [2, 3, 5, 4]
"""

import ast
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shared.stages.checkpoints import first_words
from shared.stages.compared import WIDTH, Memory, holds_nan, is_array, show, told
from shared.stages.finished import same
from shared.stages.practice import functions
from shared.stages.uses import Uses

import pytest

LINES = 3  # of a message, of an exception's words


@dataclass
class Place:
    """A line that was running when an exception came up."""

    file: str  # "model.py", "tests/test_model.py"
    row: int
    text: str  # of the whole file
    frame: FrameType

    @property
    def in_trunk(self) -> bool:
        return "/" not in self.file

    @property
    def code(self) -> str:
        return shorten(self.text.splitlines()[self.row - 1].strip())

    @property
    def name(self) -> str:
        """The function or method that the line stands in, "Block.forward"."""
        around = [
            (node.lineno, name)
            for name, nodes in functions(self.text).items()
            for node in nodes
            if node.lineno <= self.row <= node.end_lineno
        ]
        return max(around, default=(0, "module code"))[1]

    @property
    def statement(self) -> ast.stmt:
        """The innermost statement around the line."""
        nodes = (node for node in ast.walk(ast.parse(self.text)) if isinstance(node, ast.stmt))
        return max((n for n in nodes if n.lineno <= self.row <= n.end_lineno), key=lambda node: node.lineno)

    @property
    def values(self) -> dict[str, object]:
        """The local variables that the line names, in its order."""
        here = [n for n in ast.walk(self.statement) if isinstance(n, ast.Name)]
        if hasattr(self.statement, "body"):  # an `if` or a loop: its head
            here = [node for node in here if node.lineno == self.row]
        names = [node.id for node in sorted(here, key=lambda node: (node.lineno, node.col_offset))]
        return {name: self.frame.f_locals[name] for name in names if name in self.frame.f_locals}


class Diagnosis:
    """Of the practice copy in `top`; `course` is the stage itself."""

    def __init__(self, top: Path, course: Path):
        self.top, self.course = top, course
        # As they are imported: a learner may save another text while the tests run.
        files = [*top.glob("*.py"), *top.glob("tests/**/*.py")]
        self.texts = {file: file.read_text("utf-8-sig", errors="replace") for file in files}

    def of(self, error: BaseException, test: str, memory: Memory) -> tuple[list[str], str]:
        """Why `test` ("tests/test_model.py::test_mask") failed: lines, and where if they do not say it."""
        places = self.places(error)
        if not places:  # what is reported has no line in the copy, as a strict xfail that passed
            return clipped(first_words(error)), ""
        last = places[-1]
        inner = next((place for place in reversed(places) if place.in_trunk), None)
        pair = memory.of(error, last.frame.f_code.co_filename, last.statement)
        told_by_test = not last.in_trunk and isinstance(error, (AssertionError, pytest.fail.Exception))
        if inner and not told_by_test and not (pair and last is not inner):
            lines, where, none = self.inside(error, inner, places), "", "NoneType" in str(error)
        else:
            lines = [*(message(error, pair, last) or [last.code]), *(told(pair) if pair else [])]
            lines += seen(last) if not isinstance(error, (AssertionError, pytest.fail.Exception)) and not pair else []
            where, none = f"{last.file}:{last.row}", pair.got is None if pair else "NoneType" in str(error)
            lines += nans(last) if not any("nan" in line for line in lines) else []
        return [*lines, *(self.without_return(test) if none else [])], where

    def places(self, error: BaseException) -> list[Place]:
        """The lines of the copy that were running, the innermost last."""
        found = []
        for frame, row in traceback.walk_tb(error.__traceback__):
            path = Path(frame.f_code.co_filename)
            if path in self.texts:
                found.append(Place(path.relative_to(self.top).as_posix(), row, self.texts[path], frame))
        return found

    def inside(self, error: BaseException, place: Place, places: list[Place]) -> list[str]:
        """An exception that came up in a definition: where, its words, what the line worked on, who called."""
        lines = [f"in {place.name}, {place.file}:{place.row}: {place.code}", *clipped(first_words(error)), *seen(place)]
        if self.is_given(place):
            caller = next((p for p in reversed(places[: places.index(place)]) if not self.is_given(p)), None)
            where = f"{caller.name if caller.in_trunk else 'the test'}, {caller.file}:{caller.row}" if caller else ""
            lines.append(f"{place.name} is as the course has it" + (f"; it is called from {where}" if where else ""))
        return lines

    def is_given(self, place: Place) -> bool:
        """Whether the definition is the course's own text."""
        if not place.in_trunk:
            return False
        return same(functions(place.text).get(place.name), self.theirs(place.file).get(place.name))

    def theirs(self, file: str) -> dict[str, list[ast.FunctionDef]]:
        """The course's functions of a file; none of a file that the learner has added."""
        path = self.course / file
        return functions(path.read_text("utf-8-sig")) if path.is_file() else {}

    def without_return(self, test: str) -> list[str]:
        """The definition, of those that the test reaches, which can end without a value where the course's cannot."""
        file, _, name = test.partition("::")
        far = Uses(self.top).steps((file, name))
        for file, name in sorted((key for key in far if "/" not in key[0]), key=far.get):
            mine = functions(self.texts[self.top / file]).get(name, [])
            theirs = self.theirs(file).get(name, [])
            if len(mine) == len(theirs) == 1 and gives(theirs[0]) and falls(mine[0].body) and not is_generator(mine[0]):
                if any(isinstance(node, ast.Return) for node in ast.walk(mine[0])):
                    return [f"{name} can end without a `return`: then it returns None"]
                return [f"{name} returns None: is there a `return`?"]
        return []


def falls(body: list[ast.stmt]) -> bool:
    """Whether the end of a body can be reached: a function then returns None."""
    match body[-1]:
        case ast.Return(value=value):
            return value is None
        case ast.Raise():
            return False
        case ast.If(body=first, orelse=second):
            return not second or falls(first) or falls(second)
        case ast.With(body=inner) | ast.Try(body=inner):
            return falls(inner)
        case ast.While(test=ast.Constant(value=True)) as loop:
            return any(isinstance(node, ast.Break) for node in ast.walk(loop))
    return True


def gives(node: ast.FunctionDef) -> bool:
    """Whether a function always returns a value."""
    returns = [child for child in ast.walk(node) if isinstance(child, ast.Return)]
    return all(child.value for child in returns) and bool(returns) and not falls(node.body) and not is_generator(node)


def is_generator(node: ast.FunctionDef) -> bool:
    return any(isinstance(child, (ast.Yield, ast.YieldFrom)) for child in ast.walk(node))


def message(error: BaseException, pair, last: Place) -> list[str]:
    """What the test itself says about the failure."""
    if pair and pair.error:  # torch's and numpy's own words are long
        node = last.statement
        written = node.msg.value if isinstance(node, ast.Assert) and isinstance(node.msg, ast.Constant) else ""
        return clipped(pair.idea or written)
    waited = re.match(r"DID NOT RAISE (?:<class ')?([\w.]+)", str(error))
    if isinstance(error, pytest.fail.Exception) and waited:
        return [f"{waited[1].rpartition('.')[2]} is expected, and nothing was raised", last.code]
    if isinstance(error, (AssertionError, pytest.fail.Exception)):
        words = first_words(error).removeprefix("Failed: ")
        return clipped(words) if not words.startswith(("assert ", "assertion failed")) else []
    return [last.code, *clipped(first_words(error))]


def seen(place: Place) -> list[str]:
    """The tensors that a line worked on, and what was None."""
    values = [f"{name} is {show(value)}" for name, value in place.values.items() if is_array(value) or value is None]
    return [shorten(", ".join(values))] if values else []


def nans(place: Place) -> list[str]:
    """What holds nan among the values of an assertion, unless nan is what the test is about."""
    node = place.statement
    test = functions(place.text).get(place.name, [node])[0]
    if not isinstance(node, ast.Assert) or re.search(r"nan\b", ast.unparse(test)):
        return []
    return [f"{name} holds nan" for name, value in place.values.items() if holds_nan(value)]


def clipped(text: str) -> list[str]:
    """The first lines of a text, blank ones left out."""
    return [shorten(line) for line in text.splitlines() if line.strip()][:LINES]


def shorten(line: str) -> str:
    return line if len(line) <= 4 * WIDTH else f"{line[: 4 * WIDTH]}..."
