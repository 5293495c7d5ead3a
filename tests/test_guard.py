"""`stages guard`: what could be missing from a stage without a checkpoint noticing."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shared.errors import BadInput
from shared.stages.uses import Uses

import pytest

import guard
import isolated
from course import finish, make, start, wait_for, write

OLD = '"""Sums."""\n\n\ndef kept(x):\n    return x\n\n\ndef changed(x):\n    return x\n'
NEW = '''\
"""Sums and more."""

import json

LIMIT = 3


def kept(x):
    return x


def changed(x):
    return x + LIMIT


def guarded(x):
    return -x


def forgotten(x):
    """No checkpoint calls it."""
    return x * x


class Sizes:
    """Of something."""

    unit = "m"

    def __post_init__(self):
        self.checked = True

    def area(self):
        return 4

    def todo(self):
        raise NotImplementedError


if __name__ == "__main__":
    print(json.dumps(kept(1)))
'''
TESTS = """\
import model

def test_all():
    assert model.kept(1) == 1 and model.changed(1) == 4 and model.guarded(1) == -1
    sizes = model.Sizes()
    assert sizes.area() == 4
"""


@pytest.fixture
def course(tmp_path):
    train = {"train.py": "def main():\n    return 1\n"}
    old = {"model.py": OLD, "tests/test_model.py": "def test_a():\n    pass\n"}
    new = {"model.py": NEW, "tests/test_model.py": TESTS}
    return make(tmp_path, {"01_first": train | old, "02_second": train | new})


@pytest.fixture
def run(course, monkeypatch, capsys):
    """Exit code and output of tests/guard.py in the small course."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.chdir(course)
        monkeypatch.setattr("sys.argv", ["guard.py", *words])
        return guard.main(), capsys.readouterr().out

    return call


def seven() -> int:
    return 7


def test_every_process_of_many_at_once_tells_its_exit_code(tmp_path):
    """Who starts one also reads the codes of those that have ended: without a lock one in fifty is lost, and is 255."""
    with ThreadPoolExecutor(4) as pool:
        codes = [*pool.map(lambda i: isolated.call(seven, tmp_path, tmp_path / f"{i}.txt"), range(60))]
    assert codes == [7] * 60, f"{60 - codes.count(7)} of 60 exit codes are lost"


def test_what_no_checkpoint_misses_is_listed(course, run):
    code, out = run("2")
    told = [line for line in out.splitlines() if not line.startswith("guard ")]
    assert code == 1 and told == [
        "not guarded: model.py forgotten (no checkpoint fails)",
        "not guarded: model.py Sizes.__post_init__ (no checkpoint fails)",
        "02_second: 3 of 5 new or changed definitions are guarded",
    ]
    assert (course / "02_second/model.py").read_text("utf-8") == NEW, "the stage itself was touched"


def test_without_a_stage_before_everything_counts(course, run):
    code, out = run("1")
    assert code == 1 and "model.py kept" in out and out.endswith("0 of 3 new or changed definitions are guarded\n")


def test_definitions_can_be_named_a_class_with_its_methods(course, run):
    code, out = run("2", "Sizes", "guarded", "Sizes.area")
    assert code == 1 and out.endswith("02_second: 2 of 3 new or changed definitions are guarded\n")
    assert run("2", "guarded", "changed")[0] == 0
    known = "changed, guarded, forgotten, Sizes.__post_init__, Sizes.area"
    with pytest.raises(BadInput, match=f"no function 'kept' is new or changed: choose from {known}$"):
        run("2", "kept")


def test_a_module_that_cannot_be_imported_without_it_guards_it(course, run):
    file = course / "02_second/model.py"
    write(course, {"02_second/model.py": file.read_text("utf-8").replace("LIMIT = 3", "LIMIT = len('abc')")})
    write(course, {"02_second/other.py": "def three():\n    return 3\n\n\nLIMIT = three()\n"})
    write(course, {"02_second/tests/test_other.py": "import other\n\ndef test_a():\n    pass\n"})
    code, out = run("2", "three")
    assert code == 0, out


def test_checkpoints_that_fail_as_it_is_prove_nothing(course, run):
    write(course, {"02_second/tests/test_more.py": "def test_a():\n    assert 1 > 2\n"})
    with pytest.raises(BadInput, match="the checkpoints of 02_second fail as it is: mend it first"):
        run("2")


def test_a_checkpoint_that_never_ends_is_no_guard(course, run, monkeypatch):
    monkeypatch.setattr("guard.PATIENCE", 3)
    hangs = "import model\n\ndef test_b():\n    try:\n        model.guarded(1)\n    except NotImplementedError:\n"
    write(course, {"02_second/tests/test_model.py": hangs + "        while True:\n            pass\n"})
    code, out = run("2", "guarded")
    assert code == 1 and "guarded (a checkpoint runs for more than 3 s)" in out


ORDER = """\
from pathlib import Path

import model

def test_other():
    Path({file!r}).touch()

def test_area():
    assert model.Sizes().area() == 4
"""


def test_those_that_name_the_definition_come_first(course):
    """The first failure ends a run: the sooner it comes, the sooner all is done."""
    file = course / "other came first"
    write(course, {"02_second/tests/test_a.py": ORDER.format(file=str(file)).replace("area() == 4", "unit")})
    write(course, {"02_second/tests/test_model.py": ORDER.format(file=str(file))})
    stage = course / "02_second"
    assert guard.verdict(stage, Uses(stage), ("model.py", "Sizes.area")) == "" and not file.exists()
    assert guard.verdict(stage, Uses(stage), ("model.py", "guarded")) != "" and file.exists(), "some did not run"


def test_where_the_nearest_pass_the_others_run_too(course):
    write(course, {"02_second/tests/test_model.py": "import model\n\ndef test_a():\n    assert model.guarded\n"})
    write(course, {"02_second/tests/test_far.py": "import model\n\ndef test_b():\n    vars(model)['guarded'](1)\n"})
    stage = course / "02_second"
    assert guard.verdict(stage, Uses(stage), ("model.py", "guarded")) == "", "a test that does not name it notices"


WAITS = """\
import os, time
from pathlib import Path

import model

def test_a():
    try:
        model.guarded(1)
    except NotImplementedError:
        Path({file!r}).write_text(str(os.getpid()))
        time.sleep(60)
"""


HERE = f"""\
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import guard
from shared.program import run_program
if __name__ == "__main__":
    run_program(guard.main)
"""


def test_the_command_hands_over_to_the_courses_own_tests(course):
    write(course, {"tests/guard.py": "import sys\nprint(sys.argv[1:])\nsys.exit(1)\n"})
    assert finish(course, "guard", "2", "GPT", "main")[:2] == (1, "['02_second', 'GPT', 'main']\n")


@pytest.mark.skipif(os.name != "posix", reason="signals of a POSIX terminal")
def test_ctrl_c_ends_the_checkpoints_too(course):
    file = course / "started"
    write(course, {"02_second/tests/test_model.py": WAITS.format(file=str(file))})
    write(course, {"tests/guard.py": HERE})
    with start(course, "guard", "2", "guarded") as process:
        child = int(wait_for(file))
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "stopped\n")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
