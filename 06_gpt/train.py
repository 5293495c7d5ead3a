"""Train a GPT on a text, from first step to checkpoint; stop it at any time and go on later.

    uv run python train.py
    uv run python train.py --preset long
    uv run python train.py --tokenizer bpe --vocab-size 1024 --name bpe
    uv run python train.py --resume --name bpe
    uv run torchrun --standalone --nproc-per-node 2 train.py      # two processes, each with half of every batch
"""

import argparse
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shared import options
from shared.console import progress, say
from shared.device import setup
from shared.errors import BadInput
from shared.interrupt import Interrupt
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from data import batches, load_data, windows
from model import GPT, ModelConfig
from sample import SampleConfig, load, sample


@dataclass
class TrainConfig:
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 2700  # optimiser steps
    batch_size: int = 32  # windows per step, over all micro-batches and processes
    accumulate: int = 1  # micro-batches a step is split into, when the whole batch does not fit into memory
    lr: float = 5e-3  # highest learning rate
    warmup: int = 500  # steps over which the learning rate rises to it; from there it falls to 0 along a cosine
    weight_decay: float = 0.1  # pull of the matrices towards 0, as a share of the learning rate
    beta2: float = 0.99  # memory of AdamW's second moment; small batches are noisy and want a long one
    clip: float = 1.0  # longest gradient that is let through; a longer one is scaled down to it
    precision: Literal["bfloat16", "float32"] = "bfloat16"  # of the matrix products; weights stay in float32
    compile: bool = False  # torch.compile: pays on a GPU; on a CPU it takes longer to compile than it saves
    minutes: float | None = None  # stop after so long, with a checkpoint; a resumed run has as long again
    eval_every: int = 1000  # steps between looks at the validation text, each with a sample and a checkpoint
    seed: int = 1337

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "eval_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:  # so that nan is refused as well
                raise BadInput(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 0")
        if not 0 <= self.beta2 < 1:
            raise BadInput(f"beta2 is {self.beta2}: it must be at least 0 and below 1")
        if self.minutes is not None and not self.minutes > 0:
            raise BadInput(f"minutes is {self.minutes}: it must be above 0, or none for no limit")
        if self.batch_size % self.accumulate:
            raise BadInput(f"batch_size {self.batch_size} does not split into {self.accumulate} micro-batches: "
                           f"choose a multiple of {self.accumulate}")


PRESETS = {
    "long": {  # four times the parameters, twice the context, five times as long
        "name": "long", "n_embd": 128, "block_size": 128, "batch_size": 16, "lr": 3e-3, "warmup": 800, "steps": 5000,
    },
    "gpt2": {
        "name": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "dropout": 0.1,
        "init_std": 0.02, "tokenizer": "bpe", "vocab_size": 50257, "lr": 6e-4, "batch_size": 480, "accumulate": 40,
        "beta2": 0.95, "warmup": 2000, "steps": 600_000,
    },
}


def nll(model, x, y, precision: str = "float32"):
    """Negative log-likelihood: the mean of -ln P(y | x) over the examples, in nats per token.

    `cross_entropy` takes scores and does softmax, logarithm and mean in one numerically safe step. Under autocast the
    matrix products run in bfloat16; the logarithm needs more than its 8 bits of precision and stays in float32.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(x)
    return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten())


@torch.no_grad()
def evaluate(model, data, rows: int = 64, precision: str = "float32") -> float:
    """`nll` over every token of `data` [N] but the first, in consecutive windows, `rows` at a time."""
    model.eval()
    x, y = windows(data, model.config.block_size)
    pieces = list(zip(x.split(rows), y.split(rows), strict=True))
    if y.numel() < len(data) - 1:  # the last window is shorter, and counts too
        pieces.append((data[None, y.numel():-1], data[None, y.numel() + 1:]))
    device = next(model.parameters()).device
    total = sum(nll(model, a.long().to(device), b.long().to(device), precision).item() * b.numel() for a, b in pieces)
    model.train()
    return total / (len(data) - 1)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 0, 1, ...: 1. a straight rise over the warm-up, 2. half a cosine from `lr` down to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup)  # of the way down
    return config.lr * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(model, config: TrainConfig):
    """AdamW with weight decay on the matrices only: decay would pull norms' scales and biases to 0 for no gain."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def gradient(model, x, y, config: TrainConfig):
    """Add the gradient of the loss on the batch x, y [B, T] to the parameters, a micro-batch at a time -> loss.

    Gradients add up over backward calls, so each part counts by its share of the batch. Processes exchange theirs
    once, with the last part.
    """
    total = 0.0
    parts = list(zip(x.chunk(config.accumulate), y.chunk(config.accumulate), strict=True))
    for i, (a, b) in enumerate(parts, 1):
        last = i == len(parts) or not isinstance(model, DistributedDataParallel)
        with nullcontext() if last else model.no_sync():
            loss = nll(model, a, b, config.precision) * (len(a) / len(x))
            loss.backward()
        total += loss.detach()
    return total


def train(model, data, config: TrainConfig, optimizer, block_size: int, start: int = 0, stop=lambda: False):
    """Steps `start` to `config.steps`. Yields (step, loss) after each; ends early once `stop()` is true.

    In a run of several processes each takes its share of every batch, and all stop together.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if config.batch_size % (world * config.accumulate):
        raise BadInput(f"batch_size {config.batch_size} does not split into {config.accumulate} micro-batches on "
                       f"{world} processes: choose a multiple of {world * config.accumulate}")
    device = next(model.parameters()).device
    stream = batches(data, block_size, config.batch_size, config.seed, start)
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        x, y = (part.chunk(world)[rank].to(device) for part in next(stream))  # [B / world, T]
        report = torch.stack([gradient(model, x, y, config), torch.tensor(float(stop()), device=device)])
        if world > 1:
            dist.all_reduce(report)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)  # the whole batch's gradient, in float32
        optimizer.step()
        optimizer.zero_grad()
        loss, stopped = report.tolist()
        yield step + 1, loss / world
        if stopped:
            return


def save(path: Path, model, optimizer, tokenizer, step: int, seconds: float, args: dict):
    """Write what `sample.load` needs, and what a run needs to go on. The file appears whole or not at all."""
    state = {
        "config": asdict(model.config), "tokenizer": tokenizer.state(), "model": model.state_dict(),
        "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
        "step": step, "seconds": seconds, "args": args,
    }
    partial = path.with_suffix(".partial")
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except RuntimeError:  # what torch makes of a full disk
        raise OSError(f"cannot write {path}: is the disk full? The checkpoint before it, if any, is whole") from None
    finally:
        partial.unlink(missing_ok=True)


def arguments(argv):
    """The command line -> (flags, model, tokenizer, state): the last three from the run's checkpoint with --resume."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--tokenizer", choices=["char", "byte", "bpe"], default="char", help="default: char")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens that bpe learns (default: 1024)")
    parser.add_argument("--name", default="default", help="the run's folder under out/ (default: default)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint, with its flags")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--tensorboard", action="store_true", help="also write the metrics for TensorBoard")
    options.add(parser, ModelConfig)
    options.add(parser, TrainConfig)
    args = options.parse(parser, argv, PRESETS)
    if not args.resume:
        return args, None, None, {"step": 0, "seconds": 0.0}
    model, tokenizer, state = load(run_folder(__file__, args.name) / "model.pt")
    parser.set_defaults(**state["args"])  # what the run began with; a flag given now wins
    args = parser.parse_args(argv)
    shape = options.build(ModelConfig, args, vocab_size=len(tokenizer))
    if shape != model.config:
        raise BadInput(f"the checkpoint's model is {model.config}: a resumed run keeps its shape")
    return args, model, tokenizer, state


def join(device: str, seed: int):
    """Set this process up and meet the others, if torchrun started several -> (device, rank, number of processes)."""
    device, world = setup(device, seed), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), world


