"""Checkpoints of the speedrun: each record adds one idea, each idea does what it says, and counts are exact."""

import itertools
import json
from collections import Counter
from fractions import Fraction

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

from demos.counts import Counts
from demos.speedrun import Ideas, PlainNorm, Racer, SquaredReLU, judge, main, plans
from model import GPT, ModelConfig
from train import TrainConfig, evaluate, make_optimizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small() -> ModelConfig:
    return ModelConfig(vocab_size=11, block_size=8, n_embd=12, n_head=2, n_layer=4)


def test_each_record_adds_one_idea():
    """From one record to the next one more idea is used, and none is given up; the first is the default run."""
    found = [vars(plan) for plan in plans()]
    assert not any(found[0].values()), "the first record is not the default run"
    for old, new in itertools.pairwise(found):
        assert sum(new.values()) == sum(old.values()) + 1, "a record does not add exactly one idea"
        assert all(new[name] for name in old if old[name]), "a record drops an idea of the one before it"


def test_without_ideas_the_racer_is_the_stages_model():
    """No idea, no difference: the same weights give the same scores."""
    racer, plain = Racer(small(), Ideas()), GPT(small())
    racer.load_state_dict(plain.state_dict())
    x = torch.randint(11, (3, 8))
    assert torch.equal(racer(x), plain(x)), "a part was replaced though no idea asks for it"


def test_looked_up_values_are_added_to_the_values():
    """In each second layer a token's looked-up vector joins its value: added to the value layer's output, the same."""
    racer, plain = Racer(small(), Ideas(values=True)), GPT(small())
    plain.load_state_dict({name: p for name, p in racer.state_dict().items() if "lookups" not in name})
    x = torch.randint(11, (3, 8))
    assert not torch.allclose(racer(x), plain(x), atol=1e-3), "the looked-up vectors change nothing"
    for i in (1, 3):
        extra = racer.lookups[str(i)].weight[x]
        plain.blocks[i].attn.value.register_forward_hook(lambda layer, args, out, extra=extra: out + extra)
    torch.testing.assert_close(racer(x), plain(x), msg=lambda m: f"not values plus looked-up vectors: {m}")
    groups = make_optimizer(racer, TrainConfig()).optimizers["muon"].param_groups
    tables = {id(p) for p in racer.lookups.parameters()}
    assert not any(id(p) in tables for group in groups for p in group["params"]), "Muon has the looked-up tables"


def test_the_squared_relu_is_its_formula():
    """proj(relu(fc(x))^2), with two matrices that weigh as much as SwiGLU's three to one in twenty."""
    layer, x = SquaredReLU(small()), torch.randn(5, 12)
    expected = (x @ layer.fc.weight.T).clamp(min=0) ** 2 @ layer.proj.weight.T
    torch.testing.assert_close(layer(x), expected, msg=lambda m: f"not relu(z)^2: {m}")
    weights = sum(p.numel() for p in layer.parameters())
    assert weights == 8 * 12**2, "two matrices of C x 4C"


def test_silent_branches_and_plain_norms():
    """With `zero` every block passes its input on at the start; with `plain_norms` no norm inside has a scale."""
    racer = Racer(small(), Ideas(zero=True, plain_norms=True))
    x, rope = torch.randn(2, 8, 12), (torch.ones(8, 3), torch.zeros(8, 3))
    for block in racer.blocks:
        assert torch.equal(block(x, rope), x), "a branch says something at the start"
    scales = [name for name, _ in racer.named_parameters() if "blocks" in name and "norm" in name]
    assert not scales, "a norm has a scale"
    y = PlainNorm()(3 * x + 1)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 8), atol=1e-6, rtol=0, msg="a mean is left")
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(2, 8), atol=1e-4, rtol=0, msg="a spread is not 1")


def test_smear_gives_a_share_of_the_token_before():
    """It starts as nothing. With shares, position t gets its own embedding and that share of position t - 1's."""
    racer, plain = Racer(small(), Ideas(smear=True)), GPT(small())
    plain.load_state_dict({name: p for name, p in racer.state_dict().items() if "smear" not in name})
    x = torch.randint(11, (3, 8))
    assert torch.equal(racer(x), plain(x)), "before training, smear is not silent"
    share = torch.randn(12)
    racer.smear.norm.data = share
    table, seen = racer.tok_emb.weight, []
    racer.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    racer(x)
    for b, t in [(0, 0), (0, 1), (2, 7)]:
        expected = table[x[b, t]] + (share * table[x[b, t - 1]] if t else 0)
        torch.testing.assert_close(seen[0][b, t], expected, msg=lambda m: f"not a share of the token before: {m}")
    _, scales = make_optimizer(racer, TrainConfig()).optimizers["adamw"].param_groups
    assert any(p is racer.smear.norm for p in scales["params"]), "the shares are decayed, as scales must not be"


def test_smear_looks_only_back():
    """A token changes no score before its own place, nor in other rows."""
    racer = Racer(small(), Ideas(smear=True))
    racer.smear.norm.data.normal_()
    x = torch.randint(10, (3, 8))
    other = x.clone()
    other[1, 5] += 1
    same = (racer(x) == racer(other)).all(dim=-1)
    assert same[:, :5].all() and same[[0, 2]].all(), "a token is seen before its place"
    assert not same[1, 5:7].any(), "a token does not reach its own place and the next"


