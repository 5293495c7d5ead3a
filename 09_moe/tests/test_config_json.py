"""Checkpoints of config.json: what it says is read, or has the value that our model computes with, or is refused."""

import json
from dataclasses import replace
from itertools import combinations
from math import prod

from shared.errors import BadInput

import pytest
from hf_models import MODELS, SHARED

from config_json import layout, read_config, read_ends, read_json, write_config
from model import GPT, ModelConfig

# Configs as they were published with Llama 3.2 1B, Qwen3 0.6B and 30B-A3B, SmolLM3 3B and Mixtral 8x7B, without what is
# the same in all.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
SMOLLM = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
    "sliding_window": None, "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False,
    "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
QWEN_MOE = QWEN | {
    "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 6144,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("about", "parameters", "ends", "some"),
    [
        (LLAMA, 1_235_814_400, {128001, 128008, 128009}, {"rope_factor": 32.0, "head_dim": 64, "qk_norm": False}),
        (QWEN, 596_049_920, {151645}, {"rope_base": 1e6, "head_dim": 128, "qk_norm": True, "norm_eps": 1e-6}),
        (SMOLLM, 3_075_098_624, {128012}, {"nope_every": 4, "tied": True, "rope_base": 5e6, "head_dim": 128}),
        (MIXTRAL, 46_702_792_704, {2}, {"n_expert": 8, "n_active": 2, "renormalise": True, "qk_norm": False}),
        (QWEN_MOE, 30_532_122_624, {151645}, {"n_active": 8, "renormalise": True, "qk_norm": True, "n_shared": 0}),
    ],
    ids=["Llama 3.2 1B", "Qwen3 0.6B", "SmolLM3 3B", "Mixtral 8x7B", "Qwen3 30B-A3B"],
)
def test_published_configs_are_understood(about, parameters, ends, some):
    """The configs of published models are read whole: parameters add up to the published totals."""
    import torch

    from hf import Undrawn

    config = read_config(about, "here")
    assert {name: getattr(config, name) for name in some} == some and read_ends(about, "here") == ends
    table = layout(config).values()
    total = sum(prod(shape) for ours, shape, _ in table if not (config.tied and ours == "head.weight"))
    assert total == parameters, "another model is read"
    experts = [e for ours, _, e in table if ours == "blocks.1.ffn.fc"]
    assert experts == [*range(config.n_expert)], "experts are out of order"
    few = replace(config, n_layer=3)
    with torch.device("meta"), Undrawn():
        state = GPT(few).state_dict()
    shapes = {ours: shape if e is None else (e + 1, *shape) for ours, shape, e in layout(few).values()}
    shapes |= {name: (few.n_expert,) for name in state if name.endswith("ffn.bias")}  # in none of the files
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes, "the table of tensors"


def test_what_is_left_out_means_what_it_means_there():
    """A setting that a config leaves out has the value that its architecture gives it, as in `transformers`."""
    import transformers

    experts = {"num_experts_per_tok": 3, "num_local_experts": 5}
    for kind, name, more in (
        ("llama", "LlamaConfig", {}), ("qwen3", "Qwen3Config", {}), ("smollm3", "SmolLM3Config", {}),
        ("mixtral", "MixtralConfig", experts), ("qwen3_moe", "Qwen3MoeConfig", experts | {"moe_intermediate_size": 24}),
    ):  # fmt: skip
        sizes = {
            "vocab_size": 50, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 8,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
        }  # fmt: skip
        theirs = getattr(transformers, name)(**sizes | more)
        ours = read_config(sizes | more | {"model_type": kind}, "here")
        assert ours.rope_base == theirs.rope_parameters["rope_theta"] and ours.norm_eps == theirs.rms_norm_eps
        assert ours.tied == theirs.tie_word_embeddings, f"{kind}: tied"
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8), f"{kind}: head_dim"
        assert ours.nope_every == {"smollm3": 4}.get(kind, 0) and ours.rope_factor == 1
        assert ours.renormalise == getattr(theirs, "norm_topk_prob", True), f"{kind}: weights of the chosen"
        assert (ours.n_expert, ours.mixed(0), ours.mixed(7)) == ((5, True, True) if more else (0, False, False)), kind
    sizes.pop("num_key_value_heads")
    assert read_config(sizes | {"model_type": "llama"}, "here").n_kv_head == 6, "of old, each head had its own keys"


