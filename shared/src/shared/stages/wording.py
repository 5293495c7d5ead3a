"""The words that checkpoints look for in errors, so that nobody who writes a definition has to guess them."""

import ast
from collections import defaultdict
from collections.abc import Iterator

from shared.stages.uses import Key, Uses


def wordings(uses: Uses) -> dict[Key, list[str]]:
    """The patterns of `pytest.raises(..., match=...)`, by the definition that is called there.

    {("data.py", "windows"): ["no window"]}. What is called through a variable, `model(x)`, is nobody's: a wrong guess
    would be worse than none.
    """
    found = defaultdict(dict)
    for file, name in uses.tests():
        test = uses.modules[file].statements[name][0]
        for block in (node for node in ast.walk(test) if isinstance(node, ast.With)):
            key = called(uses, file, block)
            for item in block.items if key else ():
                found[key] |= dict.fromkeys(patterns(item.context_expr, test))
    return {key: list(texts) for key, texts in found.items() if texts}


def called(uses: Uses, file: str, block: ast.With) -> Key | None:
    """The definition of the trunk that a block calls, from the outermost call inwards."""
    for part in block.body:
        for node in ast.walk(part):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                keys = [uses.find(file, node.func.id)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                keys = [*uses.attribute(file, "", node.func)]
            else:
                continue
            if len(keys) == 1 and keys[0] and not keys[0][0].startswith("tests/"):
                return keys[0]
    return None


def patterns(call: ast.expr, test: ast.FunctionDef) -> Iterator[str]:
    """What `match` of a `pytest.raises` is: written there, or in the parameters of the test."""
    if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith("raises"):
        return
    for keyword in call.keywords:
        if keyword.arg == "match" and isinstance(keyword.value, ast.Name):
            yield from parameters(test, keyword.value.id)
        elif keyword.arg == "match":
            yield from text(keyword.value)


def parameters(test: ast.FunctionDef, name: str) -> Iterator[str]:
    """The values of a parameter of `@pytest.mark.parametrize`, as far as they are written out."""
    for mark in test.decorator_list:
        if not isinstance(mark, ast.Call) or len(mark.args) < 2 or not isinstance(mark.args[1], (ast.List, ast.Tuple)):
            continue
        names = mark.args[0]
        if isinstance(names, ast.Constant):
            names = [each.strip() for each in str(names.value).split(",")]
        else:
            names = [ast.literal_eval(each) for each in getattr(names, "elts", []) if isinstance(each, ast.Constant)]
        for value in mark.args[1].elts if name in names else ():
            parts = value.args if isinstance(value, ast.Call) else getattr(value, "elts", [value])
            if len(names) == 1:
                parts = [value.args[0] if isinstance(value, ast.Call) else value]
            yield from text(parts[names.index(name)]) if len(parts) == len(names) else ()


def text(node: ast.expr) -> Iterator[str]:
    """A string as it is written, with dots for what an f-string computes; nothing for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
