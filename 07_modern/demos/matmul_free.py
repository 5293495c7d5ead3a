"""A model without matrix products: ternary layers and an element-wise recurrence, against attention and dense layers.

    uv run stages run 07 demos/matmul_free.py
    uv run stages run 07 demos/matmul_free.py --steps 1500 --n-embd 128 --block-size 128

Zhu et al., "Scalable MatMul-free Language Modeling" (arXiv 2406.02528, 2024), make two replacements. Here each is made
alone and both together, all at the same number of parameters.

Ternary layers. A weight of a linear layer is -s, 0 or s, with one scale s for the matrix (Ma et al., "The Era of 1-bit
LLMs", 2024): a product with such a matrix is additions, subtractions and one multiplication at the end. What is trained
is an ordinary matrix, which is rounded in each forward pass. Rounding has no slope, so that the backward pass leaves it
out: the straight-through gradient (Bengio et al., 2013). The layer's input is normed and rounded to 8 bits.

The recurrence (MLGRU) in the place of attention. Each channel keeps a running mean of its own, whose speed the token
decides (section 3.3.1; * is element by element, each W a linear layer):

    f_t = sigmoid(W_f x_t)             c_t = silu(W_c x_t)             g_t = sigmoid(W_g x_t)
    h_t = f_t * h_{t-1} + (1 - f_t) * c_t                              o_t = W_o (g_t * h_t)

No position is compared with another, so that the past costs the same however long it is. It is also all that is left of
it: C numbers. The paper gives ternary models a much larger learning rate than dense ones. So every variant is trained
at several rates of Muon, and the table shows each one's best and which that was. Where it is the largest of the list,
a still larger one may be better.

On this machine nothing of it is faster: torch has no ternary kernel, and the trained matrix is rounded again in each
step. The gain is in memory and in hardware that is built for additions.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from demos import ablation
from demos.ablation import Scale, join
from model import GPT, ModelConfig, RMSNorm, variance_scaling_

VARIANTS = {  # mixer of positions, linear layers
    "attention, dense": (False, False),
    "recurrence, dense": (True, False),
    "attention, ternary": (False, True),
    "recurrence, ternary": (True, True),
}


def straight_through(x, rounded):
    """`rounded` in the forward pass, and in the backward pass as if x had not been rounded."""
    return x + (rounded - x).detach()


def ternary(weight):
    """The weight with each entry at the nearest of -s, 0 and s, where s is the mean of the entries' sizes."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return (weight / scale).round().clamp(-1, 1) * scale


def eight_bits(x):
    """Each position's vector in 255 steps from minus its largest entry to plus it: [..., C] -> [..., C]."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
    return (x / scale).round() * scale


class TernaryLinear(nn.Linear):
    """A linear layer of ternary weights on inputs of 8 bits; the weights of `layer` are what is trained."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.norm = RMSNorm(layer.in_features)

    def forward(self, x):
        x = self.norm(x)
        return F.linear(straight_through(x, eight_bits(x)), straight_through(self.weight, ternary(self.weight)))


def running_mean(f, c):
    """h_t = f_t h_{t-1} + (1 - f_t) c_t with h_{-1} = 0, for all t at once: [B, T, C] x 2 -> [B, T, C].

    Two steps of such a recurrence are one step of the same kind: h_t = (f_t f_{t-1}) h_{t-2} + what the two bring. So
    steps of 1, 2, 4, ... positions reach back to the beginning in log2(T) rounds, instead of T steps in a loop.
    """
    keep, bring = f.float(), ((1 - f.float()) * c.float())
    reach, T = 1, f.shape[1]
    while reach < T:
        # What is pushed in from the left is before the beginning: it brings nothing and keeps nothing.
        bring = bring + keep * F.pad(bring, (0, 0, reach, 0))[:, :T]
        keep = keep * F.pad(keep, (0, 0, reach, 0))[:, :T]
        reach *= 2
    return bring.type_as(c)


class Recurrence(nn.Module):
    """A gated running mean of the past, channel by channel: [B, T, C] -> [B, T, C].

    Four matrices [C, C], as attention has with a key-value head for each head.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C = config.n_embd
        self.forget, self.candidate, self.gate, self.proj = (nn.Linear(C, C, bias=False) for _ in range(4))
        for layer in (self.forget, self.candidate, self.gate, self.proj):
            variance_scaling_(layer)

    def forward(self, x, rope=None):
        f, c = torch.sigmoid(self.forget(x)), F.silu(self.candidate(x))
        return self.proj(torch.sigmoid(self.gate(x)) * running_mean(f, c))


def make_ternary(module: nn.Module):
    """Put a `TernaryLinear` in the place of every linear layer inside."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, TernaryLinear(layer))


def build(variant: str, scale: Scale, vocab_size: int, seed: int) -> GPT:
    """A model of this kind. Embedding and head stay dense in all of them, as in the paper."""
    recurrent, rounded = VARIANTS[variant]
    torch.manual_seed(seed)
    model = GPT(ablation.shape(scale, vocab_size))
    for block in model.blocks:
        if recurrent:
            block.attn = join(model, Recurrence(model.config))
        if rounded:
            make_ternary(block)
    return model


def main(argv: list[str] | None = None) -> None:
    flags = ablation.parser(__doc__)
    flags.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.06, 0.12],
                       help="rates of Muon (default: 0.02 0.06 0.12)")
    flags.add_argument("--rounds", type=int, default=20, help="steps timed of each kind (default: 20)")
    args = flags.parse_args(argv)
    if args.rounds < 1 or not min(args.rates) > 0:
        raise BadInput(f"--rounds {args.rounds} --rates {args.rates}: at least 1 round, and rates above 0")
    setup("cpu")
    scale, data, log = ablation.start(__file__, "matmul_free", args)

    def job(variant, rate, seed):
        return lambda tick: ablation.fit_text(
            build(variant, scale, len(data.tokenizer), seed), data, ablation.recipe(scale, seed, muon_lr=rate), tick)

    jobs = {(variant, rate, seed): job(variant, rate, seed)
            for variant in VARIANTS for rate in args.rates for seed in range(scale.seeds)}
    results = ablation.run_all(log, jobs, scale.steps, data)
    best, losses = {}, {}
    for variant in VARIANTS:
        tried = {rate: [results[variant, rate, seed]["val loss"] for seed in range(scale.seeds)] for rate in args.rates}
        best[variant] = min(tried, key=lambda rate: mean(tried[rate]))
        losses[variant] = tried[best[variant]]
    models = {name: build(name, scale, len(data.tokenizer), 0) for name in VARIANTS}
    times = ablation.step_times(models, scale, args.rounds)
    rows = ablation.compare(losses, "attention, dense", "mixer, layers")
    for row in rows:
        name = row["mixer, layers"]
        row |= {"rate": best[name], "parameters": results[name, best[name], 0]["params"], "ms": times[name]}
    ablation.show(ablation.title(data, scale), rows)
    fig = Figure(figsize=(6.4, 2.8), layout="constrained")
    ablation.dots(fig.subplots(), losses, "validation loss, nats per character")
    ablation.done(log, fig, "matmul_free", rows)


if __name__ == "__main__":
    run_program(main)
