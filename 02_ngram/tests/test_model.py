"""Checkpoints of the models: counting against dictionaries, Kneser-Ney against its equations, softmax against torch."""

import itertools
import math
from collections import Counter, defaultdict

from shared.errors import BadInput

import pytest
import torch

from model import KneserNey, ModelConfig, NeuralBigram, NGram, discounts, look_up, pack, softmax

V = 5  # characters in the vocabulary of these tests
LOOKS_BACK = 4  # tokens of context in the examples, more than most of the models use


def examples(length: int = 900, seed: int = 0):
    """A text in which a token depends on the two before it, as contexts and targets; token 4 never occurs in it."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(V, V, V, generator=generator) ** 3
    table[..., 4] = 0
    text = [0, 1]
    for _ in range(length):
        text.append(torch.multinomial(table[text[-2], text[-1]], 1, generator=generator).item())
    rows = torch.tensor(text).unfold(0, LOOKS_BACK + 1, 1)
    return rows[:, :-1], rows[:, -1]


def every_context(T: int):
    """All V ** T contexts, those that the text never had among them: [V ** T, T]."""
    return torch.tensor(list(itertools.product(range(V), repeat=T)), dtype=torch.long).view(V**T, T)


def config(block_size: int, add_k: float = 0.01) -> ModelConfig:
    return ModelConfig(vocab_size=V, block_size=block_size, add_k=add_k)


def test_pack_writes_digits():
    """A row of tokens becomes one integer, its digits in base V, and no two rows share one."""
    assert pack(torch.tensor([[1, 2, 3], [0, 0, 7]]), 10).tolist() == [123, 7], "the oldest token is the highest digit"
    codes = pack(every_context(4), V)
    assert codes.tolist() == list(range(V**4)), "each of the V ** 4 rows has a number of its own"
    big = pack(torch.tensor([[64] * 10]), 65)
    assert big.item() == 65**10 - 1, "integers must be 64 bits wide"


def test_look_up_finds_what_is_there():
    """Looking up gives the value of each key that is there and 0 for all others, below, between and above."""
    keys, values = torch.tensor([3, 5, 9]), torch.tensor([30, 50, 90])
    queries = torch.tensor([9, 4, 3, 0, 100, 5, 10])
    assert look_up(keys, values, queries).tolist() == [90, 0, 30, 0, 0, 50, 0], "an absent key is 0, not its neighbour"


@pytest.mark.parametrize("Model", [NGram, KneserNey])
def test_fit_counts_the_text_it_is_given_and_returns_the_model(Model):
    """`fit` returns the model itself, and a second `fit` starts afresh: counts of an earlier text are forgotten."""
    (x, y), other = examples(200), examples(200, seed=1)
    model = Model(config(2))
    assert model.fit(*other) is model, "fit must return the model, so that `Model(config).fit(x, y)` is one"
    again, fresh = model.fit(x, y).probs(every_context(2)), Model(config(2)).fit(x, y).probs(every_context(2))
    assert torch.equal(again, fresh), "a model that had seen another text gives other probabilities: fit adds to it"


@pytest.mark.parametrize("Model", [NGram, KneserNey])
def test_an_n_gram_looks_at_the_newest_tokens(Model):
    """Given longer contexts than it needs, an n-gram reads the newest tokens: those next to the one it predicts."""
    x, y = examples()
    for T in (0, 1, 2):
        long = Model(config(T)).fit(x, y)
        short = Model(config(T)).fit(x[:, LOOKS_BACK - T:], y)
        assert torch.equal(long.prob(x, y), short.prob(x[:, LOOKS_BACK - T:], y)), (
            f"of {LOOKS_BACK} tokens the newest {T} count, but alone they get another answer: the wrong end was read"
        )


def test_a_context_that_is_too_short_is_no_silent_mistake():
    """A model is never given fewer tokens than it looks back without an error."""
    with pytest.raises(AssertionError, match="shorter"):
        NGram(config(3)).fit(torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long))
        pytest.fail("2 tokens of context were taken for 3: each n-gram gets another's number")


def count_with_dicts(x, y, T: int, k: float, context: tuple, target: int) -> float:
    """P(target | context) by add-k from a Counter of tuples."""
    grams = Counter((tuple(row[len(row) - T:]), t) for row, t in zip(x.tolist(), y.tolist(), strict=True))
    total = sum(count for (seen, _), count in grams.items() if seen == context)
    return (grams[context, target] + k) / (total + k * V)


@pytest.mark.parametrize(("T", "k"), [(0, 0.5), (1, 1.0), (2, 0.01), (3, 0.3)])
def test_add_k_matches_counting_with_dicts(T, k):
    """Add-k probabilities are (count + k) / (total + k V), as a dictionary counts, for seen and unseen contexts."""
    x, y = examples(200)
    model = NGram(config(T, k)).fit(x, y)
    contexts = every_context(T)
    probs = model.probs(contexts)
    for row, context in zip(probs.tolist(), contexts.tolist(), strict=True):
        expected = [count_with_dicts(x, y, T, k, tuple(context), target) for target in range(V)]
        assert row == pytest.approx(expected, abs=1e-12), (
            f"after {context} it is {row}, but (count + k) / (total + k V) is {expected}"
        )


def test_counting_models_answer_in_float64():
    """Counted probabilities are float64: float32 takes 2 ** 24 and 2 ** 24 + 1 for the same count."""
    x, y = examples(60)
    for Model in (NGram, KneserNey):
        model = Model(config(1)).fit(x, y)
        for found in (model.prob(x, y).dtype, model.probs(x).dtype):
            assert found == torch.double, f"{Model.__name__} answers in {found}"


# Each row: how many n-grams were seen 1, 2, 3 and 4 times, and what follows by hand.
ESTIMATES = [
    ((10, 5, 2, 1), 1 / 2, (0.5, 1.4, 2.0)),  # Y = 10 / (10 + 2 * 5);  1 - 2 Y 5/10,  2 - 3 Y 2/5,  3 - 4 Y 1/2
    ((20, 4, 2, 1), 5 / 7, (5 / 7, 13 / 14, 11 / 7)),  # Y = 20 / 28;  1 - 2 Y 4/20,  2 - 3 Y 2/4,  3 - 4 Y 1/2
]


def seen(n1: int, n2: int, n3: int, n4: int):
    """Counts of which n1 are 1, n2 are 2, n3 are 3, n4 are 4 and some are higher, in no order."""
    return torch.tensor([4] * n4 + [7] * 3 + [1] * n1 + [3] * n3 + [2] * n2)


def test_y_comes_from_the_n_grams_seen_once_and_twice():
    """Y, which all three discounts share, is n1 / (n1 + 2 n2)."""
    for n, Y, _ in ESTIMATES:
        D = discounts(seen(*n)).tolist()
        used = {round((i - D[i]) / (i + 1) * n[i - 1] / n[i], 9) for i in (1, 2, 3)}  # each equation, solved for Y
        if len(used) == 1:  # else a discount is wrong on its own, which the next checkpoint is about
            assert used.pop() == pytest.approx(Y), (
                f"where n1 is {n[0]} and n2 is {n[1]}, Y = n1 / (n1 + 2 n2) is {Y:.3f}; the discounts {D} use another Y"
            )


@pytest.mark.parametrize("i", [1, 2, 3])
def test_each_discount_by_hand(i):
    """D1, D2 and D3+, the discounts of n-grams seen once, twice and more often, are i - (i + 1) Y n_{i+1} / n_i."""
    for n, Y, expected in ESTIMATES:
        D = discounts(seen(*n)).tolist()[i]
        assert D == pytest.approx(expected[i - 1]), (
            f"D{i} = {i} - {i + 1} Y n{i + 1} / n{i} is {expected[i - 1]:.3f}, not {D:.3f} (n1 to n4: {n}, Y: {Y:.3f})"
        )


def test_nothing_is_taken_from_what_was_never_seen():
    """Discounts are four numbers, for 0, 1, 2 and 3 or more times, and the first is 0."""
    taken = discounts(seen(10, 5, 2, 1)).tolist()
    assert len(taken) == 4, f"{len(taken)} discounts: one each for n-grams seen 0, 1, 2 and 3 or more times"
    assert taken[0] == 0, f"{taken[0]} is taken from a count of 0: nothing is there to be taken"


def test_discounts_are_float64_from_the_start():
    """Discounts have all the digits of float64."""
    D = discounts(seen(20, 4, 2, 1))[1].item()
    assert abs(D - 5 / 7) < 1e-12, (
        f"D1 is 5/7 but for {abs(D - 5 / 7):.1g}, as in float32, which torch.tensor makes of floats unless it is told "
        "otherwise: a `.double()` afterwards comes too late"
    )


def test_a_text_too_small_for_the_estimate_gets_fixed_discounts():
    """Where no n-gram was seen once, or twice, three or four times, the estimate has no answer: take 0.5, 1, 1.5."""
    for n in ((0, 5, 2, 1), (10, 0, 2, 1), (10, 5, 0, 1), (10, 5, 2, 0)):
        missing = f"none was seen {n.index(0) + 1} times, so D1, D2, D3+ are 0.5, 1, 1.5"
        assert discounts(seen(*n)).tolist() == [0, 0.5, 1, 1.5], missing


def test_no_discount_is_negative():
    """An estimate below 0 is set to 0: a negative discount would add to a count."""
    # Y = 4 / (4 + 2 * 1) = 2/3:  1 - 2 Y 1/4 = 2/3,  2 - 3 Y 4/1 = -6,  3 - 4 Y 9/4 = -3
    taken = discounts(seen(4, 1, 4, 9)).tolist()
    assert min(taken) >= 0, f"{taken}: a negative discount adds to a count"
    assert taken == pytest.approx([0, 2 / 3, 0, 0]), f"only those below 0 are changed: {taken}"
    # Y = 1 / 17:  1 - 2 Y 8,  2 - 3 Y 1/8,  3 - 4 Y 8
    taken = discounts(seen(1, 8, 1, 8)).tolist()
    assert taken == pytest.approx([0, 1 / 17, 2 - 3 / 136, 3 - 32 / 17]), f"none is below 0, none is changed: {taken}"


def after(token: int) -> torch.Tensor:
    """The context `token`, for a bigram: [1, 1]."""
    return torch.tensor([[token]])


def pairs(table: dict[tuple[int, int], int]):
    """Contexts [N, 1] and targets [N] of a bigram in which each pair of `table` was seen so many times."""
    every = [pair for pair, times in table.items() for _ in range(times)]
    return torch.tensor([[a] for a, _ in every]), torch.tensor([b for _, b in every])


def test_each_count_has_its_own_discount():
    """An n-gram seen once loses D1, one seen twice D2, one seen 3, 4 or 9 times D3+."""
    # Pairs seen 1, 2, 3 and 9 times; none 4 times, so the discounts are 0.5, 1 and 1.5.
    levels = KneserNey(config(1)).fit(*pairs({(0, 0): 1, (0, 1): 2, (0, 2): 3, (1, 0): 9, (1, 1): 1})).levels
    assert len(levels) == 2, f"{len(levels)} levels: a bigram has two, the unigram and the bigram"
    level = levels[1]
    kept = dict(zip(level.keys.tolist(), level.kept.tolist(), strict=True))  # the key of the pair (a, b) is 5 a + b
    for key, count, D in ((0, 1, 0.5), (6, 1, 0.5), (1, 2, 1.0), (2, 3, 1.5), (5, 9, 1.5)):
        assert kept.get(key) == count - D, (
            f"levels[1] holds the pairs, and a pair seen {count} times keeps {count} - {D}, not {kept.get(key)}"
        )
    # 10, 5, 2 and 1 pairs seen 1, 2, 3 and 4 times: the discounts are 0.5, 1.4 and 2.
    times = [1] * 10 + [2] * 5 + [3] * 2 + [4]
    pair = list(itertools.product(range(V), repeat=2))
    level = KneserNey(config(1)).fit(*pairs(dict(zip(pair, times, strict=False)))).levels[1]  # keys are 0, 1, 2, ...
    for count, kept, D in zip(times, level.kept.tolist(), [0.5] * 10 + [1.4] * 5 + [2.0] * 3, strict=True):
        assert kept == pytest.approx(count - D), (
            f"a pair seen {count} times keeps {count} - {D}, not {kept}: the estimate sees the counts as they are"
        )


def test_every_shorter_context_counts_what_stands_before_it():
    """At each order below the longest, an n-gram's count is the number of different tokens that stand before it."""
    x, y = examples(60)
    rows = [(*row[LOOKS_BACK - 3:], t) for row, t in zip(x.tolist(), y.tolist(), strict=True)]
    model = KneserNey(config(3)).fit(x, y)
    for n in (3, 2, 1):
        level = model.levels[n - 1]
        for context in {row[4 - n:3] for row in rows}:
            before = {row[3 - n:] for row in rows if row[4 - n:3] == context}  # with the token before the context
            key = sum(token * V**i for i, token in enumerate(reversed(context)))
            total = look_up(level.contexts, level.totals, torch.tensor([key])).item()
            assert total == len(before), (
                f"order {n}: the total of {context} is {total:g}, but it has {len(before)} different pairs of a token "
                "before it and a token after it: shorter contexts count neighbours, not occurrences"
            )


