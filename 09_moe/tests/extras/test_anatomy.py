"""The anatomy of models: counts that others published, and the same models as `transformers` builds them."""

import json
from functools import cache

from shared.errors import BadInput

import pytest
import torch

from extras import anatomy
from extras.anatomy import PRESETS, all_to_all, count, read
from model import GPT, ModelConfig

PUBLISHED = {  # parameters, as the models' pages on the hub and KerasHub's presets give them
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_099_328,
    "gemma3-12b": 11_765_788_416,
    "gemma3-27b": 27_009_002_240,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v3": 671_026_419_200 - 58 * 256,  # the biases that balance 256 experts are no parameters
}
ROUNDED = {  # billions in all and active, as the models' reports give them; Kimi K2's report says 1.04 trillion
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),
    "deepseek-v3": (671, 37),
    "kimi-k2": (1040, 32.6),
}

find = cache(anatomy.find)  # large models are built once


def table_of(capsys, *words):
    """What the program prints, as {row: [cells]}."""
    anatomy.main(list(words))
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if "│" in line]
    return {row[0]: row[1:] for row in cells}


def test_totals_are_the_published_ones():
    """Every preset has exactly as many parameters as its authors published."""
    assert PUBLISHED.keys() | ROUNDED.keys() == PRESETS.keys(), "each preset needs a published number"
    for name, published in PUBLISHED.items():
        total = find(name).total
        assert total == published, f"{name}: {total:,} parameters, published are {published:,}"


@pytest.mark.parametrize("name", [
    "gpt2-medium", "llama3-8b", "qwen3-0.6b", "qwen3-8b", "smollm3-3b", "gemma3-4b", "mixtral-8x7b", "qwen3-30b-a3b",
    "deepseek-v3", "kimi-k2",
])  # fmt: skip
def test_parts_are_those_of_transformers(name):
    """Parts, and the matrices that cost FLOPs, are those of what `transformers` builds from the same config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds

    fields = {key: value for key, value in PRESETS[name].items() if value is not None}
    if name in ROUNDED:  # hundreds of experts in each layer take their time
        fields["num_hidden_layers"] = 4
    ours = read(fields, name)
    kind = fields.pop("model_type").replace("kimi_k2", "deepseek_v3")  # the same architecture in other sizes
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    parts = dict.fromkeys(anatomy.PARTS, 0)
    for key, parameter in theirs.named_parameters():
        kind = next(part for words, part in [
            (("embed_tokens", "wte", "wpe"), "embedding"), (("norm", "ln_"), "norms"), (("attn",), "attention"),
            (("mlp", "moe"), "feed-forward"), (("lm_head",), "head"),
        ] if any(word in key for word in words))  # fmt: skip
        parts[kind] += parameter.numel()
    assert ours.parts == parts, f"{name}: a part has another size than in transformers"
    if name in ROUNDED:  # experts stand in one tensor there, those that rest among them
        return
    # GPT-2's matrices are Conv1D there. The head is one of the matrices, tied or not; the embedding is looked up.
    layers = [layer for layer in theirs.modules() if type(layer).__name__ in ("Linear", "Conv1D")]
    matrices = sum(layer.weight.numel() for layer in layers)
    assert ours.matrices == matrices, f"{name}: a token is multiplied by {matrices:,} parameters in transformers"


def test_a_model_is_counted_by_hand():
    """A small model's parts are what multiplying its sizes by hand gives; a tied head is no parameter, but work."""
    sizes = {"vocab_size": 11, "block_size": 40, "n_embd": 12, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 3,
             "n_hidden": 20}  # fmt: skip
    untied, tied = (count(GPT(ModelConfig(**sizes, tied=tied))) for tied in (False, True))
    assert untied.parts == {
        "embedding": 11 * 12,
        "attention": 3 * (12 * 24 + 2 * 12 * 8 + 24 * 12),  # 6 heads of queries, 2 of keys and of values, the output
        "feed-forward": 3 * 3 * 12 * 20,
        "norms": 3 * (2 * 12 + 2 * 4) + 12,
        "head": 12 * 11,
    }
    assert tied.parts == untied.parts | {"head": 0}, "a tied head is the embedding, and was counted twice"
    work = 3 * (12 * 24 + 2 * 12 * 8 + 24 * 12) + 3 * 3 * 12 * 20 + 11 * 12
    for model in (untied, tied):
        assert model.flops(5)["matrices"] == 2 * work, "tied or not, the head multiplies each token"
        # A query is compared with 5 keys, 6 heads of 4 terms each: 5 * 24 products and as many sums; values the same.
        assert model.flops(5)["attention"] == 3 * 4 * 5 * 24, "attention: 4 T H D for each layer"
        assert model.cache(5) == 5 * 3 * (2 + 2) * 4 * 2, "keys and values of 2 heads of 4, in 3 layers, 2 bytes each"
        assert model.cache(5, size=1) == 5 * 3 * (2 + 2) * 4


