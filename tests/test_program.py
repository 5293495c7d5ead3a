"""`shared.program`: one line and the right exit code for a user's mistake, a traceback for ours."""

import os
import re
import subprocess
import sys

from shared.errors import BadInput
from shared.program import command, run_program

import pytest
import torch

from course import on_terminal, run, write


def outcome(error, capsys):
    """What `run_program` makes of a program that raises `error` (or returns it): exit code, stdout, stderr."""

    def main():
        if isinstance(error, BaseException):
            raise error
        return error

    with pytest.raises(SystemExit) as stop:
        run_program(main)
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "error, code, message",
    [
        (BadInput("no corpus 'x': choose names"), 2, "error: no corpus 'x': choose names\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt("stopped; saved at step 7"), 130, "stopped; saved at step 7\n"),
        (MemoryError(), 1, "error: this does not fit into memory: choose smaller sizes\n"),
    ],
    ids=repr,
)
def test_one_line_and_an_exit_code(error, code, message, capsys, monkeypatch):
    monkeypatch.delenv("STAGES_TRACEBACK", raising=False)
    assert outcome(error, capsys) == (code, "", message)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**60),  # more than any memory
        lambda: torch.empty(2**40, 2**40),  # more than a number of 64 bits can count
        lambda: bytearray(2**62),
    ],
    ids=["torch", "overflow", "Python"],
)
def test_sizes_that_no_memory_holds_are_one_line(allocate, capsys, monkeypatch):
    """What is raised is torch's own: its words are not ours to choose."""
    monkeypatch.delenv("STAGES_TRACEBACK", raising=False)
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate()
    message = "error: this does not fit into memory: choose smaller sizes\n"
    assert outcome(error.value, capsys) == (1, "", message), f"not recognised: {error.value}"


def test_the_exit_code_of_main_is_kept(capsys):
    assert outcome(None, capsys)[0] is None, "a main that returns nothing must exit with 0"
    assert outcome(3, capsys)[0] == 3


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, NotImplementedError])
def test_a_bug_keeps_its_traceback(kind):
    def main():
        raise kind("not the user's fault")

    with pytest.raises(kind, match="not the user's fault"):
        run_program(main)


@pytest.mark.parametrize("error", [BadInput("x"), OSError("x"), MemoryError("x"), KeyboardInterrupt()], ids=repr)
def test_stages_traceback_shows_everything(error, monkeypatch):
    monkeypatch.setenv("STAGES_TRACEBACK", "1")

    def main():
        raise error

    with pytest.raises(type(error)):
        run_program(main)


def test_a_command_is_what_can_be_typed_from_anywhere():
    assert command("06_gpt", "train.py", "--resume") == "uv run stages run 06 train.py --resume"
    assert command("03_mlp", "sample.py") == "uv run stages run 03 sample.py"


@pytest.mark.parametrize("traceback", ["", "1"])
def test_ctrl_c_while_torch_is_imported_is_one_line(traceback, tmp_path):
    """`import torch` takes seconds, before `run_program` is reached; here a module stands in for torch."""
    script = "from shared import options\nimport slow\n"
    write(tmp_path, {"slow.py": "raise KeyboardInterrupt\n", "train.py": script})
    env = os.environ | {"STAGES_TRACEBACK": traceback}
    code, out, err = run([sys.executable, str(tmp_path / "train.py")], env=env)
    assert code != 0 and out == ""
    assert "Traceback" in err if traceback else err == "stopped\n", err


def test_a_bug_while_torch_is_imported_keeps_its_traceback(tmp_path):
    write(tmp_path, {"slow.py": "1 / 0\n", "train.py": "from shared import options\nimport slow\n"})
    code, _, err = run([sys.executable, str(tmp_path / "train.py")])
    assert code == 1 and "Traceback" in err and "ZeroDivisionError" in err


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("body", ["print('imported')", "raise KeyboardInterrupt"])
def test_a_terminal_says_that_torch_is_being_loaded_until_it_is(body, tmp_path):
    """Said before the import, gone after it or after Ctrl-C; here a small module stands in for torch."""
    write(tmp_path, {"torch.py": body, "train.py": "from shared import options\nimport torch\nprint('begin')\n"})
    out = on_terminal([sys.executable, str(tmp_path / "train.py")], stderr=subprocess.STDOUT)
    said, gone, after = re.match(r"(loading torch…)(?:imported\r\n)?(\r *\r)(.*)", out, re.S).groups()
    assert len(gone) - 2 == len(said), "the end of a longer line is left on the screen"
    assert after == ("begin\r\n" if "print" in body else "stopped\r\n"), f"not on a clean line: {out!r}"


def test_in_a_pipe_and_for_other_modules_nothing_is_said(tmp_path):
    """What reads a script's output is not to meet a notice in it."""
    write(tmp_path, {"torch.py": "", "train.py": "from shared import options\nimport torch\nprint(torch.__name__)\n"})
    assert run([sys.executable, str(tmp_path / "train.py")]) == (0, "torch\n", "")
