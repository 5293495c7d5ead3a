"""Checkpoints of reward models: the losses, where the score is read, what training does, the script."""

import argparse
import json
import math
import signal
from dataclasses import replace

from shared import corpus
from shared.errors import BadInput

import judges
import numpy as np
import pytest
import torch
from judges import TALKS, talk

import checkpoint
import hf
import preferences
import reward as script
import tasks
import train
from chat import END_OF_TURN, form
from lora import LoRAConfig, add
from model import GPT
from preferences import KINDS, both, pair
from reward import (
    RewardConfig,
    RewardModel,
    accuracy,
    bradley_terry,
    encode,
    fit,
    judge,
    load,
    main,
    margin_ranking,
    pad_right,
    pair_loss,
    report,
    save,
    score_pairs,
    scores,
)
from sample import pad_left

# Differences 1, -4, 0.5, 0 and 2.75.
CHOSEN, REJECTED = [2.0, -1.0, 0.25, 3.0, 2.0], [1.0, 3.0, -0.25, 3.0, -0.75]


def expected(loss: str, chosen, rejected, margin: float = 1.0) -> tuple[float, np.ndarray]:
    """The mean loss and its gradient for the chosen scores, in float64 and pair by pair."""
    found, slopes = [], []
    for a, b in zip(chosen, rejected, strict=True):
        d = a - b
        if loss == "bradley-terry":  # -ln(1 / (1 + e^-d)), of which the larger exponential is taken out
            found.append(math.log1p(math.exp(-d)) if d > 0 else -d + math.log1p(math.exp(d)))
            slopes.append(-math.exp(-d) / (1 + math.exp(-d)) if d > 0 else -1 / (1 + math.exp(d)))
        else:
            found.append(max(0.0, margin - d))
            slopes.append(-1.0 if d < margin else 0.0)
    return sum(found) / len(found), np.array(slopes) / len(found)


LOSSES = {
    "bradley-terry": (bradley_terry, {}),
    "margin": (margin_ranking, {}),
    "margin 0.3": (lambda a, b: margin_ranking(a, b, 0.3), {"margin": 0.3}),
    "margin 3": (lambda a, b: margin_ranking(a, b, 3.0), {"margin": 3.0}),
}


def with_gradient(loss, chosen, rejected, dtype=torch.float64):
    a, b = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (chosen, rejected))
    value = loss(a, b)
    value.backward()
    return value.item(), a.grad.double().numpy(), b.grad.double().numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas(name, dtype):
    """The loss and its gradient are the formula's in float64: the chosen score is pulled up, the rejected one down."""
    loss, more = LOSSES[name]
    value, up, down = with_gradient(loss, CHOSEN, REJECTED, dtype)
    right, slope = expected(name.split()[0], CHOSEN, REJECTED, **more)
    tight = 1e-12 if dtype == torch.float64 else 1e-6
    assert value == pytest.approx(right, rel=tight), f"{name}: {value}, where the formula gives {right}: its margin?"
    assert np.allclose(up, slope, atol=tight), f"{name}: the gradient of the chosen scores is {up}, not {slope}"
    assert np.allclose(down, -slope, atol=tight), f"{name}: a score that rises in a better answer rises in a worse one"
    assert loss(*map(torch.tensor, ([5.0], [0.0]))) < loss(*map(torch.tensor, ([0.0], [5.0]))), "the order is swapped"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_stable_far_out(name, dtype):
    """At differences of +-1,000 and more, values and gradients are finite and right: no sigmoid overflows."""
    loss, more = LOSSES[name]
    for difference in (1000.0, -1000.0, 90.0, -90.0, 1e5, -1e5):
        chosen, rejected = [difference / 2, 0.25], [-difference / 2, 0.0]
        value, up, down = with_gradient(loss, chosen, rejected, dtype)
        right, slope = expected(name.split()[0], [min(700, max(-700, difference)), 0.25], [0.0, 0.0], **more)
        right += max(0.0, -difference - 700) / 2  # beyond 700 a float64 has no e^x; the loss goes on in a line
        assert value == pytest.approx(right, rel=1e-6), f"{name}: at a difference of {difference} the loss is {value}"
        assert np.allclose(up, slope, rtol=1e-6, atol=1e-9), f"{name}: at {difference} the gradient is {up}"
        assert np.allclose(down, -up), f"{name}: at {difference} the two gradients are {up} and {down}"


