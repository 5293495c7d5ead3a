"""The whole way in one command: what is made, what is kept, and what is told."""

import json

from shared import corpus
from shared.runlog import run_folder

import little
import pytest
import torch

import checkpoint
import pipeline
import ppo
import tasks
from chat import form, open_model
from grpo import GRPOConfig
from learn import RLConfig, arguments, generator
from model import GPT, ModelConfig
from rollout import log_probs, rollout
from tokenizer import CharTokenizer


@pytest.fixture
def ways(monkeypatch, tmp_path):
    """A policy, a judge, a base, and two ways that leave a changed policy; the list of the flags they are called with.
    """
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    little.runs(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(little.text(), encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = CharTokenizer(corpus.load(str(text)).text)
    (tmp_path / "base").mkdir()
    model = GPT(ModelConfig(len(tokenizer), **little.SHAPE | {"block_size": 96}))
    checkpoint.save(tmp_path / "base" / "model.pt", model, tokenizer, optimizer={}, step=0, seconds=0.0, args={})
    called = []

    def make(recipe, std, add=lambda parser: None):
        def way(words):
            args, _ = arguments(words, type(recipe), "", "none", add)
            called.append(args)
            folder, found = run_folder(pipeline.__file__, args.name), open_model("little")
            folder.mkdir(parents=True, exist_ok=True)
            model = little.neighbour(found, std)
            checkpoint.save(folder / "model.pt", model, found.tokenizer, **form(found), optimizer={}, step=0,
                            seconds=0.0, args={})
            (folder / "config.json").write_text(json.dumps(vars(args)), "utf-8")
            (folder / "summary.json").write_text(json.dumps({"seconds": 9.0}), "utf-8")

        return way, recipe

    ppo_way = make(ppo.PPOConfig(beta=1.0), 0.1, lambda parser: parser.add_argument("--judge"))
    monkeypatch.setattr(pipeline, "WAYS", {"grpo": make(GRPOConfig(), 0.0), "ppo": ppo_way})
    return called


@pytest.fixture
def flags(tmp_path):
    return ["--policy", "little", "--judge", "judge", "--corpus", str(tmp_path / "text.txt"), "--device", "cpu"]


def test_each_way_is_made_once_and_told(ways, flags, tmp_path, capsys):
    """Each way runs under its own name with its own flags, is kept the next time, and has a row beside the others."""
    assert pipeline.main(["--only", "grpo", "ppo", *flags]) is None
    told = {"policy": "little", "corpus": str(tmp_path / "text.txt"), "name": "grpo", "device": "cpu", "records": 4000}
    assert told.items() <= vars(ways[0]).items(), "a way does not get its policy, its name or the text"
    rows = json.loads((tmp_path / "pipeline" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["model"] for row in rows] == ["base", "policy", "grpo", "ppo"], "a row for each model, in their order"
    assert [row["seconds"] for row in rows] == [None, None, 9.0, 9.0], "seconds are those of learning"
    base, policy, same, other = ({k: v for k, v in row.items() if k not in ("model", "seconds")} for row in rows)
    assert same == policy and policy["KL"] == 0, "a way that changed nothing has the policy's numbers"
    assert other["KL"] > 0.01 and other["loss"] != policy["loss"] != base["loss"], "rows of different models"
    assert base["KL"] is None and base["greedy"] == 0, "the base knows no tags: no KL from the policy to it"
    assert f"{other['loss']:.3f}"[:4] in capsys.readouterr().out, "the table is not shown"
    assert (tmp_path / "pipeline" / "pipeline.png").stat().st_size > 5000, "the figure is missing"
    pipeline.main(["--only", "grpo", *flags])
    assert len(ways) == 2, "what was made before is made again without --again"
    pipeline.main(["--only", "grpo", "--again", *flags])
    assert len(ways) == 3, "--again keeps what was made before"
    file = tmp_path / "grpo" / "config.json"
    for count, changed in enumerate(({"policy": "another"}, {"lr": 1.0}), 4):
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changed), "utf-8")
        pipeline.main(["--only", "grpo", *flags])
        assert len(ways) == count, f"a run with {changed} is taken for one of the pipeline"


def test_what_is_looked_at(ways, flags, tmp_path):
    """Scores are of drawn answers to new words, in spreads of the policy's own; the KL is from the policy."""
    pipeline.main(["--only", "ppo", *flags])
    told = json.loads((tmp_path / "pipeline" / "summary.json").read_text("utf-8"))["rows"][-1]
    assert (ways[0].beta, ways[0].judge) == (1.0, "judge"), "PPO does not get its own recipe and its judge"
    known = tasks.words(corpus.load(flags[5]).text)
    policy, judge, tuned = (open_model("little"), ppo.reward.load(tmp_path / "judge" / "model.pt", "cpu"),
                            open_model("ppo"))
    records = tasks.make(known, "train", 256)
    asked = [r["messages"][:-1] for r in records]
    first = ppo.scored(judge, records, rollout(policy, asked, 24, generator=generator(RLConfig(), 0)))
    records = tasks.make(known, "words", 180)
    asked = [r["messages"][:-1] for r in records]
    drawn = rollout(tuned, asked, 24, generator=torch.Generator().manual_seed(0))
    kl = (log_probs(tuned.model, drawn)[0] - log_probs(policy.model, drawn)[0]).sum(1).mean().item()
    cut = 1 - sum(drawn.ended) / 180
    score = ((ppo.scored(judge, records, drawn) - first.mean()) / first.std()).mean().item() - cut
    assert told["KL"] == pytest.approx(kl, rel=1e-4), "the KL is that of drawn answers, from the policy"
    assert told["score"] == pytest.approx(score, rel=1e-3), "the score is in spreads of the policy's, less 1 for no end"


def test_a_stopped_way_stops_all(ways, flags, monkeypatch, tmp_path):
    """Where a way was stopped by Ctrl-C there is nothing to compare: the exit code is 130, and no table is written."""
    monkeypatch.setitem(pipeline.WAYS, "grpo", (lambda words: 130, GRPOConfig()))
    assert pipeline.main(["--only", "grpo", "ppo", *flags]) == 130, "after a stopped way the others go on"
    assert not ways and not (tmp_path / "pipeline").exists(), "a table of ways that were not made"
