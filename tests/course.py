"""A small course in a temporary folder, of plain Python: no torch, so that a check takes half a second."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shared.stages import cli

LIMIT = 60  # seconds that a program has; the machine may be busy

STAGE = """\
[project]
name = "{number}"

[tool.stages]
title = "{title}"
main = "train.py"

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["."]
"""


def edit(text: str, *changes: tuple[str, str]) -> str:
    """`text` with each (old, new) replaced; an old that is not there exactly once is the test's own mistake."""
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    return text


def forget_git(monkeypatch) -> None:
    """Delete what git sets for its hooks: run in one, a test would write into the caller's repository."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write files by relative path, with their folders."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def make(top: Path, stages: dict[str, dict[str, str]]) -> Path:
    """A course of `stages`, e.g. {"01_first": {"train.py": "...", "tests/test_a.py": "..."}}."""
    write(top, {"pyproject.toml": '[tool.uv.workspace]\nmembers = ["*"]\n'})
    for name, files in stages.items():
        about = STAGE.format(number=name[:2], title=name[3:].capitalize())
        write(top / name, {"pyproject.toml": about + files.pop("pyproject.toml", ""), **files})
    return top


@contextlib.contextmanager
def program(words: list[str], limit: float = LIMIT, **options) -> Iterator[subprocess.Popen]:
    """A program at the head of its own process group, its output piped as text; `options` are those of Popen.

    After `limit` seconds, and on the way out, the whole group is killed: no wait is without end, not even one for the
    next line, and nothing that the program started outlives the test.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(words, start_new_session=True, **pipes | options) as process:
        watchdog = threading.Timer(limit, kill, [process])
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """End a program and its whole group."""
    process.kill()
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none of them is left
            os.killpg(process.pid, signal.SIGKILL)


def run(words: list[str], limit: float = LIMIT, **options) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program; the code is negative if it had to be killed."""
    with program(words, limit, **options) as process:
        out, err = process.communicate()
    return process.returncode, out, err


def on_terminal(words: list[str], **options) -> str:
    """What a program writes to a terminal of 100 columns, escape sequences included."""
    import pty  # not on Windows

    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"} | options.pop("env", {})
    out = b""
    with program(words, env=env, **{"stdout": theirs, "stderr": subprocess.DEVNULL} | options):
        os.close(theirs)
        with contextlib.suppress(OSError):  # Linux' way to say that the other end is closed
            while block := os.read(ours, 65536):
                out += block
    os.close(ours)
    return out.decode("utf-8")


def start(folder: Path, *words: str, **env):
    """`stages words...` in `folder` as a program of its own: a context, as `program` is."""
    # A shell lets what it starts in the background ignore Ctrl-C, and every child would do so too.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from shared.stages.cli import main; main()"
    env = os.environ | {"PYTHONIOENCODING": "utf-8"} | env
    return program([sys.executable, "-c", code, *words], cwd=folder, env=env)


def finish(folder: Path, *words: str, **env) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `stages words...` in `folder` as a program of its own."""
    with start(folder, *words, **env) as process:
        out, err = process.communicate()
    return process.returncode, out, err


def gone() -> int:
    """The id of a process that has ended."""
    with program([sys.executable, "-c", ""]) as process:
        process.communicate()
    return process.pid


def wait_for(file: Path) -> str:
    """What is written in `file`, once it is there."""
    deadline = time.monotonic() + LIMIT
    while not (file.exists() and file.stat().st_size):
        assert time.monotonic() < deadline, f"{file.name} was never written"
        time.sleep(0.02)
    return file.read_text("utf-8")


def stages(folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `stages words...` in `folder`, without the cost of a process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words)
        except SystemExit as end:
            return end.code, out.getvalue(), err.getvalue()
    raise AssertionError("a program ends with an exit code")
