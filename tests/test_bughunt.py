"""`stages bughunt`: one mistake in a copy, which checkpoint fails, and when it counts as found."""

import json
import os
from pathlib import Path

from shared.stages import bughunt, repo
from shared.stages.results import Progress

import pytest

from course import edit, finish, make, stages, write

MODEL = '''\
def area(r):
    """Of a circle."""
    return 3 * r * r


def ring(outer, inner):
    """Between two circles."""
    return area(outer) - area(inner)
'''
DATA = "def halves(text):\n    return text[: len(text) // 2], text[len(text) // 2 :]\n"
TEST_MODEL = '''\
from model import area, ring


def test_area():
    """The area grows with the square."""
    assert [area(r) for r in (1, 2)] == [3, 12], "twice the radius is not four times the area"


def test_area_of_nothing():
    """A point has no area."""
    assert area(0) == 0, "a point has an area"


def test_ring():
    """A ring is what the inner circle leaves."""
    assert ring(2, 1) == 9, "the ring is not the difference"
'''
TEST_DATA = '''\
from data import halves


def test_halves():
    """Two halves are the text."""
    assert "".join(halves("abc")) == "abc", "a letter is lost"
'''
SOURCES = {"model.py": MODEL, "data.py": DATA}
TRAP = '[[trap]]\nname = "{}"\nfile = "{}"\nfind = "{}"\nreplace = "{}"\ncaught_by = "tests/{}"\nhint = "{}"\n\n'
# Python notices a change of a file within the same second by its size alone: the lengths differ.
TRAPS = [
    ("circumference", "model.py", "3 * r * r", "6 * r", "test_model.py::test_area", "which unit?"),
    ("rings add", "model.py", "area(outer) - area", "area(outer) + area", "test_model.py::test_ring", "more?"),
    ("a gap", "data.py", "// 2 :]", "// 2 + 1 :]", "test_data.py::test_halves", "is it all there?"),
]
ELSEWHERE = [
    ("in a demo", "demos/show.py", "1", "2", "test_data.py::test_halves", "?"),
    ("seen by a demo", "data.py", "text[: len", "text[1 : len", "test_more.py::test_more", "?"),
]
NAMES = [name for name, *_ in TRAPS]


@pytest.fixture
def course(tmp_path):
    files = {
        "model.py": MODEL, "data.py": DATA, "tests/test_model.py": TEST_MODEL, "tests/test_data.py": TEST_DATA,
        "traps.toml": "".join(TRAP.format(*trap) for trap in ELSEWHERE + TRAPS), "README.md": "read me",
        "demos/show.py": "1\n", "extras/more.py": MODEL, "tests/demos/test_show.py": "import demos\n",
        "tests/test_more.py": "from extras import more\n", "out/default/summary.json": "{}",
    }  # fmt: skip
    top = make(tmp_path, {"01_circle": files, "02_plain": {"model.py": MODEL}})
    return write(top, {"practice/01_circle/model.py": "mine = 1\n"})


def in_copy(course: Path, file: str) -> Path:
    return course / "practice/01_circle_bug" / file


def planted(course: Path) -> tuple[str, ...]:
    """The trap that is in the copy; the copy is otherwise the course's."""
    found = []
    for trap in TRAPS:
        _, file, old, new, *_ = trap
        sources = SOURCES | {file: edit(SOURCES[file], (old, new))}
        if all(in_copy(course, name).read_text("utf-8") == source for name, source in sources.items()):
            found.append(trap)
    assert len(found) == 1, f"the copy has the mistakes {found}, not one"
    return found[0]


@pytest.fixture
def quick(course, monkeypatch):
    """No process for a check: what is mended in the course's own words passes."""

    def check(folder, plugin, tests):
        right = all((folder / file).read_text("utf-8") == source for file, source in SOURCES.items())
        return Progress(1, int(right), 0, [] if right else [tests[0]])

    monkeypatch.setattr(bughunt, "check", check)


