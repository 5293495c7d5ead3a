"""The demos run, and measure what they say they measure."""

import copy
import json
import math
from types import SimpleNamespace

from shared.errors import BadInput

import pytest
import torch
from torch import nn

from demos import covariate_shift, depth, leak, signals
from model import MLP, ModelConfig


def summary(out, name) -> dict:
    assert (out / name / f"{name}.png").stat().st_size > 5000
    return json.loads((out / name / "summary.json").read_text("utf-8"))


def test_depth_measures_the_derived_factors(text, out):
    """Per block the first gradient changes by the factor that theory derives, in stacks with and without norm."""
    depth.main(["--corpus", str(text), "--depths", "4", "16", "--n-hidden", "64", "--seeds", "2", "--steps", "0"])
    rows = {row["stack"]: row for row in summary(out, "depth")["rows"]}
    assert len(rows) == 7
    for name, row in rows.items():
        assert abs(math.log(row["per block"] / row["derived"])) < 0.12, f"{name}: {row}"


def test_depth_trains_and_refuses(text, out):
    """With --steps the stacks are trained as well; depths that do not rise are refused."""
    depth.main(["--corpus", str(text), "--depths", "1", "2", "--n-hidden", "8", "--seeds", "1", "--steps", "2"])
    assert all("loss, 4 blocks" in row and "loss, 32 blocks" in row for row in summary(out, "depth")["rows"])
    with pytest.raises(BadInput, match="--depths"):
        depth.main(["--corpus", str(text), "--depths", "4", "2"])


def test_a_training_that_diverges_is_told():
    """A loss that is no number does not end the demo: the stack's loss is infinite, and the others are trained."""
    torch.manual_seed(0)
    data = torch.randint(5, (500,))
    bar = SimpleNamespace(step=0, update=lambda step, **shown: None)
    for spread, diverges in ((1.0, False), (1e38, True)):
        model = MLP(ModelConfig(vocab_size=5, n_hidden=8))
        nn.init.normal_(model.head.weight, std=spread)
        assert math.isinf(depth.short_training(model, data, 2, bar, "")) == diverges, f"a head of spread {spread}"


def test_batch_norm_leaks_and_layer_norm_does_not(text, out, monkeypatch):
    """A window's probability moves with its company under BatchNorm in training, and in no other case."""
    monkeypatch.setattr(leak, "COMPANIONS", (100, 500))
    leak.main(["--corpus", str(text), "--steps", "20", "--n-hidden", "16", "--looks", "50"])
    found = summary(out, "leak")
    batch, layer = found["untrained"]
    assert batch["first company"] != pytest.approx(batch["second company"], rel=1e-3)
    assert batch["evaluation, first"] == pytest.approx(batch["evaluation, second"], rel=1e-5)
    assert len({round(value, 6) for key, value in layer.items() if key != "norm"}) == 1
    assert len(found["rows"]) == 3 and all(math.isfinite(row["in text order"]) for row in found["rows"])
    with pytest.raises(BadInput, match="--batch-size"):
        leak.main(["--corpus", str(text), "--batch-size", "1"])


def test_looking_at_the_leak_changes_nothing():
    """The losses by company are taken on a copy: the network's running statistics stay."""
    torch.manual_seed(0)
    model = MLP(ModelConfig(vocab_size=5, block_size=3, n_embd=4, n_hidden=7, norm="batch"))
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randint(5, (50, 3)), torch.randint(5, (50,))
    for company in leak.COMPANY:
        leak.loss_by_place(model, x, y, 4, company, batches=5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_signals_are_what_they_are_called():
    """Activations, gradient / weight and update / weight of a layer worked out from the tensors themselves."""
    torch.manual_seed(0)
    model = MLP(ModelConfig(vocab_size=5, block_size=3, n_embd=4, n_hidden=7))
    x, y = torch.randint(5, (20, 3)), torch.randint(5, (20,))
    sizes, ratios = signals.flow(model, x, y)
    hidden = model.hidden(model.tok_emb(x).flatten(1))
    assert sizes[0] == pytest.approx(hidden.pow(2).mean().sqrt().item(), rel=1e-5)
    nn.functional.cross_entropy(model(x), y).backward()
    weight = model.blocks[1].ffn.fc.weight
    assert ratios[2] == pytest.approx((weight.grad.norm() / weight.norm()).item(), rel=1e-5)
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.hidden.weight.mul_(1.25)
    assert signals.moved(model, after) == pytest.approx([0.25, 0, 0], abs=1e-6)


def test_signals_runs(text, out):
    """Each network is looked at in every layer, at the start and in the middle."""
    signals.main(["--corpus", str(text), "--n-layer", "3", "--n-hidden", "8", "--steps", "6"])
    found = summary(out, "signals")["signals"]
    assert len(found) == 4
    assert all(len(values) == 4 for network in found.values() for signal in network.values() for values in signal)
    with pytest.raises(BadInput, match="--steps"):
        signals.main(["--corpus", str(text), "--steps", "3"])


def shape(**changes) -> dict:
    return {"vocab_size": 5, "block_size": 3, "n_embd": 4, "n_hidden": 32, "n_layer": 2} | changes


def test_the_shift_of_a_known_change():
    """The shift is the move of mean and spread over the spread: 0 for the same network, 1 if means move by a spread."""
    torch.manual_seed(0)
    before = covariate_shift.build("BatchNorm", shape())
    x = torch.randint(5, (64, 3))
    assert covariate_shift.shift(before, copy.deepcopy(before), x) < 1e-6
    after = copy.deepcopy(before)
    for block in after.blocks:
        nn.init.ones_(block.norm.bias)
    assert covariate_shift.shift(before, after, x) == pytest.approx(1, rel=0.05)


def test_noise_shifts_more_than_training_does():
    """Noise behind BatchNorm moves the inputs of a network that does not learn at all."""
    torch.manual_seed(0)
    model = covariate_shift.build("BatchNorm + noise", shape())
    x, y = torch.randint(5, (64, 3)), torch.randint(5, (64,))
    assert 0.2 < covariate_shift.shift(model, model, x) < 0.6
    assert covariate_shift.turn(model, model, x, y) > 10
    quiet = covariate_shift.build("BatchNorm", shape())
    assert covariate_shift.turn(quiet, copy.deepcopy(quiet), x, y) < 0.1


def test_covariate_shift_runs(text, out):
    """Every variant and rate gets its row; a network that diverges is counted and not averaged."""
    covariate_shift.main(["--corpus", str(text), "--n-layer", "2", "--n-hidden", "8", "--steps", "20", "--seeds", "1"])
    rows = summary(out, "covariate_shift")["rows"]
    assert len(rows) == 12
    nothing = covariate_shift.row_of("plain", 0.3, [{"losses": [3.0, math.nan], "shifts": [], "turns": []}], 4.17)
    assert nothing["diverged"] == "1 of 1" and nothing["loss"] is None
    with pytest.raises(BadInput, match="--steps"):
        covariate_shift.main(["--corpus", str(text), "--steps", "3"])
