"""A scaling law in minutes: how the loss falls with the model's size and with the tokens it is trained on.

    uv run stages run 06 demos/scaling.py
    uv run stages run 06 demos/scaling.py --widths 16 24 32 48 --steps 100 200 400

Every model of the grid is trained on its own, with a learning rate that falls to 0 at the end of its own steps: a
long run looked at half-way is not a short run. Then L(N, D) = E + A / N^a + B / D^b is fitted (Hoffmann et al. 2022):
E is what no model gets rid of, A / N^a what N parameters are too few for, B / D^b what D tokens are too few for.

For given exponents a and b the law is linear in E, A and B, so least squares solves for these exactly, and the
exponents are searched on a fine grid: no starting point, and no local minimum to be caught in. Errors count relative to
the loss. What so few runs can say is measured too: each run is left out in turn, and the law of the others has to
predict it.
"""

import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import matplotlib
import numpy as np
import torch

from data import batches, load_data
from model import GPT, ModelConfig
from train import TrainConfig, evaluate, make_optimizer, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXPONENTS = np.arange(0.02, 2.001, 0.01)
HEAD = 32  # channels of a head


def heads(width: int) -> int:
    return max(1, width // HEAD)


def run(width: int, steps: int, args, data, update) -> dict:
    """Train one model of the grid -> its size, its tokens and its validation loss."""
    torch.manual_seed(args.seed)
    model = GPT(ModelConfig(len(data.tokenizer), n_embd=width, n_head=heads(width)))
    config = TrainConfig(steps=steps, batch_size=args.batch_size, warmup=steps // 10, lr=args.lr, seed=args.seed)
    stream = batches(data.train, model.config.block_size, config.batch_size, config.seed)
    begin = time.process_time()
    for step, loss in train(model, stream, config, make_optimizer(model, config)):
        update(step, loss)
    seconds = time.process_time() - begin
    return {
        "width": width, "N": sum(p.numel() for p in model.parameters()),
        "D": steps * args.batch_size * model.config.block_size, "core seconds": seconds,
        "loss": evaluate(model, data.val, precision=config.precision),
    }


def fit(N, D, L) -> dict:
    """The law with the smallest sum of squared relative errors, E, A and B not negative: N, D, L [n] -> its numbers."""
    powers_N, powers_D = ((x[:, None] / x.min()) ** -EXPONENTS for x in (N, D))  # [n, exponents], 1 at the most
    best = {"error": np.inf}
    for columns in ((0, 1, 2), (1, 2)):  # with E, and where that came out negative, without
        for j, b in enumerate(EXPONENTS):
            basis = np.stack(np.broadcast_arrays(1.0, powers_N, powers_D[:, j:j + 1]), axis=-1)  # [n, exponents, 3]
            X = (basis[..., columns] / L[:, None, None]).transpose(1, 0, 2)  # relative to the loss
            solution = np.linalg.pinv(X) @ np.ones((len(L), 1))  # [exponents, columns, 1]
            errors = ((X @ solution - 1) ** 2).sum(axis=(1, 2))
            errors[(solution < 0).any(axis=(1, 2))] = np.inf
            i = int(errors.argmin())
            if errors[i] < best["error"]:
                E, A, B = (*np.zeros(3 - len(columns)), *solution[i, :, 0])
                a = EXPONENTS[i]
                best = {"error": errors[i], "E": E, "a": a, "b": b, "A": A * N.min() ** a, "B": B * D.min() ** b}
    return {key: float(value) for key, value in best.items()}


def predict(law: dict, N, D):
    return law["E"] + law["A"] / N ** law["a"] + law["B"] / D ** law["b"]


def draw(rows: list[dict], law: dict):
    """Loss against tokens, a line for each model size: dots are runs, lines the law."""
    fig, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    sizes = sorted({row["N"] for row in rows})
    tokens = np.geomspace(min(row["D"] for row in rows), max(row["D"] for row in rows), 50)
    for colour, N in zip(plt.cm.viridis(np.linspace(0, 0.85, len(sizes))), sizes, strict=True):
        mine = [row for row in rows if row["N"] == N]
        axis.plot(tokens, predict(law, N, tokens), color=colour, linewidth=1)
        axis.plot([row["D"] for row in mine], [row["loss"] for row in mine], "o", color=colour, label=f"{N:,}")
    axis.set(xscale="log", yscale="log", xlabel="training tokens D", ylabel="validation loss, nats per character")
    axis.yaxis.set_major_formatter("{x:.1f}")
    axis.yaxis.set_minor_formatter("{x:.1f}")
    axis.legend(title="parameters N", fontsize=8)
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128], help="default: 16 32 64 128")
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 400, 800, 1600, 3200],
                        help="training steps of each width (default: 200 400 800 1600 3200)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows in a batch (default: 16)")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: 3e-3)")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    widths, lengths = sorted(set(args.widths)), sorted(set(args.steps))
    if len(widths) < 3 or len(lengths) < 3 or lengths[0] < 1:
        raise BadInput(f"--widths {widths} --steps {lengths}: three different ones of each, or the law has no shape")
    for width in widths:
        if width < 1 or width % heads(width):
            raise BadInput(f"--widths {width}: a head has {HEAD} channels, so take a multiple of {HEAD}, or fewer")
    setup("cpu")
    log = RunLog(__file__, "scaling", vars(args))
    data = load_data(args.corpus)

    rows, total, done = [], len(widths) * sum(lengths), 0
    with progress(total, "training") as bar:
        for steps, width in itertools.product(lengths, widths):
            def update(step, loss, done=done, text=f"width {width}, {steps} steps"):
                bar.update(done + step, loss=loss, text=text)

            rows.append(run(width, steps, args, data, update))
            log.metrics(len(rows), **rows[-1])
            done += steps

    N, D, L = (np.array([row[key] for row in rows], dtype=float) for key in ("N", "D", "loss"))
    law = fit(N, D, L)
    without = [fit(*(np.delete(x, i) for x in (N, D, L))) for i in range(len(rows))]
    for i, row in enumerate(rows):
        row["law"] = float(predict(law, N[i], D[i]))
        row["left out"] = float(predict(without[i], N[i], D[i]))
        row["off by"] = row["left out"] - row["loss"]
    table(f"{data.name}: validation loss, nats per character", rows)
    say("law: the fit of all runs; left out: what the fit of all other runs predicts for this one")
    spread = [{"": name, **{key: pick([other[key] for other in without]) for key in "EAaBb"}}
              for name, pick in (("lowest, one run left out", min), ("highest, one run left out", max))]
    table("L = E + A / N^a + B / D^b", [{"": "all runs", **{key: law[key] for key in "EAaBb"}}, *spread])
    typical = float(np.sqrt(np.mean([(row["law"] / row["loss"] - 1) ** 2 for row in rows])))
    largest = rows[-1]
    say(f"typical error of the fit {100 * typical:.1f} %; the largest run, left out: "
        f"{largest['left out']:.3f} predicted, {largest['loss']:.3f} measured")
    file = log.figure(draw(rows, law), "scaling")
    log.finish(corpus=data.name, rows=rows, law=law, without=without, typical_error=typical)
    say(f"drawn in {file}")


if __name__ == "__main__":
    run_program(main)
