"""The warm process answers as a cold check does, belongs to one user and one state of the course, and ends by itself.

The torch that it imports here is a module in which every name is `print`: the real one costs seconds.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import shared
from shared.stages import warm

import pytest

from course import LIMIT, finish, make, on_terminal, program, stages, start, wait_for, write

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork: every check runs cold")

EMPTY = """\
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return print
"""
MODEL = 'def double(x):\n    """Twice x."""\n    return {} * x\n'
TESTS = """\
import os, sys
from pathlib import Path

from model import double


def test_double():
    \"\"\"Doubling doubles.\"\"\"
    with open("ran", "a") as file:
        print("torch" in sys.modules, os.environ.get("LIKE"), sys.path, file=file)
    assert double(2) == 4, f"{double(2)} is not twice two"


def test_width():
    \"\"\"Something that fails.\"\"\"
    assert False, "red " * 40
"""
SLOW = """\
import os, time
from pathlib import Path

from model import double


def test_double():
    \"\"\"Waits.\"\"\"
    assert double
    Path("started").write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Two stages with modules of the same names, practised and written; afterwards no warm process is left."""
    with tempfile.TemporaryDirectory(prefix="w") as short:  # a socket's name may have about 100 characters
        monkeypatch.setenv("STAGES_WARM", "1")
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        empty = {"torch/__init__.py": EMPTY, "torch/testing.py": EMPTY}
        stub = str(write(tmp_path / "stub", empty))
        monkeypatch.setenv("PYTHONPATH", stub, prepend=os.pathsep)
        monkeypatch.setenv("PYTHONIOENCODING", "utf-8")  # as `course.start` does: it belongs to the address
        files = {"model.py": MODEL.format(2), "tests/test_model.py": TESTS}
        top = make(tmp_path / "course", {"01_first": {**files}, "02_second": {**files, "model.py": MODEL.format(3)}})
        for number in "12":
            stages(top, "practice", number)
        for name in ("01_first", "02_second"):
            shutil.copy(top / name / "model.py", top / "practice" / name)
        yield top
        (top / "pyproject.toml").unlink(missing_ok=True)
        wait_until(lambda: not sockets(), "the warm process outlives its course")


def sockets() -> list[Path]:
    return [*Path(os.environ["XDG_RUNTIME_DIR"]).glob("*/*")]


def wait_until(true, claim: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline, claim
        time.sleep(0.02)


def ran(course: Path) -> list[str]:
    """Of each run in the first stage's copy: whether torch was there, $LIKE and sys.path."""
    return (course / "practice/01_first/ran").read_text("utf-8").splitlines()


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def check(course: Path, number: str = "1", **env) -> tuple[int, str, str]:
    code, out, err = finish(course, "check", number, "--practice", **env)
    return code, re.sub(r"in \d+ s", "in 0 s", out), err


def test_a_warm_check_says_what_a_cold_one_says(course):
    cold, first, second = check(course, STAGES_WARM="0"), check(course), check(course)
    assert cold[0] == 1, cold
    assert "✓ Doubling doubles." in cold[1] and "✗ Something that fails." in cold[1]
    assert first == second == cold, "another exit code or another text"
    assert [line.split()[0] for line in ran(course)] == ["False", "True", "True"], "it did not run in the warm process"
    assert len({line.partition("[")[2] for line in ran(course)}) == 1, "modules are looked for in other places"
    assert len(sockets()) == 1, "the second check has not found the first one's process"


def test_two_stages_never_meet(course):
    assert "✓ Doubling doubles." in check(course)[1]
    assert "6 is not twice two" in check(course, "2")[1], "the second stage was tested with the first one's model"


def test_it_runs_in_the_environment_of_the_one_who_asks(course):
    check(course, LIKE="tea")  # which starts it
    check(course)
    assert [line.split()[1] for line in ran(course)] == ["tea", "None"], "it keeps what it was started with"


def test_a_terminal_gets_colours_and_its_width(course):
    words = [sys.executable, "-c", "from shared.stages.cli import main; main()", "check", "1", "--practice"]
    check(course)
    seen = [re.sub(r"in \d+ s", "", on_terminal(words, cwd=course, env={"STAGES_WARM": way})) for way in "01"]
    assert "\x1b[32m✓\x1b[0m" in seen[0] and ran(course)[-1].startswith("True")
    assert seen[1] == seen[0], "the terminal shows something else than for a cold check"


