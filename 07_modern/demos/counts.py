"""A 7-gram with Kneser-Ney smoothing, in small: how likely is a token, going by what stood after the few before it?"""

import math

import torch
import torch.nn.functional as F


def look_up(keys, values, queries):
    """values[i] where keys[i] == query, 0 for a query that is not among the sorted keys: [K], [K], [...] -> [...]."""
    i = torch.searchsorted(keys, queries).clamp(max=len(keys) - 1)
    return torch.where(keys[i] == queries, values[i], 0)


class Counts:
    """P_n(y | x) = (count - D) / total + freed / total * P_{n-1}(y | x without its oldest token), P_0 = 1 / V.

    Of each count of an n-gram x y a discount D is taken, and `freed`, the sum over all y, goes to the shorter context.
    There an n-gram counts once for each different token that stands before it in the text. An unseen x frees all.
    Chen & Goodman, "An Empirical Study of Smoothing Techniques" (1998), section 3: modified Kneser-Ney.
    """

    def __init__(self, text, vocab_size: int, order: int = 7):
        """Count all n-grams of the text [N] up to `order` tokens, or fewer where 64 bits cannot hold so many."""
        self.vocab_size, self.levels = vocab_size, []  # levels[n - 1] is of n-grams
        order = min(order, int(63 / math.log2(max(vocab_size, 2))))
        keys, counts = self.pack(text.long().unfold(0, order, 1)).unique(return_counts=True)
        for n in range(order, 0, -1):
            seen = counts.clamp(max=5).bincount(minlength=6)  # [6]: how many n-grams occur 0, 1, 2, 3, 4, more times
            i = torch.arange(4)
            y = seen[1] / (seen[1] + 2 * seen[2]).clamp(min=1)
            # Their equation 26. Where it is negative, as in repetitive texts, take 0; it is never above i.
            discounts = (i - (i + 1) * y * seen[i + 1] / seen[i].clamp(min=1)).clamp(min=0).double()
            taken = discounts[counts.clamp(max=3)]
            contexts, where = (keys // vocab_size).unique(return_inverse=True)
            zeros = torch.zeros(len(contexts), dtype=torch.double)
            totals, freed = (zeros.index_add(0, where, part.double()) for part in (counts, taken))
            self.levels.insert(0, (keys, counts - taken, contexts, totals, freed))
            keys, counts = (keys % vocab_size ** (n - 1)).unique(return_counts=True)

    def pack(self, grams):
        """Tokens as one integer, the oldest in the highest place: [..., n] -> [...]; 1 2 3 of ten tokens is 123."""
        return (grams * self.vocab_size ** torch.arange(grams.shape[-1] - 1, -1, -1)).sum(-1)

    def prob(self, x, y):
        """P of each token of y, given those of x up to its place and none before them: [B, T] x 2 -> [B, T]."""
        order, V, place = len(self.levels), self.vocab_size, torch.arange(y.shape[1])
        text = F.pad(torch.cat([x, y[:, -1:]], dim=1), (order - 1, 0))  # zeros, which no n-gram below reaches
        grams = self.pack(text.unfold(1, order, 1)[:, 1:])  # [B, T], y the newest token of each
        p = torch.full(y.shape, 1 / V, dtype=torch.double)
        for n, (keys, kept, contexts, totals, freed) in enumerate(self.levels, 1):
            gram = grams % V**n
            total, free = (look_up(contexts, values, gram // V) for values in (totals, freed))
            known = (total > 0) & (n - 1 <= place + 1)  # the context was seen, and stands inside the window
            p = torch.where(known, (look_up(keys, kept, gram) + free * p) / total.clamp(min=1), p)
        return p
