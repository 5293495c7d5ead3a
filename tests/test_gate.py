"""`stages gate`: a stage that cannot be practised, or in which something has no checkpoint, does not get past it."""

from pathlib import Path

from shared.errors import BadInput

import pytest

import gate
import isolated
from course import edit, finish, make, write

OLD = "def kept(x):\n    return x\n"
NEW = '''\
def kept(x):
    return x


def twice(x):
    """Two of it."""
    return 2 * x


class Net:
    """A net."""

    def __init__(self, size):
        self.size = size

    def __post_init__(self):
        if self.size < 0:
            raise ValueError("below nothing")

    def area(self):
        """Twice its size."""
        if self.size > 100:
            raise ValueError("too large")
        return twice(self.size)
'''
TESTS = '''\
import pytest

import model

def test_twice():
    """Twice is two of it."""
    assert model.twice(3) == 6

def test_kept():
    """As it was."""
    assert model.kept(3) == 3

def test_area():
    """A net has an area."""
    assert model.Net(2).area() == 4

def test_check():
    net = model.Net(-1)
    with pytest.raises(ValueError):
        net.__post_init__()
'''


@pytest.fixture
def course(tmp_path):
    first = {"train.py": "", "model.py": OLD, "tests/test_model.py": "def test_a():\n    pass\n"}
    second = {"train.py": "", "model.py": NEW, "tests/test_model.py": TESTS}
    return make(tmp_path, {"01_first": first, "02_second": second})


@pytest.fixture
def run(course, monkeypatch, capsys):
    """Exit code and output of tests/gate.py in the small course, without the lines of progress."""

    def call(*words: str) -> tuple[int, list[str]]:
        monkeypatch.chdir(course)
        monkeypatch.setattr("sys.argv", ["gate.py", *words])
        code = gate.main()
        return code, [line for line in capsys.readouterr().out.splitlines() if not line.startswith("gate ")]

    return call


def test_a_stage_that_can_be_practised_and_is_guarded_gets_past(course, run):
    before = {path: path.read_bytes() for path in course.rglob("*") if path.is_file()}
    code, out = run("2")
    told = "02_second: 2 checkpoints wait in the fresh copy, 4 of 4 pass once it is filled in, 4 of 4 definitions are"
    assert out[0].startswith(told) and code == 0, out
    assert out[1:] == ["green: no problems in 1 stages"]
    assert before == {path: path.read_bytes() for path in course.rglob("*") if path.is_file()}, "the course was touched"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        # a definition without a checkpoint
        ("    assert model.Net(2).area() == 4", "    model.Net(2).size", ["model.py Net.area is not guarded"]),
        # a checkpoint that takes the blank's error for the one that it waits for
        (
            "def test_check():",
            "def test_large():\n    with pytest.raises(Exception):\n        model.Net(101).area()\n\ndef test_check():",
            ["tests/test_model.py::test_large passes, though it calls a blank"],
        ),
        # a checkpoint that accuses a learner who has written nothing
        (
            "    assert model.Net(2).area() == 4",
            "    try:\n        area = model.Net(2).area()\n    except NotImplementedError:\n        area = 0\n"
            "    assert area == 4, 'the area is wrong'",
            ["tests/test_model.py::test_area fails, though nothing is written yet"],
        ),
        # a checkpoint that fails as it is: then all else is no proof
        ("model.kept(3) == 3", "model.kept(3) == 4", ["test_kept fails, though nothing", "test_kept fails with the"]),
    ],
    ids=["unguarded", "passes", "accuses", "fails"],
)
def test_what_is_wrong_is_named(course, run, old, new, told):
    write(course, {"02_second/tests/test_model.py": edit(TESTS, (old, new))})
    code, out = run("2")
    assert code == 1 and out[-1] == f"red: {len(told)} problems in 1 stages"
    assert len(out) == len(told) + 2 and all(part in line for part, line in zip(told, out[1:-1], strict=True)), out


def test_a_copy_in_which_nothing_waits_is_no_practice(course, run):
    """As where every blank had to be given back, because the modules are imported with them."""
    write(course, {"02_second/model.py": edit(NEW, ("class Net", "SIX = twice(3)\n\n\nclass Net"), ("area", "twice"))})
    tests = edit(TESTS, ("    assert model.Net(2).area() == 4", "    pass"))
    write(course, {"02_second/tests/test_model.py": tests})
    code, out = run("2")
    assert code == 1 and "  no checkpoint waits for a blank" in out, out


def test_a_solution_that_does_not_fit_its_checkpoints_is_noticed(course, run, monkeypatch):
    """What is put back is the course's own text, and it is put back everywhere."""
    monkeypatch.setattr(gate.practice, "graft", lambda source, names, other: source)
    code, out = run("2")
    assert code == 1 and "  tests/test_model.py::test_twice fails with the blanks filled in" in out, out


def test_checkpoints_that_never_end_are_no_proof(course, run, monkeypatch):
    monkeypatch.setattr(gate, "at_once", lambda jobs, title: {name: job() for name, job in jobs.items()})
    monkeypatch.setattr(isolated, "call", lambda *args, **options: None)
    code, out = run("2")
    assert code == 1 and "no checkpoint" not in "".join(out)
    assert out[1:3] == [
        "  the checkpoints of the fresh copy never end, or pytest breaks down",
        "  with the blanks filled in the checkpoints never end, or pytest breaks down",
    ]


def test_by_default_all_stages(course, run):
    write(course, {"01_first/tests/test_model.py": "import model\n\ndef test_kept():\n    assert model.kept(2) == 2\n"})
    code, out = run()
    assert code == 0 and [line[:8] for line in out[:2]] == ["01_first", "02_secon"] and out[2].endswith("in 2 stages")


def test_an_unknown_stage_is_one_line(run):
    with pytest.raises(BadInput, match="no stage '7': choose from 01_first, 02_second"):
        run("7")


def test_the_command_hands_over_to_the_courses_own_tests(course):
    write(course, {"tests/gate.py": "import sys\nprint(sys.argv[1:])\nsys.exit(1)\n"})
    assert finish(Path(course), "gate", "2", "1")[:2] == (1, "['2', '1']\n")