def test_ctrl_c_ends_the_check_and_the_warm_process_lives_on(course):
    check(course)
    write(course, {"practice/01_first/tests/test_model.py": SLOW})
    with start(course, "check", "1", "--practice") as process:
        running = int(wait_for(course / "practice/01_first/started"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "stopped\n")
    assert not alive(running), "the check goes on"
    before = sockets()
    check(course, "2")
    assert sockets() == before, "Ctrl-C has ended the warm process too"


def test_a_check_ends_with_the_one_who_asked(course):
    write(course, {"practice/01_first/tests/test_model.py": SLOW})
    with start(course, "check", "1", "--practice") as process:
        running = int(wait_for(course / "practice/01_first/started"))
        process.kill()
    wait_until(lambda: not alive(running), "the check goes on without the one who asked for it")


FRAGILE = """\
import os, signal, sys

from model import double


def test_double():
    \"\"\"Lives.\"\"\"
    assert double
    if "torch" in sys.modules:
        os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_check_that_the_fork_kills_runs_again_without(course):
    write(course, {"practice/01_first/tests/test_model.py": FRAGILE})
    code, out, err = check(course)
    assert (code, err) == (0, "") and "✓ Lives." in out


def test_only_this_user_may_ask(course):
    check(course)
    assert warm.private_folder().stat().st_mode & 0o777 == 0o700
    warm.private_folder().chmod(0o755)
    assert warm.reach(course) is None, "a folder that others may enter was trusted"
    assert check(course)[0] == 1 and ran(course)[-1].startswith("False")
    Path(os.environ["XDG_RUNTIME_DIR"], f"stages-{os.getuid()}").chmod(0o700)


def test_where_no_socket_can_be_had_a_check_runs_cold(course, monkeypatch):
    write(course, {"file": ""})
    for folder in (course / "file", course / ("long" * 30)):
        (course / ("long" * 30)).mkdir(exist_ok=True)
        assert check(course, XDG_RUNTIME_DIR=str(folder))[0] == 1
        assert ran(course)[-1].startswith("False")


def test_what_nobody_listens_to_any_more_is_replaced(course):
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(warm.address(course)))
    assert check(course)[0] == 1 and ran(course)[-1].startswith("True")


def test_another_environment_has_another_warm_process(course, monkeypatch):
    before = warm.address(course)
    monkeypatch.setenv("ANYTHING", "else")
    assert warm.address(course) == before, "what nothing reads at its import counts"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert warm.address(course) != before, "torch would run with another number of threads"
    monkeypatch.delenv("OMP_NUM_THREADS")
    packages = write(course / "packages", {"first.py": ""})
    monkeypatch.setattr(warm.sysconfig, "get_path", lambda name: str(packages))
    before = warm.address(course)
    wait_until(lambda: write(packages, {f"{time.time()}.py": ""}) and warm.address(course) != before, "a new package")


SERVE = """\
import sys
from pathlib import Path

import shared
from shared.stages import warm

warm.PRELOAD = ()
shared.__file__ = sys.argv[2]
warm.serve(Path(sys.argv[1]), idle=float(sys.argv[3]), tick=0.05)
"""


@pytest.mark.parametrize("way", ["idle", "the course is gone", "shared has changed", "another has its place"])
def test_it_ends_by_itself(course, monkeypatch, way):
    copy = write(course / "shared", {"__init__.py": ""})
    monkeypatch.setattr(shared, "__file__", str(copy / "__init__.py"))
    idle = "0.5" if way == "idle" else "1000"
    with program([sys.executable, "-c", SERVE, str(course), str(copy / "__init__.py"), idle]) as process:
        place = warm.address(course)
        wait_until(lambda: place.exists() or process.poll() is not None, "it never listened")
        held = warm.connect(course) if way == "idle" else None
        if held:
            time.sleep(1)
            assert process.poll() is None, "a connection that is held is not idle"
            held.close()
        elif way == "the course is gone":
            (course / "pyproject.toml").unlink()
        elif way == "shared has changed":
            os.utime(copy / "__init__.py", (1, 1))
        else:
            place.unlink()
            place.touch()
        try:
            _, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it goes on although {way}")
    assert process.returncode == 0, err
    assert place.exists() == (way == "another has its place"), "its socket, and only its own, goes with it"
    place.unlink(missing_ok=True)