def look(step: int, model, data, config: TrainConfig, log) -> float:
    """Score the model on the whole validation text, write a sample -> nats per character."""
    val_loss = data.nats_per_char(evaluate(model, data.val, precision=config.precision))
    log(step, val_loss=val_loss)
    context = data.train[:1].long().to(next(model.parameters()).device)
    # A generator of its own: a look must not change the random numbers of the run.
    ids = sample(model, context, 160, SampleConfig(temperature=0.8), torch.Generator().manual_seed(config.seed))
    say(f"\nstep {step}: validation loss {val_loss:.4f} nats per character\n{data.tokenizer.decode(ids.tolist())}\n")
    return val_loss


def recorder(log, tensorboard: bool):
    """A function (step, **numbers) that writes metrics to metrics.jsonl and, if asked, for TensorBoard."""
    if not tensorboard:
        return log.metrics
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    board = SummaryWriter(log.folder / "tensorboard")

    def record(step: int, **numbers):
        log.metrics(step, **numbers)
        for key, value in numbers.items():
            board.add_scalar(key, value, step)
        board.flush()

    return record


def main(argv=None):
    args, model, tokenizer, state = arguments(argv)
    config = options.build(TrainConfig, args)
    device, rank, world = join(args.device, config.seed)
    data = load_data(args.corpus, run_folder(__file__, args.name), args.tokenizer, args.vocab_size, tokenizer)
    model = (model or GPT(options.build(ModelConfig, args, vocab_size=len(data.tokenizer)))).to(device)
    # A text too short for either is refused now, before the record of an earlier run is written over.
    next(batches(data.train, model.config.block_size, config.batch_size, config.seed))
    windows(data.val, model.config.block_size)
    log = RunLog(__file__, args.name, vars(args), resume=args.resume)
    record = recorder(log, args.tensorboard and rank == 0)
    optimizer = make_optimizer(model, config)
    torch.manual_seed(config.seed + rank)  # same weights, but each process drops out its own units
    if args.resume:
        optimizer.load_state_dict(state["optimizer"])
        log.rewind(state["step"])
        if rank == 0:
            torch.set_rng_state(state["rng"])
    engine = torch.compile(model) if config.compile else model
    if world > 1:
        engine = DistributedDataParallel(engine)
    params = sum(p.numel() for p in model.parameters())
    say(f"{data.name}: {len(data.train):,} training and {len(data.val):,} validation tokens, {params:,} parameters")

    step, per_step = state["step"], config.batch_size * model.config.block_size  # per step: tokens predicted
    begin = time.perf_counter() - state["seconds"]
    flags = vars(args) | {"resume": False, "corpus": data.name}  # a default may find another text the next time

    def stop() -> bool:
        here = time.perf_counter() - begin - state["seconds"]
        return interrupt.asked or (config.minutes is not None and here > 60 * config.minutes)

    def keep():
        save(log.folder / "model.pt", model, optimizer, data.tokenizer, step, time.perf_counter() - begin, flags)

    with Interrupt() as interrupt, progress(config.steps, "training") as bar:
        for step, loss in train(engine, data.train, config, optimizer, model.config.block_size, step, stop):
            bar.update(step, loss=loss, tokens=step * per_step)
            if step % 10 == 0:
                record(step, train_loss=loss, lr=learning_rate(step - 1, config))
            if rank == 0 and step % config.eval_every == 0 and step < config.steps and not stop():
                keep()
                look(step, model, data, config, record)
    if rank == 0:
        keep()
    if interrupt.asked:
        say(f"stopped at step {step}, saved in {log.folder}: go on with --resume --name {args.name}")
        return 130
    if rank == 0:
        val_loss, seconds = look(step, model, data, config, record), time.perf_counter() - begin
        log.finish(
            corpus=data.name, seed=config.seed, params=params, tokens=step * per_step, steps=step, seconds=seconds,
            val_loss=val_loss, val_bpb=data.bits_per_byte(val_loss),
        )
        say(f"validation loss {val_loss:.4f} nats per character after {seconds:.0f} s, saved in {log.folder}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
