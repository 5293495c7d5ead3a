"""Ternary layers, the recurrence, and that all variants cost the same."""

import json
import math

from shared.errors import BadInput

import pytest
import torch
from torch import nn

from demos import matmul_free
from demos.ablation import Scale
from demos.matmul_free import VARIANTS, Recurrence, TernaryLinear, build
from model import CausalSelfAttention, RMSNorm

SCALE = Scale(steps=2, seeds=1, batch_size=4, block_size=8, n_embd=12, n_head=3, n_layer=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_a_ternary_weight_has_three_values():
    """Each entry goes to the nearest of -s, 0 and s, where s is the mean size of the entries."""
    weight = torch.randn(7, 9)
    rounded, s = matmul_free.ternary(weight), weight.abs().mean().item()
    for entry, value in zip(weight.flatten().tolist(), rounded.flatten().tolist(), strict=True):
        nearest = min((-s, 0.0, s), key=lambda level: abs(level - entry))
        assert value == pytest.approx(nearest, abs=1e-6), f"{entry:.3f} became {value:.3f}, nearest is {nearest:.3f}"
    assert len(rounded.unique()) == 3


def test_inputs_have_eight_bits():
    """A vector is rounded to at most 255 levels of its own, and no entry moves by more than half a level."""
    x = torch.randn(3, 2000) * torch.tensor([[0.01], [1.0], [100.0]])
    rounded = matmul_free.eight_bits(x)
    for row, found in zip(x, rounded, strict=True):
        level = row.abs().max() / 127
        fine = 100 < len(found.unique()) <= 255 and (found - row).abs().max() <= level / 2 * 1.001
        assert fine, "each position has a scale of its own, its largest entry's"
    assert matmul_free.eight_bits(torch.zeros(1, 4)).eq(0).all(), "a vector of zeros has no largest entry to divide by"


def test_a_ternary_layer_adds_and_subtracts():
    """The output is the sums of the normed input's entries with weight s less those with -s, times s."""
    layer = TernaryLinear(nn.Linear(9, 4, bias=False))
    x = torch.randn(3, 9)
    normed = matmul_free.eight_bits(x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
    s = layer.weight.abs().mean()
    for i in range(4):
        plus, minus = layer.weight[i] > s / 2, layer.weight[i] < -s / 2
        expected = s * (normed[:, plus].sum(-1) - normed[:, minus].sum(-1))
        torch.testing.assert_close(layer(x)[:, i], expected, rtol=1e-4, atol=1e-5,
                                   msg=lambda m: f"norm the input, round it and the weight, multiply\n{m}")


def test_rounding_is_passed_straight_through():
    """The trained weight's gradient is the rounded one's, entries that were rounded to 0 included."""
    layer = TernaryLinear(nn.Linear(9, 4, bias=False))
    x, slope = torch.randn(3, 9, requires_grad=True), torch.randn(3, 4)
    layer(x).backward(slope)
    inputs = matmul_free.eight_bits(RMSNorm(9)(x)).detach()
    expected = slope.T @ inputs  # of y = W x, whatever made W
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-5,
                               msg=lambda m: f"rounding must let the gradient through as it is\n{m}")
    twin = x.detach().requires_grad_()
    RMSNorm(9)(twin).backward(slope @ matmul_free.ternary(layer.weight).detach())
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5,
                               msg=lambda m: f"the input's rounding must let the gradient through as well\n{m}")


@pytest.mark.parametrize("T", [1, 2, 7, 16, 37])
def test_the_recurrence_is_the_loop(T):
    """All positions at once are the loop h = f h + (1 - f) c, with its gradients, at lengths that are no power of 2."""
    f, c = torch.rand(2, T, 3, requires_grad=True), torch.randn(2, T, 3, requires_grad=True)
    f64, c64 = (x.detach().double().requires_grad_() for x in (f, c))
    h, states = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(T):
        h = f64[:, t] * h + (1 - f64[:, t]) * c64[:, t]
        states.append(h)
    loop, ours = torch.stack(states, dim=1), matmul_free.running_mean(f, c)
    torch.testing.assert_close(ours.double(), loop, rtol=1e-5, atol=1e-6, msg=lambda m: f"T = {T}: not the loop\n{m}")
    slope = torch.randn(2, T, 3)
    ours.backward(slope)
    loop.backward(slope.double())
    for name, a, b in (("f", f, f64), ("c", c, c64)):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5,
                                   msg=lambda m, name=name: f"the gradient of {name}\n{m}")


