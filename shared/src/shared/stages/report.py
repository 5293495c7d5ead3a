"""A pytest plugin: what happens to each test, as JSON lines in the file named by $STAGES_REPORT.

Events, in the order they occur:
    {"event": "broken", "tests": "tests/test_model.py", "file": "model.py", "line": 12, "error": "...", "code": "..."}
    {"event": "collected", "tests": [{"id": "tests/test_model.py::test_mask", "claim": "..."}, ...]}
    {"event": "start", "id": ...}
    {"event": "end", "id": ..., "outcome": "passed" | "failed" | "skipped", "message": "...", "where": "model.py:12"}
A parametrised test appears under one id, once per parameter.
"""

import json
import os
import traceback
from pathlib import Path

import pytest


def pytest_configure(config):
    """Open the report."""
    config.stages_report = open(os.environ["STAGES_REPORT"], "a", encoding="utf-8")


def pytest_unconfigure(config):
    """Close the report."""
    config.stages_report.close()


def send(config, event: str, **fields) -> None:
    """Write one event at once: the reader shows it live."""
    config.stages_report.write(json.dumps({"event": event, **fields}) + "\n")
    config.stages_report.flush()


def test_id(item) -> str:
    """The test's id without its parameters: `tests/test_a.py::test_b[3]` -> `tests/test_a.py::test_b`."""
    return item.nodeid.split("[")[0]


def claim(item) -> str:
    """The first line of the test's docstring, or its name."""
    text = (getattr(item.obj, "__doc__", None) or "").strip()
    return text.splitlines()[0] if text else item.name.split("[")[0]


def place(error: BaseException, top: Path) -> tuple[str, int, str]:
    """File, line number and code where `error` came up: the deepest frame in `top`, or ("", 0, "")."""
    if isinstance(error, SyntaxError) and error.filename:
        return relative(error.filename, top), error.lineno or 0, (error.text or "").strip()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(top):
            return relative(frame.filename, top), frame.lineno or 0, frame.line or ""
    return "", 0, ""


def relative(file: str, top: Path) -> str:
    """`file` as seen from `top`, in full when it lies elsewhere."""
    path = Path(file)
    return path.relative_to(top).as_posix() if path.is_relative_to(top) else file


def first_words(error: BaseException) -> str:
    """What an exception says: an assertion's own message, without pytest's explanation below it."""
    text = str(error).split("\nassert ")[0].strip()
    if isinstance(error, AssertionError):
        return text or "assertion failed"
    if isinstance(error, SyntaxError):
        text = error.msg
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def pytest_exception_interact(node, call, report):
    """A test file that cannot be imported, mostly because of a slip in the module it tests."""
    if isinstance(report, pytest.CollectReport):
        error = call.excinfo.value.__cause__ or call.excinfo.value  # pytest wraps what went wrong
        file, line, code = place(error, node.config.rootpath)
        send(node.config, "broken", tests=node.nodeid, file=file, line=line, error=first_words(error), code=code)


def pytest_collection_finish(session):
    """All tests that will run."""
    tests = [{"id": test_id(item), "claim": claim(item)} for item in session.items]
    send(session.config, "collected", tests=tests)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """One test, from set-up to tear-down: the worst of the three is its outcome."""
    send(item.config, "start", id=test_id(item))
    item.stages_end = {"outcome": "passed", "message": "", "where": ""}
    result = yield
    send(item.config, "end", id=test_id(item), **item.stages_end)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Remember a failure with its message and place, or a skip with its reason."""
    report = yield
    if report.failed and item.stages_end["outcome"] != "failed":
        if call.excinfo is None:  # a strict xfail that passed
            item.stages_end = {"outcome": "failed", "message": str(report.longrepr), "where": ""}
        else:
            file, line, _ = place(call.excinfo.value, item.config.rootpath)
            item.stages_end = {
                "outcome": "failed",
                "message": first_words(call.excinfo.value),
                "where": f"{file}:{line}" if file else "",
            }
    elif report.skipped and item.stages_end["outcome"] == "passed":
        reason = call.excinfo.value if call.excinfo else getattr(report, "wasxfail", "")
        item.stages_end = {"outcome": "skipped", "message": str(reason), "where": ""}
    return report
