"""The shapes compared have equally many parameters and differ in what their rows name."""

import json

from shared.errors import BadInput

import pytest

from demos import shapes
from demos.ablation import Scale
from model import GPT


@pytest.mark.parametrize("n_embd, n_layer, vocab_size", [(64, 4, 65), (128, 4, 65), (48, 3, 500)])
def test_all_have_equally_many_parameters(n_embd, n_layer, vocab_size):
    """All shapes are within half a per cent of the first, counted in models that were really made."""
    scale = Scale(n_embd=n_embd, n_layer=n_layer)
    configs = shapes.shapes(scale, vocab_size)
    counts = {name: sum(p.numel() for p in GPT(config).parameters()) for name, config in configs.items()}
    for name, count in counts.items():
        assert abs(count / counts["base"] - 1) < 0.005, f"{name} has {count:,} parameters, the first {counts['base']:,}"
        assert shapes.count(configs[name]) == count, f"{name}: the formula forgets a part of the model"


def test_each_shape_is_what_its_row_names():
    """Deeper is narrower, a wider feed-forward is in narrower blocks, more heads are smaller heads; the rest stays."""
    configs = shapes.shapes(Scale(), 65)
    base = configs.pop("base")
    assert (base.n_layer, base.n_embd, base.n_head) == (4, 64, 2)
    assert len(configs) == 8
    for name, config in configs.items():
        kind, value = name.split(": ")
        ratio = config.n_hidden / config.n_embd
        if kind == "blocks":
            assert config.n_layer == int(value) and config.n_head == 2
            assert (config.n_embd < 64) == (config.n_layer > 4), f"{name}: {config.n_embd} channels"
            assert ratio == pytest.approx(8 / 3, rel=0.15), f"{name}: {ratio:.2f} units for each channel"
        elif kind == "feed-forward":
            assert config.n_layer == 4 and ratio == pytest.approx(int(value[0]), rel=0.15), f"{name}: {ratio:.2f}"
            assert (config.n_embd < 64) == (ratio > 8 / 3), f"{name}: {config.n_embd} channels"
        else:
            assert (config.n_head, config.n_kv_head) == (int(value), int(value))
            assert config.n_embd == 64 == config.n_head * config.head_dim, f"{name}: heads share the channels"


def test_too_few_parameters_are_refused():
    """A budget that does not fill the blocks is one clear line."""
    with pytest.raises(BadInput, match="too few for 50 blocks"):
        shapes.fill(Scale(), 65, 1_000, 50, 8 / 3)


def test_the_demo_runs(text, out, monkeypatch):
    """Every shape is trained, timed and drawn."""
    monkeypatch.setattr(shapes, "DEPTHS", (2,))
    monkeypatch.setattr(shapes, "RATIOS", (1,))
    small = ["--n-embd", "16", "--n-layer", "1", "--block-size", "16", "--batch-size", "4", "--rounds", "1"]
    shapes.main(["--corpus", str(text), "--steps", "2", "--seeds", "1", *small])
    rows = json.loads((out / "shapes" / "summary.json").read_text("utf-8"))["rows"]
    names = ["base", "blocks: 2", "feed-forward: 1 C", "heads: 1", "heads: 4", "heads: 8"]
    assert [row["shape"] for row in rows] == names and all(row["ms"] > 0 for row in rows)
    assert (out / "shapes" / "shapes.png").stat().st_size > 5000, "no figure"
    with pytest.raises(BadInput, match="--rounds 0"):
        shapes.main(["--rounds", "0"])
