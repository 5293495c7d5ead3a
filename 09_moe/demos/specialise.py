"""What experts specialise in: which characters go to which expert, and how much of it any router would show.

    uv run stages run 09                            # trains the run "default"
    uv run stages run 09 demos/specialise.py
    uv run stages run 09 train.py --steps 300 --name quick
    uv run stages run 09 demos/specialise.py --name quick

The model reads validation text, and its routers' choices are counted. `experts.png` has a row of cells for each expert
and a panel for each mixture: how often characters of a kind go to the expert, as a multiple of how often characters do
on the whole. 2 is twice as often, 1 says nothing. Beside it stand the characters that prefer the expert most.

It looks like a plan, but a part of it is no merit of the training. A router is a matrix, and equal characters have
similar vectors, so a router of random numbers sends them to the same expert as well. The table says for each layer how
much a character tells about its expert: the mutual information of both, as a share of the entropy of the choice. 0 is
nothing; 1 means that the expert is known once the character is.

- "read" is the character that the position has just read, "next" the one that it has to predict.
- "random router": the same vectors, but the router's weights are drawn anew, `--draws` times; the mean.
- "shuffled": the choices of the trained router, dealt out to other positions. There is nothing to find then; what is
  found all the same is what counting a limited text gives.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import checkpoint
from data import load_data, windows
from moe import Mixture
from sample import evaluation

KINDS = ("vowel", "consonant", "capital", "space", "line end", "mark", "other")


def kind(text: str) -> str:
    """The kind of a token, by its first character that is no space: one of KINDS."""
    if not text.strip():
        return "line end" if "\n" in text else "space"
    c = text.strip()[0]
    if c.isupper():
        return "capital"
    if c.isalpha():
        return "vowel" if c in "aeiou" else "consonant"
    return "mark" if c.isprintable() and not c.isalnum() else "other"


def choices(layer: Mixture, x, router=None):
    """The experts that each position [N, C] chooses, with the layer's router or with another's weights: [N, k].

    Another router has no biases that balance it: those of the layer were learned for its own scores.
    """
    weight = layer.router.weight if router is None else router
    scores = F.linear(x, weight)
    if router is None:
        scores = (scores.softmax(-1) if layer.config.router == "softmax" else scores.sigmoid()) + layer.bias
    return scores.topk(layer.config.n_active).indices


@torch.no_grad()
def watch(model, data, draws: int, rows: int = 32):
    """Let the model read the windows of `data` [N] and note what the routers choose, and what random ones would.

    -> read [n], next [n], and for each mixture in order (number of the layer, chosen [n, k], [chosen of each draw]).
    """
    layers = [(i, block.ffn) for i, block in enumerate(model.blocks, 1) if isinstance(block.ffn, Mixture)]
    generator = torch.Generator().manual_seed(0)
    routers = [torch.randn(draws, *layer.router.weight.shape, generator=generator) for _, layer in layers]
    found = [[[] for _ in range(draws + 1)] for _ in layers]

    def listen(place):
        def hook(layer, args):
            x = args[0].flatten(0, -2)  # [N, C]
            for kept, router in zip(found[place], [None, *routers[place]], strict=True):
                kept.append(choices(layer, x, router))

        return hook

    hooks = [layer.register_forward_pre_hook(listen(place)) for place, (_, layer) in enumerate(layers)]
    x, y = (part.long() for part in windows(data, model.config.block_size))
    try:
        with evaluation(model), progress(len(x), "reading") as bar:
            for done, part in enumerate(x.split(rows)):
                model(part)
                bar.update(done * rows + len(part))
    finally:
        for hook in hooks:
            hook.remove()
    whole = [[torch.cat(parts) for parts in kept] for kept in found]
    return x.flatten(), y.flatten(), [(i, own, drawn) for (i, _), (own, *drawn) in zip(layers, whole, strict=True)]


def joint(tokens, chosen, n_token: int, n_expert: int):
    """How often each token [n] went to each expert [n, k]: counts [n_token, n_expert]."""
    pairs = tokens[:, None] * n_expert + chosen
    return torch.bincount(pairs.flatten(), minlength=n_token * n_expert).view(n_token, n_expert)


def told(counts) -> float:
    """The share of the entropy of the expert that knowing the token removes, I(token; expert) / H(expert).

    counts [V, E]. 0 where token and expert are independent, 1 where each token has an expert of its own:
    [[5, 0], [0, 5]] -> 1, [[2, 2], [3, 3]] -> 0.
    """
    p = counts.double() / counts.sum()

    def entropy(q):
        return -torch.special.xlogy(q, q).sum()

    of_expert = entropy(p.sum(0))
    shared = of_expert + entropy(p.sum(1)) - entropy(p)
    return (shared / of_expert).item() if of_expert > 0 else 0.0


def lift(counts):
    """How often a token goes to each expert, as a multiple of how often tokens do: counts [V, E] -> [V, E].

    A token that does not occur has 1.
    """
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)  # P(expert | token)
    ratio = share / (counts.sum(0) / counts.sum()).clamp(min=1e-12)
    return ratio.where(counts.sum(1, keepdim=True) > 0, torch.ones(()))


def visible(text: str) -> str:
    """A token as a label: spaces and line ends are seen, and what the figure's font lacks is a box."""
    text = text.replace(" ", "␣").replace("\n", "¶")
    return "".join(c if c in "␣¶" or (c.isprintable() and ord(c) < 0x250) else "□" for c in text)


