"""`ruff check`, as the root pyproject.toml configures it, has nothing to say."""

import subprocess
import sys
from pathlib import Path

from shared.stages.repo import root


def test_ruff_is_content():
    top = root(Path(__file__).parent)
    words = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "--no-cache"]
    done = subprocess.run(words, cwd=top, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
