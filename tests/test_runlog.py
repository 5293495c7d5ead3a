"""`shared.runlog`: what a run leaves behind, whole or not at all."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from shared import boards
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
    log.metrics(step=1, loss=torch.tensor(2.5), lr=np.float64(0.1), tokens=np.int64(4))
    log.metrics(2, loss=2.0)
    returned = log.finish(speedup=3.5, val_loss=1.5, tokens=8, params=2, steps=2, seconds=1.0, val_bpb=2.25)
    assert load(log.folder / "config.json") == {"corpus": "names", "seed": 7, "lr": 1e-3, "out": "a"}
    rows = read_metrics(log.folder)
    assert [row.pop("seconds") >= 0 for row in rows] == [True, True]
    assert rows == [{"step": 1, "loss": 2.5, "lr": 0.1, "tokens": 4}, {"step": 2, "loss": 2.0}]
    assert load(log.folder / "summary.json") == returned == {
        "stage": "06_gpt", "script": "train.py", "run": "default", "corpus": "names", "seed": 7, "seconds": 1.0,
        "speedup": 3.5, "val_loss": 1.5, "tokens": 8, "params": 2, "steps": 2, "val_bpb": 2.25,
    }  # fmt: skip


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
    log.keep()
    assert load(log.folder / "config.json") == {"model": {"n_head": 4}, "lr": 0.1}


def finished(stage) -> Path:
    """The folder of a run that has three metrics and a summary."""
    log = RunLog(stage / "train.py", config={"lr": 0.1})
    for step in (10, 20, 30):
        log.metrics(step, loss=1 / step)
    log.finish(val_loss=1.5)
    return log.folder


def record(folder: Path) -> dict[str, str]:
    """What a run's folder holds, by file."""
    return {file.name: file.read_text("utf-8") for file in folder.iterdir()}


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def test_a_new_run_leaves_the_earlier_one_until_it_keeps_something(stage):
    folder = finished(stage)
    before = record(folder)
    log = RunLog(stage / "train.py", config={"lr": 0.2})
    log.metrics(5, loss=3.0)
    assert record(folder) == before, "a run that is stopped now has cost the earlier one its record"
    log.keep()
    assert load(folder / "config.json") == {"lr": 0.2} and steps(folder) == [5], "what came before keep() is lost"
    assert not (folder / "summary.json").exists(), "the earlier run's result stands beside the new one's metrics"
    log.metrics(6, loss=2.0)
    assert steps(folder) == [5, 6], "metrics are written at once, for whoever watches"
    log.keep()
    assert steps(folder) == [5, 6], "each checkpoint calls keep(): the second one must not start over"
    log.finish(val_loss=1.25)
    assert load(folder / "summary.json")["val_loss"] == 1.25 and steps(folder) == [5, 6]


def test_finish_keeps_what_no_checkpoint_has_kept(stage):
    folder = finished(stage)
    log = RunLog(stage / "train.py", config={"lr": 0.2})
    log.metrics(5, loss=3.0)
    log.finish(val_loss=1.25)
    assert load(folder / "config.json") == {"lr": 0.2} and steps(folder) == [5]
    assert load(folder / "summary.json")["val_loss"] == 1.25


def test_a_resumed_run_goes_on_from_its_step(stage):
    folder = finished(stage)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 40, "lo')  # the machine went down here
    log = RunLog(stage / "train.py", resume=20)
    assert steps(folder) == [10, 20], "metrics after the checkpoint would be there twice"
    log.metrics(25, loss=0.5)
    rows = [(row["step"], row["loss"]) for row in read_metrics(folder)]
    assert rows == [(10, 0.1), (20, 0.05), (25, 0.5)], "half a line spoilt the next"
    log.keep()
    assert steps(folder) == [10, 20, 25], "keep() drops the metrics of a resumed run"


def test_resuming_where_nothing_is_starts_empty(stage):
    log = RunLog(stage / "train.py", resume=5)
    assert read_metrics(log.folder) == []


def test_ctrl_c_says_when_nothing_was_kept(stage):
    folder = finished(stage)
    before = record(folder)
    with pytest.raises(KeyboardInterrupt, match="stopped: nothing of this run was kept, .*default is as it was"):
        with RunLog(stage / "train.py") as log:
            log.metrics(5, loss=3.0)
            raise KeyboardInterrupt
    assert record(folder) == before


@pytest.mark.parametrize("resume", [0, 20])
def test_ctrl_c_claims_nothing_of_a_run_that_was_kept(stage, resume):
    finished(stage)
    with pytest.raises(KeyboardInterrupt) as error:
        with RunLog(stage / "train.py", resume=resume) as log:
            log.keep()
            raise KeyboardInterrupt
    assert not error.value.args


def test_ctrl_c_is_told_once_where_several_processes_train(stage, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(KeyboardInterrupt) as error:
        with RunLog(stage / "train.py") as log:
            log.keep()
            raise KeyboardInterrupt
    assert not error.value.args, "only rank 0 knows what was kept"


def test_another_error_passes_through_as_it_is(stage):
    with pytest.raises(OSError, match="No space left"):
        with RunLog(stage / "train.py"):
            raise OSError(28, "No space left on device")


def test_a_board_gets_the_metrics_and_is_closed(stage, monkeypatch):
    seen = []

    class Board:
        def __init__(self, folder, stage, config):
            seen.append((folder.name, stage, config))

        def show(self, step, numbers):
            seen.append((step, numbers))

        def close(self):
            seen.append("closed")

    monkeypatch.setattr(boards, "TensorBoard", Board)
    with pytest.raises(KeyboardInterrupt):
        with RunLog(stage / "train.py", config={"lr": 0.1}, board="tensorboard") as log:
            log.metrics(5, loss=3.0)
            raise KeyboardInterrupt
    assert seen == [("default", "06_gpt", {"lr": 0.1}), (5, {"loss": 3.0}), "closed"]


def test_a_board_whose_package_is_missing(stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="wandb is not installed .*: uv pip install wandb, or leave out --board"):
        RunLog(stage / "train.py", board="wandb")


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
    log.keep()
    assert log.finish(val_loss=1.0)["seed"] == 1
    assert log.folder.is_dir(), "what a process of its own writes there finds no folder when the first process is late"
    assert not list(log.folder.iterdir()), "the record is the first process's alone"


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