def chosen(course: Path, order: int, seed: int | None) -> list[str]:
    """The mistakes in the order in which they come."""
    hunt = bughunt.Hunt(order=order)
    return [trap["name"] for trap in bughunt.choose(repo.find("1", course), hunt, seed)]


def begin(course: Path, name: str) -> tuple[str, ...]:
    """Begin the hunt for the mistake `name`."""
    seed = next(seed for seed in range(99) if chosen(course, 0, seed)[0] == name)
    assert stages(course, "bughunt", "1", "--seed", str(seed))[0] == 0
    return planted(course)


def mend(course: Path, trap: tuple[str, ...], to: str | None = None) -> None:
    _, file, old, new, *_ = trap
    path = in_copy(course, file)
    path.write_text(edit(path.read_text("utf-8"), (new, old if to is None else to)), "utf-8")


def refused(course: Path, *words: str) -> str:
    """The one line that a command ends with."""
    code, _, err = stages(course, "bughunt", *words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_a_hunt_begins_with_one_mistake_and_the_checkpoint_that_fails(course):
    old = 1_600_000_000
    for file in (course / "01_circle").rglob("*.*"):
        os.utime(file, (old, old))
    code, out, err = finish(course, "bughunt", "1")
    name, _, find, replace, test, hint = planted(course)
    claims = {"test_area": "The area grows", "test_ring": "A ring is what", "test_halves": "Two halves are"}
    assert (code, err) == (0, "") and f"✗ {claims[test.partition('::')[2]]}" in out, "claim of the failing checkpoint"
    assert out.splitlines()[0] == "practice/01_circle_bug is 01_circle with one mistake in one of data.py, model.py"
    assert "next: find the mistake and mend it, then: uv run stages bughunt 01 (--hint helps, --reveal" in out
    folder = in_copy(course, "")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if "cache" not in path.as_posix()}
    tests = {"tests/test_model.py", "tests/test_data.py"}
    assert files == {"README.md", "data.py", "model.py", "pyproject.toml", *tests}, "nothing else that gives it away"
    assert all((folder / file).stat().st_mtime > old for file in files), "the youngest file is the one with the mistake"
    assert "managed = false" in in_copy(course, "pyproject.toml").read_text("utf-8"), "uv would make an environment"
    record = (course / ".stages/bughunt.json").read_text("utf-8")
    for answer in (name, find, replace, test, hint):
        assert answer not in out + record, "the answer can be read"
    assert "as the course has it" not in out, "that leaves fewer places to look at"
    assert (course / "practice/01_circle/model.py").read_text("utf-8") == "mine = 1\n", "the learner's own work"


def test_a_mistake_is_found_when_it_is_mended(course):
    trap = begin(course, "a gap")
    code, out, _ = finish(course, "bughunt", "1")
    assert code == 1 and "✗" in out and "\nnot found yet: mend it, then: uv run stages bughunt 01" in out
    assert stages(course, "bughunt", "1", "--hint")[:2] == (0, f"hint: {trap[5]}\n")
    mend(course, trap)
    code, out, _ = finish(course / "practice/01_circle_bug", "bughunt", "1")
    assert code == 0 and f"\nfound: {trap[0]} ({trap[1]}), with 2 checks and the hint\n" in out, out
    assert out.endswith("1 of 3 found; the next, in a new copy: uv run stages bughunt 01\n")
    assert out.count("✓") == 1, "in the course's own words it is right: no other checkpoint is needed"


def test_other_words_are_right_when_all_their_checkpoints_pass(course):
    trap = begin(course, "circumference")
    mend(course, trap, "r * r * r + 3 * r * r - r**3 + (r == 0)")
    code, out, _ = finish(course, "bughunt", "1")
    assert code == 1 and "✗ A point has no area." in out and "✗ A ring" not in out
    assert "that checkpoint passes, but the mistake is still there, or a new one: mend it" in out, out
    mend(course, ("", "model.py", "r**2 * 3", "r * r * r + 3 * r * r - r**3 + (r == 0)"))
    code, out, _ = finish(course, "bughunt", "1")
    assert code == 0 and "found: circumference (model.py), with 2 checks and no hint" in out
    assert "✓ A ring is" in out, "what uses the definition was not tried"


