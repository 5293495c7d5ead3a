"""What an ablation needs: equal batches, runs that are kept, and differences that are worked out seed by seed."""

from shared.errors import BadInput
from shared.runlog import RunLog

import pytest
import torch

from data import load_data
from demos import ablation
from demos.ablation import Scale
from model import GPT, ModelConfig

SCALE = Scale(steps=3, seeds=2, batch_size=4, block_size=16, n_embd=8, n_head=2, n_layer=2)


@pytest.fixture
def log(out):
    """A record of a demo of this stage, made anew with each call, as a demo that is started again makes it."""
    return lambda **settings: RunLog(ablation.__file__, "trial", {"seeds": 2, "steps": 3} | settings)


def test_variants_of_a_seed_see_the_same_batches(text):
    """A run repeats with its seed; the loss of the first step depends on the seed's batches."""
    data = load_data(str(text))

    def run(seed):
        torch.manual_seed(5)  # the same weights for every seed: only the batches differ
        model, ticks = GPT(ModelConfig(len(data.tokenizer), block_size=16, n_embd=8, n_layer=2)), []
        found = ablation.fit(model, data, SCALE, seed, lambda step, loss: ticks.append(step))
        assert ticks == [1, 2, 3] and len(found["losses"]) == 3, "a step was not told, or not made"
        assert found["params"] == sum(p.numel() for p in model.parameters())
        return found

    first, again, other = run(1), run(1), run(2)
    assert first == again, "the same seed gave another run"
    assert first["losses"][0] != other["losses"][0], "two seeds see the same batches"
    assert 1 < first["val loss"] < 4, "nats per character of an untrained model are about ln V"


def test_finished_runs_are_kept(log, text):
    """A stopped demo goes on where it was: what is finished is not made again, and more seeds only add to it."""
    made, data = [], load_data(str(text))

    def job(name, stop=False):
        def run(tick):
            if stop:
                raise KeyboardInterrupt
            made.append(name)
            tick(1, 2.0)
            return {"val loss": 1 / 3, "losses": [0.1, 2.5]}

        return run

    with pytest.raises(KeyboardInterrupt, match="1 runs are kept"):
        ablation.run_all(log(), {("a", 0): job("a 0"), ("b", 0): job("b 0", stop=True)}, 3, data)
    jobs = {("a", 0): job("a 0"), ("b", 0): job("b 0")}
    results = ablation.run_all(log(), jobs, 3, data)
    assert made == ["a 0", "b 0"], "a finished run was made again"
    assert results["a", 0] == results["b", 0] == {"val loss": 1 / 3, "losses": [0.1, 2.5]}, "the kept numbers changed"
    ablation.run_all(log(seeds=3, rounds=9), jobs | {("a", 1): job("a 1")}, 3, data)
    assert made == ["a 0", "b 0", "a 1"], "more seeds or timings are no reason to make all runs again"


def test_other_flags_or_code_make_other_runs(log, tmp_path, text):
    """A run is not taken for one with other flags, with another text or by other code."""
    made, source, data = [], tmp_path / "part.py", load_data(str(text))
    source.write_text("first", "utf-8")

    def run(record, data=data):
        jobs = {("a", 0): lambda tick: made.append(1) or {"val loss": 1.0}}
        ablation.run_all(record, jobs, 3, data, sources=[str(source)])
        return len(made)

    assert run(log()) == 1 == run(log()), "nothing changed, and the run was made again"
    assert run(log(steps=5)) == 2, "a run of 3 steps was taken for one of 5"
    other = tmp_path / "other.txt"
    other.write_text(text.read_text("utf-8")[::-1], "utf-8")
    assert run(log(), load_data(str(other))) == 3, "a run on another text was taken"
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


def test_sizes_that_cannot_be_are_refused():
    """A size of 0 is named in one line."""
    with pytest.raises(BadInput, match="--n-layer 0"):
        Scale(n_layer=0)
    with pytest.raises(BadInput, match="--seeds 0"):
        Scale(seeds=0)
