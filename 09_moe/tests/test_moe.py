"""Checkpoints of the mixtures: against a loop over positions and experts, numbers by hand, and each text alone."""

import copy
import math

from shared.errors import BadInput

import naive
import naive_moe
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as trunk
from cache import Cache
from model import GPT, Block, FeedForward, ModelConfig
from moe import Mixture, count
from sample import SampleConfig, evaluation, pad_left, sample

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # in float64, where only the order of the sums differs


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Angles in float64, and the same weights each time."""
    monkeypatch.setattr(trunk, "rope_table", naive.angles)
    torch.manual_seed(0)


def small(**changes) -> ModelConfig:
    """A shape in which no two sizes are equal; 2 of 5 experts."""
    shape = {"vocab_size": 11, "block_size": 20, "n_embd": 16, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 2}
    return ModelConfig(**shape | {"n_hidden": 40, "n_expert": 5, "expert_hidden": 24} | changes)


def scramble(module):
    """Move every weight off its start; in float64."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def mixture(**changes) -> Mixture:
    return scramble(Mixture(small(**changes), FeedForward))


def told(scores, **changes):
    """A mixture whose router gives position n of x the scores [N, E], and that x [N, C]."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    layer = mixture(n_expert=scores.shape[1], **changes)
    layer.router.weight.data = torch.eye(scores.shape[1], 16, dtype=torch.float64)
    return layer, torch.cat([scores, torch.randn(len(scores), 16 - scores.shape[1], dtype=torch.float64)], dim=1)


def wishes(*choices, n_expert=3):
    """Scores of positions that choose these experts, the one they like best first: [N, E]."""
    scores = torch.zeros(len(choices), n_expert)
    for n, chosen in enumerate(choices):
        for rank, e in enumerate(chosen):
            scores[n, e] = 3.0 - rank
    return scores


def near(found, expected, idea, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance or CLOSE, msg=lambda m: f"{idea}\n{m}")


KINDS = [
    {},
    {"n_active": 1, "renormalise": False},
    {"n_active": 3, "renormalise": False},
    {"n_active": 5},
    {"n_expert": 7, "n_active": 3, "router": "sigmoid"},
    {"n_active": 4, "router": "sigmoid", "renormalise": False},
    {"n_shared": 1},
    {"n_active": 3, "n_shared": 2, "router": "sigmoid"},
    {"n_active": 3, "capacity": 0.7},
    {"n_embd": 10, "expert_hidden": 7},  # sizes that torch's kernel does not take
]


@pytest.mark.parametrize("unloved", [False, True], ids=["all are chosen", "nobody chooses expert 3"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_mixture_is_a_loop_over_positions_and_experts(kind, unloved):
    """Sorted by expert and multiplied in blocks, positions get what a loop gives them: outputs and all gradients."""
    layer = mixture(**kind)
    if unloved:
        layer.bias[3] = -100.0
    rough = copy.deepcopy(layer).float()
    x = torch.randn(3, 6, layer.config.n_embd, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), naive_moe.mixture(layer, x)
    near(ours, theirs, "each position: the weighted sum of its own experts' outputs, once each, in its own place")
    sources = {"the input": x} | dict(layer.named_parameters())
    slope = torch.randn_like(x)
    grads = (torch.autograd.grad(out, list(sources.values()), slope) for out in (ours, theirs))
    for name, a, b in zip(sources, *grads, strict=True):
        near(a, b, f"the gradient of {name} is wrong: it flows through the experts and through their weights")
    assert not unloved or kind.get("n_active") == 5 or layer.routing.load[3] == 0, "expert 3 was to be chosen by nobody"
    error = ((rough(x.float()) - theirs).abs().max() / theirs.abs().max()).item()
    assert error < 1e-6, f"in float32 the layer is off by {error:.1e} of its size"


def test_weights_by_hand():
    """Of scores ln 4, ln 3, ln 2, ln 1 the best two weigh 0.4 and 0.3, renormalised 4/7 and 3/7, or as sigmoids."""
    scores = torch.tensor([[3.0, 1, 4, 2], [1, 4, 2, 3]], dtype=torch.float64).log()
    ways = [
        ("softmax", False, [2 / 5, 3 / 10], "softmax over all experts, and then the best: the others have their share"),
        ("softmax", True, [4 / 7, 3 / 7], "the weights of the chosen are made to sum to 1"),
        ("sigmoid", False, [4 / 5, 3 / 4], "each expert is scored on its own: s / (1 + s)"),
        ("sigmoid", True, [16 / 31, 15 / 31], "the weights of the chosen are made to sum to 1"),
    ]
    for router, renormalise, expected, idea in ways:
        layer, x = told(scores, router=router, renormalise=renormalise)
        chosen, weights = layer.route(x)
        assert chosen.tolist() == [[2, 0], [1, 3]], f"{router}: positions choose {chosen.tolist()}, not the two best"
        near(weights, torch.tensor([expected, expected], dtype=torch.float64), f"{router}, {renormalise}: {idea}")


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_the_bias_changes_who_and_not_how_much(router, renormalise):
    """A bias moves the choice to other experts; what the chosen count stays what their own scores say."""
    layer, x = told(torch.randn(8, 5), router=router, renormalise=renormalise)
    before, _ = layer.route(x)
    layer.bias[:] = torch.tensor([0.9, -0.9, 0.0, 0.9, -0.9])  # no probability makes up for that
    chosen, weights = layer.route(x)
    assert {frozenset(row) for row in chosen.tolist()} == {frozenset({0, 3})}, "the bias is not added for the choice"
    assert not torch.equal(before.sort().values, chosen.sort().values), "without it others were chosen"
    probs = torch.stack([naive_moe.chances(layer, row) for row in x]).gather(1, chosen)
    expected = probs / probs.sum(1, keepdim=True) if renormalise else probs
    near(weights, expected, "the bias is in the weights as well: an expert that nobody needs would be turned up")
    assert weights.requires_grad and not layer.bias.requires_grad, "the bias is moved by counts, not by a gradient"
    assert "bias" in dict(layer.named_buffers()), "a run that goes on needs the bias: keep it in the state"


@pytest.mark.parametrize("change", [{}, {"renormalise": False, "n_active": 1}, {"router": "sigmoid"}], ids=str)
def test_the_router_learns_from_the_loss(change):
    """The loss reaches the router through the weights of the chosen: which expert helped, and how much?"""
    layer = mixture(**change)
    layer(torch.randn(4, 6, 16, dtype=torch.float64)).square().sum().backward()
    size = layer.router.weight.grad
    assert size is not None and size.abs().max() > 1e-3, "the router has no gradient: are its weights detached?"


def test_positions_do_not_mix():
    """What a position gets is its own: moved elsewhere it gets the same, and others may change beside it."""
    layer, x = mixture(n_active=3), torch.randn(2, 7, 16, dtype=torch.float64)
    out, order = layer(x).flatten(0, 1), torch.randperm(14)
    moved = layer(x.flatten(0, 1)[order].view(2, 7, 16)).flatten(0, 1)
    near(moved, out[order], "sorted by expert, and not put back where they came from")
    for n in range(14):
        alone = layer(x.flatten(0, 1)[n].view(1, 1, 16)).flatten()
        near(alone, out[n], f"position {n} gets something else beside others: added twice, or in a neighbour's place?")


@pytest.mark.parametrize("kind", ["autocast", "a bfloat16 model"])
def test_the_router_chooses_in_float32(kind):
    """Two experts that differ by less than bfloat16 can tell are told apart, whatever the products are made in."""
    layer = Mixture(small(n_active=1, renormalise=False), FeedForward)
    layer.router.weight.data = torch.zeros(5, 16)
    layer.router.weight.data[:, 0] = 1.0
    layer.router.weight.data[3, 1] = 2.0**-9  # in bfloat16 the next number after 1 is 1 + 2^-7
    x = torch.ones(2, 3, 16)
    if kind == "a bfloat16 model":
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        chosen, weights = layer.route(x.flatten(0, 1))
        out = layer(x)
    assert (chosen == 3).all(), f"of scores 1 and 1 + 2^-9 experts {chosen.unique().tolist()} were taken for the best"
    assert weights.dtype == torch.float32, f"weights in {weights.dtype}: the router works in float32"
    expected = math.exp(2.0**-9) / (4 + math.exp(2.0**-9))
    assert weights[0, 0].item() == pytest.approx(expected, abs=1e-7), "weights rounded to bfloat16 on the way"
    assert out.dtype == x.dtype, f"{x.dtype} came in, {out.dtype} comes out"


@pytest.mark.parametrize("hidden", [24, 7])
def test_bfloat16_is_for_the_experts(hidden, monkeypatch):
    """Under autocast the experts multiply in bfloat16, and the layer's answer is that of float32, but for rounding."""
    layer, x = mixture(expert_hidden=hidden).float(), torch.randn(4, 8, 16)
    exact, calls, kernel = layer(x), [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **how: (calls.append(args[0].dtype), kernel(*args, **how))[1])
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    error = ((rough - exact).norm() / exact.norm()).item()
    expected = [torch.bfloat16] * 3 if hidden == 24 else []  # rows of 7 numbers do not begin at multiples of 16 bytes
    assert calls == expected, f"products {calls}: one call of torch's kernel for all experts, where it takes the sizes"
    assert 1e-4 < error < 0.02, f"bfloat16 is off by {error:.1e}: 8 bits are good for half of a hundredth, and no more"
    rough.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}, "the gradients stay in float32"


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_balance_is_1_where_all_are_equal(k):
    """Switch's loss is 1 at perfect balance, for any number of choices, and E / k where the same k take all."""
    turns = torch.arange(6)
    even = torch.tensor([2.5, 2, 1, 0.5, -1, -2])[(turns[None] - turns[:, None]) % 6]  # each expert is each rank once
    one = torch.full((7, 6), -50.0)
    one[:, :k] = 50.0
    for scores, expected in ((even, 1.0), (one, 6 / k)):
        layer, x = told(scores, n_active=k, renormalise=k > 1)
        layer(x)
        found = layer.routing.balance.item()
        assert found == pytest.approx(expected, abs=1e-6), (
            f"{k} of 6 experts: the balance loss is {found:.4f}, not {expected:.4f}: E times the sum of (share of all "
            "choices times mean probability)"
        )


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_what_the_router_did_is_told(router, padded):
    """Load, balance, z, entropy equal sums over the positions of all texts together, padding left out."""
    layer, x = mixture(router=router, n_active=3), torch.randn(3, 6, 16, dtype=torch.float64)
    real = torch.ones(3, 6, dtype=torch.bool)
    if padded:
        real[0, :4], real[2, :1] = False, False
    layer(x, real if padded else None)
    rows = x[real]
    chosen = [naive_moe.choice(layer, row) for row in rows]
    load = [sum(e in row for row in chosen) for e in range(5)]
    assert layer.routing.load.tolist() == load, f"load {layer.routing.load.tolist()}, not {load}: who counts padding?"
    assert not layer.routing.load.requires_grad, "a count has no gradient"
    shares = torch.stack([p / p.sum() for p in (naive_moe.chances(layer, row) for row in rows)])
    balance = 5 * sum(load[e] / sum(load) * shares[:, e].mean() for e in range(5))
    near(
        layer.routing.balance, balance, "E sum_e (share of choices) (mean probability), over the whole batch at once",
        rtol=1e-6, atol=0,
    )
    z = torch.stack([(layer.router.weight @ row).exp().sum().log() ** 2 for row in rows]).mean()
    near(layer.routing.z, z, "the mean of the squared logarithm of the sum of exponentials")
    entropy = -(shares * shares.log()).sum(1).mean()
    near(layer.routing.entropy, entropy, "of each position's probabilities, which sum to 1, in nats, and then the mean")
    assert not layer.routing.entropy.requires_grad, "the entropy is there to be looked at"
    assert layer.routing.dropped == 0, "without a limit nobody is turned away"


