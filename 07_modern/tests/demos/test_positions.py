"""The ways to know positions are what they are called; PoPE's scores are those of its paper's complex numbers."""

import cmath
import json
import math

from shared.errors import BadInput

import pytest
import torch
from torch import nn

from data import windows
from demos import positions
from demos.ablation import Scale, shape

SCALE = Scale(steps=2, seeds=1, batch_size=4, block_size=8, n_embd=12, n_head=3, n_layer=2)


def scramble(module):
    """Move every weight off its start, phases included, which go beyond the bounds that PoPE holds them in."""
    torch.manual_seed(1)
    for name, p in module.named_parameters():
        nn.init.normal_(p, std=8.0 if "phase" in name else 0.5)
    return module


def build(kind, **changes):
    return positions.build(kind, shape(SCALE, 11, **changes), seed=0)


def softplus(x):
    return math.log1p(math.exp(x))


def test_pope_is_the_papers_formula():
    """PoPE scores Re(q~^H k~) with lengths softplus and angles t theta_c, s theta_c + delta_c, worked out in complex
    numbers: D frequencies, a phase for each head that is held between -2 pi and 0, divided by the root of D."""
    ours = scramble(positions.PolarAttention(shape(SCALE, 11, n_kv_head=1, qk_norm=False, rope_base=100.0)))
    assert ours.phase.shape == (3, 1, 4), "a phase for each channel of each head"
    assert ours.phase.min() < -2 * math.pi and ours.phase.max() > 0
    x = torch.randn(1, 5, 12)
    q, k, v = ((x[0] @ layer.weight.T).tolist() for layer in (ours.query, ours.key, ours.value))
    D, heads = 4, []
    for h in range(3):
        delta = [min(max(phase, -2 * math.pi), 0) for phase in ours.phase[h, 0].tolist()]
        theta = [100.0 ** (-c / D) for c in range(D)]
        rows = []
        for t in range(5):
            q_polar = [cmath.rect(softplus(q[t][h * D + c]), t * theta[c]) for c in range(D)]
            scores = []
            for s in range(t + 1):
                k_polar = [cmath.rect(softplus(k[s][c]), s * theta[c] + delta[c]) for c in range(D)]
                score = sum((a.conjugate() * b).real for a, b in zip(q_polar, k_polar, strict=True))
                scores.append(math.exp(score / math.sqrt(D)))
            rows.append([sum(w * v[s][c] for s, w in enumerate(scores)) / sum(scores) for c in range(D)])
        heads.append(rows)
    expected = torch.tensor([[value for head in heads for value in head[t]] for t in range(5)]) @ ours.proj.weight.T
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-5, msg=lambda m: f"not PoPE's scores\n{m}")


def test_pope_knows_how_far_and_not_where():
    """A query's scores depend on how far back each key stands: pushed along by equal strangers, PoPE tells the same."""
    attention = scramble(positions.PolarAttention(shape(SCALE, 11)))
    q, k = torch.randn(2, 3, 6, 4)
    score = (positions.polar(q, attention.angles(6)) @ positions.polar(k, attention.angles(6)).mT)
    angles = attention.angles(106)[100:]
    later = positions.polar(q, angles) @ positions.polar(k, angles).mT
    torch.testing.assert_close(score, later, rtol=1e-3, atol=1e-3)
    assert (positions.polar(q, angles).norm(dim=-1) ** 2).allclose(nn.functional.softplus(q).pow(2).sum(-1), rtol=1e-4)


def test_pope_has_a_frequency_for_each_channel():
    """As many frequencies as channels, from 1 radian a position on downwards; RoPE has half as many."""
    angles = positions.PolarAttention(shape(SCALE, 11, rope_base=16.0)).angles(3)
    expected = [[t * 16.0 ** (-c / 4) for c in range(4)] for t in range(3)]
    torch.testing.assert_close(angles, torch.tensor(expected))