def test_nope_layers_are_read_either_way(tmp_path):
    """SmolLM3's layers without positions come as a list or as an interval; left out, each fourth layer is one."""
    from transformers import SmolLM3Config

    from config_json import read_config

    settings = {key: value for key, value in MODELS["smollm3"][1].items() if key != "no_rope_layer_interval"}
    for more, every in (
        ({"no_rope_layers": [1, 1, 0, 1, 1]}, 3), ({"no_rope_layer_interval": 2}, 2), ({}, 4),
        ({"no_rope_layers": [1] * 5}, 0), ({"no_rope_layers": [0] * 5}, 1),
    ):  # fmt: skip
        about = SmolLM3Config(**SHARED | settings | more).to_dict()
        for leave_out in ((), ("no_rope_layers",) if "no_rope_layers" not in more else ()):
            about = {key: value for key, value in about.items() if key not in leave_out}
            assert read_config(about, "here").nope_every == every, f"{more}: positions in other layers"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"secret_norm": True}, "secret_norm"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"no_rope_layers": [1] * 16}, "no_rope_layers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 5}, "layer_types"),
        ({"hidden_size": "2048"}, "hidden_size"),
        ({"hidden_size": 2048.0}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": [16]}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_attention_heads": 0}, "n_head"),
        ({"num_attention_heads": 30}, "n_head"),
        ({"num_key_value_heads": 5}, "n_kv_head"),
        ({"head_dim": 63}, "head_dim"),
        ({"head_dim": "64"}, "head_dim"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
        ({"rope_theta": "500000"}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": -1}, "rope_base"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "llama3"),
        ({"rope_scaling": [8]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA["rope_scaling"] | {"mscale": 1.0}}, "mscale"),
        ({"rope_scaling": LLAMA["rope_scaling"] | {"low_freq_factor": 9.0}}, "rope_low"),
        ({"rope_scaling": LLAMA["rope_scaling"] | {"rope_theta": 10_000.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused(changes, names):
    """Another architecture, an unknown field, a number where a text belongs, absurd sizes: one line names the field."""
    with pytest.raises(BadInput) as caught:
        read_ends(LLAMA | changes, "here")
        read_config(LLAMA | changes, "here")
    assert names in str(caught.value) and "here" in str(caught.value) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize(
    "changes",
    [
        {"no_rope_layers": [1, 0, 0, 1] * 9}, {"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": 4},
        {"no_rope_layers": ["1"] * 36}, {"no_rope_layers": None, "no_rope_layer_interval": 0},
        {"no_rope_layers": None, "no_rope_layer_interval": "4"},
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_without_positions_are_refused(changes):
    """Layers without positions at irregular places are not ours: the line names the field."""
    with pytest.raises(BadInput, match="no_rope_layer"):
        read_config(SMOLLM | changes, "here")


@pytest.mark.parametrize(
    ("about", "changes", "names"),
    [
        (LLAMA, {"num_experts": 8}, "num_experts"),
        (QWEN, {"num_experts_per_tok": 2}, "num_experts_per_tok"),
        (MIXTRAL, {"sliding_window": 4096}, "sliding_window"),
        (MIXTRAL, {"norm_topk_prob": False}, "norm_topk_prob"),
        (MIXTRAL, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        (MIXTRAL, {"num_local_experts": None}, "num_local_experts"),
        (MIXTRAL, {"num_local_experts": "8"}, "num_local_experts"),
        (MIXTRAL, {"num_local_experts": 10**12}, "num_local_experts"),
        (MIXTRAL, {"num_local_experts": -8}, "n_expert"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "n_active 9 of n_expert 8"),
        (MIXTRAL, {"num_experts_per_tok": 0}, "n_active 0"),
        (QWEN_MOE, {"num_local_experts": 64}, "num_local_experts"),
        (QWEN_MOE, {"moe_intermediate_size": 0}, "expert_hidden"),
        (QWEN_MOE, {"moe_intermediate_size": True}, "moe_intermediate_size"),
        (QWEN_MOE, {"norm_topk_prob": "no"}, "norm_topk_prob"),
        (QWEN_MOE, {"norm_topk_prob": None}, "norm_topk_prob"),
        (QWEN_MOE, {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size"),
        (QWEN_MOE, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        (QWEN_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN_MOE, {"decoder_sparse_step": "1"}, "decoder_sparse_step"),
        (QWEN_MOE, {"mlp_only_layers": 3}, "mlp_only_layers"),
        (QWEN_MOE, {"mlp_only_layers": ["3"]}, "mlp_only_layers"),
        (QWEN_MOE, {"mlp_only_layers": [5]}, "mlp_only_layers"),
        (QWEN_MOE, {"mlp_only_layers": [5], "num_hidden_layers": 2**30}, "mlp_only_layers"),
    ],
    ids=lambda value: "" if isinstance(value, dict) and "model_type" in value else str(value),
)
def test_experts_that_are_not_understood_are_refused(about, changes, names):
    """Fields of another mixture, absurd numbers of experts, a window, irregular layers: one line names the field."""
    with pytest.raises(BadInput) as caught:
        read_config(about | changes, "here")
    assert names in str(caught.value) and "here" in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_mixtures_stand_in_the_layers_that_the_config_names():
    """Of all steps and lists for up to 6 layers, those that our model can have are read so, and the others refused."""
    sizes = {name: value for name, value in QWEN_MOE.items() if name != "num_hidden_layers"}
    read = 0
    for n in range(1, 7):
        ours = {tuple((i - first + 1) % every == 0 and i >= first for i in range(n)): (first, every)
                for first in range(n + 1) for every in range(1, n + 1)}  # fmt: skip
        for step in (1, 2, 3):
            for listed in (each for size in range(n + 1) for each in combinations(range(n), size)):
                layers = tuple((i + 1) % step == 0 and i not in listed for i in range(n))  # as Qwen3-MoE's code has it
                about = sizes | {"num_hidden_layers": n, "decoder_sparse_step": step, "mlp_only_layers": [*listed, 99]}
                try:
                    config = read_config(about, "here")
                except BadInput:
                    assert layers not in ours, f"refused: step {step}, dense {listed} of {n} layers"
                    continue
                assert tuple(config.mixed(i) for i in range(n)) == layers, f"step {step}, dense {listed} of {n} layers"
                again = read_config(write_config(config, "float32"), "there")
                assert [again.mixed(i) for i in range(n)] == [*layers], "written as other layers than were read"
                read += 1
    assert read > 100, "nearly nothing is understood"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"7", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"], ids=range(7)
)
def test_a_file_that_is_no_json_object_is_refused(content, tmp_path):
    """Half a file, a list, no UTF-8, brackets or digits without end: one line that names the file."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match="config.json is damaged") as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BadInput, match="has no config.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", MODELS)
def test_a_written_config_is_read_back(name):
    """A shape that was read is written so that reading it gives the same shape."""
    import transformers

    kind, settings = MODELS[name]
    about = json.loads(getattr(transformers, kind)(**SHARED | settings).to_json_string())
    config = read_config(about, "here")
    again = write_config(config, "float32", 5)
    assert read_config(again, "there") == config and read_ends(again, "there") == {5}


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ({"nope_every": 4}, "nope_every"),
        ({"qk_norm": False, "n_embd": 36, "n_head": 5, "head_dim": 8}, "n_embd"),
        ({"window": 32}, "window"),
        ({"n_sink": 2}, "n_sink"),
        ({"n_expert": 4, "nope_every": 2, "qk_norm": False}, "nope_every"),
        ({"n_expert": 4, "n_shared": 1}, "n_shared"),
        ({"n_expert": 4, "router": "sigmoid"}, "router"),
        ({"n_expert": 4, "capacity": 1.25}, "capacity"),
        ({"n_expert": 4, "qk_norm": False, "renormalise": False}, "renormalise"),
        ({"n_expert": 4, "qk_norm": False, "first_dense": 1}, "first_dense"),
        ({"n_expert": 4, "qk_norm": False, "moe_every": 2}, "moe_every"),
    ],
    ids=str,
)
def test_shapes_of_no_architecture_are_not_written(shape, names):
    """A window, shared experts, a capacity, dense layers in a Mixtral: one line, where a file would drop them."""
    with pytest.raises(BadInput, match=f"{names}.* no other program") as caught:
        write_config(ModelConfig(50, **shape), "float32")
    assert "\n" not in str(caught.value), caught.value
