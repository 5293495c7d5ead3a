"""Four lessons in gradient descent: what one neuron can learn, what it cannot, and what a second layer changes.

    uv run stages run 01                      all four, in about 12 s on two cores
    uv run stages run 01 --seed 7 --starts 5  another seed, fewer restarts

1. AND   one neuron learns it.
2. XOR   one neuron, from many starts: never more than three of the four rows right.
3. XOR   a layer of neurons in front of it: solved.
4. Moons two interleaved crescents of points, by the array engine: a straight line, then a curve.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from shared import options
from shared.console import progress, say, table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import numpy as np
from matplotlib.figure import Figure

import engine
import tensor
from engine import Value
from nn import MLP, Linear, Module, Neuron, TensorMLP
from tensor import Tensor

CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
AND = (0, 0, 0, 1)
XOR = (0, 1, 1, 0)


@dataclass(frozen=True)
class Config:
    """Every field is a flag. The learning rates are large because the networks are small and the batches are whole."""

    seed: int = 1337  # of the weights, the points and the noise
    name: str = "default"  # of the run: results go to out/<name>/
    starts: int = 20  # random initialisations that each try XOR
    steps: int = 500  # of gradient descent, in the three lessons on truth tables
    lr: float = 1.0  # step size there
    hidden: int = 4  # neurons in the hidden layer that solves XOR
    points: int = 200  # of the two moons, to learn from; 1,000 others judge the result
    noise: float = 0.15  # standard deviation of the points around their moon, whose radius is 1
    moons_steps: int = 2000  # of gradient descent on the moons
    moons_lr: float = 0.2  # step size there
    moons_hidden: int = 16  # neurons in each of the two hidden layers

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise BadInput(f"--seed is {self.seed}: it must not be negative")
        for field in ("starts", "steps", "hidden", "points", "moons_steps", "moons_hidden"):
            if (value := getattr(self, field)) < 1:
                raise BadInput(f"--{field.replace('_', '-')} is {value}: it must be at least 1")
        for field in ("lr", "moons_lr"):
            if not 0 < (value := getattr(self, field)) <= 100:
                raise BadInput(f"--{field.replace('_', '-')} is {value:g}: it must lie in (0, 100]")
        if not 0 <= self.noise <= 10:
            raise BadInput(f"--noise is {self.noise:g}: it must lie in [0, 10]")


def descend(model: Module, loss_of: Callable[[], Value | Tensor], steps: int, lr: float) -> Iterator[tuple[int, float]]:
    """Gradient descent, one loop for both engines; yields (step, loss before that step's update)."""
    for step in range(1, steps + 1):
        model.zero_grad()  # backward adds to what is there
        loss = loss_of()
        loss.backward()
        for parameter in model.parameters():
            parameter.data -= lr * parameter.grad  # against the slope, a little way
        yield step, float(loss.data)


def table_loss(logit: Callable, targets: tuple[int, ...]) -> Value:
    """Mean cross-entropy over the four rows of a truth table; `logit` maps a corner to a Value, positive meaning 1."""
    pairs = zip(CORNERS, targets, strict=True)
    losses = [engine.cross_entropy([0.0, logit(corner)], target) for corner, target in pairs]
    return sum(losses) / len(losses)


def table_accuracy(logit: Callable, targets: tuple[int, ...]) -> float:
    """The share of rows on the right side of zero."""
    pairs = zip(CORNERS, targets, strict=True)
    return sum((logit(corner) > 0.0) == bool(target) for corner, target in pairs) / len(CORNERS)


@dataclass
class TableRun:
    """What became of one model on one truth table."""

    model: Module
    logit: Callable  # corner -> Value, positive meaning 1
    losses: list[float]
    accuracy: float  # after the last step
    best: float  # highest accuracy after any step
    best_weights: list[float]  # the parameters that had it


def learn_table(model: Module, logit: Callable, targets: tuple[int, ...], steps: int, lr: float) -> TableRun:
    """Trains `model` on a truth table."""
    run = TableRun(model, logit, [], 0.0, -1.0, [])
    for _, loss in descend(model, lambda: table_loss(logit, targets), steps, lr):
        run.losses.append(loss)
        run.accuracy = table_accuracy(logit, targets)
        if run.accuracy > run.best:
            run.best, run.best_weights = run.accuracy, [parameter.data for parameter in model.parameters()]
    return run


def moons(count: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two interleaved half circles of radius 1: points [count, 2], classes [count] (0 the upper moon, 1 the lower).

    The upper one is centred on (0, 0); the lower one on (1, 0.5), so that each tip reaches into the other's bow. Half
    of the points lie on each, and `noise` is added to each coordinate on its own.
    """
    classes = np.arange(count) % 2
    angle = rng.uniform(0.0, math.pi, count)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    lower = np.array([1.0, 0.5]) - upper
    return np.where(classes[:, None] == 0, upper, lower) + rng.normal(0.0, noise, (count, 2)), classes


def moons_accuracy(model: Module, points: np.ndarray, classes: np.ndarray) -> float:
    """The share of points whose larger logit is their class."""
    return float((model(Tensor(points)).data.argmax(axis=1) == classes).mean())


def moons_loss(model: Module, points: np.ndarray, classes: np.ndarray) -> Tensor:
    return tensor.cross_entropy(model(Tensor(points)), classes)


def moons_probability(model: Module, points: np.ndarray) -> np.ndarray:
    """P(class 1) at each point: [n, 2] -> [n]."""
    return model(Tensor(points)).softmax().data[:, 1]


def table_probability(logit: Callable, points: np.ndarray) -> np.ndarray:
    """P(1) at each point, one at a time as scalars are: [n, 2] -> [n]."""
    return np.array([logit(point).sigmoid().data for point in points])


def lone_neuron(rng: random.Random) -> tuple[Module, Callable]:
    """One neuron without activation, and its logit: the neuron itself."""
    neuron = Neuron(2, None, rng)
    return neuron, neuron


def hidden_layer(config: Config, rng: random.Random) -> tuple[Module, Callable]:
    """`config.hidden` tanh neurons, one neuron that reads them, and its logit."""
    mlp = MLP((2, config.hidden, 1), "tanh", rng)
    return mlp, lambda corner: mlp(corner)[0]


def lesson_and(config: Config, log: RunLog) -> TableRun:
    run = learn_table(*lone_neuron(random.Random(config.seed)), AND, config.steps, config.lr)
    log.metrics(config.steps, lesson="AND, one neuron", loss=run.losses[-1], accuracy=run.accuracy)
    return run


def lesson_xor(config: Config, log: RunLog, name: str, make: Callable) -> list[TableRun]:
    """XOR from `config.starts` initialisations; `make(rng)` gives a model and its logit."""
    runs, rng = [], random.Random(config.seed)
    with progress(config.starts, f"XOR, {name}") as bar:
        for start in range(config.starts):
            run = learn_table(*make(rng), XOR, config.steps, config.lr)
            runs.append(run)
            log.metrics(config.steps, lesson=f"XOR, {name}", start=start, loss=run.losses[-1], best=run.best)
            bar.update(start + 1, loss=run.losses[-1], best=max(run.best for run in runs))
    return runs


@dataclass
class MoonsRun:
    """What became of one model on the moons."""

    model: Module
    losses: list[float]
    accuracy: float  # on points it was not trained on


def lesson_moons(config: Config, log: RunLog) -> tuple[np.ndarray, np.ndarray, dict[str, MoonsRun]]:
    """A straight line and an MLP on the same moons; returns the points, their classes and the two runs."""
    rng = np.random.default_rng(config.seed)
    points, classes = moons(config.points, config.noise, rng)
    fresh_points, fresh_classes = moons(1000, config.noise, rng)
    models = {
        "straight line": Linear(2, 2, rng),
        "two hidden layers": TensorMLP((2, config.moons_hidden, config.moons_hidden, 2), "tanh", rng),
    }
    runs = {}
    for name, model in models.items():
        losses = []
        with progress(config.moons_steps, f"moons, {name}") as bar:
            loss_of = partial(moons_loss, model, points, classes)
            for step, loss in descend(model, loss_of, config.moons_steps, config.moons_lr):
                losses.append(loss)
                bar.update(step, loss=loss)
                if step % 100 == 0 or step == config.moons_steps:
                    log.metrics(step, lesson=f"moons, {name}", loss=loss)
        runs[name] = MoonsRun(model, losses, moons_accuracy(model, fresh_points, fresh_classes))
    return points, classes, runs


def draw_field(axes, probability: Callable, points, classes, margin: float, cells: int) -> None:
    """Colours the plane by P(class 1), [n, 2] -> [n]; draws the line where it is one half, and the points on top."""
    low, high = np.min(points, axis=0) - margin, np.max(points, axis=0) + margin
    x, y = np.meshgrid(np.linspace(low[0], high[0], cells), np.linspace(low[1], high[1], cells))
    field = probability(np.stack([x.ravel(), y.ravel()], axis=1)).reshape(x.shape)
    axes.contourf(x, y, field, levels=np.linspace(0, 1, 9), cmap="RdBu_r", alpha=0.4)
    axes.contour(x, y, field, levels=[0.5], colors="black", linewidths=1.2)
    colours = np.where(np.array(classes) == 1, "#c0392b", "#2471a3")
    axes.scatter(*np.transpose(points), c=colours, linewidths=0, s=14 + 200 / len(points), zorder=3)
    axes.set(aspect="equal", xticks=[], yticks=[])


def draw_xor(alone: list[TableRun], layered: list[TableRun]) -> Figure:
    """One neuron at its best, a hidden layer, and the loss of every start of both."""
    fig = Figure(figsize=(8, 2.8), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    best = max(alone, key=lambda run: run.best)
    for parameter, weight in zip(best.model.parameters(), best.best_weights, strict=True):
        parameter.data = weight  # at the end of training all weights are zero, and there is no boundary to draw
    solved = min(layered, key=lambda run: run.losses[-1])
    for axes, run, title in ((left, best, "one neuron"), (middle, solved, "hidden layer")):
        draw_field(axes, partial(table_probability, run.logit), CORNERS, XOR, margin=0.4, cells=40)
        axes.set_title(f"XOR, {title}: {table_accuracy(run.logit, XOR):.0%}", fontsize=10)
        axes.set(xlabel="first input", ylabel="second input", xticks=[0, 1], yticks=[0, 1])
        for (x, y), target in zip(CORNERS, XOR, strict=True):
            axes.annotate(target, (x, y), (6, 6), textcoords="offset points")
    for runs, colour, name in ((alone, "C3", "one neuron"), (layered, "C0", "hidden layer")):
        for i, run in enumerate(runs):
            right.plot(run.losses, color=colour, alpha=0.5, linewidth=1, label=name if i == 0 else None)
    right.axhline(math.log(2), color="black", linewidth=0.8, linestyle=":")
    right.set_title(f"loss from {len(alone)} starts (dotted: ln 2)", fontsize=10)
    right.set(xlabel="step", ylabel="cross-entropy", yscale="log")
    right.legend(loc="upper right", bbox_to_anchor=(1, 0.92))
    return fig


def draw_moons(points: np.ndarray, classes: np.ndarray, runs: dict[str, MoonsRun]) -> Figure:
    """The field of each model, and both losses."""
    fig = Figure(figsize=(9, 2.4), layout="constrained")
    *fields, right = fig.subplots(1, len(runs) + 1)
    for axes, (name, run) in zip(fields, runs.items(), strict=True):
        draw_field(axes, partial(moons_probability, run.model), points, classes, margin=0.3, cells=150)
        axes.set_title(f"{name}: {run.accuracy:.1%}", fontsize=10)
        right.plot(run.losses, label=name)
    right.set_title("loss (cross-entropy)", fontsize=10)
    right.set(xlabel="step", yscale="log")
    right.legend()
    return fig


def row(lesson: str, network: str, run: TableRun | MoonsRun, right: str) -> dict:
    """A row of the table at the end."""
    parameters = sum(np.size(parameter.data) for parameter in run.model.parameters())
    return {
        "lesson": lesson,
        "network": network,
        "parameters": parameters,
        "last loss": run.losses[-1],
        "right": right,
    }


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n")[0])
    options.add(parser, Config)
    config = options.build(Config, options.parse(parser, argv))
    log = RunLog(__file__, config.name, config)

    conjunction = lesson_and(config, log)
    alone = lesson_xor(config, log, "one neuron", lone_neuron)
    layered = lesson_xor(config, log, "hidden layer", partial(hidden_layer, config))
    points, classes, moon_runs = lesson_moons(config, log)
    log.figure(draw_xor(alone, layered), "xor")
    log.figure(draw_moons(points, classes, moon_runs), "moons")

    solved = sum(run.accuracy == 1.0 for run in layered)
    line, mlp = moon_runs.values()
    best = max(run.best for run in alone)
    table(
        "What was learned",
        [
            row("AND", "one neuron", conjunction, f"{conjunction.accuracy:.0%}"),
            row("XOR", "one neuron", alone[0], f"{best:.0%} at best"),
            row("XOR", "hidden layer", layered[0], f"{solved} of {len(layered)} starts"),
            *(row("moons", name, run, f"{run.accuracy:.1%}") for name, run in moon_runs.items()),
        ],
    )
    summary = log.finish(
        and_accuracy=conjunction.accuracy,
        xor_neuron_best=best,
        xor_neuron_loss=max(run.losses[-1] for run in alone),
        xor_mlp_solved=solved / len(layered),
        moons_line_accuracy=line.accuracy,
        moons_mlp_accuracy=mlp.accuracy,
    )
    say(f"{summary['seconds']:.0f} s; figures and numbers are in {log.folder}")


if __name__ == "__main__":
    run_program(main)
