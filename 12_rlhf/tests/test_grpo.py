"""Checkpoints of GRPO and its relatives: what an answer is compared with, what the loss sums, and a step of it."""

import math
from dataclasses import replace

from shared.errors import BadInput

import little
import pytest
import torch
from little import ASKED, RECORDS

from grpo import GRPOConfig, advantages, grpo_loss, grpo_step
from learn import generator
from rollout import rollout

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.5, 2.0, -1.0, 0.0, 1.0], [1.0] * 5, [0.0] * 5])


@pytest.mark.parametrize("baseline", ["grpo", "dr-grpo", "rloo"])
def test_an_answer_is_compared_with_its_group(baseline):
    """Each reward minus the group's mean, for RLOO minus the mean of the others alone; GRPO divides by the spread."""
    found = advantages(REWARDS, baseline)
    for row, told in zip(REWARDS.tolist(), found.tolist(), strict=True):
        mean = sum(row) / 5
        spread = math.sqrt(sum((r - mean) ** 2 for r in row) / 4)
        for i, reward in enumerate(row):
            others = [r for j, r in enumerate(row) if j != i]
            expected = {"grpo": (reward - mean) / (spread or 1), "dr-grpo": reward - mean,
                        "rloo": reward - sum(others) / 4}[baseline]  # fmt: skip
            assert told[i] == pytest.approx(expected, rel=1e-5, abs=1e-6), (
                f"{baseline}, rewards {row}: answer {i + 1} has the advantage {told[i]:.3f}, by hand {expected:.3f}"
            )


def test_a_group_without_differences_teaches_nothing():
    """Where all answers are equally good, advantages are exactly 0, and not 0 / 0 or a rounding error."""
    for baseline in ("grpo", "dr-grpo", "rloo"):
        for value in (0.0, 1.0, 0.35):
            found = advantages(torch.full((2, 8), value), baseline)
            assert not found.isnan().any(), f"{baseline}: a group with standard deviation 0 gives nan"
            assert not found.any(), f"{baseline}: equal rewards of {value:.2f} give {found.abs().max():.3f}, and not 0"


MASK = torch.tensor([[True] * 4, [True, False, False, False], [True, True, False, False]])


def numbers(seed: int, std: float = 0.3):
    return std * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


