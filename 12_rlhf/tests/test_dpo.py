"""Checkpoints of DPO: the loss against the paper's formula, which tokens it counts, and a step of it."""

import math
from dataclasses import replace

from shared.errors import BadInput

import little
import pytest
import torch
from torch import nn

import dpo
import lora
from chat import prompt
from dpo import DPOConfig, answer_log_probs, dpo_loss, dpo_step, encode, reference_log_probs
from learn import Run
from preferences import pair

PAIRS = [  # answers and questions of very different lengths
    pair([{"role": "user", "content": asked}], *two)
    for asked, two in (("a", ("b", "abab")), ("abba?a", ("bb?abab", "?")), ("?", ("ab", "ba")), ("bab", ("aa?", "b")))
]
PAIRS.append(pair([{"role": "user", "content": "a"}, {"role": "assistant", "content": "bbb"},
                   {"role": "user", "content": "b?"}], "a", "ba"))  # fmt: skip


def numbers(n: int = 6, size: float = 3.0):
    """ln P of chosen and rejected answers under the policy, then under the reference: [n] x 4, float64."""
    chance = torch.Generator().manual_seed(0)
    return [-20 + size * torch.randn(n, generator=chance, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_loss_and_gradient_where_policy_and_reference_agree(beta):
    """There the loss is ln 2, and the gradient pulls the chosen answer up and the rejected one down by beta / 2 each.
    """
    chosen, rejected = (x.requires_grad_() for x in numbers()[:2])
    loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta)
    assert loss.tolist() == pytest.approx([math.log(2)] * 6), f"{loss.tolist()}: -ln sigmoid(0) is ln 2"
    loss.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-beta / 2] * 6), "the chosen answer is pulled up by beta / 2"
    assert rejected.grad.tolist() == pytest.approx([beta / 2] * 6), "the rejected answer is pushed down by beta / 2"


def test_the_formula_of_the_paper():
    """-ln sigma(beta ln(P(w) / P_ref(w)) - beta ln(P(l) / P_ref(l))) in float64, also where sigma rounds to 0."""
    for size in (3.0, 2000.0):
        won, lost, ref_won, ref_lost = numbers(size=size)
        found = dpo_loss(won, lost, ref_won, ref_lost, 0.3)
        for i in range(6):
            x = 0.3 * (won[i] - ref_won[i]).item() - 0.3 * (lost[i] - ref_lost[i]).item()
            expected = math.log1p(math.exp(-abs(x))) + max(-x, 0)
            assert found[i].item() == pytest.approx(expected), f"margin {x:.1f}: {found[i]:.4f}, by hand {expected:.4f}"


def test_ipo_stops_at_a_margin():
    """IPO is the square of the log-ratios' difference minus 1 / (2 beta): there is a difference that is enough."""
    won, lost, ref_won, ref_lost = numbers()
    found = dpo_loss(won, lost, ref_won, ref_lost, 0.25, "ipo")
    expected = [((won[i] - lost[i] - ref_won[i] + ref_lost[i]).item() - 2) ** 2 for i in range(6)]
    assert found.tolist() == pytest.approx(expected), "(h - 1 / (2 beta))^2 with beta 0.25: 1 / (2 beta) is 2"
    there = dpo_loss(ref_won + 2, ref_lost, ref_won, ref_lost, 0.25, "ipo")
    assert there.abs().max() < 1e-9, "at the margin the loss is 0"


@pytest.fixture(scope="module")
def opened():
    return little.policy()


def alone(model, opened, talk) -> torch.Tensor:
    """ln P of the last answer and its end, summed; the conversation is read on its own, and the prompt not counted."""
    asked = prompt(opened, talk[:-1])
    answer = opened.tokenizer.encode(talk[-1]["content"]) + [opened.tokenizer.special["<|end|>"]]
    scores = model(torch.tensor([asked + answer[:-1]]))[0, len(asked) - 1:]
    law = scores - scores.exp().sum(-1, keepdim=True).log()
    return law[torch.arange(len(answer)), answer].sum()


def talks(each) -> list[list[dict]]:
    return [each["prompt"] + each[side] for side in ("chosen", "rejected")]


def test_ln_p_of_an_answer_is_a_sum_over_its_tokens(opened):
    """ln P of an answer sums its tokens and its end: no mean over them, no token of the question, and no padding.

    Where the question has earlier turns, their answers do not count either.
    """
    rows = encode(opened, PAIRS)
    with torch.no_grad():
        found = answer_log_probs(opened.model, [each for two in rows for each in two])
        for i, each in enumerate(PAIRS):
            for j, talk in enumerate(talks(each)):
                expected, told = alone(opened.model, opened, talk).item(), found[2 * i + j].item()
                n = len(talk[-1]["content"]) + 1
                assert told == pytest.approx(expected, rel=1e-5), (
                    f"pair {i + 1}: ln P is {told:.4f}, the sum over the answer's {n} tokens {expected:.4f}, the "
                    f"mean {expected / n:.4f}: with a mean long answers count less, and the question is nobody's answer"
                )


def test_the_reference_is_asked_once_and_answers_in_order(opened):
    """ln P under the reference, in the pairs' order however they are sorted for reading, without gradient."""
    rows = encode(opened, PAIRS)
    found = reference_log_probs(opened.model, rows, "float32", size=3)
    assert found.shape == (5, 2) and not found.requires_grad, "a number for each answer of each pair"
    with torch.no_grad():
        expected = [[alone(opened.model, opened, talk).item() for talk in talks(each)] for each in PAIRS]
    for row, told in zip(found.tolist(), expected, strict=True):
        assert row == pytest.approx(told, rel=1e-5), f"{row}, expected {told}: the pairs are mixed up"


