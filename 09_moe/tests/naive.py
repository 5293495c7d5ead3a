"""The model the slow way, in float64: each query alone looks at what it may see, from the distance it should see it."""

import torch
import torch.nn.functional as F


def speeds(config):
    """Radians by which each pair of channels turns from one position to the next: [D / 2]."""
    return config.rope_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)


def angles(positions, config):
    """For `rope_table`: the same angles, but exact, so that only the order of sums can differ."""
    turned = positions.double()[..., None] * speeds(config)
    return turned.cos(), turned.sin()


def sight(t, config) -> dict[int, int]:
    """The positions that t may look at, and how far away each appears.

    Window 2, one sink: position 3 sees 3 at 0, 2 at 1, and the sink 0 at 2, as if it stood just outside of the window.
    """
    window = config.block_size - config.n_sink if config.window is None else config.window
    return {
        i: min(t - i, window + config.n_sink - 1 - i) if i < config.n_sink else t - i
        for i in range(t + 1)
        if i < config.n_sink or t - i < window
    }


def rms(x, norm):
    """RMSNorm by its formula."""
    return x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def swiglu(ffn, x):
    """The feed-forward layer by its formula."""
    gate = x @ ffn.gate.weight.T
    return (gate / (1 + torch.exp(-gate)) * (x @ ffn.fc.weight.T)) @ ffn.proj.weight.T


def attend(attn, x, config, positions: bool, queries):
    """Attention of one text, query by query: [T, C] -> [queries, C]."""
    D = config.head_dim
    q, k, v = ((x @ layer.weight.T).view(len(x), -1, D) for layer in (attn.query, attn.key, attn.value))
    if config.qk_norm:
        q, k = rms(q, attn.query_norm), rms(k, attn.key_norm)
    read = [h // (config.n_head // config.n_kv_head) for h in range(config.n_head)]  # each head's head of keys
    k, v = k[:, read], v[:, read]  # [T, H, D]
    q, k = (torch.complex(z[..., :D // 2], z[..., D // 2:]) for z in (q, k))  # a pair of channels is one number
    rows = []
    for t in queries:
        seen = sight(t, config)
        far = torch.tensor([*seen.values()], dtype=torch.float64)[:, None] * speeds(config) * positions  # [S, D / 2]
        turned = q[t] * torch.polar(torch.ones_like(far), far)[:, None]  # [S, H, D / 2]: turned by the distance
        scores = (turned * k[[*seen]].conj()).real.sum(dim=-1) / D**0.5  # [S, H]
        rows.append((scores.softmax(dim=0)[..., None] * v[[*seen]]).sum(dim=0).flatten())
    return torch.stack(rows) @ attn.proj.weight.T


def logits(model, idx, last=None):
    """Scores of one text [T] -> [T, V], or of its `last` positions only."""
    config, T = model.config, len(idx)
    x = F.embedding(idx, model.tok_emb.weight)
    for i, block in enumerate(model.blocks, 1):
        positions = not (config.nope_every and i % config.nope_every == 0)
        queries = range(T - last, T) if last and i == config.n_layer else range(T)
        x = x[queries.start:] + attend(block.attn, rms(x, block.norm1), config, positions, queries)
        x = x + swiglu(block.ffn, rms(x, block.norm2))
    return rms(x, model.norm) @ (model.tok_emb if config.tied else model.head).weight.T
