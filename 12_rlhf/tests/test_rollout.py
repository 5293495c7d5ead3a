"""Checkpoints of the data that a policy makes: where answers stand and end, and under which law they are scored."""

import itertools
import math
import random
from collections import Counter

from shared.errors import BadInput

import little
import pytest
import torch
from little import ASKED, RECORDS
from torch import nn

import lora
from chat import prompt
from hf import Opened
from rollout import Rollout, draws, exact, log_probs, look, masked_mean, partly, rollout


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def opened() -> Opened:
    return little.policy()


@pytest.fixture(scope="module")
def drawn(opened) -> Rollout:
    """Five answers of at most six tokens to each of six questions of different lengths."""
    return rollout(opened, ASKED, 6, 1.3, n=5, generator=seeded(2))


def test_questions_end_in_the_same_column(opened, drawn):
    """All answers begin in one column: questions are padded on the left, the answers to one stand next to each other.
    """
    P = drawn.ids.shape[1] - 6
    assert drawn.which == [i for i in range(6) for _ in range(5)], "which question an answer belongs to"
    for i, which in enumerate(drawn.which):
        ids, pad = prompt(opened, ASKED[which]), int(drawn.pad[i])
        assert drawn.ids[i, pad:P].tolist() == ids, f"answer {i} does not stand right behind its question"
        assert pad == P - len(ids) and not drawn.ids[i, :pad].any(), f"answer {i}: what stands before it is padding"
    assert torch.equal(drawn.answers, drawn.ids[:, P:]), "the answers are the last columns"
    part = drawn.rows(torch.tensor([7, 2]))
    assert part.which == [1, 0] and part.texts == [drawn.texts[7], drawn.texts[2]], "rows: not answers 7 and 2"
    assert part.ended == [drawn.ended[7], drawn.ended[2]] and torch.equal(part.ids, drawn.ids[[7, 2]]), "rows"
    assert torch.equal(part.mask, drawn.mask[[7, 2]]) and torch.equal(part.pad, drawn.pad[[7, 2]]), "rows"


def test_the_mask_ends_after_the_end(opened, drawn):
    """What counts is each drawn token up to the first <|end|>, that one included; one without an end was cut off."""
    end, lengths = opened.tokenizer.special["<|end|>"], []
    for i, row in enumerate(drawn.answers.tolist()):
        length = row.index(end) + 1 if drawn.ended[i] else 6
        expected = [True] * length + [False] * (6 - length)
        assert drawn.mask[i].tolist() == expected, (
            f"answer {row}, where {end} is the end: the mask is {drawn.mask[i].int().tolist()}. The token that ends an "
            "answer is a choice of the policy and is learned, what stands behind it is none"
        )
        assert drawn.ended[i] == (end in row[:length]), f"answer {row}: does it have an end?"
        assert not any(row[length:]), "behind the end stands padding"
        said = "".join("?ab????"[token] for token in row[:length - drawn.ended[i]])  # a tag speaks for nobody
        assert drawn.texts[i] == said, "the text is the answer without its end"
        lengths.append(length)
    assert {1, 6} <= {*lengths} and len({*lengths}) > 3, "the checkpoint needs answers of many lengths"
    assert False in drawn.ended and any(n == 6 and over for n, over in zip(lengths, drawn.ended, strict=True)), (
        "the checkpoint needs a cut-off answer, and one that ends with its last token"
    )


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("kind", [{}, {"window": 5}, {"n_expert": 4, "n_active": 2, "expert_hidden": 8}], ids=str)
def test_tokens_are_scored_by_the_law_that_drew_them(kind, temperature):
    """ln P and entropy of each token are those of the scores divided by the temperature, each answer read alone."""
    opened = little.policy(**kind)
    drawn = rollout(opened, ASKED, 6, temperature, n=2, generator=seeded(1))
    with torch.no_grad():
        found, entropy = log_probs(opened.model, drawn, temperature)
        for i in range(len(drawn.texts)):
            law = little.alone(opened.model, opened, drawn, i, temperature)
            n = len(law)
            torch.testing.assert_close(
                found[i, :n], law[torch.arange(n), drawn.answers[i, :n]], rtol=1e-8, atol=1e-9,
                msg=lambda m, i=i: f"answer {i}: ln P is not that of the law at temperature {temperature}, from "
                f"which it was drawn: an undivided score, a place too early or too late, or padding that is seen\n{m}",
            )
            torch.testing.assert_close(
                entropy[i, :n], -(law.exp() * law).sum(-1), rtol=1e-8, atol=1e-9,
                msg=lambda m, i=i: f"answer {i}: the entropy is not -sum p ln p of the law that was drawn from\n{m}")
            assert not found[i, n:].any() and not entropy[i, n:].any(), "behind an answer there is 0"


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_how_often_a_token_is_drawn_is_what_its_score_says(opened, temperature):
    """Of 1,500 first tokens, each is drawn as often as exp(ln P) says, at temperatures below and above 1."""
    n = 1500
    drawn = rollout(opened, ASKED[1:2], 1, temperature, n=n, generator=seeded(2))
    with torch.no_grad():
        scored = log_probs(opened.model, drawn, temperature)[0][:, 0].exp()
    for token, count in Counter(drawn.answers[:, 0].tolist()).items():
        p = scored[drawn.answers[:, 0] == token][0].item()
        error = math.sqrt(p * (1 - p) / n)
        assert abs(count / n - p) < 4.5 * error + 1e-3, (
            f"token {token}: drawn in {count / n:.3f} of all cases, scored with {p:.3f}: the sampler's temperature "
            "is not that of the law that is trained"
        )