def test_a_pair_that_is_too_long_is_refused(opened):
    """A pair with an answer that does not fit into the model's context is refused, and its place and size are told."""
    asked = [{"role": "user", "content": "a"}]
    fits = 40 - len(prompt(opened, asked)) - 1  # letters of an answer, which has an end
    encode(opened, [pair(asked, "b", "a" * fits)])
    for two in (("b", "a" * (fits + 1)), ("a" * (fits + 1), "b")):
        with pytest.raises(BadInput, match="pair 2 has 41 tokens, and the model's context 40"):
            encode(opened, [PAIRS[0], pair(asked, *two)])


@pytest.mark.parametrize("changes", [{}, {"loss": "ipo"}], ids=str)
def test_a_step_written_out(changes, opened):
    """The gradient of the mean loss of the step's pairs, in which the reference's ln P are numbers."""
    config = DPOConfig(**{"beta": 0.3, "clip": 1e9, "warmup": 0, "lr": 0.01} | changes)
    policy, reference = (replace(opened, model=little.neighbour(opened, std, 3)) for std in (0.05, 0.0))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.01)
    rows = encode(opened, PAIRS)
    before = reference_log_probs(reference.model, rows, "float32").double()
    run = Run(None, config, policy, reference.model, [], [], optimizer)
    first = little.neighbour(opened, 0.05, 3)
    start = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    told = dpo_step(run, rows, before, [3, 0, 4], 0)
    losses, moves = [], []
    for i in (3, 0, 4):
        now = [alone(first, opened, talk) for talk in talks(PAIRS[i])]
        move = [a - b for a, b in zip(now, before[i], strict=True)]
        h = move[0] - move[1]
        losses.append((h - 1 / 0.6) ** 2 if config.loss == "ipo" else -torch.sigmoid(0.3 * h).log())
        moves.append([m.item() for m in move])
    loss = sum(losses) / 3
    found = little.moved(start, policy.model, 0.01)
    for name, expected in little.gradients(loss, first).items():
        torch.testing.assert_close(
            found[name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"gradient of {name}: {m}")
    expected = {"loss": loss.item(), "chosen": sum(m[0] for m in moves) / 3, "rejected": sum(m[1] for m in moves) / 3,
                "right_pairs": sum(m[0] > m[1] for m in moves) / 3}  # fmt: skip
    for name, value in expected.items():
        assert told[name] == pytest.approx(value, rel=1e-3, abs=1e-5), f"{name} is told as {told[name]}, it is {value}"


def test_the_first_loss_is_ln_2(opened):
    """At the start policy and reference agree: the loss is ln 2 whatever the pairs, also for a policy with dropout."""
    rows = encode(opened, PAIRS)
    before = reference_log_probs(opened.model, rows, "float32")
    model = lora.add(little.neighbour(opened, std=0.0), lora.LoRAConfig(rank=2, alpha=4.0, dropout=0.5)).train()
    reference = little.neighbour(opened, std=0.0)
    for layer in lora.adapters(model).values():
        nn.init.normal_(layer.b, std=0.3)
    run = Run(None, DPOConfig(beta=0.3), replace(opened, model=model), reference, [], [],
              torch.optim.SGD(model.parameters(), lr=0.0))  # fmt: skip
    moved = reference_log_probs(model.eval(), rows, "float32")
    told = dpo_step(run, rows, moved, [0, 1, 2, 3, 4], 0)
    assert told["loss"] == pytest.approx(math.log(2), rel=1e-5), "the reference is the policy itself: the loss is ln 2"
    model.train()
    told = dpo_step(run, rows, moved, [0, 1, 2, 3, 4], 0)
    assert told["loss"] == pytest.approx(math.log(2), rel=1e-5), (
        f"{told['loss']:.4f}: dropout makes the policy differ from the reference that it is"
    )
    assert (moved - before).abs().max() > 0.1 and model.training, "the checkpoint needs adapters that do something"


def test_pairs_of_the_policys_own(opened, monkeypatch):
    """A right and a wrong answer that the policy wrote itself; where it wrote only one of the two there is no pair."""
    records, seen = little.RECORDS[:4], []  # the right answers are b, bb, a and ab

    def drawn(*told):
        seen.append(told)
        return [["a", "b", "bb", "b"], ["b", "a", "a", "b"], ["a", "a", "a", "a"], ["ab", "ab", "ab", "ba"]]

    monkeypatch.setattr(dpo, "draw_answers", drawn)
    found = dpo.own_pairs(opened, records, 1.3, seed=4)
    told = [(p["prompt"], p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in found]
    asked = [record["messages"][:-1] for record in records]
    assert told == [(asked[0], "b", "a"), (asked[3], "ab", "ba")], f"{told}: the right answer first, then a wrong one"
    assert seen == [(opened, records, 4, 1.3, 4)], "four answers to each question, at the temperature, with the seed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch_size": 0}, "batch_size is 0"), ({"beta": 0.0}, "beta 0.0"), ({"beta": math.nan}, "beta nan"),
     ({"beta": math.inf}, "beta inf"), ({"lr": -1.0}, "lr is -1")],
    ids=str,
)  # fmt: skip
def test_recipes_that_cannot_run(changes, message):
    """A recipe that cannot run is refused in one line that names the number."""
    with pytest.raises(BadInput, match=message):
        DPOConfig(**changes)