@pytest.mark.parametrize("shift", [-7.5, 3.25, 1000.0])
@pytest.mark.parametrize("loss", ["bradley-terry", "margin"])
def test_a_constant_added_to_all_scores_changes_nothing(loss, shift):
    """Only differences count: without centring, loss and gradient are the same wherever the scores lie."""
    config = RewardConfig(loss=loss, centre=0.0, margin=0.7)
    first = with_gradient(lambda a, b: pair_loss(a, b, config), CHOSEN, REJECTED)
    moved = with_gradient(lambda a, b: pair_loss(a + shift, b + shift, config), CHOSEN, REJECTED)
    for a, b, what in zip(first, moved, ("loss", "gradient of chosen", "gradient of rejected"), strict=True):
        assert np.allclose(a, b, atol=1e-10), f"{loss}: with {shift} added to all scores, another {what}"


def trls(chosen, rejected, coefficient: float) -> float:
    """The loss of TRL's RewardTrainer (trl/trainer/reward_trainer.py, compute_loss), recomputed."""
    a, b = np.array(chosen), np.array(rejected)
    return np.logaddexp(0, b - a).mean() + coefficient * ((a + b) ** 2).mean()


def test_the_loss_is_trls():
    """On the same scores the loss is the formula of TRL's RewardTrainer, with its centring."""
    a, b = torch.tensor(CHOSEN, dtype=torch.float64), torch.tensor(REJECTED, dtype=torch.float64)
    for weight in (0.0, 0.01, 0.3):
        found = pair_loss(a, b, RewardConfig(centre=weight)).item()
        assert found == pytest.approx(trls(CHOSEN, REJECTED, weight), rel=1e-12), (
            f"centring {weight}: {found}, TRL has another loss: is it the square of the sum, and the mean over pairs?"
        )
        hinge = pair_loss(a, b, RewardConfig(loss="margin", margin=0.7, centre=weight)).item()
        summed = expected("margin", CHOSEN, REJECTED, 0.7)[0] + weight * np.square(np.add(CHOSEN, REJECTED)).mean()
        assert hinge == pytest.approx(summed, rel=1e-12), f"the margin loss with centring {weight}"


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_begins_as_the_policy_that_knows_no_better(tied, both_ways):
    """It begins with the policy's trunk and a head of zeros: every score is 0 and the loss ln 2; the policy is left."""
    policy = judges.policy(dtype=torch.float32, tied=tied)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    opened = judge(policy, both_ways)
    state = opened.model.state_dict()
    for name, tensor in before.items():
        assert name == "head.weight" or torch.equal(state[name], tensor), f"{name} does not begin as the policy's"
    assert state["head.weight"].shape == (1, 16), "the head has one row"
    chosen, rejected = score_pairs(opened, judges.pairs())
    assert (chosen == 0).all() and (rejected == 0).all(), "at first all answers are equally good"
    assert bradley_terry(chosen, rejected).item() == pytest.approx(math.log(2)), "the loss begins at ln 2"
    found = opened.model(*pad_right(encode(opened, TALKS)))
    found[::2].sum().backward()
    assert opened.model.head.weight.grad.abs().min() > 0, "a head of zeros has to learn all the same"
    with torch.no_grad():
        for p in opened.model.parameters():
            p.add_(1.0)
    assert all(torch.equal(t, before[n]) for n, t in policy.model.state_dict().items()), "the policy was changed"
    form = (opened.tokenizer, opened.template, opened.ends)
    assert form == (policy.tokenizer, policy.template, policy.ends), "another form of conversation than the policy's"


KINDS_OF_MODEL = {
    "dense": {},
    "a window": {"window": 5},
    "a window with a sink": {"window": 6, "n_sink": 2},
    "without positions": {"nope_every": 2},
    "multi-query": {"n_kv_head": 1},
    "mixtures": {"n_expert": 5, "n_active": 2, "expert_hidden": 8},
    "mixtures with little room": {"n_expert": 4, "n_active": 1, "expert_hidden": 8, "capacity": 0.7,
                                  "renormalise": False},
}  # fmt: skip


