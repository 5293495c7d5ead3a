"""Experts that choose their positions, where otherwise positions choose their experts.

Unlike `Mixture`:

- each expert takes the positions that score highest with it, always the same number of them. So all experts are equally
  loaded by construction: there is no balance loss, no bias, and no position is turned away by a full expert;
- a position is taken by as many experts as want it: by none, by one, or by all.

It is not for decoders. Whether an expert takes a position depends on which other positions there are, and those may
come later in the text: a position's output tells something about its future. In training that is cheating, because the
next token is what has to be predicted. In writing it cannot be done at all, because the future is not there yet, and
the model meets another choice than the one it was trained with. The positions of other texts in the batch compete too,
so the answer to a question would depend on who else asks. Encoders, which see the whole text, may use it.

Zhou et al., "Mixture-of-Experts with Expert Choice Routing" (2022), section 3.2.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

import torch
import torch.nn.functional as F

from model import GPT, FeedForward
from moe import Mixture


class ExpertChoice(Mixture):
    """E feed-forwards, each of which takes the c = N k / E positions that it scores highest: [B, T, C] -> [B, T, C].

        x [N, C] -> probabilities [N, E] -> each expert's best c positions [E, c] -> their rows [E, c, C] -> all experts
        in one batched product [E, c, C] -> back in place, weighted and summed [N, C]

    With 6 positions, 3 experts and k = 2, each expert takes 4 positions. `n_active` is how many experts a position has
    on average, which the paper calls the capacity factor. Weights are the router's probabilities as they are (equation
    1): they cannot be made to sum to 1 for a position that nobody takes. `renormalise`, `capacity` and the bias have no
    effect. `taken` [N] says how many experts took each position in the last pass.
    """

    def forward(self, x, real=None):
        flat = x.flatten(0, -2)  # [N, C]
        real = None if real is None else real.expand(x.shape[:-1]).flatten()  # [1 or B, T] -> [N]
        picked, weights = self.pick(flat, real)  # [E, c] x 2
        h = flat[picked]  # [E, c, C]: equal blocks, so no sorting and no grouped product
        h = F.silu(h @ self.gate.mT) * (h @ self.fc.mT)  # [E, c, F]
        h = h @ self.proj.mT * weights[..., None].type_as(h)  # [E, c, C]
        y = torch.zeros_like(flat).index_add(0, picked.flatten(), h.flatten(0, 1).type_as(flat))  # [N, C]
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view_as(x)

    def pick(self, x, real=None):
        """The positions that each expert takes, and how much its word counts there: [N, C] -> [E, c] x 2."""
        c = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.to(wide), self.router.weight.to(wide))  # [N, E]
        # Over the experts, as everywhere: over positions, a weight would shrink with the length of the text.
        probs = scores.softmax(-1) if c.router == "softmax" else scores.sigmoid()
        wanted, total = probs, len(x)
        if real is not None:
            wanted, total = probs.masked_fill(~real[:, None], -1.0), int(real.sum())  # padding comes last
        room = min(total, math.ceil(total * c.n_active / c.n_expert))
        picked = wanted.T.topk(room).indices  # [E, c]
        load = torch.full((c.n_expert,), room, device=x.device)
        self.taken = torch.bincount(picked.flatten(), minlength=len(x))  # [N]
        self.routing = self.report(scores, probs, real, load, torch.zeros((), device=x.device))
        if self.training:
            self.load = self.load + load
        return picked, probs.T.gather(1, picked)


def let_experts_choose(model: GPT) -> GPT:
    """Make an `ExpertChoice` of each mixture of the model, with the weights it has; returns the model."""
    for block in model.blocks:
        if isinstance(block.ffn, Mixture):
            other = ExpertChoice(model.config, FeedForward).to(block.ffn.gate)
            other.load_state_dict(block.ffn.state_dict())
            block.ffn = other
    return model