def test_z_and_entropy_by_hand():
    """Scores ln 4, ln 3, ln 2, ln 1 have z = ln(10)^2 and 1.2799 nats; four zeros have ln(4)^2 and ln 4."""
    layer, x = told(torch.tensor([[4.0, 3, 2, 1], [1, 1, 1, 1]]).log())
    layer(x)
    nats = -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))
    z, entropy = (math.log(10) ** 2 + math.log(4) ** 2) / 2, (nats + math.log(4)) / 2
    assert layer.routing.z.item() == pytest.approx(z), "the mean over positions of (ln sum e^score)^2"
    assert layer.routing.entropy.item() == pytest.approx(entropy), "-sum p ln p, and the mean over positions"


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["balance", "z"])
def test_the_routers_losses_reach_the_router(name, router):
    """Their gradient is that of finite differences: it flows through probabilities, and counts stand still."""
    layer, x = mixture(router=router), torch.randn(9, 16, dtype=torch.float64)
    real = torch.arange(9) > 1

    def loss(weight):
        torch.func.functional_call(layer, {"router.weight": weight}, (x, real))
        return getattr(layer.routing, name)

    weight = layer.router.weight.detach().clone().requires_grad_()
    [grad] = torch.autograd.grad(loss(weight), weight)
    assert grad.abs().max() > 1e-3, f"{name} has no gradient: nothing would get better"
    steps, numeric = torch.eye(80, dtype=torch.float64).view(80, 5, 16) * 1e-6, []
    for step in steps:
        numeric.append((loss(weight.detach() + step) - loss(weight.detach() - step)) / 2e-6)
    near(
        grad.flatten(), torch.stack(numeric).detach(), f"the gradient of {name}: a count does not change with a weight,"
        " so a gradient through it is made up", rtol=1e-5, atol=1e-7,
    )


