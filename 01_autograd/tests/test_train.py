"""What one neuron can learn and what it cannot, by training, by enumeration and by proof; the moons; the whole run."""

import itertools
import json
import math
import random
from functools import partial

from shared.errors import BadInput
from shared.runlog import RunLog

import numpy as np
import pytest
import torch

import tensor
import train
from engine import Value
from nn import Linear, TensorMLP
from tensor import Tensor
from train import AND, CORNERS, XOR, Config, descend, hidden_layer, learn_table, lone_neuron, moons


def rights(w1: float, w2: float, b: float, targets: tuple[int, ...]) -> int:
    """How many corners a neuron with these numbers puts on the right side."""
    return sum((w1 * x1 + w2 * x2 + b > 0) == bool(t) for (x1, x2), t in zip(CORNERS, targets, strict=True))


def test_the_truth_tables_are_pythons():
    """AND and XOR are what Python's `and` and `^` say of the four corners."""
    assert AND == tuple(int(a and b) for a, b in CORNERS), f"AND of {CORNERS} is not {AND}"
    assert XOR == tuple(int(a) ^ int(b) for a, b in CORNERS), f"XOR of {CORNERS} is not {XOR}"


def test_loss_and_accuracy_of_a_truth_table_by_hand():
    """The loss of a truth table is the mean of -ln P(right answer), and a row is right when its logit's sign is."""
    logits = dict(zip(CORNERS, (-1.0, 2.0, -3.0, 0.0), strict=True))

    def logit(corner):
        return Value(logits[corner])

    # A logit z says 1 with probability 1 / (1 + e^-z), and 0 with probability 1 / (1 + e^z).
    right = [1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(3.0)), 1 / 2]  # for 0, 1, 1, 0
    expected = -sum(math.log(p) for p in right) / 4
    loss = train.table_loss(logit, XOR).data
    assert loss == pytest.approx(expected), f"the mean of -ln P(right answer) over the rows is {expected}, not {loss}"
    for targets, share in ((XOR, 0.75), (AND, 0.5), ((0, 1, 0, 0), 1.0)):
        found = train.table_accuracy(logit, targets)
        assert found == share, f"{targets}: {found:.0%}, not {share:.0%}: a logit above 0 says 1, 0 or below says 0"


def test_one_neuron_learns_and():
    """One neuron learns AND, from any start."""
    for seed in range(5):
        run = learn_table(*lone_neuron(random.Random(seed)), AND, steps=300, lr=1.0)
        assert run.accuracy == 1.0 and run.losses[-1] < 0.1, f"seed {seed}: AND is not learned"
        w1, w2, b = (parameter.data for parameter in run.model.parameters())
        assert rights(w1, w2, b, AND) == 4, "the weights that were learned, worked out by hand, do not compute AND"


def test_no_neuron_computes_xor():
    """No weights whatever make one neuron compute XOR: its four demands add up to 0 > 0; three of four is the limit."""
    signed = [[(2 * t - 1) * factor for factor in (*corner, 1)] for corner, t in zip(CORNERS, XOR, strict=True)]
    # Row i demands signed[i] . (w1, w2, b) >= 0, and > 0 where the target is 1. Added up, the four demand 0 > 0.
    assert [sum(column) for column in zip(*signed, strict=True)] == [0, 0, 0], "the four inequalities do not cancel"
    grid = [i / 4 for i in range(-12, 13)]
    best = max(rights(w1, w2, b, XOR) for w1, w2, b in itertools.product(grid, grid, grid))
    assert best == 3, f"{best} of 4 right: no line has more than three corners of XOR on the right side"


def test_fourteen_of_sixteen_truth_tables_fit_one_neuron():
    """Of the 16 truth tables of two inputs, one neuron computes all but XOR and its opposite."""
    grid = [-1.5, -0.5, 0.5, 1.5]
    found = {
        tuple(int(w1 * x1 + w2 * x2 + b > 0) for x1, x2 in CORNERS)
        for w1, w2, b in itertools.product((-1, 0, 1), (-1, 0, 1), grid)
    }
    everything = set(itertools.product((0, 1), repeat=4))
    missing = everything - found
    assert missing == {XOR, (1, 0, 0, 1)}, f"not computed by any neuron of the grid: {missing}"


