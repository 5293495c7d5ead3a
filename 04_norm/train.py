"""Train the model on windows of text and score it on text that it has not seen.

    uv run python train.py
    uv run python train.py --n-hidden 128 --steps 1000 --name small
"""

import argparse
import math
import time
from dataclasses import dataclass

from shared import options
from shared.console import progress, say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F

from checkpoint import save
from data import batches, load_data, windows
from model import MLP, ModelConfig
from sample import SampleConfig, evaluation, sample


@dataclass
class TrainConfig:
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 3000  # optimiser steps
    batch_size: int = 512  # windows per step
    lr: float = 3e-3  # learning rate of the first step; it falls to 0 in a straight line
    weight_decay: float = 0.3  # pull of the weights towards 0, as a share of the learning rate
    eval_every: int = 1000  # steps between looks at the validation text, each with a sample
    seed: int = 1337

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.lr < math.inf:  # so that nan is refused as well
            raise BadInput(f"lr is {self.lr}: it must be above 0, and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise BadInput(f"weight_decay is {self.weight_decay}: it must be 0 or more, and finite")


def nll(model, x, y):
    """Negative log-likelihood: the mean of -ln P(y | x) over the examples, in nats per token."""
    # Softmax, logarithm and mean in one numerically safe step, from scores.
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@torch.no_grad()
def evaluate(model, data, rows: int = 2**13) -> float:
    """`nll` over every window of the text `data` [N], `rows` at a time so that memory stays small."""
    device = next(model.parameters()).device
    x, y = windows(data, model.config.block_size)
    pieces = zip(x.split(rows), y.split(rows), strict=True)
    with evaluation(model):  # batch norm must not look at the other windows of the batch
        total = sum(nll(model, a.to(device), b.to(device)).item() * b.numel() for a, b in pieces)
    return total / y.numel()


def schedule(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ... as a share of the highest one: from 1 in a straight line to 0 after the last.

    Smaller and smaller steps average the noise of the batches out.
    """
    return 1 - step / config.steps


def make_optimizer(model, config: TrainConfig):
    """AdamW: Adam with a weight decay that stands beside the step. Loshchilov & Hutter (2019)."""
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def train(model, stream, config: TrainConfig, optimizer):
    """Minibatch training on the batches x, y of `stream`, which are moved to the model's device.

    Each group of the optimizer has a highest rate of its own, the one that it came with.
    Yields (step, loss) after each step. Raises BadInput at the first loss that is infinite or nan, before it reaches
    the weights.
    """
    device = next(model.parameters()).device
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # the highest rate, of which the schedule gives the share
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step, config)
        x, y = (part.to(device) for part in next(stream))
        loss = nll(model, x, y)
        if not loss.isfinite():
            raise BadInput(f"the loss is {loss.item()} at step {step + 1}: lower --lr, which is {config.lr:g}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # gradients add up over backward calls
        yield step + 1, loss.item()


def look(step: int, model, data, config: TrainConfig, log) -> float:
    """Score the model on the whole validation text and write a sample -> nats per character.

    The log gets `val_loss`, the screen "step 20: validation loss 1.6590" and the sample, which begins as a text does.
    Raises BadInput for a loss that is infinite or nan.
    """
    val_loss = evaluate(model, data.val)
    if not math.isfinite(val_loss):
        raise BadInput(f"the validation loss is {val_loss} at step {step}: lower --lr, which is {config.lr:g}")
    log.metrics(step, val_loss=val_loss)
    # Token 0, the line break in most texts, as far back as the model sees: as if the text had just begun.
    context = torch.zeros(1, model.config.block_size, dtype=torch.long, device=next(model.parameters()).device)
    # A generator of its own, so that each look writes from the same random numbers.
    [ids] = sample(model, context, 160, SampleConfig(temperature=0.8), torch.Generator().manual_seed(config.seed))
    say(f"\nstep {step}: validation loss {val_loss:.4f} nats per character\n{data.tokenizer.decode(ids.tolist())}\n")
    return val_loss


def arguments(argv):
    """The command line as flags."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--name", default="default", help="the run's folder under out/ (default: default)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    options.add(parser, ModelConfig)
    options.add(parser, TrainConfig)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    config = options.build(TrainConfig, args)
    device = setup(args.device, config.seed)
    data = load_data(args.corpus)
    model = MLP(options.build(ModelConfig, args, vocab_size=len(data.tokenizer))).to(device)
    # A text that is too short for either is refused now, not after the training.
    windows(data.val, model.config.block_size)
    windows(data.train, model.config.block_size)
    stream = batches(data.train, model.config.block_size, config.batch_size, config.seed)
    optimizer = make_optimizer(model, config)
    params = sum(p.numel() for p in model.parameters())
    say(f"{data.name}: {len(data.train):,} training and {len(data.val):,} validation tokens, {params:,} parameters")

    per_step = config.batch_size  # tokens predicted
    begin = time.perf_counter()
    with RunLog(__file__, args.name, {**vars(args), "corpus": data.name}) as log:
        with progress(config.steps, "training") as bar:
            for step, loss in train(model, stream, config, optimizer):
                bar.update(step, loss=loss, tokens=step * per_step)
                if step % 10 == 0:
                    log.metrics(step, train_loss=loss)
                if step % config.eval_every == 0 and step < config.steps:
                    look(step, model, data, config, log)
        val_loss, seconds = look(config.steps, model, data, config, log), time.perf_counter() - begin
        save(log.folder / "model.pt", model, data.tokenizer)
        log.finish(
            corpus=data.name, seed=config.seed, params=params, tokens=config.steps * per_step, steps=config.steps,
            seconds=seconds, val_loss=val_loss, val_bpb=data.bits_per_byte(val_loss),
        )
    say(f"validation loss {val_loss:.4f} nats per character after {seconds:.0f} s, saved in {log.folder}")


if __name__ == "__main__":
    run_program(main)
