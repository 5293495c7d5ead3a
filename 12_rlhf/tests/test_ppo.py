"""Checkpoints of PPO: its parts against numbers worked by hand, and a step of it against REINFORCE."""

import math
from dataclasses import replace

from shared.errors import BadInput

import little
import pytest
import torch
from little import ASKED, RECORDS

import ppo as script
import reward
from learn import Run, generator
from ppo import PPOConfig, clipped, gae, judged, kl_terms, normalise, token_rewards, value_loss
from rollout import Rollout, rollout

MASK = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] + [False] * 4, [True] * 4 + [False]])
LENGTHS = MASK.sum(1).tolist()


def random(*shape, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        (1.1, 2.0, 2.2, 2.0), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 2.0),  # a good token: no more is gained above 1.2
        (0.9, -2.0, -1.8, -2.0), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, -2.0),  # a bad one: none below 0.8
    ],
)  # fmt: skip
def test_the_clip_by_hand(ratio, advantage, gain, slope):
    """A token gains nothing by moving further than the clip, and what moved the wrong way is always pulled back."""
    ratio = torch.tensor(ratio, requires_grad=True)
    found = clipped(ratio, torch.tensor(advantage), 0.2)
    found.backward()
    assert found.item() == pytest.approx(gain), f"ratio {ratio:.1f}, advantage {advantage}: min(r A, clip(r) A)"
    assert ratio.grad.item() == pytest.approx(slope), (
        f"ratio {ratio:.1f}, advantage {advantage}: the slope is {ratio.grad.item()}, expected {slope}: the clip is "
        "for moves in the direction of the advantage only"
    )


