"""Forgetting: batches hold the share of old records they should, and the curves are of the right families."""

import argparse
import json
from itertools import islice

from shared.errors import BadInput

import pytest

from data import Example
from demos import ablation, forgetting
from sft import SFTConfig


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 1), (0.2, 2), (0.4, 4)])
def test_the_share_of_old_records(share, count):
    """Of each ten conversations as many are old as the share says, and each old one is seen before any comes again."""
    old, new = ([Example([kind, i, 0], [False, True, True]) for i in range(20)] for kind in (1, 2))
    seen = list(islice(forgetting.mixed(new, old, share, SFTConfig(batch_size=10)), 4))
    assert all(len(batch) == 10 for batch in seen), "replay changes the size of the batch"
    again = [[example.ids[1] for example in batch if example.ids[0] == 1] for batch in seen]
    assert all(len(part) == count for part in again), f"not {share:.0%} of the batch is old"
    flat = [i for part in again for i in part]
    assert len({*flat}) == len(flat), "an old record came twice before others came once"


def test_the_row_by_hand():
    """Old 0.8 -> 0.2 and 0.6 -> 0.6: a mean of 0.4 of 0.7 is kept, the lowest mean along the way was 0.3."""
    seeds = [{"at": [0, 1, 2], "old": [0.8, 0.0, 0.2], "new": [0, 0.5, 0.9]},
             {"at": [0, 1, 2], "old": [0.6, 0.6, 0.6], "new": [0, 0.5, 0.7]}]  # fmt: skip
    row = forgetting.summary("full", seeds)
    expected = {"old before": 0.7, "old": 0.4, "kept": 0.4 / 0.7, "lowest": 0.3, "new": 0.8}
    assert {name: row[name] for name in expected} == pytest.approx(expected), "means over seeds, then the share"
    assert row["spread"] == pytest.approx(0.4 / 2**0.5) and row["its spread"] == pytest.approx(0.2 / 2**0.5)


def test_the_demo_runs(flags, out, capsys):
    """Five ways from one model; what is looked at is old and new words; runs are made once; nonsense is refused."""
    argv = [*flags, "--test", "9", "--families", "repeat", "last", "spell", "--new", "last", "--new-steps", "3",
            "--every", "2"]  # fmt: skip
    forgetting.main(argv)
    folder = out / "forgetting"
    rows = {row["way"]: row for row in json.loads((folder / "summary.json").read_text("utf-8"))["rows"]}
    assert list(rows) == list(forgetting.WAYS)
    [kept] = folder.glob("runs-*.json")
    before = kept.read_bytes()
    runs = json.loads(before)["all ways, 0"]
    assert all(seen["at"] == [0, 2, 3] and len(seen["old"]) == len(seen["new"]) == 3 for seen in runs.values()), \
        "looks at the start, on the way and at the end"
    assert len({seen["old"][0] for seen in runs.values()}) == 1, "the ways begin with different models"
    forgetting.main(argv)
    assert kept.read_bytes() == before and (folder / "forgetting.png").stat().st_size > 5000
    assert "replay 40 %" in capsys.readouterr().out
    for wrong in (["--new", "upper"], ["--every", "9"], ["--rank", "0"], ["--batch-size", "1"], ["--lora-lr", "2"]):
        with pytest.raises(BadInput):
            forgetting.main([*argv, *wrong])


def test_old_and_new_are_kept_apart(text, out):
    """What is taught last holds the new family alone, and what is looked at as old holds all others."""
    args = argparse.Namespace(base="tiny", device="cpu", corpus=str(text), families=["repeat", "last", "spell"])
    scale = ablation.Scale(steps=1, seeds=1, batch_size=4, records=20, test=9)
    world = ablation.world(ablation.base(args), args, scale, 0)
    made = ablation.part(world, args, scale, 0, ["last"])
    assert {record["family"] for record in [*made.records, *made.tests["words"]]} == {"last"}
    assert made.opened is world.opened and len(made.examples) == 20, "another tokenizer, or tasks are missing"
