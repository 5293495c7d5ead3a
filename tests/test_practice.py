"""`stages practice` and `stages check --practice`: what is taken out, what stays, and what a learner is told."""

import ast
import sys
from pathlib import Path

from shared.stages import practice, repo
from shared.stages.practice import functions, graft, hollow
from shared.stages.uses import Uses

import pytest

import isolated
from course import edit, finish, make, stages, write

OLD = '''\
def carried(x):
    return x + 1


def area(r):
    # of a square
    return r * r
'''
NEW = '''\
"""A model."""


def carried(x):
    return x + 1


def total(shapes):
    """The area of all shapes."""
    return sum(area(shape) for shape in shapes)


def area(r, factor=3):
    """Of a circle: factor r r."""
    square = r * r
    return factor * square


class Net:
    """A net."""

    def __init__(self, size):
        """Its parts."""
        super().__init__()
        double = 2 * size
        # as wide as two
        self.weights = [1] * double  # of the input
        if size > 2:
            self.norm = size
        for i in range(double):
            self.start(i)
        self.start(0)

    def start(self, i):
        """Weight i becomes 5."""
        self.weights[i] = 5

    def forward(self):
        """The sum of the weights."""
        return total([sum(self.weights)])


class Config:
    def __init__(self, size):
        self.size = size

    def __post_init__(self):
        if self.size < 1:
            raise ValueError("a text to be guessed")
'''
TESTS = '''\
from model import Net, area, total


def test_net():
    """A net sums its weights."""
    assert Net(1).forward() == 300, "the net's sum is wrong"


def circle():
    return area(2)


def test_total():
    """The total adds the areas."""
    assert total([1, 2]) == 15, "the total does not add areas"


def test_area():
    """The area is 3 r r."""
    assert circle() == 12, "the area is not 3 r r"


def test_nothing():
    """Something else."""
'''
ORDER = ["area", "total", "Net.start", "Net.__init__", "Net.forward"]


@pytest.fixture
def course(tmp_path):
    old = {"model.py": OLD, "tests/test_model.py": "def test_a():\n    pass\n"}
    new = {
        "model.py": NEW, "tests/test_model.py": TESTS, "README.md": "read me", "traps.toml": "", "demos/show.py": "",
        "extras/more.py": "", "tests/demos/test_show.py": "", "tests/test_more.py": "from extras import more\n",
        "out/default/summary.json": "{}",
    }
    return make(tmp_path, {"01_first": old, "02_second": new})


def copy(course: Path) -> Path:
    return course / "practice/02_second/model.py"


def fill(course: Path, *names: str) -> None:
    """Write some definitions as the course has them."""
    copy(course).write_text(graft(copy(course).read_text("utf-8"), names, NEW), "utf-8")


