"""The feed-forwards compared are their formulas, start alike and have equally many parameters."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from demos import feed_forward
from demos.ablation import Scale, shape
from model import GPT

SCALE = Scale(steps=2, seeds=1, batch_size=4, block_size=7, n_embd=12, n_head=3, n_layer=2)
KINDS = [*feed_forward.PLAIN, *feed_forward.GATED]


def part(kind, scale=SCALE):
    """The first block's feed-forward of a model of this kind."""
    return feed_forward.build(kind, scale, 11, seed=0).blocks[0].ffn


def test_each_kind_is_its_formula():
    """ReLU, GELU, GLU, SwiGLU and ReLU^2 equal torch's own functions and the papers' formulas, in float64."""
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = {
        "ReLU": lambda z: z.clamp(min=0),
        "GELU": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "ReLU^2": lambda z: torch.where(z > 0, z * z, 0.0),
    }
    gated = {
        "GLU": lambda gate, z: F.glu(torch.cat([z, gate], dim=-1)),
        "SwiGLU": lambda gate, z: gate / (1 + torch.exp(-gate)) * z,
    }
    for kind in KINDS:
        ffn = part(kind).double()
        z = x @ ffn.fc.weight.T
        hidden = plain[kind](z) if kind in plain else gated[kind](x @ ffn.gate.weight.T, z)
        torch.testing.assert_close(ffn(x), hidden @ ffn.proj.weight.T, msg=lambda m, kind=kind: f"{kind}\n{m}")


@pytest.mark.parametrize("n_embd", [12, 64, 128])
def test_all_have_equally_many_parameters(n_embd):
    """Two matrices of 3/2 F units are as large as three of F, at any width; and as large as the stage's own."""
    scale = Scale(n_embd=n_embd, n_head=2)
    counts = {kind: sum(p.numel() for p in feed_forward.build(kind, scale, 65, 0).parameters()) for kind in KINDS}
    counts["stage"] = sum(p.numel() for p in GPT(shape(scale, 65)).parameters())
    assert len(set(counts.values())) == 1, f"not a comparison at equal parameters: {counts}"


def test_the_gain_makes_up_for_the_non_linearity():
    """ReLU halves the power and its square has E[z^4] / 2 = 3/2 of it, so the gains are sqrt(2) and sqrt(2/3)."""
    assert feed_forward.gain(F.relu) == pytest.approx(math.sqrt(2), rel=1e-3)
    assert feed_forward.gain(lambda z: F.relu(z) ** 2) == pytest.approx(math.sqrt(2 / 3), rel=1e-3)
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert feed_forward.gain(F.silu) == pytest.approx(F.silu(z).pow(2).mean().item() ** -0.5, rel=0.01)


def test_all_start_with_outputs_of_one_size():
    """On a normal input every kind's first outputs have the variance that a branch of 4 blocks should have, 1/8."""
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        power = part(kind, Scale(n_embd=128))(x).var().item()
        assert power == pytest.approx(1 / 8, rel=0.15), f"{kind} starts {power * 8:.2f} times as strong as it should"


def test_silent_units_are_counted():
    """Half of a ReLU's units are silent at the start, hardly any of GELU's; a layer that says nothing is counted so."""
    x = torch.randint(11, (8, 7), generator=torch.Generator().manual_seed(0))
    shares = {kind: feed_forward.silent(feed_forward.build(kind, SCALE, 11, 0), x) for kind in KINDS}
    assert 0.3 < shares["ReLU"] < 0.7 and shares["GELU"] < 0.1 and shares["SwiGLU"] < 0.2, shares
    model, inputs = feed_forward.build("ReLU", SCALE, 11, 0), []
    model.blocks[1].ffn.fc.weight.data[1:] = 0  # of this layer's 48 units, one is left
    for block in model.blocks:
        block.ffn.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    share = feed_forward.silent(model, x)
    by_hand = []
    for block, before in zip(model.blocks, inputs, strict=True):
        hidden = F.relu(before @ block.ffn.fc.weight.T)
        by_hand.append((hidden < 0.01 * hidden.pow(2).mean().sqrt()).double().mean().item())
    assert by_hand[1] >= 47 / 48 and share == pytest.approx(sum(by_hand) / 2, abs=1e-6), f"{share}, by hand {by_hand}"
    assert not model.blocks[0].ffn.proj._forward_pre_hooks, "the model is handed back with the hooks still on it"


def test_the_demo_runs(text, out):
    """Every kind is trained and drawn."""
    small = ["--n-embd", "8", "--n-layer", "1", "--block-size", "16", "--batch-size", "4"]
    feed_forward.main(["--corpus", str(text), "--steps", "2", "--seeds", "1", *small])
    rows = json.loads((out / "feed_forward" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["feed-forward"] for row in rows] == KINDS and len({row["parameters"] for row in rows}) == 1
    assert len({row["val loss"] for row in rows}) == len(KINDS), "two kinds are the same"
    assert (out / "feed_forward" / "feed_forward.png").stat().st_size > 5000, "no figure"
