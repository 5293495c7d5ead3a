"""`stages watch`: a save is answered with the checkpoints of what was changed."""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from course import LIMIT, edit, make, program, stages, start, write

MODEL = '''\
def area(r):
    """3 r r."""
    return 3 * r * r


def total(radii):
    """The sum of the areas."""
    return sum(area(r) for r in radii)


def largest(radii):
    """The largest area."""
    return max(area(r) for r in radii)
'''
TESTS = '''\
from model import area, largest, total


def test_area():
    """The area is 3 r r."""
    assert area(2) == 12, "the area is not 3 r r"


def test_total():
    """The total adds the areas."""
    assert total([1, 2]) == 15, "the total does not add areas"


def test_largest():
    """Only the largest counts."""
    assert largest([1, 2]) == 12, "another one than the largest"
'''
BLANK = "raise NotImplementedError"


@pytest.fixture
def course(tmp_path):
    """One stage with a practice copy in which nothing is written."""
    top = make(tmp_path, {"01_first": {"model.py": MODEL, "tests/test_model.py": TESTS, "README.md": "# First\n"}})
    assert stages(top, "practice", "1")[0] == 0
    return top


def save(course: Path, *changes: tuple[str, str]) -> None:
    """Write the learner's file with each (old, new) replaced."""
    file = course / "practice/01_first/model.py"
    write(file.parent, {file.name: edit(file.read_text("utf-8"), *changes)})


def body(name: str, code: str) -> tuple[str, str]:
    """The change that fills a blank."""
    docstring = MODEL.split(f"def {name}(")[1].split('"""')[1]
    return f'"""{docstring}"""\n    {BLANK}\n', f'"""{docstring}"""\n    {code}\n'


def answer(process) -> str:
    """What was said to a save: up to the line that says how many passed, and the next one; or one line of an error."""
    lines = []
    while not lines or not (" passed" in lines[-1] or lines[-1].startswith("✗ practice")):
        lines.append(process.stdout.readline())
        assert lines[-1], f"it ended: {''.join(lines)}"
    return "".join(lines)


def test_a_save_is_answered_with_the_checkpoints_of_what_changed(course):
    with start(course, "watch", "1", PYTHONUNBUFFERED="1") as process:
        first = answer(process)
        assert "practice/01_first  area  0/3 written" in first, "it begins with the first definition to write"
        assert process.stdout.readline() == "next: area in practice/01_first/model.py:1\n"

        save(course, body("area", "return 2 * r * r"))
        wrong = answer(process)
        assert "area  1/3 written" in wrong and "✗ The area is 3 r r." in wrong and "the area is not 3 r r" in wrong

        save(course, ("def total", "FACTOR = 3\n\n\ndef total"))
        assert "practice/01_first  area  1/3" in answer(process), "what failed comes again when something else changes"

        save(course, ("2 * r * r", "FACTOR * r * r"))
        right = answer(process)
        assert "✓ The area is 3 r r." in right and "area: 1 of 3 checkpoints passed, 2 wait" in right
        assert process.stdout.readline() == "next: total in practice/01_first/model.py:9\n"

        save(course, ("FACTOR = 3", "FACTOR = 3.0"))
        assert "practice/01_first  total  1/3" in answer(process), "after a success the next definition is up"
        process.stdout.readline()

        save(course, body("largest", "return max(area(r) for r in radii)"))
        last = answer(process)
        assert "practice/01_first  largest  2/3" in last, "the one that changed comes before the next one to write"
        assert "Only the largest counts" in last and "total" not in last, "only its own checkpoints"
        assert "n next" not in last, "without a terminal there are no keys"
        if os.name == "posix":  # Windows has no Ctrl-C for a single process
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
            assert (process.returncode, err) == (130, "stopped\n")


