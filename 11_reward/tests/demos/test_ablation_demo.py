"""What the demos share: each seed its own tasks, held-out words that nobody has seen, equal beginnings, kept runs."""

import argparse
import re

from shared import corpus
from shared.errors import BadInput
from shared.runlog import RunLog

import pytest
import torch

import tasks
from demos import ablation
from demos.ablation import Scale, World
from preferences import KINDS

SCALE = Scale(steps=2, seeds=2, batch_size=4, pairs=44, test=18)


@pytest.fixture
def args(text, out):
    return argparse.Namespace(policy="tiny", corpus=str(text), device="cpu")


@pytest.fixture
def log(out, text):
    """A record of a demo of this stage, made anew with each call, as a demo that is started again makes it."""
    return lambda **more: RunLog(ablation.__file__, "trial", {"seeds": 2, "steps": 3, "corpus": str(text)} | more)


def asked(records: list[dict]) -> set[str]:
    return {record["messages"][0]["content"] for record in records}


def said(records: list[dict]) -> set[str]:
    """The words that records are about: what is to be repeated, in capitals or not."""
    return {r["messages"][1]["content"].lower() for r in records if r["family"] in ("repeat", "upper")}


def test_a_seed_has_its_own_tasks_and_new_words(args, policy):
    """Seeds share no task; more seeds leave the first as it is; no held-out word was learned, by judge or policy."""
    first, second = (World(policy, args, SCALE, seed) for seed in range(2))
    again = World(policy, args, SCALE, 0)
    assert again.records == first.records and again.pairs() == first.pairs(), "a seed is not repeated"
    assert len(first.records) == len(second.records) == 44 and len(first.test) == len(second.test) == 18
    assert not asked(first.records) & asked(second.records), "two seeds have tasks in common"
    assert not asked(first.test) & asked(second.test), "two seeds are tested on the same tasks"
    known = tasks.words(corpus.load(args.corpus).text)
    learned = said(tasks.make(known, "train", 600))  # of the policy, by the default seed
    tested = said(first.test) | said(second.test)
    assert tested and not tested & (learned | said(first.records) | said(second.records)), "a held-out word was learned"


def test_pairs_of_all_kinds(args, policy):
    """To train on: as many as are asked for, mixed, with the policy's own mistakes; held out: all of one kind each."""
    world = World(policy, args, SCALE, 1)
    pairs = world.pairs()
    kinds = [each["kind"] for each in pairs]
    assert len(pairs) == 44 and {*kinds} == {*KINDS, "sampled"}, "not all kinds are learned from"
    assert kinds.count("sampled") <= 11, "the policy's own mistakes are more than a fifth"
    assert kinds != sorted(kinds) and "sampled" in kinds[:22], "the first pairs are of some kinds only: mix them"
    assert {str(each["prompt"]) for each in pairs} <= {str(r["messages"][:1]) for r in world.records}
    assert list(world.held_out) == [*KINDS, "sampled"]
    gold = {str(r["messages"][:1]): r["messages"][1]["content"] for r in world.test}
    for kind, some in world.held_out.items():
        assert some and {each["kind"] for each in some} == {kind}
        for each in some:
            right, wrong = each["chosen"][0]["content"], each["rejected"][0]["content"]
            assert right == gold[str(each["prompt"])] != wrong, f"{kind}: the chosen answer is not the right one"
            longer = {"delete": -1, "insert": 1, "substitute": 0, "swap": 0}
            assert len(wrong) - len(right) == longer.get(kind, len(wrong) - len(right)), f"{kind}: {right}, {wrong}"


