"""What a learner is told of the first failure: the idea, what was compared, or the definition that raised."""

import ast
import math

from shared.stages.compared import WIDTH, Memory, Pair, told

import numpy as np
import pytest
import torch

from course import finish, make, stages, write

MODEL = """\
class Net:
    def forward(self, x):
        \"\"\"Twice the sum.\"\"\"
        return twice(total(x))


def total(x):
    \"\"\"The sum.\"\"\"
    result = 0
    for value in x:
        result = result + value
    return result


def twice(x):
    \"\"\"2 x.\"\"\"
    return 2 * x


def refuse(x):
    \"\"\"Raises ValueError.\"\"\"
    raise ValueError(x)


def pick(x):
    \"\"\"The first above 0, or 0.\"\"\"
    if x:
        return x[0]
    return 0


def given(x):
    return len(x)
"""
TESTS = """\
import math
import pytest
from model import Net, given, pick, refuse, total, twice

@pytest.mark.parametrize("x", [[1, 2], [1, 2, 3]])
def test_total(x):
    \"\"\"The total is the sum.\"\"\"
    found = [total(x), "more"]
    assert found == [pytest.approx(sum(x)), "more"], "not the sum of all"

def test_net():
    \"\"\"The net doubles the sum.\"\"\"
    assert Net().forward([1, 2]) == 6, "the net does not double the sum"

def test_refuse():
    \"\"\"Nonsense is refused.\"\"\"
    with pytest.raises(ValueError):
        refuse(1)

def test_finite():
    \"\"\"The total of small numbers is a number.\"\"\"
    found = total([1.0])
    assert math.isfinite(found) and found < 2, "too large"

def test_given():
    \"\"\"What is picked has a length.\"\"\"
    given([pick([1]) + 1])

def test_pick():
    \"\"\"Of nothing, nothing is picked.\"\"\"
    assert pick([]) + 1 == 1, "nothing is 0"
"""
OLD = "def given(x):\n    return len(x)\n"


@pytest.fixture
def course(tmp_path):
    first = {"model.py": OLD, "tests/test_model.py": "def test_a(): ..."}
    second = {"model.py": MODEL, "tests/test_model.py": TESTS}
    return make(tmp_path, {"01_first": first, "02_second": second})


def shown(course, name: str, *changes: tuple[str, str]) -> list[str]:
    """The first failure that a learner sees who wrote MODEL but for these slips: the claim, then the lines below it."""
    stages(course, "practice", "2")
    mine = MODEL
    for old, new in changes:
        assert mine.count(old) == 1, f"{old!r} is not there once"
        mine = mine.replace(old, new)
    write(course, {"practice/02_second/model.py": mine})
    code, out, err = finish(course, "check", "2", "--practice", name)
    assert code == 1 and not err and out.count("✗ ") - out.count("more fail") == 1, out
    block = out.split("✗ ")[1].split("\n\n")[0].splitlines()
    return [line.strip() for line in block]


def test_the_idea_then_what_was_compared(course):
    assert shown(course, "total", ("    result = 0\n", "    result = 1\n"))[:4] == [
        "The total is the sum. (0/2)",
        "not the sum of all  tests/test_model.py:9",
        "got      4 at [0]",
        "expected 3",
    ], "the claim, the idea with its place, and the part that differs, without pytest's tolerance"


def test_an_exception_names_its_definition_and_what_the_line_worked_on(course):
    lines = shown(course, "total", ("result = result + value", "result = result @ value"))
    assert lines[1] == "in total, model.py:11: result = result @ value"
    assert lines[2:] == ["TypeError: unsupported operand type(s) for @: 'int' and 'int'"], "and nothing else is known"


def test_a_forgotten_return_is_told_wherever_its_none_goes_wrong(course):
    lines = shown(course, "Net.forward", ("    return result\n", ""))
    assert "total returns None: is there a `return`?" in lines
    assert lines[1].startswith("in twice, model.py"), "the exception came up elsewhere, and that is said too"
    assert "x is None" in lines, "what the line worked on"
    assert "twice is as the course has it; it is called from the test, tests/test_model.py:13" in lines, lines


