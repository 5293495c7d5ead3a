"""What was measured: the summaries of a stage's runs, and the checkpoints passed."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shared import lock
from shared.atomic import write
from shared.program import command
from shared.stages.repo import Stage


@dataclass(frozen=True)
class Progress:
    """The last `stages check` of one folder. A checkpoint is one test function, whatever its parameters."""

    total: int
    passed: int
    skipped: int  # what this machine cannot test, e.g. CUDA
    failed: list[str] = field(default_factory=list)  # "tests/test_model.py::test_mask"; a file that cannot be read

    @property
    def complete(self) -> bool:
        return not self.failed and 0 < self.total == self.passed + self.skipped


def read_progress(top: Path) -> dict[str, Progress]:
    """What is recorded, by folder: {"06_gpt": Progress(...)}. A missing or damaged record counts as none."""
    try:
        record = json.loads((top / ".stages" / "progress.json").read_text("utf-8"))
        return {name: Progress(**entry) for name, entry in record.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def record_progress(top: Path, name: str, progress: Progress) -> None:
    """Add one folder's result to the record; the file is always whole."""
    record = read_progress(top) | {name: progress}
    file = top / ".stages" / "progress.json"
    file.parent.mkdir(exist_ok=True)
    write(file, json.dumps({name: asdict(entry) for name, entry in record.items()}, indent=1) + "\n")


def summaries(stage: Stage) -> dict[str, dict]:
    """The headline figures of the stage's finished runs, by run: {"default": {"val_loss": 1.59, ...}}."""
    found = {}
    for file in sorted(stage.path.glob("out/*/summary.json")):
        try:
            found[file.parent.name] = dict(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # not written by a run of this course
    return found


def unfinished(stage: Stage) -> list[str]:
    """The commands that continue the stage's stopped runs: those of scripts with --resume, and without a summary."""
    commands = []
    for file in sorted(stage.path.glob("out/*/config.json")):
        try:
            config = dict(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # not written by a run of this course
        folder = file.parent
        done = (folder / "summary.json").exists() or lock.holder(folder) is not None
        if {"resume", "script"} <= config.keys() and not done:
            commands.append(command(stage.name, config["script"], "--resume", "--name", folder.name))
    return commands
