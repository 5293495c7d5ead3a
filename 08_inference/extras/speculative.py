"""Speculative decoding: a cheap draft guesses some tokens, and the model checks them all in one pass.

Decode waits for memory: a pass over eight tokens fetches the same weights as a pass over one, and takes hardly longer.
So n tokens are drafted by something cheap, and the model (the "target") reads them together. It scores every place at
once: what it would have said there itself. From the left, each drafted token is taken or refused, until the first that
is refused; then the target draws one token itself. A pass gives 1 to n + 1 tokens.

The text has exactly the law that it has without a draft, for any draft and any sampling settings. Where the draft drew
token x from its law q, and the target's law is p:

- x is taken with probability min(1, p(x) / q(x));
- else a token is drawn from (p - q)+ / sum (p - q)+, where z+ is max(0, z): what the draft gives too rarely.

    p = [0.5, 0.5, 0], q = [0.8, 0, 0.2]: token 0 is taken with probability 0.5 / 0.8, token 2 never. 0.8 * 0.5 / 0.8
    = 0.5 is token 0's share. All the rest is refused, and drawn from [0, 0.5, 0] / 0.5: token 1's share is 0.5.

A token is taken with probability sum min(p, q): a bad draft costs time and no quality. At temperature 0 the laws have
one token each, and a drafted token is taken if it is the target's own choice.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), algorithm 1; Chen et al.,
"Accelerating Large Language Model Decoding with Speculative Sampling" (2023), algorithm 2. p and q are the laws after
temperature, top-k and top-p. Shapes: n drafted tokens, V tokens in the vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

from shared.errors import BadInput

import torch
import torch.nn.functional as F

from cache import Cache
from sample import CHUNK, SampleConfig, evaluation, filter_logits, prefill


def law(logits, config: SampleConfig):
    """The probabilities that tokens are drawn with: scores [V] -> [V], float64."""
    if config.temperature == 0:  # the likeliest, without sorting the vocabulary
        return F.one_hot(logits.argmax(-1), len(logits)).double()
    return F.softmax(filter_logits(logits, config), dim=-1)


def pick(probs, generator=None) -> int:
    """A token drawn from a law [V]."""
    return torch.multinomial(probs, 1, generator=generator).item()


def happens(probability: float, generator=None) -> bool:
    """True with this probability."""
    return torch.rand((), dtype=torch.double, generator=generator).item() < probability


class Draft(Protocol):
    """What guesses the next tokens."""

    vocab_size: int  # the target's: a token is a number, and must mean the same to both

    def propose(self, tokens: list[int], n: int):
        """Up to n tokens that may follow `tokens`, and the laws [up to n, V] that each was drawn from."""


@dataclass
class Counts:
    """How it went. Every pass gives one token beside those that it accepts."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0


def verify(drafted: list[int], laws, logits, config: SampleConfig, generator=None) -> list[int]:
    """The tokens that a pass gives: drafted ones up to the first that is refused, and one of the target.

    drafted [n], each drawn from its row of laws [n, V]; the target's scores are logits [n + 1, V], row i for the place
    of drafted token i, the last row for the place after them.
    """
    for i, token in enumerate(drafted):
        p, q = law(logits[i], config), laws[i]
        if happens(min(1.0, (p[token] / q[token]).item()), generator):
            continue
        rest = (p - q).clamp(min=0)
        if rest.sum() == 0:  # p is q, but for a rounding that made the ratio smaller than 1
            rest = p
        return [*drafted[:i], pick(rest / rest.sum(), generator)]
    return [*drafted, pick(law(logits[len(drafted)], config), generator)]