def test_a_return_on_some_ways_only(course):
    lines = shown(course, "pick", ("        return x[0]\n    return 0\n", "        return x[0]\n"))
    assert lines[-1] == "pick can end without a `return`: then it returns None"


def test_of_what_is_right_nothing_is_said(course):
    """A None that is no definition's is not laid at the door of one."""
    lines = shown(course, "pick", ("        return x[0]\n", "        return None or x.nothing\n"))
    assert lines[2] == "AttributeError: 'list' object has no attribute 'nothing'"
    assert not any("return`" in line for line in lines), lines


def test_a_definition_of_the_course_names_its_caller(course):
    lines = shown(course, "total", ("return twice(total(x))", "return twice({} | {1: total(x)})"))
    assert lines[1].startswith("in twice, model.py:17: return 2 * x") and "TypeError" in lines[2], lines
    assert lines[3] == "twice is as the course has it; it is called from Net.forward, model.py:4", lines


def test_nan_is_said_in_words_also_of_a_plain_assertion(course):
    lines = shown(course, "total", ("    return result\n", "    return result * float('nan')\n"))
    assert lines[2].startswith("got nan at [0], expected 3"), "nan in what was compared"
    lines = shown_again(course, TESTS.replace('[[1, 2], [1, 2, 3]]', "[]"))
    assert lines[1:] == ["too large  tests/test_model.py:23", "found holds nan"], "nan in a name of the assertion"


def shown_again(course, tests: str) -> list[str]:
    """The first failure with other tests."""
    write(course, {"practice/02_second/tests/test_model.py": tests.replace("test_net", "net")})
    out = finish(course, "check", "2", "--practice", "total")[1]
    return [line.strip() for line in out.split("✗ ")[1].split("\n\n")[0].splitlines()]


def test_what_is_compared_by_numpy_and_torch_is_shown_too(course):
    tests = "import numpy as np\nfrom model import total\n\n\ndef test_close():\n"
    tests += '    assert np.allclose([1, total([1, 2])], [1, 3]), "the second is wrong"\n'
    write(course, {"02_second/tests/test_model.py": tests})
    lines = shown(course, "total", ("    result = 0\n", "    result = 1\n"))
    assert lines[1:] == ["the second is wrong  tests/test_model.py:6", "got      4 at [1]", "expected 3"], lines


def test_what_should_have_been_refused_was_not(course):
    lines = shown(course, "refuse", ("    raise ValueError(x)\n", "    return x\n"))
    assert lines[1:] == [
        "ValueError is expected, and nothing was raised  tests/test_model.py:17",
        "with pytest.raises(ValueError):",
    ]


def test_verbose_brings_tracebacks_and_no_table(course):
    shown(course, "total", ("    result = 0\n", "    result = 1\n"))
    out = finish(course, "check", "2", "--practice", "total", "--verbose")[1]
    assert "✗" not in out and ">       assert found == [" in out and "got      4" not in out


@pytest.fixture
def memory():
    memory = Memory()
    memory.watch()
    yield memory
    memory.forget()


def wrong(memory, compare, *values, **options) -> list[str]:
    """The lines told of a comparison that fails."""
    memory.last = None
    try:
        result = compare(*values, **options)
    except (AssertionError, RuntimeError):
        result = False
    assert result is False and memory.last is not None, "it was not remembered"
    return told(memory.last)


def test_what_is_watched_is_remembered_and_forgotten(memory):
    near = torch.tensor([1.0, 2.0])
    for compare in (torch.equal, torch.allclose, np.allclose, np.array_equal, np.testing.assert_allclose):
        assert wrong(memory, compare, near, near + 1)[0].startswith("2 of 2 numbers differ"), compare
    memory.forget()
    assert not hasattr(torch.equal, "__wrapped__") and memory.last is None, "the process goes on with torch as it was"


