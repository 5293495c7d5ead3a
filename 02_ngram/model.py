"""Three models of the next character: smoothed counts, Kneser-Ney, and the bigram as a trained softmax.

Each answers two questions about contexts x [N, T] (the newest token last): `prob(x, y)`, how likely is the token y [N],
and `probs(x)` [N, V], how likely is every token. Shapes: N examples, T tokens of context, V tokens in the vocabulary.
Counts are int64. What is computed from them is float64: float32 is exact only up to 2 ** 24, and texts are longer.
"""

from dataclasses import dataclass

from shared.errors import BadInput

import torch


@dataclass
class ModelConfig:
    """The model's shape. Raises BadInput for a shape that cannot be built, or where n-grams need more than 64 bits.

    An n-gram is stored as one integer (see `pack`), so vocab_size ** (block_size + 1) must be below 2 ** 63.
    """

    vocab_size: int
    block_size: int = 6  # characters of context: an n-gram of order n looks back n - 1
    add_k: float = 0.01  # pretend that every n-gram was seen this often before counting; in (0, 1e12]

    def __post_init__(self):
        if self.vocab_size < 1 or self.block_size < 0:
            raise BadInput(f"vocab_size {self.vocab_size}, block_size {self.block_size}: need at least 1 and 0")
        if self.vocab_size ** (self.block_size + 1) >= 2**63:
            power = f"{self.vocab_size} characters to the power of {self.block_size + 1}"
            raise BadInput(f"{power} do not fit into 64 bits: use a shorter context")
        if not 0 < self.add_k <= 1e12:  # nan fails every comparison, so it is refused too
            why = "above 0, or one unseen n-gram makes a text impossible, and at most 1e12"
            raise BadInput(f"add_k is {self.add_k}: it must be {why}")


def pack(tokens, base: int):
    """Rows of tokens [N, k] as integers [N], the oldest token in the highest place: [1, 2, 3] in base 10 -> 123.

    So `code // base` drops the newest token (what is left is the context) and `code % base ** (k - 1)` the oldest.
    """
    code = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.unbind(1):
        code = code * base + column
    return code


def look_up(keys, values, queries):
    """values[i] where keys[i] == query, 0 for a query that is not among the sorted keys: [K], [K], [N] -> [N].

    keys [3, 5], values [30, 50], queries [5, 4] -> [50, 0].
    """
    i = torch.searchsorted(keys, queries).clamp(max=len(keys) - 1)
    return torch.where(keys[i] == queries, values[i], 0)