def test_a_mistake_is_not_found_where_another_file_is_broken_for_it(course):
    trap = begin(course, "circumference")
    mend(course, trap)
    in_copy(course, "data.py").write_text(edit(DATA, ("// 2 :]", "// 2 + 1 :]")), "utf-8")
    code, out, _ = finish(course, "bughunt", "1")
    assert code == 1 and "✗ Two halves are the text." in out, out


def test_giving_up_shows_the_lines_and_counts(course, quick):
    trap = begin(course, "rings add")
    code, out, _ = stages(course, "bughunt", "1", "--reveal")
    assert code == 0 and out.startswith("rings add: practice/01_circle_bug/model.py:8, planted (-) and right (+)\n")
    assert "\n-    return area(outer) + area(inner)\n+    return area(outer) - area(inner)\n" in out
    assert "no mistake is planted in 01_circle: uv run stages bughunt 01" in refused(course, "1", "--hint")
    write(course, {"practice/01_circle_bug/notes.txt": "mine", "practice/01_circle_bug/data.py": "broken ="})
    row = next(line for line in stages(course, "bughunt")[1].splitlines() if "01_circle" in line)
    assert [int(word) for word in row.split("│")[2:5]] == [3, 0, 1], row
    assert stages(course, "bughunt", "1")[0] == 0
    assert planted(course) != trap, "what was given up comes last"
    assert in_copy(course, "notes.txt").read_text("utf-8") == "mine", "a file of the learner's own was deleted"


def read(course: Path) -> dict:
    return json.loads((course / ".stages/bughunt.json").read_text("utf-8"))["01_circle"]


def test_every_mistake_comes_once_and_one_that_was_given_up_once_more(course, quick):
    assert stages(course, "bughunt", "1")[0] == 0
    given_up = planted(course)
    stages(course, "bughunt", "1", "--reveal")
    order = []
    for _ in TRAPS:
        assert stages(course, "bughunt", "1")[0] == 0
        assert read(course)["checks"] == 0, "the checks of the hunt before count too"
        order.append(planted(course))
        mend(course, order[-1])
        assert stages(course, "bughunt", "1")[0] == 0
    assert sorted(order) == sorted(TRAPS) and order[-1] == given_up
    assert (len(read(course)["found"]), read(course)["revealed"]) == (3, [])
    assert "all mistakes of 01_circle are found; again, by chance: stages bughunt 01 --seed 1" in refused(course, "1")
    assert stages(course, "bughunt", "1", "--seed", "1")[0] == 0, "one more, for the exercise"
    assert "│ practice/01_circle_bug │" in stages(course, "bughunt")[1]
    stages(course, "bughunt", "1", "--reveal")
    assert (len(read(course)["found"]), read(course)["revealed"]) == (3, []), "what is found stays found"


def test_a_seed_means_the_same_mistake_for_all_and_else_everyone_has_an_order(course):
    orders = [chosen(course, order, None) for order in range(20)]
    assert {names[0] for names in orders} == {*NAMES}, "all learners begin with the same mistake"
    assert {chosen(course, order, 7)[0] for order in range(20)} == {chosen(course, 0, 7)[0]}
    assert {chosen(course, 0, seed)[0] for seed in range(20)} == {*NAMES}, "seeds choose among all"
    assert sorted(orders[0]) == sorted(NAMES), "a mistake in a demo, or seen by one, cannot be planted in the copy"