def wide(rows: list[list[int]], T: int):
    """Rows padded on the right to T with tokens that mean something, so that whoever reads them is found out."""
    rng = torch.Generator().manual_seed(4)
    ids = torch.randint(70, (len(rows), T), generator=rng)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) for row in rows])


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
@torch.no_grad()
def test_the_score_is_read_at_the_last_real_token(kind, both_ways):
    """Alone, in a batch, padded right by little or beyond the context, a conversation has one score: at its last token.
    """
    opened = judges.judge(both_ways, **KINDS_OF_MODEL[kind])
    model, rows = opened.model, encode(opened, TALKS)
    alone = torch.stack([model(torch.tensor([row]), torch.tensor([len(row)]))[0] for row in rows])
    assert alone.std() > 0.02, "all scores are alike, and nothing is tested"
    if not both_ways:
        last = torch.stack([model.head(model.features(torch.tensor([row])))[0, -1, 0] for row in rows])
        torch.testing.assert_close(alone, last, rtol=0, atol=1e-10, msg="the score is not that of the last token")
    for T in (39, 48, 80):
        found = model(*wide(rows, T))
        error = (found - alone).abs().max().item()
        assert error < 1e-10, f"padded to {T} the scores move by {error:.1e}: padding is read, or seen"
    single = RewardModel(model.config, both_ways)
    single.load_state_dict(model.state_dict())
    single.eval()
    for T in (39, 48):
        error = (single(*wide(rows, T)) - alone).abs().max().item()
        assert error < 1e-5, f"in float32, padded to {T}, the scores move by {error:.1e}"


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
@torch.no_grad()
def test_padding_on_the_left_gives_the_same_score(kind):
    """Read with padding on the left, where every conversation ends in the last column, the scores are the same."""
    opened = judges.judge(**KINDS_OF_MODEL[kind])
    rows = encode(opened, TALKS)
    ids, pad = pad_left(rows)
    left = GPT.forward(opened.model, ids, pad=pad)[:, -1, 0]
    error = (left - opened.model(*wide(rows, 39))).abs().max().item()
    assert error < 1e-10, f"left padding moves a score by {error:.1e}"
    assert (scores(opened, TALKS).double() - left).abs().max() < 1e-5, "scores() tells others"


