"""`stages check`: what a learner sees, and what is recorded."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from course import LIMIT, finish, make, on_terminal, program, start, wait_for, write

MODEL = """\
def double(x):
    return 2 * x

def crash(x):
    return x.nope
"""
TESTS = """\
import pytest
from model import crash, double

def test_double():
    \"\"\"Doubling [of two] doubles.

    More words.
    \"\"\"
    assert double(2) == 4

@pytest.mark.parametrize("x", [1, 2, 3])
def test_small(x):
    \"\"\"Doubles of small numbers stay small.\"\"\"
    assert double(x) < 5, f"{double(x)} is large: the idea of double is broken"

def test_bare():
    assert double(3) == 7

def test_crash():
    \"\"\"Nothing crashes.\"\"\"
    crash(1)

def test_cuda():
    \"\"\"Runs on a GPU.\"\"\"
    pytest.skip("no CUDA here")

@pytest.fixture
def lost():
    raise FileNotFoundError("no such table")

def test_setup(lost):
    \"\"\"Has what it needs.\"\"\"
"""
SCREEN = """
01_first  First

tests/test_model.py
  ✓ Doubling [of two] doubles.
  ✗ Doubles of small numbers stay small. (2/3)
      6 is large: the idea of double is broken  tests/test_model.py:14
  ✗ test_bare
      assert 6 == 7
       +  where 6 = double(3)  tests/test_model.py:17
  ✗ Nothing crashes.
      AttributeError: 'int' object has no attribute 'nope'  model.py:5
  – Runs on a GPU.
      no CUDA here
  ✗ Has what it needs.
      FileNotFoundError: no such table  tests/test_model.py:29

tests/test_other.py
  ✓ Something else.
"""
OTHER = 'def test_other():\n    """Something else."""\n    assert True, "never"\n'


@pytest.fixture
def course(tmp_path):
    first = {"model.py": MODEL, "tests/test_model.py": TESTS, "tests/test_other.py": OTHER}
    return make(tmp_path, {"01_first": first, "02_second": {"tests/test_other.py": OTHER}})


def record(course: Path) -> dict:
    return json.loads((course / ".stages" / "progress.json").read_text("utf-8"))


def test_each_checkpoint_is_shown_by_its_claim_and_its_failure_by_the_idea(course):
    code, out, err = finish(course, "check", "1")
    body, last = out.rstrip().rsplit("\n\n", 1)
    assert body.splitlines() == SCREEN.splitlines()
    assert last.startswith("01_first: 2 of 7 checkpoints passed, 1 skipped in ")
    assert (code, err) == (1, ""), "a failed checkpoint must give exit code 1"
    failed = [f"tests/test_model.py::test_{name}" for name in ("small", "bare", "crash", "setup")]
    assert record(course) == {"01_first": {"total": 7, "passed": 2, "skipped": 1, "failed": failed}}


def test_without_a_name_it_is_the_stage_we_stand_in_and_at_the_root_all(course):
    code, out, _ = finish(course / "02_second" / "tests", "check")
    assert code == 0 and "01_first" not in out
    assert list(record(course)) == ["02_second"]
    code, out, _ = finish(course, "check")
    assert code == 1 and list(record(course)) == ["02_second", "01_first"]
    assert out.index("01_first  First") < out.index("02_second  Second")


def test_inside_a_practice_copy_it_is_the_copy(course):
    """The course's own text passes, and says nothing about the learner's. VS Code's task stands in the copy too."""
    finish(course, "practice", "1", "double")
    code, out, err = finish(course / "practice" / "01_first" / "tests", "check")
    assert (code, err) == (1, "") and "\npractice/01_first  First" in out and "02_second" not in out, out
    assert "double (" in out.split("not written yet")[1], out
    code, out, _ = finish(course / "practice" / "01_first", "check", "2")
    assert code == 0 and "\n02_second  Second" in out, "a stage that is named is meant"
    write(course, {"practice/01_first_bug/model.py": MODEL})
    code, _, err = finish(course / "practice" / "01_first_bug", "check")
    told = "this is the copy of a bug hunt: check it with uv run stages bughunt 01"
    assert (code, err) == (2, f"error: {told}\n"), "the course's text, or the blanks', is checked in its place"
    code, _, err = finish(course / "practice", "check")
    assert code == 2 and "name one stage" in err


