"""Models that keep less, or look at less: what they cache, next to what they can say.

Multi-query and grouped-query attention (MQA, GQA) are sizes of the stage's own model, `n_kv_head`; a window is its
`window`. The others are models of their own. What they keep of a position, in a layer:

    GPT                   a key and a value for each key-value head              2 K D numbers
    CrossLayerGPT (CLA)   the same, in every second layer only                   2 K D, and 0
    LatentGPT (MLA)       a vector and a small key for all heads (mla.py)        L + R
    HeavyHitterGPT (H2O)  as GPT, for the positions that were attended to most   2 K D, and K for what they received
    SparseGPT             as GPT, for one block (block-local) or all (strided)   2 K D

Shapes are named as in model.py; L = d_latent and R = d_rope channels.
"""

import math
from dataclasses import dataclass
from typing import Literal

from shared.errors import BadInput

import torch

from cache import Cache
from model import (
    CAUSAL,
    GPT,
    CausalSelfAttention,
    Look,
    ModelConfig,
    attention,
    attention_weights,
    hidden,
    rotate,
)


def replace_attention(model: GPT, make) -> None:
    """Give block i the attention make(i). Its output starts small, as the one that it replaces does."""
    for i, block in enumerate(model.blocks):
        block.attn = make(i)
        block.attn.proj.weight.data /= math.sqrt(2 * model.config.n_layer)


