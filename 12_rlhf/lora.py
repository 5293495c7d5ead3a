"""Low-rank adapters: tune a few numbers beside each matrix, and leave the matrix as it is.

A matrix W [out, in] of a trained model stays frozen. Beside it stand A [r, in] and B [out, r], and what is trained is

    y = x W^T + alpha / r * (x A^T) B^T

B begins with zeros, so the tuned model begins as exactly the base. Afterwards W + alpha / r * B A is one matrix again
(`merge`), and the model is as fast as it was. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).

An adapter is saved in the form of the library PEFT, which opens it beside the same base, and other programs with it.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from shared.atomic import write
from shared.errors import BadInput

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from config_json import layout

TARGETS = ("query", "key", "value", "proj", "gate", "fc")  # the matrices of a block
PREFIX = "base_model.model."  # of every name in PEFT's files
# Settings of PEFT that would change what an adapter computes, and the values with which they do not.
OTHER = {"bias": (None, "none"), "use_rslora": (None, False), "use_dora": (None, False)}
OTHER |= {"fan_in_fan_out": (None, False), "rank_pattern": (None, {}), "alpha_pattern": (None, {})}
OTHER |= {"modules_to_save": (None, []), "lora_bias": (None, False), "use_qalora": (None, False)}
OTHER |= {"layer_replication": (None,), "alora_invocation_tokens": (None,), "target_parameters": (None, [])}
OTHER |= {"init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva")}  # others change the base as well


@dataclass
class LoRAConfig:
    """The adapters' shape. Raises BadInput for one that cannot be built."""

    rank: int = 8  # columns of B: how many directions of a matrix's output can change
    alpha: float = 16.0  # the change counts alpha / rank times, so that another rank wants no other learning rate
    dropout: float = 0.0  # share of the adapters' inputs that is left out in training

    def __post_init__(self):
        if self.rank < 1:
            raise BadInput(f"rank is {self.rank}: it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise BadInput(f"alpha is {self.alpha}: it must be above 0, and finite")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is {self.dropout}: it must be at least 0 and below 1")


class LoRA(nn.Module):
    """A frozen layer with an adapter beside it: [..., in] -> [..., out].

    A starts with a spread of 1 / sqrt(in), B with zeros: at first the adapter changes nothing.
    """

    def __init__(self, layer: nn.Module, config: LoRAConfig):
        super().__init__()
        self.layer, self.config = layer.requires_grad_(False), config
        n_out, n_in = layer.weight.shape
        # In float32 also beside a base of fewer bits: a step of the optimiser would be lost in bfloat16.
        like = {"device": layer.weight.device, "dtype": torch.float32}
        self.a = nn.Parameter(torch.empty(config.rank, n_in, **like))
        self.b = nn.Parameter(torch.zeros(n_out, config.rank, **like))
        nn.init.normal_(self.a, std=1 / math.sqrt(n_in))

    @property
    def scale(self) -> float:
        """What the change is multiplied by."""
        return self.config.alpha / self.config.rank

    def forward(self, x):
        h = F.dropout(x, self.config.dropout, self.training).to(self.a.dtype)
        h = F.linear(F.linear(h, self.a), self.b)  # [..., in] -> [..., r] -> [..., out]
        y = self.layer(x)
        return y + (self.scale * h).to(y.dtype)

    def change(self):
        """What the adapter adds to the matrix: [out, in]."""
        return self.scale * self.b @ self.a


