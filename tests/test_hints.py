"""`stages check N --practice NAME --hint`: a question, the idea, two lines of code."""

import json

import pytest

from course import edit, finish, make, stages, write
from test_practice import NEW, OLD, TESTS, copy, fill, refused

README = """\
# 02 Second

One sentence.

## The idea

**Sums.** A net adds up what its shapes have.

**Circles.** The area of a circle grows with the square of its radius $r$:

$$a = 3 r^2$$

```
r = 2 -> 12
```

**Lengths.** Of a circle the factor that Archimedes found is for the length too.

**Nets.** Nothing else matters.

## What changed since 01_first

| file | definition | new/changed/removed | why |
|---|---|---|---|
| `model.py` | `area` | changed | of a *circle* now |
| `model.py` | `Net` | new | sums its weights |
"""
TRAP = """
[[trap]]
name = "another"
file = "model.py"
find = "sum(area(shape)"
replace = "max(area(shape)"
caught_by = "tests/test_model.py::test_total"
hint = "One of them, or all?"

[[trap]]
name = "a square"
file = "model.py"
find = "return factor * square"
replace = "return square"
caught_by = "tests/test_model.py::test_area"
hint = "What is the area of a circle with radius 1?"
"""


@pytest.fixture
def course(tmp_path):
    new = {"model.py": edit(NEW, ("Of a circle: factor r r.", "Of a circle: factor r r. Archimedes et al. (1950), 3.")),
           "tests/test_model.py": TESTS, "README.md": README, "traps.toml": TRAP}
    old = {"model.py": OLD, "tests/test_model.py": "def test_a():\n    pass\n"}
    course = make(tmp_path, {"01_first": old, "02_second": new})
    stages(course, "practice", "2")
    return course


def hint(course, *words: str) -> str:
    code, out, err = stages(course, "check", "2", "--practice", *words, "--hint")
    assert (code, err) == (0, ""), err
    return out


def test_each_time_one_more_and_the_earlier_ones_again(course):
    first, second, third, fourth = (hint(course, "area") for _ in range(4))
    asked = "area, hint 1 of 3: a question\n  What is the area of a circle with radius 1?\n"
    assert first.startswith(asked), "the question of the mistake in this definition, not of the first in the file"
    assert first.endswith("one more: uv run stages check 02 --practice area --hint\n")
    assert second.startswith(first.partition("\n\n")[0]) and "area, hint 2 of 3: the idea" in second
    assert third.startswith(second.rpartition("\n\n")[0]) and "area, hint 3 of 3: two lines of code" in third
    assert third.endswith("all of it: uv run stages check 02 --solution area\n") and fourth == third
    assert json.loads((course / ".stages/hints.json").read_text("utf-8")) == {"02_second": {"model.py area": 3}}
    assert "hint 1 of 3" in hint(course, "total") and "hint 2" not in hint(course, "Net.start")


def test_the_idea_is_the_row_the_paragraph_with_its_formula_and_the_paper(course):
    hint(course, "area")
    idea = hint(course, "area").partition("the idea\n")[2].partition("\n\none more")[0]
    assert [line.strip() for line in idea.splitlines() if line.strip()] == [
        "why: of a *circle* now",
        "**Circles.** The area of a circle grows with the square of its radius $r$:",
        "$$a = 3 r^2$$", "```", "r = 2 -> 12", "```",
        "source: Archimedes et al. (1950), 3",
    ]
    hint(course, "Net.start")
    assert "why: sums its weights" in hint(course, "Net.start"), "a class's row speaks of its methods"


def test_without_a_trap_the_first_checkpoints_claim_is_the_question(course):
    assert "Is this so with yours? A net sums its weights." in hint(course, "Net.forward")


def test_the_question_is_about_what_failed(course):
    """After a check in which a checkpoint failed, a trap that this checkpoint does not notice is beside the point."""
    fill(course, "area", "total")
    text = copy(course).read_text("utf-8")
    copy(course).write_text(edit(text, ("return factor * square", "return factor + square")), "utf-8")
    finish(course, "check", "2", "--practice", "area")
    assert "What is the area of a circle with radius 1?" in hint(course, "area"), "its checkpoint failed"
    write(course, {".stages/failed.json": '{"02_second": ["tests/test_model.py::test_total"]}'})
    assert "Is this so with yours? The total adds the areas." in hint(course, "area"), "the trap's checkpoint passed"
    copy(course).write_text(text, "utf-8")
    finish(course, "check", "2", "--practice", "area")
    assert "What is the area of a circle with radius 1?" in hint(course, "area"), "what failed earlier is forgotten"


def test_two_lines_that_the_learner_does_not_have(course):
    for _ in range(2):
        hint(course, "area")
    text = copy(course).read_text("utf-8")
    assert hint(course, "area").partition("code\n")[2].startswith("  square = r * r\n  return factor * square\n")
    blank = '(1950), 3."""\n    raise NotImplementedError\n'
    copy(course).write_text(edit(text, (blank, blank.replace("raise NotImplementedError", "square = r * r"))), "utf-8")
    assert hint(course, "area").partition("code\n")[2].startswith("  return factor * square\n\n")
    for _ in range(3):
        last = hint(course, "Net.__init__")
    start = "  for i in range(double):\n      self.start(i)\n"
    assert last.partition("code\n")[2].startswith(start), "what is given is left out"


def test_without_a_name_it_is_the_next_one_to_write(course):
    assert hint(course).startswith("area, hint 1 of 3")
    fill(course, "area")
    assert hint(course).startswith("total, hint 1 of 3") and hint(course, "Net").startswith("Net.start, hint 1 of 3")


def test_bad_input_gets_one_line(course):
    fill(course, "area", "total", "Net.__init__", "Net.start", "Net.forward")
    assert "all is written, so name one definition" in refused(course, "check", "2", "--practice", "--hint")
    assert "one of Net.__init__, Net.start" in refused(course, "check", "2", "--practice", "Net", "--hint")
    assert "did you mean area?" in refused(course, "check", "2", "--practice", "aera", "--hint")
    assert "is not practised yet" in refused(course, "check", "1", "--practice", "--hint")
    write(course, {".stages/hints.json": '{"02_second": 5}'})
    assert "hint 1 of 3" in hint(course, "area"), "a damaged record counts as none"
    copy(course).write_text("def f(x):\n    return x +\n", "utf-8")
    assert "line 2, is not valid Python" in refused(course, "check", "2", "--practice", "--hint")