class VariantCache(Cache):
    """The stage's cache for a model that keeps other things: `model.keeps` says which.

    `keeps` is how many layers share an entry, and an entry's heads, channels of a key and channels of a value.
    """

    def __init__(self, model, batch_size: int = 1, most: int = 1):
        super().__init__(model, batch_size, most)
        self.share, heads, *widths = model.keeps
        shape = (math.ceil(model.config.n_layer / self.share), batch_size, heads, self.n_slot + 1)
        self.keys, self.values = (self.keys.new_empty(*shape, width) for width in widths)

    def update(self, layer: int, k, v):
        return super().update(layer // self.share, k, v)


# Cross-layer attention


class LeadingAttention(CausalSelfAttention):
    """Attention that leaves its keys and values in `shared`, where the layer after it finds them."""

    def __init__(self, config: ModelConfig, shared: dict):
        super().__init__(config)
        self.shared = shared

    def forward(self, x, look=CAUSAL, keep=None):
        def note(k, v):
            self.shared["k"], self.shared["v"] = (k, v) if keep is None else keep(k, v)
            return self.shared["k"], self.shared["v"]

        return super().forward(x, look, note)


class FollowingAttention(CausalSelfAttention):
    """Attention with queries of its own, and the keys and values of the layer before it."""

    def __init__(self, config: ModelConfig, shared: dict):
        super().__init__(config)
        del self.key, self.value, self.key_norm
        self.shared = shared

    def forward(self, x, look=CAUSAL, keep=None):
        q = self.query_norm(self.split_heads(self.query(x)))  # [B, H, T, D]
        far = None if look.far is None else rotate(q, *look.far)
        q = q if look.rope is None else rotate(q, *look.rope)
        k, v = self.shared.pop("k"), self.shared.pop("v")  # [B, K, S, D] x 2, turned already and with all that was kept
        return self.proj(self.merge_heads(attention(q, k, v, look.hidden, far, look.sink)))


class CrossLayerGPT(GPT):
    """Layers 1, 3, 5 ... make keys and values; each layer after one of these reads them again.

    Brandon et al., "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention" (2024), there CLA2.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        channels = [{} for _ in range(0, config.n_layer, 2)]  # one for each pair of layers
        kinds = LeadingAttention, FollowingAttention
        replace_attention(self, lambda i: kinds[i % 2](config, channels[i // 2]))

    @property
    def keeps(self):
        return 2, self.config.n_kv_head, self.config.head_dim, self.config.head_dim


# Heavy hitters


@dataclass
class HeavyConfig(ModelConfig):
    """What a model keeps that evicts. Raises BadInput for a budget that cannot be."""

    budget: int = 32  # positions that each head of keys keeps
    recent: int = 16  # of these, the newest ones; the others are those that were attended to most
    first: int = 0  # of these others, the first ones of the text: they stay whatever they got

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None or self.n_sink:
            raise BadInput(f"window {self.window}, n_sink {self.n_sink}: leave them out, attention says what is kept")
        if not 1 <= self.recent <= self.budget:
            raise BadInput(f"recent is {self.recent}: it must be at least 1, and at most the budget of {self.budget}")
        if not 0 <= self.first <= self.budget - self.recent:
            raise BadInput(f"first is {self.first}: beside the {self.recent} newest the budget has room for 0 to "
                           f"{self.budget - self.recent}")


class HeavyHitterCache:
    """Keys and values of the newest positions and of those that got the most attention so far, head by head.

    Heads keep different positions. They stand in the order in which they were read, the newest last:

        budget 3, recent 1, attention so far 0.9 0.2 0.5, and the new token gets 0.4: the token with 0.2 goes.

    What was evicted is gone for good. Texts in a batch have one length. Raises BadInput for padding.
    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (2023).
    """

    def __init__(self, model, batch_size: int = 1, most: int = 1):
        c, like = model.config, model.tok_emb.weight
        self.budget, self.recent, self.first, self.length = c.budget, c.recent, c.first, 0
        nothing = like.new_empty(batch_size, c.n_kv_head, 0, c.head_dim)
        self.keys, self.values = [nothing] * c.n_layer, [nothing] * c.n_layer  # [B, K, S, D] for each layer
        # Attention that each kept position got, [B, K, S]. A sum in bfloat16 would not grow beyond 256.
        self.received = [nothing[..., 0].float()] * c.n_layer

    def advance(self, positions):
        """Where the new tokens stand, [1 or B, T] twice: which old ones a head sees is its own affair."""
        if positions.min() < 0:
            raise BadInput("heavy hitters are kept for texts of one length: leave the padding out")
        positions = positions + self.length
        self.length += positions.shape[1]
        return positions, positions

    def update(self, layer: int, q, k, v, hidden):
        """What the new queries [B, H, T, D] get, [B, H, T, D]; `hidden` [1, 1, T, T] is the future among new tokens."""
        # 1. The new ones join those that were kept.
        k = torch.cat([self.keys[layer], k], dim=2)  # [B, K, S, D]
        v = torch.cat([self.values[layer], v], dim=2)
        B, K, S, D = k.shape
        T, group = q.shape[2], q.shape[1] // K
        # 2. Attend, as in `attention`, to all of them.
        old = hidden.new_zeros(1, 1, T, S - T)
        mask = torch.cat([old, hidden], dim=-1).repeat(1, 1, group, 1)  # [1, 1, G T, S]
        weights = attention_weights(q.reshape(B, K, group * T, D), k, mask)  # [B, K, G T, S]
        output = (weights @ v).reshape(q.shape)
        # 3. Count what each position got, from all queries of its head so far.
        got = weights.detach().sum(2, dtype=torch.float32)  # [B, K, S]
        got[..., :S - T] += self.received[layer]
        # 4. Keep the newest and the heaviest.
        if S > self.budget:
            rank = got.clone()
            rank[..., -self.recent:] = rank[..., :self.first] = math.inf
            stay = rank.topk(self.budget).indices.sort().values  # [B, K, budget]
            got, places = got.gather(2, stay), stay[..., None].expand(-1, -1, -1, D)
            k, v = k.gather(2, places), v.gather(2, places)
        self.keys[layer], self.values[layer], self.received[layer] = k, v, got
        return output

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(x.nbytes for kept in (self.keys, self.values, self.received) for x in kept)


class HeavyHitterAttention(CausalSelfAttention):
    """Attention that leaves the looking to its cache, which has to see the weights."""

    def forward(self, x, look=CAUSAL, keep=None):
        if keep is None:
            return super().forward(x, look)
        q, k, v = (self.split_heads(layer(x)) for layer in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)
        if look.rope is not None:
            q, k = rotate(q, *look.rope), rotate(k, *look.rope)
        return self.proj(self.merge_heads(keep(q, k, v, look.hidden)))


class HeavyHitterGPT(GPT):
    """The stage's model, its weights included, that evicts what little was attended to while it writes.

    A prompt that is read in one pass is attended to in full, and evicted from after.
    """

    def __init__(self, config: HeavyConfig):
        super().__init__(config)
        replace_attention(self, lambda i: HeavyHitterAttention(config))


# Sparse attention


@dataclass
class SparseConfig(ModelConfig):
    """What a model looks at that looks at little. Raises BadInput for a pattern that cannot be."""

    pattern: Literal["block-local", "strided"] = "block-local"
    block: int = 32  # block-local: positions in a block; strided: how many newest are seen, and each how many-th before

    def __post_init__(self):
        if self.pattern not in ("block-local", "strided"):
            raise BadInput(f"pattern is {self.pattern!r}: it must be block-local or strided")
        if self.block < 1 or self.n_sink:
            raise BadInput(f"block {self.block}, n_sink {self.n_sink}: at least 1, and no sinks beside a pattern")
        if self.pattern == "block-local":
            self.window = self.block  # none looks further back, so the cache has no more room than this
        super().__post_init__()


class SparseGPT(GPT):
    """The stage's model with a pattern instead of the whole past; blocks of 3, position 7:

        block-local    sees 6, 7            its own block, so far
        strided        sees 1, 4, 5, 6, 7   the newest 3, and each third one counted back from itself

    Child et al., "Generating Long Sequences with Sparse Transformers" (2019), section 4: the two parts of `strided` in
    one head (there "merged"); blocks are the first part of their "fixed" pattern.
    A kept position that nobody looks at now may be looked at later, so strided attention saves work and no memory.
    """

    def look(self, T: int, cache=None, pad=None, device=None) -> Look:
        positions = torch.arange(T, device=device)[None]  # [1, T]
        if pad is not None:
            positions = (positions - pad[:, None]).clamp(min=-1)  # [B, T]
        positions, places = (positions, positions) if cache is None else cache.advance(positions)  # [B, T], [B, S]
        apart = ~self.seen(positions[:, None, :, None], places[:, None, None, :])
        apart = apart & (positions >= 0)[:, None, :, None]  # padding sees everything, so that its softmax is defined
        return Look(self.rope(positions[:, None]), hidden(positions, places, self.config) | apart)

    def seen(self, t, s):
        """Whether the pattern shows position s of the past to position t."""
        block = self.config.block
        if self.config.pattern == "block-local":
            return t // block == s // block
        return (t - s < block) | ((t - s) % block == 0)


def cache_for(model: GPT, batch_size: int = 1, most: int = 1):
    """The cache that fits a model of this file or of the stage."""
    kind = HeavyHitterCache if isinstance(model, HeavyHitterGPT) else VariantCache if hasattr(model, "keeps") else Cache
    return kind(model, batch_size, most)


def kept_bytes(cache) -> int:
    """Bytes of what is really kept; of a buffer, those of the slots in use."""
    if isinstance(cache, HeavyHitterCache):
        return cache.nbytes
    return sum(store[..., :cache.used, :].nbytes for store in (cache.keys, cache.values))


def cache_bytes(kind: str, config: ModelConfig, T: int | None = None, size: int = 4) -> int:
    """Bytes, by formula, of what a text of T positions (none: block_size) keeps, at `size` bytes for each number.

    kind: "MHA" (with fewer heads of keys GQA and MQA; also windows, sinks and sparse attention), "CLA", "MLA",
    "H2O". Raises BadInput for another.
    """
    c, T = config, config.block_size if T is None else T
    each = 2 * c.n_kv_head * c.head_dim * size  # bytes for a position and layer
    positions, layers = min(T, c.n_sink + c.span), c.n_layer
    if kind == "CLA":
        layers = math.ceil(c.n_layer / 2)
    elif kind == "MLA":
        each = (c.d_latent + c.d_rope if c.absorbed else c.n_head * (2 * c.head_dim + c.d_rope)) * size
    elif kind == "H2O":
        each, positions = each + 4 * c.n_kv_head, min(T, c.budget)  # and what the position received, in float32
    elif kind != "MHA":
        raise BadInput(f"no formula for the cache of {kind!r}: it must be MHA, CLA, MLA or H2O")
    return each * positions * layers