@pytest.mark.parametrize("kl", ["none", "k2", "k3"])
@pytest.mark.parametrize("baseline", ["grpo", "dr-grpo", "rloo"])
def test_the_loss_by_hand(baseline, kl):
    """The clipped gain minus beta times the pull; GRPO averages answer by answer, its relatives divide by a constant.
    """
    config = GRPOConfig(baseline=baseline, kl=kl, beta=0.4, length=7, clip_ratio=0.2)
    new, old, reference = (numbers(seed) for seed in range(3))
    gain, rows, clipped = [1.5, -0.5, -2.0], [], 0
    for i in range(3):
        row = []
        for t in range(int(MASK[i].sum())):
            ratio = math.exp(new[i, t] - old[i, t])
            held = min(max(ratio, 0.8), 1.2)
            clipped += held != ratio
            d = (reference[i, t] - new[i, t]).item()
            pull = {"none": 0.0, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[kl]
            row.append(min(ratio * gain[i], held * gain[i]) - 0.4 * pull)
        rows.append(row)
    means = -sum(sum(row) / len(row) for row in rows) / 3
    expected = means if baseline == "grpo" else -sum(map(sum, rows)) / (3 * 7)
    found, share = grpo_loss(new, old, reference, torch.tensor(gain), MASK, config)
    assert found.item() == pytest.approx(expected), (
        f"{baseline}, {kl}: {found.item():.4f}, by hand {expected:.4f}. GRPO: the mean over the tokens of each answer, "
        "then over answers. The others: all sums divided by answers times `length`, whatever the answers' lengths"
    )
    assert share.item() == pytest.approx(clipped / 7) and 0 < clipped < 7, "the share of drawn tokens that are clipped"


def test_the_pull_in_the_loss_is_the_one_asked_for():
    """Without an advantage, k2 pulls each token by beta (ln P - ln P_ref), k3 by beta (1 - P_ref / P), and none by 0.

    k1 would pull all tokens by beta, wherever the reference is: its mean over drawn tokens is 0.
    """
    new, reference = numbers(0).requires_grad_(), numbers(1)
    gap = new.detach() - reference
    for kl, pull in {"none": 0 * gap, "k2": gap, "k3": 1 - (-gap).exp()}.items():
        config = GRPOConfig(baseline="rloo", kl=kl, beta=0.4, length=7)
        loss, _ = grpo_loss(new, new.detach(), reference, torch.zeros(3), MASK, config)
        found = torch.autograd.grad(loss, new)[0]
        torch.testing.assert_close(
            found, 0.4 * pull * MASK / 21, rtol=1e-9, atol=1e-12,
            msg=lambda m, kl=kl: f"{kl}: not its pull. One that is the same for all tokens is that of k1, which does "
            f"not know where the reference is\n{m}",
        )


@pytest.fixture(scope="module")
def opened():
    return little.policy()


RECIPE = {"group": 5, "length": 5, "clip": 1e9, "warmup": 0, "lr": 0.01}


def start(opened, **changes):
    """A policy that steps by plain descent, so that a step shows its gradient."""
    config = GRPOConfig(**RECIPE | changes)
    policy = replace(opened, model=little.neighbour(opened, std=0.0))
    return policy, config, torch.optim.SGD(policy.model.parameters(), lr=config.lr)


def rewards_by_length(records, drawn):
    """1 for an answer of more than two tokens: some groups are all alike."""
    return (drawn.mask.sum(1) > 2).float()


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"baseline": "rloo", "kl": "k2", "temperature": 1.4}, {"baseline": "dr-grpo", "kl": "k3", "beta": 0.5}],
    ids=str,
)  # fmt: skip
def test_a_step_written_out(changes, opened):
    """One pass: the policy gradient of the groups that have a signal, each answer read alone; the others are dropped.

    With a pull towards the reference all groups are learned from: those without a signal are pulled alone.
    """
    policy, config, optimizer = start(opened, **changes)
    reference, before = little.neighbour(opened), copies(policy.model)
    still = copies(reference)
    told = grpo_step(policy, reference, RECORDS, config, optimizer, 8, rewards_by_length)

    drawn = rollout(opened, ASKED, 5, config.temperature, n=5, generator=generator(config, 8))
    first = little.neighbour(opened, std=0.0)
    terms, useful, kls, rewards = [], 0, [], rewards_by_length(RECORDS, drawn).tolist()
    for q in range(len(ASKED)):
        group = rewards[5 * q:5 * q + 5]
        useful += len({*group}) > 1
        if len({*group}) == 1 and config.kl == "none":
            continue
        mean = sum(group) / 5
        scale = {"grpo": 1 / (torch.tensor(group).std().item() + 1e-6), "dr-grpo": 1.0, "rloo": 5 / 4}[config.baseline]
        for i in range(5 * q, 5 * q + 5):
            ours = little.chosen(first, opened, drawn, i, config.temperature)
            theirs = little.chosen(reference, opened, drawn, i, config.temperature).detach()
            d = theirs - ours
            pull = {"none": 0 * d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[config.kl]
            each = (rewards[i] - mean) * scale * ours - config.beta * pull
            terms.append(each.mean() if config.baseline == "grpo" else each.sum() / 5)
            kls.append(-d.sum().item())
    assert 0 < useful < 6, "the checkpoint needs groups with and without a signal"
    little.same(little.moved(before, policy.model, config.lr), little.gradients(-sum(terms) / len(terms), first), (
        "not the policy gradient of the groups that have a signal: another law than the one that was drawn from, "
        "advantages of another group, or groups without signal: counted although nothing pulls, or not pulled"))
    expected = {"useful": useful / 6, "reward": sum(rewards) / 30, "kl": sum(kls) / len(kls), "clipped": 0.0,
                "length": drawn.mask.sum(1).float().mean().item(), "ended": sum(drawn.ended) / 30}  # fmt: skip
    for name, value in expected.items():
        assert told[name] == pytest.approx(value, rel=1e-5, abs=1e-6), f"{name} is told as {told[name]}, it is {value}"
    for name, p in reference.named_parameters():
        assert torch.equal(p, still[name]) and p.grad is None, f"{name} of the reference moved, or has a gradient"


def test_the_verifier_is_the_reward_by_default(opened):
    """Without other rewards, right answers count 1: after some steps on one question they are likelier."""
    policy, config, _ = start(opened, group=16)
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=0.01)
    records = [{"messages": [*ASKED[1], {"role": "assistant", "content": ""}]}] * 2  # to end at once
    told = [grpo_step(policy, opened.model, records, config, optimizer, step) for step in range(12)]
    assert told[0]["reward"] < 0.6 and told[-1]["reward"] > told[0]["reward"] + 0.3, [t["reward"] for t in told]


def test_without_a_signal_there_is_no_step(opened):
    """Where no group has answers of different worth, the weights stay to the last bit, and momentum does nothing."""
    policy, config, _ = start(opened)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.1, weight_decay=0.1)
    grpo_step(policy, opened.model, RECORDS, config, optimizer, 8, rewards_by_length)
    before = copies(policy.model)
    told = grpo_step(policy, opened.model, RECORDS, config, optimizer, 9, lambda records, drawn: torch.ones(30))
    assert told["useful"] == 0 and told["reward"] == 1, told
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name]), f"{name} moved, and nobody said where to"


def test_the_ratio_moves_in_later_passes(opened):
    """With several passes the ratio is that to the policy that drew: it is 1 no more, and tokens are clipped."""
    policy, config, _ = start(opened, epochs=4)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.5)
    told = grpo_step(policy, opened.model, RECORDS, config, optimizer, 8, rewards_by_length)
    assert told["clipped"] > 0.05, (
        "after three passes with a high rate no ratio is outside 1 +- 0.2: the old ln P is taken from the policy that "
        "has just been updated, and the ratio is stuck at 1"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"group": 1}, "group is 1: .* at least 2"), ({"steps": 0}, "steps is 0"), ({"questions": 0}, "questions"),
     ({"epochs": 0}, "epochs"), ({"clip_ratio": 0.0}, "clip_ratio 0.0"), ({"beta": math.nan}, "beta nan")],
    ids=str,
)  # fmt: skip
def test_recipes_that_cannot_run(changes, message):
    """A recipe that cannot run is refused in one line that names the number; a group has at least two to compare."""
    with pytest.raises(BadInput, match=message):
        GRPOConfig(**changes)
