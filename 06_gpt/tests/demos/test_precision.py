"""The demo of speed compares variants that compute the same, and leaves the model as it was."""

import json

from shared.errors import BadInput

import pytest
import torch

import model
from demos import precision

SMALL = ["--n-layer", "1", "--n-embd", "8", "--n-head", "2", "--block-size", "16", "--rounds", "2", "--batch-size", "2"]


def test_the_variants_compute_the_same():
    """Attention fused and written out give the same averages, so only their time is compared."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 4, dtype=torch.float64) for _ in range(3))
    results = [attention(q, k, v) for _, attention in precision.VARIANTS.values()]
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-12)


def test_the_demo_runs(text, out, monkeypatch, capsys):
    """Every variant is timed against the usual one, and the model's attention is put back afterwards."""
    before = model.attention
    precision.main(["--corpus", str(text), "--plain-allocator", *SMALL])
    alone = json.loads(capsys.readouterr().out)
    assert len(alone) == 2 and min(alone) > 0
    monkeypatch.setattr(precision, "without_settings", lambda argv: alone)  # another process would import torch again
    precision.main(["--corpus", str(text), "--steps", "3", *SMALL])
    summary = json.loads((out / "precision" / "summary.json").read_text("utf-8"))
    assert len(summary["rows"]) == 4 + 2
    assert summary["rows"][0]["ratio"] == 1.0 and all(row["ms"] > 0 for row in summary["rows"])
    assert 0 < abs(summary["losses"]["float32"] - summary["losses"]["bfloat16"]) < 0.05
    assert model.attention is before, "the model was left with another attention"
    with pytest.raises(BadInput, match="--rounds"):
        precision.main(["--rounds", "0"])
