"""Mixtures of experts: many feed-forwards beside one another, of which each position uses a few.

Shapes: N positions of C channels, E experts of F units, k of them for each position.
"""

import math
from dataclasses import dataclass
from typing import Literal

from shared.errors import BadInput

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 64  # rows to which an expert's block is filled up


@dataclass(kw_only=True)
class MixtureConfig:
    """Which layers are mixtures, and what of: a part of ModelConfig, whose n_layer and n_hidden it reads.

    Raises BadInput for a mixture that cannot be built.
    """

    n_expert: int = 0  # feed-forwards of a mixture; 0: every layer is dense, with one for all positions
    n_active: int = 2  # experts that each position uses
    n_shared: int = 0  # experts that all positions use beside those (DeepSeekMoE): what all need is learned once
    expert_hidden: int | None = None  # units of an expert; none: those that a position uses have n_hidden together
    first_dense: int = 0  # first layers that are dense: their routers hardly learn to balance
    moe_every: int = 1  # of the layers after those, each n-th is a mixture and the others are dense
    router: Literal["softmax", "sigmoid"] = "softmax"  # experts compete for a position, or are scored one by one
    # Weights of the chosen sum to 1 (Mixtral, Qwen3, DeepSeek-V3), or are left (OLMoE). With n_active 1 they have to be
    # left (Switch): a weight that is always 1 gives the router no gradient.
    renormalise: bool = True  # make the weights of the chosen sum to 1
    capacity: float | None = None  # an expert takes at most this many times its even share; none: all that choose it

    def __post_init__(self):
        if self.n_expert and not 1 <= self.n_active <= self.n_expert:
            raise BadInput(f"n_active {self.n_active} of n_expert {self.n_expert}: use at least one, and at most all")
        for name, least in {"n_active": 1, "n_shared": 0, "first_dense": 0, "moe_every": 1}.items():
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if self.n_expert and self.first_dense + self.moe_every > self.n_layer:
            raise BadInput(f"first_dense {self.first_dense} and moe_every {self.moe_every} leave no mixture in n_layer "
                           f"{self.n_layer}: lower one of the two, or choose n_expert 0 for a dense model")
        if self.n_expert > 1 and self.n_active == 1 and self.renormalise:
            raise BadInput("n_active 1 with renormalise: the weight of the chosen expert is always 1, and the router "
                           "learns nothing from the loss: choose a larger n_active, or train.py --no-renormalise")
        if self.expert_hidden is None:
            self.expert_hidden = max(8, self.n_hidden // (self.n_active + self.n_shared) // 8 * 8)
        if self.expert_hidden < 1:
            raise BadInput(f"expert_hidden is {self.expert_hidden}: it must be at least 1")
        if self.capacity is not None and not 0 < self.capacity < math.inf:
            raise BadInput(f"capacity is {self.capacity}: it must be above 0, and finite, or none for no limit")

    def mixed(self, layer: int) -> bool:
        """Whether the layer, counted from 0, is a mixture."""
        later = layer - self.first_dense
        return self.n_expert > 0 and later >= 0 and (later + 1) % self.moe_every == 0


@dataclass(frozen=True)
class Routing:
    """What the router of a layer did in its last pass, over the positions that are no padding."""

    load: torch.Tensor  # [E], positions that chose each expert, without gradient
    balance: torch.Tensor  # Switch's loss: 1 where all experts are equally loaded, E / k where the same k take all
    z: torch.Tensor  # mean square of the logarithm of the router's sum of exponentials: large scores round badly
    entropy: torch.Tensor  # of the router's probabilities, in nats, mean over positions; ln E where it does not choose
    dropped: torch.Tensor  # share of the choices that an expert had no room for


def grouped(x, weight, ends):
    """Rows of x [M, n] in E blocks that end at `ends` [E], each times its own matrix of `weight` [E, m, n]: [M, m]."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = 16 // x.element_size()  # torch's kernel wants rows that begin at multiples of 16 bytes, and no float64
    if x.dtype == torch.float64 or any(size % aligned for size in weight.shape[1:]):
        blocks = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        return torch.cat([block @ matrix.mT for block, matrix in zip(blocks, weight, strict=True)])
    return F.grouped_mm(x, weight.mT, offs=ends.int())


def count(model, active: bool = False) -> int:
    """Parameters of the model; of those of experts only what one token uses, if `active`."""
    total = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if active and isinstance(layer, Mixture):
            c = layer.config
            held = sum(p.numel() for p in (layer.gate, layer.fc, layer.proj))
            total -= held * (c.n_expert - c.n_active) // c.n_expert
    return total


class Mixture(nn.Module):
    """E feed-forwards, of which the router chooses k for each position: [B, T, C] -> [B, T, C].

        x [N, C] -> scores [N, E] -> the best k, and their weights [N, k] -> sorted by expert [N k, C] -> each block of
        rows through its expert [N k, C] -> back in place, weighted and summed [N, C]

    Shazeer et al. (2017); Fedus et al., "Switch Transformers" (2021); Dai et al., "DeepSeekMoE" (2024).
    """

    def __init__(self, config, FeedForward):
        super().__init__()
        self.config = config
        E, C, hidden = config.n_expert, config.n_embd, config.expert_hidden
        self.router = nn.Linear(C, E, bias=False)
        nn.init.normal_(self.router.weight, std=0.1 * C**-0.5)  # all experts are about equally likely at first
        # The class is passed in: model.py, where it stands, imports this file.
        experts = [FeedForward(config, hidden) for _ in range(E)]
        # The experts' matrices in one tensor each, in the order of nn.Linear: [E, out, in].
        for name in ("gate", "fc", "proj"):
            setattr(self, name, nn.Parameter(torch.stack([getattr(each, name).weight.data for each in experts])))
        self.shared = FeedForward(config, config.n_shared * hidden) if config.n_shared else None
        # Added to the scores for the choice alone (DeepSeek-V3): it moves positions to experts that have too few.
        self.register_buffer("bias", torch.zeros(E))
        self.routing = None  # of the last pass
        self.load = 0  # of all passes in training since the last `count`

    def __getstate__(self):
        return vars(self) | {"routing": None, "load": 0}  # a copy of the layer has not routed anything yet

    def _apply(self, fn, recurse=True):
        """What `to`, `cuda` and `bfloat16` call. The bias goes along to a device, but keeps its type.

        With 8 bits of precision 0.5 + 0.001 is 0.5: its steps would be lost.
        """
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self

    def forward(self, x, real=None):
        flat = x.flatten(0, -2)  # [N, C]
        real = None if real is None else real.expand(x.shape[:-1]).flatten()  # [1 or B, T] -> [N]
        chosen, weights = self.route(flat, real)  # [N, k] x 2
        y = self.experts(flat, chosen, weights)  # [N, C]
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view_as(x)

    def route(self, x, real=None):
        """Which experts each position goes to, and how much each counts: [N, C] -> [N, k] x 2.

        A choice that gets no room, and one of padding, is expert E, which does not exist.
        """
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)  # two experts often nearly tie: bfloat16 would toss a coin
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.to(wide), self.router.weight.to(wide))  # [N, E]
        probs = scores.softmax(-1) if c.router == "softmax" else scores.sigmoid()
        chosen = (probs.detach() + self.bias).topk(c.n_active).indices  # [N, k]
        weights = probs.gather(-1, chosen)  # without the bias: it is to change who, and not how much
        if c.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if real is not None:
            chosen = chosen.masked_fill(~real[:, None], c.n_expert)
        load = torch.bincount(chosen.flatten(), minlength=c.n_expert + 1)[:c.n_expert]
        # Who finds room depends on others, also on those who come later: a text that is scored must be free of that.
        kept = chosen if c.capacity is None or not self.training else self.limit(chosen)
        self.routing = self.report(scores, probs, real, load, (kept != chosen).sum())
        if self.training:
            self.load = self.load + load
        return kept, weights

    def limit(self, chosen):
        """Turn away whom an expert has no room for, the last in the text first: choices [N, k] -> [N, k]."""
        E = self.config.n_expert
        # First choices come before second ones: the place in the queue is counted column by column.
        asked = F.one_hot(chosen.T.flatten(), E + 1)  # [k N, E + 1]
        place = (asked.cumsum(0) * asked).sum(-1).view(-1, len(chosen)).T  # [N, k], from 1
        room = math.ceil(self.config.capacity * int((chosen < E).sum()) / E)
        return chosen.masked_fill(place > room, E)

    def report(self, scores, probs, real, load, dropped) -> Routing:
        """How evenly the router chose; 0 where there is nothing but padding.

        Gradients flow through the probabilities: counts have none.
        """
        E, total = self.config.n_expert, load.sum().clamp(min=1)
        share = probs / probs.sum(-1, keepdim=True)  # [N, E]
        if real is not None:
            scores, share = scores[real], share[real]
        n = max(1, len(share))  # a mean over nothing would be nan
        # E sum_e f_e P_e: the share of choices times the mean probability. Fedus et al. (2021), equation 4; with f as
        # a share of all k N choices it is 1 at perfect balance for any k.
        balance = E * (load / total * share.sum(0) / n).sum()
        z = scores.logsumexp(-1).square().sum() / n  # Zoph et al., "ST-MoE" (2022), equation 5
        entropy = -(share * share.clamp(min=1e-9).log()).sum().detach() / n
        return Routing(load, balance, z, entropy, dropped / total)

    def experts(self, x, chosen, weights):
        """Send each position [N, C] through its experts [N, k] and add up what they say: [N, C].

        Positions are sorted by expert, so that each expert multiplies one block of rows, and the products of all
        experts are one call. No loop runs over positions.
        """
        E, k = self.config.n_expert, chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # [N k]: choices by expert, those of no expert at the end
        load = torch.bincount(chosen.flatten(), minlength=E + 1)[:E]  # [E]
        order = order[:int(load.sum())]  # [M], M <= N k
        rows = order // k  # the position that each choice belongs to
        # Each block is filled up with empty rows. For every new number of rows, a CPU's library makes a new program.
        room = (load + BLOCK - 1) // BLOCK * BLOCK
        ends = room.cumsum(0)  # [E]: where each block ends
        shift = (ends - room) - (load.cumsum(0) - load)  # [E]: how far a block's rows move
        places = torch.arange(len(order), device=x.device) + shift.repeat_interleave(load)  # [M]
        h = x.new_zeros(int(ends[-1]), x.shape[1]).index_copy(0, places, x.index_select(0, rows))  # [sum of room, C]
        h = F.silu(grouped(h, self.gate, ends)) * grouped(h, self.fc, ends)  # [sum of room, F]
        h = grouped(h, self.proj, ends).index_select(0, places)  # [M, C]
        h = h * weights.flatten()[order, None].type_as(h)
        # One that every expert turned away gets nothing here: the stream around the layer still carries it.
        return torch.zeros_like(x).index_add(0, rows, h.type_as(x))

    def count(self):
        """Positions that chose each expert [E] since the last count. A batch may have come in several parts."""
        load, self.load = torch.zeros_like(self.bias, dtype=torch.long) + self.load, 0  # [E], also where nothing came
        return load

    @torch.no_grad()
    def rebalance(self, load, rate: float):
        """Make experts with too few positions likelier to be chosen, and those with too many less: load [E].

        Wang et al., "Auxiliary-Loss-Free Load Balancing" (2024), algorithm 1.
        """
        self.bias += rate * torch.sign(load.float().mean() - load)
