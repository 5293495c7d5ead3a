"""All ways of dispatching give the same numbers, a wrong one is seen, and the table has a row for each."""

import json

from shared.errors import BadInput

import pytest
import torch

from demos import dispatch
from model import FeedForward, ModelConfig
from moe import Mixture

SHAPE = {"vocab_size": 1, "n_embd": 24, "n_head": 1, "head_dim": 2, "n_expert": 8, "n_active": 3, "expert_hidden": 16}


def test_all_ways_are_equal():
    """Output and all gradients are equal to 1e-6 of their size, with 8 experts of which some are chosen by nobody."""
    torch.manual_seed(0)
    layer = Mixture(ModelConfig(**SHAPE), FeedForward)
    x, upstream = torch.randn(37, 24, requires_grad=True), torch.randn(37, 24)
    chosen = torch.stack([torch.randperm(6)[:3] for _ in range(37)])  # nobody chooses experts 6 and 7
    weights = torch.rand(37, 3, requires_grad=True)
    parts = [x, weights, layer.gate, layer.fc, layer.proj]
    found = {name: dispatch.run(lambda way=way: way(layer, x, chosen, weights), parts, upstream)[2]
             for name, way in dispatch.WAYS.items()}
    for name in found:
        gap = dispatch.difference(found[name], found["token by token"])
        assert gap < 1e-6, f"{name}: the output or a gradient is off by {gap:.1e}"
    assert found["grouped"][3][6:].abs().max() == 0, "an expert that nobody chose has a gradient"
    with torch.no_grad():  # position 5 by hand
        expected = sum(weights[5, i] * (layer.proj[e] @ (torch.nn.functional.silu(layer.gate[e] @ x[5])
                                                         * (layer.fc[e] @ x[5]))) for i, e in enumerate(chosen[5]))
    assert torch.allclose(found["token by token"][0][5], expected, atol=1e-6), "not even the plain loop is right"


def test_a_wrong_way_is_seen(monkeypatch):
    """A way that forgets the weights of the chosen differs, and the table says by how much; the ways take turns."""
    order = []

    def wrong(layer, x, chosen, weights):
        order.append("wrong")
        return dispatch.token_by_token(layer, x, chosen, 0 * weights + 1 / 3)

    monkeypatch.setitem(dispatch.WAYS, "wrong", wrong)
    grouped = dispatch.WAYS["grouped"]
    monkeypatch.setitem(dispatch.WAYS, "grouped", lambda *args: order.append("grouped") or grouped(*args))
    rows = {row["way"]: row for row in dispatch.compare(ModelConfig(**SHAPE), tokens=9, rounds=2)}
    assert order == ["grouped", "wrong"] * 2, "the ways take turns"
    assert rows["wrong"]["differs"] > 0.01 and rows["grouped"]["differs"] < 1e-6 and rows["dense"]["differs"] is None
    assert rows["grouped"]["slower"] == 1 and min(row["forward"] for row in rows.values()) > 0


def test_the_demo_runs(out, capsys):
    """The whole demo: a row for each way and number of experts, and a figure; nonsense is refused."""
    dispatch.main(["--experts", "4", "--tokens", "9", "--rounds", "1", "--active", "1"])  # not refused
    dispatch.main(["--experts", "4", "8", "--tokens", "60", "--rounds", "3", "--n-embd", "32"])
    rows = json.loads((out / "dispatch" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["experts"] for row in rows] == [4] * 4 + [8] * 4
    # The bar is 3 times as slow; with 60 positions on a busy machine the test asks for less.
    assert all(row["slower"] > 1.5 for row in rows if row["way"] == "token by token"), rows
    assert (out / "dispatch" / "dispatch.png").stat().st_size > 5000 and "expert by expert" in capsys.readouterr().out
    for words in (["--experts", "1"], ["--tokens", "0"], ["--rounds", "0"], ["--expert-hidden", "0"]):
        with pytest.raises(BadInput):
            dispatch.main(words)