def test_each_context_gives_away_what_was_taken_from_it():
    """gamma(x), the share of the shorter context, is the sum of the discounts taken after x, divided by x's total."""
    # Below order 2 only the shares differ: token 0 was followed by 1, 2 and 3, seen 1, 2 and 3 times; 1 by 0, 9 times.
    model = KneserNey(config(1)).fit(*pairs({(0, 1): 1, (0, 2): 2, (0, 3): 3, (1, 0): 9}))
    unigram = KneserNey(config(0))
    unigram.levels = model.levels[:1]
    assert unigram.probs(after(0))[0, 4] > 0, "token 4 never came, but its share of P_0 = 1 / V is above 0"
    for token, gamma, sum_of in ((0, (0.5 + 1.0 + 1.5) / 6, "D1 + D2 + D3+"), (1, 1.5 / 9, "D3+")):
        new = model.probs(after(token))[0, 4] / unigram.probs(after(token))[0, 4]  # token 4 follows neither
        assert new.item() == pytest.approx(gamma), (
            f"gamma(x) is ({sum_of}) / total = {gamma:.4f} for token {token}, not {new:.4f}: the discounts of this "
            "context alone, by its own total"
        )


def test_below_the_unigram_every_token_is_alike():
    """The unigram is interpolated too, with P_0 = 1 / V: a token that the text never had gets gamma / V."""
    # Three tokens occur, 1, 2 and 3 times; discounts 0.5, 1 and 1.5; V is 5.
    x, y = torch.zeros(6, 0, dtype=torch.long), torch.tensor([0, 1, 1, 2, 2, 2])
    p = KneserNey(config(0)).fit(x, y).probs(x[:1])[0].tolist()
    gamma = (0.5 + 1 + 1.5) / 6
    assert p[3] == p[4] == pytest.approx(gamma / 5), (
        f"a token that never came has gamma * P_0 = {gamma} / 5, not {p[3]}: P_0 is 1 / V, V the whole vocabulary"
    )
    assert p[2] == pytest.approx((3 - 1.5) / 6 + gamma / 5), (
        f"one that came three times has (3 - D3+) / 6 + gamma / 5, not {p[2]}: a share of P_0 is added for every token"
    )


