"""A real model reads further than it was trained for: with the angles it has, with YaRN, and with all of them slower.

    uv run stages run 08 demos/yarn.py
    uv run stages run 08 demos/yarn.py --tokens 14000 --lengths                 # perplexity only
    uv run stages run 08 demos/yarn.py --tokens 600 --lengths 300 --depths 0.5  # a look, in a minute

The default is SmolLM2-135M-Instruct, trained on texts of up to 8,192 tokens; extras/yarn.py has what is done to it.

- Perplexity: one text is read from its first token to its last. Each column is the perplexity of the tokens between two
  positions, which are predicted from all before. It should fall along the text, since more of it is known.
- Passkey: five digits stand at a depth between 0 (first) and 1 (last) of a text that says the same over and over, and
  the question comes at its end. A row tells for each length how many of the texts were answered, the likeliest token
  taken each time, with all five digits right. The text without its filler is easy, so what fails is to find the place.
  Mohtashami & Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers" (2023).
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from cache import Cache
from data import split
from extras.yarn import KINDS, stretch
from hf import DTYPES, load
from sample import evaluation

FILLER = (
    "The rain falls on the roof. The cat sleeps behind the door. The clock on the wall is slow. "
    "Nobody comes along the road, and nothing happens. "
)
SECRET, QUESTION = "The pass key is {0}. Remember it: {0} is the pass key. ", "What is the pass key? The pass key is"


def text_of(name: str | None, tokenizer, count: int) -> tuple[str, list[int]]:
    """A corpus' name and the first `count` tokens of its validation text. Raises BadInput where there are fewer."""
    found = corpus.load(name)
    ids = tokenizer.encode(split(found.text)[1][:20 * count])[:count]  # few tokens are longer than 20 characters
    if len(ids) < count:
        raise BadInput(f"the validation text of {found.name} has {len(ids)} tokens, not {count}: ask for fewer")
    return found.name, ids


@torch.no_grad()
def read(model, ids: list[int], chunk: int, cache=None, last: int | None = None):
    """Read a text through a cache, `chunk` tokens in a pass: yields where each pass begins, and its scores [T, V].

    Only `chunk` rows of scores are there at a time: those of 14,000 tokens would take 2.7 GB.
    """
    cache = Cache(model, most=chunk) if cache is None else cache
    for start in range(0, len(ids), chunk):
        with evaluation(model):
            scores = model(torch.tensor([ids[start:start + chunk]]), cache, last=last)
        yield start, scores[0]


def nats(model, ids: list[int], chunk: int, cache=None, tick=lambda done: None):
    """What each token but the first costs, given all before it that the model can see, in nats: [N - 1]."""
    losses = []
    for start, scores in read(model, ids[:-1], chunk, cache):
        following = torch.tensor(ids[start + 1:start + 1 + len(scores)])
        losses.append(F.cross_entropy(scores.float(), following, reduction="none"))
        tick(start + len(scores))
    return torch.cat(losses)


def perplexities(losses, step: int) -> dict[str, float]:
    """Perplexity by stretches of `step` tokens: {"to 2,000": of the tokens before 2,000, "to 4,000": ...}."""
    parts = losses.split(step)
    return {f"to {i * step + len(part):,}": part.mean().exp().item() for i, part in enumerate(parts)}


def hide(tokenizer, length: int, depth: float, key: str) -> list[int]:
    """A text of nearly `length` tokens with the key at `depth` (0: first, 1: last) and the question at its end.

    Raises BadInput for a length that leaves no room for filler.
    """
    secret, question, filler = (tokenizer.encode(text) for text in (SECRET.format(key), QUESTION, FILLER))
    times = (length - len(secret) - len(question)) // len(filler)
    if times < 1:
        raise BadInput(f"--lengths {length}: a text with a key has {len(secret + question + filler)} tokens at least")
    before = round(depth * times)
    return before * filler + secret + (times - before) * filler + question


def answer(model, ids: list[int], length: int, chunk: int, tick=lambda done: None) -> list[int]:
    """The `length` likeliest tokens after a text, one after the other."""
    cache, written = Cache(model, most=chunk), []
    while len(written) < length:
        for start, scores in read(model, written[-1:] or ids, chunk, cache, last=1):
            likeliest = int(scores[-1].argmax())
            if not written:
                tick(min(start + chunk, len(ids)))
        written.append(likeliest)
    return written


