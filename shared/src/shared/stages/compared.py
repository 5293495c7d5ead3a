"""What an assertion compared: remembered while the tests run, told as one sentence and a small table.

nan and inf come first, then shape and dtype, then numbers:

    got has shape [2, 3], expected [3, 2]
    got holds nan at [0, 3], where 0.25 is expected
    5 of 6 numbers differ, most at [1, 2]: by 0.83
      at        got   expected
      [0, 0]    0.5   0.25
"""

import ast
import functools
import importlib
import inspect
import math
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

# What tests compare with. The first argument is what they got, the second what they expect.
WATCHED = {
    "torch": ("equal", "allclose"),
    "torch.testing": ("assert_close",),
    "numpy": ("allclose", "array_equal"),
    "numpy.testing": ("assert_allclose", "assert_array_equal", "assert_equal"),
}
SIGNS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "is": operator.is_,
    "is not": operator.is_not,
    "in": lambda a, b: a in b,
    "not in": lambda a, b: a not in b,
}
ROWS = 4  # of a table
WIDTH = 90  # characters of a value that is shown in one line


@dataclass
class Pair:
    """Two values that are not as they should be."""

    got: object
    expected: object
    sign: str = "=="  # how they should stand to each other
    options: dict = field(default_factory=dict)  # the tolerances of the comparison
    idea: str = ""  # the message that the comparison was given
    place: tuple[str, int] = ("", 0)  # file and line that compared them
    error: BaseException | None = None  # what the comparison raised


class Memory:
    """The last comparison that failed. Nothing is watched before `watch()` and after `forget()`."""

    def __init__(self):
        self.last: Pair | None = None
        self.patch = pytest.MonkeyPatch()

    def watch(self) -> None:
        """Replace the functions of WATCHED, where their package is loaded, by such as remember."""
        for module, names in WATCHED.items():
            for name in names if module.partition(".")[0] in sys.modules else ():
                owner = importlib.import_module(module)  # numpy.testing is loaded by its first use
                self.patch.setattr(owner, name, self.remembering(getattr(owner, name)))

    def forget(self) -> None:
        self.patch.undo()
        self.last = None

    def remembering(self, compare: Callable) -> Callable:
        @functools.wraps(compare)
        def call(*args, **options):
            error, result = None, None
            try:
                result = compare(*args, **options)
                return result
            except (AssertionError, RuntimeError, ValueError) as problem:  # torch.equal of two dtypes is a RuntimeError
                error = problem
                raise
            finally:
                if len(args) > 1 and (error or result is False):
                    message = options.get("msg") or options.get("err_msg") or ""
                    idea = (message("") if callable(message) else message).strip()
                    caller = inspect.currentframe().f_back
                    place = caller.f_code.co_filename, caller.f_lineno
                    self.last = Pair(*args[:2], options=options, idea=idea, place=place, error=error)

        return call

    def compare(self, sign: str, left: object, right: object) -> None:
        """Remember `assert left == right`, which has just failed."""
        try:
            failed = sign in SIGNS and not SIGNS[sign](left, right)
        except (RuntimeError, ValueError, TypeError):  # a tensor of many numbers is neither true nor false
            failed = False
        self.last = Pair(left, right, sign) if failed else None

    def of(self, error: BaseException, file: str, statement: ast.stmt | None) -> Pair | None:
        """What was compared when `error` was raised by `statement` of `file`; None where that is not certain."""
        pair = self.last
        if pair is None or pair.error is error or not isinstance(error, AssertionError) or pair.error:
            return pair if pair and pair.error is error else None
        if not isinstance(statement, ast.Assert):
            return None
        if not pair.place[0]:
            return pair
        turned = any(isinstance(node, (ast.Not, ast.NotEq, ast.IsNot)) for node in ast.walk(statement.test))
        here = pair.place[0] == file and statement.lineno <= pair.place[1] <= statement.end_lineno
        return pair if here and not turned else None


