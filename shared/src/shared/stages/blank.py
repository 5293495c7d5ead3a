"""A module with the bodies of some functions taken out: what a learner fills in, what no checkpoint may overlook.

    @torch.no_grad()                          @torch.no_grad()
    def sample(model, x):  # [B, T]           def sample(model, x):  # [B, T]
        '''Yields tokens.'''              ->      '''Yields tokens.'''
        while True:                               raise NotImplementedError
            yield ...

The rest of the text stays as it is, byte for byte.
"""

import ast
import io
import tokenize
from collections.abc import Collection

from shared.stages.definitions import FUNCTIONS, walk


def blank(source: str, names: Collection[str]) -> str:
    """`source` without the bodies of the functions and methods `names`. Raises SyntaxError.

    What is blank already stays. All that has one name is blanked together, a property's setter too. A blanked generator
    raises when it is called.
    `__post_init__` does nothing instead: if it raised, no object of the class could be made, and every test that makes
    one would fail, whatever it tests.
    """
    lines = list(io.StringIO(source, newline=""))
    for node, name, _ in reversed(list(walk(ast.parse(source).body))):
        if isinstance(node, FUNCTIONS) and name in names and not is_blank(node):
            lines[node.lineno - 1 : node.end_lineno] = blanked(node, lines)
    return "".join(lines)


def is_blank(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function has nothing to take out: a docstring, `pass`, `...`, `raise NotImplementedError`."""
    return all(
        isinstance(child, ast.Pass)
        or (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))
        or (isinstance(child, ast.Raise) and "NotImplementedError" in ast.unparse(child))
        for child in node.body
    )


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
