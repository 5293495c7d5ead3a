"""The tables of scaling and cost, and the drawing of the block."""

import json
import math

from shared.errors import BadInput

import pytest
import torch

from demos import draw_block, scaling


@pytest.mark.parametrize("D", [4, 64])
def test_scores_spread_with_the_root_of_the_channels(D):
    """Dot products of D normal terms have standard deviation sqrt(D), and 1 after the division."""
    assert scaling.softness(D, 1.0)[0] == pytest.approx(math.sqrt(D), rel=0.03)
    assert scaling.softness(D, D**-0.5)[0] == pytest.approx(1.0, rel=0.03)


def test_the_gradient_is_softmaxs_derivative(monkeypatch):
    """The length reported is that of the derivative that autograd finds."""
    monkeypatch.setattr(scaling, "KEYS", 5)
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    scores = (q @ k.transpose(1, 2))[:, 0]
    lengths = [torch.autograd.functional.jacobian(lambda row: row.softmax(0), row).norm().item() for row in scores]
    assert scaling.softness(3, 1.0, queries=2)[2] == pytest.approx(sum(lengths) / 2, rel=1e-4)


def test_the_demos_run(out, capsys):
    """Both tables and the drawing are made; lengths that make no sense are refused."""
    scaling.main(["--lengths", "8", "16", "--repeats", "1"])
    summary = json.loads((out / "scaling" / "summary.json").read_text("utf-8"))
    assert [row["positions"] for row in summary["cost"]] == [8, 16]
    assert all(row["attention(q, k, v)"] > 0 and row["feed-forward"] > 0 for row in summary["cost"])
    assert len(summary["softness"]) == 10 and "largest weight" in capsys.readouterr().out
    draw_block.main([])
    assert (out / "block" / "block.png").stat().st_size > 5000
    with pytest.raises(BadInput, match="--lengths"):
        scaling.main(["--lengths", "0"])