def told(pair: Pair) -> list[str]:
    """The lines that show a pair."""
    got, (expected, options), path = pair.got, exact(pair.expected), ""
    options = options | pair.options
    if pair.sign == "==":
        got, expected, path = leaf(got, expected, options)
    where = f" at {path}" if path else ""
    if is_array(got) and (is_array(expected) or isinstance(expected, (int, float))) and pair.sign == "==":
        return [f"{line}{where}" if i == 0 else line for i, line in enumerate(arrays(got, expected, options))]
    if type(got).__name__ == "Size" and pair.sign == "==":
        return [f"got shape {show(list(got))}, expected {show(listed(expected))}{where}"]
    if not_number(got) and not not_number(expected):
        return [f"got {got}{where}, expected {relation(pair.sign)}{show(expected)}"]
    if isinstance(got, (set, frozenset)) and isinstance(expected, (set, frozenset)) and pair.sign == "==":
        parts = ("missing", expected - got), ("too many", got - expected)
        return [f"{name}{where}: {show(sorted(some, key=repr))}" for name, some in parts if some]
    if pair.sign == "in":  # `assert "lr" in message`: what the test wants stands on the left
        return [f"got      {show(expected)}", f"expected something with {show(got)} in it"]
    if pair.sign in ("!=", "is not", "not in"):
        return [f"got {show(got)}, which is what it must not be"] if pair.sign == "!=" else []
    return [f"got      {show(got, expected)}{where}", f"expected {relation(pair.sign)}{show(expected, got)}"]


def exact(expected: object) -> tuple[object, dict]:
    """What `pytest.approx` was given, with its tolerances; any other value as it is."""
    if not type(expected).__name__.startswith("Approx"):
        return expected, {}
    return expected.expected, {"rtol": expected.rel or 1e-6, "atol": expected.abs or 1e-12}


def relation(sign: str) -> str:
    return "" if sign in ("==", "is") else f"{sign} "


def leaf(got: object, expected: object, options: dict) -> tuple[object, object, str]:
    """Where two nested values first differ: both parts, and the way to them, "[2]['name']"."""
    path = ""
    while True:
        if isinstance(got, (list, tuple)) and isinstance(expected, (list, tuple)) and len(got) == len(expected):
            keys = range(len(got))
        elif isinstance(got, dict) and isinstance(expected, dict) and got.keys() == expected.keys():
            keys = got
        else:
            return got, exact(expected)[0], path
        key = next((key for key in keys if not same(got[key], expected[key], options)), None)
        if key is None or type(got).__name__ == "Size":
            return got, expected, path
        got, expected, path = got[key], expected[key], f"{path}[{key!r}]"


def same(a: object, b: object, options: dict) -> bool:
    """Whether nothing is to be shown of two values."""
    if is_array(a) and is_array(b):
        return a.shape == b.shape and not differing(numbers(a), numbers(b), options).any()
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, options) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, (int, float)) and "rtol" in options:
        return math.isclose(a, b, rel_tol=options["rtol"] or 0, abs_tol=options.get("atol") or 0)
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


def is_array(value: object) -> bool:
    """Whether it is a tensor or an array."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "ndim")


def numbers(value: object):
    """A tensor, an array or a number as numpy's array, floats as float64."""
    import numpy as np  # only where a test has loaded it

    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    value = np.asarray(value)
    return value.astype("float64") if value.dtype.kind == "f" else value


def differing(got, expected, options: dict):
    """Which numbers are not close: an array of truth values."""
    import numpy as np

    if got.dtype.kind not in "fc" and expected.dtype.kind not in "fc":
        return got != expected
    rtol, atol = (options.get(name) for name in ("rtol", "atol"))
    close = {"rtol": 1e-5 if rtol is None else rtol, "atol": 1e-7 if atol is None else atol}
    return ~np.isclose(got, expected, equal_nan=True, **close) & ~(got == expected)


