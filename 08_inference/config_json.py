"""The shape of an open model as `config.json` tells it: read into our ModelConfig, and written.

Every field is read, or must have the value that our model computes with, or is known to change no number. Any other is
an error: a setting passed over is a model that loads, and writes nonsense.
"""

import json
from pathlib import Path

from shared.errors import BadInput

from model import ModelConfig

# The architectures that are ours, and what a config that leaves a setting out means in each.
FAMILIES = {
    "llama": {"head_dim": None, "tie_word_embeddings": False, "rope_theta": 10_000.0},
    "qwen3": {"head_dim": 128, "tie_word_embeddings": False, "rope_theta": 10_000.0},
    "smollm3": {"head_dim": None, "tie_word_embeddings": True, "rope_theta": 2_000_000.0},
}
SIZES = {  # our name: the name in config.json
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_embd": "hidden_size",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_layer": "num_hidden_layers",
    "n_hidden": "intermediate_size",
}  # fmt: skip
READ = {
    *SIZES.values(), "model_type", "head_dim", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", "layer_types",
    "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip
NOPE = {"no_rope_layers", "no_rope_layer_interval"}  # of SmolLM3
FIXED = {  # what our model does
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "rope_interleaved": (False,), "partial_rotary_factor": (1.0,), "is_encoder_decoder": (False,),
    "add_cross_attention": (False,), "layer_types": None,
}  # fmt: skip
NEUTRAL = {  # change no number: where a model comes from, how it is trained, what a program shows or keeps
    "architectures", "dtype", "torch_dtype", "transformers_version", "transformers.js_config", "_name_or_path",
    "name_or_path", "is_llama_config", "initializer_range", "attention_dropout", "pretraining_tp", "use_cache",
    "sliding_window", "max_window_layers", "bos_token_id", "pad_token_id", "output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "_attn_implementation_autoset",
}  # fmt: skip
LLAMA3 = {  # our names of Llama 3.1's RoPE scaling: theirs
    "rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor",
    "rope_original": "original_max_position_embeddings",
}  # fmt: skip


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises BadInput when there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, an endless number or row of brackets
        raise BadInput(f"{path} is damaged ({error}): fetch it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} is damaged (no object, but a {type(found).__name__}): fetch it again")
    return found


def only(found: dict, allowed: dict[str, tuple | None], where) -> None:
    """Raises BadInput for a name that is not in `allowed`, or has none of the values there; None allows all values."""
    for name, value in found.items():
        if name not in allowed:
            raise BadInput(f"{where}: {name!r} is not understood, and what it changes would be lost")
        if allowed[name] is not None and value not in allowed[name]:
            choice = " or ".join(json.dumps(value) for value in allowed[name])
            raise BadInput(f"{where}: {name} is {json.dumps(value)[:80]}, and only {choice} is understood")


def number(found: dict, name: str, where, whole: bool = False):
    """A number of at most 31 bits if whole. Raises BadInput for anything else; true is none, though Python's is 1."""
    value = found.get(name)
    if type(value) is int and abs(value) < 2**31 or type(value) is float and abs(value) < 1e300 and not whole:
        return value
    kind = "whole number of at most 31 bits" if whole else "number"
    raise BadInput(f"{where}: {name} is {json.dumps(value)[:80]} and should be a {kind}")


def read_config(about: dict, where) -> ModelConfig:
    """The shape that a config.json's object tells. Raises BadInput for a model that computes something else."""
    kind = about.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise BadInput(f"{where}: model_type is {kind!r}, and only {', '.join(FAMILIES)} are understood")
    only(about, FIXED | dict.fromkeys(READ | NEUTRAL | (NOPE if kind == "smollm3" else set())), where)
    layers = about.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(layer != "full_attention" for layer in layers)):
        raise BadInput(f"{where}: layer_types has others than full_attention, which are not understood")
    rope = read_rope(about, where)
    about = FAMILIES[kind] | about
    if about.get("num_key_value_heads") is None and kind == "llama":  # from before heads were shared
        about["num_key_value_heads"] = about.get("num_attention_heads")
    if type(about["tie_word_embeddings"]) is not bool:
        raise BadInput(f"{where}: tie_word_embeddings is {about['tie_word_embeddings']!r} and should be true or false")
    sizes = {ours: number(about, theirs, where, whole=True) for ours, theirs in SIZES.items()}
    sizes["head_dim"] = None if about["head_dim"] is None else number(about, "head_dim", where, whole=True)
    nope = read_nope(about, sizes["n_layer"], where) if kind == "smollm3" else 0
    eps = number({"rms_norm_eps": 1e-6} | about, "rms_norm_eps", where)
    try:
        return ModelConfig(
            **sizes, **rope, norm_eps=eps, tied=about["tie_word_embeddings"], qk_norm=kind == "qwen3", nope_every=nope
        )
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def read_rope(about: dict, where) -> dict:
    """RoPE's settings by our names. Newer configs have all of them in one object, older ones the base beside it."""
    new, old = about.get("rope_parameters"), about.get("rope_scaling")
    rope = new or old or {}
    if not isinstance(rope, dict) or new and old and new != old:
        raise BadInput(f"{where}: rope_parameters and rope_scaling should be an object, or two that agree")
    base = about.get("rope_theta", FAMILIES[about["model_type"]]["rope_theta"])
    if "rope_theta" in about and rope.get("rope_theta", base) != base:
        raise BadInput(f"{where}: rope_theta is {base!r} in one place and {rope['rope_theta']!r} in another")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise BadInput(f"{where}: the RoPE scaling {kind!r} is not understood, only default and llama3 are")
    names = {"rope_base": "rope_theta"} | (LLAMA3 if kind == "llama3" else {})
    known = dict.fromkeys({"rope_type", "type", *names.values()}) | {"partial_rotary_factor": (1.0,)}
    only(rope, known, where)
    return {ours: number({"rope_theta": base} | rope, theirs, where) for ours, theirs in names.items()}


