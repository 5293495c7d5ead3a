"""What the demos share: equal beginnings, other seeds other tasks, runs that are kept, differences seed by seed."""

import argparse
import string

from shared.errors import BadInput
from shared.runlog import RunLog

import pytest
import torch

import chat
import tasks
from demos import ablation
from demos.ablation import Scale
from evaluate import text_loss

SCALE = Scale(steps=2, seeds=2, batch_size=4, records=36, test=12)


@pytest.fixture
def args(text, out):
    return argparse.Namespace(base="tiny", device="cpu", corpus=str(text), families=["repeat", "add"])


@pytest.fixture
def log(out, text):
    """A record of a demo of this stage, made anew with each call, as a demo that is started again makes it."""
    return lambda **more: RunLog(ablation.__file__, "trial", {"seeds": 2, "steps": 3, "corpus": str(text)} | more)


def test_a_seed_has_its_tasks_and_its_vectors(args):
    """Worlds repeat with their seed, and differ from seed to seed in words and new vectors; the base stays as it is."""
    base = ablation.base(args)
    weight = base.model.tok_emb.weight.clone()
    first, second = ablation.worlds(base, args, SCALE)
    again = ablation.world(base, args, SCALE, 0)
    assert [r["messages"] for r in first.records] == [r["messages"] for r in again.records], "a seed is not repeated"
    assert first.records != second.records, "two seeds have the same tasks"
    tables = [each.opened.model.tok_emb.weight for each in (first, again, second)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2]), "the seed draws the new vectors"
    texts = first.opened.tokenizer.texts
    assert {"7", "<|user|>", chat.END_OF_TURN} <= {*texts} - {*base.tokenizer.texts}, "the base gets no new tokens"
    old = [texts.index(each) for each in base.tokenizer.texts]
    assert torch.equal(tables[0][old], weight), "the vectors of the base are not those of the old tokens"
    assert torch.equal(base.model.tok_emb.weight, weight), "the base has changed"
    assert {r["family"] for r in first.tests["words"]} == {"repeat", "add"} and len(first.tests["phrasings"]) == 12
    said = [{r["messages"][1]["content"] for r in part if r["family"] == "repeat"}
            for part in (first.records, first.tests["words"])]
    assert not said[0] & said[1], "words of the test are trained on"


def test_all_that_a_task_can_say_is_known():
    """Every character of any instruction or answer has a token, whichever tasks a seed happens to draw."""
    parts = [part for polite in tasks.POLITE for part in polite]
    parts += [text for family in tasks.FAMILIES.values() for text in (*family.verbs, *family.objects)]
    letters = {*"".join(parts)} - {*"{}"} | {*string.ascii_letters} | {*string.digits} | {"-"}
    assert letters <= {*ablation.CHARACTERS}, f"no token for {letters - {*ablation.CHARACTERS}}"


def test_tuning_leaves_the_world_alone(args):
    """A copy is tuned, the same way for the same seed; the model that others begin with is not."""
    world = ablation.world(ablation.base(args), args, SCALE, 0)
    before, found = world.opened.model.state_dict()["blocks.0.attn.query.weight"].clone(), []
    for _ in range(2):
        opened, ticks = ablation.copied(world.opened), []
        config = ablation.recipe(SCALE, 0)
        losses = ablation.tune(opened.model, world.examples, config, lambda step, loss, t=ticks: t.append(step))
        assert ticks == [1, 2] and len(losses) == 2, "a step was not told, or not made"
        found.append((losses, text_loss(opened.model, opened.tokenizer, args.corpus)))
    assert found[0] == found[1], "the same seed gave another run"
    assert torch.equal(world.opened.model.blocks[0].attn.query.weight, before), "the common model was tuned"
    scores = ablation.exact(world.opened, world.tests)
    assert scores["words"] == scores["phrasings"] == {"repeat": 0.0, "add": 0.0, "mean": 0.0}, \
        "a base that was trained for two steps answers nothing right"


def test_frozen_weights_are_not_given_to_adamw():
    """AdamW gets what is to be trained, and no decay, which would pull at frozen rows as well."""
    layer = torch.nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    [group] = ablation.adamw(layer, 0.1).param_groups
    assert group["params"] == [layer.bias] and group["weight_decay"] == 0, "frozen weights are in the optimiser"


def test_finished_runs_are_kept(log, args):
    """A stopped demo goes on where it was; more seeds add to it; other flags or another base make all runs again."""
    made, base = [], ablation.base(args)

    def job(name, stop=False):
        def run(tick):
            if stop:
                raise KeyboardInterrupt
            made.append(name)
            tick(1, 2.0)
            return {"exact": 1 / 3}

        return run

    with pytest.raises(KeyboardInterrupt, match="1 runs are kept"):
        ablation.run_all(log(), {("a", 0): job("a 0"), ("b", 0): job("b 0", stop=True)}, 3, base)
    jobs = {("a", 0): job("a 0"), ("b", 0): job("b 0")}
    results = ablation.run_all(log(), jobs, 3, base)
    assert made == ["a 0", "b 0"], "a finished run was made again"
    assert results["a", 0] == results["b", 0] == {"exact": 1 / 3}, "the kept numbers changed"
    ablation.run_all(log(seeds=3, rounds=9), jobs | {("a", 1): job("a 1")}, 3, base)
    assert made == ["a 0", "b 0", "a 1"], "more seeds or timings are no reason to make all runs again"
    ablation.run_all(log(steps=5), {("a", 0): job("a 5")}, 3, base)
    assert made[-1] == "a 5", "a run of 3 steps was taken for one of 5"
    with torch.no_grad():
        base.model.norm.weight.add_(0.1)
    ablation.run_all(log(), {("a", 0): job("a other")}, 3, base)
    assert made[-1] == "a other", "a run from another base was taken"
    for file in log().folder.glob("runs-*.json"):
        file.write_text('{"a, 0": {"ex', "utf-8")
    with pytest.raises(BadInput, match="damaged"):
        ablation.run_all(log(), jobs, 3, base)


def test_differences_are_worked_out_seed_by_seed():
    """Scores that differ by 0.2 and 0.4 from seed to seed differ by 0.3 on average, with a spread of 0.14."""
    rows = ablation.compare({"a": [0.1, 0.5], "b": [0.3, 0.9]}, "a")
    assert rows[0] == {"variant": "a", "exact": pytest.approx(0.3), "spread": pytest.approx(0.4 / 2**0.5),
                       "difference": None, "its spread": None}  # fmt: skip
    assert rows[1]["difference"] == pytest.approx(0.3) and rows[1]["its spread"] == pytest.approx(0.2 / 2**0.5), \
        "the difference is that of the same seed: the spread of the scores themselves is no part of it"
    assert ablation.compare({"a": [1.0], "b": [2.0]}, "a", "new")[1]["spread"] is None, "one seed has no spread"
    assert [row["difference"] for row in ablation.shown(rows)] == [None, "+0.300"]


def test_what_cannot_be_is_refused(args):
    """A size of 0, a model that answers already and fewer tasks than a batch are named in one line."""
    with pytest.raises(BadInput, match="--batch-size 0"):
        Scale(batch_size=0)
    with pytest.raises(BadInput, match="do not fill a batch"):
        ablation.worlds(ablation.base(args), args, Scale(batch_size=9, records=8, test=2))
    args.families = ["sing"]
    with pytest.raises(BadInput, match="sing"):
        ablation.world(ablation.base(args), args, SCALE, 0)