@torch.no_grad()
def test_no_expert_spends_its_time_on_padding():
    """In a mixture only real tokens are routed and counted, so padding takes no real token's room in training."""
    opened = judges.judge(**KINDS_OF_MODEL["mixtures with little room"])
    model, rows = opened.model.train(), encode(opened, TALKS)
    found = [model(*wide(rows, T)) for T in (39, 48, 80)]
    for layer in train.mixtures(model):
        assert int(layer.routing.load.sum()) == sum(map(len, rows)), "experts were chosen for padding"
        assert layer.routing.dropped > 0, "there is room for all, and nothing is tested"
    assert (found[0] - found[1]).abs().max() < 1e-10 and (found[0] - found[2]).abs().max() < 1e-10, (
        "in training a wider batch has other scores: padding takes the room of real tokens"
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A function: a policy and the head of a reward model -> the classifier of `transformers` with the same weights."""
    from transformers import AutoModelForSequenceClassification

    def build(policy, head):
        folder = hf.export(policy.model, policy.tokenizer, tmp_path_factory.mktemp("theirs") / "model", policy.template,
                           END_OF_TURN)  # fmt: skip
        how = {"num_labels": 1, "pad_token_id": 3, "attn_implementation": "eager", "dtype": torch.float64}
        model = AutoModelForSequenceClassification.from_pretrained(folder, **how).eval()
        with torch.no_grad():
            model.score.weight.copy_(head)
        return model, folder

    return build


@torch.no_grad()
def test_scores_are_those_of_transformers(theirs):
    """`transformers` has the same kind of model, which TRL trains: the same weights give its scores, on its own tokens.
    """
    from transformers import AutoTokenizer

    policy = judges.policy()
    opened = judge(policy)
    opened.model.double().eval()
    torch.manual_seed(5)
    torch.nn.init.normal_(opened.model.head.weight)
    model, folder = theirs(policy, opened.model.head.weight)
    words = AutoTokenizer.from_pretrained(folder)
    rows = [words.apply_chat_template(talk, return_dict=False) for talk in TALKS]
    assert encode(opened, TALKS) == rows, "other tokens than `transformers` makes of the same conversation"
    assert all(row[-1] == words.eos_token_id and 3 not in row for row in rows), "not at the token that ends the answer"
    T = max(map(len, rows))  # their norms and softmax are in float32, whatever the weights are
    ids = torch.tensor([row + [3] * (T - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    right = model(ids, attention_mask=mask).logits[:, 0]
    assert (opened.model(*wide(rows, 48)) - right).abs().max() < 1e-5, "their scores are others"
    assert (scores(opened, TALKS).double() - right).abs().max() < 1e-5, "scores() tells others"

    # With a mask of our own, their attention looks both ways.
    seen = mask[:, None, None, :].expand(-1, 1, T, T).bool()
    unseen = torch.zeros(len(rows), 1, T, T, dtype=torch.float64).masked_fill(~seen, -1e300)
    right = model(ids, attention_mask=unseen).logits[:, 0]
    opened.model.both_ways = True
    assert (opened.model(*wide(rows, 48)) - right).abs().max() < 1e-5, (
        "a model that looks both ways has other scores: does each token see all real ones, and no padding?"
    )


@pytest.mark.parametrize("kind", ["dense", "a window", "multi-query"])
@torch.no_grad()
def test_both_ways_sees_later_tokens(kind):
    """With both_ways the first token knows what the last one is; without, it does not."""
    for both_ways in (False, True):
        model = judges.judge(both_ways, **KINDS_OF_MODEL[kind]).model
        ids = torch.randint(60, (2, 12))
        other, lengths = ids.clone(), torch.tensor([12, 9])
        other[0, 11], other[1, 8] = 65, 66  # the last real tokens
        a, b = (model.features(x, look=model.around(12, lengths)) for x in (ids, other))
        moved = (a - b)[:, 0].abs().amax(1) > 1e-6
        assert moved.tolist() == [both_ways] * 2, f"both_ways {both_ways}: the first token sees the last: {moved}"
        other = ids.clone()
        other[1, 10] = 67  # padding
        a, b = (model.features(x, look=model.around(12, lengths)) for x in (ids, other))
        assert (a - b)[1, :9].abs().max() == 0, "a real token sees padding"


# As SmolLM2's: a line break stands behind the end of each turn.
LINES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|> {% endfor %}"
ENDLESS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def test_the_end_is_part_of_what_is_scored():
    """Tokens of a conversation: all turns, and as the last one the end of the last answer, in any template."""
    opened = judges.judge()
    [ids] = encode(opened, [talk("a b", "cd")])
    text = opened.tokenizer.decode(ids)
    assert text == "<|user|>a b<|end|><|assistant|>cd<|end|>", f"{text!r} is scored: is the end missing?"
    assert ids[-1] in opened.ends, "the score is read before the answer is over"
    [ids] = encode(opened, [[*talk("a", "b"), *talk("c", "d")]])
    assert opened.tokenizer.decode(ids).endswith("<|user|>c<|end|><|assistant|>d<|end|>"), "earlier turns end it"
    lines = replace(opened, template=LINES)
    assert opened.tokenizer.decode(encode(lines, [talk("a b", "cd")])[0]).endswith("cd<|end|>"), "read behind the end"
    with pytest.raises(BadInput, match="has no end"):
        encode(replace(opened, template=ENDLESS), TALKS)


def test_an_answer_that_ends_is_not_one_that_goes_on():
    """The end changes the score: one that is read at the last letter cannot tell "12" from the beginning of "123"."""
    opened = judges.judge()
    [whole] = encode(opened, [talk("a", "12")])
    batch = pad_right([whole, whole[:-1], whole + whole[-2:]])
    with torch.no_grad():
        found = opened.model(*batch)
    assert found[0].item() == pytest.approx(scores(opened, [talk("a", "12")]).item(), abs=1e-5), "not with its end"
    assert (found.diff().abs() > 1e-3).all(), "the last token does not matter"


def test_what_is_too_long_is_refused():
    """A conversation of the model's context is scored; one token more is refused with its number."""
    opened = judges.judge()
    room = opened.model.config.block_size - 4 - 3
    assert scores(opened, [talk("abc", "x" * room)]).isfinite().all(), "it fits, and is refused"
    with pytest.raises(BadInput, match=r"conversation 2 has 41 tokens.*40"):
        encode(opened, [TALKS[0], talk("abc", "x" * (room + 1))])


def test_padding_on_the_right_by_hand():
    """Rows are filled up with zeros to a multiple of 16, and how many tokens of each are real is told."""
    ids, lengths = pad_right([[5, 6, 7], [8], list(range(1, 18))])
    assert ids.shape == (3, 32) and lengths.tolist() == [3, 1, 17], "17 tokens need 32 places"
    assert ids[0].tolist() == [5, 6, 7] + [0] * 29 and ids[1].tolist() == [8] + [0] * 31, "padding is not on the right"
    assert ids[2].tolist() == [*range(1, 18)] + [0] * 15, "a row has lost a token"
    assert pad_right([[1] * 16])[0].shape == (1, 16), "a full row needs no padding"


@pytest.mark.parametrize("size", [1, 3, 100])
def test_scores_do_not_depend_on_chance_or_order(size):
    """Dropout is off in scoring, each conversation gets its own score in any batch, and the mode is as it was."""
    opened = judges.judge(dtype=torch.float32)
    add(opened.model, LoRAConfig(rank=2, alpha=3.0, dropout=0.5))
    for name, p in opened.model.named_parameters():
        torch.nn.init.normal_(p, std=0.4) if name.endswith(".b") else None
    rows = encode(opened, TALKS)
    with torch.no_grad():
        opened.model.eval()
        right = torch.cat([opened.model(torch.tensor([row]), torch.tensor([len(row)])) for row in rows])
        opened.model.train()
        assert (opened.model(*pad_right(rows)) - right).abs().max() > 0.01, "there is no dropout to be turned off"
    first, again = scores(opened, TALKS, size), scores(opened, TALKS, size)
    assert torch.equal(first, again), "dropout is on: the same answer gets another score each time"
    assert (first - right).abs().max() < 1e-5, f"{size} at a time: a conversation has the score of another"
    assert opened.model.training, "scoring has changed the mode: dropout is off in training from now on"
    assert not first.requires_grad and first.device.type == "cpu" and first.shape == (len(TALKS),), "a number each"
    turned = scores(opened, TALKS[::-1], size).flip(0)
    assert (turned - right).abs().max() < 1e-5, "the scores come in another order than the conversations"


def test_pairs_are_scored_chosen_first():
    """Of each pair the chosen answer's score comes first, each behind its own whole prompt."""
    opened, made = judges.judge(), judges.pairs()
    found = score_pairs(opened, made)
    for side, told in zip(("chosen", "rejected"), found, strict=True):
        right = torch.cat([scores(opened, [each["prompt"] + each[side]]) for each in made])
        assert (told - right).abs().max() < 1e-5, f"the {side} scores are not those of the {side} answers"


def test_accuracy_by_hand():
    """The share of pairs whose better answer has the higher score; a tie, which decides nothing, is half right."""
    found = accuracy(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 2.0, 1.0]))
    assert found == pytest.approx(2.5 / 3), "two pairs are ranked right, and one is a tie"
    assert accuracy(torch.zeros(4), torch.zeros(4)) == 0.5, "whoever gives all the same score knows nothing"
    assert accuracy(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0])) == 0.0, "all pairs the wrong way round"