def test_capacity_is_for_training():
    """In evaluation nobody is turned away: a text has the scores that it has alone, whatever comes beside or after."""
    model = GPT(small(capacity=0.5)).double()
    scramble(model)
    model.eval()
    idx = torch.randint(11, (4, 7))
    together = model(idx)
    alone = torch.cat([model(row[None]) for row in idx])
    near(together, alone, "a text that is scored depends on its neighbours: they take its experts' room")
    later = idx.clone()
    later[:, -1] = (later[:, -1] + 1) % 11
    near(model(later)[:, :-1], together[:, :-1], "a later token took the room of an earlier one: the future leaks")


def test_capacity_by_hand():
    """Of 8 choices of 3 experts, at 0.75 of an even share, each takes 2: first choices first, then early positions."""
    layer, x = told(wishes((0, 1), (0, 1), (1, 0), (0, 1)), capacity=0.75)
    chosen, weights = layer.route(x)
    # Room is ceil(0.75 * 8 / 3) = 2. First choices: 0 takes positions 0 and 1 and turns 3 away; 1 takes position 2.
    # Second choices: 1 takes position 0 and is full; 0 is full.
    assert chosen.tolist() == [[0, 1], [0, 3], [1, 3], [3, 3]], (
        f"positions go to {chosen.tolist()}, 3 being nobody: first choices of all positions come before second ones, "
        "and an even share is a share of choices, k for each position"
    )
    near(weights, layer.route(x)[1], "what is left counts as much as before")
    assert layer.routing.dropped.item() == 0.5, f"{layer.routing.dropped} of the choices dropped, not 4 of 8"
    assert layer.routing.load.tolist() == [4, 4, 0], "the load is what was asked for: that is what has to get even"
    out = layer(x)
    assert not out[3].any(), "a position that every expert turned away gets nothing from the layer"
    alone = naive_moe.swiglu(layer.gate[0], layer.fc[0], layer.proj[0], x[1]) * weights[1, 0]
    near(out[1], alone, "a position that has lost one of its experts keeps the other, with the weight it had")