def test_an_unseen_context_takes_the_shorter_ones_answer():
    """After a context that the text never had, Kneser-Ney answers as if it had not seen the oldest token."""
    x, y = examples(60)
    model, shorter = KneserNey(config(2)).fit(x, y), KneserNey(config(1))
    shorter.levels = model.levels[:2]  # the shortest first: unigram, bigram
    unseen = torch.tensor([[4, token] for token in range(4)])  # the text has no token 4
    gap = (model.probs(unseen) - shorter.probs(unseen)).abs().max()
    assert gap < 1e-12, f"an unseen context takes the shorter one's answer unchanged, not {gap:.2g} away"


def test_shorter_contexts_count_neighbours_not_occurrences():
    """For an unseen context a token's weight is how many different tokens it followed, not how often it occurred."""
    # "San Francisco" ten times; "the" after nine different words. Tokens: 0 San, 1 Francisco, 2 the, 3..11 the words.
    x, y = pairs({(0, 1): 10} | {(word, 2): 1 for word in range(3, 12)})
    model = KneserNey(ModelConfig(vocab_size=12, block_size=1)).fit(x, y)
    francisco, the = model.probs(after(1))[0, [1, 2]].tolist()  # nothing in the text comes after "Francisco"
    # Ten different pairs: "Francisco" after 1 word, "the" after 9. Discounts 0.5, 1, 1.5 of the small text.
    rest = (0.5 + 1.5) / 10 / 12
    raw = (10 - 1.5) / 19 + (1.5 + 1.5) / 19 / 12
    assert francisco != pytest.approx(raw), "raw counts: Francisco came ten times, but only ever after San"
    assert francisco == pytest.approx((1 - 0.5) / 10 + rest), (
        f"Francisco followed one word, in 10 different pairs: {(1 - 0.5) / 10 + rest:.4f}, not {francisco:.4f}"
    )
    assert the == pytest.approx((9 - 1.5) / 10 + rest), (
        f"`the` followed nine words, in 10 different pairs: {(9 - 1.5) / 10 + rest:.4f}, not {the:.4f}"
    )


