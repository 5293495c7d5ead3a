"""The range test raises the rate as it says, and is read off right."""

import itertools
import json

from shared.errors import BadInput

import pytest
import torch

from demos import lr_range
from model import MLP, ModelConfig
from train import TrainConfig


def test_the_rate_grows_by_the_same_factor():
    """Every step multiplies the learning rate by the same factor, from the lowest to the highest."""
    torch.manual_seed(0)
    model = MLP(ModelConfig(vocab_size=5, block_size=2, n_embd=3, n_hidden=4))
    curve = list(lr_range.range_test(model, torch.arange(5).repeat(20), TrainConfig(steps=21, batch_size=8)))
    rates = [rate for rate, _ in curve]
    assert rates[0] == pytest.approx(1e-5) and rates[-1] == pytest.approx(1.0), "from LOW to HIGH"
    factors = {round(b / a, 6) for a, b in itertools.pairwise(rates)}
    assert factors == {round(10 ** (5 / 20), 6)}, "equal factors, or the figure's logarithmic axis is covered unevenly"
    assert curve[0][1] == pytest.approx(1.61, abs=0.1), "the average starts at the first loss, about ln 5, not at 0"


def test_it_stops_once_the_loss_explodes(monkeypatch):
    """When the loss has grown to three times its lowest, nothing is to be learned from higher rates."""
    monkeypatch.setattr(lr_range, "HIGH", 1e4)
    torch.manual_seed(0)
    model = MLP(ModelConfig(vocab_size=5, block_size=2, n_embd=3, n_hidden=4))
    curve = list(lr_range.range_test(model, torch.randint(5, (200,)), TrainConfig(steps=200, batch_size=8)))
    losses = [loss for _, loss in curve]
    assert len(curve) < 200 and not losses[-1] < 3 * min(losses), "it goes on with a model that is broken already"
    assert all(losses[i] < 3 * min(losses[:i + 1]) for i in range(len(losses) - 1)), "it stops before the explosion"


def test_readings_of_a_known_curve():
    """Of a curve made by hand, the steepest fall and the lowest point are found."""
    curve = [(1e-4, 4.0), (1e-3, 3.9), (1e-2, 2.9), (1e-1, 2.5), (1.0, 9.0)]
    marks = lr_range.readings(curve)
    assert marks["lowest"] == 1e-1 and marks["steepest"] == pytest.approx(10**-2.5), "the fall is between 1e-3 and 1e-2"


def test_the_demo_runs(text, out, capsys):
    """The demo tries each rate, reports the best, and draws its figure."""
    lr_range.main(["--corpus", str(text), "--steps", "12", "--batch-size", "16"])
    summary = json.loads((out / "lr_range" / "summary.json").read_text("utf-8"))
    losses = {row["lr"]: row["validation loss"] for row in summary["tried"]}
    assert set(losses) == set(lr_range.RATES) and losses[summary["best_lr"]] == min(losses.values())
    assert (out / "lr_range" / "lr_range.png").stat().st_size > 5000
    assert "best with" in capsys.readouterr().out
    with pytest.raises(BadInput, match="at least 10"):
        lr_range.main(["--corpus", str(text), "--steps", "3"])