@pytest.mark.parametrize("name", ROUNDED)
def test_active_parameters_are_the_published_ones(name):
    """Totals and active parameters of the mixtures are those of their reports, as near as those round."""
    total, active = (number / 1e9 for number in (find(name).total, find(name).active))
    assert total == pytest.approx(ROUNDED[name][0], rel=0.015), f"{name}: {total:.1f} billion parameters"
    assert active == pytest.approx(ROUNDED[name][1], rel=0.02), f"{name}: {active:.2f} billion are active"
    assert find(name).flops(1)["matrices"] < 2e9 * active, "a token is multiplied by its own experts, and by no others"


def test_a_mixture_is_counted_by_hand():
    """A small mixture's parts, its active parameters and its FLOPs are what multiplying its sizes by hand gives."""
    sizes = {"vocab_size": 11, "block_size": 40, "n_embd": 12, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 4,
             "n_hidden": 20, "n_expert": 7, "n_active": 3, "n_shared": 2, "expert_hidden": 5, "first_dense": 1,
             "tied": False}  # fmt: skip
    ours = count(GPT(ModelConfig(**sizes)))
    dense, expert, router = 3 * 12 * 20, 3 * 12 * 5, 12 * 7
    assert ours.parts["feed-forward"] == dense + 3 * (7 * expert + 2 * expert + router)
    assert ours.total - ours.active == 3 * 4 * expert, "of 7 experts 4 rest, in 3 layers; shared ones never rest"
    attention = 4 * (12 * 24 + 2 * 12 * 8 + 24 * 12)
    work = attention + dense + 3 * (3 * expert + 2 * expert + router) + 11 * 12
    assert ours.flops(1)["matrices"] == 2 * work, "a token is multiplied by 3 experts, the shared ones and the router"
    assert (ours.n_expert, ours.n_active, ours.n_mixture, ours.reach) == (7, 3, 3, 3)
    plain = count(GPT(ModelConfig(**sizes | {"n_expert": 0})))
    assert plain.active == plain.total and plain.n_mixture == plain.reach == 0, "in a dense model nothing rests"


def test_latent_attention_keeps_little():
    """DeepSeek-V3 keeps 70,272 bytes a token, as published, and a query meets keys of 192 and values of 128 numbers."""
    deepseek = find("deepseek-v3")
    assert deepseek.cache(1) == 61 * (512 + 64) * 2 == 70_272, "a latent vector and a key for positions in each layer"
    assert deepseek.flops(10)["attention"] == 10 * 61 * 128 * 2 * (192 + 128)


def test_the_volume_of_all_to_all_is_worked_by_hand():
    """DeepSeek-V3: 28,672 bytes a token and layer there, 57,344 back; 352 MB a layer and 20.4 GB a pass for 4,096."""
    assert all_to_all(7168, 4) == (28_672, 57_344), "4 machines x 7,168 numbers x 1 byte there, and x 2 back"
    assert all_to_all(7168, 8, there=2) == (114_688, 114_688), "to each of 8 experts, bfloat16 both ways"
    there, back = all_to_all(7168, 4, tokens=4096)
    assert there + back == 4096 * 86_016 == 352_321_536
    model = find("deepseek-v3")
    assert (model.n_embd, model.reach, model.n_mixture) == (7168, 4, 58), "at most 4 of its 8 machines, in 58 layers"
    assert model.n_mixture * (there + back) / 1e9 == pytest.approx(20.43, abs=0.01)
    assert find("kimi-k2").reach == find("qwen3-30b-a3b").reach == 8 and find("mixtral-8x7b").reach == 2, \
        "without groups a token is sent to each of its experts"


def test_flops_are_those_that_torch_counts():
    """Torch's own counter sees as many operations forwards, and twice as many backwards."""
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(ModelConfig(vocab_size=50, block_size=16, n_embd=24, n_head=4, n_kv_head=2, n_layer=2, n_hidden=40))
    ours, idx = count(model), torch.randint(50, (1, 16))
    with FlopCounterMode(display=False) as counter:
        loss = model(idx).sum()
    forward = counter.get_total_flops()
    assert forward == 16 * sum(ours.flops(16).values()), "16 tokens, of which each is counted as looking back over 16"
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * forward, "two products backwards for each product forwards"


def test_published_caches_and_windows():
    """KV caches are as large as published: Qwen3-32B 256 KiB a token, Gemma 3 only windows in five layers of six."""
    assert find("qwen3-32b").cache(1) == 262_144 and find("qwen3-8b").cache(1) == 147_456
    assert find("smollm2-135m").cache(1) == 23_040
    gemma, every = find("gemma3-1b"), 2 * 256 * 2  # bytes of a key and a value in one layer
    assert gemma.cache(100) == 100 * 26 * every, "within the window every layer keeps all positions"
    assert gemma.cache(2000) == (4 * 2000 + 22 * 512) * every, "of 26 layers 22 keep no more than their window of 512"
    assert gemma.flops(2000)["attention"] == (4 * 2000 + 22 * 512) * 4 * 4 * 256


