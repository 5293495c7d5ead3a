"""Random models of `transformers`, and folders and files made of them, for the checkpoints of open weights."""

import json
from pathlib import Path

import torch

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 5_000.0,
}  # fmt: skip
SHARED = {"vocab_size": 97, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None}
MODELS = {  # how `transformers` calls the class of the config: what differs from its defaults
    "llama 3": ("LlamaConfig", {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "rope_parameters": LLAMA3, "eos_token_id": [5, 7], "rms_norm_eps": 1e-5,
    }),
    "llama 3 with wide heads": ("LlamaConfig", {
        "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 20, "tie_word_embeddings": True,
        "rope_parameters": LLAMA3 | {"factor": 3.0, "low_freq_factor": 0.5, "high_freq_factor": 6.0},
    }),
    "smollm2": ("LlamaConfig", {
        "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 9,
        "num_key_value_heads": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "eos_token_id": 2,
    }),
    "qwen3": ("Qwen3Config", {
        "hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True, "max_window_layers": 2,
    }),
    "qwen3 with one key head": ("Qwen3Config", {
        "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 5,
        "num_key_value_heads": 1, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4},
    }),
    "smollm3": ("SmolLM3Config", {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 6,
        "num_key_value_heads": 3, "no_rope_layer_interval": 2, "eos_token_id": 9,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    }),
    "mixtral": ("MixtralConfig", {
        "hidden_size": 48, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "num_local_experts": 12, "num_experts_per_tok": 3, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-5,
    }),
    "mixtral with wide heads": ("MixtralConfig", {
        "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5,
        "num_key_value_heads": 1, "head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4},
    }),
    "qwen3 of experts": ("Qwen3MoeConfig", {
        "hidden_size": 36, "intermediate_size": 56, "moe_intermediate_size": 20, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 12, "num_experts_per_tok": 4,
        "norm_topk_prob": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }),
    "qwen3 of experts and dense layers": ("Qwen3MoeConfig", {
        "hidden_size": 40, "intermediate_size": 64, "moe_intermediate_size": 24, "num_hidden_layers": 6,
        "num_attention_heads": 5, "num_key_value_heads": 1, "num_experts": 6, "num_experts_per_tok": 2,
        "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [1], "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e4},
    }),
}  # fmt: skip


def random_model(name: str, **more):
    """A model of `transformers` with random numbers everywhere: scales of norms that are all 1 would hide mistakes."""
    import transformers  # takes seconds

    kind, settings = MODELS[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, kind)(**SHARED | settings | more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    return model


def byte_tokenizer() -> dict:
    """A small tokenizer.json, as `tokenizers` writes it: letters and some other bytes, two special tokens."""
    letters = [chr(i) for i in range(ord("a"), ord("a") + 26)]
    vocab = {char: i for i, char in enumerate([*letters, "Ġ", "th", "the", "Ġthe"])}
    vocab |= {chr(0xC0 + i): 32 + i for i in range(63)} | {"A": 95, "B": 96}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": 30 + i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for i, name in enumerate(("<|start|>", "<|end|>"))
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocab, "merges": [["t", "h"], ["th", "e"], ["Ġ", "the"]],
        },
    }  # fmt: skip


def dump(path: Path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def edit(file: Path, **changes):
    """Change values of a JSON file; None takes the key out."""
    values = json.loads(file.read_text("utf-8")) | changes
    dump(file, {key: value for key, value in values.items() if value is not None})


def close(ours, theirs, what, atol=1e-4):
    apart = (ours - theirs).abs().max().item()
    assert apart <= atol, f"{what}: logits are {apart:.1e} from those of transformers"
