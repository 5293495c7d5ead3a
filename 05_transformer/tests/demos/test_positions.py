"""The comparison of position encodings measures what it says."""

import json

from shared.errors import BadInput

import pytest
import torch

from data import windows
from demos import positions


def test_only_the_past_is_shuffled():
    """The last token stays where it is and the others change places within their window, and only there."""
    x = torch.arange(60).view(4, 15)
    y = positions.shuffle_past(x, torch.Generator().manual_seed(0))
    assert torch.equal(y[:, -1], x[:, -1]), "the last token asks, and must stay the same"
    assert torch.equal(y.sort(1).values, x), "a window lost or gained a token"
    assert (y != x).any(1).all(), "a past was not shuffled"


def test_without_positions_one_layer_does_not_notice():
    """Shuffling the past costs a one-layer model without positions exactly nothing, and the others something."""
    x, y = windows(torch.randint(20, (500,), generator=torch.Generator().manual_seed(0)), 12)
    shuffled = positions.shuffle_past(x, torch.Generator().manual_seed(1))
    for kind in positions.KINDS:
        torch.manual_seed(0)
        model = positions.build(kind, 20, 12, n_layer=1)
        torch.nn.init.normal_(model.head.weight)
        gap = (positions.losses(model, shuffled, y) - positions.losses(model, x, y))[:, -1].abs().max().item()
        assert (gap < 1e-4) == (kind == "none"), f"{kind}: the loss of the last position moved by {gap}"


def test_losses_are_kept_apart_by_position():
    """The mean over windows and positions is the loss of the whole."""
    torch.manual_seed(0)
    model = positions.build("learned", 20, 12, n_layer=1)
    torch.nn.init.normal_(model.head.weight)
    x, y = windows(torch.randint(20, (500,)), 12)
    apart = positions.losses(model, x, y)
    assert apart.shape == y.shape
    for row, t in ((0, 0), (3, 7), (40, 11)):
        slow = -model(x[row:row + 1])[0, t].log_softmax(0)[y[row, t]].item()
        assert apart[row, t].item() == pytest.approx(slow, abs=1e-5), f"window {row}, position {t}"


def test_the_demo_runs(text, out, capsys):
    """Every kind of positions is trained at both depths; nothing trains the zeros of "none"."""
    positions.main(["--corpus", str(text), "--steps", "5", "--seeds", "1", "--block-size", "8"])
    rows = json.loads((out / "positions" / "summary.json").read_text("utf-8"))["rows"]
    assert [(row["layers"], row["positions"]) for row in rows] == [
        (n, kind) for n in (1, 2) for kind in ("learned", "sinusoidal", "none")
    ]
    assert abs(rows[2]["shuffled"]) < 1e-4 < abs(rows[0]["shuffled"]), "one layer without positions sees a bag"
    assert (out / "positions" / "positions.png").stat().st_size > 5000
    assert "drawn in" in capsys.readouterr().out
    for words in (["--seeds", "0"], ["--block-size", "1"], ["--steps", "0"], ["--block-size", "9999"]):
        with pytest.raises(BadInput):
            positions.main(["--corpus", str(text), *words])
