"""Times one training step of the same MLP in the published micrograd, in both engines of this stage, and in torch.

    uv pip install --target out/micrograd micrograd
    uv run stages run 01 demos/compare_micrograd.py out/micrograd
    uv run stages run 01 demos/compare_micrograd.py          without micrograd

A step is a forward pass over the whole batch, the max-margin loss, a backward pass and an update (the loss of
micrograd's own demo: it has no exp or log). All start from the same weights, take turns in one process, and must agree
on the loss at every step. The clock counts this process' own CPU time, so that other programs on the machine do not
blur the ratios. Before each turn the garbage collector runs, untimed: micrograd's nodes refer to themselves,
so they stay in memory until it does.
"""

import gc
import importlib
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import numpy as np
import torch

from engine import Value, topological_order
from nn import MLP, TensorMLP
from tensor import Tensor
from train import moons

LR = 0.1
TURN = 0.05  # seconds that a contender keeps stepping before the next one's turn
PLAIN, FUSED = "scalars, a node per operation", "scalars, as in nn.py"


def scalar_loss(scores: list, signs: list[int]):
    """Mean of max(0, 1 - sign * score), in whichever scalar engine the scores are."""
    return sum((1 - sign * score).relu() for score, sign in zip(scores, signs, strict=True)) * (1 / len(signs))


def one_node_per_operation(mlp: MLP, xs: list) -> list:
    """`mlp(xs)` as micrograd computes it: every product and every sum is a node, where `dot` makes one of a neuron."""
    for layer in mlp.layers:
        totals = [sum((w * x for w, x in zip(n.weights, xs, strict=True)), n.bias) for n in layer.neurons]
        xs = [total.relu() if n.activation else total for total, n in zip(totals, layer.neurons, strict=True)]
    return xs


def scalar_step(mlp, score: Callable, points: np.ndarray, signs: list[int]) -> Callable:
    """A step of a scalar engine, ours or micrograd's; `score` maps a point to the network's one output."""

    def step():
        mlp.zero_grad()
        loss = scalar_loss([score(point) for point in points.tolist()], signs)
        loss.backward()
        for parameter in mlp.parameters():
            parameter.data -= LR * parameter.grad
        return loss

    return step


def tensor_step(mlp: TensorMLP, points: np.ndarray, signs: list[int]) -> Callable:
    x, y = Tensor(points), np.array(signs)[:, None]

    def step():
        mlp.zero_grad()
        loss = (1 - y * mlp(x)).relu().mean()
        loss.backward()
        for parameter in mlp.parameters():
            parameter.data -= LR * parameter.grad
        return loss

    return step