class Reference:
    """Modified Kneser-Ney as Chen & Goodman write it, with dictionaries, tuples and floats. Slow."""

    def __init__(self, x, y, T: int):
        grams = [tuple(row[len(row) - T:]) + (t,) for row, t in zip(x.tolist(), y.tolist(), strict=True)]
        self.count = {T + 1: Counter(grams)}
        for n in range(T, 0, -1):
            # N1+(. g): in front of how many different tokens did the n-gram g stand?
            before = defaultdict(set)
            for gram in {gram[T - n:] for gram in grams}:
                before[gram[1:]].add(gram[0])
            self.count[n] = {gram: len(tokens) for gram, tokens in before.items()}
        self.discount = {n: self.estimate(table.values()) for n, table in self.count.items()}

    @staticmethod
    def estimate(counts):
        n1, n2, n3, n4 = (sum(c == i for c in counts) for i in (1, 2, 3, 4))
        if not (n1 and n2 and n3 and n4):
            return 0.5, 1.0, 1.5
        Y = n1 / (n1 + 2 * n2)
        D = 1 - 2 * Y * n2 / n1, 2 - 3 * Y * n3 / n2, 3 - 4 * Y * n4 / n3
        return tuple(max(d, 0.0) for d in D)

    def p(self, target: int, context: tuple) -> float:
        n = len(context) + 1
        below = self.p(target, context[1:]) if context else 1 / V
        table, (D1, D2, D3) = self.count[n], self.discount[n]
        after = [table[context + (w,)] for w in range(V) if context + (w,) in table]
        if not after:
            return below
        N1, N2, N3 = sum(c == 1 for c in after), sum(c == 2 for c in after), sum(c >= 3 for c in after)
        c = table.get(context + (target,), 0)
        D = 0.0 if c == 0 else D1 if c == 1 else D2 if c == 2 else D3
        gamma = (D1 * N1 + D2 * N2 + D3 * N3) / sum(after)
        return (c - D) / sum(after) + gamma * below