@torch.no_grad()
def speculate(model, ids: list[int], draft: Draft, n: int, config: SampleConfig, generator=None, stop=(), counts=None):
    """Yield the tokens that follow `ids`, one by one, until one of `stop`: as `generate` draws them, only faster.

    Up to n tokens are drafted for each pass; `counts` is kept up to date. Raises BadInput for n < 1, for a draft with
    another vocabulary, and for a text of no tokens or of more than the model looks back over.
    """
    if n < 1:
        raise BadInput(f"{n} drafted tokens: at least 1, or there is nothing to check")
    if draft.vocab_size != model.config.vocab_size:
        raise BadInput(f"the draft has {draft.vocab_size} tokens, the model {model.config.vocab_size}: "
                       "both must have the same vocabulary")
    if not ids:
        raise BadInput("no tokens to go on from: give at least 1")
    text, counts, device = list(ids), counts or Counts(), model.tok_emb.weight.device
    cache = Cache(model, most=max(n + 1, min(CHUNK, len(text))))
    with evaluation(model):
        logits = prefill(model, torch.tensor([text], device=device), cache)  # [1, V]
    new = [pick(law(logits[0].cpu(), config), generator)]
    while True:
        for token in new:
            text.append(token)
            yield token
            if token in stop:
                return
        # The cache has all of the text but the newest token.
        drafted, laws = draft.propose(text, n)
        with evaluation(model):
            logits = model(torch.tensor([[text[-1], *drafted]], device=device), cache)[0].cpu()  # [1 + n, V]
        new = verify(drafted, laws, logits, config, generator)
        accepted = len(new) - 1
        cache.rewind(cache.lengths - (len(drafted) - accepted))  # what was refused is no part of the text
        counts.passes += 1
        counts.drafted += len(drafted)
        counts.accepted += accepted


class LookUp:
    """The draft that costs nothing: where the newest tokens stood before, what followed them may follow again.

    With `longest` 2, after 5 6 7 8 5 6 the newest two stood at the start: 7 8 5 ... is proposed. It is sure of it: its
    laws have one token each. Of several places the newest counts; without any, nothing is proposed.
    Saxena, "Prompt Lookup Decoding" (2023).
    """

    def __init__(self, vocab_size: int, longest: int = 3):
        self.vocab_size, self.longest = vocab_size, longest

    def find(self, text: list[int]) -> int | None:
        """The place behind the newest earlier occurrence of the text's end, of as many tokens as there is one for."""
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            end = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start + size - 1] == end[-1] and text[start:start + size] == end:
                    return start + size
        return None

    def propose(self, tokens: list[int], n: int):
        text, place = list(tokens), self.find(tokens)
        for i in range(0 if place is None else n):
            text.append(text[place + i])  # beyond the text's end, what was just copied is copied again
        ids = text[len(tokens):]
        return ids, F.one_hot(torch.tensor(ids, dtype=torch.long), self.vocab_size).double()


class Drawn:
    """A draft that draws its tokens one after the other from `scores(text)` [V], as the target does from its own.

    Its settings may be others than the target's, at the price of fewer tokens taken.
    """

    def __init__(self, vocab_size: int, config: SampleConfig, generator=None):
        self.vocab_size, self.config, self.generator = vocab_size, config, generator

    def propose(self, tokens: list[int], n: int):
        text, laws = list(tokens), []
        for _ in range(n):
            laws.append(law(self.scores(text), self.config))
            text.append(pick(laws[-1], self.generator))
        return text[len(tokens):], torch.stack(laws)


class ModelDraft(Drawn):
    """A small model as the draft, with a cache of its own."""

    def __init__(self, model, config: SampleConfig, generator=None):
        super().__init__(model.config.vocab_size, config, generator)
        self.model, self.cache, self.read = model, None, []

    @torch.no_grad()
    def scores(self, text: list[int]):
        """Its scores after `text`, of which it reads what it has not read yet. Raises BadInput for too long a text."""
        same = min(len(self.read), len(text) - 1)  # one token at least is read, or there are no scores
        while self.read[:same] != text[:same]:
            same -= 1
        if self.cache is None or len(self.read) - same >= self.cache.most:  # another text
            self.cache, self.read, same = Cache(self.model, most=CHUNK), [], 0
        # It has read its own guesses. Those that were refused, and all after them, are no part of the text.
        self.cache.rewind(self.cache.lengths - (len(self.read) - same))
        with evaluation(self.model):
            new = torch.tensor([text[same:]], device=self.model.tok_emb.weight.device)
            logits = prefill(self.model, new, self.cache)[0].cpu()  # [V]
        self.read = list(text)
        return logits


