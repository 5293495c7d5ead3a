"""`ruff check`, as the root pyproject.toml configures it, has nothing to say."""

import sys
from pathlib import Path

from shared.stages.repo import root

from course import run


def test_ruff_is_content():
    top = root(Path(__file__).parent)
    words = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "--no-cache"]
    code, out, err = run(words, cwd=top)
    assert code == 0, out + err
