"""Who may look at whom: which positions queries and keys have, and what is hidden from a query.

With a cache there are fewer queries than keys, so their positions are said, and not read off from rows and columns.
Shapes: B texts, T queries, S keys, D channels of a head.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Look:
    """Where the queries of a pass stand and what each may look at: the same for all layers.

    Without `hidden` the keys are those of the queries' own positions, and the future is hidden.
    """

    rope: tuple | None = None  # the angles of queries and new keys, [B, 1, T, D / 2] x 2; none: no positions
    hidden: torch.Tensor | None = None  # [B, 1, T, S], True where a query may not look
    far: tuple | None = None  # the angles of queries that look at a sink, like `rope`; none: there are no sinks
    sink: torch.Tensor | None = None  # [B, 1, 1, S], True for the keys that are sinks
    real: torch.Tensor | None = None  # [1 or B, T], False for padding, which no expert spends time on; none: all are


CAUSAL = Look()


def hidden(positions, places, config):
    """What each query may not look at: positions of queries [B, T], of keys [B, S] -> [B, 1, T, S], True where hidden.

    A query at t sees the keys at t - window + 1 ... t, and the first n_sink. Negative positions are padding or empty.
    With window 2 and one sink, position 3 sees 0, 2 and 3.
    """
    t, s = positions[:, None, :, None], places[:, None, None, :]
    seen = (s <= t) & (s >= 0) & ((s > t - config.span) | (s < config.n_sink))
    # Padding sees everything: what comes out of it is not read, but a softmax over nothing would be nan.
    return ~(seen | (t < 0))
