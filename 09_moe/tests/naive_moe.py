"""A mixture of experts the slow way: one position after the other, each through one expert after the other."""

import math

import torch


def swiglu(gate, fc, proj, x):
    """One feed-forward by its formula, from its matrices [out, in]."""
    opened = gate @ x
    return proj @ (opened / (1 + torch.exp(-opened)) * (fc @ x))


def chances(layer, x):
    """What the router thinks of each expert, for one position [C]: [E]."""
    scores = layer.router.weight @ x
    return 1 / (1 + torch.exp(-scores)) if layer.config.router == "sigmoid" else scores.exp() / scores.exp().sum()


def choice(layer, x) -> dict:
    """The experts of one position [C], the best first, and what each counts."""
    c, probs = layer.config, chances(layer, x)
    best = sorted(range(c.n_expert), key=lambda e: -(probs[e] + layer.bias[e]).item())[:c.n_active]
    total = sum(probs[e] for e in best) if c.renormalise else 1.0
    return {e: probs[e] / total for e in best}


def kept(choices, n_expert: int, capacity: float) -> list[dict]:
    """The choices that find room: all first choices in the order of the text, then all second ones, and so on."""
    room = math.ceil(capacity * sum(map(len, choices)) / n_expert)
    taken, found = [0] * n_expert, [{} for _ in choices]
    for rank in range(max(map(len, choices))):
        for n, chosen in enumerate(choices):
            e = [*chosen][rank]
            if taken[e] < room:
                taken[e] += 1
                found[n][e] = chosen[e]
    return found


def mixture(layer, x):
    """The whole layer: [..., C] -> [..., C]."""
    rows = x.flatten(0, -2)
    choices = [choice(layer, row) for row in rows]
    if layer.config.capacity is not None:
        choices = kept(choices, layer.config.n_expert, layer.config.capacity)
    out = []
    for row, chosen in zip(rows, choices, strict=True):
        parts = [weight * swiglu(layer.gate[e], layer.fc[e], layer.proj[e], row) for e, weight in chosen.items()]
        if layer.shared is not None:
            parts.append(swiglu(*(getattr(layer.shared, name).weight for name in ("gate", "fc", "proj")), row))
        out.append(sum(parts, torch.zeros_like(row)))
    return torch.stack(out).view_as(x)