@pytest.mark.parametrize("capacity", [0.3, 0.8, 1.0, 1.3, 9.0])
def test_first_choices_find_room_first(capacity):
    """For any capacity, those who find room are those of a queue: by rank of the choice, then by place in the text."""
    layer, x = mixture(n_active=3, capacity=capacity), torch.randn(20, 16, dtype=torch.float64)
    real = torch.arange(20) % 4 > 0
    chosen, _ = layer.route(x, real)
    asked = [naive_moe.choice(layer, row) for row in x[real]]
    expected = naive_moe.kept(asked, 5, capacity)
    found = [{e for e in row if e < 5} for row in chosen[real].tolist()]
    assert found == [set(row) for row in expected], "others than the first in the queue were let in"
    assert (chosen[~real] == 5).all(), "padding was let in"
    lost = 1 - sum(map(len, expected)) / 45
    assert layer.routing.dropped.item() == pytest.approx(lost), f"{lost:.3f} of the 45 choices found no room"
    assert capacity < 9 or lost == 0, "there is room for all"


def test_who_is_turned_away_stays_in_the_stream():
    """A position that no expert has room for leaves the block with what attention gave it, unchanged."""
    block = scramble(Block(small(capacity=0.4, n_active=1, renormalise=False), 0))
    x, seen = torch.randn(2, 7, 16, dtype=torch.float64), []
    block.norm2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block.ffn.register_forward_hook(lambda module, args, output: seen.append(output))
    out = block(x)
    lost = (seen[1] == 0).all(-1)
    assert 0 < lost.sum() < 14, "the test has to see both kinds"
    near(out[lost], seen[0][lost], "dropped positions lose their residual stream: nothing of them is left")
    near(out, seen[0] + seen[1], "x + ffn(norm(x))")