def test_sinusoids_by_hand():
    """Channels 2i and 2i + 1 are sine and cosine of t / 10000^(2i / C); their vectors are as long as a token's."""
    waves = positions.sinusoids(50, shape(SCALE, 11))
    for t, c in ((0, 1), (3, 0), (7, 5), (49, 10)):
        wave = math.sin if c % 2 == 0 else math.cos
        expected = wave(t / 10_000 ** ((c - c % 2) / 12)) * math.sqrt(2 / 12)
        assert waves[t, c].item() == pytest.approx(expected, abs=1e-5), f"position {t}, channel {c}"
    assert waves.norm(dim=1).allclose(torch.ones(50), atol=1e-4), "a token's vector has length 1 on average"


def test_all_start_from_the_same_weights():
    """With one seed the kinds share all matrices and differ in what knows the positions alone."""
    rope = build("RoPE").state_dict()
    extra = {"none": set(), "learned": {"tok_emb.positions"}, "sinusoidal": set(), "RoPE": set(),
             "PoPE": {f"blocks.{i}.attn.phase" for i in range(2)}}
    for kind in positions.KINDS:
        mine = {name.replace("tokens.", ""): value for name, value in build(kind).state_dict().items()}
        assert mine.keys() - rope.keys() == extra[kind] and rope.keys() <= mine.keys(), f"{kind}: {sorted(mine)}"
        assert all(torch.equal(rope[name], mine[name]) for name in rope), f"{kind} starts from other weights"


def test_only_none_sees_a_bag():
    """With one block and no positions the order of the past makes no difference; with any positions it does."""
    a, b = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[4, 2, 1, 3, 5]])
    for kind in positions.KINDS:
        model = scramble(build(kind, n_layer=1))
        gap = (model(a) - model(b))[:, -1].abs().max().item()
        assert (gap < 1e-4) == (kind == "none"), f"{kind}: another order moved the scores by {gap:.1e}"
        if kind in ("learned", "sinusoidal"):
            model.tok_emb.positions.data.zero_()
            gap = (model(a) - model(b))[:, -1].abs().max().item()
            assert gap < 1e-4, f"{kind}: the order is known without the vectors added: are queries turned too?"


def test_no_kind_sees_the_future():
    """A token that changes leaves earlier scores alone, and changes its own and later ones."""
    a = torch.randint(11, (1, 8), generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[0, 5] = (b[0, 5] + 1) % 11
    for kind in positions.KINDS:
        model = scramble(build(kind))
        moved = (model(a) - model(b)).abs().amax(dim=(0, 2)) > 1e-5
        assert moved.tolist() == [False] * 5 + [True] * 3, f"{kind}: a position saw a later token"


def test_losses_are_kept_apart_by_position():
    """The loss at each place is the mean over windows, each token's from a pass of its own; stretches are means too."""
    model, data = scramble(build("PoPE")), torch.randint(11, (50,), generator=torch.Generator().manual_seed(0))
    losses = positions.by_position(model, data, 8, rows=4)
    x, y = (part.long() for part in windows(data, 8))
    for t in (0, 3, 7):
        slow = [-model(x[i:i + 1, :t + 1])[0, -1].log_softmax(0)[y[i, t]].item() for i in range(len(x))]
        assert losses[t] == pytest.approx(sum(slow) / len(slow), rel=1e-4), f"position {t}"
    found = positions.stretches([1.0] * 2 + [2.0] * 2 + [3.0, 5.0, 3.0, 5.0] + [7.0] * 8, T=2)
    assert found == {"1x": 1.0, "2x": 2.0, "4x": 4.0, "8x": 7.0}, found


def test_the_demo_runs(text, out, capsys):
    """Every kind but learned is scored on windows eight times as long; learned positions end and say so."""
    small = ["--n-embd", "8", "--n-layer", "1", "--block-size", "8", "--batch-size", "4"]
    positions.main(["--corpus", str(text), "--steps", "2", "--seeds", "1", *small])
    rows = json.loads((out / "positions" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["positions"] for row in rows] == list(positions.KINDS)
    assert all(("8x" in row) == (row["positions"] != "learned") for row in rows), "learned positions end"
    assert "no vector for position 8" in capsys.readouterr().out
    assert (out / "positions" / "positions.png").stat().st_size > 5000, "no figure"
    with pytest.raises(BadInput):
        positions.main(["--corpus", str(text), "--block-size", "500"])
