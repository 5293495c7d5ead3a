"""Where a model's parameters, its arithmetic and its memory go: for models of any size, without their weights.

    uv run stages run 09 extras/anatomy.py mixtral-8x7b qwen3-30b-a3b deepseek-v3 kimi-k2
    uv run stages run 09 extras/anatomy.py gpt2-xl my/folder/config.json --context 512

A model is a preset, a config.json or, in Python, a model of this stage: `count(model)`. Models of this stage's
architecture are built on torch's "meta" device, where a tensor has a shape and no numbers. Llama 3 70B then takes no
memory, and its parameters are counted one by one. GPT-2, Gemma 3 and DeepSeek-V3 have other parts; those are counted by
formula.

Rows of the table that need a word:

- Active parameters, those that one token uses: all but the experts that it does not choose. The embedding counts whole,
  as in most published numbers, though a token reads one row of it.
- Forward FLOPs, the additions and multiplications for one token. Each active parameter of a matrix costs one of both.
  The token embedding is looked up, which costs none; as the output layer it is a matrix like others, tied or not.
- Attention also has work without parameters. A query is compared with T keys: H dot products of D terms each, 2 T H D.
  The average of T values costs the same. Together 4 T H D in each layer, where T is `--context`, the positions that the
  token looks back over. (Those of a training window look back over 1 ... T; it is usual to count T for all of them.)
- Training takes 3 times the forward pass. For each product the backward pass has two of the same size: one gives the
  gradient of the weights, one that of the input. Kaplan et al. (2020), section 2.1; Chowdhery et al. (2022), app. B.
- KV cache: a model that writes keeps the keys and values of the past, 2 K D numbers for each position and layer, here
  of 2 bytes each. A layer with a sliding window keeps no more positions than its window has. DeepSeek-V3 keeps a latent
  vector and one key for positions instead.
- All-to-all: the experts of a layer are spread over many GPUs ("expert parallelism"), and tokens travel to them and
  back, see `all_to_all`. The rows are for a GPU that reads `--tokens` tokens.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import table
from shared.errors import BadInput
from shared.program import run_program

import torch
from torch import nn

from config_json import FAMILIES, read_config, read_json
from hf import Undrawn
from model import GPT
from moe import Mixture

PARTS = ("embedding", "attention", "feed-forward", "norms", "head")


def modern(kind, n_embd, n_hidden, n_layer, n_head, n_kv_head, head_dim, vocab, positions, tied, **more) -> dict:
    """The fields of a published config.json that decide how large the model is."""
    return {
        "model_type": kind, "hidden_size": n_embd, "intermediate_size": n_hidden, "num_hidden_layers": n_layer,
        "num_attention_heads": n_head, "num_key_value_heads": n_kv_head, "head_dim": head_dim, "vocab_size": vocab,
        "max_position_embeddings": positions, "tie_word_embeddings": tied, **more,
    }  # fmt: skip


def gpt2(n_embd, n_layer, n_head) -> dict:
    """The same of GPT-2."""
    sizes = {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head, "n_positions": 1024, "vocab_size": 50257}
    return {"model_type": "gpt2", **sizes}


def deepseek(kind, n_layer, first_dense, n_head, n_expert, vocab, positions, **more) -> dict:
    """The same of DeepSeek-V3 and of Kimi K2, which differs in few sizes."""
    return modern(kind, 7168, 18432, n_layer, n_head, n_head, None, vocab, positions, False) | {
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": n_expert, "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
        "first_k_dense_replace": first_dense, **more,
    }  # fmt: skip


PRESETS = {
    "gpt2": gpt2(768, 12, 12),
    "gpt2-medium": gpt2(1024, 24, 16),
    "gpt2-large": gpt2(1280, 36, 20),
    "gpt2-xl": gpt2(1600, 48, 25),
    "llama3-8b": modern("llama", 4096, 14336, 32, 32, 8, 128, 128256, 8192, False),
    "llama3-70b": modern("llama", 8192, 28672, 80, 64, 8, 128, 128256, 8192, False),
    "qwen3-0.6b": modern("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, True),
    "qwen3-1.7b": modern("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, 40960, True),
    "qwen3-4b": modern("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, 40960, True),
    "qwen3-8b": modern("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 40960, False),
    "qwen3-14b": modern("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, 40960, False),
    "qwen3-32b": modern("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, 40960, False),
    "smollm2-135m": modern("llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, True),
    "smollm3-3b": modern("smollm3", 2048, 11008, 36, 16, 4, 128, 128256, 65536, True),
    # Gemma 3's part for text. From 4B on the published files hold 64 tokens more, which stand for pictures.
    "gemma3-1b": modern("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, 32768, True, sliding_window=512),
    "gemma3-4b": modern("gemma3_text", 2560, 10240, 34, 8, 4, 256, 262144, 131072, True, sliding_window=1024),
    "gemma3-12b": modern("gemma3_text", 3840, 15360, 48, 16, 8, 256, 262144, 131072, True, sliding_window=1024),
    "gemma3-27b": modern("gemma3_text", 5376, 21504, 62, 32, 16, 128, 262144, 131072, True, sliding_window=1024),
    "mixtral-8x7b": modern("mixtral", 4096, 14336, 32, 32, 8, 128, 32000, 32768, False, num_local_experts=8,
                           num_experts_per_tok=2),
    "qwen3-30b-a3b": modern("qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151936, 40960, False, num_experts=128,
                            num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True),
    # Without the part that predicts a second token, 11.5 billion parameters more in DeepSeek-V3.
    "deepseek-v3": deepseek("deepseek_v3", 61, 3, 128, 256, 129280, 163840, n_group=8, topk_group=4),
    "kimi-k2": deepseek("kimi_k2", 61, 1, 64, 384, 163840, 131072, n_group=1, topk_group=1),
}


@dataclass
class Anatomy:
    """The sizes of a model, and how many parameters each of its PARTS has. Biases count with the part they are in."""

    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_hidden: int
    parts: dict[str, int]
    matrices: int  # parameters that every token is multiplied by: a tied head counts here, and in `parts` does not
    windows: list[int]  # how many positions each layer looks back over
    resting: int = 0  # parameters of experts that a token does not choose
    n_expert: int = 0  # experts of a mixture, and below, of these a token's own
    n_active: int = 0
    n_mixture: int = 0  # layers that are mixtures
    reach: int = 0  # machines that a token is sent to at most
    per_key: int | None = None  # FLOPs for each key that a query meets; none: 4 H D
    kept: int | None = None  # numbers kept for each position and layer; none: 2 K D

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def active(self) -> int:
        return self.total - self.resting

    def flops(self, T: int) -> dict[str, int]:
        """Additions and multiplications of a forward pass for one token that looks back over T positions."""
        per_key = self.per_key or 4 * self.n_head * self.head_dim
        return {"matrices": 2 * self.matrices, "attention": sum(min(T, window) * per_key for window in self.windows)}

    def cache(self, T: int, size: int = 2) -> int:
        """Bytes of the keys and values of T positions, at `size` bytes for each number: 2 is bfloat16."""
        kept = self.kept or 2 * self.n_kv_head * self.head_dim
        return sum(min(T, window) * kept * size for window in self.windows)


def all_to_all(n_embd: int, copies: int, tokens: int = 1, there: int = 1, back: int = 2) -> tuple[int, int]:
    """Bytes that one GPU sends for its `tokens` in a mixture with expert parallelism, and that come back.

    Each token's vector of n_embd numbers goes to `copies` places, with `there` bytes a number (1: float8), and from
    each place comes a vector of as many numbers with `back` bytes (2: bfloat16). A GPU needs as much for others' tokens
    in the other direction. The backward pass takes both ways again.

    There are two ways to count copies. Without care a token is sent to each of its k experts. DeepSeek-V3 chooses a
    token's 8 experts on at most 4 machines, sends one copy to each, and hands it on inside the machine, where wires are
    faster. Between machines go at most 4 x 7,168 x 1 = 28,672 bytes a token there and 4 x 7,168 x 2 = 57,344 back; with
    4,096 tokens on a GPU, 117 and 235 MB in each of 58 layers. DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024),
    sections 2.1.2 and 3.2.2.
    """
    return tokens * copies * n_embd * there, tokens * copies * n_embd * back


def count(model: GPT) -> Anatomy:
    """Count a model of this stage, with weights or without. Raises BadInput for a parameter of no known part."""
    places = {"tok_emb.": "embedding", "norm": "norms", ".attn.": "attention", ".ffn.": "feed-forward", "head.": "head"}
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():  # names each tensor once, so a tied head is not counted again
        part = next((part for place, part in places.items() if place in name), None)
        if part is None:
            raise BadInput(f"the parameter {name} is in none of {', '.join(PARTS)}: this is not the stage's own GPT")
        parts[part] += parameter.numel()
    c, layers = model.config, list(model.modules())
    mixtures = [layer for layer in layers if isinstance(layer, Mixture)]
    experts = sum(weight.numel() for layer in mixtures for weight in (layer.gate, layer.fc, layer.proj))
    used = experts * c.n_active // max(1, c.n_expert)
    matrices = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear)) + used
    sizes = (c.vocab_size, c.n_embd, c.n_layer, c.n_head, c.n_kv_head, c.head_dim, c.n_hidden)
    mixture = (experts - used, c.n_expert, c.n_active, len(mixtures), c.n_active) if mixtures else ()
    return Anatomy(*sizes, parts, matrices, [c.block_size] * c.n_layer, *mixture)


def whole(about: dict, name: str, default: int | None = None) -> int:
    """The whole number that a config.json gives for `name`. Raises BadInput where there is none."""
    value = default if about.get(name) is None else about[name]
    if not isinstance(value, int) or value < 1:
        raise BadInput(f"{name} is {value!r} and should be a whole number above 0")
    return value


def read_gpt2(about: dict) -> Anatomy:
    """GPT-2 from its config.json: learned positions, biases everywhere, LayerNorm with a shift, two matrices of 4 C."""
    V, T, C, L, H = (whole(about, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"))
    F = whole(about, "n_inner", 4 * C)
    if C % H:
        raise BadInput(f"n_embd {C} does not split into n_head {H} equal heads")
    parts = {
        "embedding": (V + T) * C,
        "attention": L * (4 * C * C + 4 * C),  # query, key, value and output, each with a bias
        "feed-forward": L * (2 * C * F + F + C),
        "norms": (2 * L + 1) * 2 * C,
        "head": 0 if about.get("tie_word_embeddings", True) else V * C,
    }
    return Anatomy(V, C, L, H, H, C // H, F, parts, L * (4 * C * C + 2 * C * F) + V * C, [T] * L)


def read_gemma3(about: dict) -> Anatomy:
    """Gemma 3, its part for text, from its config.json; the published files leave out what is the same in most sizes.

    A norm stands before and after each branch. All layers but each sixth look back over a window only.
    """
    C, F, L = (whole(about, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    H, K = whole(about, "num_attention_heads", 8), whole(about, "num_key_value_heads", 4)
    D, V = whole(about, "head_dim", 256), whole(about, "vocab_size", 262208)
    T, every = whole(about, "max_position_embeddings", 131072), whole(about, "sliding_window_pattern", 6)
    kinds = about.get("layer_types") or ["full_attention" if i % every == 0 else "window" for i in range(1, L + 1)]
    windows = [T if kind == "full_attention" else min(T, whole(about, "sliding_window")) for kind in kinds]
    matrices = {"attention": L * (2 * C * H * D + 2 * C * K * D), "feed-forward": L * 3 * C * F}
    norms = L * (4 * C + 2 * D) + C  # those of D are for queries and keys
    head = 0 if about.get("tie_word_embeddings", True) else V * C
    parts = {"embedding": V * C, **matrices, "norms": norms, "head": head}
    return Anatomy(V, C, L, H, K, D, F, parts, sum(matrices.values()) + V * C, windows)


def read_deepseek(about: dict) -> Anatomy:
    """DeepSeek-V3 from its config.json: latent attention (MLA), first layers dense, then mixtures with shared experts.

    Queries are made of a latent vector, keys and values of another; a small key for positions is shared by all heads.
    The bias that balances the experts is no parameter: no gradient changes it.
    """
    C, F, L, H, V, T = (whole(about, name) for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
        "max_position_embeddings",
    ))  # fmt: skip
    Q, latent, D, R, value = (whole(about, name) for name in (
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
    ))  # fmt: skip
    E, k, shared, units, first = (whole(about, name) for name in (
        "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "first_k_dense_replace"
    ))  # fmt: skip
    if k > E or first > L:
        raise BadInput(f"{k} of {E} experts, {first} of {L} layers dense: the first cannot be more than the second")
    attention = L * (C * Q + Q * H * (D + R) + C * (latent + R) + latent * H * (D + value) + H * value * C)
    expert, mixtures = 3 * C * units, L - first
    ffn = first * 3 * C * F + mixtures * (C * E + (E + shared) * expert)  # C E is the router
    resting = mixtures * (E - k) * expert
    head = 0 if about.get("tie_word_embeddings", False) else V * C
    norms = L * (2 * C + Q + latent) + C
    parts = {"embedding": V * C, "attention": attention, "feed-forward": ffn, "norms": norms, "head": head}
    # Experts stand in groups, one on each machine; a token chooses within `topk_group` of them.
    reach = min(k, whole(about, "topk_group", 1)) if whole(about, "n_group", 1) > 1 else k
    return Anatomy(
        V, C, L, H, H, D, F, parts, attention + ffn - resting + V * C, [T] * L, resting, E, k, mixtures, reach,
        per_key=2 * H * (D + R + value), kept=latent + R,
    )  # fmt: skip


def read(about: dict, source: str) -> Anatomy:
    """The anatomy of the model that a config.json describes. Raises BadInput for a model that is not known here."""
    about = about.get("text_config") or about  # a model for pictures and text has one config for each
    kind = str(about.get("model_type"))
    if kind in FAMILIES:  # this stage's architecture: built without memory, then counted
        with torch.device("meta"), Undrawn():  # tensors that are made in here have a shape, and no numbers
            return count(GPT(read_config(about, source)))
    readers = {"gpt2": read_gpt2, "gemma3_text": read_gemma3, "deepseek_v3": read_deepseek, "kimi_k2": read_deepseek}
    if kind not in readers:
        raise BadInput(f"{source}: model_type is {kind!r}, known here are {', '.join([*FAMILIES, *readers])}")
    try:
        return readers[kind](about)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from None


def find(name: str) -> Anatomy:
    """The anatomy of a preset, of a config.json or of a folder with one. Raises BadInput."""
    if name in PRESETS:
        return read(PRESETS[name], name)
    # `stages run` changes to the stage's folder and says where the path was typed.
    path = Path(os.environ.get("STAGES_FROM", "."), name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"{name!r} is no config.json, no folder with one and no preset: {', '.join(PRESETS)}")
    return read(read_json(path), str(path))


def report(a: Anatomy, T: int, tokens: int) -> dict[str, float | None]:
    """The rows of the table for one model, a token that looks back over T positions, and `tokens` on each GPU."""
    work = a.flops(T)
    there, back = all_to_all(a.n_embd, a.reach, tokens)
    return {
        "layers": a.n_layer, "channels, C": a.n_embd, "query heads, H": a.n_head, "key-value heads, K": a.n_kv_head,
        "head size, D": a.head_dim, "feed-forward units, F": a.n_hidden, "tokens, V": a.vocab_size,
        "positions": max(a.windows), "experts, E": a.n_expert or None, "  of a token, k": a.n_active or None,
        "parameters": a.total, **{f"  {part}": a.parts[part] for part in PARTS},
        "active parameters": a.active, "  share": a.active / a.total,
        "forward, GFLOPs a token": sum(work.values()) / 1e9,
        "  matrices": work["matrices"] / 1e9, f"  attention over {T:,}": work["attention"] / 1e9,
        "training, GFLOPs a token": 3 * sum(work.values()) / 1e9,
        "KV cache, bytes a token": a.cache(1), "KV cache, MB, all positions": a.cache(max(a.windows)) / 1e6,
        "all-to-all, MB a layer, there": there / 1e6 or None, "  back": back / 1e6 or None,
        "  GB in all layers, forward": a.n_mixture * (there + back) / 1e9 or None,
        "F / C": a.n_hidden / a.n_embd, "C / layers": a.n_embd / a.n_layer, "H / K": a.n_head / a.n_kv_head,
        "H D / C": a.n_head * a.head_dim / a.n_embd,
        "embedding and head, share": (a.parts["embedding"] + a.parts["head"]) / a.total,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help=f"config.json files, folders with one, or of {', '.join(PRESETS)}")
    parser.add_argument("--context", type=int, default=1024, help="positions to look back over (default: 1024)")
    parser.add_argument("--tokens", type=int, default=4096, help="that a GPU sends to experts (default: 4096)")
    args = parser.parse_args(argv)
    for flag in ("context", "tokens"):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag} {getattr(args, flag)}: it must be at least 1")
    columns = {}
    for name in args.models:
        anatomy = find(name)
        if args.context > max(anatomy.windows):
            raise BadInput(f"--context {args.context}: {name} was made for {max(anatomy.windows)} positions")
        columns[name] = report(anatomy, args.context, args.tokens)
    labels = next(iter(columns.values()))
    table("anatomy", [{"": label} | {name: rows[label] for name, rows in columns.items()} for label in labels])


if __name__ == "__main__":
    run_program(main)