def discounts(counts):
    """What to take from an n-gram seen 0, 1, 2, 3 or more times: counts [K] -> [0, D1, D2, D3+], float64 [4].

    D_i = i - (i + 1) Y n_{i+1} / n_i with Y = n_1 / (n_1 + 2 n_2), where n_i n-grams were seen exactly i times
    (Chen & Goodman 1998, equation 26), and not below 0. A text too small for that gives 0.5, 1, 1.5.
    """
    n = [(counts == i).sum().item() for i in range(5)]
    if 0 in n[1:]:
        return torch.tensor([0, 0.5, 1, 1.5], dtype=torch.double)
    y = n[1] / (n[1] + 2 * n[2])
    return torch.tensor([0] + [max(0, i - (i + 1) * y * n[i + 1] / n[i]) for i in (1, 2, 3)], dtype=torch.double)


class NGramDraft(Drawn):
    """Counts as the draft: interpolated modified Kneser-Ney, the best that counting does.

    P_n(y | x) = (count - D) / total + freed / total * P_{n-1}(y | shorter x). The longest contexts count how often y
    follows; shorter ones count after how many different tokens it does. Below the unigram all tokens are alike.
    Kneser & Ney (1995); Chen & Goodman, "An Empirical Study of Smoothing Techniques" (1998), section 3.
    """

    def __init__(self, tokens, vocab_size: int, order: int, config: SampleConfig, generator=None):
        """Count the n-grams of tokens [N], up to `order` tokens long. Raises BadInput where that cannot be done."""
        super().__init__(vocab_size, config, generator)
        # An n-gram is one integer, its oldest token in the highest place: 1 2 3 with ten tokens is 123.
        if order < 1 or vocab_size**order >= 2**63:
            raise BadInput(f"n-grams of {order} among {vocab_size} tokens: at least 1, and what fits into 64 bits")
        if len(tokens) < order:
            raise BadInput(f"a text of {len(tokens)} tokens has no n-gram of {order}: use a longer text")
        places = torch.tensor([vocab_size**i for i in range(order - 1, -1, -1)])
        keys, counts = (tokens.long().unfold(0, order, 1) @ places).unique(return_counts=True)
        self.levels = []  # of each order, the shortest first: n-grams [K], sorted, counts, and what is taken from these
        for n in range(order, 0, -1):
            self.levels.insert(0, (keys, counts, discounts(counts)[counts.clamp(max=3)]))
            # Each n-gram counts once for the shorter one that it ends in, however often it occurs.
            keys, counts = (keys % vocab_size ** (n - 1)).unique(return_counts=True)

    def scores(self, text: list[int]):
        """ln P of each token after `text`: [V], float64."""
        V = self.vocab_size
        p = torch.full((V,), 1 / V, dtype=torch.double)
        for n, (keys, counts, taken) in enumerate(self.levels[:len(text) + 1]):  # n tokens of context
            context = 0
            for token in text[len(text) - n:]:
                context = context * V + token
            # What follows a context stands together: its n-grams are context * V + y.
            first, end = torch.searchsorted(keys, torch.tensor([context, context + 1]) * V).tolist()
            if first == end:  # never seen: longer ones were not either
                break
            total, freed = counts[first:end].sum(), taken[first:end].sum()
            p = freed / total * p
            p[keys[first:end] - context * V] += (counts[first:end] - taken[first:end]) / total
        return p.log()
