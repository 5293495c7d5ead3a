"""Attention that keeps less: equal budgets, losses by decoding that are those of one pass, and the table's columns."""

import json

from shared.errors import BadInput

import pytest
import torch

from demos import variants
from demos.ablation import Scale
from demos.variants import Sizes
from extras.attention_variants import HeavyConfig, HeavyHitterGPT
from model import GPT, ModelConfig
from train import evaluate

SCALE = Scale(steps=2, seeds=1, batch_size=4, block_size=16, n_embd=32, n_head=4, n_layer=2)
SIZES = Sizes(window=4, sinks=1, recent=2, stride=3, d_latent=6, d_rope=2, texts=3, rounds=4)
FIELDS = {"vocab_size": 11, "n_kv_head": 4, "block_size": 16, "n_embd": 32, "n_head": 4, "n_layer": 2}
FLAGS = ["--n-embd", "16", "--n-layer", "2", "--block-size", "16", "--batch-size", "4", "--window", "4", "--sinks", "1",
         "--recent", "2", "--stride", "3", "--d-latent", "6", "--d-rope", "2", "--texts", "3", "--rounds", "4"]
FOUND = variants.variants(SCALE, SIZES)
TOTAL = sum(p.numel() for p in GPT(ModelConfig(**FIELDS)).parameters())


def test_all_have_about_as_many_parameters():
    """What a variant saves in its attention it has in its feed-forward, to within half of the steps of 8 units."""
    for name, variant in FOUND.items():
        model = variants.build(variant, FIELDS, TOTAL, 0)
        mine = sum(p.numel() for p in model.parameters())
        assert abs(mine - TOTAL) <= 4 * 3 * 32 * 2, f"{name} has {mine:,} parameters, MHA {TOTAL:,}"
    assert variants.build(FOUND["MQA"], FIELDS, TOTAL, 0).config.n_hidden > ModelConfig(**FIELDS).n_hidden


def test_the_variants_are_what_they_are_called():
    """What each keeps of a text of 16 positions, in numbers of 4 bytes, worked out by hand; all that are compared."""
    expected = {  # layers x positions x numbers
        "MHA": 2 * 16 * 64, "GQA": 2 * 16 * 32, "MQA": 2 * 16 * 16, "CLA": 16 * 64, "MLA": 2 * 16 * 4 * (8 + 2 + 8),
        "MLA, absorbed": 2 * 16 * (6 + 2), "window": 2 * 4 * 64, "window + sinks": 2 * 4 * 64,
        "block-local": 2 * 4 * 64, "strided": 2 * 16 * 64, "window, at decode": 2 * 4 * 64,
        "window + sinks, at decode": 2 * 4 * 64, "H2O, at decode": 2 * 4 * (64 + 4),
    }  # fmt: skip
    models, order = {name: variants.build(variant, FIELDS, TOTAL, 0) for name, variant in FOUND.items()}, []
    for name, model in models.items():
        model.register_forward_hook(lambda *args, name=name: order.append(name))
    found = variants.decode(models, texts=3, rounds=2)
    assert {name: kept for name, (kept, _) in found.items()} == {name: 4 * n for name, n in expected.items()}
    assert order == list(FOUND) * (16 + 2), "the variants take turns, a token each"
    assert min(speed for _, speed in found.values()) > 0
    sees = models["strided"].look(16).hidden[0, 0].logical_not()
    assert sees[15].nonzero().flatten().tolist() == [0, 3, 6, 9, 12, 13, 14, 15], "3 newest, and each third one"
    weights = models["MHA"].state_dict()
    for name, variant in FOUND.items():
        if name.endswith("at decode"):
            assert variant.weights == "MHA"
            models[name].load_state_dict(weights)


def test_decoding_loses_what_was_evicted_and_nothing_else():
    """Token by token, the loss is that of one pass where all is kept; with a small budget it is another."""
    data = torch.randint(11, (16 * 7 + 1,), generator=torch.Generator().manual_seed(2)).to(torch.uint16)
    for name in ("MHA", "MLA, absorbed", "CLA", "window + sinks", "block-local"):
        model, ticks = variants.build(FOUND[name], FIELDS, TOTAL, 0).train(), []
        loss = variants.decoded_loss(model, data, rows=3, tick=lambda ticks=ticks: ticks.append(1))
        assert loss == pytest.approx(evaluate(model, data), abs=1e-5), f"{name}: another loss by decoding"
        assert len(ticks) == 3 * 16 and model.training, "7 windows, 3 at a time, and the mode as it was found"
    torch.manual_seed(0)
    full = GPT(ModelConfig(**FIELDS))
    for p in full.parameters():
        p.data *= 2  # attention that is far from even
    for budget in (16, 4):
        model = HeavyHitterGPT(HeavyConfig(**FIELDS, budget=budget, recent=2))
        model.load_state_dict(full.state_dict())
        gap = abs(variants.decoded_loss(model, data) - evaluate(full, data))
        assert (gap < 1e-5) == (budget == 16), f"budget {budget} of 16: the loss moved by {gap:.1e}"


def test_the_demo_runs(text, out, capsys):
    """A row for each variant, with the loss of the weights that it takes; runs are made once; nonsense is refused."""
    argv = ["--corpus", str(text), "--steps", "1", "--seeds", "2", *FLAGS]
    variants.main(argv)
    folder = out / "variants"
    rows = {row["variant"]: row for row in json.loads((folder / "summary.json").read_text("utf-8"))["rows"]}
    assert list(rows) == list(FOUND)
    assert rows["MLA"]["val loss"] == pytest.approx(rows["MLA, absorbed"]["val loss"], abs=1e-4), \
        "one training, two forms of the same attention"
    assert rows["H2O, at decode"]["val loss"] != rows["MHA"]["val loss"] != rows["window, at decode"]["val loss"], \
        "at decode less is kept, and the loss is another"
    for name, row in rows.items():
        assert row["cache, bytes"] == row["counted"], f"{name}: formula and measurement differ"
        assert row["decode, tokens/s"] > 0 and 1 < row["val loss"] < 4, row
    assert (folder / "variants.png").stat().st_size > 5000, "no figure"
    [kept] = folder.glob("runs-*.json")
    before = kept.read_bytes()
    variants.main([*argv, "--rounds", "2"])
    assert kept.read_bytes() == before and len(list(folder.glob("runs-*.json"))) == 1, "runs were made again"
    assert "H2O, at decode" in capsys.readouterr().out
    for flag, value in (("--sinks", "4"), ("--recent", "5"), ("--texts", "0"), ("--block-size", "5000"),
                        ("--d-rope", "3"), ("--stride", "0")):
        with pytest.raises(BadInput):
            variants.main([*argv, flag, value])
