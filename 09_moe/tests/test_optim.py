"""Checkpoints of the optimisers: Muon against torch's own and against singular values, and several under one name."""

import copy
import math

import pytest
import torch
from torch import nn

import optim as trunk
from optim import Muon, Together, orthogonalise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def matrices(n: int, shape: tuple[int, int]):
    """n matrices U S V^T with singular values from 1 down to 1 / 30, and the matrices U V^T: [n, *shape] x 2."""
    rank = min(shape)
    u = torch.linalg.qr(torch.randn(n, shape[0], rank, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, shape[1], rank, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(30), rank, dtype=torch.float64)
    return (u * values) @ v.mT, u @ v.mT


SHAPES = [(16, 16), (8, 24), (24, 8)]  # square, wide, tall


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "tall"])
def test_singular_values_become_about_one(shape, scale):
    """Whatever a matrix's size, its singular values become about 1, and its directions stay: U S V^T -> U V^T."""
    given, nearest = matrices(5, shape)
    out = orthogonalise((scale * given).float()).double()
    assert out.shape == given.shape, f"{tuple(given.shape)} became {tuple(out.shape)}: a tall matrix is turned back"
    assert out.isfinite().all(), "the iteration ran away: divide by the norm first, or values above 1 grow without end"
    values = torch.linalg.svdvals(out)
    assert 0.6 < values.min() and values.max() < 1.3, (
        f"singular values from {values.min():.3f} to {values.max():.3f} for inputs of size {scale:g}: five steps take "
        "values up to 1 near 1, and dividing by the norm takes any matrix there"
    )
    cosine = (out * nearest).sum(dim=(1, 2)) / out.norm(dim=(1, 2)) / nearest.norm(dim=(1, 2))
    assert cosine.min() > 0.97, f"cosine {cosine.min():.3f} with U V^T: only the lengths change, not the directions"
    one = orthogonalise((scale * given[2:3]).float()).double()
    torch.testing.assert_close(
        one[0], out[2], rtol=0.02, atol=0.02,
        msg=lambda m: f"a matrix depends on its neighbours in the stack: each has a norm of its own\n{m}",
    )


def test_neighbours_of_another_size_do_not_matter():
    """Of matrices that go through the iteration together, a small one is treated like a large one."""
    given, _ = matrices(2, (8, 24))
    out = orthogonalise((given * torch.tensor([1e-3, 1e3])[:, None, None]).float())
    values = torch.linalg.svdvals(out.double())
    assert 0.6 < values.min() and values.max() < 1.3, (
        f"values {values.min():.3f} to {values.max():.3f}: the norm is each matrix's own, not that of the stack"
    )


def test_a_matrix_of_zeros_stays():
    """The gradient of a part that took no part is 0, and so is its direction."""
    assert not orthogonalise(torch.zeros(2, 3, 4)).any(), "0 / 0: add a little to the norm before dividing by it"


def weights() -> list[nn.Parameter]:
    """A wide, a tall, a square and another wide matrix: those of equal shape are no neighbours."""
    return [nn.Parameter(torch.randn(shape)) for shape in [(8, 24), (24, 8), (16, 16), (8, 24)]]


