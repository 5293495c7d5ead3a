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
        assert row == pytest.approx(expected, abs=1e-12), f"context {context}: not (count + k) / (total + k V)"


@pytest.mark.parametrize("Model", [NGram, KneserNey])
def test_an_n_gram_looks_at_the_newest_tokens(Model):
    """Given longer contexts than it needs, an n-gram reads the newest tokens: those next to the one it predicts."""
    x, y = examples()
    for T in (0, 1, 2):
        long = Model(config(T)).fit(x, y)
        short = Model(config(T)).fit(x[:, LOOKS_BACK - T:], y)
        assert torch.equal(long.prob(x, y), short.prob(x[:, LOOKS_BACK - T:], y)), "the wrong end of the context"
    bigram = Model(config(1)).fit(x, y)
    seen = Counter(zip(x[:, -1].tolist(), y.tolist(), strict=True))
    first = Counter(x[:, -1].tolist())
    p = bigram.probs(torch.tensor([[1, 2, 3, 0]]))[0]
    likeliest = max(range(V), key=lambda target: seen[0, target])
    assert p.argmax() == likeliest, "what follows token 0 most often is not the likeliest after it"
    assert p[likeliest].item() == pytest.approx(seen[0, likeliest] / first[0], abs=0.01), "the share of its pairs"


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
    assert (probs >= 0).all(), "a negative probability"
    gap = (probs.double().sum(1) - 1).abs().max().item()
    assert gap < 1e-6, f"the probabilities of some context sum to 1 +- {gap:.2g}: mass got lost or was counted twice"
    if Model is not NeuralBigram:
        assert (probs > 0).all(), "a token that never came has probability 0: smoothing must leave nothing impossible"


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


def test_the_three_discounts_by_hand():
    """The discounts of n-grams seen once, twice and more often follow from how many were seen 1, 2, 3 and 4 times."""
    # 10 seen once, 5 twice, 2 three times, 1 four times: Y = 10 / (10 + 2 * 5) = 1/2, so that
    # D1 = 1 - 2 Y 5/10 = 0.5   D2 = 2 - 3 Y 2/5 = 1.4   D3 = 3 - 4 Y 1/2 = 2
    counts = torch.tensor([1] * 10 + [2] * 5 + [3] * 2 + [4] + [7] * 3)
    assert discounts(counts).tolist() == pytest.approx([0, 0.5, 1.4, 2.0]), "D_i = i - (i + 1) Y n_(i+1) / n_i"
    # 20 once, 4 twice, 2 three times, 1 four times: Y = 20/28 = 5/7, D1 = 5/7, D2 = 13/14, D3 = 11/7
    counts = torch.tensor([3, 3, 4] + [1] * 20 + [2] * 4)
    assert discounts(counts).tolist() == pytest.approx([0, 5 / 7, 13 / 14, 11 / 7])


def test_discounts_on_odd_texts():
    """A text too small for the estimate gets fixed discounts, and no discount exceeds the count it is taken from."""
    assert discounts(torch.tensor([1, 1, 2])).tolist() == [0, 0.5, 1, 1.5], "no n-gram was seen 3 times: no estimate"
    # 1 once, 8 twice, 1 three times, 8 four times: Y = 1/17, D1 = 1/17, D2 = 2 - 3/136, D3 = 3 - 32/17
    counts = torch.tensor([1] + [2] * 8 + [3] + [4] * 8)
    assert discounts(counts).tolist() == pytest.approx([0, 1 / 17, 2 - 3 / 136, 3 - 32 / 17])
    # 4 once, 1 twice, 4 three times, 9 four times: Y = 2/3, and 2 - 3 Y 4 = -6, 3 - 4 Y 9/4 = -3 would add to counts
    counts = torch.tensor([1] * 4 + [2] + [3] * 4 + [4] * 9)
    assert discounts(counts).tolist() == pytest.approx([0, 2 / 3, 0, 0]), "a negative discount would add to a count"


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
        assert row == pytest.approx(expected, abs=1e-12), f"context {context}: not the probabilities of the equations"


def test_shorter_contexts_count_neighbours_not_occurrences():
    """For an unseen context a token's weight is how many different tokens it followed, not how often it occurred."""
    # "San Francisco" ten times; "the" after nine different words. Tokens: 0 San, 1 Francisco, 2 the, 3..11 the words.
    pairs = [(0, 1)] * 10 + [(word, 2) for word in range(3, 12)]
    x, y = torch.tensor([[a] for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    unseen = torch.tensor([[1]])  # nothing in the text comes after "Francisco"
    francisco, the = KneserNey(ModelConfig(vocab_size=12, block_size=1)).fit(x, y).probs(unseen)[0, [1, 2]].tolist()
    # Two continuations in all, "Francisco" after 1 word and "the" after 9: discounts 0.5, 1, 1.5 of the small text.
    assert the == pytest.approx((9 - 1.5) / 10 + (0.5 + 1.5) / 10 / 12), "N1+(. the) = 9 of 10"
    assert francisco == pytest.approx((1 - 0.5) / 10 + (0.5 + 1.5) / 10 / 12), "raw counts, not continuations"


def test_params_are_the_numbers_stored():
    """An n-gram model stores what occurs, not what could: its size is the number of distinct n-grams and contexts."""
    x, y = examples(300)
    rows = torch.cat([x, y[:, None]], 1).tolist()

    def distinct(n, drop=0):
        return len({tuple(row[len(row) - n:len(row) - drop]) for row in rows})

    assert NGram(config(2)).fit(x, y).n_params() == distinct(3) + distinct(3, 1), "n-grams and contexts"
    levels = sum(distinct(n) + 2 * distinct(n, 1) for n in (1, 2, 3))
    assert KneserNey(config(2)).fit(x, y).n_params() == levels, "for each order: n-grams, and two numbers per context"
    assert NeuralBigram(config(1)).n_params() == V * V, "a score for every pair of tokens"


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
    assert model.logits(torch.tensor([[1, 2, 3], [4, 4, 0]])).tolist() == [[15, 16, 17, 18, 19], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"vocab_size": 5, "block_size": -1}, "block_size -1"),
        ({"vocab_size": 65, "block_size": 10}, "do not fit into 64 bits"),
        ({"vocab_size": 5, "add_k": 0.0}, "add_k is 0.0"),
        ({"vocab_size": 5, "add_k": -1.0}, "add_k is -1.0"),
    ],
)
def test_impossible_shapes_are_refused(shape, message):
    """A model that cannot be built, or whose n-grams do not fit into 64-bit integers, is refused with the reason."""
    with pytest.raises(BadInput, match=message):
        ModelConfig(**shape)
    assert ModelConfig(vocab_size=65, block_size=9).block_size == 9, "65 ** 10 fits"


def test_a_context_that_is_too_short_is_no_silent_mistake():
    """A model is never given fewer tokens than it looks back without an error."""
    with pytest.raises(AssertionError, match="shorter than the model looks back"):
        NGram(config(3)).fit(torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long))
