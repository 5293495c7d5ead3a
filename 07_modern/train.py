"""Train a GPT on a text, from first step to checkpoint; stop it at any time and go on later.

    uv run python train.py
    uv run python train.py --preset long
    uv run python train.py --tokenizer bpe --vocab-size 1024 --name bpe
    uv run torchrun --standalone --nproc-per-node 2 train.py      # two processes, each with half of every batch
"""

import argparse
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from shared import options
from shared.boards import BOARDS
from shared.console import progress, say
from shared.device import processes, setup
from shared.errors import BadInput
from shared.interrupt import Interrupt
from shared.program import command, run_program
from shared.runlog import RunLog, run_folder

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from checkpoint import damaged, load, save
from data import batches, in_file, load_data, windows
from model import GPT, ModelConfig
from optim import Muon, Together
from sample import SampleConfig, evaluation, sample


@dataclass
class TrainConfig:
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 1350  # optimiser steps
    batch_size: int = 16  # windows per step
    micro_batch: int = 64  # windows that a process takes at once; a larger share of a batch goes in several parts
    lr: float = 1e-2  # highest learning rate of AdamW: embeddings, head, norms
    muon_lr: float = 0.02  # highest learning rate of Muon: the matrices inside the blocks
    momentum: float = 0.9  # share of Muon's mean gradient that is kept from one step to the next
    warmup: int = 100  # steps over which the learning rates rise
    decay: float = 0.8  # share of the steps, the last ones, over which they fall to 0; between, they stay
    weight_decay: float = 0.1  # pull of the weights towards 0, as a share of the learning rate
    beta2: float = 0.99  # memory of AdamW's second moment; small batches are noisy and want a long one
    clip: float = 1.0  # longest gradient that is let through; a longer one is scaled down to it
    precision: Literal["bfloat16", "float32"] = "bfloat16"  # of the matrix products; weights stay in float32
    compile: bool = False  # torch.compile: pays on a GPU; on a CPU it takes longer to compile than it saves
    eval_every: int = 500  # steps between looks at the validation text, each with a sample
    seed: int = 1337

    def __post_init__(self):
        for name in ("steps", "batch_size", "micro_batch", "eval_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("lr", "muon_lr"):
            if not 0 < getattr(self, name) < math.inf:  # so that nan is refused as well
                raise BadInput(f"{name} is {getattr(self, name)}: it must be above 0, and finite")
        if not 0 <= self.decay <= 1:
            raise BadInput(f"decay is {self.decay}: it must be at least 0 and at most 1")
        if not self.clip > 0:
            raise BadInput(f"clip is {self.clip}: it must be above 0, or inf for no limit")
        for name in ("warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be 0 or more, and finite")
        for name in ("beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")


PRESETS = {
    "long": {  # two to three times as long, and decay against learning the text by heart
        "name": "long", "batch_size": 32, "steps": 1800, "weight_decay": 0.3,
    },
    "smollm2": {  # the shape of SmolLM2-135M, 2 million tokens per step: 64 micro-batches of 16 windows on one GPU
        "name": "smollm2", "n_layer": 30, "n_embd": 576, "n_head": 9, "n_kv_head": 3, "n_hidden": 1536,
        "qk_norm": False, "norm_eps": 1e-5, "rope_base": 100_000.0, "block_size": 2048, "tokenizer": "bpe",
        "vocab_size": 49152, "lr": 3e-3, "muon_lr": 0.01, "momentum": 0.95, "beta2": 0.95, "batch_size": 1024,
        "micro_batch": 16, "warmup": 2000, "decay": 0.2, "steps": 1_000_000,
    },
}


def log_probs(model, x, y, precision: str = "float32"):
    """ln P of each token of y, given those of x up to its place: [B, T] x 2 -> [B, T], in nats."""
    # The products run in bfloat16; the logarithm needs more than its 8 bits of precision and stays in float32.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(x)
    return -F.cross_entropy(logits.flatten(0, -2).float(), y.flatten(), reduction="none").view(y.shape)


def nll(model, x, y, precision: str = "float32"):
    """Negative log-likelihood: the mean of -ln P(y | x) over the examples, in nats per token."""
    return -log_probs(model, x, y, precision).mean()


@torch.no_grad()
def evaluate(model, data, rows: int = 64, precision: str = "float32") -> float:
    """`nll` over every token of `data` [N] but the first, in consecutive windows, `rows` at a time."""
    device = next(model.parameters()).device
    x, y = windows(data, model.config.block_size)
    pieces = list(zip(x.split(rows), y.split(rows), strict=True))
    if y.numel() < len(data) - 1:  # the last window is shorter, and counts too
        pieces.append((data[None, y.numel():-1], data[None, y.numel() + 1:]))
    pieces = ((a.long().to(device), b.long().to(device)) for a, b in pieces)
    with evaluation(model):
        total = sum(nll(model, a, b, precision).item() * b.numel() for a, b in pieces)
    return total / (len(data) - 1)


def schedule(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ... as a share of the highest one.

    1. a straight rise over the warm-up, while the optimisers' averages are young; 2. the highest rate for a time;
    3. a straight fall towards 0: smaller and smaller steps average the noise of the batches out. Where rise and fall
    overlap, the lower of both counts.
    Warm-up, stable, decay: Hu et al., "MiniCPM" (2024).
    """
    rise = (step + 1) / max(1, config.warmup)
    fall = (config.steps - step) / max(1, config.steps * config.decay)
    return min(1.0, rise, fall)


def make_optimizer(model, config: TrainConfig):
    """Muon for the matrices inside the blocks, AdamW for embedding and head, and for the norms' scales without decay.

    By name and not by shape: an embedding is a matrix too, but its rows are looked up, and Muon would move those of
    rare tokens nearly as far as the others.
    Together under the names adamw and muon, in this order: the log shows the first rate.
    """
    named = dict(model.named_parameters())
    scales = [name for name in named if "norm" in name]
    inner = [name for name in named if name.startswith("blocks.") and name not in scales]
    tables = [name for name in named if name not in inner and name not in scales]
    inner, tables, scales = ([named[name] for name in names] for names in (inner, tables, scales))
    groups = [{"params": tables, "weight_decay": config.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return Together(
        adamw=torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True),
        muon=Muon(inner, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay),
    )


def gradient(model, x, y, config: TrainConfig):
    """Add the gradient of the loss on the batch x, y [B, T] to the parameters, a micro-batch at a time -> loss.

    Gradients add up over backward calls, so each part counts by its share of the batch. Processes exchange theirs
    once, with the last part.
    """
    total = 0.0
    parts = list(zip(x.split(config.micro_batch), y.split(config.micro_batch), strict=True))
    for i, (a, b) in enumerate(parts, 1):
        last = i == len(parts) or not isinstance(model, DistributedDataParallel)
        with nullcontext() if last else model.no_sync():
            loss = nll(model, a, b, config.precision) * (len(a) / len(x))
            loss.backward()
        total += loss.detach()
    return total


def train(model, stream, config: TrainConfig, optimizer, start: int = 0, stop=lambda: False):
    """Minibatch training on the batches x, y of `stream`, from step `start` on; ends early once `stop()` is true.

    Each group of the optimizer has a highest rate of its own, the one that it came with.
    Yields (step, loss) after each step. Raises BadInput at the first loss that is infinite or nan, before it reaches
    the weights. In a run of several processes each takes its share of every batch, and all stop together.
    """
    rank, world = processes()
    device = next(model.parameters()).device
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # the highest rate, of which the schedule gives the share
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step, config)
        x, y = (part.chunk(world)[rank].to(device) for part in next(stream))  # [B / world, T]
        report = torch.stack([gradient(model, x, y, config), torch.tensor(float(stop()), device=device)])
        if world > 1:
            dist.all_reduce(report)
        loss, stopped = report.tolist()
        if not math.isfinite(loss):
            raise BadInput(f"the loss is {loss} at step {step + 1}: lower --lr, {config.lr:g}, and --muon-lr")
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)  # the whole batch's gradient, in float32
        optimizer.step()
        optimizer.zero_grad()  # gradients add up over backward calls
        yield step + 1, loss / world
        if stopped:
            return


def look(step: int, model, data, config: TrainConfig, log) -> float:
    """Score the model on the whole validation text and write a sample -> nats per character.

    The log gets `val_loss`, the screen "step 20: validation loss 1.6590" and the sample, which begins as a text does.
    Raises BadInput for a loss that is infinite or nan.
    """
    val_loss = data.nats_per_char(evaluate(model, data.val, config.micro_batch, config.precision))
    if not math.isfinite(val_loss):
        raise BadInput(f"the validation loss is {val_loss} at step {step}: lower --lr, {config.lr:g}, and --muon-lr")
    log.metrics(step, val_loss=val_loss)
    context = data.train[None, :1].long().to(next(model.parameters()).device)  # the text's first token
    # A generator of its own, so that each look writes from the same random numbers.
    [ids] = sample(model, context, 160, SampleConfig(temperature=0.8), torch.Generator().manual_seed(config.seed))
    say(f"\nstep {step}: validation loss {val_loss:.4f} nats per character\n{data.tokenizer.decode(ids.tolist())}\n")
    return val_loss


def arguments(argv):
    """The command line as flags, and with --resume, which brings the run's own flags, the run's checkpoint."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--tokenizer", choices=["char", "byte", "bpe"], default="char", help="default: char")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens that bpe learns (default: 1024)")
    parser.add_argument("--name", default="default", help="the run's folder under out/ (default: default)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint, with its flags")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--board", choices=BOARDS, help="show the metrics there too (default: none)")
    options.add(parser, ModelConfig)
    options.add(parser, TrainConfig)
    args = options.parse(parser, argv, PRESETS)
    if not args.resume:
        return args, None
    checkpoint = *_, state = load(run_folder(__file__, args.name) / "model.pt")
    args = options.resume(parser, argv, state["args"], free=("steps", "eval_every", "device", "board"))
    if state["step"] >= args.steps:
        raise BadInput(f"the run {args.name} has finished its {state['step']} steps: to go on, give it more --steps")
    return args, checkpoint


def main(argv=None):
    args, checkpoint = arguments(argv)
    config = options.build(TrainConfig, args)
    if config.batch_size % processes()[1]:
        raise BadInput(f"batch_size {config.batch_size} is no multiple of the {processes()[1]} processes: choose one")
    device = setup(args.device, config.seed)
    model, tokenizer, state = checkpoint or (None, None, {"step": 0, "seconds": 0.0})
    data = load_data(args.corpus, args.tokenizer, args.vocab_size, tokenizer)
    model = (model or GPT(options.build(ModelConfig, args, vocab_size=len(data.tokenizer)))).to(device)
    # A text that is too short for either is refused now, not after the training.
    windows(data.val, model.config.block_size)
    next(batches(data.train, model.config.block_size, config.batch_size, config.seed))
    optimizer = make_optimizer(model, config)
    if checkpoint:
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as error:
            raise damaged(run_folder(__file__, args.name) / "model.pt", error) from None
    engine = torch.compile(model) if config.compile else model
    if processes()[1] > 1:
        engine = DistributedDataParallel(engine)
    params = sum(p.numel() for p in model.parameters())
    say(f"{data.name}: {len(data.train):,} training and {len(data.val):,} validation tokens, {params:,} parameters")

    step, per_step = state["step"], config.batch_size * model.config.block_size  # per step: tokens predicted
    begin = time.perf_counter() - state["seconds"]
    flags = vars(args) | {"resume": False, "corpus": data.name}  # a default may find another text the next time
    with RunLog(__file__, args.name, flags, step, args.board) as log, Interrupt() as interrupt:
        # Written anew by each run, by one that is resumed too: no part of the record.
        data.train, data.val = (in_file(log.folder / f"{part}.bin", getattr(data, part)) for part in ("train", "val"))
        stream = batches(data.train, model.config.block_size, config.batch_size, config.seed, step)

        def keep():
            run = {"optimizer": optimizer.state_dict(), "step": step, "seconds": time.perf_counter() - begin}
            if processes()[0] == 0:
                save(log.folder / "model.pt", model, data.tokenizer, **run, args=flags)
            log.keep()

        with progress(config.steps, "training") as bar:
            for step, loss in train(engine, stream, config, optimizer, state["step"], lambda: interrupt.asked):
                bar.update(step, loss=loss, tokens=step * per_step)
                if step % 10 == 0:
                    log.metrics(step, train_loss=loss, lr=optimizer.param_groups[0]["lr"])
                if step % config.eval_every == 0 and step < config.steps and not interrupt.asked:
                    look(step, model, data, config, log)
                    keep()
        if step < config.steps:
            keep()
            go_on = command(log.stage, log.script, "--resume", "--name", args.name)
            say(f"stopped at step {step}, saved in {log.folder}: go on with {go_on}")
            return 130
        val_loss, seconds = look(config.steps, model, data, config, log), time.perf_counter() - begin
        keep()
        log.finish(
            corpus=data.name, seed=config.seed, params=params, tokens=config.steps * per_step, steps=config.steps,
            seconds=seconds, val_loss=val_loss, val_bpb=data.bits_per_byte(val_loss),
        )
    say(f"validation loss {val_loss:.4f} nats per character after {seconds:.0f} s, saved in {log.folder}")


if __name__ == "__main__":
    run_program(main)
