"""Where else a run's metrics can be watched: TensorBoard, or Weights & Biases."""

from pathlib import Path

from shared.errors import BadInput

BOARDS = ("tensorboard", "wandb")


def start(kind: str | None, folder: Path, stage: str, config: dict):
    """The board called `kind` for the run in `folder`, None for none. Raises BadInput when its package is missing."""
    try:
        return kind and {"tensorboard": TensorBoard, "wandb": Wandb}[kind](folder, stage, config)
    except ImportError as error:
        raise BadInput(f"{kind} is not installed ({error}): uv pip install {kind}, or leave out --board") from None


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder: look at them with `uv run tensorboard --logdir out`."""

    def __init__(self, folder: Path, stage: str, config: dict):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.writer = SummaryWriter(folder / "tensorboard")

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

        self.run = wandb.init(project=stage, name=folder.name, dir=folder, config=config)

    def show(self, step: int, numbers: dict) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()
