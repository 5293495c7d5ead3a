"""The three columns of the demo agree, and the demo says so."""

import math

from shared.errors import BadInput

import pytest
import torch

from demos import by_hand

POINTS = [(-2.0, 0.5, 1.5), (0.3, -1.0, 0.1), (1.0, 0.0, 0.0)]


@pytest.mark.parametrize("point", POINTS)
def test_hand_engine_nudge_and_torch_agree(point):
    """Calculus by hand, the engine, a finite difference and torch give the same slope for every variable."""
    values = by_hand.expression(*point)
    values["loss"].backward()
    w, x, b = (torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in point)
    inner = {"p": w * x}
    inner["z"] = inner["p"] + b
    inner["t"] = inner["z"].tanh()
    inner["e"] = inner["t"] - 1
    for node in inner.values():
        node.retain_grad()
    loss = inner["e"] ** 2 + 0.1 * w**2
    loss.backward()
    torchs = {"w": w, "x": x, "b": b, **inner}
    rules = by_hand.by_hand(*point)
    assert set(rules) == set(values), "every variable of the expression is worked out by hand"
    for name, (_, hand) in rules.items():
        nudged = by_hand.central_difference(lambda h, name=name: by_hand.loss_with(*point, name, h))
        assert values[name].grad == pytest.approx(hand, rel=1e-12, abs=1e-15), f"d_{name}: hand and engine differ"
        assert nudged == pytest.approx(hand, rel=1e-8, abs=1e-9), f"d_{name}: a nudge shows another slope"
        if name != "loss":
            assert torchs[name].grad.item() == pytest.approx(hand, rel=1e-12, abs=1e-15), f"d_{name}: torch disagrees"


def test_the_demo_prints_each_slope_three_times(capsys):
    """The table shows every slope by hand, by engine and by nudge, and the step that follows lowers the loss."""
    by_hand.main([])
    screen = capsys.readouterr().out
    slope = 2 * (math.tanh(0.5) - 1) * (1 - math.tanh(0.5) ** 2)
    assert screen.count(f"{slope:.6f}") == 9, "d_z, d_p and d_b, three times each"
    assert screen.count(f"{slope * 0.5 - 0.4:.6f}") == 3, "w: both paths added"
    assert "0.689318 -> 0.565673" in screen, "the step against the slopes takes the loss from 0.689318 to 0.565673"


def test_numbers_that_overflow_are_refused():
    """A number that the square could not hold is refused."""
    for wrong in ("nan", "1e9", "abc"):
        with pytest.raises(BadInput, match="--w"):
            by_hand.main(["--w", wrong])
            pytest.fail(f"--w {wrong} is not refused")
