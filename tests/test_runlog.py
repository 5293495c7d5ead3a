"""`shared.runlog`: what a run leaves behind, whole or not at all."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from shared.atomic import write
from shared.errors import BadInput
from shared.runlog import RunLog, read_metrics, run_folder

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A stage's folder with a main script and a demo."""
    monkeypatch.delenv("STAGES_OUT", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    folder = tmp_path / "06_gpt"
    (folder / "demos").mkdir(parents=True)
    (folder / "pyproject.toml").write_text("", encoding="utf-8")
    for script in ("train.py", "demos/sweep.py"):
        (folder / script).write_text("", encoding="utf-8")
    return folder


def load(file):
    return json.loads(file.read_text("utf-8"))


def test_a_run_leaves_config_metrics_and_summary_in_its_stage(stage):
    log = RunLog(stage / "train.py", config={"corpus": "names", "seed": 7, "lr": 1e-3, "out": Path("a")})
    assert log.folder == stage / "out" / "default"
    assert load(log.folder / "config.json") == {"corpus": "names", "seed": 7, "lr": 1e-3, "out": "a"}
    log.metrics(step=1, loss=torch.tensor(2.5), lr=np.float64(0.1), tokens=np.int64(4))
    log.metrics(2, loss=2.0)
    rows = read_metrics(log.folder)
    assert [row.pop("seconds") >= 0 for row in rows] == [True, True]
    assert rows == [{"step": 1, "loss": 2.5, "lr": 0.1, "tokens": 4}, {"step": 2, "loss": 2.0}]
    returned = log.finish(speedup=3.5, val_loss=1.5, tokens=8, params=2, steps=2, seconds=1.0, val_bpb=2.25)
    summary = load(log.folder / "summary.json")
    assert summary == returned
    assert list(summary.items()) == [
        ("stage", "06_gpt"), ("script", "train.py"), ("run", "default"), ("corpus", "names"), ("seed", 7),
        ("params", 2), ("tokens", 8), ("steps", 2), ("seconds", 1.0), ("val_loss", 1.5), ("val_bpb", 2.25),
        ("speedup", 3.5),
    ]  # fmt: skip


def test_a_demo_writes_into_its_stage_too_and_seconds_are_measured(stage):
    log = RunLog(str(stage / "demos" / "sweep.py"), "sweep-1")
    summary = log.finish(corpus="names")
    assert log.folder == stage / "out" / "sweep-1"
    assert 0 <= summary.pop("seconds") < 60
    assert summary == {"stage": "06_gpt", "script": "demos/sweep.py", "run": "sweep-1", "corpus": "names"}


def test_stages_out_moves_the_runs(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "elsewhere"))
    assert RunLog(stage / "train.py").folder == tmp_path / "elsewhere" / "default"
    assert not (stage / "out").exists()


def test_where_a_run_is_can_be_asked_without_starting_it(stage):
    assert run_folder(stage / "demos" / "sweep.py", "x") == stage / "out" / "x"
    assert not (stage / "out").exists()


def test_a_config_may_be_built_of_dataclasses(stage):
    @dataclass
    class Model:
        n_head: int = 4

    log = RunLog(stage / "train.py", config={"model": Model(), "lr": 0.1})
    assert load(log.folder / "config.json") == {"model": {"n_head": 4}, "lr": 0.1}


def test_a_new_run_starts_over_a_resumed_one_goes_on(stage):
    first = RunLog(stage / "train.py")
    for step in (10, 20, 30):
        first.metrics(step, loss=1 / step)
    first.finish(val_loss=1.5)
    with (first.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 40, "lo')  # the machine went down here
    resumed = RunLog(stage / "train.py", resume=True)
    resumed.metrics(35, loss=0.25)
    assert [row["step"] for row in read_metrics(resumed.folder)] == [10, 20, 30, 35], "half a line spoilt the next"
    resumed.rewind(20)
    resumed.metrics(25, loss=0.5)
    rows = [(row["step"], row["loss"]) for row in read_metrics(resumed.folder)]
    assert rows == [(10, 0.1), (20, 0.05), (25, 0.5)], "metrics after the checkpoint would be there twice"
    again = RunLog(stage / "train.py")
    assert read_metrics(again.folder) == []
    assert load(again.folder / "summary.json")["val_loss"] == 1.5, "the last result is lost before there is a new one"


def test_resuming_where_nothing_is_starts_empty(stage):
    log = RunLog(stage / "train.py", resume=True)
    log.rewind(5)
    assert read_metrics(log.folder) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/x", "-x", "a b", "x\n"])
def test_a_run_name_is_a_plain_folder_name(stage, name):
    with pytest.raises(BadInput, match="run name"):
        RunLog(stage / "train.py", name)
    found = sorted(path.name for path in stage.parent.rglob("*"))
    assert found == ["06_gpt", "demos", "pyproject.toml", "sweep.py", "train.py"], "a folder was made all the same"


def test_a_folder_that_cannot_be_written_to(stage):
    (stage / "out").write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(BadInput, match="cannot write to .*out.*STAGES_OUT"):
        RunLog(stage / "train.py")


def test_a_figure_is_small_and_closed(stage):
    import matplotlib.pyplot as plt

    log = RunLog(stage / "train.py")
    fig, axes = plt.subplots()
    axes.imshow(np.random.default_rng(0).random((300, 300, 3)), interpolation="nearest")  # noise compresses badly
    file = log.figure(fig, "noise")
    assert file == log.folder / "noise.png" and file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert 1000 < file.stat().st_size < 100_000
    assert not plt.fignum_exists(fig.number), "figures left open pile up in memory"


def test_only_rank_0_writes(stage, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = RunLog(stage / "train.py", config={"seed": 1})
    log.metrics(1, loss=1.0)
    log.rewind(0)
    assert log.finish(val_loss=1.0)["seed"] == 1
    assert not (stage / "out").exists()


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write(file, "old")

    def full(self, data):
        self.open("wb").write(data[:1])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            write(file, "new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(file, "new")
    assert file.read_text("utf-8") == "old" and os.listdir(tmp_path) == ["summary.json"]
    write(file, "new\n")
    assert file.read_bytes() == b"new\n"
