"""The comparison of pre-norm and post-norm measures what it says."""

import json
import math
from collections import Counter

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

from demos import norm_position


def test_the_unigram_loss_is_the_entropy_of_the_frequencies():
    """Knowing only how frequent each character is costs the entropy of the frequencies."""
    data = torch.tensor([0, 0, 0, 0, 1, 1, 2, 4])
    expected = -sum(n / 8 * math.log(n / 8) for n in Counter(data.tolist()).values())
    assert norm_position.unigram(data) == pytest.approx(expected)


def test_one_step_moves_a_post_norm_stack_further():
    """One step of Adam moves the output of eight post-norm blocks further than that of eight pre-norm blocks."""
    x, y = torch.randint(20, (2, 8, 16), generator=torch.Generator().manual_seed(0))
    moves = {norm: norm_position.first_step(norm, 8, x, y, 20, seed=0)[1] for norm in ("pre", "post")}
    assert moves["post"] > 1.3 * moves["pre"], moves

    gradient, move = norm_position.first_step("pre", 2, x, y, 20, seed=0)
    model = norm_position.build("pre", 2, 20, seed=0)  # once more, with the step written out
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for p, grad in zip(model.parameters(), grads, strict=True):
            p -= 1e-3 * grad / (grad.abs() + 1e-8)
    model(x)
    assert move == pytest.approx((seen[1] - seen[0]).pow(2).mean().item() ** 0.5, rel=1e-3)
    last = dict(zip(dict(model.named_parameters()), grads, strict=True))["blocks.1.ffn.proj.weight"]
    assert gradient == pytest.approx(last.norm().item(), rel=1e-4)


def test_the_rate_warms_up_and_falls():
    """The first step of a warm-up of 10 moves weights by a tenth of the rate, a start without by the whole rate."""
    data = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(0))
    for warmup, share in ((0, 1.0), (10, 0.1)):
        model = norm_position.build("pre", 1, 20, seed=0)
        before = model.head.bias.detach().clone()
        next(norm_position.fit(model, data, 100, 0.01, warmup, seed=0))
        moved = (model.head.bias - before).abs().max().item()
        assert moved == pytest.approx(0.01 * share, rel=1e-3), f"warm-up {warmup}: Adam's first step is the rate itself"


def test_smoothing_is_a_running_mean():
    """Each value is averaged with those before it, at most `width` in all."""
    assert norm_position.smooth([1.0, 3.0, 5.0, 7.0], width=2) == [1.0, 2.0, 4.0, 6.0]


def test_the_demo_runs(text, out, capsys):
    """Both norms are trained at every rate, with and without warm-up."""
    norm_position.main(["--corpus", str(text), "--steps", "20", "--seeds", "1", "--n-layer", "2"])
    summary = json.loads((out / "norm_position" / "summary.json").read_text("utf-8"))
    cells = {(row["norm"], row["warm-up"], row["lr"]) for row in summary["rows"]}
    rates = ("0.001", "0.003", "0.01")
    assert cells == {(norm, warmup, lr) for norm in ("pre", "post") for warmup in (0, 6) for lr in rates}
    assert (out / "norm_position" / "norm_position.png").stat().st_size > 5000
    assert "stuck" in capsys.readouterr().out
    with pytest.raises(BadInput, match="at least 20 steps"):
        norm_position.main(["--corpus", str(text), "--steps", "19"])