def descend(optimizer, parameters, steps: int, generator=None):
    """Some steps towards 0, with noise that repeats."""
    generator = generator or torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            p.grad = p.detach() + torch.randn(p.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("momentum", [0.95, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_is_torchs(momentum, weight_decay):
    """Over several steps the weights are those of torch.optim.Muon: wide, tall and square ones, with decay and without.
    """
    ours = weights()
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    recipe = {"lr": 0.02, "momentum": momentum, "weight_decay": weight_decay}
    descend(Muon(ours, **recipe), ours, 8)
    descend(torch.optim.Muon(theirs, **recipe, nesterov=True), theirs, 8)
    for p, q, before in zip(ours, theirs, start, strict=True):
        error = ((p - q).norm() / (q - before).norm()).item()  # of the way gone; torch divides by the norm in bfloat16
        assert error < 0.04, (
            f"a weight of {tuple(p.shape)} is off by {100 * error:.1f} % of its way after 8 steps: momentum with "
            "Nesterov's look ahead, orthogonalised, times lr sqrt(max(1, rows / columns)), and decay of the weight"
        )


def test_muons_step_by_hand():
    """One step on a diagonal gradient: all directions are taken alike, lr sqrt(rows / columns) far, after decay."""
    weight = nn.Parameter(torch.full((8, 2), 2.0))
    weight.grad = torch.zeros(8, 2)
    weight.grad[0, 0], weight.grad[1, 1] = 30.0, -10.0
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    optimizer.step()
    moved = (weight.detach() - 2.0 * (1 - 0.1 * 0.5)) / (0.1 * 2)  # sqrt(8 / 2) = 2
    expected = torch.zeros(8, 2)
    expected[0, 0], expected[1, 1] = -1.0, 1.0
    torch.testing.assert_close(
        moved, expected, rtol=0, atol=0.3,
        msg=lambda m: "decay takes lr * weight_decay of the weight; the step is against the gradient, equally long in "
        f"both directions though one gradient is three times the other, and sqrt(8 / 2) times lr\n{m}",
    )


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_direction_looks_ahead(momentum, monkeypatch):
    """What is orthogonalised is the mean of the gradients with the newest counted once more, worked out by hand."""
    seen = []
    monkeypatch.setattr(trunk, "orthogonalise", lambda stack: (seen.append(stack.clone()), stack)[1])
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer, mean = Muon([weight], lr=0.1, momentum=momentum), torch.zeros(2, 3)
    for step in range(3):
        gradient = torch.randn(2, 3)
        weight.grad = gradient.clone()
        optimizer.step()
        mean = momentum * mean + (1 - momentum) * gradient
        torch.testing.assert_close(
            seen[-1][0], momentum * mean + (1 - momentum) * gradient,
            msg=lambda m, step=step: f"step {step + 1}: mean = momentum mean + (1 - momentum) gradient, and Nesterov "
            f"takes that mean as if one more step had been made with this gradient\n{m}",
        )
        torch.testing.assert_close(weight.grad, gradient, msg=lambda m: f"the gradient itself was written over\n{m}")


def test_equal_shapes_go_together(monkeypatch):
    """Matrices of one shape are orthogonalised in one stack, and end where each would have ended on its own."""
    together, apart, shapes = weights(), None, []
    apart = copy.deepcopy(together)
    iterate = orthogonalise
    monkeypatch.setattr(trunk, "orthogonalise", lambda stack: (shapes.append(tuple(stack.shape)), iterate(stack))[1])
    gradients = [torch.randn(p.shape) for p in together]
    for p, q, g in zip(together, apart, gradients, strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    Muon(together, lr=0.1).step()
    assert sorted(shapes) == [(1, 16, 16), (1, 24, 8), (2, 8, 24)], f"stacks of {shapes}: one for each shape"
    for p, q in zip(together, apart, strict=True):
        Muon([q], lr=0.1).step()
        torch.testing.assert_close(
            p, q, rtol=0, atol=2e-3,
            msg=lambda m: f"in a stack a weight gets another step than alone: mixed up with its neighbour?\n{m}",
        )


def test_a_weight_without_a_gradient_is_left_alone():
    """A weight that took no part in the loss is not moved, not even by decay, and the others are."""
    parameters = weights()
    before = copy.deepcopy(parameters)
    for p in parameters[1:]:
        p.grad = torch.randn(p.shape)
    Muon(parameters, lr=0.1, weight_decay=0.5).step()
    moved = [not torch.equal(p, q) for p, q in zip(parameters, before, strict=True)]
    assert moved == [False, True, True, True], f"moved: {moved}, and only the first has no gradient"


def both(inner, outer) -> Together:
    return Together(muon=Muon(inner, lr=0.02), adamw=torch.optim.AdamW(outer, lr=0.01))


def test_together_is_each_of_them():
    """Several optimisers under one name do what each of them does alone: groups, steps, cleared gradients."""
    inner, outer = weights(), [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(7, 3))]
    alone = copy.deepcopy([*inner, *outer])
    optimizer = both(inner, outer)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.02, 0.01], f"the groups have rates {rates}: those of all optimisers, each with its own"
    optimizer.param_groups[0]["lr"] = 0.04
    assert optimizer.optimizers["muon"].param_groups[0]["lr"] == 0.04, "the groups are copies: no schedule reaches them"
    descend(optimizer, [*inner, *outer], 3)
    assert all(p.grad is None for p in [*inner, *outer]), "gradients of one of the optimisers are kept"
    generator, muon = torch.Generator().manual_seed(1), Muon(alone[:4], lr=0.04)
    adamw = torch.optim.AdamW(alone[4:], lr=0.01)
    for _ in range(3):
        for p in alone:
            p.grad = p.detach() + torch.randn(p.shape, generator=generator)
        muon.step()
        adamw.step()
    for p, q in zip([*inner, *outer], alone, strict=True):
        assert torch.equal(p, q), f"a weight of {tuple(p.shape)} is not where its own optimiser takes it"


def test_a_restored_optimiser_goes_on_bit_for_bit():
    """Saved after 3 steps and restored, Muon and AdamW make the next steps to the last bit; fresh ones do not."""
    parameters = [*weights(), nn.Parameter(torch.randn(5))]
    optimizer, noise = both(parameters[:4], parameters[4:]), torch.Generator().manual_seed(1)
    descend(optimizer, parameters, 3, noise)
    restored, fresh = copy.deepcopy(parameters), copy.deepcopy(parameters)
    state, chance = copy.deepcopy(optimizer.state_dict()), noise.get_state()
    assert state.keys() == {"muon", "adamw"}, f"the state holds {sorted(state)}: each optimiser's, by its name"
    descend(optimizer, parameters, 3, noise)

    again = both(restored[:4], restored[4:])
    again.load_state_dict(state)
    descend(again, restored, 3, torch.Generator().set_state(chance))
    for p, q in zip(parameters, restored, strict=True):
        assert torch.equal(p, q), f"a weight of {tuple(p.shape)} goes another way: its momentum was not restored"
    descend(both(fresh[:4], fresh[4:]), fresh, 3, torch.Generator().set_state(chance))
    assert not any(torch.equal(p, q) for p, q in zip(parameters, fresh, strict=True)), "momentum has no effect"


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=["wide", "tall"])
def test_each_expert_is_a_matrix_of_its_own(shape):
    """Experts in one tensor [E, m, n] end where torch's Muon takes each of them alone, however unlike they are."""
    ours = [nn.Parameter(torch.randn(3, *shape)) for _ in range(2)]
    start = copy.deepcopy(ours)
    theirs = [[nn.Parameter(expert.detach().clone()) for expert in p] for p in ours]
    sizes = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]  # a busy expert's gradient is larger
    recipe = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3}
    muon, torchs = Muon(ours, **recipe), torch.optim.Muon([expert for p in theirs for expert in p], **recipe)
    for _ in range(4):
        for p, experts in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape) * sizes
            for expert, grad in zip(experts, p.grad, strict=True):
                expert.grad = grad.clone()
        muon.step()
        torchs.step()
    for p, experts, before in zip(ours, theirs, start, strict=True):
        for e, expert in enumerate(experts):
            error = ((p[e] - expert).norm() / (expert - before[e]).norm()).item()
            assert error < 0.04, (
                f"expert {e} of {tuple(p.shape)} is off by {100 * error:.0f} % of its way: each is orthogonalised on "
                "its own, with a norm of its own, and its step is sqrt(max(1, rows / columns)) of its own shape"
            )
