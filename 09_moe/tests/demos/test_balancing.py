"""Balancing: loads and the columns of the table worked out by hand, and balancing that balances."""

import json
import math

from shared.errors import BadInput

import pytest
import torch

from demos import balancing
from model import GPT, ModelConfig
from train import evaluate, mixtures

SIZES = {"vocab_size": 11, "block_size": 8, "n_embd": 12, "n_head": 2, "n_layer": 3, "n_expert": 4, "n_active": 2,
         "expert_hidden": 8, "first_dense": 1}  # fmt: skip


def unbalanced() -> GPT:
    """A model whose first mixture sends all positions to experts 0 and 2, and whose second prefers some by far."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SIZES))
    first, second = mixtures(model)
    first.bias += torch.tensor([5.0, 0.0, 5.0, 0.0])
    second.router.weight.data.normal_(std=2.0)
    return model


def test_loads_are_watched_over_time():
    """Shares of experts add up to 1 in each layer, and a record is the mean of the steps since the last one."""
    model = unbalanced()
    watch = balancing.Watch(model, steps=6, records=2)
    for step in range(6):
        mixtures(model)[0].bias.data = torch.tensor([5.0, 5.0, 0.0, 0.0] if step == 5 else [5.0, 0.0, 5.0, 0.0])
        model(torch.randint(11, (3, 8)))
        watch()
    shares = torch.tensor(watch.shares)  # [records, L, E]
    assert shares.shape == (2, 2, 4), "two records of two mixtures; the dense layer has no load"
    assert torch.allclose(shares.sum(-1), torch.ones(2, 2), atol=1e-3)
    assert shares[0, 0].tolist() == [0.5, 0.0, 0.5, 0.0], "each position chooses two experts: half of the choices each"
    assert torch.allclose(shares[1, 0], torch.tensor([0.5, 1 / 6, 1 / 3, 0.0]), atol=1e-3), "the mean over three steps"


def test_the_columns_are_worked_by_hand():
    """Two of four experts take all: busiest 2, idle 2, and at 1.25 times an even share 3 of 8 choices are dropped."""
    model, data = unbalanced(), torch.randint(11, (8 * 12 + 1,), generator=torch.Generator().manual_seed(1))
    model.blocks[2].ffn = model.blocks[1].ffn  # both mixtures alike, so that the means are known
    free = balancing.routing(model, data, rows=5)
    assert (free["busiest"], free["idle"], free["dropped"]) == (2.0, 2.0, 0.0)
    assert free["loss"] == pytest.approx(evaluate(model, data), abs=1e-5), "not the loss of the whole text"
    assert 0.9 < free["entropy"] <= 1, "a router that is not trained has no opinion: nearly ln E"
    model.config.capacity = 1.25
    limited = balancing.routing(model, data, rows=4)  # 32 positions a pass: 64 choices, room for 20 in each expert
    assert limited["dropped"] == pytest.approx(1 - 2 * 20 / 64), "each of the two had 32 and took 20"
    assert limited["loss"] != free["loss"], "what was dropped does not show in the loss"
    for block in model.blocks[1:]:
        block.ffn.router.weight.data.zero_()
    assert balancing.routing(model, data, 4)["entropy"] == pytest.approx(1), f"all equally likely: ln 4 / {math.log(4)}"


def test_the_demo_runs(text, out, capsys):
    """Three ways from the same weights; with a strong hand the load evens out; runs are made once, nonsense refused."""
    argv = ["--corpus", str(text), "--steps", "30", "--seeds", "1", "--n-embd", "16", "--n-head", "2", "--n-layer", "2",
            "--block-size", "16", "--batch-size", "4", "--n-expert", "4", "--records", "5", "--bias-rate", "0.02"]
    balancing.main(argv)
    folder = out / "balancing"
    rows = {row["variant"]: row for row in json.loads((folder / "summary.json").read_text("utf-8"))["rows"]}
    assert list(rows) == ["none", "loss", "bias"]
    for name, row in rows.items():
        assert 1 < row["val loss"] < 4 and 1 <= row["busiest"] <= 2 and 0 <= row["dropped"] < 0.5, f"{name}: {row}"
        assert 0 < row["entropy"] <= 1 and row["loss with drops"] > 1, f"{name}: {row}"
    assert rows["bias"]["busiest"] < rows["none"]["busiest"], "the biases balance nothing"
    [kept] = folder.glob("runs-*.json")
    runs, before = json.loads(kept.read_text("utf-8")), kept.read_bytes()
    assert len(runs["none, 0"]["shares"]) == 5 and len(runs["none, 0"]["shares"][0]) == 2
    assert runs["none, 0"]["losses"][0] == runs["bias, 0"]["losses"][0], "the ways begin with other weights"
    balancing.main(argv)
    assert kept.read_bytes() == before and (folder / "balancing.png").stat().st_size > 5000
    assert "loss with drops" in capsys.readouterr().out
    for flag, value in (("--n-expert", "1"), ("--capacity", "0"), ("--n-active", "5"), ("--bias-rate", "0")):
        with pytest.raises(BadInput):
            balancing.main([*argv, flag, value])
