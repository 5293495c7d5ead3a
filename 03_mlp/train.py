"""Train the model on windows of text and score it on text that it has not seen.

    uv run python train.py
    uv run python train.py --n-hidden 128 --steps 1000 --name small
"""

import argparse
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from shared import options
from shared.console import progress, say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F

from data import batches, load_data, windows
from model import MLP, ModelConfig
from sample import SampleConfig, sample


@dataclass
class TrainConfig:
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 10000  # optimiser steps
    batch_size: int = 512  # windows per step
    lr: float = 5e-3  # learning rate of the first step; it falls to 0 in a straight line
    weight_decay: float = 0.1  # pull of the weights towards 0, as a share of the learning rate
    eval_every: int = 1000  # steps between looks at the validation text
    seed: int = 1337

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not (self.lr > 0 and self.weight_decay >= 0):  # so that nan is refused as well
            raise BadInput(f"lr {self.lr}, weight_decay {self.weight_decay}: need above 0, and at least 0")


def nll(model, x, y):
    """Negative log-likelihood: the mean of -ln P(y | x) over the examples, in nats per token.

    `cross_entropy` takes scores and does softmax, logarithm and mean in one numerically safe step.
    """
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@torch.no_grad()
def evaluate(model, data, rows: int = 2**13) -> float:
    """`nll` over every window of the text `data` [N], `rows` at a time so that memory stays small."""
    x, y = windows(data, model.config.block_size)
    total = sum(nll(model, a, b).item() * b.numel() for a, b in zip(x.split(rows), y.split(rows), strict=True))
    return total / y.numel()


def train(model, data, config: TrainConfig):
    """Minibatch training with AdamW (Loshchilov & Hutter 2019). Yields (step, loss) after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    stream = batches(data, model.config.block_size, config.batch_size, config.seed)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - step / config.steps)
        loss = nll(model, *next(stream))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step + 1, loss.item()


def save(path: Path, model, vocab):
    """Write what `sample.load` needs. The file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    try:
        torch.save({"config": asdict(model.config), "chars": vocab.chars, "model": model.state_dict()}, partial)
        os.replace(partial, path)
    except RuntimeError:  # what torch makes of a full disk
        raise OSError(f"cannot write {path}: is the disk full? The checkpoint before it, if any, is whole") from None
    finally:
        partial.unlink(missing_ok=True)


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--name", default="default", help="the run's folder under out/ (default: default)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    options.add(parser, ModelConfig)
    options.add(parser, TrainConfig)
    args = parser.parse_args(argv)
    config = options.build(TrainConfig, args)
    device = setup(args.device, config.seed)

    data = load_data(args.corpus)
    model = MLP(options.build(ModelConfig, args, vocab_size=len(data.vocab))).to(device)
    train_data, val_data = data.train.to(device), data.val.to(device)
    params = sum(p.numel() for p in model.parameters())
    say(f"{data.name}: {len(train_data):,} training and {len(val_data):,} validation tokens, {params:,} parameters")
    log = RunLog(__file__, args.name, {**vars(args), "corpus": data.name})

    per_step = config.batch_size  # tokens predicted
    start = time.perf_counter()
    with progress(config.steps, "training") as bar:
        for step, loss in train(model, train_data, config):
            bar.update(step, loss=loss, tokens=step * per_step)
            if step % config.eval_every == 0 or step == config.steps:
                val_loss = evaluate(model, val_data)
                log.metrics(step=step, train_loss=loss, val_loss=val_loss)
                say(f"step {step}: validation loss {val_loss:.4f}")
    save(log.folder / "model.pt", model, data.vocab)
    log.finish(
        corpus=data.name, seed=config.seed, params=params, tokens=config.steps * per_step, steps=config.steps,
        seconds=time.perf_counter() - start, val_loss=val_loss, val_bpb=data.bits_per_byte(val_loss),
    )

    context = train_data.new_zeros(model.config.block_size)  # token 0, the line break, as far back as the model sees
    say(data.vocab.decode(sample(model, context, 300, SampleConfig())))
    say(f"validation loss {val_loss:.4f} nats per character, saved in {log.folder}")


if __name__ == "__main__":
    run_program(main)
