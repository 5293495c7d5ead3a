"""The definition-level difference, on which `diff`, `carry`, `practice` and the README check stand."""

import argparse
import ast
import asyncio.base_events
import dataclasses
import enum
import inspect
import textwrap
import typing
from pathlib import Path

from shared.errors import BadInput
from shared.stages.definitions import FUNCTIONS, compare, compare_stages, definitions, load, split
from shared.stages.repo import Stage, root, stages

import pytest

TRUNK = [file for stage in stages(root(Path(__file__).parent)) for file in stage.trunk()]
LIBRARY = [Path(inspect.getsourcefile(m)) for m in (argparse, ast, asyncio.base_events, dataclasses, enum, typing)]

NASTY = '''\
#!/usr/bin/env python
# licence
"""What it is.

def not_a_function(): ...
"""
from __future__ import annotations
import os; import sys

if TYPE_CHECKING:
    from pathlib import Path
try:
    import numpy
except ImportError:
    numpy = None

# Sizes.
BLOCK = 8  # characters
LEFT, (RIGHT, *REST) = 1, (2, 3)
A = 1; B = 2
TEXT = """
# no comment

class NotAClass:
    def f(self): ...
"""

# about the loop

# and directly above
@(
    first
)
@second
async def loop():
    def inner():
        return """
not indented
"""

    return inner
    # the end of loop

# about Model
@dataclass
class Model(
    Base,
    # a comment in the header
    metaclass=Meta,
):
    # above the docstring
    """A model."""

    width: int = 3

    # about f
    @overload
    def f(self): ...
    @overload
    def f(self, x): ...

    # about depth

    depth: int = 4
    if True:
        def conditional(self): ...

    class Inner:
        x = 1
        def g(self): return 1
    def f(self, x=None):
        pass
    # last words of Model

if sys.version_info > (3,):
    def conditional(): pass
else:
    def conditional(): pass
for i in range(3):
    pass
print(1)
class Empty: pass
class Error(ValueError): x = 1; y = 2
if __name__ == "__main__":
    main()
# after everything'''

NAMES = [
    ("docstring", "docstring"), ("imports", "imports"), ("BLOCK", "constant"), ("LEFT, RIGHT, REST", "constant"),
    ("A", "constant"), ("TEXT", "constant"), ("loop", "function"), ("Model", "class"), ("Model.f", "method"),
    ("Model.Inner", "class"), ("Model.Inner.g", "method"), ("conditional", "code"),
    ("module code", "code"), ("Empty", "class"), ("Error", "class"), ("main guard", "main guard"),
]  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [
        NASTY, NASTY.replace("\n", "\r\n"), NASTY.replace("\n    ", "\n\t"), "", "\n\n", "# only a comment", "x = 1",
        "\n\nx = 1\n\n\n", 'x = """\x0c\u2028\n"""\ny = 2\n', "def f(): return 1\n\x0c\ndef g(): return 2\n",
    ],
)  # fmt: skip
def test_pieces_of_nasty_sources_join_to_the_source(source):
    pieces = split(source)
    assert "".join(piece.text for piece in pieces) == source, "a piece lost or doubled text"
    lines = [line for piece in pieces for line in range(piece.start, piece.end + 1)]
    assert lines == list(range(1, len(lines) + 1)), "the line numbers of the pieces overlap or leave a gap"


