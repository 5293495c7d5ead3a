"""`shared.program.run_program`: one line and the right exit code for a user's mistake, a traceback for ours."""

from shared.errors import BadInput
from shared.program import run_program

import pytest


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
    ],
)
def test_one_line_and_an_exit_code(error, code, message, capsys, monkeypatch):
    monkeypatch.delenv("STAGES_TRACEBACK", raising=False)
    assert outcome(error, capsys) == (code, "", message)


def test_the_exit_code_of_main_is_kept(capsys):
    assert outcome(None, capsys)[0] is None, "a main that returns nothing must exit with 0"
    assert outcome(3, capsys)[0] == 3


def test_a_bug_keeps_its_traceback():
    def main():
        raise ValueError("not the user's fault")

    with pytest.raises(ValueError, match="not the user's fault"):
        run_program(main)


@pytest.mark.parametrize("error", [BadInput("x"), OSError("x"), KeyboardInterrupt()])
def test_stages_traceback_shows_everything(error, monkeypatch):
    monkeypatch.setenv("STAGES_TRACEBACK", "1")

    def main():
        raise error

    with pytest.raises(type(error)):
        run_program(main)
