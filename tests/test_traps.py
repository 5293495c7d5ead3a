"""Every classic mistake listed in a stage's traps.toml is caught by the checkpoint that claims to."""

import os
from pathlib import Path

from shared.stages.bughunt import traps
from shared.stages.repo import root, stages

import pytest

import isolated
from course import make
from traps import copy, run, run_pytest, verdict

STAGES = stages(root(Path(__file__).parent))
TRAPS = [
    pytest.param(stage, trap, id=f"{stage.name}-{trap.get('name', 'unnamed')}")
    for stage in STAGES
    for trap in traps(stage.path)
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_has_traps_and_its_checkpoints_pass_in_a_copy(stage, tmp_path):
    """One of each file: test_stages runs them all; here it is the copy that must not be to blame for a failure."""
    listed = traps(stage.path)
    assert len(listed) >= 6, f"{stage.name}/traps.toml lists {len(listed)} traps, 6 are the least"
    assert len({trap["name"] for trap in listed}) == len(listed), "two traps have the same name"
    files = {trap["caught_by"].partition("::")[0]: trap["caught_by"] for trap in reversed(listed)}  # the first counts
    named = sorted(files.values())
    result, output = run(copy(stage.path, tmp_path), named, tmp_path)
    assert result, f"they never end\n{output}"
    assert set(result["ends"]) == set(named), f"not all of {named} ran\n{output}"
    assert all(end["outcome"] == "passed" for ends in result["ends"].values() for end in ends), output


@pytest.mark.parametrize(("stage", "trap"), TRAPS)
def test_the_named_checkpoint_catches_the_trap(stage, trap, tmp_path):
    reason = verdict(stage.path, trap, tmp_path)
    assert not reason, f"{stage.name}: {trap.get('name')}: {reason}"


MODEL = '''\
import math

def area(r):
    """Of a circle."""
    if r < 0:
        raise ValueError("negative")
    return math.pi * r * r
'''
TESTS = '''\
import math
import pytest
from model import area

@pytest.mark.parametrize("r", [1.0, 2.0])
def test_area(r):
    assert abs(area(r) - math.pi * r**2) < 1e-9, "the area grows with the square"

def test_other():
    pass
'''
GOOD = {
    "name": "circumference",
    "file": "model.py",
    "find": "math.pi * r * r",
    "replace": "2 * math.pi * r",
    "caught_by": "tests/test_model.py::test_area",
    "hint": "units",
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"find": "r < 0", "replace": "r > 1"}, ""),  # an exception notices as well as an assertion
        ({"caught_by": "tests/test_model.py::test_other"}, "does not notice it"),
        ({"find": "negative", "replace": "below 0"}, "does not notice it"),
        ({"find": "math"}, "occurs 2 times"),
        ({"find": "absent"}, "occurs 0 times"),
        ({"file": "engine.py"}, "there is no file engine.py"),
        ({"replace": "math.pi * * r"}, "cannot be imported: SyntaxError"),
        ({"replace": "math.pi * radius"}, "fails for a slip, not for the idea: NameError"),
        ({"find": "import math", "replace": "import maths"}, "cannot be imported: ModuleNotFoundError"),
        ({"caught_by": "tests/test_model.py::test_absent"}, "did not run"),
        ({"find": "if r < 0:", "replace": "while True:\n        pass\n    if r < 0:"}, "never ends"),
        ({"hint": " "}, "all filled in"),
    ],
)
def test_what_counts_as_caught(change, reason, tmp_path, monkeypatch):
    """The judge itself, on a small stage."""
    if reason == "never ends":
        monkeypatch.setattr("traps.PATIENCE", 3)  # the others need more on a busy machine, and do not wait
    stage = make(tmp_path / "course", {"01_circle": {"model.py": MODEL, "tests/test_model.py": TESTS}}) / "01_circle"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    told = verdict(stage, GOOD | change, scratch)
    assert reason in told if reason else not told, told
    assert (stage / "model.py").read_text("utf-8") == MODEL, "the real stage was touched"


def test_a_process_that_hangs_before_its_first_word_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "call", lambda *args, **options: None)
    assert run(tmp_path, [], tmp_path) == (None, ""), "it left no output to be read"


def pytest_with_options(words: list[str], result: Path) -> int:
    """As run_pytest, for someone who has asked every pytest for two processes."""
    os.environ["PYTEST_ADDOPTS"] = "-n 2"
    return run_pytest(words, result)


def test_the_users_own_pytest_options_do_not_count(tmp_path):
    stage = make(tmp_path / "course", {"01_circle": {"tests/test_model.py": "def test_a():\n    pass\n"}}) / "01_circle"
    output = tmp_path / "output.txt"
    code = isolated.call(pytest_with_options, stage, output, ["tests"], tmp_path / "result.json", timeout=120)
    assert code == 0, "an option of a plugin that is off: " + output.read_text("utf-8")