def encoded(opened, made):
    rows = encode(opened, [talk for each in made for talk in both(each)])
    return list(zip(rows[0::2], rows[1::2], strict=True))


def recipe(**changes) -> RewardConfig:
    plain = {"steps": 3, "batch_size": 9, "warmup": 0, "decay": 1.0, "clip": math.inf, "precision": "float32"}
    return RewardConfig(**plain | {"balance_weight": 0.0, "z_weight": 0.0} | changes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dense", {}), ("dense", {"loss": "margin", "margin": 0.4, "centre": 0.2}), ("dense", {"clip": 0.05}),
        ("mixtures", {"balance_weight": 0.7, "z_weight": 0.3}),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_follows_the_gradient_of_the_pairs(kind, changes, monkeypatch):
    """Each step goes down the mean loss of the batch's pairs, every answer read alone: the schedule's share, clipped.
    """
    opened, made = judges.judge(**KINDS_OF_MODEL[kind]), judges.pairs(9)
    model, config, seen = opened.model, recipe(**changes), []

    def sgd(model, config):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer.register_step_pre_hook(lambda *_: seen.append(
            (optimizer.param_groups[0]["lr"], [p.grad.clone() for p in model.parameters()])))
        return optimizer

    def by_hand():
        """The loss of all pairs, each answer alone, and its gradient."""
        rows = encoded(opened, made)
        told = [torch.stack([model(torch.tensor([two[i]]), torch.tensor([len(two[i])]))[0] for two in rows])
                for i in (0, 1)]  # fmt: skip
        d = told[0] - told[1]
        loss = torch.relu(config.margin - d) if config.loss == "margin" else torch.log1p(torch.exp(-d))
        loss = loss.mean() + config.centre * (told[0] + told[1]).square().mean()
        if kind == "mixtures":
            model(*pad_right([row for two in rows for row in two]))  # leaves what the routers did, all at once
            routed = [layer.routing for layer in train.mixtures(model)]
            loss = loss + sum(0.7 * r.balance + 0.3 * r.z for r in routed) / len(routed)
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        length = math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))
        share = min(1.0, config.clip / (length + 1e-6))
        return loss.item(), [None if g is None else g * share for g in grads]

    monkeypatch.setattr(train, "make_optimizer", sgd)
    right, steps = by_hand(), []
    for step, loss in fit(model, encoded(opened, made), config):
        assert model.training, "what is left out in training alone, dropout, is not left out"
        steps.append(step)
        assert loss == pytest.approx(right[0], rel=1e-5), (
            f"step {step}: {loss:.4f} is told, the loss of the pairs is {right[0]:.4f}: are chosen and rejected mixed?"
        )
        rate, grads = seen.pop()
        assert rate == pytest.approx(0.01 * train.schedule(step - 1, config)), "the schedule's share of the rate"
        for (name, _), found, g in zip(model.named_parameters(), grads, right[1], strict=True):
            if g is not None:
                torch.testing.assert_close(
                    found, g, rtol=1e-4, atol=1e-6,
                    msg=lambda m, name=name, step=step: f"step {step}, gradient of {name}: not that of the pairs\n{m}",
                )  # fmt: skip
        right = by_hand()
    assert steps == [1, 2, 3], "not as many steps as the recipe has"