def test_learning_leaves_the_policy_alone(args, policy):
    """A judge begins with the policy's weights and learns; the policy does not; a seed is repeated to the last bit."""
    before, found = policy.model.tok_emb.weight.clone(), []
    pairs = World(policy, args, SCALE, 0).pairs()
    for seed in (3, 3, 4):
        ticks = []
        config = ablation.recipe(SCALE, seed, precision="float32")
        opened, losses = ablation.learn(policy, pairs, config, lambda step, loss, t=ticks: t.append((step, loss)))
        assert [step for step, _ in ticks] == [1, 2] and [round(loss, 5) for _, loss in ticks] == losses
        assert losses[0] == pytest.approx(0.69315, abs=1e-5), "all answers are equally good at first: ln 2"
        assert opened.model.head.weight.abs().max() > 0, "nothing was learned"
        found.append(opened.model.head.weight.tolist())
    assert found[0] == found[1] != found[2], "the order of the pairs does not come from the seed"
    assert torch.equal(policy.model.tok_emb.weight, before), "the policy, with which others begin, was trained"


def test_the_share_ranked_right(policy, monkeypatch):
    """Of 4 and 2 pairs 3 and 1 ranked right is 0.75 and 0.5, on the mean of kinds 0.625; an empty kind is left out."""
    told = {"a": ([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 5.0]), "b": ([1.0, 1.0], [0.0, 2.0])}
    monkeypatch.setattr(ablation.reward, "score_pairs", lambda opened, pairs: map(torch.tensor, told[pairs[0]]))
    assert ablation.right(policy, {"a": ["a"], "b": ["b"], "c": []}) == {"a": 0.75, "b": 0.5, "mean": 0.625}


def test_finished_runs_are_kept(log, policy):
    """A stopped demo goes on where it was; more seeds add to it; other flags or another policy make all runs again."""
    made = []

    def job(name, stop=False):
        def run(tick):
            if stop:
                raise KeyboardInterrupt
            made.append(name)
            tick(1, 2.0)
            return {"right": 1 / 3}

        return run

    with pytest.raises(KeyboardInterrupt, match="1 runs are kept"):
        ablation.run_all(log(), {("a", 0): job("a 0"), ("b", 0): job("b 0", stop=True)}, 3, policy)
    jobs = {("a", 0): job("a 0"), ("b", 0): job("b 0")}
    results = ablation.run_all(log(), jobs, 3, policy)
    assert made == ["a 0", "b 0"], "a finished run was made again"
    assert results["a", 0] == results["b", 0] == {"right": 1 / 3}, "the kept numbers changed"
    ablation.run_all(log(seeds=3), jobs | {("a", 1): job("a 1")}, 3, policy)
    assert made == ["a 0", "b 0", "a 1"], "more seeds are no reason to make all runs again"
    ablation.run_all(log(steps=5), {("a", 0): job("a 5")}, 3, policy)
    assert made[-1] == "a 5", "a run of 3 steps was taken for one of 5"
    weight = policy.model.norm.weight.data
    policy.model.norm.weight.data = weight + 0.1
    ablation.run_all(log(), {("a", 0): job("a other")}, 3, policy)
    policy.model.norm.weight.data = weight
    assert made[-1] == "a other", "a run from another policy was taken"
    for file in log().folder.glob("runs-*.json"):
        file.write_text('{"a, 0": {"ri', "utf-8")
    with pytest.raises(BadInput, match="damaged"):
        ablation.run_all(log(), jobs, 3, policy)


def test_what_is_shown_and_what_is_refused(args):
    """Differences have their sign; one seed has no spread; a size that cannot be is named in one line."""
    rows = [{"variant": "a", "right": 0.5, "difference": None}, {"variant": "b", "right": 0.25, "difference": -0.25}]
    assert ablation.shown(rows)[1] == {"variant": "b", "right": "0.250", "difference": "-0.250"}
    assert ablation.shown([{"n": 3, "difference": 0.1, "a": -1e-9}]) == [{"n": 3, "difference": "+0.100", "a": "0.000"}]
    assert ablation.spread([0.5]) is None and ablation.spread([0.1, 0.3]) == pytest.approx(0.2 / 2**0.5)
    with pytest.raises(BadInput, match=re.escape("--batch-size 0")):
        Scale(batch_size=0)
    with pytest.raises(BadInput, match="--pairs 5"):
        Scale(pairs=5, batch_size=6)
    args.policy = "nowhere"
    with pytest.raises(BadInput, match="nowhere"):
        ablation.policy(args)
