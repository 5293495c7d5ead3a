"""The shape of an open model as `config.json` tells it: read into our ModelConfig, and written.

Every field is read, or must have the value that our model computes with, or is known to change no number. Any other is
an error: a setting passed over is a model that loads, and writes nonsense.
"""

import json
from itertools import islice
from pathlib import Path

from shared.errors import BadInput

from model import ModelConfig

# The architectures that are ours, and what a config that leaves a setting out means in each.
FAMILIES = {
    "llama": {"head_dim": None, "tie_word_embeddings": False, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6},
    "qwen3": {"head_dim": 128, "tie_word_embeddings": False, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6},
    "smollm3": {"head_dim": None, "tie_word_embeddings": True, "rope_theta": 2_000_000.0, "rms_norm_eps": 1e-6},
    "mixtral": {"head_dim": None, "tie_word_embeddings": False, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5},
    "qwen3_moe": {
        "head_dim": None, "tie_word_embeddings": False, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6,
        "decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False,
    },
}  # fmt: skip
SIZES = {  # our name: the name in config.json
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_embd": "hidden_size",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_layer": "num_hidden_layers",
    "n_hidden": "intermediate_size",
}  # fmt: skip
EXPERTS = {  # the same, of a mixture
    "mixtral": {
        "n_expert": "num_local_experts", "n_active": "num_experts_per_tok", "expert_hidden": "intermediate_size",
    },
    "qwen3_moe": {
        "n_expert": "num_experts", "n_active": "num_experts_per_tok", "expert_hidden": "moe_intermediate_size",
    },
}  # fmt: skip
READ = {
    *SIZES.values(), "model_type", "head_dim", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", "layer_types",
    "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip
OWN = {  # what one architecture has beside that; with values where our model can do no others
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": None},
    "mixtral": {
        "num_local_experts": None, "num_experts_per_tok": None, "sliding_window": (None,),
        # How a router is trained, and whether a program shows what it said.
        "router_aux_loss_coef": None, "router_jitter_noise": None, "output_router_logits": None,
    },
    "qwen3_moe": {
        "num_experts": None, "num_local_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None,
        "norm_topk_prob": (False, True), "decoder_sparse_step": None, "mlp_only_layers": None,
        "router_aux_loss_coef": None, "output_router_logits": None,
    },
}  # fmt: skip
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
    only(about, dict.fromkeys(READ | NEUTRAL) | FIXED | OWN.get(kind, {}), where)
    layers = about.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(layer != "full_attention" for layer in layers)):
        raise BadInput(f"{where}: layer_types has others than full_attention, which are not understood")
    rope = read_rope(about, where)
    about = FAMILIES[kind] | about
    if about.get("num_key_value_heads") is None and kind == "llama":  # from before heads were shared
        about["num_key_value_heads"] = about.get("num_attention_heads")
    if kind == "qwen3_moe" and "num_local_experts" in about:  # what programs call num_experts since transformers 5
        if about.setdefault("num_experts", about["num_local_experts"]) != about["num_local_experts"]:
            raise BadInput(f"{where}: num_experts and num_local_experts are two numbers, and should be one")
    if type(about["tie_word_embeddings"]) is not bool:
        raise BadInput(f"{where}: tie_word_embeddings is {about['tie_word_embeddings']!r} and should be true or false")
    names = SIZES | EXPERTS.get(kind, {})
    shape = {ours: number(about, theirs, where, whole=True) for ours, theirs in names.items()}
    shape["head_dim"] = None if about["head_dim"] is None else number(about, "head_dim", where, whole=True)
    if kind == "smollm3":
        shape["nope_every"] = read_nope(about, shape["n_layer"], where)
    if kind == "qwen3_moe":
        shape |= {"renormalise": about["norm_topk_prob"]} | read_mixed(about, shape["n_layer"], where)
    eps = number(about, "rms_norm_eps", where)
    try:
        return ModelConfig(
            **shape, **rope, norm_eps=eps, tied=about["tie_word_embeddings"], qk_norm=kind in ("qwen3", "qwen3_moe")
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


def read_mixed(about: dict, n_layer: int, where) -> dict:
    """Which layers are mixtures, by our names: each so-manieth one, but for those in a list.

    Step 2 and the list [1]: of 8 layers 3, 5 and 7 -> {"first_dense": 2, "moe_every": 2}. Raises BadInput for mixtures
    that do not go on at one distance to the last layer.
    """
    step, listed = number(about, "decoder_sparse_step", where, whole=True), about["mlp_only_layers"] or []
    if step < 1 or not isinstance(listed, list) or any(type(i) is not int for i in listed):
        raise BadInput(f"{where}: decoder_sparse_step should be at least 1, and mlp_only_layers a list of layers")
    steps = range(step - 1, n_layer, step)  # never made a list: the number of layers is a stranger's
    dense = {i for i in listed if i in steps}
    first, second = [*islice((i for i in steps if i not in dense), 2), n_layer, n_layer][:2]
    if first == n_layer:
        return {"n_expert": 0}
    mixed = range(first, n_layer, second - first)
    first_dense = first + 1 - mixed.step
    if first_dense < 0 or len(mixed) != len(steps) - len(dense) or any(i in mixed for i in dense):
        raise BadInput(
            f"{where}: with mlp_only_layers {str(listed)[:80]} and decoder_sparse_step {step}, mixtures are not "
            "equally far apart, and only those are understood"
        )
    return {"first_dense": first_dense, "moe_every": mixed.step}


def layout(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...], int | None]]:
    """The name of each tensor in the files -> its name in our model, its shape, and which expert's it is, if any's.

    An expert has tensors of its own there, and is a part of one of ours: "model.layers.0.mlp.experts.3.up_proj.weight"
    -> ("blocks.0.ffn.fc", (F, C), 3). Experts come in their order: as texts, "10" would stand before "2".
    """
    C, F, D, V = config.n_embd, config.n_hidden, config.head_dim, config.vocab_size
    layer = {
        "input_layernorm": ("norm1", (C,)),
        "self_attn.q_proj": ("attn.query", (config.n_head * D, C)),
        "self_attn.k_proj": ("attn.key", (config.n_kv_head * D, C)),
        "self_attn.v_proj": ("attn.value", (config.n_kv_head * D, C)),
        "self_attn.o_proj": ("attn.proj", (C, config.n_head * D)),
        "post_attention_layernorm": ("norm2", (C,)),  # named for its place: after attention, before the feed-forward
    }
    if config.qk_norm:
        layer |= {"self_attn.q_norm": ("attn.query_norm", (D,)), "self_attn.k_norm": ("attn.key_norm", (D,))}
    dense = {
        "mlp.gate_proj": ("ffn.gate", (F, C)),
        "mlp.up_proj": ("ffn.fc", (F, C)),
        "mlp.down_proj": ("ffn.proj", (C, F)),
    }
    # Qwen3-MoE's names, or Mixtral's: there w2 is the last of the three. What both call a mixture's gate is the router.
    place, gate, up, down = (
        ("mlp", "gate_proj", "up_proj", "down_proj") if config.qk_norm else ("block_sparse_moe", "w1", "w3", "w2")
    )
    router = {f"{place}.gate": ("ffn.router", (config.n_expert, C))}
    found = {"model.embed_tokens": ("tok_emb", (V, C)), "model.norm": ("norm", (C,)), "lm_head": ("head", (V, C))}
    for i in range(config.n_layer):
        for theirs, (ours, shape) in (layer | (router if config.mixed(i) else dense)).items():
            found[f"model.layers.{i}.{theirs}"] = f"blocks.{i}.{ours}", shape
    found = {f"{theirs}.weight": (f"{ours}.weight", shape, None) for theirs, (ours, shape) in found.items()}
    F = config.expert_hidden
    for i in filter(config.mixed, range(config.n_layer)):
        for e in range(config.n_expert):
            for theirs, ours, shape in ((gate, "gate", (F, C)), (up, "fc", (F, C)), (down, "proj", (C, F))):
                found[f"model.layers.{i}.{place}.experts.{e}.{theirs}.weight"] = f"blocks.{i}.ffn.{ours}", shape, e
    return found


