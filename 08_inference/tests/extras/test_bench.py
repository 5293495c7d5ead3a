"""The benchmark counts what torch counts, times what it says, and tells the two halves of the roofline apart."""

import json
import random

from shared.errors import BadInput

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache import Cache
from checkpoint import save
from extras import bench
from extras.bench import bandwidth, crossing, figures, flop_rate, percentile, position_bytes, quickest, roof, work
from model import GPT, ModelConfig
from tokenizer import CharTokenizer

CPU, LETTERS = torch.device("cpu"), "abcdefghijklmnopqrstuvwxyzäöü"


def tiny(**changes) -> GPT:
    """A random model in which no two sizes are equal; its weights are large, so that its texts are not dull."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "block_size": 24, "n_embd": 10, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 3,
             "n_hidden": 7}  # fmt: skip
    model = GPT(ModelConfig(**sizes | changes))
    for p in model.parameters():
        nn.init.normal_(p, std=1.5)
    return model.eval()


class Clock:
    """Time that passes only when it is told to, and a thousandth of a second whenever it is looked at."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(bench, "perf_counter", self)

    def __call__(self):
        self.now += 0.001
        return self.now


def test_a_pass_by_hand():
    """Three tokens of each of two texts that then have five positions: every product and every byte, by hand."""
    model = tiny()
    # Per layer: q 10 x 24, k and v 10 x 8 each, proj 24 x 10, three of 10 x 7 in the feed-forward: 850. Head: 10 x 11.
    flops, fetched = work(model, 2, 3, 5)
    # 6 tokens through 3 layers, 2 last tokens through the head; 6 queries of 6 heads meet 5 keys of 4 channels, and the
    # same once more for the values.
    products, scores = 2 * 6 * 3 * 850 + 2 * 2 * 110, 2 * (2 * 6 * 6 * 5 * 4) * 3
    assert flops == products + scores == 31_040 + 8_640, f"{flops}: not 2 FLOPs for each parameter and term"
    # 2 x 3 layers x 2 heads x 4 channels = 48 numbers of 4 bytes for each of 10 positions.
    assert position_bytes(model) == 192, "a key and a value for each key-value head of each layer, 4 bytes a number"
    assert fetched == 4 * (3 * 850 + 110) + 10 * 192, f"{fetched}: weights once for all tokens, the cache of each text"
    half = tiny().bfloat16()
    assert work(half, 2, 3, 5) == (flops, fetched // 2), "bfloat16 halves the bytes, and leaves the FLOPs as they are"
    smollm2 = tiny(n_head=9, n_kv_head=3, head_dim=64, n_layer=30).bfloat16()  # as wide as its attention
    assert position_bytes(smollm2) == 23_040, "SmolLM2: 2 x 30 layers x 3 heads x 64 channels x 2 bytes"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("B, T, S", [(1, 7, 7), (3, 1, 9), (2, 4, 11)])
def test_the_pass_that_is_timed_has_the_flops_that_are_counted(monkeypatch, B, T, S, tied):
    """Each pass that is timed does the FLOPs that torch counts in it, the second as the first, tied or not."""
    model, counted = tiny(tied=tied), []

    def run_twice(run, device, after):
        for _ in range(2):
            # One way of attention for torch's counter, which does not know them all.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                run()
            counted.append(counter.get_total_flops())
            after()

    monkeypatch.setattr(bench, "quickest", run_twice)
    with torch.no_grad():
        bench.pass_seconds(model, B, T, S)
    flops, fetched = work(model, B, T, S)
    assert counted[0] == flops, f"torch counts {counted[0]:,} FLOPs in the pass that is timed, `work` {flops:,}"
    assert counted[1] == flops, "the second run found more in the cache than the first: it is not put back in order"
    weights = sum(p.nbytes for name, p in model.named_parameters() if p.dim() == 2 and (tied or "tok_emb" not in name))
    assert fetched - weights == B * S * 192, "the embedding of an untied model is looked up, and not fetched as a whole"


def test_a_position_takes_what_the_cache_keeps_for_it():
    """Bytes of a position are what a real cache's tensors hold for one."""
    model = tiny()
    cache = Cache(model, 2, most=5)
    with torch.no_grad():
        model(torch.randint(11, (2, 5)), cache)
    kept = [store[..., :cache.used, :] for store in (cache.keys, cache.values)]
    assert sum(part.numel() * part.element_size() for part in kept) == 2 * 5 * position_bytes(model), "not the cache's"


def test_the_roof_by_hand():
    """A machine of 10 bytes and 40 FLOPs per second: flat from 4 FLOPs for a byte on, 8 tokens for float32 weights."""
    assert [roof(x, 10, 40) for x in (0.5, 2, 4, 8)] == [5, 20, 40, 40], "the lower of the two lines is the roof"
    # 8 tokens: 16 FLOPs for each weight of 4 bytes are 4 for a byte.
    assert crossing(10, 40, 4) == 8 and crossing(10, 40, 2) == 4, "smaller weights are fetched sooner: fewer tokens"


def test_the_machine_is_measured_in_bytes_and_flops(monkeypatch):
    """A copy moves each byte twice, a matrix-vector product once; a product of n x n matrices takes 2 n^3 FLOPs."""
    seconds = []
    monkeypatch.setattr(bench, "quickest", lambda run, device: run() is None or seconds.pop(0))
    seconds += [1.0, 1.0]
    assert bandwidth(CPU, 2**20) == 2 * 2**20, "a copy reads and writes"
    seconds += [1.0, 0.25]
    assert bandwidth(CPU, 2**20) == 4 * 2**20, "a matrix-vector product reads its matrix once, and it was faster"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda n, m, device: torch.zeros(8, 8))
        seconds += [2.0]
        assert flop_rate(torch.bfloat16, CPU) == 2 * 2048**3 / 2.0, "each of n^2 numbers takes n products and n sums"