def test_one_neuron_is_stuck_on_xor():
    """Trained on XOR from many starts, one neuron ends at ln 2, a coin toss, and never has all four right."""
    fell_back = 0
    for seed in range(10):
        run = learn_table(*lone_neuron(random.Random(seed)), XOR, steps=300, lr=1.0)
        assert run.best <= 0.75, f"seed {seed}: {run.best:.0%} right is more than a line can have"
        assert rights(*run.best_weights, XOR) / 4 == run.best, "the weights kept are not those that were best"
        assert run.losses[-1] == pytest.approx(math.log(2), abs=1e-3), f"seed {seed}: not at the lowest loss there is"
        assert min(run.losses) >= math.log(2) - 1e-12, "cross-entropy is convex here: nothing lies below ln 2"
        fell_back += run.best > run.accuracy
    assert fell_back, "some starts have more rows right on their way than at the end, but `best` never says so"


def test_a_hidden_layer_solves_xor():
    """With four neurons in front of it, the same neuron solves XOR from every start."""
    for seed in range(5):
        run = learn_table(*hidden_layer(Config(hidden=4), random.Random(seed)), XOR, steps=500, lr=1.0)
        assert run.accuracy == 1.0 and run.losses[-1] < 0.05, f"seed {seed}: XOR is not solved"
        assert run.losses[-1] < run.losses[0] / 10, f"seed {seed}: the loss fell by less than a factor of 10"