def test_a_config_json_is_read(tmp_path, monkeypatch):
    """A config.json counts like its preset: by file or folder, from where it was typed, with what it leaves out."""
    for name in ("gpt2-large", "qwen3-1.7b", "gemma3-27b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**PRESETS[name], "torch_dtype": "bfloat16"}))
    monkeypatch.setenv("STAGES_FROM", str(tmp_path))
    for folder in tmp_path.iterdir():
        monkeypatch.chdir(folder)
        assert find(folder.name) == find(f"{folder.name}/config.json") == find(str(folder))
        (folder / "config.json").rename(folder / "other.json")
        assert find(f"{folder.name}/other.json").total == PUBLISHED[folder.name]
    for name, size in (("gpt2", 50257 * 768), ("gemma3-1b", 262144 * 1152), ("smollm3-3b", 128256 * 2048)):
        untied = read({**PRESETS[name], "tie_word_embeddings": False}, "")
        assert untied.total == PUBLISHED[name] + size, f"{name}: a head of its own is a matrix more"
    # What the published file of Gemma 3 4B says of its text, and nothing else; 64 tokens stand for pictures.
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "sliding_window": 1024}  # fmt: skip
    gemma = read({"model_type": "gemma3", "text_config": text}, "config.json")
    assert gemma.total == PUBLISHED["gemma3-4b"] + 64 * 2560 and gemma.cache(9000) == find("gemma3-4b").cache(9000)
    plain = {key: value for key, value in PRESETS["qwen3-0.6b"].items() if key != "head_dim"}
    assert read(plain, "").head_dim == 128, "Qwen3's head size is not C / H"
    alone = read({**PRESETS["llama3-8b"], "num_key_value_heads": None, "head_dim": None}, "")
    assert (alone.n_kv_head, alone.head_dim) == (32, 128), "Llama has as many of keys as of queries where none is named"


def test_what_is_not_known_is_refused(tmp_path):
    """Another architecture, a size that is no number, biases, a damaged file and an unknown name are one line each."""
    llama, file = PRESETS["llama3-8b"], tmp_path / "config.json"
    for about, names in [
        ({**llama, "model_type": "mamba"}, "mamba"),
        ({}, "model_type"),
        ({**llama, "hidden_size": "wide"}, "hidden_size"),
        ({**llama, "num_hidden_layers": 0}, "n_layer"),
        ({**llama, "num_key_value_heads": 7}, "n_kv_head"),
        ({**llama, "attention_bias": True}, "attention_bias"),
        ({**llama, "head_dim": "64"}, "head_dim"),
        ({**llama, "head_dim": None, "num_attention_heads": 24}, "n_head"),
        ({**PRESETS["gpt2"], "n_embd": None}, "n_embd"),
        ({**PRESETS["gpt2"], "n_head": 5}, "n_head"),
        ({**PRESETS["gemma3-1b"], "sliding_window": None}, "sliding_window"),
        ([1], "list"),
    ]:
        file.write_text(json.dumps(about))
        with pytest.raises(BadInput, match=names) as refused:
            find(str(file))
        assert "config.json" in str(refused.value), "the line does not name the file"
    file.write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        find(str(tmp_path))
    for name in ("llama3", str(tmp_path / "nothing")):
        with pytest.raises(BadInput, match="llama3-8b"):
            find(name)
    with pytest.raises(BadInput, match="query"):
        model = GPT(ModelConfig(vocab_size=5, n_layer=1))
        model.query = torch.nn.Linear(2, 2)
        count(model)


def test_the_table_shows_models_side_by_side(capsys):
    """The program prints a column for each model, with the context that was asked for."""
    rows = table_of(capsys, "gpt2", "llama3-8b", "--context", "512")
    assert rows["parameters"] == ["124,439,808", "8,030,261,248"]
    assert rows["C / layers"] == ["64.000", "128.000"] and rows["H / K"] == ["1.000", "4.000"]
    assert rows["F / C"] == ["4.000", "3.500"] and rows["head size, D"] == ["64", "128"]
    assert rows["KV cache, bytes a token"] == ["36,864", "131,072"]
    matrices, attention, whole = (float(rows[key][1]) for key in (
        "matrices", "attention over 512", "forward, GFLOPs a token"
    ))  # fmt: skip
    assert abs(matrices - 2 * 7.504e9 / 1e9) < 0.01, "2 for each parameter but those of the embedding and the norms"
    assert abs(attention - 4 * 512 * 4096 * 32 / 1e9) < 0.001 and abs(whole - matrices - attention) < 0.002
    assert abs(float(rows["training, GFLOPs a token"][1]) - 3 * whole) < 0.01, "training takes 3 times the forward pass"


@pytest.mark.parametrize("words", [["--context", "0"], ["--context", "1025"]], ids=" ".join)
def test_bad_flags_are_refused(words):
    """A context is at least 1 position, and no longer than the model was made for."""
    with pytest.raises(BadInput, match=words[0]):
        anatomy.main(["gpt2", *words])