def test_the_estimators_by_hand():
    """With P = 0.5 and P_reference = 0.25, d = -ln 2: k1 = ln 2, k2 = (ln 2)^2 / 2, k3 = 0.5 - 1 + ln 2."""
    new, reference = torch.tensor([0.5, 0.3]).log(), torch.tensor([0.25, 0.3]).log()
    for kind, value in {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": math.log(2) - 0.5}.items():
        found = kl_terms(new, reference, kind)
        assert found[0].item() == pytest.approx(value), f"{kind} is {found[0]:.4f}, expected {value:.4f}"
        assert found[1].item() == 0, f"{kind} of equal probabilities is 0"


def test_what_each_token_earns():
    """Each drawn token pays beta (ln P - ln P_ref) once; the answer's score comes with its last token, its end."""
    old, reference, score = random(4, 5), random(4, 5, seed=1), torch.tensor([3.0, -1.0, 2.0, 0.5])
    found = token_rewards(score, old, reference, MASK, beta=0.3)
    for i, n in enumerate(LENGTHS):
        for t in range(5):
            price = 0.3 * (old[i, t] - reference[i, t]).item() if t < n else 0.0
            expected = (score[i].item() if t == n - 1 else 0.0) - price
            assert found[i, t].item() == pytest.approx(expected), (
                f"answer of {n} tokens, token {t + 1}: earns {found[i, t]:.3f}, expected {expected:.3f}. The score "
                "stands at the last drawn token, not behind it, and the KL is a price: subtracted, and once"
            )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.8, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    """GAE of answers of unequal lengths is sum_k (gamma lam)^k delta_(t+k), and nothing comes behind the end."""
    rewards, guesses = random(4, 5) * MASK, random(4, 5, seed=1)  # the critic guesses something behind the end as well
    advantages, returns = gae(rewards, guesses, MASK, gamma, lam)
    for i, n in enumerate(LENGTHS):
        expected = little.advantages_of(rewards[i, :n].tolist(), guesses[i, :n].tolist(), gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(expected), (
            f"answer of {n} tokens: advantages {advantages[i, :n].tolist()}, by the double sum {expected}: at the last "
            "token there is no next guess to count on (no bootstrap at a terminal state)"
        )
        back = [a + v for a, v in zip(expected, guesses[i, :n].tolist(), strict=True)]
        assert returns[i, :n].tolist() == pytest.approx(back), (
            "a return is the advantage plus the guess: what the critic should have said, and not the token's own reward"
        )
        assert not advantages[i, n:].any() and not returns[i, n:].any(), "behind the end there is 0"
    if lam == gamma == 1:
        total = (rewards * MASK).sum(1)
        torch.testing.assert_close(returns[:, 0], total, msg="with gamma = lam = 1, the return is the sum of rewards")


def test_advantages_are_normalised_over_drawn_tokens():
    """Over the mask the mean is 0 and the spread 1; padding has no part in either, and stays 0."""
    x = random(4, 5) * 3 + 2
    found = normalise(x.masked_fill(~MASK, 0.0), MASK)
    expected = little.spread_to_one([x[i, :n].tolist() for i, n in enumerate(LENGTHS)])
    for i, n in enumerate(LENGTHS):
        assert found[i, :n].tolist() == pytest.approx(expected[i]), (
            "the mean or the spread is not that of the drawn tokens: padding is counted"
        )
        assert not found[i, n:].any(), "padding has an advantage"
    assert not normalise(torch.ones(4, 5), MASK).isnan().any(), "advantages that are all equal: 0, and not 0 / 0"


def test_the_value_loss_by_hand():
    """Half of the larger of two squared errors: the guess's, and that of the guess held within old +- clip."""
    #                     free   held: 0.5 -> 0.2   held, and right by luck   padding
    guess, old = torch.tensor([[0.1, 0.5, -1.0, 7.0]]), torch.tensor([[0.0, 0.0, 2.0, 7.0]])
    returns, mask = torch.tensor([[1.0, 1.0, -1.0, 0.0]]), torch.tensor([[True, True, True, False]])
    # errors: 0.9 and 0.9; 0.5 and, held at 0.2, 0.8; 0 and, held at 1.8, 2.8
    expected = 0.5 * (0.9**2 + 0.8**2 + 2.8**2) / 3
    found = value_loss(guess.requires_grad_(), old, returns, mask, 0.2)
    assert found.item() == pytest.approx(expected), (
        f"{found.item():.4f}, by hand {expected:.4f}: a guess is held within old +- 0.2; the ratio of the policy, and "
        "a share of the old guess, have nothing to do with it"
    )
    found.backward()
    assert guess.grad[0].tolist() == pytest.approx([-0.3, 0, 0, 0]), "where the held guess is worse, there is no slope"


def test_explained_variance_by_hand():
    """1 for a critic that is right up to a constant, 0 for one that always says the same; padding does not count."""
    mask = torch.tensor([[True, True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 4.0, 99.0]])
    for guess, share in (
        ([1.0, 2.0, 3.0, 4.0, 0.0], 1.0), ([6.0, 7.0, 8.0, 9.0, 0.0], 1.0), ([2.0] * 5, 0.0),
        ([1.0, 1.0, 3.0, 3.0, 0.0], 0.8), ([4.0, 3.0, 2.0, 1.0, 0.0], -3.0),
    ):  # fmt: skip
        found = script.explained(torch.tensor([guess]), returns, mask)
        assert found == pytest.approx(share, abs=1e-6), f"guesses {guess[:4]}: {found:.3f}, by hand {share}"


def test_the_price_adapts_by_hand():
    """Twice too far: the price rises by a tenth of the deviation, which counts for at most 0.2; too near: it falls."""
    for kl, factor in ((4.0, 1.0), (4.4, 1.01), (3.6, 0.99), (40.0, 1.02), (0.0, 0.98), (-1.0, 0.98)):
        found = script.adapt(0.5, kl, 4.0)
        assert found == pytest.approx(0.5 * factor), f"KL {kl} with target 4: beta {found:.4f}, by hand {0.5 * factor}"


@pytest.fixture(scope="module")
def opened():
    return little.policy()


@pytest.fixture(scope="module")
def drawn(opened) -> Rollout:
    return rollout(opened, ASKED, 6, n=2, generator=torch.Generator().manual_seed(2))


def guesses_alone(critic, opened, drawn, i):
    """The critic's guess before each token of answer i, the conversation read on its own: [length]."""
    n = int(drawn.mask[i].sum())
    ids = drawn.ids[i, int(drawn.pad[i]):][:-1]
    start = len(ids) - drawn.mask.shape[1]
    return (critic.features(ids[None])[0] @ critic.head.weight[0])[start:start + n]


def test_the_critic_guesses_before_each_token(opened, drawn):
    """The guess of a token's worth is made where it is predicted, without having seen it, nor padding."""
    critic = little.critic(opened)
    with torch.no_grad():
        found = script.values(critic, drawn)
        for i in range(len(drawn.texts)):
            expected = guesses_alone(critic, opened, drawn, i)
            torch.testing.assert_close(
                found[i, :len(expected)], expected, rtol=1e-8, atol=1e-9,
                msg="the guess is made a place too early or too late, or sees padding")
            assert not found[i, len(expected):].any(), "behind the end the guess is 0"


def test_scores_of_the_judge(opened):
    """An answer is judged with its question: score minus mean, divided by the spread. One without an end loses 1."""
    judge = reward.judge(opened)
    torch.nn.init.normal_(judge.model.head.weight)
    none = torch.zeros(3, 1)
    drawn = Rollout(none, none, none, ["ab", "ba", "ab"], [True, True, False], [1, 0, 1])
    talks = [[*ASKED[i], {"role": "assistant", "content": text}] for i, text in ((1, "ab"), (0, "ba"))]
    plain = [reward.scores(judge, [talk]).item() for talk in talks]
    assert plain[0] != pytest.approx(plain[1]), "the checkpoint needs two scores"
    found = judged(judge, RECORDS, drawn, (0.5, 2.0)).tolist()
    expected = [(plain[0] - 0.5) / 2, (plain[1] - 0.5) / 2, (plain[0] - 0.5) / 2 - 1]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), f"{found}, by hand {expected}"


def start(opened, lr=0.01, beta=0.7, **changes):
    """A run of PPO that steps by plain descent, so that a step shows its gradient: (run, critic)."""
    recipe = {"epochs": 1, "minibatch": 100, "length": 6, "clip": 1e9, "warmup": 0, "lr": lr, "lam": 0.9, "gamma": 0.95}
    config = PPOConfig(**recipe | {"beta": beta} | changes)
    policy = replace(opened, model=little.neighbour(opened, std=0.0))
    critic = little.critic(opened)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=lr)
    optimizer.add_param_group({"params": list(critic.parameters()), "lr": lr})
    run = Run(None, config, policy, little.neighbour(opened), RECORDS, [], optimizer)
    return run, critic


