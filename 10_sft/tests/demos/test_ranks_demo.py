"""Ranks: what is trained is counted by hand, each kind has its optimiser, and all begin with the same model."""

import json

from shared.errors import BadInput

import pytest
import torch

import lora
from demos import ranks
from demos.ranks import Sizes
from model import GPT, ModelConfig


def small() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(13, block_size=8, n_embd=12, n_head=2, n_kv_head=1, n_layer=2, n_hidden=16))


def test_the_share_by_hand():
    """A matrix [out, in] has r (in + out) numbers beside it; they are a share of the model's own, itself left out."""
    model = small()
    assert ranks.trained(model) == 1.0, "without adapters all is trained"
    ranks.prepared(model, 3, Sizes(alpha=6.0))
    # Of each block: query and proj 12 x 12, key and value 6 x 12, gate and fc 16 x 12, proj 12 x 16; then the norms.
    added = 2 * 3 * (24 + 24 + 18 + 18 + 28 + 28 + 28)
    whole = 13 * 12 + 2 * (2 * 144 + 2 * 72 + 3 * 192 + 2 * 12 + 2 * 6) + 12
    assert ranks.trained(model) == pytest.approx(added / whole), "the share is miscounted"


def test_each_kind_has_its_optimiser():
    """Full tuning has none of its own; AdamW gets all weights at one rate, or adapters at another, without decay."""
    sizes = Sizes(lora_lr=0.02, full_lr=0.004, alpha=6.0)
    assert ranks.prepared(small(), ranks.FULL, sizes) is None, "full tuning is tuned by the recipe of sft.py"
    model = small()
    [group] = ranks.prepared(model, ranks.PLAIN, sizes).param_groups
    assert len(group["params"]) == len([*model.parameters()]) and group["lr"] == 0.004, "all weights at --full-lr"
    model = small()
    [group] = ranks.prepared(model, 3, sizes).param_groups
    layers = lora.adapters(model).values()
    assert len(group["params"]) == 2 * len(layers) == 2 * 2 * 7 and group["lr"] == 0.02, "adapters at --lora-lr"
    assert group["weight_decay"] == 0 and all(layer.scale == 2.0 for layer in layers), "alpha does not reach them"


def test_the_demo_runs(flags, out, capsys):
    """Before, full, full with AdamW and two ranks; a higher rank trains more; nonsense is refused."""
    argv = [*flags, "--test", "9", "--families", "repeat", "last", "--new", "last", "--new-steps", "3",
            "--ranks", "1", "3"]  # fmt: skip
    ranks.main(argv)
    folder = out / "ranks"
    rows = {row["variant"]: row for row in json.loads((folder / "summary.json").read_text("utf-8"))["rows"]}
    assert list(rows) == ["before", "full", "full, AdamW", "rank 1", "rank 3"]
    shares = [float(row["trained"].rstrip("%")) for name, row in rows.items() if name != "before"]
    assert shares[0] == shares[1] == 100 > shares[3] > shares[2] > 0, "the share of what is trained"
    assert all(-1 < row["tax"] < 5 for row in rows.values()) and (folder / "ranks.png").stat().st_size > 5000
    [kept] = folder.glob("runs-*.json")
    losses = {name: run["losses"] for name, run in json.loads(kept.read_text("utf-8"))["all kinds, 0"].items()
              if name != "before"}
    assert len({run[0] for run in losses.values()}) == 1, "the kinds begin with other models: B must be 0 at the start"
    assert len({run[-1] for run in losses.values()}) == 4, "two kinds are trained alike"
    assert "full, AdamW" in capsys.readouterr().out
    for wrong in (["--ranks", "0"], ["--alpha", "0"], ["--lora-lr", "nan"], ["--full-lr", "0"], ["--new", "spell"]):
        with pytest.raises(BadInput):
            ranks.main([*argv, *wrong])
