"""The whole way in one command: what is made, what is kept, and what is told."""

import json

from shared.runlog import run_folder

import pytest

import pipeline

TOLD = {"first_greedy": 0.2, "first_sampled": 0.4, "greedy": 0.7, "sampled": 0.6, "kl": 1.5, "tax": 0.1, "seconds": 9.0}


@pytest.fixture
def ways(monkeypatch, tmp_path):
    """Two ways that write a summary as real ones do; the list of the flags that they were called with."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    called = []

    def make(name, greedy):
        def way(flags):
            called.append((name, flags))
            folder = run_folder(pipeline.__file__, name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps(TOLD | {"greedy": greedy, "reward": 0.3}), "utf-8")

        return way

    monkeypatch.setattr(pipeline, "WAYS", {"grpo": (make("grpo", 0.8), []), "ppo": (make("ppo", 0.7), ["--beta", "1"])})
    return called


def test_each_way_is_made_once_and_told(ways, tmp_path, capsys):
    """Each way runs under its own name with its own flags, is kept the next time, and has a row beside the policy's."""
    assert pipeline.main(["--only", "grpo", "ppo", "--corpus", "names"]) is None
    expected = ["--name", "ppo", "--device", "auto", "--corpus", "names"]
    assert ways[1] == ("ppo", ["--beta", "1", *expected]), "a way does not get its flags, its name or the text"
    rows = json.loads((tmp_path / "pipeline" / "summary.json").read_text("utf-8"))["rows"]
    assert [(row["way"], row["greedy"]) for row in rows] == [("policy", 0.2), ("grpo", 0.8), ("ppo", 0.7)], (
        "the first row is the policy before, the others are what each way reached")
    assert rows[1]["score"] is None and rows[2]["score"] == 0.3, "a score of the reward model is PPO's alone"
    assert "0.8" in capsys.readouterr().out, "the table is not shown"
    assert (tmp_path / "pipeline" / "ways.png").stat().st_size > 5000, "the figure of the ways is missing"
    pipeline.main(["--only", "grpo"])
    assert len(ways) == 2, "what was made before is made again without --again"
    pipeline.main(["--only", "grpo", "--again"])
    assert len(ways) == 3, "--again keeps what was made before"


def test_a_stopped_way_stops_all(ways, monkeypatch, tmp_path):
    """Where a way was stopped by Ctrl-C there is nothing to compare: the exit code is 130, and no table is written."""
    monkeypatch.setitem(pipeline.WAYS, "grpo", (lambda flags: 130, []))
    assert pipeline.main(["--only", "grpo", "ppo"]) == 130, "after a stopped way the others go on"
    assert not ways and not (tmp_path / "pipeline").exists(), "a table of ways that were not made"