def test_padding_is_routed_nowhere():
    """Padding gets nothing from any expert, is not counted, takes no room, and changes no neighbour."""
    for kind in ({}, {"n_active": 3, "router": "sigmoid"}, {"capacity": 0.6}):
        layer, x = mixture(**kind), 3 * torch.randn(2, 6, 16, dtype=torch.float64)
        real = torch.arange(6) >= torch.tensor([4, 1])[:, None]
        out = layer(x, real)
        told, load = layer.routing, layer.count()
        assert not out[~real].any(), "an expert spends its time on padding"
        assert load.sum() == 7 * layer.config.n_active, f"{load.sum()} choices of 7 positions were counted"
        alone = layer(x[real][None])  # the same positions, without padding
        near(out[real], alone[0], f"{kind}: padding changes what its neighbours get")
        for name in ("load", "balance", "z", "entropy", "dropped"):
            near(getattr(told, name), getattr(layer.routing, name), f"{kind}: padding is in the {name}")
    model = GPT(small())
    model(torch.randint(11, (3, 9)), pad=torch.tensor([0, 5, 3]))
    for block in model.blocks:
        assert block.ffn.count().sum() == 2 * (9 + 4 + 6), "the layers are not told which tokens of a batch are padding"


@pytest.mark.parametrize("change", [{}, {"router": "sigmoid", "n_shared": 1}, {"capacity": 0.6}], ids=str)
def test_nothing_but_padding_is_no_nan(change):
    """A pass in which all is padding has losses, load and entropy of 0, and gradients of 0: training goes on."""
    layer, x = mixture(**change), torch.randn(2, 6, 16, dtype=torch.float64)
    out = layer(x, torch.zeros(2, 6, dtype=torch.bool))
    for name in ("load", "balance", "z", "entropy", "dropped"):
        found = getattr(layer.routing, name)
        assert not found.any(), f"the {name} of nothing is {found.tolist()}: a mean over nothing is nan, not 0"
    (out.sum() + layer.routing.balance + layer.routing.z).backward()
    for name, p in layer.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), f"the gradient of {name} is nan: the next step spoils all"
    assert not layer.router.weight.grad.any(), "the router learns from padding"


