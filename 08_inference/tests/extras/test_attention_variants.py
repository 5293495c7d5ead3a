"""Variants of attention: what each looks at, what it keeps, and that keeping changes no score."""

import math

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from extras.attention_variants import (
    CrossLayerGPT,
    HeavyConfig,
    HeavyHitterGPT,
    SparseConfig,
    SparseGPT,
    cache_bytes,
    cache_for,
    kept_bytes,
)
from extras.mla import LatentConfig, LatentGPT
from model import GPT, ModelConfig

SIZES = {"vocab_size": 11, "block_size": 16, "n_embd": 20, "n_head": 4, "head_dim": 6, "n_kv_head": 2, "n_layer": 3}
LATENT = {"d_latent": 10, "d_rope": 4}
WINDOW = {"window": 5, "n_sink": 2}


def double(model):
    """In float64, with large weights: attention that is nearly even would hide most mistakes."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.5 if p.ndim > 1 else 1)
    return model.double()


EXACT = {  # the kinds that give the same scores with a cache as without
    "MLA": lambda **more: LatentGPT(LatentConfig(**SIZES | LATENT | more)),
    "MLA, absorbed": lambda **more: LatentGPT(LatentConfig(**SIZES | LATENT | more, absorbed=True)),
    "MLA, window": lambda **more: LatentGPT(LatentConfig(**SIZES | LATENT | WINDOW | more)),
    "MLA, window, absorbed": lambda **more: LatentGPT(LatentConfig(**SIZES | LATENT | WINDOW | more, absorbed=True)),
    "CLA": lambda **more: CrossLayerGPT(ModelConfig(**SIZES | more)),
    "CLA, window": lambda **more: CrossLayerGPT(ModelConfig(**SIZES | WINDOW | more)),
    "block-local": lambda **more: SparseGPT(SparseConfig(**SIZES | more, block=3)),
    "strided": lambda **more: SparseGPT(SparseConfig(**SIZES | more, block=3, pattern="strided")),
}


def tokens(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


def turn(x, base=10_000.0):
    """RoPE in complex numbers: channel i and i + D / 2 of x [B, H, T, D] are one number, turned by t base^(-2i / D)."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speed  # [T, D / 2]
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("kind", EXACT)
def test_cached_scores_are_the_uncached(kind):
    """Texts of three lengths, padded on the left and read in one pass, in three or token by token: scores of each text
    read alone, without a cache."""
    model, texts, pad = double(EXACT[kind]()), tokens(3, 12), torch.tensor([1, 3, 7])
    with torch.no_grad():
        alone = [model(text[None, skip:])[0] for text, skip in zip(texts, pad.tolist(), strict=True)]
        for cuts in ([12], [5, 4, 3], [1] * 12):
            cache, start, parts = cache_for(model, 3, max(cuts)), 0, []
            for T in cuts:
                parts.append(model(texts[:, start:start + T], cache, (pad - start).clamp(0, T)))
                start += T
            scores = torch.cat(parts, dim=1)
            assert scores.isfinite().all(), f"{kind}: passes of {cuts}: padding looks at nothing: a mean of nan"
            for skip, mine, other in zip(pad.tolist(), scores, alone, strict=True):
                gap = (mine[skip:] - other).abs().max().item()
                assert gap < 1e-9, f"{kind}: passes of {cuts}, {skip} of 12 are padding: the scores moved by {gap:.1e}"


def test_latent_attention_is_the_papers():
    """Scores (q.c + q'.k') / sqrt(D + R): equations 9-11 and 14-19 of DeepSeek-V2, with RoPE in complex numbers."""
    model = double(EXACT["MLA"]())
    attn, x = model.blocks[0].attn, torch.randn(2, 7, 20, dtype=torch.float64)
    W = {name: layer.weight for name, layer in attn.named_children() if isinstance(layer, nn.Linear)}
    latent = F.rms_norm(x @ W["down"].T, (10,), attn.key_norm.weight, 1e-6)  # 9, with the norm of section 2.1
    heads = {name: (y @ W[name].T).unflatten(-1, (4, -1)).transpose(1, 2) for name, y in (
        ("key", latent), ("value", latent), ("query", x), ("query_rope", x))}  # 10, 11, 14
    q = F.rms_norm(heads["query"], (6,), attn.query_norm.weight, 1e-6)
    q = torch.cat([q, turn(heads["query_rope"])], dim=-1)  # 14, 16
    k_rope = turn((x @ W["key_rope"].T)[:, None]).expand(-1, 4, -1, -1)  # 15: one for all heads
    k = torch.cat([heads["key"], k_rope], dim=-1)  # 17
    scores = (q @ k.mT / math.sqrt(6 + 4)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)  # 18
    expected = (scores.softmax(-1) @ heads["value"]).transpose(1, 2).flatten(2) @ W["proj"].T  # 18, 19
    torch.testing.assert_close(
        attn(x, model.look(7)), expected, rtol=1e-5, atol=1e-5, msg=lambda m: f"not the paper's scores\n{m}")


