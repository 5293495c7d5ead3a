"""Every method against the exact answer, on a problem so small that all answers can be listed.

Six tokens, answers of four: 1,296 answers, each with a random reward. The best policy that stays near the reference,

    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z,    the one with the highest  E[r] - beta KL(pi, pi_ref),

is computed by listing them. A policy here is a table with six scores for each of the 259 beginnings of an answer. So it
can be any law at all, and where a method ends is its own doing and no limit of a network.
"""

import functools

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import ppo
from dpo import dpo_loss
from grpo import GRPOConfig, advantages, grpo_loss
from ppo import clipped, gae, kl_terms, normalise, token_rewards, value_loss
from rollout import masked_mean

V, L, BETA, SEEDS = 6, 4, 1.0, (0, 1, 2)
ANSWERS = torch.cartesian_prod(*[torch.arange(V)] * L)  # [1296, 4]
# The row of the table for the beginning before each token: those of no token, of one, of two, of three.
BEGINNING = torch.stack(
    [(V**t - 1) // (V - 1) + sum(ANSWERS[:, i] * V ** (t - 1 - i) for i in range(t)) + 0 * ANSWERS[:, 0]
     for t in range(L)], dim=1)  # fmt: skip
ROWS = int(BEGINNING.max()) + 1  # 259


def token_log_probs(table):
    """ln P of each token of each answer: [259, 6] -> [1296, 4]."""
    return table.log_softmax(-1)[BEGINNING, ANSWERS]


def law(table):
    """The probability of each answer: [1296]."""
    return token_log_probs(table).sum(1).exp()


class Problem:
    """A random reference and random rewards, and what the methods ought to find."""

    def __init__(self, seed: int):
        self.chance = torch.Generator().manual_seed(seed)
        self.table = 0.5 * torch.randn(ROWS, V, generator=self.chance)
        self.reference = token_log_probs(self.table)  # [1296, 4]
        self.reward = torch.randn(len(ANSWERS), generator=self.chance)  # [1296]
        self.policy = self.table.clone().requires_grad_()  # begins as the reference
        tilted = self.reference.double().sum(1).exp() * (self.reward.double() / BETA).exp()
        self.best = tilted / tilted.sum()  # pi*

    def draw(self, n: int, probs=None):
        """The places in ANSWERS of n answers, drawn from the policy or from other probabilities: [n]."""
        probs = law(self.policy).detach() if probs is None else probs
        return torch.multinomial(probs, n, replacement=True, generator=self.chance)

    def distance(self, other) -> float:
        """The total variation between the policy and another law: the largest difference of any event."""
        return 0.5 * (law(self.policy.detach()).double() - other).abs().sum().item()

    def steps(self, n: int, lr: float, *more):
        """An optimiser for each of n steps, whose rate falls to 0."""
        optimizer = torch.optim.Adam([self.policy, *more], betas=(0.9, 0.99))
        for step in range(n):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / n)
            yield optimizer

    def k3_best(self):
        """beta pi_ref / (lambda - r), with the lambda that makes the sum 1, by bisection: [1296]."""
        reference, reward = self.reference.double().sum(1).exp(), self.reward.double()
        low, high = reward.max(), reward.max() + BETA
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if (BETA * reference / (middle - reward)).sum() > 1 else (low, middle)
        return BETA * reference / (high - reward)


def apply(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("baseline", "seed"), [*(("rloo", seed) for seed in SEEDS), ("dr-grpo", 0)])
def test_reinforce_with_the_kl_in_the_reward_finds_the_best_policy(baseline, seed):
    """REINFORCE on r - beta (ln P - ln P_ref), each answer compared with the others of its group, goes to pi*.

    At pi* that reward is the same for all answers: nothing is left to learn, and nothing is noise.
    """
    problem, size = Problem(seed), 1024
    config = GRPOConfig(baseline=baseline, kl="none", length=L)
    for optimizer in problem.steps(200, 0.1):
        drawn = problem.draw(size)
        new = token_log_probs(problem.policy)[drawn]  # [size, 4]
        old = new.detach()
        paid = problem.reward[drawn] - BETA * (old - problem.reference[drawn]).sum(1)
        gain = advantages(paid.view(-1, 8), baseline).flatten()
        apply(optimizer, grpo_loss(new, old, problem.reference[drawn], gain, torch.ones(size, L), config)[0])
    far = problem.distance(problem.best)
    assert far < 0.01, f"{baseline}: {far:.3f} from pi*: is the gradient that of E[r] - beta KL?"


