"""Open weights in a GGUF file: shape, tokenizer and weights in one, most weights in four to eight bits each.

GGUF is what llama.cpp keeps models in. Here it becomes what `hf.py` reads from a folder: a config, tensors under the
same names, a tokenizer. Three things differ, and each is a trap:

1. the rows of queries and keys lie in another order: channel pairs side by side, as in RoPE's paper, not D / 2 apart;
2. the pattern that splits a text into pieces is not in the file, only its name;
3. a damaged file gives lengths that nothing holds.
"""

import re
from pathlib import Path

from shared.errors import BadInput

import numpy as np
import torch
from gguf import GGUFReader, dequantize

from config_json import only
from tokenizer_json import PATTERNS, make_bpe

LAYER = {  # their name of a layer's tensor: the name in a folder
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
FIELDS = {  # their name of a setting: the name in a config.json
    "llama.block_count": "num_hidden_layers", "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size", "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads", "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps", "llama.rope.freq_base": "rope_theta",
    "llama.rope.dimension_count": "head_dim", "llama.attention.key_length": "head_dim",
    "llama.attention.value_length": "head_dim", "llama.vocab_size": "vocab_size",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
}  # fmt: skip
OTHER = dict.fromkeys((  # what else may stand there, and with which values; None allows all
    "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
    "tokenizer.ggml.scores", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template",
)) | {
    "general.architecture": ("llama",), "tokenizer.ggml.model": ("gpt2",), "llama.rope.scaling.type": ("none",),
    "llama.expert_count": (0,), "tokenizer.ggml.add_space_prefix": (False,), "tokenizer.ggml.add_eos_token": (False,),
}  # fmt: skip
NEUTRAL = r"GGUF\..+|general\.(?!architecture).+|quantize\..+|tokenizer\.ggml\.\w+_token_id"  # change no number
CONTROL = {3, 4, 5}  # token types: special, added, unused; in a text they are met only where `encode` is told so


class Reader(GGUFReader):
    """The `gguf` package's reader, which takes what is there where a file ends early; this one says so.

    Lengths are checked before anything is made of that length. It is also four times as fast.
    """

    def _get(self, offset, dtype, count=1, override_order=None):
        order = self.byte_order if override_order is None else override_order
        return np.frombuffer(self.data, np.dtype(dtype).newbyteorder(order), int(count), int(offset))


def read_gguf(path: Path, dtype: torch.dtype = torch.float32):
    """A file -> (config as in a config.json, tensors by the names in a folder, tokenizer and what belongs to it).

    Rows of queries and keys are left as stored: see `unpermute`. Raises BadInput for a file that is damaged or not
    understood.
    """
    damage = (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, NotImplementedError)
    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except damage as error:
        raise BadInput(f"{path} is damaged, or no GGUF file ({error}): fetch it again") from None
    only(
        {name: value for name, value in fields.items() if not re.fullmatch(NEUTRAL, name)},
        OTHER | dict.fromkeys(FIELDS), path,
    )  # fmt: skip
    about = {"model_type": "llama", "tie_word_embeddings": all(t.name != "output.weight" for t in reader.tensors)}
    for theirs, name in FIELDS.items():
        if theirs in fields and about.setdefault(name, fields[theirs]) != fields[theirs]:
            raise BadInput(f"{path}: {theirs} is {fields[theirs]}, but {name} is {about[name]} already")
    try:
        words = read_words(fields, path)
        about.setdefault("vocab_size", len(fields["tokenizer.ggml.tokens"]))
        tensors = {rename(tensor.name, path): widen(tensor, dtype) for tensor in reader.tensors}
    except damage as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} is damaged ({type(error).__name__}: {error}): fetch it again") from None
    return about, tensors, words


def widen(tensor, dtype: torch.dtype) -> torch.Tensor:
    """One of the file's tensors in a type that can be computed with. Copied: what is stored may lie in the file."""
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).to(dtype)


def rename(name: str, path) -> str:
    """A tensor's name in a folder: "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    if name in OUTER:
        return OUTER[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if not found or found[2] not in LAYER:
        raise BadInput(f"{path}: the tensor {name} is not understood")
    return f"model.layers.{found[1]}.{LAYER[found[2]]}.weight"


def unpermute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [H D, C] of a query or key matrix, from RoPE's order in the paper to ours.

    Within each head the paper turns rows 0 and 1 together, 2 and 3, ...; ours turns row i with row i + D / 2. So rows
    0, 2, 4, ... become the first half and rows 1, 3, 5, ... the second. Left as they are they fit as well, and the
    model attends to the wrong places.
    """
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def read_words(fields: dict, path) -> dict:
    """The tokenizer and what belongs to it, as `hf.Opened` takes them."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    if fields["tokenizer.ggml.pre"] not in PATTERNS:
        raise BadInput(f"{path}: how {fields['tokenizer.ggml.pre']!r} splits a text is not known here")
    if len(kinds) != len(tokens) or not set(kinds) <= CONTROL | {1}:
        raise BadInput(f"{path}: the types of tokens are not understood")
    if len(set(tokens)) < len(tokens):
        raise BadInput(f"{path}: two tokens are spelled alike")
    special = {token: i for i, token in enumerate(tokens) if kinds[i] in CONTROL}
    pre = fields["tokenizer.ggml.pre"]
    begins = fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")  # as llama.cpp does where it is left out
    tokenizer = make_bpe(
        {token: i for i, token in enumerate(tokens)}, [pair.split(" ") for pair in fields["tokenizer.ggml.merges"]],
        special, PATTERNS[pre], path, whole_pieces=pre == "llama-bpe",
    )  # fmt: skip
    ids = {f"{name}_token": fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in (
        ("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("eot", "eot"),
    )}  # fmt: skip
    ids = {name: i for name, i in ids.items() if i is not None}
    return {
        "tokenizer": tokenizer,
        "template": fields.get("tokenizer.chat_template"),
        "names": {name: tokens[i] for name, i in ids.items()},
        "start": [ids["bos_token"]] if begins else [],
        "ends": {i for name, i in ids.items() if name in ("eos_token", "eot_token")},
    }
