"""Which positions should a small cache keep? The newest, the first beside them, or those that were attended to most.

    uv run stages run 08 demos/heavy_hitters.py
    uv run stages run 08 demos/heavy_hitters.py --tokens 600 --slots 64         # a look, in half a minute

SmolLM2 reads one text with four caches. In each, every layer and head of keys evicts for itself. The last three keep
equally many positions:

    all              nothing is evicted
    window           the newest
    newest + first   the same, with the first few of the text instead of as many of the newest (attention sinks)
    H2O              half are the newest, half those that got the most attention so far (heavy hitters)

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (2023).

The text is read in pieces of `--chunk` tokens. A piece joins what is kept, looks, and then each cache goes back to
`--slots` less `--chunk` positions. So a cache never holds more than `--slots`, and a token sees between
slots - chunk + 1 positions (the first of its piece) and all slots (the last). With `--chunk 1` a token is read and
evicted from as it would be written. Keys keep the angle of their true position in all four.

- A column is the perplexity of the tokens between two positions.
- "first kept, %" is the share of layers and heads that still keep the first token of the text at its end.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

from demos.yarn import nats, perplexities, text_of
from extras.attention_variants import HeavyConfig, HeavyHitterCache, HeavyHitterGPT
from hf import DTYPES, load
from model import GPT


def evicting(model: GPT, budget: int, recent: int, first: int = 0) -> HeavyHitterGPT:
    """The same weights, not copied, in a model that keeps `budget` positions for each head.

    Raises BadInput for a budget that cannot be.
    """
    with torch.device("meta"):  # weights without memory: they are replaced at once
        other = HeavyHitterGPT(HeavyConfig(**asdict(model.config), budget=budget, recent=recent, first=first))
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def kinds(model: GPT, slots: int, chunk: int, sinks: int) -> dict[str, HeavyHitterGPT]:
    """What is compared at equal size, each with a name. Between two pieces all keep slots - chunk positions.

    Raises BadInput for sizes that leave no room for one of them.
    """
    budget = slots - chunk
    if not 1 <= chunk <= slots // 2 or not 1 <= sinks < budget:
        raise BadInput(f"--slots {slots} --chunk {chunk} --sinks {sinks}: a piece takes at most half of the slots, and "
                       f"the sinks leave room for others among the {budget} that are kept")
    return {
        "window": evicting(model, budget, budget),
        f"newest + {sinks} first": evicting(model, budget, budget - sinks, sinks),
        "H2O": evicting(model, budget, (budget + 1) // 2),
    }


def read(model: HeavyHitterGPT, ids: list[int], chunk: int, tick=lambda done: None):
    """What each token but the first costs, in nats [N - 1], and the share of heads that keep the first to the end."""
    cache = HeavyHitterCache(model)
    losses = nats(model, ids[:chunk + 1], chunk, cache)
    first = [keys[:, :, 0] for keys in cache.keys]  # of the first token: nothing was evicted yet
    rest = nats(model, ids[chunk:], chunk, cache, lambda done: tick(chunk + done))
    # What is kept stands in the order of the text, so the first token is in the first place or it is gone.
    kept = [(keys[:, :, 0] == own).all(-1) for keys, own in zip(cache.keys, first, strict=True)]  # [1, K] for each
    return torch.cat([losses, rest]), torch.stack(kept).float().mean().item()


def draw(curves: dict[int, dict[str, list[float]]], whole: list[float], step: int) -> Figure:
    """A panel for each number of slots: perplexity of `step` tokens at a time, divided by that with all kept.

    It ends at 3.5: the window is far above, and the differences between the others would not be seen.
    """
    fig = Figure(figsize=(4.8 * len(curves), 3.6), layout="constrained")
    for axes, (slots, found) in zip(fig.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, values in found.items():
            times = [value / base for value, base in zip(values, whole, strict=True)]
            axes.plot([(i + 0.5) * step for i in range(len(times))], times, label=name)
        axes.axhline(1, color="grey", lw=0.8)
        axes.set(title=f"{slots} positions", xlabel="position", ylim=(0.9, 3.5),
                 ylabel="perplexity / that with all kept")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, GGUF file, or name on the hub (default: smollm2)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="type of the weights")
    parser.add_argument("--slots", type=int, nargs="+", default=[256, 64], help="positions at most (default: 256 64)")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that stay, in the third row (default: 4)")
    parser.add_argument("--corpus", help="a corpus or a text file (default: shakespeare)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text (default: 2048)")
    parser.add_argument("--step", type=int, default=512, help="tokens of a column (default: 512)")
    parser.add_argument("--chunk", type=int, default=16, help="tokens in a pass (default: 16)")
    args = parser.parse_args(argv)
    if args.step < 1 or args.tokens <= max(args.slots) + 1:
        raise BadInput(f"--step {args.step} --tokens {args.tokens}: at least 1, and more tokens than there are slots")
    setup("cpu")
    opened = load(args.model, DTYPES[args.dtype])
    if args.tokens > opened.model.config.block_size:
        raise BadInput(f"--tokens {args.tokens}: at most {opened.model.config.block_size}, the length that this model "
                       "was trained on, since keys stay at their true distance")
    slots = list(dict.fromkeys(args.slots))
    todo = [(args.tokens, "all", evicting(opened.model, args.tokens, args.tokens))]
    todo += [(n, name, model) for n in slots for name, model in kinds(opened.model, n, args.chunk, args.sinks).items()]
    name, ids = text_of(args.corpus, opened.tokenizer, args.tokens)

    log = RunLog(__file__, "heavy_hitters", vars(args))
    rows, curves, fine = [], {}, max(args.tokens // 32, 1)  # tokens of a point in the figure
    with progress(len(todo) * (args.tokens - 1), "reading") as bar:
        for i, (most, kind, model) in enumerate(todo):
            losses, first = read(
                model, ids, args.chunk, lambda done, i=i, kind=kind, most=most: bar.update(
                    i * (args.tokens - 1) + done, text=f"{kind}, {most:,} positions"))
            rows.append({
                "positions": most, "kept": kind, "perplexity": losses.mean().exp().item(),
                **perplexities(losses, args.step), "first kept, %": 100 * first,
            })  # fmt: skip
            curves.setdefault(most, {})[kind] = [part.mean().exp().item() for part in losses.split(fine)]
            log.metrics(args.tokens, **rows[-1])
    [whole] = curves.pop(args.tokens).values()
    table(f"{args.model} reads {args.tokens:,} tokens of {name}, {args.chunk} at a time: perplexity", rows)
    say(f"figure: {log.figure(draw(curves, whole, fine), 'heavy_hitters')}")
    log.finish(corpus=name, rows=rows, curves=curves, whole=whole)


if __name__ == "__main__":
    run_program(main)
