"""Multi-head latent attention (MLA): all heads' keys and values are made from one small vector, which alone is kept.

    keys and values made (LatentAttention)   for training and long prompts: a score is a sum of D + R terms
    absorbed (AbsorbedAttention)             for decoding: a score is a sum of L + R terms, and L + R numbers are kept

Both give the same scores. Shapes are named as in model.py; L = d_latent, R = d_rope channels.
DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model" (2024), section 2.1.
"""

import math
from dataclasses import dataclass, replace

from shared.errors import BadInput

import torch
from torch import nn

from extras.attention_variants import replace_attention
from model import (
    CAUSAL,
    GPT,
    CausalSelfAttention,
    ModelConfig,
    RMSNorm,
    attention,
    rope_table,
    rotate,
    variance_scaling_,
)


@dataclass
class LatentConfig(ModelConfig):
    """Sizes of a model with latent attention, where n_kv_head has no say. Raises BadInput for one that cannot be."""

    d_latent: int = 48  # channels of the vector from which all heads' keys and values are made
    d_rope: int = 16  # channels of the key that knows its position, one for all heads
    absorbed: bool = False  # compare queries with latents, not with the keys made from them: the same scores

    def __post_init__(self):
        super().__post_init__()
        if self.d_latent < 1:
            raise BadInput(f"d_latent is {self.d_latent}: it must be at least 1")
        if self.d_rope < 2 or self.d_rope % 2:
            raise BadInput(f"d_rope is {self.d_rope}: RoPE turns pairs of channels, so it must be even")


class LatentAttention(CausalSelfAttention):
    """Attention whose keys and values are all made from one small vector a position, the latent c.

    [B, T, C] -> latents [B, T, L] -> keys and values [B, H, T, D] x 2. A score has two parts. The key k' of the
    second one, R channels, is the same for all heads, and alone knows its position:

        score(t, s) = (q_t . W_K c_s  +  RoPE(q'_t) . RoPE(k'_s)) / sqrt(D + R)

    If W_K c_s were turned, the turn would stand between q_t and W_K. It depends on s, so it could not be absorbed.
    Equations 9-11 and 14-19 of the paper, with queries that are not compressed (as in DeepSeek-V2-Lite).
    """

    def __init__(self, config: LatentConfig):
        super().__init__(config)
        self.d_latent, self.d_rope = config.d_latent, config.d_rope
        n_heads = config.n_head * config.head_dim
        self.down = nn.Linear(config.n_embd, self.d_latent, bias=False)  # all that is kept of a position's content
        # A norm of each head's key would stand between latent and query, so the latent is normed.
        self.key_norm = RMSNorm(self.d_latent, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key = nn.Linear(self.d_latent, n_heads, bias=False)
        self.value = nn.Linear(self.d_latent, n_heads, bias=False)
        self.query_rope = nn.Linear(config.n_embd, config.n_head * self.d_rope, bias=False)
        self.key_rope = nn.Linear(config.n_embd, self.d_rope, bias=False)
        for layer in (self.down, self.key, self.value, self.query_rope, self.key_rope):
            variance_scaling_(layer)

    def forward(self, x, look=CAUSAL, keep=None):
        q = self.query_norm(self.split_heads(self.query(x)))  # [B, H, T, D]
        q_rope = self.query_rope(x).unflatten(-1, (-1, self.d_rope)).transpose(1, 2)  # [B, H, T, R]
        latent, k_rope = self.key_norm(self.down(x)), self.key_rope(x)[:, None]  # [B, T, L], [B, 1, T, R]
        far = None if look.far is None else torch.cat([q, rotate(q_rope, *look.far)], dim=-1)
        if look.rope is not None:
            q_rope, k_rope = rotate(q_rope, *look.rope), rotate(k_rope, *look.rope)
        q = torch.cat([q, q_rope], dim=-1)  # [B, H, T, D + R]
        return self.proj(self.merge_heads(self.attend(q, far, latent, k_rope, look, keep)))

    def attend(self, q, far, latent, k_rope, look, keep):
        """q [B, H, T, D + R], latent [B, T, L], k_rope [B, 1, T, R] -> [B, H, T, D]: each head has keys and values."""
        k, v = self.split_heads(self.key(latent)), self.split_heads(self.value(latent))  # [B, H, T, D] x 2
        k = torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], dim=-1)  # [B, H, T, D + R]
        if keep is not None:
            k, v = keep(k, v)
        return attention(q, k, v, look.hidden, far, look.sink)


class AbsorbedAttention(LatentAttention):
    """The same, from the latents alone: q . W_K c = (W_K^T q) . c, and the mean of W_V c is W_V times the mean of c.

    So all heads share one key, [c, k'], and one value, c: multi-query attention with heads of L + R channels. It keeps
    the least and works the most: a score is a sum of L + R terms, where D + R are enough for one made from keys.
    """

    def attend(self, q, far, latent, k_rope, look, keep):
        k = torch.cat([latent[:, None], k_rope], dim=-1)  # [B, 1, T, L + R]
        if keep is not None:
            k, _ = keep(k, k[..., :0])  # the value is a part of the key: nothing more to keep
        q, far = (None if x is None else self.absorb(x) for x in (q, far))
        latents = attention(q, k, k[..., :self.d_latent], look.hidden, far, look.sink)  # [B, H, T, L]
        return latents @ self.value.weight.unflatten(0, (-1, self.head_dim)).mT  # [B, H, T, D]

    def absorb(self, q):
        """[B, H, T, D + R] -> [B, H, T, L + R]: queries for latents."""
        content, place = q.split([self.head_dim, self.d_rope], dim=-1)
        content = content @ self.key.weight.unflatten(0, (-1, self.head_dim))  # [H, D, L] -> [B, H, T, L]
        # `attention` divides by the root of the channels that it sees, and the scores are still those of D + R.
        scale = math.sqrt((self.d_latent + self.d_rope) / (self.head_dim + self.d_rope))
        return torch.cat([content, place], dim=-1) * scale


class LatentGPT(GPT):
    """The stage's model with latent attention. Both forms have the same weights, so either loads the other's.

    Train without `absorbed`, decode with it.
    """

    def __init__(self, config: LatentConfig):
        super().__init__(config)
        kind = AbsorbedAttention if config.absorbed else LatentAttention
        replace_attention(self, lambda i: kind(config))

    @property
    def keeps(self):
        c = self.config
        return (1, 1, c.d_latent + c.d_rope, 0) if c.absorbed else (1, c.n_head, c.head_dim + c.d_rope, c.head_dim)

    def rope(self, positions):
        return rope_table(positions, replace(self.config, head_dim=self.config.d_rope))
