"""Counting against nearness: on which characters does a table of counts know more, and on which the network?

    uv run stages run 03 && uv run stages run 03 demos/nearness.py

A table can only answer for a context that it has seen, and long contexts are hardly ever seen twice: the first table
counts that. The second asks, for every character of the validation text, how much of the context before it occurs
anywhere in the training text, and compares there what both models lose. The counts are interpolated over all lengths
of context, each length weighted as in Witten & Bell (1991): the more different characters followed a context, the
less it is trusted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

import torch
import torch.nn.functional as F
from data import load_data, windows
from matplotlib.figure import Figure
from sample import load
from shared import options
from shared.console import say, table
from shared.device import setup
from shared.errors import BadInput, cli
from shared.runlog import RunLog, run_folder

LONGEST = 8  # characters of context that are counted: 65 to the power of 9 still fits into 64 bits


def codes(tokens, base: int):
    """Rows of tokens [N, k] as integers [N]: [1, 2, 3] in base 10 -> 123."""
    code = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.unbind(1):
        code = code * base + column
    return code


def look_up(keys, values, queries):
    """values[i] where the sorted keys[i] == query, 0 where there is none: [K], [K], [N] -> [N]."""
    i = torch.searchsorted(keys, queries).clamp(max=len(keys) - 1)
    return torch.where(keys[i] == queries, values[i], 0)


def counting(x, y, val_x, val_y, V: int):
    """Count on x [N, T], y [N]; ask about val_x [M, T], val_y [M].

    -> P(y | x) of each validation example [M], how many of its last characters occur together before some character of
    the training text [M], and for each length 0 .. T how many different contexts that text has.
    """
    p = torch.full((len(val_y),), 1 / V, dtype=torch.double)  # with nothing counted, every character alike
    known, distinct = torch.zeros(len(val_y), dtype=torch.long), []
    for k in range(x.shape[1] + 1):
        context, asked = codes(x[:, x.shape[1] - k:], V), codes(val_x[:, x.shape[1] - k:], V)
        contexts, totals = context.unique(return_counts=True)
        grams, counts = (context * V + y).unique(return_counts=True)
        kinds = (grams // V).unique(return_counts=True)[1]  # different characters that followed each context
        total, kind = look_up(contexts, totals, asked), look_up(contexts, kinds, asked)
        count = look_up(grams, counts, asked * V + val_y)
        p = torch.where(total > 0, (count + kind * p) / (total + kind).clamp(min=1), p)
        known[total > 0] = k
        distinct.append(len(contexts))
    return p, known, distinct


@torch.no_grad()
def network(model, x, y):
    """P(y | x) of each example, as the model sees it: x [M, T], y [M] -> [M], float64."""
    x = x[:, x.shape[1] - model.config.block_size:]
    rows = [F.softmax(model(a).double(), dim=-1).gather(1, b[:, None])[:, 0]
            for a, b in zip(x.split(2**13), y.split(2**13), strict=True)]
    return torch.cat(rows)


def draw(rows: list[dict]) -> Figure:
    """Both losses, and how often each case occurs."""
    fig = Figure(figsize=(6.4, 4), layout="constrained")
    axes = fig.subplots()
    known = [row["known"] for row in rows]
    share = axes.twinx()
    share.bar(known, [100 * row["share"] for row in rows], color="lightgray", width=0.6)
    share.set(ylabel="% of the validation text (bars)", ylim=(0, 100))
    axes.plot(known, [row["counts"] for row in rows], "s-", label="counts")
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
    model, vocab = load(run_folder(__file__, args.run) / "model.pt")
    data = load_data(args.corpus)
    if data.vocab.chars != vocab.chars:
        raise BadInput(f"the run {args.run} was trained on another text than {data.name}: name it with --corpus")
    log = RunLog(__file__, "nearness", {**vars(args), "corpus": data.name})

    V, span = len(vocab), max(LONGEST, model.config.block_size)
    (x, y), (val_x, val_y) = (windows(part, span) for part in (data.train, data.val))
    p_counts, known, distinct = counting(x[:, span - LONGEST:], y, val_x[:, span - LONGEST:], val_y, V)
    p_network = network(model, val_x, val_y)
    seen = [(known >= k).double().mean().item() for k in range(LONGEST + 1)]
    table(f"{data.name}: contexts", [
        {"length": k, "possible": f"{V**k:.1e}", "in the training text": distinct[k], "known in validation": f"{seen[k]:.1%}"}
        for k in range(1, LONGEST + 1)
    ])

    losses = {"counts": -p_counts.log(), "network": -p_network.log(), "mean of both": -((p_counts + p_network) / 2).log()}
    rows = [
        {"known": k, "share": (known == k).double().mean().item(),
         **{name: loss[known == k].mean().item() for name, loss in losses.items()}}
        for k in known.unique().tolist()
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
    cli(main)
