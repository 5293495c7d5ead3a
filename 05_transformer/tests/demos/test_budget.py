"""The demo of budgets: which runs it makes, that none is made twice, and what it draws."""

import json
from pathlib import Path
from types import SimpleNamespace

from shared.errors import BadInput

import pytest

from demos import budget

COURSE = Path(budget.__file__).parents[2]
beside = pytest.mark.skipif(not list(COURSE.glob("03_*")), reason="a copy of this stage alone: the others are not here")


def test_the_ends_are_trained_with_every_seed():
    """The smallest and the largest budget take all seeds, those between the first; every stage has every budget."""
    runs = budget.plan([0.5, 1, 2], seeds=[7, 8])
    assert len(runs) == len(set(runs)) == 3 * (2 + 1 + 2), "a run is missing, or made twice"
    for stage, (steps, _) in budget.STAGES.items():
        mine = [(count, seed) for name, count, seed in runs if name == stage]
        expected = [(steps // 2, 7), (steps // 2, 8), (steps, 7), (2 * steps, 7), (2 * steps, 8)]
        assert mine == expected, f"{stage} has the runs {mine}, not {expected}"


@beside
def test_a_small_budget_is_trained_once(tmp_path, monkeypatch, capsys):
    """Each network is trained by its own script, its loss shown and drawn; the second time nothing is trained."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    monkeypatch.setattr(budget, "STAGES", {"03": (4, None), "05": (4, 3)})
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the rat sat on the cat\n" * 600, encoding="utf-8")
    words = ["--corpus", str(text), "--shares", "1", "--seeds", "5"]
    budget.main(words)
    summary = json.loads((tmp_path / "out" / "budget" / "summary.json").read_text("utf-8"))
    assert [(row["stage"], row["steps"]) for row in summary["rows"]] == [("03", 4), ("05", 4)], "a run is missing"
    for row in summary["rows"]:
        [folder] = (tmp_path / "out").glob(f"budget-{row['stage']}-4-5*")
        assert row["val loss"] == json.loads((folder / "summary.json").read_text("utf-8"))["val_loss"], "another loss"
    assert (tmp_path / "out" / "budget" / "budget.png").stat().st_size > 1000, "no figure"
    monkeypatch.setattr(budget.subprocess, "run", lambda *args, **how: pytest.fail("a finished run is made again"))
    budget.main(words)
    begun = SimpleNamespace(returncode=1, stderr="begun", stdout="")
    monkeypatch.setattr(budget.subprocess, "run", lambda *args, **how: begun)
    with pytest.raises(BadInput, match="begun"):  # another text is trained on, and not read from the runs above
        budget.main(["--corpus", str(tmp_path / "other.txt"), *words[2:]])


@beside
def test_a_run_that_fails_is_one_line(tmp_path, monkeypatch):
    """What a stage's script refuses is passed on with the stage's name."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    with pytest.raises(BadInput, match="stage 03"):
        budget.main(["--corpus", str(tmp_path / "nowhere.txt"), "--shares", "0.001", "--seeds", "1"])
    with pytest.raises(BadInput, match="--shares"):
        budget.main(["--shares", "0"])
