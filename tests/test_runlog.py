"""`shared.runlog`: what a run leaves behind, whole or not at all."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from shared import boards, lock
from shared.atomic import write
from shared.errors import BadInput
from shared.runlog import RunLog, read_metrics, run_folder

import matplotlib
import numpy as np
import pytest
import torch

from course import gone, program, run

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
    expected = {"script": "train.py", "corpus": "names", "seed": 7, "lr": 1e-3, "out": "a"}
    assert load(log.folder / "config.json") == expected
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
    assert load(log.folder / "config.json") == {"script": "train.py", "model": {"n_head": 4}, "lr": 0.1}


def finished(stage) -> Path:
    """The folder of a run that has three metrics and a summary."""
    log = RunLog(stage / "train.py", config={"lr": 0.1})
    for step in (10, 20, 30):
        log.metrics(step, loss=1 / step)
    log.finish(val_loss=1.5)
    return log.folder


def record(folder: Path) -> dict[str, str]:
    """What a run's folder holds, by file, apart from the lock of a run under way."""
    return {file.name: file.read_text("utf-8") for file in folder.iterdir() if file.name != "lock"}


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def test_a_new_run_leaves_the_earlier_one_until_it_keeps_something(stage):
    folder = finished(stage)
    before = record(folder)
    log = RunLog(stage / "train.py", config={"lr": 0.2})
    log.metrics(5, loss=3.0)
    assert record(folder) == before, "a run that is stopped now has cost the earlier one its record"
    log.keep()
    assert load(folder / "config.json")["lr"] == 0.2 and steps(folder) == [5], "what came before keep() is lost"
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
    assert load(folder / "config.json")["lr"] == 0.2 and steps(folder) == [5]
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


LADDER = """<!-- ladder -->
| stage | model | parameters | training tokens | seconds | val loss (nats/char) | bits/byte |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
| [02_ngram](02_ngram/README.md) | 5-gram, Kneser-Ney | 316,931 | 1,003,847 | 0.059 | 1.561 | 2.252 |
| [05_transformer](05_transformer/README.md) | transformer | 212,545 | 4,915,200 | 107 | 1.640 | 2.366 |
| [06_gpt](06_gpt/README.md) | GPT | 208,320 | 6,144,000 | 117 | 1.564 | 2.257 |
| nanoGPT | CPU recipe, published | 804,096 | 1,536,000 |  | 1.880 | 2.712 |

![9.999](a.png)
<!-- /ladder -->
| x | elsewhere | 1 | 1 | 1 | 1.565 | 1 |
"""


@pytest.mark.parametrize(
    ("loss", "place"),
    [
        (1.5801, ": on the ladder between GPT (1.564) and transformer (1.640)"),
        (1.56400001, ": on the ladder between 5-gram, Kneser-Ney (1.561) and transformer (1.640)"),
        (2.1, ": worse than all on the ladder, next to nanoGPT's CPU recipe, published (1.880)"),
        (1.2, ": better than all on the ladder, next to 5-gram, Kneser-Ney (1.561)"),
    ],
)
def test_a_language_model_ends_with_its_place_on_the_ladder(stage, capsys, loss, place):
    """Between which two rungs of the README's table a run on the ladder's text stands; its own rung is no neighbour."""
    (stage.parent / "README.md").write_text(LADDER, encoding="utf-8")
    RunLog(stage / "train.py").finish(val_loss=loss, corpus="shakespeare")
    assert capsys.readouterr().out == f"loss {loss:.3f} on shakespeare{place}\n", "not its neighbours"


def test_a_run_on_another_text_ends_with_that_text_and_a_warning(stage, capsys):
    """2.07 on the Python documentation is no bad 1.56: the text is named beside the loss, and no rung is."""
    (stage.parent / "README.md").write_text(LADDER, encoding="utf-8")
    for corpus, name in (("python-docs", "python-docs"), ("/far/away/mine.txt", "mine.txt")):
        RunLog(stage / "train.py").finish(val_loss=torch.tensor(2.07), corpus=corpus)
        told = f"loss 2.070 on {name}: not the text of the READMEs' losses\n"
        assert capsys.readouterr().out == told, "losses on two texts are compared"


def test_only_a_language_model_of_a_stages_own_script_has_a_place(stage, capsys, monkeypatch):
    """No line after a demo, after what is no language model, and from the other processes of a run."""
    RunLog(stage / "demos" / "sweep.py", "a").finish(val_loss=1.5, corpus="shakespeare")
    RunLog(stage / "train.py", "b").finish(accuracy=1.0, corpus="shakespeare")
    RunLog(stage / "train.py", "c").finish(val_loss=1.5)
    monkeypatch.setenv("RANK", "1")
    RunLog(stage / "train.py", "d").finish(val_loss=1.5, corpus="shakespeare")
    assert capsys.readouterr().out == "", "a place on the ladder for what does not stand on it"