def some_rewards(records, drawn):
    """A reward that has nothing to do with being right: [B], float32."""
    return torch.tensor([len(text) * 0.5 - text.count("b") + over for text, over in
                         zip(drawn.texts, drawn.ended, strict=True)])


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("changes", [{"beta": 0.0}, {"beta": 0.7}, {"entropy": 0.3, "temperature": 1.4}], ids=str)
def test_one_pass_of_ppo_is_reinforce(changes, opened):
    """One pass over all answers at once: the gradient of REINFORCE with the same advantages, and the critic's own."""
    run, critic = start(opened, **changes)
    config, model = run.config, run.policy.model
    before, critic_before = copies(model), copies(critic)
    told = script.ppo_step(run, critic, config.beta, RECORDS, some_rewards, 3)

    # The same, written out: each answer alone, GAE as a double sum, and the gradient of sum A ln P.
    drawn = rollout(opened, ASKED, 6, config.temperature, generator=generator(config, 3))
    first, judge = little.neighbour(opened, std=0.0), little.critic(opened)
    ours, theirs, guesses, entropies = [], [], [], []
    for i in range(len(RECORDS)):
        law = little.alone(first, opened, drawn, i, config.temperature)
        entropies.append(-(law.exp() * law).sum(-1))
        ours.append(little.chosen(first, opened, drawn, i, config.temperature))
        theirs.append(little.chosen(run.reference, opened, drawn, i, config.temperature).detach())
        guesses.append(guesses_alone(judge, opened, drawn, i))
    gains, back, score = [], [], some_rewards(RECORDS, drawn).tolist()
    for i in range(len(RECORDS)):
        earned = (-config.beta * (ours[i].detach() - theirs[i])).tolist()
        earned[-1] += score[i]
        gains.append(little.advantages_of(earned, guesses[i].tolist(), config.gamma, config.lam))
        back.append(torch.tensor(gains[-1]) + guesses[i].detach())
    gains = little.spread_to_one(gains)
    count = sum(map(len, ours))
    loss = -sum((torch.tensor(a) * b).sum() for a, b in zip(gains, ours, strict=True)) / count
    loss = loss - config.entropy * torch.cat(entropies).sum() / count
    little.same(little.moved(before, model, config.lr), little.gradients(loss, first), (
        "not that of REINFORCE with the same advantages. Are ln P and the advantages of the policy that drew numbers "
        "without gradient, is the law divided by the temperature, does the KL count once, in the reward, as a price?"))
    error = sum((a - b).square().sum() for a, b in zip(guesses, back, strict=True)) / (2 * count)
    little.same(little.moved(critic_before, critic, config.lr), little.gradients(error, judge), (
        "not that of half the squared error to the returns: a return is a goal, and has no gradient"))

    kl = sum((a - b).sum().item() for a, b in zip(ours, theirs, strict=True)) / len(ours)
    lengths = [len(each) for each in ours]
    expected = {"reward": sum(score) / 6, "kl": kl, "entropy": torch.cat(entropies).mean().item(), "clipped": 0.0,
                "length": sum(lengths) / 6, "ended": sum(drawn.ended) / 6, "beta": config.beta}
    for name, value in expected.items():
        assert told[name] == pytest.approx(value, rel=1e-6, abs=1e-7), f"{name} is told as {told[name]}, it is {value}"
    flat, goal = torch.cat(guesses).detach(), torch.cat(back)
    share = 1 - ((goal - flat).var() / goal.var()).item()
    assert told["explained"] == pytest.approx(share), "explained: of the critic as it was when it guessed"


