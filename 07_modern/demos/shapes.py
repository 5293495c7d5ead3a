"""Width, depth, heads and feed-forward: where a fixed number of parameters is best spent.

    uv run stages run 07 demos/shapes.py
    uv run stages run 07 demos/shapes.py --steps 1500 --n-embd 128 --block-size 128

The first row is the model of the flags. Each other row changes one thing and gives the parameters that this frees, or
costs, to another: more blocks are narrower blocks; a wider feed-forward is in narrower blocks; more heads are smaller
heads. All have the same number of parameters within half a per cent and read the same tokens. The time is not the same:
blocks run one after the other, so that a deep model takes longer than a wide one. "ms" is the median time of a training
step, with the shapes taking turns. Published shapes: `extras/anatomy.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch
from matplotlib.figure import Figure

from demos import ablation
from demos.ablation import Scale
from model import GPT, ModelConfig

RATIO = 8 / 3  # units of the feed-forward for each channel, in the model of the flags
DEPTHS = (1, 2, 8)
RATIOS = (1, 6)
HEADS = (1, 4, 8)


def count(config: ModelConfig) -> int:
    """The parameters of a model of this shape, with tied embedding and QK-norm: worked out, not made and counted."""
    C, heads, shared = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    attention = 2 * C * heads + 2 * C * shared + 2 * config.head_dim  # query and proj, key and value, their two norms
    block = attention + 3 * C * config.n_hidden + 2 * C  # the feed-forward, and the norms of the two branches
    return config.vocab_size * C + config.n_layer * block + C


def fill(scale: Scale, vocab_size: int, budget: int, n_layer: int, ratio: float) -> ModelConfig:
    """A shape of `budget` parameters, `n_layer` blocks and about `ratio` units for each channel.

    The width is the one that comes nearest. Units then make up for the rest: one unit more or less in every block is
    the smallest step there is. Raises BadInput when the budget is too small for so many blocks.
    """
    step = 2 * scale.n_head  # each head has an even number of channels
    made = None
    for n_embd in range(step, 64 * scale.n_embd, step):
        config = ablation.shape(scale, vocab_size, n_embd=n_embd, n_layer=n_layer, n_hidden=1)
        free = budget - count(config)
        n_hidden = 1 + round(free / (3 * n_embd * n_layer))
        if n_hidden < 1:
            break
        config.n_hidden = n_hidden
        if made is None or abs(n_hidden / n_embd - ratio) < abs(made.n_hidden / made.n_embd - ratio):
            made = config
    if made is None:
        raise BadInput(f"{budget:,} parameters are too few for {n_layer} blocks: use a larger --n-embd")
    return made


def shapes(scale: Scale, vocab_size: int) -> dict[str, ModelConfig]:
    """The shapes to compare, all with the parameters of the first."""
    base = ablation.shape(scale, vocab_size)
    budget = count(base)
    found = {"base": base}
    for n_layer in DEPTHS:
        if n_layer != scale.n_layer:
            found[f"blocks: {n_layer}"] = fill(scale, vocab_size, budget, n_layer, RATIO)
    for ratio in RATIOS:
        found[f"feed-forward: {ratio} C"] = fill(scale, vocab_size, budget, scale.n_layer, ratio)
    for n_head in HEADS:
        if n_head != scale.n_head and scale.n_embd % (2 * n_head) == 0:  # the others have no even number of channels
            found[f"heads: {n_head}"] = ablation.shape(scale, vocab_size, n_head=n_head, n_kv_head=n_head)
    return found


def main(argv: list[str] | None = None) -> None:
    flags = ablation.parser(__doc__)
    flags.add_argument("--rounds", type=int, default=20, help="steps timed of each shape (default: 20)")
    args = flags.parse_args(argv)
    if args.rounds < 1:
        raise BadInput(f"--rounds {args.rounds}: at least 1")
    setup("cpu")
    scale, data, log = ablation.start(__file__, "shapes", args)
    configs = shapes(scale, len(data.tokenizer))

    def job(config, seed):
        def run(tick):
            torch.manual_seed(seed)
            return ablation.fit_text(GPT(config), data, ablation.recipe(scale, seed), tick)

        return run

    jobs = {(name, seed): job(config, seed) for name, config in configs.items() for seed in range(scale.seeds)}
    losses = ablation.by_variant(ablation.run_all(log, jobs, scale.steps, data))
    times = ablation.step_times({name: GPT(config) for name, config in configs.items()}, scale, args.rounds)
    rows = ablation.compare(losses, "base", "shape")
    for row in rows:
        config = configs[row["shape"]]
        row |= {"blocks": config.n_layer, "channels": config.n_embd, "heads": config.n_head, "units": config.n_hidden,
                "parameters": count(config), "ms": times[row["shape"]]}
    ablation.show(ablation.title(data, scale), rows)
    fig = Figure(figsize=(6, 3.6), layout="constrained")
    ablation.dots(fig.subplots(), losses, "validation loss, nats per character")
    ablation.done(log, fig, "shapes", rows)


if __name__ == "__main__":
    run_program(main)