def test_a_course_without_a_ladder_says_the_loss_and_the_text(stage, capsys):
    """A stage copied elsewhere, or a README whose table was edited, costs the place and never the run."""
    for text in (None, "# Course\n", "<!-- ladder -->\n| torn |\n"):
        if text:
            (stage.parent / "README.md").write_text(text, encoding="utf-8")
        RunLog(stage / "train.py").finish(val_loss=1.5, corpus="shakespeare")
        assert capsys.readouterr().out == "loss 1.500 on shakespeare\n", f"{text!r}"


RUN = """
import os
import sys
from shared.program import run_program
from shared.runlog import RunLog

def main():
    log = RunLog(sys.argv[1])
    log.metrics(1, loss=1.0)
    log.keep()
    print("under way", os.getpid(), flush=True)
    sys.stdin.read()

run_program(main)
"""


def test_a_second_run_of_the_same_name_is_refused_while_the_first_one_lives(stage):
    """Two at once would mix their metrics. A run that was killed leaves its lock behind, which stops nobody."""
    words = [sys.executable, "-c", RUN, str(stage / "train.py")]
    folder = stage / "out" / "default"
    with program(words, stdin=subprocess.PIPE) as first:
        pid = first.stdout.readline().removeprefix("under way ").strip()  # on Windows a launcher has first.pid
        before = record(folder)
        with pytest.raises(BadInput, match=f"run 'default' is being made by another process .{pid}.: wait") as no:
            RunLog(stage / "train.py")
        assert "\n" not in str(no.value) and record(folder) == before, "the second run wrote over the first's record"
        with pytest.raises(BadInput):
            RunLog(stage / "train.py", resume=1)
        RunLog(stage / "train.py", "other").finish()
    assert (folder / "lock").read_text("utf-8") == pid, "killed, it cannot have removed its lock"
    RunLog(stage / "train.py").finish(val_loss=1.0)
    assert not (folder / "lock").exists(), "a finished run keeps its folder locked"


def test_a_run_that_ends_gives_up_its_folder_however_it_ends(stage):
    """After an error inside `with`, after the end of a program without `with`, and a second run of one process."""
    folder = stage / "out" / "default"
    with pytest.raises(ZeroDivisionError):
        with RunLog(stage / "train.py"):
            assert (folder / "lock").read_text("utf-8") == str(os.getpid())
            1 / 0  # noqa: B018
    assert not (folder / "lock").exists(), "an error keeps the folder locked"
    code, out, err = run([sys.executable, "-c", RUN, str(stage / "train.py")], stdin=subprocess.DEVNULL)
    assert (code, err) == (0, "") and not (folder / "lock").exists(), f"the end of a program too: {out}"
    RunLog(stage / "train.py")
    RunLog(stage / "train.py", resume=1).finish()


def test_of_two_runs_that_begin_at_once_one_is_refused(stage, monkeypatch):
    """Whenever the other one makes its lock: before this one, after this one looked, or half, without its id yet."""
    file, other = stage / "out" / "default" / "lock", str(os.getppid())
    file.parent.mkdir(parents=True)
    make, look = Path.open, lock.holder

    def first(path, mode="r", *args, **options):
        if mode == "x":
            path.write_text(other, encoding="utf-8")
        return make(path, mode, *args, **options)

    def looked(folder):
        pid = look(folder)
        file.write_text(other, encoding="utf-8")
        return pid

    def slept(seconds):
        file.write_text(other, encoding="utf-8")

    for found, owner, name, late in (
        (None, Path, "open", first), (str(gone()), lock, "holder", looked), ("", lock.time, "sleep", slept),
    ):  # fmt: skip
        file.unlink(missing_ok=True)
        if found is not None:
            file.write_text(found, encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, late)
            with pytest.raises(BadInput, match=f"by another process .{other}."):
                RunLog(stage / "train.py")
        assert os.listdir(file.parent) == ["lock"] and file.read_text("utf-8") == other, f"{name}: two have the folder"


@pytest.mark.parametrize("content", ["", "x", "-", "gone"])
def test_a_lock_of_nobody_is_ignored(stage, content):
    """An id that no process has, or half a file: a crash must not cost the name of the run."""
    folder = stage / "out" / "default"
    folder.mkdir(parents=True)
    (folder / "lock").write_text(str(gone()) if content == "gone" else content, encoding="utf-8")
    assert lock.holder(folder) is None
    RunLog(stage / "train.py").finish()


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
