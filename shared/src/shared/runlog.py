"""The record of a run: `out/<name>/` in the script's stage, with config, metrics, figures and a summary.

Every file but `metrics.jsonl` is written beside its place and renamed, so a reader never meets half of one.
Under `torchrun` only rank 0 writes.
"""

import atexit
import dataclasses
import io
import json
import os
import re
import time
from pathlib import Path

from shared import boards, lock
from shared.atomic import write
from shared.console import say
from shared.errors import BadInput
from shared.stages import ladder

FIGURE_BYTES = 100_000


def run_folder(script: str | Path, name: str = "default") -> Path:
    """Where the run `name` of a stage's script is recorded: `out/<name>/` in the stage, or in STAGES_OUT when set.

    Raises BadInput for a name that is no plain folder name.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadInput(f"run name {name!r}: use letters, digits, '-', '_' and '.', beginning with a letter or digit")
    return Path(os.environ.get("STAGES_OUT") or stage_folder(script) / "out") / name


def stage_folder(script: str | Path) -> Path:
    """The stage that a script belongs to: the nearest folder above it with a pyproject.toml."""
    script = Path(script).resolve()
    return next((p for p in script.parents if (p / "pyproject.toml").is_file()), script.parent)


class RunLog:
    """One run of one script: `with RunLog(__file__, "tiny", vars(args)) as log`.

    A new run takes the place of an earlier one of its name only when it has something to show: `keep()`, called with
    the first checkpoint, or `finish()` write `config.json` and the metrics so far. A run that is refused or stopped
    before leaves the earlier one as it is, and Ctrl-C then says so. A run that resumes after step `resume` goes on with
    the metrics up to there. `board` shows the metrics elsewhere too: "tensorboard" or "wandb".
    Raises BadInput for a name that is no plain folder name, for a folder that cannot be written to and while another
    process makes the run of this name.
    """

    def __init__(
        self, script: str | Path, name: str = "default", config: dict | None = None, resume: int = 0,
        board: str | None = None,
    ):  # fmt: skip
        stage = stage_folder(script)
        self.stage, self.script = stage.name, Path(script).resolve().relative_to(stage).as_posix()
        self.readme = stage.parent / "README.md"  # the course's, which holds the ladder
        self.folder = run_folder(script, name)
        self.config = json.loads(dumps(config or {}))
        self.begin = time.perf_counter()
        self.writes = os.environ.get("RANK", "0") == "0"
        self.rows, self.kept, self.board = [], resume > 0, None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # in each process: the first one may be late
            if not self.writes:
                return
            lock.hold(self.folder)
            atexit.register(lock.release, self.folder)
            if resume:
                self.rewind(resume)
        except OSError as error:
            remedy = "choose another name or STAGES_OUT"
            raise BadInput(f"cannot write to {self.folder} ({error.strerror}): {remedy}") from None
        self.board = boards.start(board, self.folder, self.stage, self.config)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.writes:
            lock.release(self.folder)
        if self.board:
            self.board.close()
        if kind is KeyboardInterrupt and self.writes and not self.kept:
            kept = f"the record in {self.folder} is as it was"
            raise KeyboardInterrupt(f"stopped: nothing of this run was kept, {kept}") from None

    def keep(self) -> None:
        """From now on the record is this run's: an earlier one of its name goes, its summary included."""
        if self.writes and not self.kept:
            self.write_config()
            write(self.folder / "metrics.jsonl", "".join(self.rows))
            (self.folder / "summary.json").unlink(missing_ok=True)
            self.kept = True

    def metrics(self, step: int, **numbers) -> None:
        """Add one line: {"step": step, "seconds": since this RunLog was made unless given, **numbers}."""
        if not self.writes:
            return
        seconds = round(time.perf_counter() - self.begin, 3)
        line = dumps({"step": step, "seconds": seconds, **numbers}) + "\n"
        if self.kept:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8", newline="\n") as file:
                file.write(line)
        else:
            self.rows.append(line)
        if self.board:
            self.board.show(step, numbers)

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`, and half a line that a crash left: it would spoil the next one."""
        file = self.folder / "metrics.jsonl"
        file.touch()
        write(file, "".join(dumps(row) + "\n" for row in read_metrics(self.folder) if row["step"] <= step))
        self.write_config()  # it may have more steps now

    def write_config(self) -> None:
        """Write `config.json`: the script, with which a run that was stopped can go on, and its settings."""
        write(self.folder / "config.json", dumps({"script": self.script} | self.config, indent=2) + "\n")

    def figure(self, fig, name: str) -> Path:
        """Write a matplotlib figure to `<name>.png`, less than 100 kB (fewer dots per inch if need be); close it."""
        import matplotlib.pyplot as plt  # costs a second, and most runs draw nothing

        file = self.folder / f"{name}.png"
        if self.writes:
            for dpi in (144, 120, 100, 80, 60, 40):
                png = io.BytesIO()
                fig.savefig(png, format="png", dpi=dpi, bbox_inches="tight")
                if png.tell() < FIGURE_BYTES:
                    break
            write(file, png.getvalue())
        plt.close(fig)
        return file

    def finish(self, **headline) -> dict:
        """Write `summary.json` and return it.

        It holds the stage, the script and the run's name, and unless given `corpus` and `seed` from the config and
        `seconds` since the run began. A language model gives `params`, `tokens`, `steps`, `val_loss` in nats per
        character and `val_bpb`, and every script its own headline figures. Where a stage's own script, no demo, trained
        a language model, one line says on which text, and where its loss stands on the ladder.
        """
        known = {"stage": self.stage, "script": self.script, "run": self.folder.name}
        known |= {key: self.config[key] for key in ("corpus", "seed") if key in self.config}
        seconds = round(time.perf_counter() - self.begin, 2)
        summary = json.loads(dumps({**known, "seconds": seconds, **headline}))
        if self.writes:
            self.keep()
            write(self.folder / "summary.json", dumps(summary, indent=2) + "\n")
            lock.release(self.folder)
            if {"val_loss", "corpus"} <= summary.keys() and "/" not in self.script:
                say(ladder.place(summary["val_loss"], summary["corpus"], self.readme))
        return summary


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`; one that a crash cut short is left out."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def dumps(value, **how) -> str:
    """JSON; dataclasses become objects, numpy's and torch's numbers plain ones, the rest (paths) strings."""

    def plain(thing):
        if dataclasses.is_dataclass(thing):
            return dataclasses.asdict(thing)
        return thing.tolist() if hasattr(thing, "tolist") else str(thing)

    return json.dumps(value, default=plain, ensure_ascii=False, **how)