@pytest.mark.parametrize("file", TRUNK + LIBRARY, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_pieces_of_real_files_join_to_the_file(file):
    source = file.read_bytes().decode("utf-8")
    pieces = split(source)
    assert "".join(piece.text for piece in pieces) == source, "a piece lost or doubled text"
    for piece in pieces:
        if piece.kind in ("function", "method"):
            body = ast.parse(f"if 1:\n{piece.code}" if piece.kind == "method" else piece.code).body
            body = body[0].body if piece.kind == "method" else body
            names = {node.name for node in body if isinstance(node, FUNCTIONS)}
            assert names == {piece.name.split(".")[-1]}, f"the piece {piece.name} is not that function, whole"
    named = {node.name for node in ast.parse(source).body if isinstance(node, (*FUNCTIONS, ast.ClassDef))}
    assert named <= set(definitions(source)), "a function or class of the module is no definition"


def test_every_definition_is_named_and_in_order():
    found = [(d.name, d.kind) for d in definitions(NASTY).values()]
    assert found == NAMES


def test_comments_and_decorators_belong_to_the_definition_below():
    found = {name: definition.text for name, definition in definitions(NASTY).items()}
    assert found["docstring"].startswith("#!/usr/bin/env python\n# licence\n")
    assert found["BLOCK"] == "# Sizes.\nBLOCK = 8  # characters\n"
    assert found["A"] == "A = 1; B = 2\n"
    assert found["loop"].startswith("# about the loop\n\n# and directly above\n@(\n    first\n)\n@second\nasync def")
    assert found["loop"].endswith("    # the end of loop\n"), "a comment inside a body belongs to the body"
    assert "BLOCK" not in found["docstring"]
    assert found["main guard"].endswith("main()\n# after everything\n")


def test_class_shell_is_the_class_without_its_methods():
    shell = definitions(NASTY)["Model"]
    assert [(piece.start, piece.end) for piece in shell.pieces] == [
        (NASTY[: NASTY.index(start)].count("\n") + 1, NASTY[: NASTY.index(end)].count("\n"))
        for start, end in [("# about Model\n", "    # about f\n"), ("    # about depth\n", "    class Inner")]
    ]
    assert "width: int = 3" in shell.text and "depth: int = 4" in shell.text and "def conditional" in shell.text
    assert "def f" not in shell.text and "# about f" not in shell.text
    assert "last words of Model" in definitions(NASTY)["Model.f"].text


def test_only_line_breaks_of_python_end_a_line():
    source = 'x = """\x0c\u2028\x1d"""\n\ndef f():\n    return 1\n'
    assert [(p.name, p.code, p.start, p.end) for p in split(source)] == [
        ("x", 'x = """\x0c\u2028\x1d"""\n', 1, 2),
        ("f", "def f():\n    return 1\n", 3, 4),
    ]


def test_overloads_and_setters_are_one_definition():
    f = definitions(NASTY)["Model.f"]
    assert len(f.pieces) == 2 and f.text.count("def f") == 3


def test_code_and_tail_put_a_piece_together():
    pieces = split("x = 1\n\n\ny = 2")
    assert [(p.code, p.tail) for p in pieces] == [("x = 1\n", "\n\n"), ("y = 2\n", "")]
    assert [(p.code, p.tail) for p in split("x = 1\r\n\r\n")] == [("x = 1\r\n", "\r\n")]


OLD = """\
import math

N = 1


def kept():
    return 1


def gone():
    return 1


class A:
    def f(self):
        return 1

    def g(self):
        return 1
"""
NEW = """\
import math
import os

N = 1



def kept():
    return 1


# why
def born():
    a = 1
    return a


class A:
    size: int = 1
    def f(self):
        return 1

    def g(self):
        x = 2
        return x
"""


def test_compare_says_what_became_of_each_definition():
    changes = compare(definitions(OLD), definitions(NEW), "m.py")
    assert [(c.file, c.name, c.status, c.counts) for c in changes] == [
        ("m.py", "imports", "changed", (1, 0)),
        ("m.py", "born", "new", (4, 0)),
        ("m.py", "A", "changed", (1, 0)),
        ("m.py", "A.g", "changed", (2, 1)),
        ("m.py", "gone", "removed", (0, 2)),
    ]
    assert changes[1].old == "" and changes[1].new.startswith("# why\ndef born")
    assert changes[-1].new == "" and changes[-1].old == "def gone():\n    return 1\n"


@pytest.mark.parametrize("name", ["docstring", "imports", "main guard"])
def test_what_is_no_definition_is_compared_too(name):
    old = '"""Old."""\n\nimport math\n\nif __name__ == "__main__":\n    main()\n'
    new = {"docstring": old.replace("Old", "New"), "imports": old.replace("math", "os"),
           "main guard": old.replace("main()", "cli(main)")}[name]  # fmt: skip
    assert [(c.name, c.kind, c.status) for c in compare(definitions(old), definitions(new))] == [
        (name, name, "changed")
    ]


def test_equal_up_to_blank_lines_means_no_change_and_nothing_else_does():
    spaced = OLD.replace("\n\n\n", "\n")
    assert compare(definitions(OLD), definitions(spaced)) == []
    words = OLD.split()
    for word in set(words):
        other = OLD.replace(word, "zzz", 1)
        try:
            changed = compare(definitions(OLD), definitions(other))
        except SyntaxError:
            continue
        assert changed, f"{word!r} was replaced and no definition noticed"


def test_compare_stages_covers_every_trunk_file(tmp_path):
    for name, files in {"01_a": {"m.py": OLD, "z.py": "X = 1\n"}, "02_b": {"m.py": NEW, "b.py": "Y = 1\n"}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text, "utf-8")
    a, b = (Stage(tmp_path / name, "", "") for name in ("01_a", "02_b"))
    found = compare_stages(a, b)
    assert [(c.file, c.name, c.status) for c in (found[0], found[-1])] == [
        ("b.py", "Y", "new"),
        ("z.py", "X", "removed"),
    ]
    assert len(found) == 7
    assert compare_stages(a, a) == []


def test_what_is_not_python_is_refused_by_name(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(textwrap.dedent("x = 1\ndef f(:\n"), "utf-8")
    with pytest.raises(BadInput, match=r"model\.py line 2 is not valid Python"):
        load(file)
    file.write_bytes(b"x = '\xff'")
    with pytest.raises(BadInput, match="not valid Python"):
        load(file)
    file.write_bytes(b"x = 1\0\n")
    with pytest.raises(BadInput, match=r"model\.py is not valid Python \(.*null bytes"):
        load(file)
    assert load(tmp_path / "none.py") == {}


def test_a_mark_before_the_first_character_is_none_of_the_text(tmp_path):
    (tmp_path / "plain.py").write_text(OLD, "utf-8")
    (tmp_path / "marked.py").write_text(OLD, "utf-8-sig")
    assert load(tmp_path / "marked.py") == load(tmp_path / "plain.py"), "the mark of some Windows editors is no change"
