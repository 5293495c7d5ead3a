"""Read further than the model was trained for: turn the pairs of channels more slowly.

    from extras.yarn import stretch
    longer = stretch(model, 2)                      # YaRN: the same weights, twice the context
    longer = stretch(model, 2, "interpolation")     # all pairs twice as slow

RoPE turns pair i of D / 2 by base^(-2i / D) radians at each position. A model that was trained on L positions has seen
the fast pairs at every angle. The slow ones have not made a whole turn, and beyond L they come to angles that are new.
What to do, for a context that is s times as long:

- plain: nothing. The angles go on as they are.
- interpolation: all pairs turn s times more slowly, so no angle is new. But neighbours differ less than they did, and
  the model tells near positions apart by its fast pairs.
  Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation" (2023).
- YaRN: a pair that turns more than 32 times over L positions keeps its speed, one that turns less than once becomes s
  times slower, a ramp leads from one to the other ("NTK-by-parts"). More keys share the attention now, and to keep it
  as sharp as before, queries and keys both become 0.1 ln s + 1 times longer.
  Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023), section 3.

    SmolLM2, L = 8192, base 100,000, 32 pairs:   32 turns at pair 10.3, one turn at pair 19.9
    so the ramp leads from pair 10 to pair 20:   0 ... 10 as before, 15 at 3 / 4 of its speed, 20 ... 31 at half

The ramp is linear in a pair's number, rounded outwards, as in the authors' code and in published models. The paper
makes it linear in the number of turns (section 3.2). That is Llama 3.1's rule, which the model has already, with
rope_low = 1 and rope_high = 32.
"""

import copy
import math
from dataclasses import replace
from functools import partial

from shared.errors import BadInput

import torch

from model import GPT, ModelConfig

FEW, MANY = 1, 32  # turns over the context trained on: the paper's alpha and beta for Llama models


def plain(config: ModelConfig, factor: float):
    """The speed of each pair as it was trained [D / 2], radians per position, and how much longer vectors become."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    return config.rope_base ** (-pairs / config.head_dim), 1.0


def interpolation(config: ModelConfig, factor: float):
    """The same, all pairs `factor` times slower: position m is taken for m / factor."""
    return plain(config, factor)[0] / factor, 1.0


def yarn(config: ModelConfig, factor: float):
    """The same, only slow pairs slower, and vectors 0.1 ln(factor) + 1 times as long: scores grow by its square."""

    def pair(turns):  # the one that turns so often over the context, not rounded: L base^(-2i / D) = 2 pi turns
        return config.head_dim * math.log(config.block_size / (2 * math.pi * turns)) / (2 * math.log(config.rope_base))

    low, high = max(math.floor(pair(MANY)), 0), min(math.ceil(pair(FEW)), config.head_dim - 1)
    keep = 1 - ((torch.arange(config.head_dim / 2) - low) / max(high - low, 1e-3)).clamp(0, 1)  # 1: as it was
    return plain(config, factor)[0] * (keep + (1 - keep) / factor), 0.1 * math.log(factor) + 1


KINDS = {"plain": plain, "interpolation": interpolation, "yarn": yarn}


def table(positions, speed, length: float):
    """Like the model's `rope`: `length` times cosine and sine at positions [..., T]: [..., T, D / 2] x 2.

    Queries and keys are turned by these, so both get longer, and nothing in the attention has to change.
    """
    angles = positions.float()[..., None] * speed.to(positions.device)  # [..., T, D / 2]
    return length * angles.cos(), length * angles.sin()


def stretch(model: GPT, factor: float, kind: str = "yarn") -> GPT:
    """A model with the weights of `model`, shared and not copied, for a context that is `factor` times as long.

    config.block_size is taken for the length that the model was trained on. A checkpoint of the result would keep its
    weights and its config, but not its angles: save the model, and stretch it when it is loaded.
    Raises BadInput for a factor below 1, an unknown kind, and a model whose angles were changed before.
    """
    config = model.config
    if kind not in KINDS:
        raise BadInput(f"{kind!r} is no way to stretch a context: choose {', '.join(KINDS)}")
    if not 1 <= factor < math.inf:  # so that nan is refused as well
        raise BadInput(f"a context {factor} times as long: the factor must be at least 1, and finite")
    if config.rope_factor != 1 or "rope" in vars(model):
        raise BadInput("this model's pairs were slowed down before: stretch the one that it was made from")
    if config.rope_base <= 1 or config.block_size < 2 * math.pi:
        raise BadInput(f"rope_base {config.rope_base} and block_size {config.block_size}: no pair makes a turn")
    speed, length = KINDS[kind](config, factor)
    longer = copy.copy(model)  # its own config and angles, the same modules
    longer.config = replace(config, block_size=int(factor * config.block_size))
    longer.rope = partial(table, speed=speed, length=length)
    return longer
