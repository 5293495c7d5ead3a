"""A small course in a temporary folder, of plain Python: no torch, so that a check takes half a second."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from shared.stages import cli

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


def start(folder: Path, *words: str, **options) -> subprocess.Popen:
    """`stages words...` as its own process in `folder`, output piped as text, at the head of its own process group."""
    return subprocess.Popen(
        [sys.executable, "-c", "from shared.stages.cli import main; main()", *words],
        cwd=folder,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | options,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def stages(folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `stages words...` in `folder`, without the cost of a process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words)
        except SystemExit as end:
            return end.code, out.getvalue(), err.getvalue()
    raise AssertionError("a program ends with an exit code")


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that has been started."""
    with process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err
