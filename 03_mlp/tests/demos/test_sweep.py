"""The sweep changes one thing at a time and calls noise what is noise."""

import json

from shared.errors import BadInput

import pytest

from demos import sweep


def test_one_setting_changes_at_a_time():
    """Every setting differs from the base in one value, which its name tells."""
    names = [name for name, _ in sweep.settings()]
    assert names[0] == "base" and len(set(names)) == len(names)
    for name, setting in sweep.settings()[1:]:
        changed = [key for key in sweep.BASE if setting[key] != sweep.BASE[key]]
        assert len(changed) == 1 and name == f"{changed[0]} {setting[changed[0]]:g}", f"{name} changes {changed}"


def runs(*losses):
    return [{"params": 1, "loss": loss, "seconds": 1.0} for loss in losses]


def test_differences_are_held_against_the_spread_of_the_seeds():
    """A difference counts only when it is more than two standard deviations of a difference of two means."""
    results = {"base": runs(1.9, 2.1), "a": runs(1.7, 1.9), "b": runs(1.4, 1.6), "c": runs(2.9, 3.1)}
    # Each pair is 0.2 apart: variance 0.02. Two means of two runs differ by sqrt(0.02 / 2 + 0.02 / 2) = 0.141; twice
    # that is 0.283.
    assert sweep.noise(results) == pytest.approx(0.02**0.5), "the spread within each setting, not between settings"
    rows = {row["setting"]: row for row in sweep.summary(results)}
    assert [rows[name]["verdict"] for name in ("base", "a", "b", "c")] == ["", "noise", "better", "worse"]
    assert rows["a"]["to base"] == "-0.200 ± 0.283" and rows["c"]["loss"] == pytest.approx(3.0)


def test_the_demo_runs(text, out, capsys):
    """Every setting is trained with every seed; a table and a figure come of it."""
    sweep.main(["--corpus", str(text), "--steps", "3", "--seeds", "2"])
    rows = json.loads((out / "sweep" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["setting"] for row in rows] == [name for name, _ in sweep.settings()]
    params = {row["setting"]: row["params"] for row in rows}
    assert params["n_hidden 64"] < params["base"] < params["block_size 16"], "the settings reach the model"
    assert len((out / "sweep" / "metrics.jsonl").read_text("utf-8").splitlines()) == 2 * len(rows)
    assert (out / "sweep" / "sweep.png").stat().st_size > 5000
    assert "apart (standard deviation" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no spread"):
        sweep.main(["--corpus", str(text), "--seeds", "1"])
