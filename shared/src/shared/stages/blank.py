"""A module with the bodies of some functions taken out: what a learner fills in, what no checkpoint may overlook.

    @torch.no_grad()                          @torch.no_grad()
    def sample(model, x):  # [B, T]           def sample(model, x):  # [B, T]
        '''Yields tokens.'''              ->      '''Yields tokens.'''
        while True:                               raise NotImplementedError
            yield ...

The rest of the text stays as it is, byte for byte.
"""

import ast
import difflib
import io
import tokenize
from collections.abc import Collection

from shared.errors import BadInput
from shared.stages.definitions import FUNCTIONS, compare, load, parse, walk
from shared.stages.repo import Stage, before

Target = tuple[str, str]  # ("model.py", "GPT.forward")


def targets(stage: Stage) -> list[Target]:
    """What can be blanked and is new or changed; in the first stage that is everything."""
    old = before(stage)
    found = []
    for file in stage.trunk():
        changes = compare(load(old.path / file.name) if old else {}, load(file), file.name)
        text = file.read_text("utf-8-sig")
        found += [(c.file, c.name) for c in changes if c.new and blank(text, [c.name]) != text]
    return found


def choose(found: list[Target], words: list[str]) -> list[Target]:
    """Those that are named: a definition, a class with all its methods, a file ("train", "train.main").

    Raises BadInput for an unknown one.
    """
    chosen = []
    for word in words:
        mine = [target for target in found if f"{target[1]}.".startswith(f"{word}.")]
        whole = f"{word.removesuffix('.py')}."
        mine = mine or [(file, name) for file, name in found if f"{file[:-3]}.{name}.".startswith(whole)]
        if not mine:
            known = list(dict.fromkeys(name for _, name in found))
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise BadInput(f"no function {word!r} is new or changed: {hint}")
        chosen += [target for target in mine if target not in chosen]
    return chosen or found


def blank(source: str, names: Collection[str]) -> str:
    """`source` without the bodies of the functions and methods `names`. Raises SyntaxError.

    What is blank already stays. All that has one name is blanked together, a property's setter too. A blanked generator
    raises when it is called.
    `__post_init__` does nothing instead: if it raised, no object of the class could be made, and every test that makes
    one would fail, whatever it tests.
    """
    lines = list(io.StringIO(source, newline=""))
    for node, name, _ in reversed(list(walk(parse(source).body))):
        if isinstance(node, FUNCTIONS) and name in names and not is_blank(node):
            lines[node.lineno - 1 : node.end_lineno] = blanked(node, lines)
    return "".join(lines)


def is_blank(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function has nothing to take out: a docstring, `pass`, `...`, `raise NotImplementedError`."""
    return all(
        is_todo(child) or (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)) for child in node.body
    )


def is_todo(statement: ast.stmt) -> bool:
    """Whether a statement stands where something is still to be written: `pass`, `raise NotImplementedError`."""
    todo = isinstance(statement, ast.Raise) and "NotImplementedError" in ast.unparse(statement)
    return todo or isinstance(statement, ast.Pass)


def blanked(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> list[str]:
    """The function's lines, from `def` on, without its body."""
    row, column = header_end(node, lines)
    first, start = node.body[0], node.lineno - 1
    end = "\r\n" if lines[start].endswith("\r\n") else "\n"
    body = f"{'pass' if node.name == '__post_init__' else 'raise NotImplementedError'}{end}"
    if first.lineno == row:  # `def f(x): return x`
        return [*lines[start : row - 1], f"{lines[row - 1][:column]} {body}"]
    last = first.end_lineno if ast.get_docstring(node) is not None else row
    return [*lines[start:last], " " * first.col_offset + body]


def header_end(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[int, int]:
    """Row, counted from 1, and column behind the colon that ends the function's signature."""
    depth = 0
    for token in tokenize.generate_tokens(iter(lines[node.lineno - 1 :]).__next__):
        depth += (token.string in ("(", "[", "{")) - (token.string in (")", "]", "}"))
        if token.string == ":" and depth == 0:
            return node.lineno - 1 + token.end[0], token.end[1]
    raise AssertionError("a function has a colon")
