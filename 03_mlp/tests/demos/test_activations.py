"""A model without a non-linearity is one matrix, and the demo measures that."""

import json

from shared.errors import BadInput

import pytest
import torch

from demos import activations
from model import MLP, ModelConfig


def test_only_a_linear_model_collapses():
    """The product of both matrices gives the scores of a linear model and of no other."""
    torch.manual_seed(0)
    idx = torch.randint(11, (50, 3))
    for name in ("none", "tanh", "relu", "gelu"):
        model = MLP(ModelConfig(vocab_size=11, block_size=3, n_embd=4, n_hidden=7, activation=name))
        torch.nn.init.normal_(model.head.weight)
        torch.nn.init.normal_(model.head.bias)
        error = activations.collapse_error(model, idx)
        assert (error < 1e-5) == (name == "none"), f"{name}: off by {error:.1e}"


def test_the_demo_runs(text, out, capsys):
    """Every activation is trained with both context lengths, and the linear ones collapse after training too."""
    activations.main(["--corpus", str(text), "--steps", "10", "--n-hidden", "8", "--seeds", "1"])
    rows = json.loads((out / "activations" / "summary.json").read_text("utf-8"))["rows"]
    assert len(rows) == 2 * 4
    for row in rows:
        assert (float(row["one matrix is off by"]) < 1e-5) == (row["activation"] == "none"), row
    assert (out / "activations" / "activations.png").stat().st_size > 5000
    assert "one matrix" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--steps"):
        activations.main(["--corpus", str(text), "--steps", "2"])