def test_the_quickest_run_counts(monkeypatch):
    """The least of at least three times, without the first run and without what is put in order between."""
    clock, takes, order = Clock(monkeypatch), iter([0.01, 5.0, 2.0, 3.0]), []

    def run():
        clock.now += next(takes)
        order.append("run")

    def after():
        clock.now += 100.0
        order.append("after")

    assert quickest(run, CPU, after) == pytest.approx(2.001), "the first run, or what comes after runs, was counted"
    assert order == ["run", "after"] * 4, f"{order}: each run is followed by what puts things back in order"


def test_percentiles_are_numpys():
    """Percentiles are those of numpy, for few values and many, even and odd."""
    values = random.Random(1)
    for n in (1, 2, 5, 100, 191):
        found = [values.expovariate(1) for _ in range(n)]
        for p in (0, 50, 75, 99, 100):
            assert percentile(found, p) == pytest.approx(np.percentile(found, p)), f"{p} % of {n} values"


def test_first_and_later_tokens_are_told_apart():
    """The first time of each run is the prefill's; the others are times between tokens."""
    row = figures([[4.0, 0.1, 0.2], [2.0, 0.3, 0.4], [3.0, 0.2, 0.3]], 60)
    assert row["first, ms"] == 3000 and row["prefill, tokens/s"] == 20, "the median of the first times"
    assert row["p50, ms"] == pytest.approx(250) and row["p99, ms"] == pytest.approx(395), "the prefill is no decode"
    assert row["decode, tokens/s"] == pytest.approx(6 / 1.5), "tokens between which 1.5 seconds went by"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run of train.py as `default`, with a model that was not trained; where the runs go."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    monkeypatch.setattr(bench, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench, "flop_rate", lambda dtype, device: 8e9)
    monkeypatch.setattr(bench, "PREFILL", (3, 20))
    monkeypatch.setattr(bench, "DECODE", (1, 3))
    model = tiny(vocab_size=len(LETTERS))
    (tmp_path / "default").mkdir()
    save(tmp_path / "default" / "model.pt", model, CharTokenizer(LETTERS), optimizer={}, args={}, step=1, seconds=1.0)
    return tmp_path


def test_the_benchmark_runs(trained, capsys):
    """The whole program: a row for each prompt and pass, a figure, a record; prompts longer than was trained on."""
    bench.main(["--prompts", "30", "2", "--length", "3", "--rounds", "2", "--context", "8"])
    shown, summary = capsys.readouterr().out, json.loads((trained / "bench" / "summary.json").read_text("utf-8"))
    assert [row["prompt"] for row in summary["latency"]] == [2, 30], "the shortest first: a peak never falls"
    assert [row["cache, MB"] for row in summary["latency"]] == [5 * 192 / 1e6, 33 * 192 / 1e6]
    assert all(row["first, ms"] > 0 and 0 < row["p50, ms"] <= row["p99, ms"] for row in summary["latency"])
    peaks = [row["peak, MB"] for row in summary["latency"]]
    assert peaks[0] is None or 50 < peaks[0] <= peaks[1] < 100_000, f"{peaks} MB: ru_maxrss is in kB, on macOS in bytes"
    passes = [(row["phase"], row["texts"], row["tokens each"], row["bound by"]) for row in summary["passes"]]
    assert passes == [("prefill", 1, 3, "memory"), ("prefill", 1, 20, "compute"), ("decode", 1, 1, "memory"),
                      ("decode", 3, 1, "memory")], "8 FLOPs for a byte, or 16 tokens, part the two"  # fmt: skip
    assert (trained / "bench" / "roofline.png").stat().st_size < 100_000 and "fewer than 16 tokens" in shown


def test_the_peer_is_timed_in_turns_and_writes_the_same(trained, capsys):
    """`transformers` gets the same weights, writes as many tokens with its cache and the same text as both of ours."""
    bench.main(["--peers", "--context", "60", "--rounds", "2"])
    summary = json.loads((trained / "bench" / "summary.json").read_text("utf-8"))
    *ours, theirs = rows = summary["peers"]
    assert [row["by"] for row in rows] == ["sample.py", "decoder.py", "transformers"]
    assert summary["same"], "other weights or other settings"
    assert all(row["first, ms"] > 0 and row["p50, ms"] > 0 for row in rows)
    assert summary["faster"] == pytest.approx([row["decode, tokens/s"] / theirs["decode, tokens/s"] for row in ours])
    assert "the texts are equal" in capsys.readouterr().out
    model = tiny(vocab_size=len(LETTERS))
    theirs = bench.open_peer(model, CharTokenizer(LETTERS))
    nn.init.normal_(model.blocks[1].ffn.proj.weight)
    assert not bench.peers(model, theirs, 24, 1)[1], "two models with other weights are said to write the same"


@pytest.mark.parametrize("words, reason", [
    (["--length", "1"], "--length 1"), (["--rounds", "0"], "--rounds 0"), (["--context", "7"], "--context 7"),
    (["--prompts", "5", "0"], "--prompts 0"), (["--name", "none"], "no checkpoint"), (["--dtype", "int8"], "int8"),
], ids=str)  # fmt: skip
def test_bad_flags_are_refused(trained, words, reason):
    """Sizes that leave nothing to measure, and a run that is not there, are refused in one line."""
    with pytest.raises(BadInput, match=reason) as caught:
        bench.main(words)
    assert "\n" not in str(caught.value)