def kneser_ney(text: list[int], order: int, V: int):
    """P(token | context) with dictionaries and fractions, from Chen & Goodman's equations 24 to 27."""
    counts = {order: Counter(tuple(text[i:i + order]) for i in range(len(text) - order + 1))}
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])  # different tokens before it

    def discount(n, c):
        seen = Counter(counts[n].values())
        i, y = min(c, 3), Fraction(seen[1], max(1, seen[1] + 2 * seen[2]))
        return max(Fraction(0), i - (i + 1) * y * Fraction(seen[i + 1], max(1, seen[i]))) if c else 0

    def prob(token, context):
        n = len(context) + 1
        lower = prob(token, context[1:]) if context else Fraction(1, V)
        after = {y: counts[n][(*context, y)] for y in range(V)}
        if not sum(after.values()):
            return lower
        freed = sum(discount(n, c) for c in after.values())
        return (after[token] - discount(n, after[token]) + freed * lower) / sum(after.values())

    return prob


TEXT = [int(c) for c in "0120120312012301120122013012012031201"]


def test_the_counts_are_kneser_neys():
    """Each token's probability is that of dictionaries and fractions, of the contexts that stand inside the window."""
    counts, prob = Counts(torch.tensor(TEXT), 5, order=3), kneser_ney(TEXT, 3, 5)
    x = torch.tensor([[0, 1, 2, 0], [3, 3, 1, 2], [1, 1, 2, 4]])
    y = torch.tensor([[1, 2, 0, 1], [3, 1, 2, 3], [1, 2, 4, 0]])
    found = counts.prob(x, y)
    for b, t in itertools.product(range(3), range(4)):
        context = tuple(x[b, max(0, t - 1):t + 1].tolist())
        expected = pytest.approx(float(prob(y[b, t].item(), context)), rel=1e-12)
        assert found[b, t].item() == expected, f"not Kneser-Ney's probability of {y[b, t]} after {context}"


def test_counts_worked_by_hand():
    """0 1 0 1 0 2, pairs: 0 1 and 1 0 twice, 0 2 once. Y = 1 / 5, D1 = 1 - 2 Y 2 = 0.2, D2 = 2, so 0 frees 2.2 of 3.

    Each token has one other before it, so all that is freed goes to 1 / 4 of four tokens.
    """
    counts = Counts(torch.tensor([0, 1, 0, 1, 0, 2]), 4, order=2)
    found = counts.prob(torch.zeros(4, 1, dtype=torch.long), torch.arange(4)[:, None])[:, 0].tolist()
    assert found == pytest.approx([2.2 / 12, 2.2 / 12, (0.8 + 2.2 / 4) / 3, 2.2 / 12]), "not Kneser-Ney's law after 0"


def test_the_counts_are_a_law():
    """After every context, seen or not, the probabilities of all tokens sum to 1, and none is 0."""
    counts = Counts(torch.tensor(TEXT), 5, order=3)
    x = torch.cartesian_prod(*3 * [torch.arange(5)])  # [125, 3]
    laws = torch.stack([counts.prob(x, torch.cat([x[:, 1:], torch.full((125, 1), y)], dim=1)) for y in range(5)])
    last = laws[..., -1]  # [5, 125]
    torch.testing.assert_close(last.sum(0), torch.ones(125).double(), msg=lambda m: f"no law: {m}")
    assert (last > 0).all(), "a token is impossible"


def test_judging_alone_and_mixed():
    """The model alone as `evaluate` has it; mixed: 0.7 of its probability and 0.3 of the counts', over all."""
    config, text = small(), torch.tensor(TEXT)
    model, counts = GPT(config), Counts(torch.tensor(TEXT[::-1]), 11, order=3)
    alone, mixed = judge(model, text, counts, "float32")
    assert alone == pytest.approx(evaluate(model, text), rel=1e-5), "not the loss that `evaluate` gives"
    total = 0.0
    for begin in range(0, len(TEXT) - 1, config.block_size):  # four whole windows, and one of four tokens
        x, y = (text[None, begin + i:begin + i + config.block_size] for i in (0, 1))
        x = x[:, :y.shape[1]]
        p = F.softmax(model(x), dim=-1)[0].gather(1, y[0, :, None])[:, 0]
        total -= (0.7 * p + 0.3 * counts.prob(x, y)[0]).log().sum().item()
    assert mixed == pytest.approx(total / (len(TEXT) - 1), rel=1e-5), "not the mean over all tokens of the mixture"


@pytest.mark.parametrize("words", [["--records", "0"], ["--records", "7"], ["--rounds", "3"], ["--steps", "0"]])
def test_bad_input_is_one_line(words):
    """A record that does not exist and sizes that cannot be are one line."""
    with pytest.raises(BadInput, match=words[0]):
        main(words)


def test_the_demo_runs(text, out):
    """A record of a few steps ends with a summary, and so does the long one, which is the last."""
    main(["--records", "1", "--steps", "2", "--rounds", "4", "--corpus", str(text)])
    main(["--long", "--steps", "2", "--rounds", "4", "--corpus", str(text)])
    found = {path.parent.name: json.loads(path.read_text())["rows"] for path in out.rglob("summary.json")}
    assert [row["record"] for row in found["speedrun"]] == [1], "not the record that was asked for"
    assert [row["record"] for row in found["speedrun-long"]] == [6], "long is not the last record"