@pytest.mark.parametrize("length", [60, 900])  # too short for an estimate at some orders, and long enough
@pytest.mark.parametrize("T", [0, 1, 2, 3])
def test_kneser_ney_matches_its_equations(T, length):
    """Kneser-Ney gives the probabilities of Chen & Goodman's equations, for every context and token, seen or unseen."""
    x, y = examples(length)
    model, reference = KneserNey(config(T)).fit(x, y), Reference(x, y, T)
    contexts = every_context(T)
    for context, row in zip(contexts.tolist(), model.probs(contexts).tolist(), strict=True):
        expected = [reference.p(target, tuple(context)) for target in range(V)]
        assert row == pytest.approx(expected, abs=1e-12), (
            f"after {context} the equations give {expected}, the model {row}: the parts are tested one by one above, "
            "so look at how `prob` puts them together"
        )


@pytest.mark.parametrize("Model", [NGram, KneserNey])
def test_a_bigram_gives_each_pair_its_share(Model):
    """What follows a token most often is the likeliest after it, with its share of the token's pairs."""
    x, y = examples()
    bigram = Model(config(1)).fit(x, y)
    counts = Counter(zip(x[:, -1].tolist(), y.tolist(), strict=True))
    first = Counter(x[:, -1].tolist())
    p = bigram.probs(torch.tensor([[1, 2, 3, 0]]))[0]
    likeliest = max(range(V), key=lambda target: counts[0, target])
    assert p.argmax() == likeliest, "what follows token 0 most often is not the likeliest after it"
    assert p[likeliest].item() == pytest.approx(counts[0, likeliest] / first[0], abs=0.01), "the share of its pairs"


