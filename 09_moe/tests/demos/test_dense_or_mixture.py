"""Dense against mixture: equal work or equal size, bytes that are counted by hand, and the table."""

import json

from shared.errors import BadInput

import pytest

from demos import dense_or_mixture
from demos.ablation import Scale
from demos.dense_or_mixture import Sizes
from moe import count
from train import TrainConfig, make_optimizer

FLAGS = ["--n-embd", "48", "--n-head", "2", "--n-layer", "2", "--block-size", "16", "--batch-size", "4", "--rounds",
         "2", "--n-expert", "6", "--n-active", "3", "--seeds", "2"]  # fmt: skip


def test_the_models_are_equal_in_what_they_should_be():
    """The mixture does about the dense model's work, and has about as many parameters as the large dense model."""
    found = dense_or_mixture.shapes(Scale(), Sizes(), 65)
    models = {name: dense_or_mixture.build(config, 0) for name, config in found.items()}
    whole = {name: count(model) for name, model in models.items()}
    routers = 4 * 8 * 128
    assert abs(count(models["mixture"], active=True) - whole["dense"] - routers) <= 4 * 3 * 128 * 2 * 8, \
        "the experts of a position have as many units as the dense feed-forward, to within 8 each"
    assert whole["mixture"] - whole["dense, as large"] == routers, "not of equal size"
    assert whole["mixture"] > 3 * whole["dense"], "a mixture of 8 experts, of which 2 work, is much larger"


def test_bytes_are_counted_by_hand():
    """Weights 4 bytes; Muon one number more for each, AdamW two, and a step count of 4 bytes for each tensor."""
    config = dense_or_mixture.shapes(Scale(n_embd=32, n_head=2, n_layer=2, block_size=16), Sizes(), 11)["mixture"]
    model = dense_or_mixture.build(config, 0)
    optimizer = make_optimizer(model, TrainConfig())
    weights = count(model)
    assert dense_or_mixture.held(model, optimizer) == 4 * weights, "an optimiser that made no step keeps nothing"
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    routers, scales, table = 2 * 8 * 32, 2 * (2 * 32 + 2 * 16) + 32, 11 * 32
    adamw, tensors = routers + scales + table, 2 + (2 * 4 + 1) + 1
    assert dense_or_mixture.held(model, optimizer) == 4 * (weights + (weights - adamw) + 2 * adamw + tensors)


def test_the_demo_runs(text, out, capsys):
    """The whole demo: three rows, losses by seed, times and bytes; runs are made once; nonsense is refused."""
    argv = ["--corpus", str(text), "--steps", "2", *FLAGS]
    dense_or_mixture.main(argv)
    folder = out / "dense_or_mixture"
    rows = {row["variant"]: row for row in json.loads((folder / "summary.json").read_text("utf-8"))["rows"]}
    assert list(rows) == ["dense", "mixture", "dense, as large"]
    for name, row in rows.items():
        assert 1 < row["val loss"] < 4 and row["ms a step"] > 0 and row["spread"] > 0, f"{name}: {row}"
        assert (row["active"] < row["params"]) == (name == "mixture"), "in a dense model all parameters are active"
    assert rows["mixture"]["MB"] == pytest.approx(rows["dense, as large"]["MB"], rel=0.05), "equal size, equal memory"
    assert (folder / "losses.png").stat().st_size > 5000, "no figure"
    [kept] = folder.glob("runs-*.json")
    before = kept.read_bytes()
    dense_or_mixture.main([*argv, "--rounds", "1"])
    assert kept.read_bytes() == before and len(list(folder.glob("runs-*.json"))) == 1, "runs were made again"
    assert "dense, as large" in capsys.readouterr().out
    for flag, value in (("--n-active", "7"), ("--rounds", "0"), ("--n-expert", "0"), ("--block-size", "5000")):
        with pytest.raises(BadInput):
            dense_or_mixture.main([*argv, flag, value])
