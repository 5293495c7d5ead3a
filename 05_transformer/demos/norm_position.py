"""Where the norm stands: post-norm, as first published, against pre-norm; at several learning rates, with and without
warm-up, in a stack of six blocks.

    uv run stages run 05 demos/norm_position.py
    uv run stages run 05 demos/norm_position.py --n-layer 12 --seeds 3

Two things are measured. Before training, at several depths: the length of the gradient of the last block's last matrix,
and how far one step of Adam moves what the head reads (0: nowhere; 1.41, the root of 2: to something unrelated). In a
pre-norm stack the stream grows with every block, so that each one's word counts for less the more there are; in a
post-norm stack every norm puts it back to size, and each block speaks at full volume on top of all the changes below
(Xiong et al. 2020; Liu et al., "Understanding the Difficulty of Training Transformers", 2020). Then the loss after a
short training, where the last column counts the seeds that learned little more than how frequent each character is.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import matplotlib
import torch

from data import batches, load_data
from model import GPT, Block, ModelConfig
from train import TrainConfig, make_optimizer, nll, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NORMS = ("pre", "post")
RATES = (1e-3, 3e-3, 1e-2)
DEPTHS = (1, 2, 4, 8, 16)
T, BATCH = 32, 16  # positions, windows in a batch
LAST = 20  # steps whose mean loss is the result


class PostNormBlock(Block):
    """Attend, then think; a norm after each addition puts the sum back on scale: [B, T, C] -> [B, T, C].

    As first published: Vaswani et al., "Attention Is All You Need" (2017), section 3.1.
    """

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        x = self.norm2(x + self.ffn(x))
        return x


def build(norm: str, n_layer: int, vocab_size: int, seed: int) -> GPT:
    """A small GPT of pre-norm or post-norm blocks; with the same seed both start from the same weights."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(vocab_size, T, n_embd=32, n_head=2, n_layer=n_layer))
    if norm == "post":
        for block in model.blocks:
            block.__class__ = PostNormBlock  # the same weights, another forward
    return model


def unigram(data) -> float:
    """The loss of a model that knows how frequent each character is and nothing else, in nats."""
    share = data.bincount().double() / len(data)
    return torch.special.entr(share).sum().item()


def first_step(norm: str, n_layer: int, x, y, vocab_size: int, seed: int, lr: float = 1e-3) -> tuple[float, float]:
    """The length of the gradient of the last block's last weights, and how far one step of Adam moves the head's input.

    The move is the root mean square over all channels, which the last norm holds at 1.
    """
    model, seen = build(norm, n_layer, vocab_size, seed), []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    optimizer = make_optimizer(model, TrainConfig(lr=lr, weight_decay=0.0))
    nll(model, x, y).backward()
    gradient = model.blocks[-1].ffn.proj.weight.grad.norm().item()
    optimizer.step()
    nll(model, x, y)
    return gradient, (seen[1] - seen[0]).square().mean().sqrt().item()


def fit(model, data, steps: int, lr: float, warmup: int, seed: int):
    """The rate rises over `warmup` steps, then falls to 0 in a straight line. Yields the loss of each step."""
    config = TrainConfig(
        steps=steps, batch_size=BATCH, lr=lr, warmup=warmup, weight_decay=0.01, beta2=0.999, seed=seed,  # torch's AdamW
    )
    for _, loss in train(model, batches(data, T, BATCH, seed), config, make_optimizer(model, config)):
        yield loss


def smooth(values: list[float], width: int = 15) -> list[float]:
    """The mean of each value and up to `width - 1` before it."""
    return [mean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))]