def test_a_broken_file_gets_one_line_and_is_waited_for(course):
    save(course, body("area", "return 3 * * r"))
    with start(course, "watch", "1", PYTHONUNBUFFERED="1") as process:
        assert answer(process).startswith("✗ practice/01_first/model.py, line 3, is not valid Python")
        time.sleep(0.5)
        save(course, ("3 * * r", "3 * r * r"))
        assert "total  1/3 written" in answer(process), "it goes on with what is to be written next"
        process.stdout.readline()
        save(course, ("3 * r * r", "3 * * r"))
        assert answer(process).count("\n") == 1, "one line, and only for the save"
        save(course, ("3 * * r", "r * r * 3"))
        assert "area  1/3 written" in answer(process), "compared with the last text that was Python"


def test_bad_input_gets_one_line(course):
    shutil.rmtree(course / "practice")
    for words, says in (
        (["watch", "1"], "01_first is not practised yet: uv run stages practice 01"),
        (["watch", "9"], "no stage '9': choose from 01_first"),
        (["watch"], "the following arguments are required: N"),
    ):
        code, _, err = stages(course, *words)
        assert code == 2 and err.startswith(f"error: {says}") and err.count("\n") == 1, err


def test_a_copy_that_is_moved_away_ends_it(course):
    with start(course, "watch", "1", PYTHONUNBUFFERED="1") as process:
        answer(process)
        shutil.move(course / "practice", course / "elsewhere")
        _, err = process.communicate()
    assert process.returncode == 2 and "is not practised yet" in err


@contextlib.contextmanager
def on_keyboard(course: Path):
    """`stages watch 1` on a terminal: the process, its terminal, and a function that waits for a text on it."""
    import pty  # not on Windows

    ours, theirs = pty.openpty()
    seen = ""

    def until(text: str) -> str:
        nonlocal seen
        deadline = time.monotonic() + LIMIT
        while text not in seen:
            assert time.monotonic() < deadline, f"{text!r} is not in {seen!r}"
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 65536).decode("utf-8")
        found, seen = seen, ""
        return found

    words = [sys.executable, "-c", "from shared.stages.cli import main; main()", "watch", "1"]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    pipes = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with program(words, cwd=course, env=env, **pipes) as process:
        yield process, ours, until
        assert process.wait(LIMIT) is not None
    os.close(ours)
    os.close(theirs)


def settings(terminal: int) -> list:
    """How the terminal is set: echo and lines among others."""
    import termios  # not on Windows

    return termios.tcgetattr(terminal)


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals")
def test_keys(course):
    with on_keyboard(course) as (process, terminal, until):
        shown = until("q quit")
        assert "\x1b[2J" in shown, "each answer has a clean screen"
        assert "01_first  area" in shown and "n next definition · h hint · q quit" in shown
        os.write(terminal, b"n")
        shown = until("q quit")
        assert "01_first  total" in shown and "\x1b[2J" in shown, "n shows the next definition that is not written"
        os.write(terminal, b"nx")
        assert "01_first  largest" in until("q quit")
        os.write(terminal, b"n")
        assert "01_first  area" in until("q quit"), "after the last one comes the first; x is no key"
        os.write(terminal, b"h")
        assert "area, hint 1 of 3" in until("one more"), "a hint for the definition on the screen"
        save(course, body("area", "return 3 * r * r"))
        assert "✓" in until("q quit"), "keys and saves do not get in each other's way"
        os.write(terminal, b"q")
        assert process.wait(LIMIT) == 0


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals")
@pytest.mark.parametrize("way", ["q", "Ctrl-C", "Ctrl-C in a check"])
def test_the_terminal_is_left_as_it_was(course, way):
    if way == "Ctrl-C in a check":
        write(course, {"practice/01_first/tests/test_model.py": f"import time\ntime.sleep({LIMIT})\n{TESTS}"})
    with on_keyboard(course) as (process, terminal, until):
        before = settings(terminal)
        until("q quit" if way != "Ctrl-C in a check" else "collecting")
        assert settings(terminal) != before, "a key needs Enter, and is echoed"
        if way == "q":
            os.write(terminal, b"q")
        else:
            process.send_signal(signal.SIGINT)
        code = process.wait(LIMIT)
        assert code == (0 if way == "q" else 130)
        assert settings(terminal) == before, "the terminal echoes nothing any more"