class NGram:
    """Counts with add-k smoothing: P(y | x) = (count(x, y) + k) / (count(x) + k V).

    count(x) is the sum of count(x, y) over all y. A context that was never seen gives every token 1 / V. `fit` stores
    `keys` and `counts`, the n-grams, and `contexts` and `totals`, what `look_up` needs; all int64.
    """

    def __init__(self, config: ModelConfig):
        self.config = config

    def grams(self, x, y):
        """Each context's newest `block_size` tokens and the token after them, packed: x [N, T], y [N] -> [N].

        Raises AssertionError when T < block_size.
        """
        assert x.shape[1] >= self.config.block_size, "the contexts are shorter than the model looks back"
        x = x[:, x.shape[1] - self.config.block_size:]  # the newest tokens; [-block_size:] would be wrong for 0
        return pack(torch.cat([x, y[:, None]], dim=1), self.config.vocab_size)

    def fit(self, x, y):
        """Count the n-grams of x [N, T], y [N], forget those of an earlier text, and return the model itself.

        Only n-grams that occur are stored, sorted (`unique` sorts), so that any order fits in memory.
        """
        self.keys, self.counts = self.grams(x, y).unique(return_counts=True)
        self.contexts, where = (self.keys // self.config.vocab_size).unique(return_inverse=True)
        self.totals = torch.zeros(len(self.contexts), dtype=torch.long).index_add_(0, where, self.counts)
        return self

    def prob(self, x, y):
        """P(y | x): x [N, T], y [N] -> [N], float64."""
        grams = self.grams(x, y)
        count = look_up(self.keys, self.counts, grams).double()
        total = look_up(self.contexts, self.totals, grams // self.config.vocab_size).double()
        return (count + self.config.add_k) / (total + self.config.add_k * self.config.vocab_size)

    def probs(self, x):
        """P(. | x) by asking `prob` for every token in turn: x [N, T] -> [N, V], float64."""
        V = self.config.vocab_size
        every = torch.arange(V).repeat(len(x))
        return self.prob(x.repeat_interleave(V, dim=0), every).view(len(x), V)

    def n_params(self) -> int:
        """Numbers stored: one per distinct n-gram and one per distinct context."""
        return len(self.keys) + len(self.contexts)


@dataclass
class Level:
    """One order of a Kneser-Ney model: what is left of each count, and the mass each context gives away.

    K n-grams x y, M contexts x. count is c(x y) of Chen & Goodman's equations, discount is D(c(x y)), and
    freed / total is their gamma(x). All but keys and contexts are float64.
    """

    keys: torch.Tensor  # n-grams that occur, packed and sorted [K]
    kept: torch.Tensor  # count - discount [K]
    contexts: torch.Tensor  # contexts that occur, packed and sorted [M]
    totals: torch.Tensor  # sum of counts over a context's continuations [M]
    freed: torch.Tensor  # sum of discounts over a context's continuations [M]


def discounts(counts):
    """How much to take from an n-gram seen 0, 1, 2, 3 or more times: counts [K] -> [0, D1, D2, D3+], float64 [4].

    D_i = i - (i + 1) Y n_{i+1} / n_i with Y = n_1 / (n_1 + 2 n_2), where n_i n-grams were seen exactly i times
    (Chen & Goodman 1998, equation 26). Where this is negative, take 0. Where one of n_1 to n_4 is 0, the text is too
    small for the estimate: take 0.5, 1, 1.5.
    """
    n = [(counts == i).sum().item() for i in range(5)]
    if 0 in n[1:]:
        return torch.tensor([0, 0.5, 1, 1.5], dtype=torch.double)
    y = n[1] / (n[1] + 2 * n[2])
    taken = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
    # Where n_{i+1} is large beside n_i, as in repetitive texts, the estimate falls below 0. Such a discount would add
    # to the counts, and the shorter context could get a negative share. The estimate is never above i.
    return torch.tensor([0] + [max(d, 0) for d in taken], dtype=torch.double)


class KneserNey(NGram):
    """Interpolated modified Kneser-Ney: P_n(y | x) = (count - D) / total + freed / total * P_{n-1}(y | shorter x).

    Only the longest contexts use raw counts. "Francisco" is frequent, but only ever after "San": as a guess for an
    unseen context it is poor. So in every shorter context the count of an n-gram is the number of *different* tokens
    that stand before it in the text. The recursion ends below the unigram, at P_0 = 1 / V for every token; so even a
    token that the text never had gets a share. A context that was never seen takes P_{n-1} unchanged.
    Kneser & Ney (1995); Chen & Goodman, "An Empirical Study of Smoothing Techniques" (1998), section 3.
    """

    def fit(self, x, y):
        """Count at every order, into `self.levels`, the shortest first: levels[0] is the unigram. Returns the model."""
        V, order = self.config.vocab_size, self.config.block_size + 1
        keys, counts = self.grams(x, y).unique(return_counts=True)
        self.levels = []
        for n in range(order, 0, -1):
            self.levels.insert(0, self.level(keys, counts))
            # Each distinct n-gram counts once for the (n-1)-gram it ends in, however often it occurs.
            keys, counts = (keys % V ** (n - 1)).unique(return_counts=True)
        return self

    def level(self, keys, counts) -> Level:
        """One order from its n-grams, packed and sorted [K], and how often each was counted [K]."""
        discount = discounts(counts)[counts.clamp(max=3)]
        contexts, where = (keys // self.config.vocab_size).unique(return_inverse=True)
        zeros = torch.zeros(len(contexts), dtype=torch.double)
        totals = zeros.index_add(0, where, counts.double())
        return Level(keys, counts - discount, contexts, totals, zeros.index_add(0, where, discount))

    def prob(self, x, y):
        """P(y | x): x [N, T], y [N] -> [N], float64."""
        V, grams = self.config.vocab_size, self.grams(x, y)
        p = torch.full(y.shape, 1 / V, dtype=torch.double)  # P_0, below the unigram: every token alike
        for n, level in enumerate(self.levels, 1):  # from P_{n-1} to P_n
            gram = grams % V**n  # the newest n tokens, y included
            total = look_up(level.contexts, level.totals, gram // V)
            kept = look_up(level.keys, level.kept, gram)
            freed = look_up(level.contexts, level.freed, gram // V)
            # An unseen context says nothing: keep the shorter context's answer.
            p = torch.where(total > 0, (kept + freed * p) / total.clamp(min=1), p)
        return p

    def n_params(self) -> int:
        """Numbers stored, at each order: one per distinct n-gram, and per distinct context its total and its freed."""
        return sum(len(level.keys) + 2 * len(level.contexts) for level in self.levels)


def softmax(logits):
    """Scores to probabilities: exp(z_i) / sum_j exp(z_j) over the last axis, [..., V] -> [..., V].

    The largest score of each row is subtracted first: it cancels in the ratio, and exp of a large number would
    overflow. One maximum for all rows will not do: a row far below it would become 0 / 0.
    """
    exps = (logits - logits.max(dim=-1, keepdim=True).values).exp()
    return exps / exps.sum(dim=-1, keepdim=True)  # keepdim: without it [V, V] rows are divided by other rows' sums


class NeuralBigram:
    """The bigram again, as the smallest neural network: a table of V x V scores, turned into probabilities by softmax.

    Its scores start at 0, every character equally likely, and gradient descent moves them. The best it can reach
    is what counting gives at once; but a table of scores can grow into a network, and a table of counts cannot.
    """

    def __init__(self, config: ModelConfig):
        """Row i of `table` [V, V] has the scores after token i: zeros that require a gradient, float32."""
        self.config = config
        self.table = torch.zeros(config.vocab_size, config.vocab_size, requires_grad=True)

    def parameters(self):
        """What gradient descent moves: a list with the table."""
        return [self.table]

    def n_params(self) -> int:
        """Scores in the table: V * V."""
        return self.table.numel()

    def logits(self, x):
        """Scores of every next token, x [N, T] -> [N, V]: the row of the newest token in the context."""
        return self.table[x[:, -1]]

    def probs(self, x):
        """P(. | x): x [N, T] -> [N, V], with gradients, in the table's float32."""
        return softmax(self.logits(x))

    def prob(self, x, y):
        """P(y | x): x [N, T], y [N] -> [N]."""
        return self.probs(x).gather(1, y[:, None]).squeeze(1)
