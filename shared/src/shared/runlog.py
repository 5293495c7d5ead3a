"""The record of a run: `out/<name>/` in the script's stage, with config, metrics, figures and a summary.

Every file but `metrics.jsonl` is written beside its place and renamed, so a reader never meets half of one.
Under `torchrun` only rank 0 writes.
"""

import dataclasses
import io
import json
import math
import os
import re
import time
from pathlib import Path

from shared.atomic import write
from shared.errors import BadInput

SUMMARY = ("corpus", "seed", "params", "tokens", "steps", "seconds", "val_loss", "val_bpb")
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
    """One run of one script.

    `config.json` is written at once; `metrics()` adds lines to `metrics.jsonl`; `finish()` writes `summary.json`.
    A new run of the same name starts a new `metrics.jsonl` unless `resume`; the summary and the figures of an earlier
    run stay until this one replaces them. STAGES_OUT, when set, takes the place of the stage's `out` folder.
    Raises BadInput for a name that is no plain folder name and for a folder that cannot be written to.
    """

    def __init__(self, script: str | Path, name: str = "default", config: dict | None = None, resume: bool = False):
        stage = stage_folder(script)
        self.stage, self.script = stage.name, Path(script).resolve().relative_to(stage).as_posix()
        self.folder = run_folder(script, name)
        self.config = json.loads(dumps(config or {}))
        self.begin = time.perf_counter()
        self.writes = os.environ.get("RANK", "0") == "0"
        if not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / "config.json", dumps(self.config, indent=2) + "\n")
            (self.folder / "metrics.jsonl").open("a" if resume else "w", encoding="utf-8").close()
            self.rewind(math.inf)  # half a line, left by a crash, would spoil the next one
        except OSError as error:
            remedy = "choose another name or STAGES_OUT"
            raise BadInput(f"cannot write to {self.folder} ({error.strerror}): {remedy}") from None

    def metrics(self, step: int, **numbers) -> None:
        """Add one line: {"step": step, "seconds": since this RunLog was made unless given, **numbers}."""
        if self.writes:
            seconds = round(time.perf_counter() - self.begin, 3)
            line = dumps({"step": step, "seconds": seconds, **numbers}) + "\n"
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8", newline="\n") as file:
                file.write(line)

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`, the step of the checkpoint that a resumed run goes on from."""
        if self.writes:
            kept = [row for row in read_metrics(self.folder) if row["step"] <= step]
            write(self.folder / "metrics.jsonl", "".join(dumps(row) + "\n" for row in kept))

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

        It holds the stage, the script and the run's name, `corpus` and `seed` (from the config unless given),
        `params`, `tokens`, `steps`, `seconds` (since the run began unless given), `val_loss` in nats per character and
        `val_bpb` where given, then the script's own headline figures.
        """
        known = {key: self.config[key] for key in ("corpus", "seed") if key in self.config}
        known = {**known, "seconds": round(time.perf_counter() - self.begin, 2), **headline}
        ordered = {key: known[key] for key in (*SUMMARY, *known) if key in known}
        summary = {"stage": self.stage, "script": self.script, "run": self.folder.name, **ordered}
        if self.writes:
            write(self.folder / "summary.json", dumps(summary, indent=2) + "\n")
        return json.loads(dumps(summary))


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