@pytest.mark.parametrize("more", [{}, WINDOW, {"nope_every": 2}, {"qk_norm": False}], ids=str)
def test_absorbed_is_expanded(more):
    """Queries compared with latents give the scores of keys made from the latents, to 1e-9; so do their caches."""
    made, absorbed = double(EXACT["MLA"](**more)), EXACT["MLA, absorbed"](**more).double()
    absorbed.load_state_dict(made.state_dict())
    x = tokens(2, 12)
    with torch.no_grad():
        gap = (made(x) - absorbed(x)).abs().max().item()
        assert gap < 1e-9, f"{more}: the two forms differ by {gap:.1e}: is a score divided by the root of D + R?"
        expected, cache = made(x), cache_for(absorbed, 2)
        steps = torch.cat([absorbed(x[:, t:t + 1], cache) for t in range(12)], dim=1)
    assert (steps - expected).abs().max() < 1e-9, f"{more}: decoded from latents, another score"
    assert cache.keys.shape[2:] == (1, cache.n_slot + 1, 10 + 4) and cache.values.numel() == 0, \
        "the absorbed form keeps one latent and one key of a position, d_latent + d_rope numbers, and no values"


@pytest.mark.parametrize("absorbed", [False, True])
def test_full_rank_is_multi_head_attention(absorbed):
    """With as many latent channels as there are, and no RoPE key, it is torch's multi-head attention."""
    sizes = {"vocab_size": 11, "block_size": 16, "n_embd": 24, "n_head": 4, "n_kv_head": 4, "qk_norm": False}
    model = double(LatentGPT(LatentConfig(**sizes, n_layer=1, d_latent=24, d_rope=4, absorbed=absorbed)))
    attn, x = model.blocks[0].attn, torch.randn(2, 7, 24, dtype=torch.float64)
    torchs = nn.MultiheadAttention(24, 4, bias=False, batch_first=True, dtype=torch.float64)
    query, key, value = torchs.in_proj_weight.chunk(3)
    up = torch.linalg.inv(attn.down.weight)  # x = up c: nothing was lost
    with torch.no_grad():
        attn.query.weight.copy_(query * math.sqrt((6 + 4) / 6))  # scores of D + R channels are divided by more
        attn.query_rope.weight.zero_()
        attn.key.weight.copy_(key @ up)
        attn.value.weight.copy_(value @ up)
        attn.proj.weight.copy_(torchs.out_proj.weight)
        expected, _ = torchs(x, x, x, attn_mask=torch.ones(7, 7).triu(1).bool(), need_weights=False)
        gap = (attn(x, model.look(7)) - expected).abs().max().item()
    assert gap < 1e-9, f"a latent that loses nothing changes the attention by {gap:.1e}"