def test_a_layer_that_routed_nothing_has_a_load():
    """Its load is a zero for each expert: processes add their loads up, and one may have nothing to add."""
    layer = mixture()
    for when in ("before the first pass", "counted a second time"):
        load = layer.count()
        assert isinstance(load, torch.Tensor) and load.tolist() == [0] * 5, f"{when} the load is {load}, not [E] zeros"
        assert load.dtype == torch.long, f"{when} it is {load.dtype}: processes cannot add that to counts"
        layer.rebalance(load, 0.1)
        assert not layer.bias.any(), "no position came, so no expert had too few"
        layer(torch.randn(3, 16, dtype=torch.float64))
        assert layer.count().sum() == 6, "3 positions with 2 experts each"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bias_keeps_its_bits(dtype):
    """In a model of 16 bits the bias of the choice stays in float32: at 0.5, steps of 0.001 would be nothing."""
    model = GPT(small())
    biases = [block.ffn.bias for block in model.blocks]
    for bias in biases:
        bias[:] = torch.tensor([0.5, 0.501, -0.503, 0.25, 1.0])
    before = [bias.clone() for bias in biases]
    model = model.to(dtype)
    for block, bias in zip(model.blocks, before, strict=True):
        assert block.ffn.bias.dtype == torch.float32, f"the bias is {block.ffn.bias.dtype}: it keeps its own type"
        assert torch.equal(block.ffn.bias, bias), "the bias was rounded on the way"
        block.ffn.rebalance(torch.tensor([6, 1, 3, 2, 3]), 0.001)  # the mean is 3
        expected = torch.tensor([-0.001, 0.001, 0.0, 0.001, 0.0])
        near(block.ffn.bias - bias, expected, "a step of 0.001 is lost or rounded", rtol=0, atol=1e-6)
    assert {p.dtype for p in model.parameters()} == {dtype}, "only the bias keeps its type"


def test_the_bias_goes_along_to_a_device():
    """A model that moves takes its biases along, whether its type changes or not, and one without numbers gets room."""
    for more in ({}, {"dtype": torch.bfloat16}):
        model = GPT(small()).to("meta", **more)
        assert {block.ffn.bias.device.type for block in model.blocks} == {"meta"}, "the bias stays behind"
        model.to_empty(device="cpu")
        assert {block.ffn.bias.device.type for block in model.blocks} == {"cpu"}, "the bias has no room"
        assert {block.ffn.bias.dtype for block in model.blocks} == {torch.float32}, "the bias keeps its type"


def test_rebalance_by_hand():
    """Experts with too few positions get likelier by the rate, those with too many less likely, others stay."""
    layer = mixture(n_expert=4)
    layer.bias[:] = torch.tensor([0.1, 0.0, 0.0, -0.2])
    layer.rebalance(torch.tensor([6, 1, 3, 2]), 0.01)  # the mean is 3
    near(layer.bias, torch.tensor([0.09, 0.01, 0.0, -0.19]), "bias + rate sign(mean load - load)",
         rtol=0, atol=1e-7)


def test_the_bias_evens_out_the_load():
    """With nothing but the bias to move, experts that half of all positions preferred end with an even share."""
    layer = mixture(n_expert=6)
    layer.router.weight.data[0] += 0.8  # with inputs of a mean above 0: expert 0 is the best for most
    x = torch.randn(400, 16, dtype=torch.float64) + 0.5

    def busiest():
        layer.route(x)
        return (layer.routing.load.max() / layer.routing.load.double().mean()).item()

    before = busiest()
    layer.count()
    for _ in range(600):
        layer.route(x)
        layer.rebalance(layer.count(), 0.002)
    after = busiest()
    assert before > 1.8, f"the test begins with a load that is even: {before:.2f}"
    assert after < 1.15, f"the busiest expert had {before:.2f} times an even share and still has {after:.2f} times"


def test_load_is_counted_in_training_only():
    """The loads of all passes since the last count add up, in training; scoring and writing text add nothing."""
    model, expected = scramble(GPT(small())), torch.zeros(2, 5)
    layers = [block.ffn for block in model.blocks]
    for _ in range(3):
        model(torch.randint(11, (4, 6)))
        expected += torch.stack([layer.routing.load for layer in layers])
        with evaluation(model):
            model(torch.randint(11, (2, 9)))
        sample(model, torch.randint(11, (2, 3)), 4, SampleConfig())
    found = torch.stack([layer.count() for layer in layers])
    assert found.tolist() == expected.tolist(), "a batch may come in several parts: all of them count, and nothing else"
    assert expected.sum() == 3 * 2 * 24 * 2, "24 positions, 2 choices each, in 2 layers, 3 times"
    model(torch.randint(11, (1, 5)))
    assert layers[0].count().sum() == 10, "what was counted once is counted again"


