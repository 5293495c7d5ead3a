"""The choices: each variant changes what its name says, and the table is made of all of them."""

import argparse
import json

from shared.errors import BadInput

import pytest
import torch

from demos import ablation, choices
from demos.ablation import Scale


def test_each_variant_changes_one_thing(text, out):
    """Without a base the weights are others, drawn by the seed; packing changes no loss but for rounding."""
    args = argparse.Namespace(base="tiny", device="cpu", corpus=str(text), families=["repeat", "last"])
    scale = Scale(steps=2, seeds=1, batch_size=4, records=24, test=6)
    world = ablation.world(ablation.base(args), args, scale, 0)
    query = {name: choices.start(world, name, 0).model.blocks[0].attn.query.weight for name in choices.VARIANTS}
    same = [name for name, weight in query.items() if torch.equal(weight, query[choices.FIRST])]
    assert same == [name for name in choices.VARIANTS if name != "no base"], "all but one begin with the base"
    assert torch.equal(choices.start(world, "no base", 0).model.blocks[0].attn.query.weight, query["no base"])
    assert query["no base"].shape == query["padded"].shape, "without a base, the shape is the same"
    first = {name: choices.job(world, name, scale, 0, lambda *_: None)["losses"][0] for name in choices.VARIANTS}
    assert first["padded"] == pytest.approx(first[choices.FIRST], abs=0.02), "packing has changed what is learned"
    for name in ("questions too", "short first", "no base"):
        assert abs(first[name] - first[choices.FIRST]) > 1e-4, f"{name}: the first step is that of the recipe as it is"


def test_the_demo_runs(flags, out, capsys):
    """Five variants, a table and a figure; runs are made once; nonsense is refused."""
    argv = [*flags, "--rounds", "1", "--families", "repeat", "last", "upper"]
    choices.main(argv)
    folder = out / "choices"
    rows = json.loads((folder / "summary.json").read_text("utf-8"))["rows"]
    assert [row["variant"] for row in rows] == list(choices.VARIANTS)
    for row in rows:
        assert 0 <= row["exact"] <= 1 and 0 <= row["phrasings"] <= 1 and row["loss"] > 0 and row["time"] > 0, row
    assert rows[0]["time"] == 1 and rows[0]["difference"] is None, "times and differences are from the first variant"
    [kept] = folder.glob("runs-*.json")
    before = kept.read_bytes()
    assert {*json.loads(before)["no base, 0"]["words"]} == {"repeat", "last", "upper", "mean"}
    choices.main(argv)
    assert kept.read_bytes() == before and (folder / "choices.png").stat().st_size > 5000
    assert "questions too" in capsys.readouterr().out
    for flag, value in (("--rounds", "0"), ("--seeds", "0"), ("--families", "sing"), ("--base", "nowhere")):
        with pytest.raises(BadInput):
            choices.main([*argv, flag, value])
