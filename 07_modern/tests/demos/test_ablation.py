"""What the ablations share: equal batches, runs that are kept, and differences that are worked out seed by seed."""

import math

from shared.errors import BadInput
from shared.runlog import RunLog

import pytest
import torch
from torch import nn

from data import load_data
from demos import ablation
from demos.ablation import Scale
from model import GPT

SCALE = Scale(steps=4, seeds=2, batch_size=4, block_size=16, n_embd=8, n_head=2, n_layer=2)


@pytest.fixture
def log(out):
    """A record of a demo of this stage, made anew with each call, as a demo that is started again makes it."""
    return lambda **settings: RunLog(ablation.__file__, "trial", {"seeds": 2, "steps": 4} | settings)


def test_muon_takes_the_matrices_inside_the_blocks():
    """Muon gets the seven matrices of each block, AdamW the embedding with decay and every vector without."""
    torch.manual_seed(0)
    model = GPT(ablation.shape(SCALE, 11))
    model.blocks[0].attn.proj.bias = nn.Parameter(torch.zeros(8))
    model.blocks[1].attn.phase = nn.Parameter(torch.zeros(2, 1, 4))  # three axes, and no matrix of a linear layer
    names = {id(p): name for name, p in model.named_parameters()}
    together = ablation.make_optimizer(model, ablation.recipe(SCALE, 0, weight_decay=0.25))
    found = [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in together.param_groups]
    matrices = {f"blocks.{i}.{part}.weight" for i in range(2) for part in (
        "attn.query", "attn.key", "attn.value", "attn.proj", "ffn.gate", "ffn.fc", "ffn.proj")}
    assert found[0] == (matrices, 0.25), "Muon is for the matrices of the blocks, all of them and nothing else"
    assert found[1] == ({"tok_emb.weight"}, 0.25), "the embedding decays, and nothing else of AdamW's does"
    rest = set(names.values()) - matrices - {"tok_emb.weight"}
    assert found[2] == (rest, 0.0), "norms, biases and phases do not decay"
    alone = ablation.make_optimizer(model, ablation.recipe(SCALE, 0), muon=False)
    [decayed, kept] = [{names[id(p)] for p in group["params"]} for group in alone.param_groups]
    assert (decayed, kept) == (matrices | {"tok_emb.weight"}, rest), "without Muon, AdamW trains everything"


def test_a_new_branch_starts_smaller():
    """`proj` of a part that joins a model is divided by the root of 2 n_layer, as the stage's own branches are."""
    model, part = GPT(ablation.shape(SCALE, 11)), nn.Module()
    part.proj = nn.Linear(8, 8)
    before = part.proj.weight.detach().clone()
    assert torch.allclose(ablation.join(model, part).proj.weight, before / math.sqrt(4)), \
        "the stream sums 2 n_layer branches: a part that joins it has to start as small as those it stands beside"


def test_variants_of_a_seed_see_the_same_batches(text):
    """A run repeats with its seed; the loss of the first step depends on the seed's batches, not on the recipe."""
    data = load_data(str(text))

    def run(seed, **changes):
        torch.manual_seed(5)  # the same weights for every seed: only the batches differ
        model = GPT(ablation.shape(SCALE, len(data.tokenizer)))
        return ablation.fit_text(model, data, ablation.recipe(SCALE, seed, **changes), lambda step, loss: None)

    first, again, other, recipe = run(1), run(1), run(2), run(1, lr=0.05, muon_lr=0.1)
    assert first == again, "the same seed gave another run"
    assert first["losses"][0] == recipe["losses"][0], "two variants of one seed began with different batches"
    assert first["losses"][0] != other["losses"][0], "two seeds see the same batches"
    assert len(first["losses"]) == 4 and first["losses"][-1] != recipe["losses"][-1]