def test_softmax_matches_torch():
    """Softmax agrees with torch's on any number of axes, and normalises rows, in a square table too."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((7,), (4, 4), (3, 4), (5, 5, 5), (2, 3, 5)):
        logits = 3 * torch.randn(shape, generator=generator, dtype=torch.double)
        probs = softmax(logits)
        assert probs.shape == logits.shape, "softmax keeps the shape"
        sums = probs.sum(-1)
        assert torch.allclose(sums, torch.ones_like(sums)), f"{shape}: divided by the sums of other rows (keepdim)"
        assert torch.allclose(probs, torch.softmax(logits, -1), atol=1e-12), f"{shape}: not torch's softmax"
    assert softmax(torch.tensor([0.0, math.log(3)])).tolist() == pytest.approx([0.25, 0.75]), "e^0 : e^(ln 3) = 1 : 3"


def test_softmax_of_large_scores():
    """Only differences between scores matter, so scores of 1,000 and of -1,000 neither overflow nor vanish."""
    small = torch.tensor([1.0, 2.0, 4.0])
    for shift in (1000.0, -1000.0, 1e6):
        probs = softmax(small + shift)
        assert torch.isfinite(probs).all(), f"scores around {shift:g} overflow in exp: subtract the largest first"
        assert torch.allclose(probs, torch.softmax(small, -1), atol=1e-6), "a shift of all scores changed them"


def test_each_row_of_softmax_has_its_own_largest_score():
    """Rows of very different size, side by side, are each turned into probabilities as if they were alone."""
    small = torch.tensor([1.0, 2.0, 4.0])
    probs = softmax(torch.stack([small, small - 1000, small + 1000]))
    assert torch.isfinite(probs).all(), f"{probs.tolist()}: one maximum for all rows makes those far below it 0 / 0"
    assert torch.allclose(probs, torch.softmax(small, -1).expand(3, 3), atol=1e-6), "a row depends on the others"
    probs = softmax(torch.tensor([0.0, 0.0, 1000.0])).tolist()
    assert probs == [0, 0, 1], f"{probs}: the largest score is subtracted, not the mean, or e ** 667 overflows"


def test_softmax_gradient():
    """The gradient of the loss by the scores is the probabilities, less 1 for the target, divided by the examples."""
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(0), dtype=torch.double, requires_grad=True)
    y = torch.tensor([0, 4, 2, 2, 1, 3])
    ours = -softmax(logits).gather(1, y[:, None]).log().mean()
    (gradient,) = torch.autograd.grad(ours, logits)
    expected = (torch.softmax(logits, -1) - torch.eye(V, dtype=torch.double)[y]) / 6
    assert torch.allclose(gradient, expected, atol=1e-12), "the gradient is (p - one_hot) / N"


def test_the_neural_bigram_starts_knowing_nothing():
    """Before training the neural bigram holds every token equally likely."""
    probs = NeuralBigram(config(1)).probs(every_context(2))
    assert torch.allclose(probs, torch.full_like(probs, 1 / V)), "equal scores are equal probabilities"


def test_the_neural_bigram_reads_the_newest_token():
    """The scores of the next token are the table's row of the newest token in the context."""
    model = NeuralBigram(config(1))
    model.table = torch.arange(V * V, dtype=torch.float).view(V, V)
    found = model.logits(torch.tensor([[1, 2, 3], [4, 4, 0]])).tolist()
    assert found == [[15, 16, 17, 18, 19], [0, 1, 2, 3, 4]], f"not the table's rows 3 and 0 but {found}"


def test_the_neural_bigram_can_learn():
    """The loss has a gradient for the table, in the rows of the contexts that were shown and in no others."""
    model = NeuralBigram(config(1))
    x, y = torch.tensor([[0, 2], [1, 2], [2, 3]]), torch.tensor([1, 1, 0])
    listed = list(model.parameters())
    assert len(listed) == 1 and listed[0] is model.table, "parameters() must list the table, or nobody moves it"
    assert model.table.requires_grad, "a table that requires no gradient gets none"
    p = model.prob(x, y)
    assert p.requires_grad, "on the way from the table to `prob` the graph is cut"
    p.log().mean().backward()
    moved = model.table.grad.abs().sum(1).nonzero().flatten().tolist()
    assert moved == [2, 3], f"the contexts end in 2 and 3, but the rows {moved} get a gradient"