def torch_step(scalars: MLP, points: np.ndarray, signs: list[int]) -> Callable:
    """The same in torch.nn, float64. The update is written out: importing torch.optim takes seconds."""
    layers = []
    for layer in scalars.layers:
        linear = torch.nn.Linear(len(layer.neurons[0].weights), len(layer.neurons), dtype=torch.float64)
        with torch.no_grad():
            # subtle: torch.tensor rounds Python floats to float32 unless told otherwise
            weight = [[w.data for w in n.weights] for n in layer.neurons]
            linear.weight.copy_(torch.tensor(weight, dtype=torch.float64))
            linear.bias.copy_(torch.tensor([n.bias.data for n in layer.neurons], dtype=torch.float64))
        layers += [linear, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    x, y = torch.tensor(points), torch.tensor(signs, dtype=torch.float64)[:, None]

    def step():
        model.zero_grad()
        loss = (1 - y * model(x)).relu().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
        return loss.detach()

    return step


def tensor_twin(scalars: MLP, sizes: tuple[int, ...]) -> TensorMLP:
    """A TensorMLP with the weights of `scalars`."""
    twin = TensorMLP(sizes, "relu", np.random.default_rng(0))
    for linear, layer in zip(twin.layers, scalars.layers, strict=True):
        linear.weight.data[:] = [[w.data for w in n.weights] for n in layer.neurons]
        linear.bias.data[:] = [n.bias.data for n in layer.neurons]
    return twin


def micrograd_twin(scalars: MLP, sizes: tuple[int, ...], folder: Path):
    """micrograd's MLP with the weights of `scalars`. Raises BadInput when `folder` holds no micrograd."""
    if not (folder / "micrograd" / "nn.py").is_file():
        raise BadInput(f"no micrograd in {folder}: uv pip install --target {folder} micrograd")
    sys.path.insert(0, str(folder))
    twin = importlib.import_module("micrograd.nn").MLP(sizes[0], list(sizes[1:]))
    for theirs, ours in zip(twin.layers, scalars.layers, strict=True):
        for their_neuron, our_neuron in zip(theirs.neurons, ours.neurons, strict=True):
            for weight, value in zip([*their_neuron.w, their_neuron.b], our_neuron.parameters(), strict=True):
                weight.data = value.data
    return twin


def turn(step: Callable, seconds: float) -> tuple[list[float], list[float], int | None]:
    """Takes steps for `seconds`, at least one: the seconds of each, its loss, and the nodes of its graph if it is ours.

    One step of the array engine is too short to be timed alone, right after the caches were full of something else.
    """
    times, losses = [], []
    gc.collect()
    while sum(times) < seconds:
        begin = process_time()
        loss = step()
        times.append(process_time() - begin)
        losses.append(float(loss.data))
    return times, losses, len(topological_order(loss)) if isinstance(loss, Value | Tensor) else None


def race(contenders: dict[str, Callable], rounds: int) -> list[dict]:
    """Gives everyone a turn to warm up and `rounds` turns by the clock; one row for each.

    Raises RuntimeError when the losses differ: then they do not do the same work, and their times mean nothing.
    """
    times, losses, nodes = {}, {}, {}
    with progress(rounds + 1, "turns") as bar:
        for round in range(rounds + 1):
            for name, step in contenders.items():
                seconds, values, nodes[name] = turn(step, TURN)
                times.setdefault(name, []).append(median(seconds))
                losses.setdefault(name, []).extend(values)
            for index, values in enumerate(zip(*losses.values(), strict=False)):  # as far as the slowest has come
                if max(values) - min(values) > 1e-9 * max(1.0, *values):
                    raise RuntimeError(f"the losses differ at step {index}: {dict(zip(losses, values, strict=True))}")
            bar.update(round + 1)
    return [
        {"engine": name, "nodes": nodes[name] or "", "ms per step": 1000 * median(medians[1:])}
        for name, medians in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("micrograd", nargs="?", type=Path, help="a folder that holds the micrograd package")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="points in the batch (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=16, help="width of both hidden layers (default: %(default)s)")
    args = options.parse(parser, argv)
    for flag in ("rounds", "batch", "hidden"):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag} is {getattr(args, flag)}: it must be at least 1")

    points, classes = moons(args.batch, 0.1, np.random.default_rng(1337))
    signs = (2 * classes - 1).tolist()
    sizes = (2, args.hidden, args.hidden, 1)

    def start() -> MLP:
        return MLP(sizes, "relu", random.Random(1337))  # the same weights each time

    contenders = {}
    if args.micrograd:
        folder = Path(os.environ.get("STAGES_FROM", "."), args.micrograd)  # where `stages run` was typed
        theirs = micrograd_twin(start(), sizes, folder)
        contenders["micrograd"] = scalar_step(theirs, theirs, points, signs)
    plain, fused = start(), start()
    contenders[PLAIN] = scalar_step(plain, lambda xs: one_node_per_operation(plain, xs)[0], points, signs)
    contenders[FUSED] = scalar_step(fused, lambda xs: fused(xs)[0], points, signs)
    contenders["arrays"] = tensor_step(tensor_twin(start(), sizes), points, signs)
    contenders["torch"] = torch_step(start(), points, signs)

    gc.freeze()  # what is imported by now is not looked through at every collection: only the engines' own nodes count
    log = RunLog(__file__, "speed", vars(args))
    rows = race(contenders, args.rounds)
    ms = {row["engine"]: row["ms per step"] for row in rows}
    table(
        f"CPU time of a step: MLP {sizes}, batch {args.batch}, median of {args.rounds} turns",
        [row | {"times faster": rows[0]["ms per step"] / row["ms per step"]} for row in rows],
    )
    ratios = {"scalars_over_arrays": ms[FUSED] / ms["arrays"], "arrays_over_torch": ms["arrays"] / ms["torch"]}
    if args.micrograd:
        ratios["micrograd_over_scalars"] = ms["micrograd"] / ms[FUSED]
    log.finish(steps=args.rounds, **{f"ms_{name}": value for name, value in ms.items()}, **ratios)


if __name__ == "__main__":
    run_program(main)
