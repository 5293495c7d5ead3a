"""The worked example is worked out right."""

import math
import sys
from pathlib import Path

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

from demos import by_hand


@pytest.mark.parametrize("sharpen", [1.0, 4.0, -2.0])
def test_the_numbers_are_torchs(sharpen):
    """Plain Python on lists and torch's own attention agree on the output, at any sharpness."""
    steps = by_hand.by_hand(sharpen)
    x = torch.tensor(by_hand.X, dtype=torch.float64)
    q, k, v = (x @ torch.tensor(w, dtype=torch.float64) for w in (by_hand.W_QUERY, by_hand.W_KEY, by_hand.W_VALUE))
    expected = F.scaled_dot_product_attention(sharpen * q[None], k[None], v[None], is_causal=True)[0]
    gap = (torch.tensor(steps["output"], dtype=torch.float64) - expected).abs().max().item()
    assert gap < 1e-12, f"the output is off by {gap:.1e}"


def test_the_pronoun_reads_the_noun():
    """Scores 0, 4, 0 are scaled to 0, 2, 0, and softmax gives e^2 / (e^2 + 2) of the weight to the noun."""
    weights = by_hand.by_hand()["weights"]
    assert weights[2][1] == pytest.approx(math.exp(2) / (math.exp(2) + 2)), "the weight of 'it' on 'cat'"
    assert weights[0] == [1.0, 0.0, 0.0], "the first token has only itself to look at"


def test_the_demo_runs(capsys):
    """Every step is printed, and the last line says how near the stage's own attention is."""
    by_hand.main([])
    told = capsys.readouterr().out
    for title in ("q = x W_query", "k = x W_key", "v = x W_value", "q k^T", "masked", "softmax", "weights v"):
        assert title in told, f"{title} is not printed"
    assert "0.107 v(The) + 0.787 v(cat) + 0.107 v(it)" in told
    gap = float(told.split("own attention: ")[1].strip().rstrip("."))
    assert gap < 1e-12, f"the demo and the stage differ by {gap}"
    with pytest.raises(BadInput, match="between -100 and 100"):
        by_hand.main(["--sharpen", "nan"])


def test_the_cells_show_what_the_script_shows(capsys, monkeypatch):
    """Run one after the other, as an editor does, the cells print all of it; a changed matrix shows in those below."""
    by_hand.main([])
    script = capsys.readouterr().out
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    names, screens = {"__name__": "__main__", "__file__": by_hand.__file__}, []
    cells = Path(by_hand.__file__).read_text("utf-8").split("\n# %%\n")[1:]
    for cell in cells:
        exec(cell, names)
        screens.append(capsys.readouterr().out)
    assert "".join(screens) == script, "the cells and the script show different things"
    mixture = next(i for i, screen in enumerate(screens) if "output of 'it'" in screen)
    names["W_QUERY"][2] = [0.0] * by_hand.D  # the pronoun looks for nothing any more
    exec(cells[mixture], names)
    assert "0.333 v(The) + 0.333 v(cat) + 0.333 v(it)" in capsys.readouterr().out, "the cell shows the old matrices"
