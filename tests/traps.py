"""Plants the mistakes listed in a stage's traps.toml, one at a time, and sees whether their checkpoints notice."""

import json
import os
import re
import shutil
from pathlib import Path

from shared.stages.bughunt import plant
from shared.stages.check import BARE

import isolated

PATIENCE = 120  # seconds until a test counts as hanging
# What any test would stumble over is a typing error, not a mistake of understanding.
SLIPS = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "NameError")


def copy(stage: Path, folder: Path) -> Path:
    """The stage without the leftovers of its runs."""
    leftovers = shutil.ignore_patterns("out", "__pycache__", ".pytest_cache")
    return shutil.copytree(stage, folder / stage.name, ignore=leftovers)


def run_pytest(words: list[str], result: Path) -> int:
    """pytest in this process; shared.stages.checkpoints writes the result."""
    import pytest

    os.environ |= BARE | {"STAGES_RESULT": str(result)}
    # Plain: what pytest tells of an assertion without words is not read here, and each copy would be prepared for it.
    plain = ["-q", "-p", "shared.stages.checkpoints", "-p", "no:cacheprovider", "--assert=plain"]
    return pytest.main([*plain, *words])


def run(stage: Path, tests: list[str], scratch: Path) -> tuple[dict | None, str]:
    """Run some of the stage's tests: the result of shared.stages.checkpoints, and the end of what was printed.

    The result is None if they never end.
    """
    file, output = scratch / "result.json", scratch / "output.txt"
    file.unlink(missing_ok=True)
    code = isolated.call(run_pytest, stage, output, tests, file, timeout=PATIENCE)
    result = json.loads(file.read_text("utf-8")) if file.exists() else {"ends": {}, "broken": {}}
    told = output.read_text("utf-8", errors="replace") if output.exists() else ""  # it may hang before the first word
    return result if code is not None else None, "\n".join(told.splitlines()[-25:])


def verdict(stage: Path, trap: dict[str, str], scratch: Path) -> str:
    """Why the trap's checkpoint does not catch it, or "" when it does, by a failed assertion or an exception."""
    planted = copy(stage, scratch)
    if wrong := plant(planted, trap):
        return wrong
    result, output = run(planted, [trap["caught_by"], "-x"], scratch)
    if result is None:
        return f"{trap['caught_by']} never ends"
    if result["broken"]:
        return f"the module cannot be imported: {[*result['broken'].values()][0]}"
    if not result["ends"]:
        return f"{trap['caught_by']} did not run\n{output}"
    failures = [end["message"] for ends in result["ends"].values() for end in ends if end["outcome"] == "failed"]
    if not failures:
        return f"{trap['caught_by']} does not notice it"
    if re.match("|".join(SLIPS), failures[0]):
        return f"{trap['caught_by']} fails for a slip, not for the idea: {failures[0]}"
    return ""