def test_where_a_checkpoint_cannot_run_another_mistake_is_planted(course, monkeypatch):
    def skip(folder, plugin, tests):
        ran = all(test in able for test in tests)
        return Progress(1, 0, 0, tests) if ran else Progress(1, 0, 1)

    able = ["tests/test_data.py::test_halves"]
    monkeypatch.setattr(bughunt, "check", skip)
    for seed in range(9):
        assert stages(course, "bughunt", "1", "--seed", str(seed))[0] == 0
        assert planted(course)[0] == "a gap", "the learner is told of no failure"
        stages(course, "bughunt", "1", "--reveal")
    able.clear()
    assert "this machine can run none of the checkpoints" in refused(course, "1")
    assert "no mistake is planted" in refused(course, "1", "--hint")


def test_stopped_in_the_making_the_copy_is_made_once_more(course, quick, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bughunt, "plant", stop)
        assert stages(course, "bughunt", "1")[0] == 130
    assert stages(course, "bughunt", "1")[0] == 0 and planted(course)


def test_a_slip_in_the_copy_is_shown_with_its_line(course):
    begin(course, "circumference")
    in_copy(course, "model.py").write_text(MODEL + "x = (\n", "utf-8")
    code, out, err = finish(course, "bughunt", "1")
    assert code == 1 and "✗ model.py, line 9" in out and "not found yet" in out, out + err


def test_bad_input_gets_one_line(course, quick):
    assert "01_circle, 02_plain" in refused(course, "9")
    assert "02_plain has no mistake to look for: its traps.toml lists none" in refused(course, "2")
    assert "no mistake is planted in 01_circle: uv run stages bughunt 01" in refused(course, "1", "--reveal")
    for words in (["--hint"], ["--reveal"], ["--seed", "0"]):
        assert "name a stage" in refused(course, *words)
    assert "not allowed with argument" in refused(course, "1", "--hint", "--reveal")
    assert "invalid int value" in refused(course, "1", "--seed", "x")
    write(course, {"practice/01_circle_bug/mine.txt": "mine"})
    assert "practice/01_circle_bug is there, but not from a hunt that is remembered" in refused(course, "1")
    in_copy(course, "mine.txt").unlink()
    in_copy(course, "").rmdir()
    begin(course, "circumference")
    assert "a hunt is under way in practice/01_circle_bug: find" in refused(course, "1", "--seed", "2")
    in_copy(course, "tests/test_model.py").write_text("def test_area():\n    pass\n", "utf-8")
    err = refused(course, "1")
    assert "01_circle_bug/tests/test_model.py was changed, and the mistake is not there: copy it from 01_circle" in err
    stages(course, "bughunt", "1", "--reveal")
    (course / "practice").rename(course / "old")
    write(course, {"practice": "a file where the folder should be"})
    assert "cannot write" in refused(course, "1") and "no mistake is planted" in refused(course, "1", "--hint")
    (course / "practice").unlink()
    write(course, {"practice/01_circle_bug/tests": "a file where the folder should be"})
    assert "01_circle_bug (not every file can be replaced): make the course's folder" in refused(course, "1")


@pytest.mark.parametrize("text", ["", "[]", '{"01_circle": {"no": 1}}', '{"01_circle": 1}', "{"], ids=repr)
def test_a_damaged_record_counts_as_none(course, text):
    write(course, {".stages/bughunt.json": text})
    assert stages(course, "bughunt")[0] == 0
    assert "no mistake is planted" in refused(course, "1", "--hint")


STAGES = repo.stages(repo.root(Path(__file__).parent))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_copy_of_every_stage_has_room_for_its_mistakes(stage, tmp_path):
    known = bughunt.plantable(stage)
    assert len(known) >= 6 and len({*map(bughunt.mark, known)}) == len(known)
    bughunt.fresh(stage, tmp_path / "copy")
    lost = [trap["name"] for trap in known if not (tmp_path / "copy" / bughunt.test_file(trap["caught_by"])).is_file()]
    assert not lost, "their checkpoints are not in the copy"
