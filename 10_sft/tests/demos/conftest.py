"""A small text, a base that was trained on it for two steps, and a place for what the demos write."""

import random
import shutil

import pytest

import train
from demos import ablation

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of 12,000 characters with some 150 words, in which the demos find their tasks."""
    pick = random.Random(1)
    known = ["".join(pick.choices(LETTERS, k=pick.randint(3, 8))) for _ in range(150)]
    lines = (" ".join(pick.choices(known, k=6)) for _ in range(1000))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines)[:12_000], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """The folder of the base."""
    place = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAGES_OUT", str(place))
        shape = ["--n-expert", "0", "--n-embd", "16", "--n-head", "2", "--n-layer", "2", "--batch-size", "4"]
        train.main(["--corpus", str(text), "--name", "tiny", "--steps", "2", *shape])
    return place / "tiny"


@pytest.fixture
def out(trained, tmp_path, monkeypatch):
    """Where the runs of this test go; the base is there."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    shutil.copytree(trained, tmp_path / "out" / "tiny")
    return tmp_path / "out"


@pytest.fixture
def flags(text, out, monkeypatch):
    """What makes any demo of this stage run in a second or two. A model that learned nothing never ends an answer."""
    monkeypatch.setattr(ablation, "LENGTH", 4)
    return ["--base", "tiny", "--corpus", str(text), "--steps", "3", "--seeds", "1", "--batch-size", "5",
            "--records", "45", "--test", "18"]  # fmt: skip