def test_finished_runs_are_kept(log):
    """A stopped demo goes on where it was: what is finished is not made again, and more seeds only add to it."""
    made = []

    def job(name, stop=False):
        def run(tick):
            if stop:
                raise KeyboardInterrupt
            made.append(name)
            tick(1, 2.0)
            return {"val loss": 1 / 3, "losses": [0.1, 2.5]}

        return run

    with pytest.raises(KeyboardInterrupt, match="1 runs are kept"):
        ablation.run_all(log(), {("a", 0): job("a 0"), ("b", 0): job("b 0", stop=True)}, 4)
    jobs = {("a", 0): job("a 0"), ("b", 0): job("b 0")}
    results = ablation.run_all(log(), jobs, 4)
    assert made == ["a 0", "b 0"], "a finished run was made again"
    assert results["a", 0] == results["b", 0] == {"val loss": 1 / 3, "losses": [0.1, 2.5]}, "the kept numbers changed"
    ablation.run_all(log(seeds=3, rounds=9), jobs | {("a", 1): job("a 1")}, 4)
    assert made == ["a 0", "b 0", "a 1"], "more seeds or timings are no reason to make all runs again"


def test_other_flags_or_code_make_other_runs(log, tmp_path, text):
    """A run is not taken for one with other flags, with another text or by other code."""
    made, source = [], tmp_path / "part.py"
    source.write_text("first", "utf-8")

    def run(record, data=None):
        jobs = {("a", 0): lambda tick: made.append(1) or {"val loss": 1.0}}
        ablation.run_all(record, jobs, 4, data, sources=[str(source)])
        return len(made)

    data = load_data(str(text))
    assert run(log()) == 1 == run(log()), "nothing changed, and the run was made again"
    assert run(log(steps=5)) == 2, "a run of 4 steps was taken for one of 5"
    assert run(log(), data) == 3, "a run on another text was taken"
    source.write_text("second", "utf-8")
    assert run(log()) == 4, "the code changed, and an old run was taken"
    for file in log().folder.glob("runs-*.json"):
        file.write_text('{"a, 0": {"val', "utf-8")
    with pytest.raises(BadInput, match="damaged"):
        run(log())


def test_differences_are_worked_out_seed_by_seed():
    """Losses that differ by 0.2 and 0.4 from seed to seed differ by 0.3 on average, with a spread of 0.14."""
    rows = ablation.compare({"a": [1.0, 3.0], "b": [1.2, 3.4]}, "a")
    assert rows[0] == {"variant": "a", "val loss": 2.0, "spread": pytest.approx(2**0.5), "difference": None,
                       "its spread": None}
    assert rows[1]["difference"] == pytest.approx(0.3) and rows[1]["its spread"] == pytest.approx(0.2 / 2**0.5), \
        "the difference is that of the same seed: the spread of the losses themselves is no part of it"
    assert ablation.compare({"a": [1.0], "b": [2.0]}, "a")[1]["spread"] is None, "one seed has no spread"
    results = {("a", 0): {"x": 1}, ("a", 1): {"x": 2}, ("b", 0): {"x": 3}, ("b", 1): {"x": 4}}
    assert ablation.by_variant(results, "x") == {"a": [1, 2], "b": [3, 4]}


def test_steps_are_timed_in_turns():
    """Each model takes a step in each round, and the first round is not counted."""
    models, order = {name: GPT(ablation.shape(SCALE, 11)) for name in "ab"}, []
    for name, model in models.items():
        model.register_forward_hook(lambda *args, name=name: order.append(name))
    times = ablation.step_times(models, SCALE, rounds=3)
    assert order == ["a", "b"] * 4, f"the models take turns, but the steps were {order}"
    assert list(times) == ["a", "b"] and min(times.values()) > 0


def test_sizes_that_cannot_be_are_refused():
    """A size of 0 is named in one line."""
    with pytest.raises(BadInput, match="--n-layer 0"):
        Scale(n_layer=0)
    with pytest.raises(BadInput, match="--seeds 0"):
        Scale(seeds=0)
