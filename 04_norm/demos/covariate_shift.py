"""Does BatchNorm help because it keeps the distribution of every layer's input still? Shake the distribution and see.

    uv run stages run 04 demos/covariate_shift.py
    uv run stages run 04 demos/covariate_shift.py --steps 100 --seeds 1

Ioffe & Szegedy (2015) name the change of a layer's inputs while the layers below it learn "internal covariate shift",
and say that BatchNorm helps because it reduces it. Santurkar et al., "How Does Batch Normalization Help Optimization?"
(2018), put noise behind every BatchNorm, with another mean and spread at every step: more shift than without any norm.
If the explanation were right, training should be as bad as without norm, or worse.

Here that test runs on a deep MLP without residuals, trained as in the paper by gradient descent with momentum, where
BatchNorm has something to help with. Every batch is new text, so the training loss is honest. While it trains:

- shift: how far mean and spread of what enters the blocks' layers, behind norm and noise, move in one step, for a fixed
  batch, in units of their spread;
- turn: how far, in degrees, the middle block's gradient turns when only the layers below it take their step. This is
  the paper's own measure of the shift: what the optimiser notices of it.
"""

import argparse
import copy
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import batches, load_data
from model import MLP, BatchNorm, ModelConfig
from train import TrainConfig, nll, train

VARIANTS = ("plain", "BatchNorm", "BatchNorm + noise")
RATES = (0.01, 0.03, 0.1, 0.3)
MEASURE = 20  # steps from one measurement to the next


class NoisyBatchNorm(BatchNorm):
    """BatchNorm whose output gets another mean and spread in every channel at every call: [B, H] -> [B, H].

    As in the paper: a channel's shift and scale are drawn anew for each batch, and each example's own around them.
    """

    shift, scale, jitter = 0.5, 1.25, 0.1

    def forward(self, x):
        y = super().forward(x)
        shift = torch.empty(y.shape[-1]).uniform_(-self.shift, self.shift)
        scale = torch.empty(y.shape[-1]).uniform_(1, self.scale)
        own = self.jitter * torch.randn(2, *y.shape)
        return y * (scale + own[0]) + shift + own[1]


def build(variant: str, shape: dict) -> MLP:
    """The network, its BatchNorms made noisy if the variant says so."""
    model = MLP(ModelConfig(norm="none" if variant == "plain" else "batch", residual=False, **shape))
    if variant.endswith("noise"):
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.__class__ = NoisyBatchNorm  # the same parameters and buffers, another forward
    return model