def test_shape_and_dtype_come_before_numbers(memory):
    close = lambda *pair: wrong(memory, torch.testing.assert_close, *pair)  # noqa: E731
    assert close(torch.ones(2, 3), torch.ones(3, 2)) == ["got has shape [2, 3], expected [3, 2]"]
    assert close(torch.ones(2), torch.ones(2).double()) == ["got is float32, expected float64"]
    assert wrong(memory, torch.allclose, torch.ones(2), torch.ones(2).double()) == ["got is float32, expected float64"]


def test_nan_and_inf_come_first_unless_they_are_expected(memory):
    got, expected = torch.ones(2, 3), torch.ones(2, 3)
    got[1, 2] = got[1, 1] = math.nan
    lines = wrong(memory, torch.testing.assert_close, got, expected)
    assert lines == ["got holds nan at [1, 1], where 1 is expected, 2 in all"]
    expected[1], got[0, 0] = math.nan, math.inf
    got[1] = math.nan
    lines = wrong(memory, torch.testing.assert_close, got, expected, equal_nan=True)
    assert lines == ["got holds inf at [0, 0], where 1 is expected"], "nan that is expected is no mistake"
    assert told(Pair(math.nan, 3, "<")) == ["got nan, expected < 3"]
    assert wrong(memory, torch.testing.assert_close, got[0], torch.ones(4))[0] == "got holds inf at [0]"


def test_the_table_has_the_first_numbers_that_differ_and_the_largest_difference(memory):
    expected = torch.arange(12.0).view(3, 4)
    got = expected.clone()
    got[:2, 1:], got[2, 3] = got[:2, 1:] + 1e-3, 20.0
    lines = wrong(memory, torch.testing.assert_close, got, expected)
    assert lines[0] == "7 of 12 numbers differ, most at [2, 3]: by 9"
    rows = [line.split() for line in lines[1:]]
    assert rows[0] == ["at", "got", "expected"]
    assert ["".join(row[:2]) for row in rows[1:]] == ["[0,1]", "[0,2]", "[0,3]", "[2,3]"]
    assert rows[1][2:] == ["1.001", "1"]
    assert wrong(memory, torch.testing.assert_close, got[:, 0], got[:, 0] + 1e-4)[2].split()[1:] == ["0", "0.0001"]


def test_parts_of_lists_and_dicts_are_found():
    one, two = {"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 3.0}]}
    assert told(Pair(one, two)) == ["got      2.0 at ['a'][1]['b']", "expected 3.0"]
    assert told(Pair([1, 2], [1, 2, 3])) == ["got      [1, 2]", "expected [1, 2, 3]"]
    assert told(Pair({1, 2}, {2, 3})) == ["missing: [3]", "too many: [1]"]
    assert told(Pair(torch.ones(2).shape, (3,))) == ["got shape [2], expected [3]"]
    near = told(Pair([0.1 + 0.2, 5.0], pytest.approx([0.3, 6.0])))
    assert near[0] == "got      5.0 at [1]", "what is close is no mistake"


def test_a_long_text_is_cut_around_the_difference():
    text = "a" * 300
    got, expected = told(Pair(f"{text}b{text}", f"{text}c{text}"))
    assert "aab" in got and "aac" in expected and len(got) < WIDTH + 20


def statement(text: str):
    return ast.parse(text).body[0]


def test_only_the_comparison_of_the_assertion_that_failed_is_shown(memory):
    """Not one that was allowed to fail before it, and none that had to fail."""
    one, two, error, here = torch.ones(2), torch.zeros(2), AssertionError(), __file__
    assert not torch.equal(one, two)
    line = memory.last.place[1]
    assert memory.of(error, here, ast.increment_lineno(statement("assert torch.equal(one, two)"), line - 1)) is not None
    assert memory.of(error, here, ast.increment_lineno(statement("assert torch.equal(one, two)"), line)) is None
    assert memory.of(error, "other.py", ast.increment_lineno(statement("assert same"), line - 1)) is None
    turned = ast.increment_lineno(statement("assert not torch.equal(one, two) and other"), line - 1)
    assert memory.of(error, here, turned) is None, "that they differ is what is wanted"
    memory.compare("==", 1, 1)
    assert memory.last is None, "pytest shows the last part of a chain also where another one failed"