def read_ends(about: dict, where) -> set[int]:
    """The ids after which a text is over: one, several or none. Raises BadInput for anything else."""
    ends = about.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int for i in ends):
        raise BadInput(f"{where}: eos_token_id is {ends!r} and should be a whole number, or several")
    return set(ends)


def family(config: ModelConfig) -> str:
    """The published architecture that computes what our model does. Raises BadInput where there is none."""
    mixed = any(map(config.mixed, range(config.n_layer)))
    if mixed:
        kind = "qwen3_moe" if config.qk_norm else "mixtral"
    else:
        kind = "qwen3" if config.qk_norm else "smollm3" if config.nope_every else "llama"
    wanted = {"window": None, "n_sink": 0} | ({} if kind == "smollm3" else {"nope_every": 0})
    if mixed:
        wanted |= {"n_shared": 0, "router": "softmax", "capacity": None}
    if kind == "mixtral":
        wanted |= {"renormalise": True, "first_dense": 0, "moe_every": 1}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise BadInput(
                f"{name} is {getattr(config, name)}, and models of the architecture {kind} have only {value}: "
                "no other program opens this model"
            )
    if kind == "llama" and config.n_embd % config.n_head:
        raise BadInput(
            f"Llama's programs refuse an n_embd ({config.n_embd}) that n_head ({config.n_head}) does not divide: "
            "no other program opens this model"
        )
    return kind


def write_config(config: ModelConfig, dtype: str, end: int | None = None) -> dict:
    """What to write into a config.json, with `end` for the id that ends a text.

    In the older form, which old and new programs read. Raises BadInput for a model that no architecture computes.
    """
    kind = family(config)
    about = {"model_type": kind, "architectures": [{
        "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
        "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    }[kind]]}  # fmt: skip
    about |= {theirs: getattr(config, ours) for ours, theirs in (SIZES | EXPERTS.get(kind, {})).items()}
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
    if kind in ("llama", "smollm3"):
        about["mlp_bias"] = False
    if kind in ("qwen3", "qwen3_moe", "smollm3"):
        about["use_sliding_window"] = False
    if kind == "smollm3":
        about["no_rope_layers"] = nope_flags(config.nope_every, config.n_layer)
        about["no_rope_layer_interval"] = config.nope_every
    if kind == "mixtral":
        about["sliding_window"] = None
    if kind == "qwen3_moe":
        about["norm_topk_prob"], about["decoder_sparse_step"] = config.renormalise, 1
        about["mlp_only_layers"] = [i for i in range(config.n_layer) if not config.mixed(i)]
    return about