def test_every_second_layer_reads_the_keys_of_the_one_before():
    """Layers 2 and 4 use the keys and values of 1 and 3, with queries of their own, worked out with torch's parts."""
    model, idx = double(EXACT["CLA"](n_layer=4)), tokens(2, 9)
    names = dict(model.named_parameters())
    x = names["tok_emb.weight"][idx]
    for i, block in enumerate(model.blocks):
        assert hasattr(block.attn, "key") == hasattr(block.attn, "value") == (i % 2 == 0), \
            f"layer {i + 1}: every second layer has no keys and values of its own"
        h = F.rms_norm(x, (20,), block.norm1.weight, 1e-6)

        def heads(name, h=h, i=i):
            return (h @ names[f"blocks.{i}.attn.{name}.weight"].T).unflatten(-1, (-1, 6)).transpose(1, 2)

        q = turn(F.rms_norm(heads("query"), (6,), block.attn.query_norm.weight, 1e-6))
        if i % 2 == 0:
            k = turn(F.rms_norm(heads("key"), (6,), block.attn.key_norm.weight, 1e-6))
            v = heads("value")
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + out.transpose(1, 2).flatten(2) @ names[f"blocks.{i}.attn.proj.weight"].T
        x = x + block.ffn(F.rms_norm(x, (20,), block.norm2.weight, 1e-6))
    expected = F.rms_norm(x, (20,), model.norm.weight, 1e-6) @ names["tok_emb.weight"].T
    torch.testing.assert_close(
        model(idx), expected, rtol=1e-4, atol=1e-4, msg=lambda m: f"a layer read other keys than its neighbour's\n{m}")


@pytest.mark.parametrize("kind, n_layer", [("MLA", 1), ("MLA, absorbed", 1), ("CLA", 2)])
def test_sinks_stand_right_before_the_window(kind, n_layer):
    """Beyond the window a position scores as if its text were the sinks, then the window: no distance is longer. (In
    these few layers, whose keys are made from the embedding alone, that is exact.)"""
    text = tokens(1, 12)
    model, short = (double(EXACT[kind](n_layer=n_layer, **more)) for more in (WINDOW, {}))
    with torch.no_grad():
        scores = model(text)
        for t in range(7, 12):
            alone = short(torch.cat([text[:, :2], text[:, t - 4:t + 1]], dim=1))
            gap = (scores[:, t] - alone[:, -1]).abs().max().item()
            assert gap < 1e-5, f"{kind}: position {t} looks at a sink from afar: its scores moved by {gap:.1e}"


def heavy(**more):
    return double(HeavyHitterGPT(HeavyConfig(**SIZES | more)))


def test_heavy_hitters_by_hand():
    """Of two, the newest stays whatever it got, and beside it the one that got the most so far."""
    cache = cache_for(heavy(n_layer=1, n_head=1, n_kv_head=1, head_dim=2, budget=2, recent=1))
    q = torch.tensor([[[[math.sqrt(2), 0.0]]]], dtype=torch.float64)
    got = []
    for t, likes in enumerate([4, 1, 1, 4, 1]):  # exp of the score that each key gets, from every query
        k = torch.tensor([[[[math.log(likes), float(t)]]]], dtype=torch.float64)
        cache.update(0, q, k, k, torch.zeros(1, 1, 1, 1, dtype=torch.bool))
        got.append({int(place): round(received, 4) for place, received in zip(
            cache.keys[0][0, 0, :, 1], cache.received[0][0, 0].tolist(), strict=True)})
    # Token 2 looks at weights 4, 1, 1 and gets 1/6 itself, the least. It stays: it is the newest, and token 1 goes.
    # Token 3 looks at tokens 0, 2, 3 with weights 4, 1, 4; token 4 at 0, 3, 4 with weights 4, 4, 1.
    first = 1 + 4 / 5 + 4 / 6
    assert got == [
        {0: 1.0}, {0: 1.8, 1: 0.2}, {0: round(first, 4), 2: round(1 / 6, 4)},
        {0: round(first + 4 / 9, 4), 3: round(4 / 9, 4)}, {0: round(first + 8 / 9, 4), 4: round(1 / 9, 4)},
    ], f"the newest and the heaviest stay; kept, with what each got so far: {got}"