@pytest.mark.parametrize(
    ("slip", "line", "error"),
    [
        ("return 2 * * x", "return 2 * * x", "SyntaxError: invalid syntax"),
        ("return 2 * x\n\nimport nothing_of_the_kind", "import nothing_of_the_kind", "ModuleNotFoundError: No module"),
        ("return 2 * x\n\nsize = double(None)", "return 2 * x", "TypeError: unsupported operand"),
        ("return 2 * x\n\ndel double", "from model import crash, double", "ImportError: cannot import name 'double'"),
    ],
)
def test_a_slip_in_the_module_is_one_block_with_file_and_line(course, slip, line, error):
    write(course / "01_first", {"model.py": MODEL.replace("return 2 * x", slip)})
    write(course / "01_first", {"tests/test_more.py": TESTS})
    code, out, _ = finish(course, "check", "1")
    block = out[out.index("✗") :].splitlines()
    file = "tests/test_model.py" if "from model" in line else "model.py"
    number = (course / "01_first" / file).read_text("utf-8").splitlines()
    where = next(i for i, text in enumerate(number, 1) if text.strip() == line)
    assert block[0] == f"✗ {file}, line {where}"
    assert block[1].strip() == line and block[2].strip().startswith(error)
    assert code == 1 and "✓ Something else." in out, "the files that can be imported still run"
    assert "Traceback" not in out
    entry = record(course)["01_first"]
    assert (entry["total"], entry["passed"]) == (13, 1), "tests that could not be collected still count"


def test_verbose_shows_pytests_own_output(course):
    code, out, _ = finish(course, "check", "1", "--verbose")
    assert code == 1 and "test_model.py::test_small[3] FAILED" in out and ">       assert double(3) == 7" in out
    assert "✗" not in out and record(course)["01_first"]["passed"] == 2


