"""`shared.boards`: a run's metrics reach TensorBoard and Weights & Biases, and nothing leaves the machine unasked."""

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from shared.errors import BadInput
from shared.runlog import RunLog, read_metrics

import pytest


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A stage's main script, and no settings of the user's."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("STAGES_OUT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    stage = tmp_path / "06_gpt"
    stage.mkdir()
    (stage / "pyproject.toml").write_text("", encoding="utf-8")
    return stage / "train.py"


@pytest.fixture
def outside(monkeypatch):
    """Everything that would leave the machine meets this proxy: the list of those who asked."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        done = threading.Event()

        def listen():
            while not done.is_set():
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    continue
                with peer:
                    peer.settimeout(2)
                    asked.append(peer.recv(200))

        thread = threading.Thread(target=listen)
        thread.start()
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
            monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
        monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
        monkeypatch.setattr(urllib.request, "_opener", None)  # it would remember the proxy beyond this test
        yield asked
        done.set()
        thread.join(5)


def record(log: RunLog) -> None:
    """A short run: a loss at every step, a validation loss at the second."""
    with log:
        for step in (1, 2, 3):
            log.metrics(step, train_loss=3.0 / step, lr=0.1 * step)
        log.metrics(3, val_loss=1.25)
        log.keep()


def expected(folder: Path) -> dict[str, list[tuple]]:
    """What metrics.jsonl says of each key: [(step, number), ...]."""
    found = {}
    for row in read_metrics(folder):
        for key in row.keys() - {"step", "seconds"}:
            found.setdefault(key, []).append((row["step"], pytest.approx(row[key])))
    return found


def on_tensorboard(folder: Path) -> dict[str, list[tuple]]:
    """The same as TensorBoard reads it from a folder with event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    events = EventAccumulator(str(folder)).Reload()
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}


def on_wandb(folder: Path) -> tuple[dict, dict[str, list[tuple]]]:
    """The config and the metrics of the one offline run under a folder.

    Its file has 7 bytes of head and then records: checksum (4 bytes), length (2), type (1), a Record of protobuf.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, config, metrics = file.read_bytes(), 7, {}, {}
    while place + 7 < len(data):
        length = int.from_bytes(data[place + 4:place + 6], "little")
        entry = Record.FromString(data[place + 7:place + 7 + length])
        place += 7 + length
        config |= {item.key: json.loads(item.value_json) for item in entry.run.config.update if item.key != "_wandb"}
        row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in entry.history.item}
        for key in row.keys() - {"_step", "_runtime", "_timestamp"}:
            metrics.setdefault(key, []).append((row["_step"], row[key]))
    return config, metrics


def test_tensorboard_shows_what_the_metrics_say(script):
    log = RunLog(script, "board", board="tensorboard")
    record(log)
    [folder] = (log.folder / "tensorboard").iterdir()
    assert on_tensorboard(folder) == expected(log.folder) != {}


def test_two_runs_of_a_name_are_two_curves(script, monkeypatch):
    for clock in ("20260101-000000", "20260101-000001"):
        monkeypatch.setattr("shared.boards.time.strftime", lambda form, clock=clock: clock)
        log = RunLog(script, "board", board="tensorboard")
        record(log)
    folders = sorted((log.folder / "tensorboard").iterdir())
    assert len(folders) == 2 and all(on_tensorboard(folder) == expected(log.folder) for folder in folders)


def test_wandb_offline_stays_in_the_runs_folder(script, outside, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log = RunLog(script, "board", {"lr": 0.1, "corpus": "names"}, board="wandb")
    record(log)
    config, metrics = on_wandb(log.folder)
    assert config == {"lr": 0.1, "corpus": "names"} and metrics == expected(log.folder)
    assert not list((tmp_path / "elsewhere").iterdir()), "nothing is written where the run was started"
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", ""), "its lines would break the progress line"
    assert not outside, f"offline, and still it asked for {outside}"
    with pytest.raises(OSError):  # the watch is awake: whoever asks is seen
        urllib.request.urlopen("http://nowhere.invalid", timeout=2)
    assert len(outside) == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from Linux's /proc")
def test_wandb_leaves_no_process(script, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = children()
    record(RunLog(script, "board", board="wandb"))
    assert children() == before, "a process outlives the run"


def children() -> set[str]:
    """The processes that this one has started."""
    return {pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text("utf-8").split()}


def test_wandb_without_an_account_is_one_line(script, outside, monkeypatch, tmp_path):
    """In a process of its own, in which nobody can be asked for a key."""
    code = (
        "import sys\nfrom shared.program import run_program\nfrom shared.runlog import RunLog\n"
        "run_program(lambda: RunLog(sys.argv[1], board='wandb') and 0)\n"
    )
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, script], env=os.environ | home, stdin=subprocess.DEVNULL, capture_output=True,
        encoding="utf-8", timeout=120,
    )
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert "WANDB_MODE=offline" in done.stderr and "wandb login" in done.stderr, done.stderr


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(script, kind, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == kind or name.startswith("torch.utils.tensorb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)  # as if it were not there
    with pytest.raises(BadInput, match=f"{kind} is not installed .*uv pip install {kind}") as caught:
        RunLog(script, board=kind)
    assert "\n" not in str(caught.value)


def test_only_the_first_process_has_a_board(script, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = RunLog(script, "board", board="tensorboard")
    record(log)
    assert not list(log.folder.iterdir()), "the board is the first process's alone"