@pytest.mark.parametrize("first", [0, 2])
def test_heavy_hitters_by_enumeration(first):
    """Each head of keys keeps positions of its own, and no evicted one is looked at again: in dictionaries."""
    H, K, D, budget, recent = 4, 2, 6, 6, 2
    cache = cache_for(heavy(n_layer=1, budget=budget, recent=recent, first=first), 2)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (3 * torch.randn(2, n, 14, D, dtype=torch.float64, generator=generator) for n in (H, K, K))
    q[..., 0], k[:, :, 1, 0] = 3, -9  # position 1 is looked at by none that comes later: only `first` can keep it
    got, start = [[{} for _ in range(K)] for _ in range(2)], 0  # received so far, by position
    for T in [4, 3, *[1] * 7]:
        new = slice(start, start + T)
        out = cache.update(
            0, q[:, :, new], k[:, :, new], v[:, :, new], torch.ones(1, 1, T, T, dtype=torch.bool).triu(1))
        start += T
        for b in range(2):
            for head in range(K):
                mine = got[b][head]
                mine.update(dict.fromkeys(range(start - T, start), 0.0))
                for h in range(head * H // K, (head + 1) * H // K):
                    for t in range(start - T, start):
                        seen = [s for s in mine if s <= t]
                        scores = torch.stack([q[b, h, t] @ k[b, head, s] for s in seen]) / math.sqrt(D)
                        weights = scores.softmax(0)
                        expected = sum(w * v[b, head, s] for w, s in zip(weights, seen, strict=True))
                        assert (out[b, h, t - start + T] - expected).abs().max() < 1e-9, \
                            f"position {t} of head {h} looked at another set than {seen}"
                        for w, s in zip(weights.tolist(), seen, strict=True):
                            mine[s] += w
                order = sorted(mine, key=lambda s: math.inf if s >= start - recent or s < first else mine[s])
                got[b][head] = {s: mine[s] for s in sorted(order[-budget:])}
                kept = k[b, head, list(got[b][head])]
                assert torch.equal(cache.keys[0][b, head], kept), f"after {start} tokens, head {head} keeps others"
    assert got[0][0].keys() != got[0][1].keys(), "this text should make the heads differ"
    assert {1 in mine for row in got for mine in row} == {first == 2}, f"first {first}: who still has position 1?"


def test_room_for_all_is_full_attention():
    """With a budget of all positions nothing is evicted: the scores of full attention; with less, others."""
    texts, full = tokens(2, 12), double(GPT(ModelConfig(**SIZES)))
    for budget, same in ((12, True), (4, False)):
        model = heavy(budget=budget, recent=2)
        model.load_state_dict(full.state_dict())
        with torch.no_grad():
            for cuts in ([12], [5, 4, 3], [1] * 12):
                cache = cache_for(model, 2)
                scores = torch.cat([model(part, cache) for part in texts.split(cuts, dim=1)], dim=1)
                gap = (scores - full(texts)).abs().amax(dim=(0, 2))
                limit = 12 if same or cuts == [12] else 5 if cuts[0] == 5 else 4
                assert gap[:limit].max() < 1e-9, f"budget {budget}, passes of {cuts}: nothing was evicted yet"
                assert limit == 12 or gap[limit + 1:].max() > 1e-3, f"budget {budget}, passes of {cuts}: all is kept"
                assert cache.keys[0].shape == (2, 2, budget, 6), "a head keeps more than the budget"


PATTERNS = {  # what position 0, 1, 2, ... sees, blocks of 3
    "block-local": ["#", "##", "###", "...#", "...##", "...###", "......#", "......##"],
    "strided": ["#", "##", "###", "####", ".####", "..####", "#..####", ".#..####"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_by_enumeration(pattern):
    """A token that changes moves the scores of the positions that see it and no others, in one layer, wherever the text
    begins."""
    model, text = double(SparseGPT(SparseConfig(**SIZES | {"n_layer": 1}, block=3, pattern=pattern))), tokens(1, 8)
    for pad in (0, 2):
        padded = F.pad(text, (pad, 0))
        with torch.no_grad():
            for s in range(8):
                other = padded.clone()
                other[0, pad + s] = (other[0, pad + s] + 1) % 11
                change = model(other, pad=torch.tensor([pad])) - model(padded, pad=torch.tensor([pad]))
                moved = change.abs().amax(dim=(0, 2))[pad:] > 1e-9
                expected = [row[s:s + 1] == "#" for row in PATTERNS[pattern]]
                assert moved.tolist() == expected, f"{pattern}, {pad} of padding: who sees position {s}?"


def test_caches_by_formula_and_by_measurement():
    """The formula gives the numbers of the papers, and the bytes of the tensors that a text of 10 positions leaves."""
    wide = {"vocab_size": 11, "block_size": 4096, "n_embd": 5120, "n_head": 128, "head_dim": 128, "n_layer": 60}
    deepseek = LatentConfig(**wide, d_latent=512, d_rope=64, absorbed=True)
    groups = cache_bytes("MLA", deepseek, 1, 2) / cache_bytes("MHA", ModelConfig(**wide, n_kv_head=1), 1, 2)
    assert groups == 2.25, "DeepSeek-V2 keeps as much as grouped-query attention with 2.25 groups (table 1)"
    assert cache_bytes("MLA", deepseek, 1, 2) == 60 * (512 + 64) * 2
    heads, hitters = {"n_kv_head": 4}, {"budget": 7, "recent": 2}
    models = {
        "MHA": ("MHA", GPT(ModelConfig(**SIZES | heads)), 10 * 3 * 2 * 4 * 6 * 8),
        "GQA": ("MHA", GPT(ModelConfig(**SIZES)), 10 * 3 * 2 * 2 * 6 * 8),
        "window, sinks": ("MHA", GPT(ModelConfig(**SIZES | WINDOW)), 7 * 3 * 2 * 2 * 6 * 8),
        "CLA": ("CLA", EXACT["CLA"](n_layer=4), 10 * 2 * 2 * 2 * 6 * 8),
        "CLA of 3": ("CLA", EXACT["CLA"](), 10 * 2 * 2 * 2 * 6 * 8),
        "MLA": ("MLA", EXACT["MLA"](), 10 * 3 * 4 * (6 + 4 + 6) * 8),
        "MLA, absorbed": ("MLA", EXACT["MLA, absorbed"](), 10 * 3 * (10 + 4) * 8),
        "H2O": ("H2O", HeavyHitterGPT(HeavyConfig(**SIZES | hitters)), 7 * 3 * 2 * (2 * 6 * 8 + 4)),
        "block-local": ("MHA", EXACT["block-local"](), 3 * 3 * 2 * 2 * 6 * 8),
        "strided": ("MHA", EXACT["strided"](), 10 * 3 * 2 * 2 * 6 * 8),
    }
    for name, (kind, model, expected) in models.items():
        cache = cache_for(model.double())
        for token in tokens(1, 10).split(1, dim=1):
            with torch.no_grad():
                model(token, cache)
        assert cache_bytes(kind, model.config, 10, 8) == expected, f"{name}: the formula"
        assert kept_bytes(cache) == expected, f"{name}: {kept_bytes(cache)} bytes are kept, by formula {expected}"


def test_replaced_branches_start_small():
    """The stream sums 2 n_layer branches: an attention put in place starts with weights of 1 / sqrt(2 n_layer H D)."""
    for kind, make in {**EXACT, "H2O": lambda **more: HeavyHitterGPT(HeavyConfig(**SIZES | more))}.items():
        torch.manual_seed(0)
        weights = torch.cat([block.attn.proj.weight.flatten() for block in make(n_head=8).blocks])
        assert weights.std().item() == pytest.approx((2 * 3 * 8 * 6) ** -0.5, rel=0.05), \
            f"{kind}: its output starts larger than the one that it replaces, and would seem worse than it is"


def test_nonsense_is_refused():
    """Sizes that cannot be, padding where there is none, an unknown kind: one line that names the cause."""
    for config, more, cause in (
        (LatentConfig, {"d_latent": 0}, "d_latent is 0"), (LatentConfig, {"d_rope": 3}, "d_rope is 3"),
        (HeavyConfig, {"budget": 2, "recent": 3}, "recent is 3"), (HeavyConfig, {"recent": 0}, "recent is 0"),
        (HeavyConfig, {"budget": 4, "recent": 2, "first": 3}, "first is 3"),
        (HeavyConfig, {"window": 4}, "window 4"), (SparseConfig, {"block": 0}, "block 0"),
        (SparseConfig, {"block": 3, "n_sink": 1}, "n_sink 1"), (SparseConfig, {"pattern": "dense"}, "dense"),
    ):
        with pytest.raises(BadInput, match=cause):
            config(**SIZES | more)
    model = heavy(budget=4, recent=2)
    with pytest.raises(BadInput, match="one length"):
        model(tokens(2, 3), cache_for(model, 2), torch.tensor([0, 1]))
    with pytest.raises(BadInput, match="RNN"):
        cache_bytes("RNN", model.config)
