"""Upcycled or from scratch: all models see the same text, and nothing is lost when a dense one becomes a mixture."""

import json

from shared.errors import BadInput

import pytest
import torch

from data import load_data
from demos import upcycled
from demos.ablation import Scale
from demos.upcycled import Sizes

SCALE = Scale(steps=8, seeds=1, batch_size=4, block_size=16, n_embd=24, n_head=2, n_layer=2)
SIZES = Sizes(n_expert=3, n_active=2, dense_steps=5)
FIELDS = {"n_kv_head": 1, "block_size": 16, "n_embd": 24, "n_head": 2, "n_layer": 2}


def test_all_see_the_same_batches(text, monkeypatch):
    """In two parts or one, step 6 reads batch 6; the first part of both is one model; work is active weights."""
    data, seen, fit = load_data(str(text)), {}, upcycled.ablation.fit
    fields, first = FIELDS | {"vocab_size": len(data.tokenizer)}, {}

    def spy(model, *args, **more):
        hook = model.register_forward_pre_hook(lambda m, a: seen[kind].append(a[0]) if m.training else None)
        found = fit(model, *args, **more)
        hook.remove()
        first.setdefault(kind, found["val loss"])
        return found

    monkeypatch.setattr(upcycled.ablation, "fit", spy)
    found = {}
    for kind in upcycled.KINDS:
        seen[kind], ticks = [], []
        found[kind] = upcycled.run(kind, fields, SIZES, data, SCALE, 1, lambda step, loss, ticks=ticks:
                                   ticks.append(step))
        assert ticks == list(range(1, 9)) and len(found[kind]["losses"]) == 8, f"{kind}: steps are missing"
    for kind in ("upcycled", "from scratch"):
        assert all(torch.equal(a, b) for a, b in zip(seen[kind], seen["dense"], strict=True)), \
            f"{kind}: other batches than the dense model"
    assert found["upcycled"]["losses"][:5] == found["dense"]["losses"][:5]
    assert found["upcycled"]["before"] == found["dense"]["before"] == first["dense"]
    assert found["upcycled"]["losses"][5] == pytest.approx(found["dense"]["losses"][5], abs=0.01), \
        "the first step after upcycling is a jump"
    small, unit = found["dense"]["params"], 2 * 3 * 24 * upcycled.build("dense", fields, SIZES, 0).config.n_hidden
    active = small + unit + 2 * 3 * 24  # one feed-forward more in each of 2 layers, and the routers
    assert found["dense"]["work"] == 8 * small and found["from scratch"]["work"] == 8 * active
    assert found["upcycled"]["work"] == 5 * small + 3 * active
    assert found["dense"]["cosine"] is None and abs(found["from scratch"]["cosine"]) < 0.1 < found["upcycled"]["cosine"]


def test_how_alike_experts_are():
    """Copies have a cosine of 1; by hand: of three experts two are equal and the third is the opposite, -1 / 3."""
    model = upcycled.build("from scratch", FIELDS | {"vocab_size": 5}, SIZES, 0)
    for sign, expected in ((1, 1.0), (-1, -1 / 3)):
        for layer in upcycled.mixtures(model):
            for matrices in (layer.gate.data, layer.fc.data, layer.proj.data):
                matrices[1], matrices[2] = matrices[0], sign * matrices[0]
        assert upcycled.cosine(model) == pytest.approx(expected, abs=1e-5)


def test_the_demo_runs(text, out, capsys):
    """The whole demo: three rows and a figure; runs are made once; nonsense is refused."""
    argv = ["--corpus", str(text), "--steps", "4", "--dense-steps", "2", "--seeds", "2", "--n-embd", "16", "--n-head",
            "2", "--n-layer", "2", "--block-size", "16", "--batch-size", "4", "--n-expert", "4"]
    upcycled.main(argv)
    folder = out / "upcycled"
    rows = {row["variant"]: row for row in json.loads((folder / "summary.json").read_text("utf-8"))["rows"]}
    assert list(rows) == list(upcycled.KINDS)
    assert rows["upcycled"]["params"] == rows["from scratch"]["params"] > 2 * rows["dense"]["params"]
    assert 1 < rows["upcycled"]["work, times dense"] < rows["from scratch"]["work, times dense"] < 2
    assert rows["dense"]["cosine"] is None and rows["upcycled"]["cosine"] > 0.5
    assert rows["from scratch"]["after the dense steps"] is None and 1 < rows["dense"]["after the dense steps"] < 4
    assert (folder / "upcycled.png").stat().st_size > 5000
    [kept] = folder.glob("runs-*.json")
    before = kept.read_bytes()
    upcycled.main(argv)
    assert kept.read_bytes() == before and "from scratch" in capsys.readouterr().out
    for flag, value in (("--dense-steps", "4"), ("--n-active", "5"), ("--n-expert", "0"), ("--steps", "0")):
        with pytest.raises(BadInput):
            upcycled.main([*argv, flag, value])