def test_the_ratio_moves_in_later_passes(opened):
    """In the second pass the ratio is that to the policy that drew: it is 1 no more, and tokens are clipped."""
    run, critic = start(opened, lr=0.5, epochs=4)
    model, before = run.policy.model, copies(run.policy.model)
    told = script.ppo_step(run, critic, 0.1, RECORDS, some_rewards, 3)
    first = little.neighbour(opened, std=0.0)
    assert all(torch.equal(before[name], p) for name, p in first.named_parameters()), "the run begins elsewhere"
    assert (model.norm.weight - before["norm.weight"]).abs().max() > 0.02, "the checkpoint needs a policy that moves"
    assert told["clipped"] > 0.1, (
        "after three passes with a high rate no ratio is outside 1 +- 0.2: the old ln P is taken from the policy that "
        "has just been updated, and the ratio is stuck at 1"
    )


def test_each_pass_sees_every_answer_once(opened, monkeypatch):
    """Two passes in minibatches of 4: each takes all 6 answers once, in an order of its own, and a step per batch."""
    run, critic = start(opened, epochs=2, minibatch=4)
    seen, rows, steps = [], Rollout.rows, []
    monkeypatch.setattr(Rollout, "rows", lambda self, places: (seen.append(places.tolist()), rows(self, places))[1])
    step = run.optimizer.step
    run.optimizer.step = lambda: (steps.append(1), step())
    script.ppo_step(run, critic, 0.1, RECORDS, some_rewards, 0)
    assert [len(part) for part in seen] == [4, 2, 4, 2] and len(steps) == 4, f"minibatches {seen}, {len(steps)} steps"
    passes = seen[0] + seen[1], seen[2] + seen[3]
    assert all(sorted(each) == list(range(6)) for each in passes), f"a pass that does not see every answer once: {seen}"
    assert passes[0] != passes[1], "both passes in the same order"


