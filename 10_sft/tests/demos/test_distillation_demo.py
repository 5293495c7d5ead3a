"""Distilled or alone: one beginning for all students, equal time, and texts that are the teacher's."""

import argparse
import json

from shared.errors import BadInput

import pytest
import torch

from demos import ablation, distillation
from demos.distillation import Sizes


def test_the_demo_runs(flags, out, monkeypatch, capsys):
    """Six rows; "equal time" has the steps that the measured ratio gives; all students begin alike."""
    begun, told = [], []
    student, run = distillation.student, distillation.run

    def first(opened, sizes, seed):
        made = student(opened, sizes, seed)
        begun.append(made.model.blocks[0].attn.query.weight.clone())
        return made

    def watched(way, model, teacher, examples, config):
        told.append((way, config))
        return run(way, model, teacher, examples, config)

    seconds = {"alone": 1.0, "forward KL": 1.7, "reverse KL": 1.8}
    monkeypatch.setattr(distillation, "student", first)
    monkeypatch.setattr(distillation, "run", watched)
    monkeypatch.setattr(distillation, "pace", lambda *_: seconds)
    argv = [*flags, "--steps", "4", "--n-embd", "8", "--n-layer", "1", "--teacher-steps", "2",
            "--families", "last", "upper", "--mix", "0.3"]  # fmt: skip
    # The teacher of this test cannot end an answer: its texts are made up.
    monkeypatch.setattr(distillation, "teacher_texts", lambda teacher, records, length: records[:20])
    distillation.main(argv)
    rows = {row["variant"]: row for row in json.loads((out / "distillation" / "summary.json").read_text())["rows"]}
    assert list(rows) == ["teacher", "alone", "alone, equal time", "forward KL", "reverse KL", "texts"]
    assert rows["alone, equal time"]["steps"] == 7, "4 steps of 1.7 s are the time of 6.8 steps of 1 s"
    assert {rows[name]["steps"] for name in ("alone", "forward KL", "reverse KL", "texts")} == {4}, "equal steps"
    times = {name: row["time"] for name, row in rows.items() if name in ("alone", "alone, equal time", "forward KL")}
    assert times == pytest.approx({"alone": 1.0, "alone, equal time": 1.75, "forward KL": 1.7})
    assert rows["texts"]["time"] > 1, "the teacher's writing takes no time"
    assert all(torch.equal(weight, begun[1]) for weight in begun[1:]), "the students begin with other weights"
    ways = dict(told)
    assert [config.reverse for config in (ways["forward KL"], ways["reverse KL"])] == [False, True]
    assert ways["forward KL"].mix == 0.3 and ways["forward KL"].temperature == 2.0, "flags do not reach the recipe"
    assert (out / "distillation" / "distillation.png").stat().st_size > 5000
    assert "reverse KL" in capsys.readouterr().out
    for flag, value in (("--mix", "2"), ("--temperature", "0"), ("--rounds", "0"), ("--n-embd", "7")):
        with pytest.raises(BadInput):
            distillation.main([*argv, flag, value])


def test_a_step_with_a_teacher_is_timed(text, out):
    """The pace is that of each way's own steps, the first of which is not counted."""
    args = argparse.Namespace(base="tiny", device="cpu", corpus=str(text), families=["last"])
    scale = ablation.Scale(steps=1, seeds=1, batch_size=4, records=20, test=5)
    world = ablation.world(ablation.base(args), args, scale, 0)
    found = distillation.pace(world.opened, world.opened.model, world.examples, scale, Sizes(1, 8, rounds=2), 0)
    assert list(found) == ["alone", "forward KL", "reverse KL"] and min(found.values()) > 0