def draw(curves: dict, moves: dict, warmups: tuple[int, int], floor: float):
    """The first step by depth, then loss curves, a panel for each rate: curves {(norm, warmup, lr): [[loss]]}."""
    fig, axes = plt.subplots(2, 2, figsize=(7.2, 5), layout="constrained")
    axes = axes.flat
    colours = dict(zip(NORMS, ("tab:blue", "tab:red"), strict=True))
    for norm in NORMS:
        axes[0].plot(DEPTHS, moves[norm], marker="o", color=colours[norm], label=f"{norm}-norm")
    axes[0].set(xscale="log", xlabel="blocks", ylabel="root mean square", title="move of the output, first step")
    axes[0].set_xticks(DEPTHS, DEPTHS)
    axes[0].minorticks_off()
    axes[0].legend()
    for axis, lr in zip(axes[1:], RATES, strict=True):
        for norm in NORMS:
            for warmup, style in zip(warmups, ("-", ":"), strict=True):
                for i, curve in enumerate(curves[norm, warmup, lr]):
                    label = f"{norm}{', warm-up' if warmup else ''}" if i == 0 else None
                    axis.plot(smooth(curve), style, color=colours[norm], linewidth=1.2, label=label)
        axis.axhline(floor, color="grey", linewidth=0.8)
        axis.set(xlabel="step", ylabel="training loss, nats/char", title=f"learning rate {lr:g}")
        axis.set(ylim=(2.2, 4.2), yticks=(2.5, 3, 3.5, 4))
    axes[1].legend(fontsize=9, loc="lower left")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each model (default: 200)")
    parser.add_argument("--seeds", type=int, default=2, help="models of each kind (default: 2)")
    parser.add_argument("--n-layer", type=int, default=6, help="blocks (default: 6)")
    args = parser.parse_args(argv)
    if args.steps < LAST or args.seeds < 1 or args.n_layer < 1:
        raise BadInput(f"--steps {args.steps} --seeds {args.seeds} --n-layer {args.n_layer}: "
                       f"at least {LAST} steps, 1 seed and 1 layer")
    setup("cpu")
    data = load_data(args.corpus)
    log = RunLog(__file__, "norm_position", {**vars(args), "corpus": data.name})
    floor, warmups = unigram(data.train), (0, args.steps // 3)
    x, y = next(batches(data.train, T, 32, seed=0))
    starts, moves = [], {norm: [] for norm in NORMS}
    for n_layer in DEPTHS:
        for norm in NORMS:
            runs = [first_step(norm, n_layer, x, y, len(data.tokenizer), seed) for seed in range(args.seeds)]
            gradient, move = (mean(values) for values in zip(*runs, strict=True))
            starts.append({"blocks": n_layer, "norm": norm, "last block's gradient": gradient, "move": move})
            moves[norm].append(move)
    table("At the start, and after one step of Adam at rate 0.001", starts)

    rows, curves = [], {}
    cells = [(norm, warmup, lr) for lr in RATES for warmup in warmups for norm in NORMS]
    with progress(len(cells) * args.seeds * args.steps, "training") as bar:
        done = 0
        for norm, warmup, lr in cells:
            curves[norm, warmup, lr] = []
            for seed in range(args.seeds):
                model, curve = build(norm, args.n_layer, len(data.tokenizer), seed), []
                for loss in fit(model, data.train, args.steps, lr, warmup, seed):
                    curve.append(loss)
                    done += 1
                    bar.update(done, loss=loss, text=f"{norm}-norm, lr {lr:g}, warm-up {warmup}")
                curves[norm, warmup, lr].append(curve)
            ends = [mean(curve[-LAST:]) for curve in curves[norm, warmup, lr]]
            rows.append({
                "lr": f"{lr:g}", "warm-up": warmup, "norm": norm, "loss": mean(ends), "best": min(ends),
                "worst": max(ends), "stuck": sum(not end < floor - 0.1 for end in ends),
            })
    table(f"{data.name}: mean loss of the last {LAST} of {args.steps} steps, {args.seeds} seeds", rows)
    say(f"stuck: seeds that got no more than 0.1 below {floor:.3f}, the loss of knowing the characters' frequencies")
    file = log.figure(draw(curves, moves, warmups, floor), "norm_position")
    log.finish(rows=rows, starts=starts, unigram=floor)
    say(f"curves drawn in {file}")


if __name__ == "__main__":
    run_program(main)