def test_the_mixer_is_the_papers():
    """The MLGRU by its equations, a position and a channel at a time."""
    mixer = Recurrence(build("attention, dense", SCALE, 11, 0).config)
    x = torch.randn(1, 5, 12)

    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    layers = (mixer.forget, mixer.candidate, mixer.gate)
    forget, candidate, gate = ((x[0] @ layer.weight.T).tolist() for layer in layers)
    h, rows = [0.0] * 12, []
    for t in range(5):
        for c in range(12):
            f, z = sigmoid(forget[t][c]), candidate[t][c]
            h[c] = f * h[c] + (1 - f) * z * sigmoid(z)
        rows.append([sigmoid(gate[t][c]) * h[c] for c in range(12)])
    torch.testing.assert_close(mixer(x)[0], torch.tensor(rows) @ mixer.proj.weight.T, rtol=1e-4, atol=1e-5,
                               msg=lambda m: f"not the recurrence of the equations\n{m}")


def test_the_variants_are_what_they_are_called():
    """Attention or recurrence in every block, ternary layers everywhere inside or nowhere, embedding and head dense."""
    for variant in VARIANTS:
        model = build(variant, SCALE, 11, 0)
        mixer, layers = variant.split(", ")
        kinds = {type(block.attn) for block in model.blocks}
        assert kinds == {Recurrence if mixer == "recurrence" else CausalSelfAttention}, f"{variant}: {kinds}"
        linear = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
        rounded = sum(type(layer) is TernaryLinear for layer in linear)
        assert len(linear) == 2 * 7, f"{variant}: {len(linear)} linear layers"
        assert rounded == (14 if layers == "ternary" else 0), f"{variant}: {rounded} of 14 layers are ternary"
        assert type(model.head) is nn.Linear and model.head.weight is model.tok_emb.weight


@pytest.mark.parametrize("n_embd", [64, 128])
def test_all_have_about_equally_many_parameters(n_embd):
    """No variant has 2 per cent more or fewer parameters than attention with dense layers."""
    counts = {name: sum(p.numel() for p in build(name, Scale(n_embd=n_embd), 65, 0).parameters()) for name in VARIANTS}
    base = counts["attention, dense"]
    assert all(abs(count / base - 1) < 0.02 for count in counts.values()), counts


def test_no_variant_sees_the_future():
    """A token that changes leaves the scores of earlier positions alone and changes all later ones."""
    a = torch.randint(11, (1, 8))
    b = a.clone()
    b[0, 3] = (b[0, 3] + 1) % 11
    for variant in VARIANTS:
        model = build(variant, SCALE, 11, 0)
        moved = (model(a) - model(b)).abs().amax(dim=(0, 2)) > 1e-6
        assert moved.tolist() == [False] * 3 + [True] * 5, f"{variant}: {moved.tolist()}"


def test_the_demo_runs(text, out):
    """Each variant is trained at each rate, and its better rate is shown."""
    small = ["--n-embd", "8", "--n-layer", "1", "--block-size", "8", "--batch-size", "4", "--rounds", "1"]
    matmul_free.main(["--corpus", str(text), "--steps", "3", "--seeds", "1", "--rates", "1e-5", "0.05", *small])
    rows = json.loads((out / "matmul_free" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["mixer, layers"] for row in rows] == list(VARIANTS)
    [file] = (out / "matmul_free").glob("runs-*.json")
    kept = json.loads(file.read_text("utf-8"))
    for row in rows:
        tried = {rate: kept[f"{row['mixer, layers']}, {rate}, 0"]["val loss"] for rate in (1e-5, 0.05)}
        found = row["val loss"], row["rate"]
        assert row["val loss"] == min(tried.values()) == tried[row["rate"]], f"{found} is not the better of {tried}"
    assert (out / "matmul_free" / "matmul_free.png").stat().st_size > 5000, "no figure"
    with pytest.raises(BadInput, match="--rates"):
        matmul_free.main(["--rates", "0"])