def test_a_mixture_can_be_copied():
    """After a step of training a model can be copied, as every reference policy is, and the copy answers alike."""
    model, idx = scramble(GPT(small())), torch.randint(11, (2, 6))
    model(idx).square().sum().backward()
    other = copy.deepcopy(model)
    assert not other.blocks[0].ffn.count().any(), "the copy has trained on nothing yet"
    near(other(idx), model(idx), "the copy is another model")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"n_expert": 0}, []),
        ({"first_dense": 1}, [1, 2, 3, 4, 5]),
        ({"moe_every": 2}, [1, 3, 5]),
        ({"moe_every": 3, "first_dense": 1}, [3]),
        ({"moe_every": 2, "first_dense": 1}, [2, 4]),
        ({"moe_every": 3, "first_dense": 3}, [5]),
    ],
    ids=str,
)
def test_which_layers_are_mixtures(change, expected):
    """The first `first_dense` layers are dense; of those after them, each `moe_every`-th has experts."""
    model = GPT(small(n_layer=6, **change))
    found = [i for i, block in enumerate(model.blocks) if isinstance(block.ffn, Mixture)]
    assert found == expected, f"{change}: layers {found} of 6 are mixtures, not {expected}"
    dense = [block.ffn.gate.weight.shape for block in model.blocks if not isinstance(block.ffn, Mixture)]
    assert set(dense) <= {(40, 16)}, "a dense layer has n_hidden units"


CHANGES = [{}, {"n_shared": 2, "first_dense": 1}, {"n_expert": 7, "n_active": 3}, {"n_expert": 1, "n_active": 1}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_parameters_are_counted(change):
    """All parameters, and those that one token uses: k of the E experts, and everything else."""
    config = small(n_layer=3, **change)
    attn = 16 * 24 + 2 * 16 * 8 + 24 * 16 + 2 * 16 + 2 * 4  # with the norms
    expert, mixed = 3 * 16 * 24, 3 - config.first_dense
    rest = 11 * 16 + 16 + 3 * attn + config.first_dense * 3 * 16 * 40
    rest += mixed * (16 * config.n_expert + config.n_shared * expert)
    total, active = (rest + mixed * n * expert for n in (config.n_expert, config.n_active))
    model = GPT(config)
    assert count(model) == total, f"{count(model)} parameters, not {total}"
    assert count(model, active=True) == active, f"a token uses {count(model, active=True)} parameters, not {active}"
    assert model.head.weight is model.tok_emb.weight, "a tied table is counted once"


def test_a_token_uses_as_much_as_in_a_dense_model():
    """By default the experts that a token uses have n_hidden units together: it uses a dense model and the routers."""
    for n_active, n_shared, hidden in ((2, 0, 48), (3, 1, 24), (1, 2, 32), (2, 1, 32), (5, 0, 16)):
        shape = {"n_expert": 6, "n_active": n_active, "n_shared": n_shared, "renormalise": n_active > 1}
        config = ModelConfig(vocab_size=11, n_hidden=96, **shape)
        assert config.expert_hidden == hidden, f"{n_active} + {n_shared} experts share 96 units, in multiples of 8"
    dense = count(GPT(ModelConfig(vocab_size=11, n_hidden=96)), active=True)
    assert dense == count(GPT(ModelConfig(vocab_size=11, n_hidden=96))), "a dense model uses all that it has"
    model = GPT(ModelConfig(vocab_size=11, n_hidden=96, n_expert=6, n_active=3, n_shared=1))
    assert count(model, active=True) == dense + 4 * 6 * 128, "a dense model, and in 4 layers a router of 6 x 128"


def test_experts_start_apart_and_at_their_scale():
    """Each expert starts with weights of its own, as large as a feed-forward's; the router has no favourites yet."""
    model = GPT(ModelConfig(vocab_size=65, n_embd=64, n_layer=3, n_expert=6, n_hidden=160, n_shared=1))
    layer = model.blocks[1].ffn
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)  # the size of silu(z) for a standard normal z
    silu = torch.trapezoid((z / (1 + torch.exp(-z))) ** 2 * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi), z).sqrt()
    gains = {"gate": 1.0, "fc": 1.0, "proj": 1 / silu.item() / math.sqrt(6)}  # 2 L = 6 branches feed the stream
    for name, gain in gains.items():
        weight = getattr(layer, name)
        assert weight.shape[0] == 6 and not torch.equal(weight[0], weight[5]), f"{name}: copies of one expert stay so"
        for e, std in enumerate(weight.std(dim=(1, 2)).tolist()):
            assert std == pytest.approx(gain * weight.shape[-1] ** -0.5, rel=0.1), (
                f"{name} of expert {e} starts with spread {std:.4f}: gain {gain:.3f} / sqrt(what comes in)"
            )
    std = layer.shared.proj.weight.std().item()
    assert std == pytest.approx(gains["proj"] * layer.shared.proj.in_features**-0.5, rel=0.1), "the shared expert too"
    model(torch.randint(65, (4, 32)))
    assert layer.routing.entropy > 0.99 * math.log(6), "the router starts with favourites, who get all that is learned"


