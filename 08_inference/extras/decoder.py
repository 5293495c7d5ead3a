"""One text, one token at a time, and nothing else: the model's decode step without what it needs for everything else.

The model reads any number of tokens of any number of texts, trains, and says in its code what it does. For one token of
one text most of its time is not arithmetic. Each call of torch from Python takes a microsecond or more, and a pass
makes about thousand of them for each ten layers. So, with the same weights and the same result:

- What stays the same is worked out once: cosines and sines of all positions.
- Query, key and value are one product, gate and fc another. A processor waits less for one large matrix than for three.
- The newest token may look at everything that is kept, so there is no mask. Its key and value are written to one place.
- In bfloat16 on a CPU the matrices are copied into the order in which the processor's kernel reads them ("packed"). The
  results stay the same to the last bit.

It does not know windows, sinks or layers without positions, nor models that compute something else (subclasses of GPT).
"""

from shared.errors import BadInput

import torch
import torch.nn.functional as F

from cache import Cache
from extras import quant
from model import GPT
from sample import SampleConfig, draw, evaluation, prefill


def product(*layers):
    """A function that multiplies by the matrices of linear layers, stacked: [1, C] -> [1, the sum of their outputs].

    The layers may be rounded to 8 or 4 bits (quant.py), all to the same.
    """
    if isinstance(layers[0], quant.Quantised):
        return quant.fuse(list(layers))
    weight = torch.cat([layer.weight.detach() for layer in layers])
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)


class Decoder:
    """`model`, for one text of at most block_size tokens.

    Raises BadInput for a model with a window or with layers without positions, and for a subclass of GPT.
    It holds a copy of the weights: changes of the model's do not reach it.
    """

    def __init__(self, model):
        c = model.config
        if type(model) is not GPT or c.window is not None or c.nope_every:
            raise BadInput("the decoder knows no window, no layers without positions and no other model than GPT: "
                           "use sample.py")
        self.model, self.n = model, 0
        cos, sin = model.rope(torch.arange(c.block_size, device=model.tok_emb.weight.device))  # [S, D / 2] x 2
        # (a, b) turned is (a cos - b sin, b cos + a sin): (a, b) times (cos, cos), plus (b, a) times (-sin, sin).
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # [S, D] x 2
        self.layers = []
        for block in model.blocks:
            attn, ffn, scale = block.attn, block.ffn, None
            if c.qk_norm:
                heads = [attn.query_norm.weight] * c.n_head + [attn.key_norm.weight] * c.n_kv_head
                scale = torch.stack(heads).detach()  # [H + K, D]
            kept = model.tok_emb.weight.new_zeros(2, c.n_kv_head, c.block_size, c.head_dim).detach()
            products = product(attn.query, attn.key, attn.value), product(attn.proj), product(ffn.gate, ffn.fc)
            self.layers.append((block.norm1.weight.detach(), *products, product(ffn.proj), block.norm2.weight.detach(),
                                scale, kept))  # fmt: skip
        self.head = product(model.head)

    @torch.no_grad()
    def prefill(self, ids):
        """Read ids [1, T] with the model itself: scores of what comes next, [1, V]."""
        cache = Cache(self.model, 1, most=ids.shape[1])
        with evaluation(self.model):
            logits = prefill(self.model, ids, cache)
        self.n = ids.shape[1]
        for i, (*_, kept) in enumerate(self.layers):
            for own, theirs in zip(kept, (cache.keys, cache.values), strict=True):
                own[:, :self.n] = theirs[i, 0, :, :self.n]
        return logits

    def generate(self, ids, config: SampleConfig, generator=None):
        """Yield the tokens [1] that follow ids [1, T], as the function `generate` does, until no position is left."""
        logits = self.prefill(ids)
        while True:
            token = draw(logits.cpu(), config, generator)
            yield token
            if self.n == self.model.config.block_size:
                return
            logits = self.step(token.item())

    @torch.inference_mode()
    def step(self, token: int):
        """Read one more token: scores of what comes next, [1, V]. Raises BadInput when all positions are taken."""
        c, n = self.model.config, self.n
        if n >= c.block_size:
            raise BadInput(f"all {c.block_size} positions are taken")
        H, K, D, eps = c.n_head, c.n_kv_head, c.head_dim, c.norm_eps
        cos, sin = self.cos[n], self.sin[n]
        x = self.model.tok_emb.weight[token][None]  # [1, C]
        for norm1, qkv, proj, gate_fc, down, norm2, scale, kept in self.layers:
            heads = qkv(F.rms_norm(x, (c.n_embd,), norm1, eps)).view(-1, D)  # [H + 2 K, D]
            turned = heads[:H + K]
            if scale is not None:
                turned = F.rms_norm(turned, (D,), None, eps) * scale
            turned = (turned * cos + turned.roll(D // 2, -1) * sin).type_as(x)  # [H + K, D]
            kept[0, :, n], kept[1, :, n] = turned[H:], heads[H + K:]
            k, v = kept[:, None, :, :n + 1]  # [1, K, n + 1, D] x 2
            # The queries that share a key-value head stand below one another.
            read = F.scaled_dot_product_attention(turned[:H].view(1, K, -1, D), k, v)  # [1, K, H / K, D]
            x = x + proj(read.reshape(1, -1))
            gate, fc = gate_fc(F.rms_norm(x, (c.n_embd,), norm2, eps)).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * fc)
        self.n += 1
        return self.head(F.rms_norm(x, (c.n_embd,), self.model.norm.weight, eps))