def sgd(model: torch.nn.Module, lr: float) -> None:
    """One step of gradient descent on torch's gradients; importing torch.optim for it would take seconds."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=lr)


def test_training_arrays_follows_torch_step_by_step():
    """Fifty steps of gradient descent leave the loss and every weight where torch's gradients leave them."""
    rng = np.random.default_rng(0)
    points, classes = moons(40, 0.2, rng)
    mlp = TensorMLP((2, 8, 2), "tanh", rng)
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    with torch.no_grad():
        for ours, parameter in zip(mlp.parameters(), theirs.parameters(), strict=True):
            parameter.copy_(torch.tensor(ours.data))
    x, targets = torch.tensor(points), torch.tensor(classes)
    steps = 0
    for step, loss in descend(mlp, lambda: tensor.cross_entropy(mlp(Tensor(points)), classes), steps=50, lr=0.5):
        steps += 1
        assert step == steps, f"the step after {steps - 1} is {steps}, not {step}: the first one is 1"
        theirs.zero_grad()
        expected = torch.nn.functional.cross_entropy(theirs(x), targets)
        expected.backward()
        sgd(theirs, lr=0.5)
        assert loss == pytest.approx(expected.item(), rel=1e-9), (
            f"step {step}: the loss leaves torch's path (gradients left over from the last step? the wrong direction?)"
        )
    assert steps == 50, f"{steps} steps were made, 50 were asked for"
    for ours, parameter in zip(mlp.parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(ours.data, parameter.detach().numpy(), rtol=1e-8, err_msg="weights after 50 steps")


def test_training_scalars_follows_torch_step_by_step():
    """The same loop on scalars: thirty steps on XOR leave every weight where torch's gradients leave it."""
    mlp, logit = hidden_layer(Config(hidden=3), random.Random(4))
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    with torch.no_grad():
        for layer, linear in zip(mlp.layers, theirs[::2], strict=True):
            linear.weight.copy_(torch.tensor([[w.data for w in n.weights] for n in layer.neurons], dtype=torch.float64))
            linear.bias.copy_(torch.tensor([n.bias.data for n in layer.neurons], dtype=torch.float64))
    x, targets = torch.tensor(CORNERS, dtype=torch.float64), torch.tensor(XOR, dtype=torch.float64)
    for step, loss in descend(mlp, lambda: train.table_loss(logit, XOR), steps=30, lr=1.0):
        theirs.zero_grad()
        expected = torch.nn.functional.binary_cross_entropy_with_logits(theirs(x)[:, 0], targets)
        expected.backward()
        sgd(theirs, lr=1.0)
        assert loss == pytest.approx(expected.item(), rel=1e-9), f"step {step}: the loss leaves torch's path"
    rows = [torch.cat([linear.weight, linear.bias[:, None]], dim=1) for linear in theirs[::2]]  # a neuron a row
    weights = torch.cat([row.ravel() for row in rows]).tolist()
    learned = [parameter.data for parameter in mlp.parameters()]
    assert learned == pytest.approx(weights, rel=1e-8), "the weights after 30 steps are not torch's"


def test_moons_are_two_half_circles_that_interleave():
    """Without noise each point lies on its half circle; both are as long, and each reaches into the other's bow."""
    points, classes = moons(2000, 0.0, np.random.default_rng(0))
    upper, lower = points[classes == 0], points[classes == 1]
    assert len(upper) == len(lower) == 1000, f"{len(upper)} and {len(lower)} points: half of them on each moon"
    np.testing.assert_allclose(np.hypot(*upper.T), 1.0, rtol=1e-12, err_msg="radius 1 about (0, 0)")
    np.testing.assert_allclose(np.hypot(*(lower - [1.0, 0.5]).T), 1.0, rtol=1e-12, err_msg="radius 1 about (1, 0.5)")
    assert upper[:, 1].min() >= 0.0 and lower[:, 1].max() <= 0.5, "one opens downwards, the other upwards"
    assert lower[:, 0].min() < 0.01 and upper[:, 0].max() > 0.99, "each tip lies in the other's bow"
    noisy, _ = moons(2000, 0.3, np.random.default_rng(0))
    residual = np.hypot(*noisy[classes == 0].T) - 1.0
    assert residual.std() == pytest.approx(0.3, rel=0.1), "noise is the standard deviation about the moon"
    moved = noisy - points  # the same seed, so the same points on the moons
    together = np.corrcoef(moved[:, 0], moved[:, 1])[0, 1]
    assert abs(together) < 0.1, f"the noise of x and y goes together ({together:.2f}): it is drawn for each coordinate"
    assert np.allclose(moved.std(axis=0), 0.3, rtol=0.1), "noise is the standard deviation of each coordinate"


def test_a_curve_beats_the_best_line_on_the_moons():
    """Two hidden layers put over 97% of unseen points on the right side; a straight line stays under 92%."""
    rng = np.random.default_rng(0)
    points, classes = moons(200, 0.1, rng)
    fresh = moons(1000, 0.1, rng)
    accuracy = {}
    for name, model in (("line", Linear(2, 2, rng)), ("curve", TensorMLP((2, 16, 16, 2), "tanh", rng))):
        for _ in descend(model, partial(train.moons_loss, model, points, classes), steps=600, lr=1.0):
            pass
        accuracy[name] = train.moons_accuracy(model, *fresh)
    assert accuracy["curve"] > 0.97 and 0.8 < accuracy["line"] < 0.92, f"got {accuracy}"


def test_the_figures_show_the_probability_of_class_one():
    """The colours of the figures are P(class 1): softmax's second column, or the sigmoid of a lone logit."""
    rng = np.random.default_rng(0)
    points, mlp = rng.normal(size=(9, 2)), TensorMLP((2, 3, 2), "tanh", rng)
    expected = torch.softmax(torch.tensor(mlp(Tensor(points)).data), 1)[:, 1].numpy()
    found = train.moons_probability(mlp, points)
    np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg="not softmax of the two logits, second column")
    _, logit = lone_neuron(random.Random(0))
    expected = [1 / (1 + math.exp(-logit(point).data)) for point in points]
    found = train.table_probability(logit, points)
    np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg="not 1 / (1 + e^-z) of the logit z")


def test_the_xor_figure_shows_the_neuron_at_its_best():
    """The XOR figure draws the neuron's best weights, three of four right: at the end all its weights are zero."""
    alone = [learn_table(*lone_neuron(random.Random(seed)), XOR, steps=300, lr=1.0) for seed in range(2)]
    layered = [learn_table(*hidden_layer(Config(), random.Random(0)), XOR, steps=300, lr=1.0)]
    titles = [axes.get_title() for axes in train.draw_xor(alone, layered).axes]
    assert "75%" in titles[0], f"{titles[0]!r} is drawn with the weights of the last step, not with the best"
    assert "100%" in titles[1], f"{titles[1]!r}: a hidden layer solves XOR"