def adapters(model) -> dict[str, LoRA]:
    """The adapted layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRA)}


def add(model, config: LoRAConfig, targets=TARGETS):
    """Freeze the model, and put adapters beside the matrices of its blocks that `targets` names.

    A target is the last part of a name, "query", or all of it, "blocks.3.attn.query". Returns the model.
    Raises BadInput where there is none of them, or where the model has adapters already.
    """
    if adapters(model):
        raise BadInput("the model has adapters already: merge them first")
    model.requires_grad_(False)
    found = [name for name, layer in model.named_modules()
             if name.startswith("blocks.") and hasattr(layer, "weight") and {name, name.split(".")[-1]} & {*targets}]
    if not found:
        raise BadInput(f"no matrix of the model is called {', '.join(targets)}: choose from {', '.join(TARGETS)}")
    for name in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRA(model.get_submodule(name), config))
    return model


@torch.no_grad()
def merge(model):
    """Add each adapter to its matrix, and take it away: the same scores, at the speed of the base.

    A matrix keeps its type. Returns the model, all of whose parameters can be tuned again. Raises BadInput for a base
    in four bits, whose weights are no nn.Parameter: a sum would have to be rounded again.
    """
    found = adapters(model)
    if any(not isinstance(lora.layer.weight, nn.Parameter) for lora in found.values()):
        raise BadInput("the base is in four bits, which have no room for a sum: make floats of it first")
    for name, lora in found.items():
        weight = lora.layer.weight
        weight += lora.change().to(weight.dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, lora.layer)
    return model.requires_grad_(True)


def peft_names(model) -> dict[str, str]:
    """What PEFT calls our matrices: blocks.0.attn.query is base_model.model.model.layers.0.self_attn.q_proj.

    Of all tensors of the model, by `layout`, also of those that can have no adapter.
    """
    return {ours.removesuffix(".weight"): PREFIX + theirs.removesuffix(".weight")
            for theirs, (ours, *_) in layout(model.config).items()}


def save_adapter(model, folder: Path, base: str) -> Path:
    """Write the adapters of `model` as PEFT does. `base` is the name or folder of the model that they belong to.

    The folder, which is returned, then has adapter_config.json and adapter_model.safetensors; a tensor's name in it is
    that of `peft_names` with .lora_A.weight or .lora_B.weight.
    """
    found, names = adapters(model), peft_names(model)
    if not found:
        raise BadInput("the model has no adapters to save")
    config = next(iter(found.values())).config
    tensors = {}
    for name, lora in found.items():
        tensors[f"{names[name]}.lora_A.weight"] = lora.a.detach().cpu().contiguous()
        tensors[f"{names[name]}.lora_B.weight"] = lora.b.detach().cpu().contiguous()
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none", "fan_in_fan_out": False,
        "target_modules": sorted({names[name].rpartition(".")[2] for name in found}),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write(folder / "adapter_config.json", json.dumps(about, indent=2) + "\n")
    return folder


def load_adapter(model, folder: str | Path):
    """Put the adapters of a folder, written by `save_adapter` or by PEFT, beside the matrices of `model`; returns it.

    Raises BadInput for a folder that is damaged, or whose adapters are of another kind or belong to another model, or
    to the head or the embedding, which have none here.
    """
    folder = Path(os.environ.get("STAGES_FROM", "."), folder)
    try:
        about = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        config = LoRAConfig(int(about["r"]), float(about["lora_alpha"]), float(about.get("lora_dropout") or 0))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BadInput(f"{folder} holds no adapter that can be read ({error})") from None
    other = [key for key in OTHER if about.get(key) not in OTHER[key]]
    if about.get("peft_type") != "LORA" or other:
        raise BadInput(f"{folder} holds an adapter of a kind that is not written here: {other or about['peft_type']}")
    places = {peft: ours for ours, peft in peft_names(model).items() if ours.startswith("blocks.")}
    stems = {key.rpartition(".lora_")[0] for key in tensors}
    if not stems or not stems <= places.keys():
        raise BadInput(f"{folder} holds an adapter for another model: {', '.join(sorted(stems - places.keys())[:1])}")
    if more := tensors.keys() - {f"{stem}.lora_{part}.weight" for stem in stems for part in "AB"}:
        raise BadInput(f"{folder} holds an adapter of a kind that is not written here: it has {min(more)}")
    pairs = [(stem, part) for stem in stems for part in "AB"]
    state = {f"{places[stem]}.{part.lower()}": tensors.get(f"{stem}.lora_{part}.weight") for stem, part in pairs}
    for name in (places[stem] for stem in stems):
        n_out, n_in = model.get_submodule(name).weight.shape
        for part, shape in (("a", (config.rank, n_in)), ("b", (n_out, config.rank))):
            if getattr(state[f"{name}.{part}"], "shape", None) != shape:
                raise BadInput(f"{folder} holds an adapter for a model of another shape")
    add(model, config, [places[stem] for stem in stems])
    model.load_state_dict(state, strict=False)
    return model