def test_a_guess_is_held_near_the_one_before_the_step(opened, monkeypatch):
    """In every pass a guess is held near that of the critic when the answers were drawn, and not near its last one."""
    run, critic = start(opened, lr=0.05, epochs=3)
    seen = []

    def watched(guess, old, *more):
        seen.append((guess.detach().clone(), old.clone()))
        return value_loss(guess, old, *more)

    monkeypatch.setattr(script, "value_loss", watched)
    first = little.critic(opened)
    script.ppo_step(run, critic, 0.1, RECORDS, some_rewards, 3)
    drawn = rollout(opened, ASKED, 6, generator=generator(run.config, 3))
    with torch.no_grad():
        expected = torch.cat([guesses_alone(first, opened, drawn, i) for i in range(6)]).sort().values
    for _, old in seen:
        torch.testing.assert_close(
            old[old != 0].sort().values, expected, rtol=1e-8, atol=1e-9,
            msg="the old guess is one of the critic that learns: it has hardly moved from there, and no clip holds it")
    assert len(seen) == 3 and (seen[2][0] - seen[2][1]).abs().max() > 0.05, "the test needs a critic that moves"


def test_a_critic_that_breaks_is_told(opened):
    """A gradient of the critic that is infinite or nan is refused, and the learning rate that is the critic's named."""
    run, critic = start(opened)
    before = copies(run.policy.model)
    with torch.no_grad():
        critic.head.weight.fill_(math.nan)
    with pytest.raises(BadInput, match="the critic's gradient is nan at step 4: lower --value-lr"):
        script.ppo_step(run, critic, 0.1, RECORDS, some_rewards, 3)
    for name, p in run.policy.model.named_parameters():
        assert torch.equal(p, before[name]), f"{name} of the policy moved"


def test_the_reference_stays(opened):
    """After steps with all that PPO has, the reference has the weights that it had."""
    run, critic = start(opened, lr=0.1, epochs=3, minibatch=4)
    before = copies(run.reference)
    for step in range(2):
        script.ppo_step(run, critic, 0.5, RECORDS, some_rewards, step)
    for name, p in run.reference.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, f"{name} of the reference has moved, or has a gradient"


def test_rewards_begin_around_0_with_size_1(opened):
    """The scale of the judge is the mean and the spread of its scores, as they are, of answers drawn by the run's law.
    """
    judge, config = reward.judge(opened), PPOConfig(length=6, temperature=1.7)
    torch.nn.init.normal_(judge.model.head.weight)
    drawn = rollout(opened, ASKED * 6, 6, 1.7, generator=generator(config, 0))
    assert not all(drawn.ended), "the test needs an answer that is cut off"
    talks = [[*ASKED[i % 6], {"role": "assistant", "content": text}] for i, text in enumerate(drawn.texts)]
    found = reward.scores(judge, talks).tolist()
    mean = sum(found) / 36
    spread = math.sqrt(sum((x - mean) ** 2 for x in found) / 35)
    scale = script.scale_of(judge, opened, RECORDS * 6, config)
    assert scale == pytest.approx((mean, spread), rel=1e-4), (
        f"{scale}, by hand {mean:.3f} and {spread:.3f}: another law, or the price of a missing end is in it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"gamma": 1.1}, "gamma 1.1"), ({"lam": -0.1}, "lam -0.1"), ({"epochs": 0}, "epochs"), ({"minibatch": 0}, "minib"),
     ({"questions": 0}, "questions"), ({"kl_target": 0.0}, "kl_target is 0"), ({"value_lr": -1.0}, "value_lr is -1"),
     ({"value_clip": 0.0}, "value_clip is 0"), ({"clip_ratio": -0.1}, "clip_ratio is -0.1"),
     ({"beta": -0.1}, "beta is -0.1"), ({"temperature": 0.0}, "temperature"), ({"lr": math.nan}, "lr is nan"),
     ({"entropy": math.nan}, "entropy is nan"), ({"entropy": math.inf}, "entropy is inf"),
     ({"beta": 0.0, "kl_target": 2.0}, "beta is 0 and kl_target 2.0")],
    ids=str,
)  # fmt: skip
def test_recipes_that_cannot_run(changes, message):
    """A recipe that cannot run is refused in one line that names the number."""
    with pytest.raises(BadInput, match=message):
        PPOConfig(**changes)