def read_nope(about: dict, n_layer: int, where) -> int:
    """Each so-manieth layer is without positions: [1, 1, 1, 0, 1, 1, 1, 0] -> 4. Raises BadInput for other orders."""
    flags = about.get("no_rope_layers")
    if flags is None:
        every = number({"no_rope_layer_interval": 4} | about, "no_rope_layer_interval", where, whole=True)
        if every < 1:
            raise BadInput(f"{where}: no_rope_layer_interval is {every} and should be at least 1")
        return every
    if not isinstance(flags, list) or len(flags) < n_layer:
        raise BadInput(f"{where}: no_rope_layers should say 1 or 0 for each of the {n_layer} layers")
    every = flags[:n_layer].index(0) + 1 if 0 in flags[:n_layer] else 0
    if flags[:n_layer] != nope_flags(every, n_layer):
        raise BadInput(f"{where}: no_rope_layers is {flags}, and only each so-manieth 0 is understood")
    return every


def nope_flags(every: int, n_layer: int) -> list[int]:
    """1 for a layer with positions, 0 for one without: 4, 8 -> [1, 1, 1, 0, 1, 1, 1, 0]."""
    return [int(not every or i % every != 0) for i in range(1, n_layer + 1)]


def layout(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The name of each tensor in the files -> its name in our model, and its shape."""
    C, F, D, V = config.n_embd, config.n_hidden, config.head_dim, config.vocab_size
    layer = {
        "input_layernorm": ("norm1", (C,)),
        "self_attn.q_proj": ("attn.query", (config.n_head * D, C)),
        "self_attn.k_proj": ("attn.key", (config.n_kv_head * D, C)),
        "self_attn.v_proj": ("attn.value", (config.n_kv_head * D, C)),
        "self_attn.o_proj": ("attn.proj", (C, config.n_head * D)),
        "post_attention_layernorm": ("norm2", (C,)),  # named for its place: after attention, before the feed-forward
        "mlp.gate_proj": ("ffn.gate", (F, C)),
        "mlp.up_proj": ("ffn.fc", (F, C)),
        "mlp.down_proj": ("ffn.proj", (C, F)),
    }
    if config.qk_norm:
        layer |= {"self_attn.q_norm": ("attn.query_norm", (D,)), "self_attn.k_norm": ("attn.key_norm", (D,))}
    found = {"model.embed_tokens": ("tok_emb", (V, C)), "model.norm": ("norm", (C,)), "lm_head": ("head", (V, C))}
    for i in range(config.n_layer):
        for theirs, (ours, shape) in layer.items():
            found[f"model.layers.{i}.{theirs}"] = f"blocks.{i}.{ours}", shape
    return {f"{theirs}.weight": (f"{ours}.weight", shape) for theirs, (ours, shape) in found.items()}


def read_ends(about: dict, where) -> set[int]:
    """The ids after which a text is over: one, several or none. Raises BadInput for anything else."""
    ends = about.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int for i in ends):
        raise BadInput(f"{where}: eos_token_id is {ends!r} and should be a whole number, or several")
    return set(ends)


def write_config(config: ModelConfig, dtype: str, end: int | None = None) -> dict:
    """What to write into a config.json, with `end` for the id that ends a text.

    In the older form, which old and new programs read. Raises BadInput for a model that no architecture computes.
    """
    if config.window is not None or config.n_sink:
        raise BadInput("no published architecture of these has a window or sinks: no other program opens this model")
    if config.qk_norm and config.nope_every:
        raise BadInput("no published architecture has both qk_norm and nope_every: no other program opens this model")
    kind = "qwen3" if config.qk_norm else "smollm3" if config.nope_every else "llama"
    if kind == "llama" and config.n_embd % config.n_head:
        raise BadInput(
            f"Llama's programs refuse an n_embd ({config.n_embd}) that n_head ({config.n_head}) does not divide: "
            "no other program opens this model"
        )
    about = {"model_type": kind, "architectures": [
        {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM"}[kind]
    ]}  # fmt: skip
    about |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    about |= {
        "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "torch_dtype": dtype,
        "rope_theta": config.rope_base, "rope_scaling": None,
        # Said even where there is none: left out, they would mean ids of Llama's own vocabulary.
        "bos_token_id": None, "eos_token_id": end, "pad_token_id": None,
    }  # fmt: skip
    if config.rope_factor != 1:
        about["rope_scaling"] = {"rope_type": "llama3"}
        about["rope_scaling"] |= {theirs: getattr(config, ours) for ours, theirs in LLAMA3.items()}
    if kind != "qwen3":
        about["mlp_bias"] = False
    if kind != "llama":
        about["use_sliding_window"] = False
    if kind == "smollm3":
        about["no_rope_layers"] = nope_flags(config.nope_every, config.n_layer)
        about["no_rope_layer_interval"] = config.nope_every
    return about