def arrays(got, expected, options: dict) -> list[str]:
    """What is wrong with an array: nan and inf first, then shape and dtype, then numbers."""
    import numpy as np

    a, b = numbers(got), numbers(expected)
    if not (np.issubdtype(a.dtype, np.number) or a.dtype == bool):
        return [f"got      {show(a.tolist())}", f"expected {show(b.tolist())}"]
    lines = []
    fits = a.shape == b.shape
    for name, test in ("nan", np.isnan), ("inf", np.isinf):
        bad = test(a) & ~(test(b) if fits else False) if a.dtype.kind in "fc" else np.zeros(0)
        if bad.any():
            first = tuple(map(int, np.argwhere(bad)[0]))
            where = f" at {list(first)}" if first else ""
            wanted = f", where {b[first]:.4g} is expected" if fits else ""
            lines.append(f"got holds {name}{where}{wanted}" + (f", {bad.sum()} in all" if bad.sum() > 1 else ""))
    if not fits:
        return [*lines, f"got has shape {list(a.shape)}, expected {list(b.shape)}"]
    kinds = [str(getattr(value, "dtype", "")).removeprefix("torch.") for value in (got, expected)]
    if all(kinds) and kinds[0] != kinds[1] and options.get("check_dtype", True):
        lines.append(f"got is {kinds[0]}, expected {kinds[1]}")
    return [*lines, *([] if lines else table(a, b, options))]


def table(a, b, options: dict) -> list[str]:
    """The first numbers that differ, with the one that differs most."""
    import numpy as np

    bad = differing(a, b, options)
    bad = bad if bad.any() else a != b
    if not bad.any():
        return []
    if a.ndim == 0:
        mine, other = pair_of(a, b)
        return [f"got {mine}, expected {other}"]
    far = np.abs(a.astype("complex128" if a.dtype.kind == "c" else "float64") - b)
    most = np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(far), -1)), a.shape)
    places = [tuple(map(int, place)) for place in np.argwhere(bad)[:ROWS]]
    most = tuple(map(int, most))
    rows = [(str(list(place)), *pair_of(a[place], b[place])) for place in dict.fromkeys([*places[: ROWS - 1], most])]
    widths = [max(map(len, column)) for column in zip(("at", "got", "expected"), *rows, strict=True)]
    lines = [
        "   ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in [("at", "got", "expected"), *rows]
    ]
    head = f"{bad.sum()} of {a.size} numbers differ"
    return [f"{head}, most at {list(most)}: by {far[most]:.3g}", *(f"  {line}" for line in lines)]


def pair_of(a, b) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to tell them apart."""
    a, b = a.item(), b.item()
    if not isinstance(a, float) and not isinstance(b, float):
        return str(a), str(b)
    for digits in (4, 6, 9, 17):
        mine, other = f"{a:.{digits}g}", f"{b:.{digits}g}"
        if mine != other:
            break
    return mine, other


def holds_nan(value: object) -> bool:
    """Whether it is nan, or an array with nan in it."""
    if not is_array(value):
        return isinstance(value, float) and math.isnan(value)
    array = numbers(value)
    return array.dtype.kind == "f" and bool((array != array).any())


def not_number(value: object) -> bool:
    """Whether it is the number nan, or infinite."""
    return isinstance(value, float) and (value != value or value in (float("inf"), -float("inf")))


def listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def show(value: object, other: object = None) -> str:
    """A value in one line: cut off around the place where it begins to differ from `other`."""
    if is_array(value):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} of shape {list(value.shape)}" if value.ndim else f"{numbers(value).item():.6g}"
    text = " ".join(re.sub(" at 0x[0-9a-fA-F]+", "", repr(value)).split())
    if len(text) <= WIDTH:
        return text
    rest = " ".join(repr(other).split()) if other is not None and not is_array(other) else ""
    start = next((i for i, (x, y) in enumerate(zip(text, rest, strict=False)) if x != y), 0)
    start = max(0, start - WIDTH // 3)
    return ("..." if start else "") + text[start : start + WIDTH] + ("..." if start + WIDTH < len(text) else "")
