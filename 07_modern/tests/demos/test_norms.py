"""The norms compared are the norms that they are called, in their places, and the gradient is measured uncut."""

import json
import math

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import batches
from demos import norms
from demos.ablation import Scale, fit, make_optimizer, recipe
from model import RMSNorm

SCALE = Scale(steps=3, seeds=1, batch_size=4, block_size=7, n_embd=12, n_head=3, n_layer=2)


def test_each_kind_is_its_formula():
    """Written out or as a kernel, LayerNorm is torch's and RMSNorm is x / sqrt(mean(x^2) + eps), scaled."""
    torch.manual_seed(0)
    start = RMSNorm(12, eps=0.1)
    nn.init.normal_(start.weight)
    x = 3 + torch.randn(2, 5, 12)
    wanted = {"RMSNorm": x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * start.weight}
    shift = torch.randn(12)
    wanted["LayerNorm"] = F.layer_norm(x.double(), (12,), start.weight.double(), shift.double(), 0.1).float()
    for kind, Norm in norms.KINDS.items():
        norm = Norm(start) if Norm else start
        if "LayerNorm" in kind:
            norm.bias.data.copy_(shift)
        torch.testing.assert_close(norm(x), wanted[kind.split(",")[0]], rtol=1e-5, atol=1e-5,
                                   msg=lambda m, kind=kind: f"{kind} is another norm\n{m}")


def test_every_norm_is_replaced():
    """A model of LayerNorms has no RMSNorm left, those of queries and keys and the last one included."""
    for kind, Norm in norms.KINDS.items():
        model = norms.build(SCALE, 11, 0, kind)
        found = [type(module) for module in model.modules() if "Norm" in type(module).__name__]
        assert found == [Norm or RMSNorm] * (4 * 2 + 1), f"{kind}: {found}"
        assert model.norm.weight.eq(0.1).all(), f"{kind}: the last norm's small scale was lost, and with it ln V"


def test_where_the_norms_stand():
    """With one branch silenced, the other's block is the formula of its place, with the norm written out here."""
    x = 3 * torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))

    def rms(y):
        return y / y.pow(2).mean(-1, keepdim=True).sqrt()

    formulas = {  # what a branch f makes of x, and what the silent branch before or after it does
        "pre": (lambda f, x: x + f(rms(x)), lambda x: x),
        "post": (lambda f, x: rms(x + f(x)), rms),
        "output": (lambda f, x: x + 0.5 * rms(f(x)), lambda x: x),  # 0.5: of 4 branches, each is 1 / sqrt(4)
    }
    for place, (branch, silent) in formulas.items():
        for part, other in (("attn", "ffn"), ("ffn", "attn")):
            [block, _] = norms.build(SCALE, 11, 0, place=place).blocks
            nn.init.zeros_(getattr(block, other).proj.weight)
            f = getattr(block, part)
            expected = silent(branch(f, x)) if part == "attn" else branch(f, silent(x))
            torch.testing.assert_close(
                block(x), expected, rtol=1e-3, atol=1e-4,
                msg=lambda m, place=place, part=part: f"{place}: the norm of {part} stands in another place\n{m}")


def test_the_places_share_their_start():
    """With one seed the three places start from the same matrices."""
    models = [dict(norms.build(SCALE, 11, 3, place=place).named_parameters()) for place in norms.PLACES]
    assert all(torch.equal(models[0][name], model[name]) for model in models for name in model if "norm" not in name)


def test_the_gradient_is_measured_before_it_is_clipped():
    """The length noted is that of torch.autograd's whole gradient, not what clipping leaves of it."""
    data = torch.randint(11, (400,), generator=torch.Generator().manual_seed(0))
    config = recipe(SCALE, 0, clip=1e-3, precision="float32")
    model, twin = norms.build(SCALE, 11, 0), norms.build(SCALE, 11, 0)
    x, y = next(batches(data, 7, 4, 0))
    loss = F.cross_entropy(twin(x).flatten(0, 1), y.flatten())
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    expected = math.sqrt(sum(grad.double().pow(2).sum().item() for grad in grads))
    lengths = norms.watch_gradient(model)
    fit(model, batches(data, 7, 4, 0), config, make_optimizer(model, config), lambda step, loss: None)
    assert len(lengths) == 3, f"three steps, {len(lengths)} lengths"
    assert lengths[0] == pytest.approx(expected, rel=1e-4), f"{lengths[0]:.4f} noted, {expected:.4f} true"


def test_the_demo_runs(text, out):
    """Both norms and all places at all rates are trained, timed and drawn; nonsense is refused."""
    small = ["--n-embd", "8", "--n-layer", "1", "--block-size", "16", "--batch-size", "4"]
    norms.main(["--corpus", str(text), "--steps", "2", "--seeds", "1", "--rates", "0.01", "--rounds", "1", *small])
    summary = json.loads((out / "norms" / "summary.json").read_text("utf-8"))
    assert [row["norm"] for row in summary["rows"]] == ["RMSNorm", "LayerNorm"]
    assert all(row["ms"] > 0 and row["ms, torch's kernel"] > 0 and row["gradient"] > 0 for row in summary["rows"])
    assert [(row["place"], row["rate"]) for row in summary["places"]] == [(place, 0.01) for place in norms.PLACES]
    assert (out / "norms" / "norms.png").stat().st_size > 5000, "no figure"
    with pytest.raises(BadInput, match="--rates"):
        norms.main(["--rates", "0"])