@pytest.mark.parametrize("seed", SEEDS)
def test_ppo_finds_the_best_policy(seed):
    """PPO with a critic, advantages by GAE, the price of the KL in each token's reward, two clipped passes: to pi*."""
    problem, size = Problem(seed), 2048
    critic = torch.zeros(ROWS, requires_grad=True)  # a guess for each beginning
    mask = torch.ones(size, L, dtype=torch.bool)
    for optimizer in problem.steps(60, 0.1, critic):
        drawn = problem.draw(size)
        with torch.no_grad():
            old, guess = token_log_probs(problem.policy)[drawn], critic[BEGINNING[drawn]]
            earned = token_rewards(problem.reward[drawn], old, problem.reference[drawn], mask, BETA)
            gain, returns = gae(earned, guess, mask, gamma=1.0, lam=0.95)
            gain = normalise(gain, mask)
        for part in torch.randperm(size, generator=problem.chance).repeat(2).split(size // 2):
            ratio = (token_log_probs(problem.policy)[drawn[part]] - old[part]).exp()
            loss = -masked_mean(clipped(ratio, gain[part], 0.2), mask[part])
            now = critic[BEGINNING[drawn[part]]]
            apply(optimizer, loss + value_loss(now, guess[part], returns[part], mask[part], 0.2))
    far = problem.distance(problem.best)
    assert far < 0.04, f"{far:.3f} from pi*: what is rewarded is not r - beta KL, or advantages do not follow from it"


@functools.cache
def with_kl_in_the_loss(kind: str, seed: int, whole: bool = True) -> Problem:
    """A policy that learned by GRPO's loss with the estimator in it: a term for each answer, or one for each token.

    The advantages are those of RLOO: GRPO's own are divided by the spread of a group, and have another goal.
    """
    problem, size = Problem(seed), 2048
    config = GRPOConfig(baseline="rloo", kl=kind, beta=BETA, length=1)
    for optimizer in problem.steps(300, 0.1):
        drawn = problem.draw(size)
        new, reference = token_log_probs(problem.policy)[drawn], problem.reference[drawn]  # [size, 4] x 2
        if whole:
            new, reference = (each.sum(1, keepdim=True) for each in (new, reference))  # [size, 1] x 2
        gain = advantages(problem.reward[drawn].view(-1, 8), "rloo").flatten()
        apply(optimizer, grpo_loss(new, new.detach(), reference, gain, torch.ones_like(new), config)[0])
    return problem


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_with_k2_in_the_loss_finds_the_best_policy(seed):
    """GRPO's loss with beta k2 of whole answers goes to pi*: the mean gradient of k2 is that of KL(pi, pi_ref)."""
    problem = with_kl_in_the_loss("k2", seed)
    far = problem.distance(problem.best)
    assert far < 0.04, f"{far:.3f} from pi*: advantages, loss and pull together do not climb E[r] - beta KL"


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_with_k3_in_the_loss_finds_another_policy(seed):
    """GRPO's loss with beta k3 of whole answers goes to beta pi_ref / (lambda - r), and not to pi*.

    That is the best for KL(pi_ref, pi): where the gradient of E[r] - beta KL(pi_ref, pi) is 0, r pi + beta pi_ref =
    lambda pi for every answer.
    """
    problem = with_kl_in_the_loss("k3", seed)
    its_own = problem.k3_best()
    assert its_own.sum().item() == pytest.approx(1), "the lambda of the fixed point is wrong"
    far, near = problem.distance(problem.best), problem.distance(its_own)
    wrong = "advantages, loss and pull together do not climb E[r] - beta KL(pi_ref, pi)"
    assert near < 0.02, f"{near:.3f} from beta pi_ref / (lambda - r): {wrong}"
    assert far > 0.4, f"{far:.3f} from pi*: k3 in the loss does not go there; is another estimator in its place?"


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_a_pull_summed_token_by_token_finds_another_policy(kind):
    """Summed token by token, as published code does it, neither k2 nor k3 leads to pi*.

    A token also changes which tokens come after it, and so what these pay. The gradient of such a sum leaves this out.
    """
    problem = with_kl_in_the_loss(kind, 0, whole=False)
    far = problem.distance(problem.best)
    assert far > 0.08, f"{kind}: {far:.3f} from pi*: are the tokens of an answer one term of the loss?"


@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_finds_the_best_policy(seed):
    """DPO on fresh pairs of the reference's answers, labelled by Bradley-Terry with the rewards, goes to pi*.

    It sees no reward, and nothing that the policy itself would write.
    """
    problem, size = Problem(seed), 2048
    reference = problem.reference.sum(1)
    for optimizer in problem.steps(250, 0.1):
        two = problem.draw(2 * size, reference.exp()).view(2, size)
        first = torch.rand(size, generator=problem.chance) < problem.reward[two].diff(dim=0)[0].neg().sigmoid()
        chosen, rejected = torch.where(first, two, two.flip(0))
        now = token_log_probs(problem.policy).sum(1)
        apply(optimizer, dpo_loss(now[chosen], now[rejected], reference[chosen], reference[rejected], BETA).mean())
    far = problem.distance(problem.best)
    assert far < 0.10, f"{far:.3f} from pi*: a policy's own reward is beta ln (P / P_ref), and its loss -ln sigmoid"


@pytest.fixture
def two_laws():
    """Tables of a policy and of a reference that are far apart, in float64."""
    chance = torch.Generator().manual_seed(5)
    return [0.7 * torch.randn(ROWS, V, generator=chance, dtype=torch.float64).requires_grad_() for _ in range(2)]


def gradient(value, table):
    return torch.autograd.grad(value, table, retain_graph=True)[0]


def test_the_means_of_the_estimators(two_laws):
    """Over all answers, k1 and k3 have KL(pi, pi_ref) as their mean; k2 has not, but nearly so for laws that are near.
    """
    policy, reference = two_laws
    for share, nearly in ((1.0, None), (0.1, 0.02)):  # the policy, and a law that is near the reference
        law_now = (share * policy + (1 - share) * reference).detach()
        new, old = (token_log_probs(table).sum(1).detach() for table in (law_now, reference))  # [1296] x 2
        exact = kl_divergence(Categorical(logits=new), Categorical(logits=old)).item()
        for kind in ("k1", "k3"):
            mean = (new.exp() * kl_terms(new, old, kind)).sum().item()
            assert mean == pytest.approx(exact, rel=1e-9), f"{kind}: its mean is {mean:.4f}, KL is {exact:.4f}: biased"
        mean = (new.exp() * kl_terms(new, old, "k2")).sum().item()
        assert mean == pytest.approx((new.exp() * (new - old) ** 2 / 2).sum().item(), rel=1e-9), "k2 is d^2 / 2"
        off = abs(mean / exact - 1)
        assert off > 0.05 if nearly is None else off < nearly, f"k2: {mean:.4f} for a KL of {exact:.4f}"
    assert (kl_terms(new, old, "k3") >= 0).all() and (kl_terms(new, old, "k1") < 0).any(), "k3 is never below 0, k1 is"


def test_the_gradients_of_the_estimators(two_laws):
    """In the loss, the mean gradient of k1 is 0, that of k2 is KL(pi, pi_ref)'s, and that of k3 KL(pi_ref, pi)'s."""
    policy, reference = two_laws
    new, old = (token_log_probs(table).sum(1) for table in (policy, reference.detach()))
    forward = gradient(kl_divergence(Categorical(logits=new), Categorical(logits=old)), policy)
    backward = gradient(kl_divergence(Categorical(logits=old), Categorical(logits=new)), policy)
    probs = new.detach().exp()  # how often each answer is drawn: a number, as it is for answers that were drawn
    found = {kind: gradient((probs * kl_terms(new, old, kind)).sum(), policy) for kind in ("k1", "k2", "k3")}
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    close(found["k1"], torch.zeros_like(forward), msg="k1 in the loss: its mean gradient is 0, it pulls nowhere")
    close(found["k2"], forward, msg="k2 in the loss: its mean gradient is not that of KL(pi, pi_ref)")
    close(found["k3"], backward, msg="k3 in the loss: its mean gradient is not that of KL(pi_ref, pi)")
    assert (forward - backward).norm() > 0.3 * forward.norm(), "the two directions of KL must differ here"
    paid = (probs * kl_terms(new, old, "k1").detach() * new).sum()  # k1 as a part of the reward
    close(gradient(paid, policy), forward, msg="k1 in the reward: its mean gradient is that of KL(pi, pi_ref)")


@pytest.mark.parametrize("lam", [1.0, 0.0])
def test_the_mean_gradient_of_ppo_is_that_of_the_goal(lam, two_laws):
    """Over all answers, the gradient of PPO's gain is that of E[r] - beta KL: with lam 1 for any guesses of the critic,
    with lam 0 for right ones.
    """
    policy, reference = two_laws
    reward = torch.randn(len(ANSWERS), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    new, old, beta = token_log_probs(policy), token_log_probs(reference).detach(), 0.7
    probs, mask = new.detach().sum(1).exp(), torch.ones(len(ANSWERS), L, dtype=torch.bool)
    goal = (new.sum(1).exp() * reward).sum() - beta * kl_divergence(
        Categorical(logits=new.sum(1)), Categorical(logits=old.sum(1)))
    earned = token_rewards(reward, new.detach(), old, mask, beta)
    # The worth of a beginning: the mean of what comes after it, over the answers that begin with it.
    later = earned.flip(1).cumsum(1).flip(1)  # [1296, 4]
    weight, total = (torch.zeros(ROWS, dtype=torch.float64).index_add(
        0, BEGINNING.flatten(), (probs[:, None] * x).flatten()) for x in (torch.ones_like(later), later))
    guess = (total / weight)[BEGINNING] if lam == 0 else torch.randn(ROWS, dtype=torch.float64)[BEGINNING]
    gain = gae(earned, guess, mask, gamma=1.0, lam=lam)[0]
    ratio = (new - new.detach()).exp()
    mean = (probs[:, None] * clipped(ratio, gain, 0.2)).sum()
    torch.testing.assert_close(
        gradient(mean, policy), gradient(goal, policy), rtol=1e-8, atol=1e-11,
        msg="PPO's mean gradient is not that of E[r] - beta KL: a sign, the KL counted twice, or rewards misplaced")


def test_a_price_that_adapts_holds_the_policy_at_the_target():
    """With `adapt`, the price moves until the KL divergence, here listed exactly, is what was asked for."""
    problem, beta, target = Problem(0), 0.2, 0.5
    for optimizer in problem.steps(200, 0.1):
        new = token_log_probs(problem.policy).sum(1)
        kl = kl_divergence(Categorical(logits=new), Categorical(logits=problem.reference.sum(1)))
        apply(optimizer, -(new.exp() * problem.reward).sum() + beta * kl)
        beta = ppo.adapt(beta, kl.item(), target)
    assert kl.item() == pytest.approx(target, rel=0.1), f"KL is {kl.item():.3f} with beta {beta:.2f}: it runs away"
