"""What position information is worth: learned, sinusoidal and none, in stacks of one and of two layers.

    uv run stages run 05 demos/positions.py
    uv run stages run 05 demos/positions.py --steps 2000 --seeds 3

Without positions one layer sees its past as a bag of characters: shuffle it, and the answer stays the same. With a
second layer the causal mask gives the order away: a position that has little past to average differs from one that has
much, and the next layer can tell (Haviv et al., "Transformer Language Models without Positional Encodings Still Learn
Positional Information", 2022). "shuffled" is what it costs the last position of each window, in nats, to have its past
put in random order: 0 means that the model never knew the order.
"""

import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import matplotlib
import torch
import torch.nn.functional as F

from data import batches, load_data, windows
from model import GPT, ModelConfig
from train import TrainConfig, make_optimizer, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = ("learned", "sinusoidal", "none")
LAYERS = (1, 2)


def build(kind: str, vocab_size: int, block_size: int, n_layer: int) -> GPT:
    """A small model; with "none" its table of positions holds zeros and is not trained."""
    positions = "learned" if kind == "none" else kind
    model = GPT(ModelConfig(vocab_size, block_size, n_embd=64, n_head=2, n_layer=n_layer, positions=positions))
    if kind == "none":
        model.pos_emb.requires_grad_(False).zero_()
    return model


@torch.no_grad()
def losses(model, x, y):
    """Negative log-likelihood of each token, in nats: x, y [N, T] -> [N, T]."""
    return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")


def shuffle_past(x, generator):
    """Every token but the last of each window x [N, T] in random order."""
    order = torch.rand(len(x), x.shape[1] - 1, generator=generator).argsort(dim=1)
    return torch.cat([x[:, :-1].gather(1, order), x[:, -1:]], dim=1)


def draw(curves: dict):
    """Loss by place in the window, a panel for each depth: curves {(n_layer, kind): [T]}."""
    fig, axes = plt.subplots(1, len(LAYERS), figsize=(4.5 * len(LAYERS), 3.4), sharey=True, layout="constrained")
    for axis, n_layer in zip(axes, LAYERS, strict=True):
        for kind in KINDS:
            axis.plot(curves[n_layer, kind], label=kind)
        axis.set(title=f"layers: {n_layer}", xlabel="position in the window")
    axes[0].set_ylabel("validation loss, nats per character")
    axes[0].legend(title="positions")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model (default: 300)")
    parser.add_argument("--seeds", type=int, default=2, help="models of each kind (default: 2)")
    parser.add_argument("--block-size", type=int, default=64, help="positions (default: 64)")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.block_size < 2:
        raise BadInput(f"--seeds {args.seeds}, --block-size {args.block_size}: at least 1 seed and 2 positions")
    setup("cpu")
    data = load_data(args.corpus)
    log = RunLog(__file__, "positions", {**vars(args), "corpus": data.name})
    x, y = windows(data.val, args.block_size)
    shuffled = shuffle_past(x, torch.Generator().manual_seed(1))

    rows, curves = [], {}
    with progress(len(LAYERS) * len(KINDS) * args.seeds * args.steps, "training") as bar:
        done = 0
        for n_layer in LAYERS:
            for kind in KINDS:
                runs = []
                for seed in range(args.seeds):
                    torch.manual_seed(seed)
                    model = build(kind, len(data.tokenizer), args.block_size, n_layer)
                    config = TrainConfig(steps=args.steps, batch_size=16, warmup=args.steps // 10, seed=seed)
                    stream = batches(data.train, args.block_size, config.batch_size, seed)
                    for _, loss in train(model, stream, config, make_optimizer(model, config)):
                        done += 1
                        bar.update(done, loss=loss, text=f"layers: {n_layer}, positions: {kind}")
                    plain = losses(model, x, y)
                    runs.append((plain, (losses(model, shuffled, y) - plain)[:, -1].mean().item()))
                curves[n_layer, kind] = torch.stack([plain for plain, _ in runs]).mean(dim=(0, 1)).tolist()
                values = [plain.mean().item() for plain, _ in runs]
                rows.append({
                    "layers": n_layer, "positions": kind, "val loss": mean(values),
                    "+-": stdev(values) if args.seeds > 1 else None, "shuffled": mean(cost for _, cost in runs),
                })
    table(f"{data.name}: loss in nats per character, {args.seeds} seeds, {args.steps} steps", rows)
    file = log.figure(draw(curves), "positions")
    log.finish(rows=rows)
    say(f"loss by place in the window drawn in {file}")


if __name__ == "__main__":
    run_program(main)
