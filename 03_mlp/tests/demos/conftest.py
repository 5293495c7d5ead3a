"""A small text, and one small run on it that the demos look at."""

import random

import pytest

import train

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


@pytest.fixture
def trained(text, out):
    """A run called "tiny"."""
    train.main(["--corpus", str(text), "--name", "tiny", "--steps", "60", "--eval-every", "20", "--batch-size", "64",
                "--block-size", "4", "--n-embd", "6", "--n-hidden", "16", "--device", "cpu"])
    return out / "tiny"