def test_a_pass_has_every_pair_once(monkeypatch):
    """Batches are whole pairs, chosen before rejected; each pass has every pair once, in an order of its own."""
    opened, made = judges.judge(dtype=torch.float32), judges.pairs(12)
    rows, batches, real = encoded(opened, made), [], script.pad_right
    monkeypatch.setattr(script, "pad_right", lambda part, device: batches.append(part) or real(part, device))
    config = recipe(steps=9, batch_size=4)
    list(fit(opened.model, rows, config))
    found = [[(part[i], part[i + 1]) for i in range(0, 8, 2)] for part in batches]
    turns = [sum(found[i:i + 3], []) for i in range(0, 9, 3)]
    for turn in turns:
        assert sorted(turn) == sorted(rows), "in a pass a pair is missing, comes twice, or is the wrong way round"
    assert turns[0] != turns[1] != turns[2], "each pass has an order of its own"
    first = batches[:]
    batches.clear()
    list(fit(opened.model, rows, config))
    assert batches == first, "the same seed, and other batches"


def test_training_ends_where_it_must():
    """Training ends with the last step; a loss of nan and too few pairs are refused with the remedy."""
    opened, made = judges.judge(dtype=torch.float32), judges.pairs(5)
    rows = encoded(opened, made)
    steps = [step for step, _ in fit(opened.model, rows, recipe(batch_size=2, steps=3))]
    assert steps == [1, 2, 3], f"of 3 steps it takes the steps {steps}"
    with pytest.raises(BadInput, match="5 pairs do not fill a batch of 6"):
        next(fit(opened.model, rows, recipe(batch_size=6)))
    training = fit(opened.model, rows, recipe(batch_size=5))
    next(training)
    with torch.no_grad():
        opened.model.norm.weight.fill_(math.nan)
    with pytest.raises(BadInput, match=r"nan at step 2.*lower --lr"):
        next(training)


@pytest.mark.parametrize("loss", ["bradley-terry", "margin"])
def test_a_rule_is_learned(loss):
    """From pairs alone a judge learns which answers are better, and ranks new pairs, whichever comes first."""
    made = [pair(talk(a, "-")[:1], f"{a}{b}a", f"{b}{a}o") for a in "bcdfghjk" for b in "lmnpqrst"]
    opened = judge(judges.policy(dtype=torch.float32))
    torch.manual_seed(0)
    for block in opened.model.blocks:
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.2)
    losses = [loss for _, loss in fit(opened.model, encoded(opened, made[8:]), recipe(
        steps=25, batch_size=16, lr=0.02, loss=loss, precision="bfloat16"))]
    start = math.log(2) if loss == "bradley-terry" else 1.0
    assert losses[0] == pytest.approx(start, rel=1e-3), f"the loss begins at {losses[0]:.3f}, not {start:.3f}"
    chosen, rejected = score_pairs(opened, made[:8])
    assert accuracy(chosen, rejected) == 1.0, f"new pairs ranked right: {accuracy(chosen, rejected):.2f}"
    assert accuracy(rejected, chosen) == 0.0, "swapped pairs flip the sign"
    assert losses[-1] < 0.5 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"


@pytest.mark.parametrize("both_ways", [False, True])
def test_what_is_saved_is_what_is_loaded(both_ways, tmp_path):
    """A judge that was saved gives the same scores, with its own form of conversation and its way to look."""
    opened = replace(judges.judge(both_ways, dtype=torch.float32), template=LINES)
    save(tmp_path / "model.pt", opened, args={"seed": 3})
    found = load(tmp_path / "model.pt")
    assert torch.equal(scores(found, TALKS), scores(opened, TALKS)), "the saved judge has other scores"
    assert (found.template, found.ends, found.model.both_ways) == (LINES, opened.ends, both_ways), "another form"
    assert checkpoint.read(tmp_path / "model.pt")["args"] == {"seed": 3}, "the flags of the run are lost"