def passkeys(model, tokenizer, length: int, depths: list[float], chunk: int, tick) -> dict[float, bool]:
    """Whether the key was found at each depth. It is another one each time, the same for all models."""
    found = {}
    for i, depth in enumerate(depths):
        key = f"{random.Random(f'{length} {depth}').randrange(10_000, 100_000)}"
        ids, digits = hide(tokenizer, length, depth, key), tokenizer.encode(f" {key}")
        written = answer(model, ids, len(digits), chunk, lambda done, i=i: tick(i * length + done))
        found[depth] = tokenizer.decode(written).strip() == key
    return found


def draw(curves: dict[str, list[float]], step: int, most: int) -> Figure:
    """Perplexity, of `step` tokens at a time, against the position, on a logarithmic axis."""
    fig = Figure(figsize=(6.8, 3.8), layout="constrained")
    axes = fig.subplots()
    for name, losses in curves.items():
        axes.plot([(i + 0.5) * step for i in range(len(losses))], losses, label=name)
    axes.axvline(most, color="grey", lw=0.8)
    axes.set(xlabel="position (the line: the length trained on)", ylabel="perplexity", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, GGUF file, or name on the hub (default: smollm2)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="type of the weights")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="(default: all)")
    parser.add_argument("--factor", type=float, default=2.0, help="how many times as long (default: 2)")
    parser.add_argument("--corpus", help="a corpus or a text file (default: shakespeare)")
    parser.add_argument("--tokens", type=int, default=14_000, help="of the text; 0 reads none (default: 14000)")
    parser.add_argument("--step", type=int, default=2000, help="tokens of a column (default: 2000)")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4000, 12_000], help="of texts with a key")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="of the keys")
    parser.add_argument("--chunk", type=int, default=256, help="tokens in a pass (default: 256)")
    args = parser.parse_args(argv)
    if args.step < 1 or args.chunk < 1 or args.tokens < 0 or args.tokens == 1:
        raise BadInput(f"--step {args.step} --chunk {args.chunk} --tokens {args.tokens}: 1, 1 and 2 are the least")
    if not all(0 <= depth <= 1 for depth in args.depths):
        raise BadInput(f"--depths {args.depths}: each is between 0, the text's beginning, and 1, its end")
    setup("cpu")
    opened = load(args.model, DTYPES[args.dtype])
    tokenizer, trained = opened.tokenizer, opened.model.config.block_size
    models = {kind: stretch(opened.model, args.factor, kind) for kind in args.kinds}
    most = int(args.factor * trained)
    if max([args.tokens, *args.lengths]) + 8 > most:
        raise BadInput(f"--tokens {args.tokens} --lengths {args.lengths}: at --factor {args.factor} there is room for "
                       f"{most}, a few of them for the answer")
    for length in args.lengths:
        hide(tokenizer, length, 0, "00000")  # refused now and not after the reading
    name, ids = text_of(args.corpus, tokenizer, args.tokens)

    log = RunLog(__file__, "yarn", vars(args))
    rows, curves, fine = [], {}, max(args.tokens // 28, 1)  # tokens of a point in the figure
    for kind, model in models.items():
        title = kind if kind == "plain" else f"{kind} {args.factor:g}x"
        row = {"angles": title}
        if args.tokens:
            with progress(args.tokens - 1, title) as bar:
                losses = nats(model, ids, args.chunk, tick=lambda done, bar=bar: bar.update(done, tokens=done))
            row |= perplexities(losses, args.step)
            curves[title] = [part.mean().exp().item() for part in losses.split(fine)]
        for length in args.lengths:
            with progress(length * len(args.depths), f"{title}, keys in {length:,} tokens") as bar:
                found = passkeys(model, tokenizer, length, args.depths, args.chunk,
                                 lambda done, bar=bar: bar.update(done, tokens=done))
            row[f"keys, {length:,}"] = f"{sum(found.values())} of {len(found)}"
            log.metrics(length, kind=kind, found={str(depth): right for depth, right in found.items()})
        rows.append(row)
        log.metrics(args.tokens, **row, curve=curves.get(title))
    table(f"{args.model}, trained on {trained:,} tokens: perplexity of {name}, and keys found", rows)
    if curves:
        say(f"figure: {log.figure(draw(curves, fine, trained), 'yarn')}")
    log.finish(corpus=name, rows=rows, curves=curves, trained=trained)


if __name__ == "__main__":
    run_program(main)
