"""Every README's "What changed" table is what changed, no row more and no row less; and the check itself is checked."""

import re
from itertools import pairwise
from pathlib import Path

from shared.stages.repo import Stage, root, stages

import pytest

import changes
from changes import parse, problems, section, skeleton

STAGES = stages(root(Path(__file__).parent))
PAIRS = [(a, b) for a, b in pairwise(STAGES) if b.trunk() and (b.path / "README.md").is_file()]


@pytest.mark.parametrize("old, new", PAIRS, ids=[b.name for _, b in PAIRS])
def test_readme_table_is_what_changed(old, new):
    readme = (new.path / "README.md").read_text("utf-8")
    title = f"What changed since {old.name[:2]}"
    assert section(readme, title), f'{new.name}/README.md has no section "## {title}"'
    found = problems(readme, old, new)
    assert not found, f"uv run python tests/changes.py {new.number} prints the right table\n" + "\n".join(found)


OLD = {
    "model.py": '"""Old."""\n\nK = 1\n\nclass A:\n    def f(self): return 1\n    def g(self): return 1\n\n'
    "class B:\n    def f(self): return 1\n\ndef same(): pass\n",
    "gone.py": "def x(): pass\n\ndef y(): pass\n",
}
NEW = {
    "model.py": '"""New."""\n\nimport os\n\nK = 2\n\nclass A:\n    def f(self): return 2\n    def g(self): return 1\n'
    "    def h(self): return 1\n\nclass C:\n    n: int = 1\n    def f(self): return 1\n\ndef same(): pass\n",
    "born.py": "def z(): pass\n\ndef w(): pass\n",
}
RIGHT = """\
| `born.py` | (whole file) | new | w |
| `gone.py` | * | removed | w |
| `model.py` | `K` | changed | w |
| model.py | A.f | changed | with `a \\| b` in it |
| `model.py` | `A.h` | new | w |
| `model.py` | `C` | new | w |
| `model.py` | `B` | removed | w |
"""


@pytest.fixture
def pair(tmp_path):
    for name, files in {"01_old": OLD, "02_new": NEW}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text, "utf-8")
        (tmp_path / name / "pyproject.toml").write_text('[tool.stages]\ntitle = ""\nmain = ""\n', "utf-8")
    (tmp_path / "pyproject.toml").write_text("[tool.uv.workspace]\n", "utf-8")
    return Stage(tmp_path / "01_old", "", ""), Stage(tmp_path / "02_new", "", "")


def readme(rows: str) -> str:
    head = "| file | definition | new/changed/removed | why |\n| --- | :-- | --- | --- |\n"
    after = "\n## Run it\n\n| `z.py` | `q` | new | w |\n"
    return f"# Title\n\n| file | x |\n\n## What changed since 01\n\nWords.\n\n{head}{rows}{after}"


def test_the_right_table_has_no_problem(pair):
    assert problems(readme(RIGHT), *pair) == []


def test_only_the_section_is_read():
    assert [row.name for row in parse(readme(RIGHT))] == ["(whole file)", "(whole file)", "K", "A.f", "A.h", "C", "B"]
    assert parse("# Title\n\n## Run it\n\n| `a` | `b` | new | w |\n") == []


@pytest.mark.parametrize("row", RIGHT.splitlines(keepends=True))
def test_a_row_left_out_is_missing(pair, row):
    found = problems(readme(RIGHT.replace(row, "")), *pair)
    file = row.split("|")[1].strip(" `")
    assert found and all(line.startswith(f"missing: | `{file}` |") for line in found), found


def test_a_file_left_out_is_missed_definition_by_definition(pair):
    found = problems(readme(RIGHT.split("\n", 1)[1]), *pair)
    assert [line.rstrip(" |") for line in found] == [
        "missing: | `born.py` | `z` | new",
        "missing: | `born.py` | `w` | new",
    ]


