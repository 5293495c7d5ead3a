"""Where else a run's metrics can be watched: TensorBoard, or Weights & Biases."""

import time
from pathlib import Path

from shared.console import say
from shared.errors import BadInput

BOARDS = ("tensorboard", "wandb")


def start(kind: str | None, folder: Path, stage: str, config: dict):
    """The board called `kind` for the run in `folder`, None for none.

    Raises BadInput when its package is missing or its service does not take the run.
    """
    try:
        return kind and {"tensorboard": TensorBoard, "wandb": Wandb}[kind](folder, stage, config)
    except ImportError as error:
        raise BadInput(f"{kind} is not installed ({error}): uv pip install {kind}, or leave out --board") from None


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder: look at them with `uv run tensorboard --logdir out`.

    Each start has a folder of its own there, or the curves of two runs with the same name would be drawn as one.
    """

    def __init__(self, folder: Path, stage: str, config: dict):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.writer = SummaryWriter(folder / "tensorboard" / time.strftime("%Y%m%d-%H%M%S"))

    def show(self, step: int, numbers: dict) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of the project named like the stage; with WANDB_MODE=offline it is kept in `wandb/` of the run's folder."""

    def __init__(self, folder: Path, stage: str, config: dict):
        import wandb

        self.wandb = wandb
        # Silent, for its lines would break the progress line; without its copy of what the run prints.
        settings = wandb.Settings(silent=True, console="off")
        try:
            self.run = wandb.init(project=stage, name=folder.name, dir=folder, config=config, settings=settings)
        except wandb.Error as error:
            reason = str(error).partition("\n")[0]
            remedy = "`uv run wandb login`, or set WANDB_MODE=offline, which keeps the run on this machine"
            raise BadInput(f"Weights & Biases does not take the run ({reason}): {remedy}") from None
        if not self.run.offline:
            say(f"Weights & Biases: {self.run.url}")

    def show(self, step: int, numbers: dict) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()
        self.wandb.teardown()  # ends the process that it started for its work