def test_the_moons_are_judged_on_points_not_trained_on(tmp_path):
    """Accuracy is counted on fresh points: after training on only two points it is far from perfect."""
    config = Config(points=2, noise=0.3, moons_steps=100)
    points, classes, runs = train.lesson_moons(config, RunLog(tmp_path / "train.py"))
    for name, run in runs.items():
        assert train.moons_accuracy(run.model, points, classes) == 1.0, f"{name}: two points are easy to learn"
        assert run.accuracy < 0.95, f"{name}: {run.accuracy:.1%} after two points: it was judged on what it was shown"


SMALL = ["--starts", "2", "--steps", "60", "--moons-steps", "50", "--points", "50"]


def test_a_run_leaves_figures_and_numbers(tmp_path, monkeypatch, capsys):
    """A run writes two figures below 100 kB and a summary with every headline, twice the same for one seed."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    summaries = []
    for name in ("a", "b"):
        train.main([*SMALL, "--name", name])
        summary = json.loads((tmp_path / name / "summary.json").read_text("utf-8"))
        summaries.append({key: value for key, value in summary.items() if key not in ("run", "seconds")})
    assert summaries[0] == summaries[1], "the same seed must give the same numbers"
    best, moons_right = summaries[0]["xor_neuron_best"], summaries[0]["moons_mlp_accuracy"]
    assert best <= 0.75 < moons_right, f"one neuron on XOR {best:.0%}, two hidden layers on the moons {moons_right:.0%}"
    for figure in ("xor.png", "moons.png"):
        png = (tmp_path / "a" / figure).read_bytes()
        assert png.startswith(b"\x89PNG") and 5_000 < len(png) < 100_000, f"{figure} has {len(png)} bytes"
    lines = (tmp_path / "a" / "metrics.jsonl").read_text("utf-8").splitlines()
    lessons = {json.loads(line)["lesson"] for line in lines}
    assert len(lessons) == 5, f"a line for each lesson: {lessons}"
    screen = capsys.readouterr().out
    assert "% at best" in screen, "the table at the end does not say how many rows of XOR one neuron got right"
    assert str(tmp_path / "a") in screen.replace("\n", ""), "the last line does not say where the figures are"


def test_the_table_counts_numbers_not_arrays():
    """The table at the end counts every weight and bias, one by one in a Value or many in a Tensor."""
    scalars, _ = hidden_layer(Config(hidden=4), random.Random(0))
    arrays = TensorMLP((2, 16, 16, 2), "tanh", np.random.default_rng(0))
    for model, count in ((scalars, 17), (arrays, 354)):  # (2 + 1) 4 + (4 + 1) and (2 + 1) 16 + (16 + 1) 16 + (16 + 1) 2
        found = train.row("", "", train.MoonsRun(model, [0.0], 1.0), "")["parameters"]
        assert found == count, f"{type(model).__name__} has {count} parameters, not {found}"


def test_each_seed_gives_its_own_starts(tmp_path):
    """Every start of every seed begins with other weights, and the same seed begins with the same."""

    def first_losses(seed: int) -> list[float]:
        log = RunLog(tmp_path / "train.py")
        runs = train.lesson_xor(Config(seed=seed, starts=3, steps=1), log, "one neuron", lone_neuron)
        return [run.losses[0] for run in runs]

    assert first_losses(1) == first_losses(1), "the same seed begins with other weights"
    assert len({*first_losses(1), *first_losses(2)}) == 6, "two starts begin with the same weights"


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--seed", "-1"], "--seed"),
        (["--starts", "0"], "--starts"),
        (["--steps", "0"], "--steps"),
        (["--moons-steps", "-5"], "--moons-steps"),
        (["--points", "0"], "--points"),
        (["--lr", "0"], "--lr"),
        (["--lr", "1000"], "--lr"),
        (["--moons-lr", "nan"], "--moons-lr"),
        (["--noise", "-1"], "--noise"),
        (["--noise", "nan"], "--noise"),
        (["--steps", "many"], "--steps"),
        (["--step", "5"], "--step"),
        (["--name", "../x"], "name"),
    ],
)
def test_impossible_settings_are_refused(flags, named, tmp_path, monkeypatch):
    """A setting that makes no sense ends the run at once, and the message names the flag."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    with pytest.raises(BadInput, match=named):
        train.main(flags)
        pytest.fail(f"{' '.join(flags)} is not refused")
    assert not list(tmp_path.iterdir()), "nothing may be written for a run that cannot start"