def test_other_files_are_no_judges(tmp_path):
    """A language model, a torn file and one whose weights do not fit are refused, each in one line with its reason."""
    judges.write(tmp_path, "policy", judges.policy())
    opened = judges.judge()
    save(tmp_path / "good.pt", opened)
    state = torch.load(tmp_path / "good.pt", weights_only=True)
    torch.save(state | {"model": {n: t for n, t in state["model"].items() if n != "norm.weight"}}, tmp_path / "less.pt")
    torch.save(state | {"config": state["config"] | {"n_embd": 32}}, tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:999])
    reasons = {"policy/model.pt": "language model and no reward model", "less.pt": "norm.weight", "other.pt": "damaged",
               "torn.pt": "damaged", "none.pt": "no checkpoint"}  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(BadInput, match=reason) as refused:
            load(tmp_path / name)
        assert "\n" not in str(refused.value), "one line"


def test_a_report_by_hand(monkeypatch):
    """A row for each kind: the share that is ranked right, Wilson's interval, and the mean difference of the scores."""
    told = {"a": (torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 1.0, 4.0])),
            "b": (torch.ones(100), torch.zeros(100))}  # fmt: skip
    monkeypatch.setattr(script, "score_pairs", lambda opened, made: told[made[0]])
    first, second = report(None, {"a": ["a"] * 4, "b": ["b"] * 100})
    assert (first["pairs"], second["pairs"]) == ("a", "b")
    assert first["right"] == 0.625 and first["difference"] == pytest.approx(-0.25), "2.5 of 4 pairs, 1 + 0 + 2 - 4"
    z, n, p = 1.96, 4, 0.625  # Wilson (1927), his formula (4) solved for p
    root = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    for end, sign in (("low", -1), ("high", 1)):
        assert first[end] == pytest.approx((p + z * z / 2 / n + sign * root) / (1 + z * z / n)), f"the {end} end"
    assert second["right"] == 1 and 0.96 < second["low"] < 0.97, "100 of 100 is not certainty"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function: run the script on a small policy, with words of the test's own -> the folder of the run."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("STAGES_FROM", str(tmp_path))
    torch.manual_seed(0)
    judges.write(tmp_path / "out", "tiny", judges.policy(dtype=torch.float32, block_size=72))
    made = [pair(talk(a, "-")[:1], f"{a}{b}a", f"{b}{a}o") for a in "bcdfghjkvwxyz" for b in "lmnpqrst"]
    (tmp_path / "pairs.jsonl").write_text(tasks.dumps(made), encoding="utf-8")
    (tmp_path / "text.txt").write_text(judges.corpus(), encoding="utf-8")

    def run(name, *words, data="pairs.jsonl"):
        small = ["--steps", "12", "--batch-size", "8", "--warmup", "2", "--eval-every", "5"]
        given = ["--data", data] if data else ["--corpus", "text.txt"]
        found = main(["--policy", "tiny", "--device", "cpu", "--name", name, *given, *small, *words])
        assert found is None, f"the script ends with exit code {found}"
        return tmp_path / "out" / name

    return run


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(script, "draw", lambda *args: None)


def told(folder):
    return json.loads((folder / "summary.json").read_text("utf-8"))


def test_the_script_learns_a_file_of_pairs(start, tmp_path, capsys):
    """`reward.py --data` learns, looks at held-out pairs now and then, saves a judge and tells what that ranks right.
    """
    folder = start("mine", "--steps", "20", "--lr", "0.02", "--both-ways")
    assert {f.name for f in folder.iterdir()} == {"config.json", "metrics.jsonl", "model.pt", "learning.png",
                                                  "summary.json"}  # fmt: skip
    training, test = preferences.split_by_prompt(preferences.read_pairs("pairs.jsonl"), seed=1337)
    opened = load(folder / "model.pt")
    assert opened.model.both_ways, "the option is lost on the way"
    right = accuracy(*score_pairs(opened, test))
    assert told(folder)["right_held out"] == pytest.approx(right), "what is told is not what the saved judge does"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "held out" in row] == [5, 10, 15, 20], "a look at every fifth step"
    assert [row["step"] for row in rows if "train_loss" in row] == [10, 20], "the loss at every tenth step"
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses[-1] < math.log(2), f"losses of {losses}: nothing was learned"
    said = capsys.readouterr().out
    assert told(folder)["steps"] == 20 and "96 pairs to learn from, 8 held out" in said, "what was done is not told"