@pytest.mark.parametrize("T", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("Model", [NGram, KneserNey, NeuralBigram])
def test_probabilities_sum_to_one(Model, T):
    """Whatever the model, its order and the context, seen or not, the probabilities of all tokens sum to one."""
    if Model is NeuralBigram:
        model = NeuralBigram(config(1))
        model.table = 30 * torch.randn(V, V, generator=torch.Generator().manual_seed(T))
    else:
        model = Model(config(T, add_k=0.3)).fit(*examples(300))
    probs = model.probs(every_context(4))  # 625 contexts, of which the text has but a part
    assert probs.shape == (V**4, V), "one probability for each context and token"
    assert (probs >= 0).all(), f"{probs.min():.3g} is a probability: more was taken from a count than it has"
    gap = (probs.double().sum(1) - 1).abs().max().item()
    assert gap < 1e-6, f"the probabilities of some context sum to 1 +- {gap:.2g}: mass got lost or was counted twice"
    if Model is not NeuralBigram:
        assert (probs > 0).all(), "a probability is 0, but one impossible token makes a whole text impossible"


@pytest.mark.parametrize("Model", [NGram, KneserNey, NeuralBigram])
def test_prob_is_an_entry_of_probs(Model):
    """The probability of one token is that token's entry in the distribution over all."""
    x, y = examples(100)
    model = Model(config(1))
    if Model is NeuralBigram:
        model.table = torch.randn(V, V, generator=torch.Generator().manual_seed(1))
    else:
        model.fit(x, y)
    rows = model.probs(x).tolist()
    expected = [row[target] for row, target in zip(rows, y.tolist(), strict=True)]
    assert model.prob(x, y).tolist() == pytest.approx(expected), "prob and probs disagree"
    shape = tuple(model.prob(x[:1], y[:1]).shape)
    assert shape == (1,), f"one example has one probability, [1], not {shape}: `squeeze()` drops a batch of one"


def test_params_are_the_numbers_stored():
    """An n-gram model stores what occurs, not what could: its size is the number of distinct n-grams and contexts."""
    x, y = examples(300)
    rows = torch.cat([x, y[:, None]], 1).tolist()

    def distinct(n, drop=0):
        return len({tuple(row[len(row) - n:len(row) - drop]) for row in rows})

    found, expected = NGram(config(2)).fit(x, y).n_params(), distinct(3) + distinct(3, 1)
    assert found == expected, f"{found}, not {expected}: one number per distinct n-gram and one per distinct context"
    found = KneserNey(config(2)).fit(x, y).n_params()
    expected = sum(distinct(n) + 2 * distinct(n, 1) for n in (1, 2, 3))
    assert found == expected, f"{found}, not {expected}: at each order one per n-gram, and total and freed per context"
    found = NeuralBigram(config(1)).n_params()
    assert found == V * V, f"{found}, not {V * V}: a score for every pair of tokens"


def test_the_longest_context_that_fits_works():
    """As long as V ** (block_size + 1) is below 2 ** 63, the highest n-gram still has a number of its own."""
    for vocab_size, block_size in ((65, 9), (2, 61)):
        x, y = torch.full((3, block_size), vocab_size - 1), torch.full((3,), vocab_size - 1)
        for Model in (NGram, KneserNey):
            p = Model(ModelConfig(vocab_size, block_size, add_k=1e-9)).fit(x, y).prob(x, y)
            assert (p > 0.5).all(), f"{vocab_size} ** {block_size + 1} fits into 64 bits, but the n-gram is not found"


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 5, "block_size": -1}, "block_size"),
        ({"vocab_size": 65, "block_size": 10}, "64 bits"),
        ({"vocab_size": 2, "block_size": 62}, "64 bits"),
        ({"vocab_size": 5, "add_k": 0.0}, "add_k"),
        ({"vocab_size": 5, "add_k": -1.0}, "add_k"),
        ({"vocab_size": 5, "add_k": math.inf}, "add_k"),
        ({"vocab_size": 5, "add_k": math.nan}, "add_k"),
        ({"vocab_size": 65, "add_k": 1e307}, "add_k"),  # finite, but k times V is not
    ],
)
def test_impossible_shapes_are_refused(shape, named):
    """A model that cannot be built, or whose n-grams do not fit into 64-bit integers, is refused with the reason."""
    with pytest.raises(BadInput, match=named):
        ModelConfig(**shape)
        pytest.fail(f"{shape} is not refused: {named}")