def favourites(counts, labels: list[str], n: int = 6, least: float = 0.002) -> list[str]:
    """For each expert the tokens that prefer it most, of those that are at least this share of the text."""
    ratio = lift(counts)
    ratio[counts.sum(1) < least * counts.sum()] = 0
    best = ratio.topk(min(n, len(labels)), dim=0)  # [n, E]
    return [" ".join(labels[t] for t, times in zip(*column, strict=True) if times > 1)
            for column in zip(best.indices.T.tolist(), best.values.T.tolist(), strict=True)]


def draw(panels: dict[int, tuple], kinds: list[str]) -> Figure:
    """A heat map for each mixture, panels {layer: (lift [kinds, E], favourites [E])}."""
    fig = Figure(figsize=(4.6 * len(panels), 1.6 + 0.3 * len(next(iter(panels.values()))[1])), layout="constrained")
    for axes, (layer, (ratio, names)) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(),
                                             strict=True):
        image = axes.imshow(ratio.clamp(0.25, 4).log2().T.tolist(), cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
        axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), [f"{e}: {name}" for e, name in enumerate(names)], fontsize=7,
                        parse_math=False)
        axes.set_title(f"layer {layer}", fontsize=9)
    bar = fig.colorbar(image, ax=fig.axes, shrink=0.8)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="default", help="a run of train.py (default: default)")
    parser.add_argument("--corpus", help="a corpus or a text file (default: the one that the run was trained on)")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens that are read, at most (default: 50000)")
    parser.add_argument("--draws", type=int, default=5, help="random routers for each layer (default: 5)")
    args = parser.parse_args(argv)
    if args.tokens < 1 or args.draws < 1:
        raise BadInput(f"--tokens {args.tokens} --draws {args.draws}: both must be at least 1")
    setup("cpu")
    model, tokenizer, state = checkpoint.load(run_folder(__file__, args.name) / "model.pt")
    if not any(isinstance(layer, Mixture) for layer in model.modules()):
        raise BadInput(f"the run {args.name} is dense, it has no experts: train one with --n-expert 8")
    data = load_data(args.corpus or state["args"].get("corpus"), tokenizer=tokenizer)
    log = RunLog(__file__, "specialise", vars(args) | {"corpus": data.name})
    read, after, layers = watch(model, data.val[:args.tokens + 1], args.draws)

    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    labels, of_kind = [visible(text) for text in texts], torch.tensor([KINDS.index(kind(text)) for text in texts])
    present = [i for i in range(len(KINDS)) if (of_kind[read] == i).any()]
    E, shuffle, rows, panels = model.config.n_expert, torch.Generator().manual_seed(1), [], {}
    for layer, own, drawn in layers:
        mixed = own[torch.randperm(len(own), generator=shuffle)]
        row = {"layer": layer}
        for name, tokens in (("read", read), ("next", after)):
            shares = [told(joint(tokens, chosen, len(texts), E)) for chosen in (own, *drawn, mixed)]
            row |= {name: shares[0], f"{name}, random router": sum(shares[1:-1]) / args.draws,
                    f"{name}, shuffled": shares[-1]}
        counts = joint(read, own, len(texts), E)
        by_kind = torch.zeros(len(KINDS), E, dtype=counts.dtype).index_add(0, of_kind, counts)
        panels[layer] = lift(by_kind)[present], favourites(counts, labels)
        rows.append(row)
    table(f"{args.name} reads {len(read):,} tokens of {data.name}: how much a token tells about its expert", rows)
    for layer, (_, names) in panels.items():
        say(f"layer {layer}: " + " | ".join(f"{e}: {name}" for e, name in enumerate(names)))
    say(f"figure: {log.figure(draw(panels, [KINDS[i] for i in present]), 'experts')}")
    log.finish(corpus=data.name, rows=rows, favourites={layer: names for layer, (_, names) in panels.items()})


if __name__ == "__main__":
    run_program(main)