@torch.no_grad()
def moments(model, x):
    """Mean and standard deviation of every channel that enters a block's layers: two tensors [blocks, H]."""
    inputs = []
    hooks = [block.ffn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    inputs = torch.stack(inputs)  # [blocks, B, H]
    return inputs.mean(1), inputs.std(1)


def shift(before, after, x) -> float:
    """How far the moments moved: for normal distributions the 2-Wasserstein distance, over their spread."""
    (mean, std), (mean2, std2) = moments(before, x), moments(after, x)
    return (((mean2 - mean).square() + (std2 - std).square()).mean().sqrt() / std.square().mean().sqrt()).item()


def turn(before, after, x, y) -> float:
    """Degrees between the gradients of the middle block's first layer before and after the layers below it moved."""
    middle = len(before.blocks) // 2
    mixed = copy.deepcopy(before)
    mixed.tok_emb.load_state_dict(after.tok_emb.state_dict())
    mixed.hidden.load_state_dict(after.hidden.state_dict())
    for i in range(middle):
        mixed.blocks[i].load_state_dict(after.blocks[i].state_dict())
    grads = []
    for model in (before, mixed):
        (grad,) = torch.autograd.grad(nll(model, x, y), model.blocks[middle].ffn.fc.weight)
        grads.append(grad.flatten().double())
    return math.degrees(math.acos(F.cosine_similarity(*grads, dim=0).clamp(-1, 1)))


def run(variant: str, rate: float, seed: int, data, args, bar) -> dict:
    """Train one network and measure while it trains. A loss that is not finite ends it."""
    torch.manual_seed(seed)
    model = build(variant, {"vocab_size": len(data.tokenizer), "n_hidden": args.n_hidden, "n_layer": args.n_layer})
    stream = batches(data.train, model.config.block_size, args.batch_size, seed)
    probe = next(batches(data.train, model.config.block_size, 256, seed=1000 + seed))
    config = TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=rate, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses, shifts, turns, before = [], [], [], None
    try:
        for step, loss in train(model, stream, config, optimizer):
            bar.update(bar.step + 1, loss=loss, text=f"{variant}, rate {rate:g}, seed {seed}")
            losses.append(loss)
            if before:  # copies, so that looking moves no running statistics
                after = copy.deepcopy(model)
                shifts.append(shift(before, after, probe[0]))
                turns.append(turn(before, after, *probe))
            before = copy.deepcopy(model) if step % MEASURE == MEASURE // 2 else None
    except BadInput:  # the loss is infinite or nan
        losses.append(math.inf)
    return {"losses": losses, "shifts": shifts, "turns": turns}


def row_of(variant: str, rate: float, runs: list[dict], guessing: float) -> dict:
    """What the seeds of one variant and rate come to. A run that ends worse than guessing is counted, not averaged."""
    ends = [statistics.mean(run["losses"][-50:]) for run in runs]
    kept = [run for run, end in zip(runs, ends, strict=True) if end < guessing]
    whole = [end for end in ends if end < guessing]
    row = {"variant": variant, "rate": rate, "diverged": f"{len(runs) - len(whole)} of {len(runs)}"}
    row["loss"] = statistics.mean(whole) if whole else None
    row["+-"] = statistics.stdev(whole) if len(whole) > 1 else None
    for name in ("shift", "turn"):
        seen = [value for run in kept for value in run[f"{name}s"]]
        row[name] = statistics.mean(seen) if seen else None
    return row


def draw(rows: list[dict]) -> Figure:
    fig = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    for i, variant in enumerate(VARIANTS):
        kept = [row for row in rows if row["variant"] == variant and row["loss"] is not None]
        rates, style = [row["rate"] for row in kept], {"color": f"C{i}", "label": variant}
        losses, spread = [row["loss"] for row in kept], [row["+-"] or 0 for row in kept]
        left.errorbar(rates, losses, spread, fmt="o-", capsize=3, **style)
        middle.plot(rates, [row["shift"] for row in kept], "o-", **style)
        right.plot(rates, [row["turn"] for row in kept], "o-", **style)
    left.set(xscale="log", xlabel="learning rate", title="loss at the end, nats/char")
    middle.set(xscale="log", yscale="log", xlabel="learning rate", title="shift of a block's inputs per step")
    right.set(xscale="log", xlabel="learning rate", title="turn of the gradient per step, degrees")
    left.legend(fontsize=8)
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--n-layer", type=int, default=8, help="blocks (default: 8)")
    parser.add_argument("--n-hidden", type=int, default=96, help="units of each layer (default: 96)")
    parser.add_argument("--batch-size", type=int, default=128, help="windows per step (default: 128)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each training (default: 300)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: 3)")
    args = parser.parse_args(argv)
    if args.steps < MEASURE or args.seeds < 1 or args.batch_size < 2:
        raise BadInput(f"--steps must be at least {MEASURE}, --seeds at least 1, --batch-size at least 2")
    setup("cpu")
    data = load_data(args.corpus)
    log = RunLog(__file__, "covariate_shift", {**vars(args), "corpus": data.name})

    rows = []
    with progress(len(RATES) * len(VARIANTS) * args.seeds * args.steps, "training") as bar:
        for rate in RATES:
            for variant in VARIANTS:
                runs = [run(variant, rate, seed, data, args, bar) for seed in range(args.seeds)]
                rows.append(row_of(variant, rate, runs, math.log(len(data.tokenizer))))
                log.metrics(step=bar.step, **rows[-1])
    table(f"{data.name}: {args.steps} steps, {args.seeds} seeds", rows)
    kept = sorted((row for row in rows if row["loss"] is not None), key=lambda row: row["loss"])
    best = [next(row for row in kept if row["variant"] == variant) for variant in VARIANTS]
    table("Each at the rate that is best for it", best)
    file = log.figure(draw(rows), "covariate_shift")
    log.finish(steps=args.steps, rows=rows, best=best)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