def test_the_users_own_pytest_options_do_not_count(course, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-n 2")
    code, _, err = finish(course, "check", "2")
    assert code == 0, f"an option of a plugin that is off: {err}"


def test_a_stage_without_tests_and_a_broken_conftest_are_told(course):
    (course / "02_second" / "tests" / "test_other.py").unlink()
    code, _, err = finish(course, "check", "2")
    assert (code, err) == (2, "error: 02_second has no checkpoints: its tests/ holds no test\n")
    write(course / "01_first", {"tests/conftest.py": "1 / 0\n"})
    code, _, err = finish(course, "check", "1")
    assert code == 2 and "pytest broke down in 01_first" in err and "ZeroDivisionError" in err
    assert not (course / ".stages").exists(), "nothing ran, nothing is recorded"


SKIPS = """\
import pytest

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_devices(device):
    \"\"\"Runs everywhere.\"\"\"
    if device == "cuda":
        pytest.skip("no CUDA here")

def test_cuda():
    \"\"\"Runs on a GPU.\"\"\"
    pytest.skip("no CUDA here")
"""


def test_what_this_machine_cannot_test_does_not_fail_the_stage(course):
    write(course / "02_second", {"tests/test_other.py": SKIPS})
    code, out, _ = finish(course, "check", "2")
    assert code == 0 and "✓ Runs everywhere. (1/2)" in out and "– Runs on a GPU." in out
    assert "02_second: 1 of 2 checkpoints passed, 1 skipped" in out


TWICE = """\
import pytest

@pytest.fixture
def table():
    yield
    raise OSError("the table is gone")

def test_first(table):
    \"\"\"Fails twice.\"\"\"
    assert 1 > 2, "the idea"

def test_second(table):
    \"\"\"Fails afterwards.\"\"\"
"""


def test_the_first_failure_is_the_one_that_is_told(course):
    write(course, {"02_second/tests/test_other.py": TWICE})
    code, out, _ = finish(course, "check", "2")
    assert code == 1 and out.count("✗") == 2
    assert "the idea" in out.split("✗")[1] and "the table is gone" not in out.split("✗")[1]
    assert "OSError: the table is gone" in out.split("✗")[2], "what fails after a test fails the test"


WAITS = """\
import time
from pathlib import Path

def test_a():
    \"\"\"The first.\"\"\"

def test_b():
    \"\"\"The second.\"\"\"
    Path("started").write_text(str(__import__("os").getpid()))
    while not Path("seen").exists():
        time.sleep(0.02)
"""


def test_results_appear_while_the_next_test_runs(course):
    write(course / "02_second", {"tests/test_other.py": WAITS})
    with start(course, "check", "2", PYTHONUNBUFFERED="1") as process:
        lines = [process.stdout.readline().strip() for _ in range(5)]
        write(course / "02_second", {"seen": ""})
        out, _ = process.communicate()
    assert lines[-2:] == ["tests/test_other.py", "✓ The first."]
    assert process.returncode == 0 and "✓ The second." in out


PRINTS = """\
import os
import pytest
from shared.console import console

@pytest.mark.parametrize("way", ["kept", "killed"])
def test_a(way):
    \"\"\"A claim that is read while it is tested.\"\"\"
    console.print("printed by the test")
    if way == os.environ.get("WAY"):
        os._exit(9)
"""


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals")
@pytest.mark.parametrize("way", ["", "killed"])
def test_a_terminal_shows_what_is_being_tested_and_is_left_sane(course, way):
    write(course, {"02_second/tests/test_other.py": PRINTS})
    words = [sys.executable, "-c", "from shared.stages.cli import main; main()", "check", "2"]
    out = on_terminal(words, cwd=course, env={"WAY": way})
    assert "collecting the checkpoints" in out and "\x1b[2mA claim that is read" in out
    assert "printed by the test" not in out, "what a test prints is the test's"
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor stays hidden"
    assert ("1 of 1 checkpoints passed" in out) == (way == "")


@pytest.mark.skipif(os.name != "posix", reason="signals of a POSIX terminal")
def test_ctrl_c_ends_pytest_too_and_keeps_the_earlier_record(course):
    finish(course, "check", "2")
    before = record(course)
    write(course / "02_second", {"tests/test_other.py": WAITS})
    with start(course, "check", "2") as process:
        child = int(wait_for(course / "02_second" / "started"))
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "stopped\n")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert record(course) == before


STUBBORN = """\
import os, signal, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
Path("started").write_text(str(os.getpid()))
time.sleep(60)
"""
PATIENT = """\
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from shared.stages.run import run_child
class Told(subprocess.Popen):
    def wait(self, timeout=None):
        print("waiting", flush=True)
        return super().wait(timeout)
subprocess.Popen = Told
run_child([sys.executable, "stubborn.py"], patience=float(sys.argv[1]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of a POSIX terminal")
@pytest.mark.parametrize(("presses", "patience"), [(1, 0.2), (2, 2 * LIMIT)], ids=["patience", "twice"])
def test_a_program_that_does_not_hear_ctrl_c_is_ended(tmp_path, presses, patience):
    """As one that was started where Ctrl-C is ignored: when patience is at its end, the user's or the given one."""
    write(tmp_path, {"stubborn.py": STUBBORN})
    with program([sys.executable, "-c", PATIENT, str(patience)], cwd=tmp_path) as process:
        child = int(wait_for(tmp_path / "started"))
        for _ in range(presses):
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode != 0 and err == "stopped\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
