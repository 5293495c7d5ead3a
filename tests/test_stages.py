"""Every stage's own checkpoints, each suite in a process of its own: same-named modules of two stages never meet."""

import os
import re
import sys
from pathlib import Path

from shared.stages.repo import Stage, find, root, stages

import pytest

import course

STAGES = stages(root(Path(__file__).parent))
PATIENCE = 600  # seconds for one stage; the machine may be busy
NOWHERE = "http://127.0.0.1:9"  # a port where nobody listens: a download fails at once


def environment() -> dict[str, str]:
    """No network."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    proxies = {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "no_proxy": "localhost,127.0.0.1,::1"}
    return env | proxies | {name.upper(): value for name, value in proxies.items()}


def run(stage: Stage) -> tuple[bool, str]:
    """Whether the stage's checkpoints pass and at least one ran; the end of pytest's output."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--durations=3"]
    code, out, err = course.run(words, PATIENCE, cwd=stage.path, env=environment())
    passed = re.search(r"^(\d+) passed|, (\d+) passed", out, re.M)
    told = (out + err).splitlines()[-60:] + ([f"killed after {PATIENCE} s"] if code < 0 else [])
    return code == 0 and passed is not None, "\n".join(told)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_checkpoints(stage):
    sound, tail = run(stage)
    assert sound, f"{stage.name}:\n{tail}"


ONLINE = """\
import urllib.request
def test_network():
    urllib.request.urlopen("https://example.org", timeout=5)
"""


@pytest.mark.parametrize(
    ("test", "sound", "tail"),
    [
        ("def test_a():\n    pass\n", True, "1 passed"),
        ("def test_a():\n    assert 1 > 2, 'the order of numbers'\n", False, "the order of numbers"),
        ("import pytest\n@pytest.mark.skip\ndef test_a():\n    pass\n", False, "1 skipped"),
        ("", False, "no tests ran"),
        ("import absent\n", False, "No module named 'absent'"),
        (ONLINE, False, "refused"),
    ],
    ids=["passes", "fails", "only skips", "no tests", "does not import", "asks the network"],
)
def test_what_counts_as_sound(test, sound, tail, tmp_path):
    top = course.make(tmp_path, {"01_first": {"tests/test_a.py": test}})
    found, told = run(find("1", top))
    assert found == sound and tail in told, told
