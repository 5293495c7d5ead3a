"""A small text to run the demos on, and a place for what they write."""

import random

import pytest

WORDS = "the a cat rat mat sat on under and ran from big old".split()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of 12,000 characters in which words repeat and sentences do not."""
    pick = random.Random(1)
    lines = (" ".join(pick.choice(WORDS) for _ in range(6)) for _ in range(1000))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines)[:12_000], encoding="utf-8")
    return file


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where the runs of this test go."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    return tmp_path / "out"