def refused(course: Path, *words: str) -> str:
    """The one line that a command ends with."""
    code, _, err = stages(course, *words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_a_copy_has_contracts_in_place_of_bodies_and_nothing_that_gives_them_away(course):
    code, out, err = stages(course, "practice", "2")
    assert (code, err) == (0, "")
    found = copy(course).read_text("utf-8")
    blank = '    raise NotImplementedError\n'
    assert f'def area(r, factor=3):\n    """Of a circle: factor r r."""\n{blank}\n\nclass' in found
    assert "return x + 1" in found, "what the stage before has already is no exercise"
    assert "a text to be guessed" in found, "checks are given, or their words would have to be guessed"
    folder = course / "practice/02_second"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert files == ["README.md", "model.py", "pyproject.toml", "tests", "tests/test_model.py"]
    about = repo.settings(folder / "pyproject.toml")["tool"]
    assert about["uv"]["managed"] is False and "stages" in about, "`uv run` would make an environment in the copy"
    assert [path.name for path in folder.parent.iterdir()] == ["02_second"], "something half made is left"


def test_init_keeps_what_makes_attributes():
    found = hollow(NEW, ["Net.__init__", "Config.__init__"], {})
    assert found == edit(NEW, (
        "        for i in range(double):\n            self.start(i)\n        self.start(0)\n",
        "        raise NotImplementedError\n",
    )), "attributes with their comments, and what they need, stay; an __init__ that only assigns stays whole"


REFUSING = """\
import pytest
from model import Net, area

@pytest.mark.parametrize(("r", "word"), [(1, "a square"), (2, "a round")])
def test_words(r, word):
    with pytest.raises(ValueError, match=word):
        area(r)

def test_more():
    net = Net(1)
    with pytest.raises(ValueError, match=f"of {3} sides"):
        area(3)
    with pytest.raises(ValueError, match="empty"):
        net.unknown()
"""


def test_a_blank_tells_the_words_that_are_looked_for_in_its_errors(course):
    """A checkpoint that matches the text of an error would have to be read, or the text to be guessed."""
    write(course, {"02_second/tests/test_words.py": REFUSING})
    stages(course, "practice", "2")
    told = "What checkpoints look for in its errors (regular expressions)"
    looked = f'    # {told}: "a square", "a round", "of ... sides"\n'
    text = copy(course).read_text("utf-8")
    assert text.count("What checkpoints look for") == 1 and f"{looked}    raise NotImplementedError" in text, text
    fill(course, "area")
    stages(course, "check", "2", "--reset", "area")
    assert copy(course).read_text("utf-8") == text, "blanked again it says the same"


def test_the_command_line_is_given(course):
    """Its flags and files would be guesswork; who names `main` may write it."""
    more = "\n\ndef arguments(argv):\n    return argv\n\n\ndef main():\n    return area(2)\n"
    write(course, {"02_second/model.py": NEW + more})
    _, out, _ = stages(course, "practice", "2")
    assert "given unless you name them: __post_init__, arguments, main" in out
    assert copy(course).read_text("utf-8").endswith(more), "main is blank"
    assert [line.split()[1] for line in out.splitlines()[1:6]] == ORDER, "only the lesson is to be written"


def test_definitions_come_in_the_order_in_which_they_can_be_written(course):
    _, out, _ = stages(course, "practice", "2")
    rows = [line.split() for line in out.splitlines()[1:6]]
    assert [row[1] for row in rows] == ORDER, "what a definition uses comes before it"
    file, line = rows[0][2].split(":")
    assert (course / file).read_text("utf-8").splitlines()[int(line) - 1].startswith("def area")
    told = "next: write area in practice/02_second/model.py, then: uv run stages check 02 --practice area\n"
    assert out.endswith(told)


@pytest.mark.parametrize("words", [["area", "Net.start"], ["Net"], ["model.area"], ["Config"]], ids=" ".join)
def test_only_what_is_named_is_blanked(course, words):
    assert stages(course, "practice", "2", *words)[0] == 0
    whole, found = functions(NEW), functions(copy(course).read_text("utf-8"))
    lost = {name for name in whole if ast.dump(whole[name][0]) != ast.dump(found[name][0])}
    net = {"Net.__init__", "Net.start", "Net.forward"}
    meant = {"Config": {"Config.__post_init__"}, "Net": net, "model.area": {"area"}}
    assert lost == meant.get(words[0], set(words))


def test_from_previous_the_earlier_body_stands_below_the_blank(course):
    assert stages(course, "practice", "2", "--from-previous")[0] == 0
    start = '    """Of a circle: factor r r."""\n    raise NotImplementedError\n    # of a square\n    return r * r\n'
    assert start in copy(course).read_text("utf-8"), "the new contract, the blank, then the previous stage's body"


IMPORTS = """\
import functools


def twice(f):
    return lambda x: f(f(x))


def three():
    return 3


@twice
def more(x, by=three()):
    return x + by


LIMIT = more(1)
"""


def test_what_an_import_needs_is_given_back(course):
    other = "import model\n\n\ndef new(x):\n    return x\n"
    write(course, {"02_second/model.py": IMPORTS, "02_second/other.py": other})
    code, out, _ = stages(course, "practice", "2")
    assert code == 0 and "\ngiven, because the modules cannot be imported without: three, twice, more\n" in out
    assert copy(course).read_text("utf-8") == IMPORTS
    assert "practice/02_second: 1 definitions" in out


def test_a_copy_is_never_overwritten(course):
    stages(course, "practice", "2", "area")
    copy(course).write_text("mine = 1\n", "utf-8")
    assert "is there already and is never overwritten: go on with it" in refused(course, "practice", "2")
    assert copy(course).read_text("utf-8") == "mine = 1\n"


def test_bad_input_gets_one_line(course):
    assert "stage" in refused(course, "practice")
    assert "did you mean area?" in refused(course, "practice", "2", "aera")
    assert "is not practised yet: uv run stages practice 02" in refused(course, "check", "2", "--practice")
    assert "name one stage" in refused(course, "check", "--practice")
    write(course, {"practice": "a file where the folder should be"})
    assert "cannot write" in refused(course, "practice", "2")
    (course / "practice").unlink()
    stages(course, "practice", "2")
    assert "did you mean total?" in refused(course, "check", "2", "--practice", "totl")
    for words in (["--practice"], ["--reset", "area"], ["--solution", "area"]):
        copy(course).write_text("def f(x):\n    return x +\n", "utf-8")
        assert "practice/02_second/model.py, line 2, is not valid Python" in refused(course, "check", "2", *words)
    assert " ? " in f"{stages(course)[1]} ".replace("\n", " "), "the overview must survive a broken file"


def test_what_is_not_written_is_no_failure(course):
    stages(course, "practice", "2")
    code, out, _ = finish(course, "check", "2", "--practice")
    assert code == 1 and "✗" not in out and "✓ Something else." in out
    waits = [f"  – {name} (1 wait for it)" for name in ("area", "total", "Net.__init__")]
    assert "\n".join(["not written yet", *waits]) in out
    assert "1 of 4 checkpoints passed, 3 wait for what is not written yet" in out
    assert not (course / ".stages").exists(), "the stage itself was not checked"


def test_a_test_file_that_calls_a_blank_while_it_is_imported_waits_too(course):
    early = "import model\n\nA = model.area(1)\n\ndef test_a():\n    assert A\n"
    write(course, {"02_second/tests/test_early.py": early})
    stages(course, "practice", "2")
    code, out, _ = finish(course, "check", "2", "--practice")
    assert code == 1 and "✗" not in out and "– area (2 wait for it)" in out
    assert "1 of 5 checkpoints passed, 4 wait" in out


@pytest.mark.parametrize("saved", ["", "raise NotImplementedError\n" * 40 + "def\n"], ids=["shorter", "broken"])
def test_what_is_saved_while_the_tests_run_is_not_what_they_met(course, saved):
    """The line of a blank is looked up in the text that was imported."""
    meanwhile = "from pathlib import Path\nfrom model import area\n\ndef test_saved():\n"
    meanwhile += f"    Path('model.py').write_text({saved!r}, 'utf-8')\n    area(1)\n"
    write(course, {"02_second/tests/test_saved.py": meanwhile})
    stages(course, "practice", "2")
    _, out, err = finish(course, "check", "2", "--practice", "area")
    assert "✗" not in out and "– area (2 wait for it)" in out, out + err


OUTSIDE = """\
import subprocess
import sys
import pytest


@pytest.fixture(scope="module")
def child():
    code = subprocess.run([sys.executable, "-c", "import model; model.area(2)"]).returncode
    assert code == 0, f"the process ends with {code}"


def test_first(child):
    pass


def test_second(child):
    pass
"""


CATCHING = """\
import model

def test_refused():
    try:
        model.area(0)
    except ValueError:
        pass
    except Exception as error:
        raise AssertionError("another error than ValueError") from error
"""


def test_a_blank_whose_error_a_test_catches_is_waited_for_too(course):
    write(course, {"02_second/tests/test_x.py": CATCHING})
    stages(course, "practice", "2", "area")
    code, out, _ = finish(course, "check", "2", "--practice")
    assert code == 1 and "✗" not in out and "– area (4 wait for it)" in out, out


def test_what_a_process_of_a_test_meets_is_waited_for_too(course):
    """A checkpoint that starts a process which calls a blank says "exit code 1": nobody has made a mistake."""
    write(course, {"02_second/tests/test_x.py": OUTSIDE})
    stages(course, "practice", "2", "area")
    code, out, _ = finish(course, "check", "2", "--practice")
    assert code == 1 and "✗" not in out, f"what is not written is shown as a failure\n{out}"
    assert "– area (5 wait for it)" in out, f"both tests of the fixture wait\n{out}"


def test_checkpoints_of_one_definition_from_the_nearest_on(course):
    stages(course, "practice", "2")
    fill(course, "area")
    code, out, _ = finish(course, "check", "2", "--practice", "area")
    assert out.index("✓ The area is 3 r r.") < out.index("– total (1 wait for it)"), out
    assert "Something else" not in out and "area: 1 of 3 checkpoints passed, 2 wait" in out
    assert "next: write total in practice/02_second/model.py, then:" in out


def test_the_test_file_of_the_definitions_own_file_comes_first(course):
    """An earlier one may be about all that the definition is a part of, and would blame another part."""
    other = "from model import area\n\n\ndef test_all():\n    assert area(1) == 3\n"
    write(course, {"02_second/tests/test_all.py": other})
    stages(course, "practice", "2")
    found = practice.tests(repo.find("2", course), "area")
    assert found[0] == "tests/test_model.py::test_area" and found[-1] == "tests/test_all.py::test_all", found


def test_the_first_failure_is_shown_whole_and_the_rest_folded(course):
    stages(course, "practice", "2", "area")
    fill(course, "area")
    copy(course).write_text(edit(copy(course).read_text("utf-8"), ("factor * square", "square")), "utf-8")
    code, out, _ = finish(course, "check", "2", "--practice", "area")
    assert code == 1 and "✗ The area is 3 r r.\n      the area is not 3 r r  tests/test_model.py" in out
    assert "the total does not add" not in out and "✗ 2 more fail: mend the first, then check again" in out
    code, out, _ = finish(course, "check", "2", "--practice")
    assert "✓ Something else" not in out and "✓ 1 more pass\n" in out, "the first failure is the last that is seen"


@pytest.mark.parametrize("words", [["--practice"], ["--practice", "area"]], ids=" ".join)
def test_a_slip_that_stops_the_import_is_shown_with_its_line(course, words):
    stages(course, "practice", "2", "area")
    fill(course, "area")
    copy(course).write_text(copy(course).read_text("utf-8") + "\n\nLIMIT = area(None)\n", "utf-8")
    code, out, _ = finish(course, "check", "2", *words)
    assert code == 1 and "✗ model.py, line 15\n      square = r * r\n      TypeError" in out, out


def test_a_learner_gets_through(course):
    stages(course, "practice", "2")
    for name in ORDER:
        fill(course, name)
    code, out, _ = finish(course / "practice/02_second", "check", "--practice")
    assert code == 0 and "02_second: 4 of 4 checkpoints passed" in out
    assert "all is written, and every definition is the course's own code" in out
    assert copy(course).read_text("utf-8") == NEW


def test_in_the_end_it_is_said_what_differs_and_how_to_train(course):
    write(course, {"02_second/train.py": "", "02_second/sample.py": ""})
    stages(course, "practice", "2", "area", "total")
    fill(course, "area", "total")
    slips = ("r * r", "r ** 2"), ("The area of all", "All"), ("return sum(area", "return sum(  area")
    copy(course).write_text(edit(copy(course).read_text("utf-8"), *slips), "utf-8")
    code, out, _ = finish(course, "check", "2", "--practice")
    assert code == 0 and out.splitlines()[-3:] == [
        "all is written, and passes; 1 of 2 read differently from the course's: area",
        "to compare one: uv run stages check 02 --solution area",
        "train your own model: cd practice/02_second, then: uv run python train.py, then: uv run python sample.py",
    ], "comments, docstrings and spaces are no difference"


def test_an_alias_counts_as_written_and_a_helper_may_go(course):
    """`__radd__ = __add__` is a way to write __radd__; what is not there in the end is told as a difference."""
    stages(course, "practice", "2")
    fill(course, *ORDER)
    alias = ("def start(", "def begin("), ("    def forward(", "    start = begin\n\n    def forward(")
    copy(course).write_text(edit(copy(course).read_text("utf-8"), *alias), "utf-8")
    code, out, err = finish(course, "check", "2", "--practice")
    assert (code, err) == (0, "") and "1 of 5 read differently from the course's: Net.start" in out, out
    assert stages(course)[1].splitlines()[2].endswith(" 5/5"), "the alias is missing for ever"
    gone = ("    start = begin\n\n", ""), ("self.start(i)", "self.begin(i)"), ("self.start(0)", "self.begin(0)")
    copy(course).write_text(edit(copy(course).read_text("utf-8"), *gone), "utf-8")
    code, out, err = finish(course, "check", "2", "--practice")
    assert (code, err) == (0, "") and "2 of 5 read differently from the course's: Net.__init__, Net.start" in out, out


def test_one_definition_can_be_blanked_again_and_its_solution_shown(course):
    stages(course, "practice", "2")
    empty = copy(course).read_text("utf-8")
    fill(course, "area")
    copy(course).write_text(edit(copy(course).read_text("utf-8"), ("r * r", "r ** 2")), "utf-8")
    code, out, _ = stages(course, "check", "2", "--solution", "area")
    assert code == 0 and out.index("yours") < out.index("r ** 2") < out.index("the course's") < out.index("r * r")
    code, out, _ = stages(course, "check", "2", "--practice", "--reset", "area")
    assert code == 0 and copy(course).read_text("utf-8") == empty


def test_the_overview_counts_what_is_written(course):
    assert "practice" not in stages(course)[1].splitlines()[0]
    stages(course, "practice", "2")
    fill(course, "area", "Net.start")
    header, _, row = stages(course)[1].splitlines()[:3]
    assert header.endswith("practice") and row.endswith(" 2/5"), row


def test_of_a_copy_for_some_definitions_only_these_count(course):
    stages(course, "practice", "2", "area", "Net.start")
    assert stages(course)[1].splitlines()[2].endswith(" 0/2"), "the others were never to be written"
    fill(course, "area")
    assert stages(course)[1].splitlines()[2].endswith(" 1/2")
    stages(course, "check", "2", "--reset", "total")
    assert stages(course)[1].splitlines()[2].endswith(" 1/3"), "one that was blanked later counts too"
    (course / "practice/02_second/pyproject.toml").unlink()
    assert stages(course)[1].splitlines()[2].endswith(" ?"), "the overview must survive a broken copy"


MODEL = """\
import data as d
from data import load as read


class Base:
    def both(self):
        read()


class Model(Base):
    def __init__(self):
        super().__init__()

    def run(self, other):
        self.both()
        d.clean()
        other.save()
"""
DATA = "def load(): ...\n\n\ndef clean(): ...\n\n\nclass File:\n    def save(self): ...\n"


def test_names_are_looked_up_as_python_does(tmp_path):
    uses = Uses(write(tmp_path, {"model.py": MODEL, "data.py": DATA})).uses
    assert uses["model.py", "Base.both"] == [("data.py", "load")], "through `from data import load as read`"
    assert uses["model.py", "Model.run"] == [
        ("model.py", "Model.__init__"), ("model.py", "Base.both"), ("data.py", "clean"), ("data.py", "File.save"),
    ], "its own __init__, through self and the base class, through a module, and any method of that name"


STAGES = repo.stages(repo.root(Path(__file__).parent))


def import_all(names: list[str]) -> None:
    """Import modules in this folder."""
    sys.path.insert(0, "")
    for name in names:
        __import__(name)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_can_be_practised(stage, tmp_path, monkeypatch):
    """The copy imports as it is, and with the solutions put back it is the stage again."""
    monkeypatch.setattr(practice, "copy_of", lambda stage: tmp_path / "practice" / stage.name)
    monkeypatch.setattr(practice, "stopped", lambda folder: None)  # no stage gives anything back: no import is needed
    known = practice.exercises(stage)
    given = practice.make(stage, known)
    assert known and given == [] and practice.unwritten(stage) == known
    folder, output = tmp_path / "practice" / stage.name, tmp_path / "output.txt"
    code = isolated.call(import_all, folder, output, [file.stem for file in stage.trunk()])
    assert code == 0, output.read_text("utf-8")
    for file in stage.trunk():
        mine, course = (folder / file.name).read_text("utf-8"), file.read_text("utf-8")
        names = [name for other, name in known if other == file.name]
        assert (mine != course) == bool(names) and graft(mine, names, course) == course, f"{file.name} is another text"
    uses = Uses(stage.path)
    assert sorted(uses.order(known)) == sorted(known), "a definition is listed twice or not at all"
    alone = [key for key in known if not any((folder / file).is_file() for file, _ in uses.concern([key]))]
    assert not alone, f"no checkpoint concerns {alone}"