def test_dropout_does_not_reach_the_scores():
    """Scores are those of evaluation mode, as the answers were drawn: the ratio of a policy to itself is exactly 1."""
    opened = little.policy()
    model = lora.add(opened.model, lora.LoRAConfig(rank=3, alpha=6.0, dropout=0.5))
    for layer in lora.adapters(model).values():
        nn.init.normal_(layer.b, std=0.5)
    model.train()
    drawn = rollout(opened, ASKED, 5, generator=seeded())
    new, old = (log_probs(model, drawn)[0] for _ in range(2))
    assert torch.equal((new - old).exp(), torch.ones_like(new)), "dropout: the ratio of a policy to itself is not 1"
    assert model.training and new.requires_grad, "the model's mode is as it was, and scores can be learned from"
    with torch.no_grad():
        still = log_probs(model.eval(), drawn)[0]
    torch.testing.assert_close(still, new.detach(), rtol=1e-5, atol=1e-5, msg="not the scores of evaluation mode")


def test_a_seed_draws_the_same_answers(opened):
    """The same seed gives the same answers, another seed others; at temperature 0 the likeliest, whatever the seed."""
    one, again, other = (rollout(opened, ASKED, 6, n=2, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(one.ids, again.ids) and one.texts == again.texts, "the same seed drew other answers"
    assert not torch.equal(one.ids, other.ids), "another seed drew the same answers"
    sure = [rollout(opened, ASKED, 6, temperature=0.0, generator=seeded(s)) for s in (3, 4)]
    assert torch.equal(sure[0].ids, sure[1].ids), "the likeliest answer depends on the seed"
    for i in range(len(ASKED)):
        law = little.alone(opened.model, opened, sure[0], i)
        assert law.argmax(-1).tolist() == sure[0].answers[i, :len(law)].tolist(), "not the likeliest tokens"


def test_what_does_not_fit_is_refused(opened):
    """Question and answer must fit into the context to the last token; at temperature 0 nothing can be learned."""
    longest = max(len(prompt(opened, asked)) for asked in ASKED)
    fits = 40 - longest
    assert rollout(opened, ASKED, fits, generator=seeded()).ids.shape[1] == 40, "it just fits"
    with pytest.raises(BadInput, match=f"answer of {fits + 1} tokens: the model's context has 40"):
        rollout(opened, ASKED, fits + 1, generator=seeded())
    drawn = rollout(opened, ASKED, 3, temperature=0.0, generator=seeded())
    with pytest.raises(BadInput, match="temperature 0.0.*above 0"):
        log_probs(opened.model, drawn, 0.0)


def test_bfloat16_is_for_the_products_alone(opened, drawn):
    """With bfloat16 the scores are near those of float32, and have no less than float32's digits."""
    model = little.policy(dtype=torch.float32).model
    with torch.no_grad():
        found, exactly = (log_probs(model, drawn, 1.0, precision)[0] for precision in ("bfloat16", "float32"))
    assert found.dtype == torch.float32, f"the logarithm is taken in {found.dtype}"
    assert 0 < (found - exactly).abs().max() < 0.2, "bfloat16 was not used, or far too early"


def test_means_over_a_mask():
    """The mean counts the places of the mask alone, and is 0 where there are none."""
    x = torch.tensor([[1.0, 2.0, 900.0], [6.0, 900.0, 900.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask).item() == 3, "the mean of 1, 2 and 6: padding is counted"
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0, "a mask without places: 0, and not 0 / 0"


def test_rewards_by_hand():
    """The verifier wants every letter and an end; the hidden scorer gives half of what is shared for a wrong answer."""
    none = torch.zeros(5, 1)
    drawn = Rollout(none, none, none, ["bb", "b", "bb", "bbb", "a"], [True, True, False, True, True], [1, 1, 1, 1, 2])
    found = exact(RECORDS, drawn)
    assert found.tolist() == [1, 0, 0, 0, 1], f"{found.tolist()}: right, too short, without an end, too long, right"
    # bb and b share one letter of three: 2 * 1 / 3; bbb and bb share two of five: 2 * 2 / 5
    assert partly(RECORDS, drawn).tolist() == pytest.approx([1, 1 / 3, 1, 0.4, 1]), "the hidden scorer's quality"


def test_a_look_at_a_policy(opened):
    """Right answers, the likeliest and drawn; KL from ln P of whole answers; the mean length and the mean reward."""
    reference = little.neighbour(opened).train()
    drawn = rollout(opened, ASKED, 5, generator=seeded(9))
    likeliest = rollout(opened, ASKED, 5, temperature=0.0)
    golds = {"greedy": (likeliest, 0), "sampled": (drawn, 1)}
    records = [dict(r) for r in RECORDS]
    for answers, i in golds.values():  # so that some of both are right
        records[i] = {"messages": [*ASKED[i], {"role": "assistant", "content": answers.texts[i]}]}
    told = look(opened, reference, records, 5, lambda records, drawn: drawn.mask.sum(1) * 2.0, seed=9)
    with torch.no_grad():
        ours, theirs = ([little.chosen(m, opened, drawn, i) for i in range(6)] for m in (opened.model, reference))
        gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert told["kl"] == pytest.approx(sum(gap.sum().item() for gap in gaps) / 6), (
        f"KL is {told['kl']:.4f}: the mean over answers of the sum over tokens of ln P - ln P_reference, sign included"
    )
    lengths = [len(gap) for gap in gaps]
    assert told["length"] == pytest.approx(sum(lengths) / 6) and told["reward"] == pytest.approx(sum(lengths) / 3)
    for name, (answers, _) in golds.items():
        right = [text == r["messages"][-1]["content"] and over
                 for text, over, r in zip(answers.texts, answers.ended, records, strict=True)]
        assert told[name] == pytest.approx(sum(right) / 6), f"{name}: the share of right answers"
    assert reference.training, "the reference's mode is left as it was"
    assert "reward" not in look(opened, reference, records, 5), "no reward was asked for"


def test_each_step_draws_questions_of_its_own():
    """A stream that begins at step 3 gives what the whole stream gives from step 3 on; no record twice in a step."""
    records = [{"number": i} for i in range(20)]
    whole, later = draws(records, 6, seed=1), draws(records, 6, seed=1, start=3)
    steps = list(itertools.islice(whole, 7))
    assert steps[3:] == list(itertools.islice(later, 4)), "a resumed run is asked other questions"
    assert all(len({r["number"] for r in step}) == 6 for step in steps), "a question twice in one step"
    assert steps[0] != steps[1] and steps[0] != next(draws(records, 6, seed=2)), "each step and seed has its own"
    random.seed(0)
    assert next(draws(records, 6, seed=1)) == steps[0], "they do not depend on anyone else's random numbers"