@pytest.mark.parametrize(
    "row",
    [
        "| `model.py` | `same` | changed | w |", "| `model.py` | `A.g` | changed | w |",
        "| `model.py` | `zz` | new | w |",
        "| `other.py` | `K` | new | w |", "| `model.py` | (whole file) | changed | w |",
        "| `model.py` | `K` | changed | again |", "| `model.py` | `A.f.g` | new | w |",
    ],
)  # fmt: skip
def test_a_row_too_many_is_surplus(pair, row):
    found = problems(readme(RIGHT + row + "\n"), *pair)
    assert found and all(line.startswith("surplus: ") for line in found), found
    assert f"{parse(readme(row))[0]}" in "".join(found)


@pytest.mark.parametrize(
    "right, wrong", [("| new |", "| changed |"), ("| changed |", "| new |"), ("| removed |", "| new |")]
)
def test_a_wrong_status_is_named(pair, right, wrong):
    for row in RIGHT.splitlines():
        if right in row:
            found = problems(readme(RIGHT.replace(row, row.replace(right, wrong))), *pair)
            assert len(found) == 1 and found[0].startswith("wrong status: "), found
            assert found[0].endswith(f"(it is {right.strip('| ')})"), found


def test_a_class_covers_its_methods_with_its_own_status(pair):
    parts = "".join(line for line in RIGHT.splitlines(keepends=True) if re.search(r"A\.[fh]", line))
    both = RIGHT + "| `model.py` | `A` | changed | w |\n"
    assert problems(readme(both.replace(parts, "")), *pair) == [], (
        "A is neither new nor removed: changed covers f and h"
    )
    assert problems(readme(both), *pair) == [], "a class and its methods may both have rows"
    assert len(problems(readme(both.replace("`A` | changed", "`A` | new")), *pair)) == 1
    spelt = RIGHT.replace("| `model.py` | `C` | new | w |", "| `model.py` | `C.f` | new | w |")
    assert problems(readme(spelt), *pair) == ["missing: | `model.py` | `C` | new |  |"], (
        "a method does not cover its class"
    )


def test_made_up_definitions_need_no_row_but_may_have_one(pair):
    assert problems(readme(RIGHT + "| `model.py` | `imports` | new | w |\n"), *pair) == []
    assert len(problems(readme(RIGHT + "| `model.py` | `main guard` | new | w |\n"), *pair)) == 1


@pytest.mark.parametrize(
    "broken", ["| `model.py` | `K` | changed | |", "| `model.py` | `K` | altered | w |", "| `model.py` | `K` |"]
)
def test_a_row_without_status_or_reason_is_unreadable(pair, broken):
    found = problems(readme(RIGHT.replace("| `model.py` | `K` | changed | w |", broken)), *pair)
    assert len(found) == 1 and found[0].startswith("unreadable: | `model.py` | `K` |"), found


def test_the_skeleton_is_the_right_table_with_the_reasons_given_so_far(pair):
    empty = skeleton("", *pair)
    rows = "\n".join(empty.splitlines()[2:]).replace("|  |", "| why |") + "\n"
    assert problems(readme(rows), *pair) == []
    assert "| `model.py` | `A.f` | changed | with `a \\| b` in it |" in skeleton(readme(RIGHT), *pair)
    assert [row.key for row in parse(readme(rows))] == [row.key for row in parse(readme(RIGHT))], "one row per idea"


def test_the_command_prints_the_problems_then_the_table(pair, monkeypatch, capsys):
    old, new = pair
    monkeypatch.chdir(new.path)
    monkeypatch.setattr("sys.argv", ["changes", "2"])
    (new.path / "README.md").write_text(readme(RIGHT.replace("| `model.py` | `K` | changed | w |\n", "")), "utf-8")
    assert changes.main() == 1
    out = capsys.readouterr().out
    assert (
        out.startswith("missing: | `model.py` | `K` | changed |")
        and "| `gone.py` | (whole file) | removed | w |" in out
    )
    (new.path / "README.md").write_text(readme(RIGHT), "utf-8")
    assert changes.main() == 0
    assert capsys.readouterr().out == "02_new: the README's table is what changed since 01_old\n"
    monkeypatch.setattr("sys.argv", ["changes", "1"])
    with pytest.raises(changes.BadInput, match="first stage"):
        changes.main()
