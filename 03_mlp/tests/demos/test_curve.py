"""The loss curve shows finished runs."""

from shared.errors import BadInput

import pytest

from demos import curve


def test_the_demo_runs(trained, out, capsys):
    """The curve of a run begins at ln V and goes through each validation loss in the record."""
    run = curve.read("tiny")
    axes = curve.draw([run]).axes[0]
    validation, training = axes.get_lines()
    looks = [row["val_loss"] for row in run["rows"] if "val_loss" in row]
    assert validation.get_xdata().tolist() == [0, 20, 40, 60]
    assert validation.get_ydata().tolist() == [run["start"], *looks]
    assert training.get_xdata().tolist() == [10, 20, 30, 40, 50, 60]
    curve.main(["--runs", "tiny"])
    assert (out / "curve" / "curve.png").stat().st_size > 5000 and "tiny" in capsys.readouterr().out


def test_a_run_that_is_not_there_is_explained(out):
    """Without a finished run the message says how to make one."""
    with pytest.raises(BadInput, match="train first, with uv run stages run 03 train.py --name absent"):
        curve.main(["--runs", "absent"])