SHAPES = [
    {},
    {"window": 3, "n_sink": 1, "n_active": 3},
    {"n_layer": 3, "first_dense": 1, "n_shared": 1, "router": "sigmoid"},
    {"n_layer": 4, "moe_every": 2, "nope_every": 2, "tied": False, "renormalise": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_model_of_mixtures_is_its_formula(shape, monkeypatch):
    """Whole, padded, through a window or read in pieces with a cache: each text has the scores it has alone."""
    swiglu = naive.swiglu
    monkeypatch.setattr(
        naive, "swiglu", lambda ffn, x: naive_moe.mixture(ffn, x) if isinstance(ffn, Mixture) else swiglu(ffn, x)
    )
    model = scramble(GPT(small(**shape))).requires_grad_(False)
    rows = [torch.randint(11, (length,)) for length in (9, 4, 6)]
    idx, pad = pad_left([row.tolist() for row in rows])
    expected = [naive.logits(model, row) for row in rows]
    equal = torch.randint(11, (2, 9))  # no padding
    near(model(equal), torch.stack([naive.logits(model, row) for row in equal]), "two texts of one length")
    cache = Cache(model, 3, most=4)
    pieces = [model(idx[:, at:at + 4], cache, (pad - at).clamp(0, 4)) for at in (0, 4)]
    pieces.append(model(idx[:, 8:], cache))
    for found, way in ((model(idx, pad=pad), "in one pass"), (torch.cat(pieces, dim=1), "in pieces")):
        for b, scores in enumerate(expected):
            near(found[b, -len(scores):], scores, f"text {b}, read {way}, is scored otherwise than alone")
    written = sample(model, idx, 5, SampleConfig(temperature=0), pad=pad)
    for row, found in zip(rows, written, strict=True):
        for token in found:
            assert token == naive.logits(model, row)[-1].argmax(), "with a cache another text is written than without"
            row = torch.cat([row, token[None]])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_expert": -1}, "n_expert"),
        ({"n_active": 6}, "n_active 6 of n_expert 5"),
        ({"n_active": 0}, "n_active"),
        ({"n_shared": -1}, "n_shared"),
        ({"expert_hidden": 0}, "expert_hidden"),
        ({"first_dense": -1}, "first_dense"),
        ({"moe_every": 0}, "moe_every"),
        ({"first_dense": 2}, "first_dense 2 and moe_every 1 leave no mixture in n_layer 2"),
        ({"moe_every": 3}, "first_dense 0 and moe_every 3 leave no mixture"),
        ({"first_dense": 1, "moe_every": 2}, "leave no mixture"),
        ({"n_active": 1}, "--no-renormalise"),
        ({"capacity": 0.0}, "capacity"),
        ({"capacity": -1.0}, "capacity"),
        ({"capacity": math.nan}, "capacity"),
        ({"capacity": math.inf}, "capacity"),
    ],
    ids=str,
)
def test_impossible_mixtures_are_refused(wrong, message):
    """A mixture that cannot be built is refused at once, in one line with the reason."""
    with pytest.raises(BadInput, match=message) as caught:
        small(**wrong)
    assert "\n" not in str(caught.value), "one line"
