"""The losses: each variant changes what its name says, and the table is made of all of them."""

import argparse
import json
import math

from shared.errors import BadInput

import pytest

import reward
from demos import ablation, losses
from demos.ablation import Scale, World
from preferences import KINDS

SCALE = Scale(steps=3, seeds=1, batch_size=4, pairs=44, test=18)


def test_each_variant_changes_one_thing(text, out, policy, monkeypatch):
    """At equal scores one loss is ln 2 and the other the margin; only one model looks both ways."""
    args = argparse.Namespace(policy="tiny", corpus=str(text), device="cpu")
    world, seen, learn = World(policy, args, SCALE, 0), {}, ablation.learn
    for variant in losses.VARIANTS:

        def watched(*given, v=variant):
            seen[v] = (given[1], given[2], *learn(*given))
            return seen[v][2:]

        monkeypatch.setattr(ablation, "learn", watched)
        run = losses.job(world, variant, SCALE, lambda *_: None)
        assert list(run["right"]) == [*KINDS, "sampled", "mean"]
        count = sum(map(len, world.held_out.values()))
        assert sum(row["pairs"] for row in run["sure"]) == count, "calibration is not over the pairs of all kinds"
        assert 0 <= run["error"] <= 0.5
    first = {variant: found[3][0] for variant, found in seen.items()}
    assert first["Bradley-Terry"] == pytest.approx(math.log(2), abs=1e-4) == first["both ways"]
    assert first["margin"] == pytest.approx(1, abs=1e-4), "at equal scores the margin is missed by all of it"
    looks = [variant for variant, found in seen.items() if found[2].model.both_ways]
    assert looks == ["both ways"], "which model looks both ways"
    same = seen[losses.FIRST]
    for variant, (pairs, config, *_) in seen.items():
        assert pairs == same[0], f"{variant} learns from other pairs"
        other = {name for name, value in vars(config).items() if value != vars(same[1])[name]}
        assert other <= {"loss", "both_ways"} and len(other) == (variant != losses.FIRST), f"{variant} changes {other}"
    assert isinstance(same[1], reward.RewardConfig) and same[1].seed == 0


def test_differences_are_worked_out_seed_by_seed():
    """Shares that differ by -0.1 and -0.3 from seed to seed differ by -0.2 on average, with a spread of 0.14."""

    def run(right):
        return {"right": {"delete": right, "swap": right / 2, "mean": right}, "error": 0.1 * right}

    rows = losses.compare({losses.FIRST: [run(0.5), run(0.9)], "margin": [run(0.4), run(0.6)]})
    assert rows[0]["difference"] is None and rows[0]["spread"] == pytest.approx(0.4 / 2**0.5)
    assert rows[1]["difference"] == pytest.approx(-0.2) and rows[1]["its spread"] == pytest.approx(0.2 / 2**0.5), \
        "the difference is that of the same seed: the spread of the shares themselves is no part of it"
    assert rows[1]["swap"] == pytest.approx(0.25) and rows[1]["calibration"] == pytest.approx(0.05)
    assert "mean" not in rows[1], "the mean of kinds stands there twice"


def test_the_demo_runs(flags, out, capsys):
    """Three variants, a table and a figure; runs are made once; nonsense is refused."""
    losses.main(flags)
    rows = json.loads((out / "losses" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["variant"] for row in rows] == list(losses.VARIANTS)
    for row in rows:
        assert all(0 <= row[name] <= 1 for name in ("right", "calibration", "sampled", *KINDS)), row
        assert row["right"] == pytest.approx(sum(row[kind] for kind in (*KINDS, "sampled")) / 5)
    [kept] = (out / "losses").glob("runs-*.json")
    before = kept.read_bytes()
    losses.main(flags)
    assert kept.read_bytes() == before and (out / "losses" / "losses.png").stat().st_size > 5000
    assert "both ways" in capsys.readouterr().out
    for flag, value in (("--steps", "0"), ("--seeds", "0"), ("--policy", "nowhere"), ("--batch-size", "49")):
        with pytest.raises(BadInput):
            losses.main([*flags, flag, value])