def test_the_script_makes_its_own_pairs(start, no_figures, monkeypatch):
    """Without --data it learns corruptions and the policy's own mistakes, and tells of each kind by itself."""
    real = tasks.make
    monkeypatch.setattr(tasks, "make", lambda known, name, n, **how: real(known, name, min(n, 36), **how))
    monkeypatch.setattr(preferences, "draw_answers", lambda opened, records, n, seed: [["no"] * n for _ in records])
    summary = told(start("made", "--pairs", "36", "--noise", "0.25", data=None))
    assert {f"right_{kind}" for kind in (*KINDS, "sampled")} <= summary.keys(), "a kind of mistake is not told"
    assert summary["corpus"] == corpus.load("text.txt").name, "what was learned from"
    assert 0 <= summary["right_swap"] <= 1, "no share"


def test_the_text_is_that_of_the_policy(start, tmp_path, no_figures, monkeypatch):
    """Without --corpus the tasks' words are from the policy's own text, and the record says which that was."""
    file = tmp_path / "out" / "tiny" / "model.pt"
    opened, own = judges.policy(dtype=torch.float32, block_size=72), str(tmp_path / "text.txt")
    past = {"optimizer": {}, "step": 3, "seconds": 1.0, "args": {"corpus": own}}
    checkpoint.save(file, opened.model, opened.tokenizer, **past, **form(opened))
    real, seen = script.make_pairs, []

    def few(args, policy):
        seen.append(args.corpus)
        return real(argparse.Namespace(**vars(args) | {"data": "pairs.jsonl"}), policy)

    monkeypatch.setattr(script, "make_pairs", few)
    monkeypatch.setattr(corpus, "load", lambda name=None, real=corpus.load: real(name or pytest.fail("the default")))
    small = ["--steps", "2", "--batch-size", "8", "--warmup", "0", "--device", "cpu"]
    assert main(["--policy", "tiny", "--name", "found", *small]) is None
    saved = checkpoint.read(tmp_path / "out" / "found" / "model.pt")["args"]["corpus"]
    assert seen == [own], "the words are from another text than the policy's"
    assert told(tmp_path / "out" / "found")["corpus"] == saved == own, "the record tells another text"


@pytest.mark.parametrize("where", ["in a step", "in the last look"])
def test_ctrl_c_keeps_the_earlier_judge(where, start, no_figures, monkeypatch):
    """Ctrl-C ends the run there and says so: the finished judge of this name, and its record, stay."""
    folder = start("stopped")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert {"model.pt", "metrics.jsonl", "summary.json"} <= before.keys(), "the run before"
    schedule, report, looks = train.schedule, script.report, iter(range(1, 4))

    def share(step, config):
        if where == "in a step" and step == 2:
            signal.raise_signal(signal.SIGINT)
        return schedule(step, config)

    def look(*args):
        if next(looks) == 3:  # after 5, 10 and all 12 steps
            signal.raise_signal(signal.SIGINT)
        return report(*args)

    monkeypatch.setattr(train, "schedule", share)
    monkeypatch.setattr(script, "report", look)
    with pytest.raises(KeyboardInterrupt, match="nothing of this run was kept"):
        start("stopped", "--seed", "2")
    after = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert [name for name in before if after.get(name) != before[name]] == [], "a file of the finished judge changed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kinds", "delete", "shuffle"], "shuffle: choose from substitute"),
        (["--pairs", "0"], "--pairs 0"),
        (["--name", "tiny"], "policy's own name"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--policy", "nowhere"], "nowhere"),
        (["--batch-size", "1000"], "smaller batch"),
        (["--noise", "1.5"], "from 0 to 1"),
        (["--micro-batch", "4"], "--micro-batch"),
        (["--lr", "0"], "lr"),
        (["--lr", "1e30"], "lower --lr"),
        (["--device", "abacus"], "abacus"),
    ],
    ids=lambda value: " ".join(value).strip("-") if isinstance(value, list) else "",
)
def test_the_script_refuses_bad_input(words, message, start, tmp_path):
    """A wrong value is one clear line, the policy is untouched, and no judge is left behind."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n')
    before = (tmp_path / "out" / "tiny" / "model.pt").read_bytes()
    with pytest.raises(BadInput, match=message) as refused:
        start("refused", *words)
    assert "\n" not in str(refused.value), "a mistake of the user is told in one line"
    assert not (tmp_path / "out" / "refused" / "model.pt").exists(), "a judge is left behind"
    assert (tmp_path / "out" / "tiny" / "model.pt").read_bytes() == before, "the policy was written over"


def test_a_bad_file_is_said_before_a_policy_is_tuned(start, tmp_path, monkeypatch):
    """A bad record ends the script before minutes are spent on the policy."""
    monkeypatch.setattr(script, "open_policy", lambda *args: pytest.fail("the policy came first"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(BadInput, match=r"bad\.jsonl, line 1"):
        start("refused", data="bad.jsonl")
