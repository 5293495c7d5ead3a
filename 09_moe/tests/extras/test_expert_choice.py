"""Experts that choose: a plain loop gives the same, the load is even, and the future is seen."""

import pytest
import torch
import torch.nn.functional as F

from extras.expert_choice import ExpertChoice, let_experts_choose
from model import GPT, FeedForward, ModelConfig
from moe import Mixture

SIZES = {"vocab_size": 17, "block_size": 16, "n_embd": 12, "n_head": 2, "n_layer": 3, "n_expert": 5, "n_active": 2,
         "expert_hidden": 8}  # fmt: skip


def layer(**more):
    """A layer whose router prefers some experts by far, so that positions differ in how many take them."""
    torch.manual_seed(3)
    made = ExpertChoice(ModelConfig(**SIZES | more), FeedForward)
    made.router.weight.data.normal_(std=2.0)
    return made


def by_hand(layer, x, real):
    """The same in plain loops over experts and positions: x [N, C], real [N] of true and false -> [N, C]."""
    E, k = layer.config.n_expert, layer.config.n_active
    places = [n for n in range(len(x)) if real[n]]
    room = -(-len(places) * k // E)
    y = [torch.zeros_like(x[0]) for _ in x]
    scores = torch.stack([layer.router.weight @ x[n] for n in range(len(x))])  # [N, E]
    for e in range(E):
        def weight(n, e=e):
            each = scores[n].exp() if layer.config.router == "softmax" else scores[n].sigmoid()
            return each[e] / each.sum() if layer.config.router == "softmax" else each[e]

        for n in sorted(places, key=lambda n: -weight(n).item())[:room]:
            h = F.silu(layer.gate[e] @ x[n]) * (layer.fc[e] @ x[n])
            y[n] = y[n] + weight(n) * (layer.proj[e] @ h)
    if layer.shared is not None:
        y = [y[n] + layer.shared(x[n]) for n in range(len(x))]
    return torch.stack(y)


@pytest.mark.parametrize("more", [{}, {"n_shared": 1}, {"router": "sigmoid", "n_active": 3}], ids=str)
def test_a_plain_loop_gives_the_same(more):
    """Experts and positions in plain loops give the same output and gradients, with padding and without."""
    made = layer(**more)
    for real in (None, torch.tensor([[False, True, True, True], [True] * 4, [False, False, True, True]])):
        x = torch.randn(3, 4, 12, requires_grad=True)
        flags = [True] * 12 if real is None else real.flatten().tolist()
        ours, theirs = made(x, real), by_hand(made, x.flatten(0, 1), flags).view(3, 4, 12)
        assert torch.allclose(ours, theirs, atol=1e-5), "another choice, or other weights, than in the plain loop"
        parts, upstream = [x, *made.parameters()], torch.randn_like(x)
        grads = [torch.autograd.grad(y, parts, upstream) for y in (ours, theirs)]
        for name, a, b in zip(["x", *dict(made.named_parameters())], *grads, strict=True):
            assert torch.allclose(a, b, atol=1e-4), f"the gradient of {name} is another than in the plain loop"


def test_the_load_is_even_whatever_the_router_says():
    """All experts take equally many, balance is 1, and the router still learns; positions are taken unequally."""
    made = layer()
    made(torch.randn(4, 10, 12) + 1.0)  # all positions are alike in part, and most prefer the same experts
    assert made.routing.load.tolist() == [16] * 5, "40 positions, 2 of 5 experts on average: each expert takes 16"
    assert made.routing.balance.item() == pytest.approx(1.0), "equal loads have a balance loss of 1"
    assert made.routing.dropped.item() == 0
    assert made.taken.sum() == 80 and made.taken.min() < 2 < made.taken.max(), \
        f"{made.taken.tolist()}: each position was taken by the same number of experts, which is the tokens' choice"
    plain = Mixture(made.config, FeedForward)
    plain.load_state_dict(made.state_dict())
    plain(torch.randn(4, 10, 12) + 1.0)
    assert plain.routing.load.max() > 20, "the example is too easy: tokens that choose are balanced as well"
    made(torch.randn(2, 5, 12)).square().sum().backward()
    assert made.router.weight.grad.abs().sum() > 0, "the router has no gradient: it would never learn"
    assert made.count().tolist() == [16 + 4] * 5, "loads of passes in training add up until they are counted"


def test_padding_takes_no_room():
    """Padding is taken by nobody, and experts have room in proportion to the real positions."""
    made = layer()
    real = torch.tensor([[False] * 3 + [True] * 5, [True] * 8])
    y = made(torch.randn(2, 8, 12), real)
    assert made.routing.load.tolist() == [6] * 5, "13 real positions x 2 / 5 experts = 5.2, so there is room for 6"
    assert made.taken[:3].tolist() == [0, 0, 0] and torch.equal(y[0, :3], torch.zeros(3, 12)), "padding was taken"


def test_one_row_of_flags_stands_for_all_texts():
    """With a window nothing is padding, and one row says so for all texts of the batch."""
    made, x = layer(), torch.randn(3, 4, 12)
    assert torch.equal(made(x, torch.ones(1, 4, dtype=torch.bool)), made(x)), "the flags count for the first text only"
    model = let_experts_choose(GPT(ModelConfig(**SIZES | {"window": 4})))
    assert model(torch.randint(17, (2, 9))).shape == (2, 9, 17)


def test_experts_that_choose_see_the_future():
    """Another last token changes earlier logits, and another text in the batch too; tokens that choose do not."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SIZES)).eval()
    for block in model.blocks:
        block.ffn.router.weight.data.normal_(std=2.0)
    idx = torch.randint(17, (2, 9))
    last, other = idx.clone(), idx.clone()
    last[:, -1] = (last[:, -1] + 1) % 17
    other[1] = (other[1] + 1) % 17

    @torch.no_grad()
    def moved():
        plain = model(idx)
        return [(model(last) - plain)[:, :-1].abs().max().item(), (model(other) - plain)[0].abs().max().item()]

    assert max(moved()) < 1e-5, "where tokens choose, nothing depends on what comes later"
    weights = model.state_dict()
    assert let_experts_choose(model) is model and all(isinstance(b.ffn, ExpertChoice) for b in model.blocks)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items()), "weights were lost"
    future, neighbour = moved()
    assert future > 1e-3, "an expert's choice depends on all positions, later ones too: this has to show"
    assert neighbour > 1e-3, "positions of all texts compete for an expert: this has to show"


def test_dense_layers_stay():
    """In a hybrid stack only the mixtures change, and the model still trains."""
    model = let_experts_choose(GPT(ModelConfig(**SIZES | {"first_dense": 1})))
    kinds = [type(block.ffn) for block in model.blocks]
    assert kinds == [FeedForward, ExpertChoice, ExpertChoice]
    model(torch.randint(17, (2, 8))).sum().backward()
    assert all(p.grad is not None for p in model.parameters()), "a parameter has no part in the output"
