"""Counting against nearness: on which characters does a table of counts know more, and on which the network?

    uv run stages run 03 && uv run stages run 03 demos/nearness.py

A table can only answer for a context that it has seen, and long contexts are hardly ever seen twice: the first table
counts that. The second asks, for every character of the validation text, how much of the context before it occurs
anywhere in the training text, and compares there what both models lose. The counts are those that set the bar: a
7-gram with modified Kneser-Ney smoothing (Chen & Goodman 1998).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from checkpoint import load
from data import load_data, windows

LONGEST = 8  # characters of context that are looked for in the training text
COUNTED = 6  # characters of context that are counted: the best n-gram of this text is the 7-gram
FEWEST = 0.1  # share of the validation text that the case of the least known contexts holds at least


def codes(tokens, base: int):
    """Rows of tokens [N, k] as integers [N]: [1, 2, 3] in base 10 -> 123. base ** k must fit into 63 bits."""
    code = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.unbind(1):
        code = code * base + column
    return code


def look_up(keys, values, queries):
    """values[i] where the sorted keys[i] == query, 0 where there is none: [K], [K], [N] -> [N]."""
    i = torch.searchsorted(keys, queries).clamp(max=len(keys) - 1)
    return torch.where(keys[i] == queries, values[i], 0)


def discounts(counts):
    """What to take from an n-gram seen 0, 1, 2, 3 or more times -> [4]; where the text is too small 0.5, 1, 1.5."""
    n = [(counts == i).sum().item() for i in range(5)]
    if 0 in n[1:]:
        return torch.tensor([0, 0.5, 1, 1.5], dtype=torch.double)
    y = n[1] / (n[1] + 2 * n[2])
    taken = [max(i - (i + 1) * y * n[i + 1] / n[i], 0) for i in (1, 2, 3)]
    return torch.tensor([0, *taken], dtype=torch.double)


def kneser_ney(x, y, val_x, val_y, V: int):
    """P(y | x) of validation examples val_x [M, k], val_y [M], counted on x [N, k], y [N] -> [M], float64.

    P = (count - D) / total + freed / total * P of the shorter context, from the longest down to none. All but the
    longest count in how many different longer contexts they occur.
    """
    asked = codes(val_x, V) * V + val_y
    grams, counts = (codes(x, V) * V + y).unique(return_counts=True)
    levels = []
    for k in range(x.shape[1], -1, -1):
        taken = discounts(counts)[counts.clamp(max=3)]
        contexts, where = (grams // V).unique(return_inverse=True)
        zeros = torch.zeros(len(contexts), dtype=torch.double)
        context, gram = asked % V ** (k + 1) // V, asked % V ** (k + 1)
        levels.append((
            look_up(contexts, zeros.index_add(0, where, counts.double()), context),  # total
            look_up(grams, counts - taken, gram),  # kept
            look_up(contexts, zeros.index_add(0, where, taken), context),  # freed
        ))
        grams, counts = (grams % V**k).unique(return_counts=True)
    p = torch.full((len(val_y),), 1 / V, dtype=torch.double)
    for total, kept, freed in reversed(levels):
        p = torch.where(total > 0, (kept + freed * p) / total.clamp(min=1), p)
    return p


def familiarity(x, val_x, V: int):
    """How many of a context's last characters occur together as (the end of) a context of the training text.

    x [N, T], val_x [M, T] -> that number for each validation context [M], 0 .. T, and the number of different contexts
    of each length 0 .. T in the training text.
    """
    known, distinct = torch.zeros(len(val_x), dtype=torch.long), []
    for k in range(x.shape[1] + 1):
        contexts = codes(x[:, x.shape[1] - k:], V).unique()
        known[torch.isin(codes(val_x[:, x.shape[1] - k:], V), contexts)] = k
        distinct.append(len(contexts))
    return known, distinct


@torch.no_grad()
def network(model, x, y):
    """P(y | x) of each example, as the model sees it: x [M, T], y [M] -> [M], float64."""
    x = x[:, x.shape[1] - model.config.block_size:]
    rows = [F.softmax(model(a).double(), dim=-1).gather(1, b[:, None])[:, 0]
            for a, b in zip(x.split(2**13), y.split(2**13), strict=True)]
    return torch.cat(rows)


def cases(known) -> dict[str, torch.Tensor]:
    """A mask for each number of known characters; a mean over a hundredth of the text says little, so the small
    numbers are one case: known [M], 0 .. LONGEST -> {"up to 4": [M], "5": [M], ...}."""
    few = next(k for k in range(LONGEST + 1) if (known <= k).double().mean() >= FEWEST)
    masks = {f"up to {few}": known <= few}
    for k in range(few + 1, LONGEST + 1):
        masks[f"{k} or more" if k == LONGEST else str(k)] = known == k
    return {name: mask for name, mask in masks.items() if mask.any()}


def draw(rows: list[dict]) -> Figure:
    """Both losses, and how often each case occurs."""
    fig = Figure(figsize=(8, 4), layout="constrained")
    axes = fig.subplots()
    known = [row["known"] for row in rows]
    share = axes.twinx()
    share.bar(known, [100 * row["share"] for row in rows], color="lightgray", width=0.6)
    share.set(ylabel="% of the validation text (bars)", ylim=(0, 100))
    axes.plot(known, [row["counts"] for row in rows], "s-", label="counts, 7-gram")
    axes.plot(known, [row["network"] for row in rows], "o-", label="network")
    axes.set(xlabel="last characters that occur together in the training text", ylabel="loss, nats/char")
    axes.set_zorder(share.get_zorder() + 1)
    axes.patch.set_visible(False)  # or it would hide the bars behind it
    axes.legend()
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="the text that the run was trained on (default: shakespeare)")
    parser.add_argument("--run", default="default", help="the trained run, a folder under out/ (default: default)")
    args = parser.parse_args(argv)
    setup("cpu")
    model, tokenizer = load(run_folder(__file__, args.run) / "model.pt")
    data = load_data(args.corpus)
    if data.tokenizer.chars != tokenizer.chars:
        raise BadInput(f"the run {args.run} was trained on another text than {data.name}: name it with --corpus")
    V, span = len(tokenizer), max(LONGEST, model.config.block_size)
    if V**LONGEST >= 2**63:  # `codes` would overflow
        most = int(2 ** (63 / LONGEST))
        raise BadInput(f"{data.name} has {V} different characters, and this demo counts in 64 bits: {most} at the most")
    log = RunLog(__file__, "nearness", {**vars(args), "corpus": data.name})

    (x, y), (val_x, val_y) = (windows(part, span) for part in (data.train, data.val))
    p_counts = kneser_ney(x[:, span - COUNTED:], y, val_x[:, span - COUNTED:], val_y, V)
    known, distinct = familiarity(x[:, span - LONGEST:], val_x[:, span - LONGEST:], V)
    p_network = network(model, val_x, val_y)
    seen = [(known >= k).double().mean().item() for k in range(LONGEST + 1)]
    table(f"{data.name}: contexts", [
        {"length": k, "possible": f"{V**k:.1e}", "in the training text": distinct[k],
         "known in validation": f"{seen[k]:.1%}"}
        for k in range(1, LONGEST + 1)
    ])

    p_both = (p_counts + p_network) / 2
    losses = {"counts": -p_counts.log(), "network": -p_network.log(), "mean of both": -p_both.log()}
    rows = [
        {"known": case, "share": mask.double().mean().item(),
         **{name: loss[mask].mean().item() for name, loss in losses.items()}}
        for case, mask in cases(known).items()
    ]
    overall = {name: loss.mean().item() for name, loss in losses.items()}
    table("nats per character, by how much of the context occurs in the training text", [
        *rows, {"known": "all", "share": 1.0, **overall},
    ])
    say("mean of both: the average of the two probabilities. Where it beats both, they know different things.")
    file = log.figure(draw(rows), "nearness")
    log.finish(**overall, rows=rows)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
