"""What a window costs a real model, and what a few first tokens kept beside it give back.

    uv run stages run 08 demos/sinks.py
    uv run stages run 08 demos/sinks.py --tokens 600 --window 64 --stream 0     # a look, in a minute
    uv run stages run 08 demos/sinks.py --name default                          # the model that train.py made

A softmax has to give its weight to something, and a head that finds nothing gives it to the first token, the "sink". A
window that moves on takes the sink away, and the weight goes where it does harm. So the first few tokens are kept:
"252 + 4 sinks" looks at as many positions as a window of 256, but four of them are the very first of the text.
Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2023).

- Perplexity of one text: each column is that of the tokens between two positions. `MB` are the keys and values that are
  kept at the text's end, if one token is read at a time.
- Attention to the first token by layer, in a text of `--look` tokens, with the whole text in view.
- A stream: `--stream` tokens with the most sinks, in a cache that does not grow. `MB of memory` is what the process
  takes at that point, weights and all; `MB, all kept` is what the cache would take if nothing was overwritten.

A model of train.py is read beyond its block_size: once with all in view, at distances that it has never met, and with
windows of block_size positions.
"""

import argparse
import copy
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import torch
from matplotlib.figure import Figure

import checkpoint
from cache import Cache
from demos.yarn import nats, perplexities, text_of
from hf import DTYPES, Opened, load
from model import GPT, attention_weights, rotate
from sample import evaluation


def seeing(model: GPT, **changes) -> GPT:
    """The same weights, not copied, with another window or other sinks."""
    other = copy.copy(model)
    other.config = replace(model.config, **changes)
    return other


def kinds(model: GPT, window: int, sinks: list[int], tokens: int) -> dict[str, GPT]:
    """What is compared, each with a name: all in view, then `window` positions, of which some are sinks.

    Raises BadInput for a window, or for sinks, that the model cannot have.
    """
    longer = seeing(model, block_size=max(model.config.block_size, tokens))
    found = {"all": longer, f"window {window}": seeing(longer, window=window)}
    for n in sinks:
        name = f"{window - n} + {n} sink{'s' if n > 1 else ''}"
        found[name] = seeing(longer, window=window - n, n_sink=n)
    return found


def cache_for(model: GPT, chunk: int):
    """The cache that a model of `kinds` reads through."""
    return Cache(model, most=chunk)


def kept_bytes(model: GPT, tokens: int) -> int:
    """Bytes of the keys and values that are kept of so many tokens, read one at a time."""
    c = model.config
    positions = min(tokens, c.n_sink + c.span)
    return 2 * c.n_layer * c.n_kv_head * c.head_dim * positions * model.tok_emb.weight.element_size()


@torch.no_grad()
def first_share(model: GPT, idx):
    """The share of its attention that each head gives to the first token, the mean over the others: [1, T] -> [L, H].

    Hooks listen while the model reads; the model stays as it is.
    """
    shares = []

    def attend(attn, args, output):
        x, look, _ = args
        q, k = (attn.split_heads(layer(x)) for layer in (attn.query, attn.key))
        q, k = attn.query_norm(q), attn.key_norm(k)
        if look.rope is not None:
            q, k = rotate(q, *look.rope), rotate(k, *look.rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [1, H, T, D]
        # Token 0 is left out: it can look at nothing but itself.
        shares.append(attention_weights(q.float(), k.float())[0, :, 1:, 0].mean(-1))

    hooks = [block.attn.register_forward_hook(attend) for block in model.blocks]
    try:
        with evaluation(model):
            model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(shares)


def resident() -> int | None:
    """Bytes of memory that this process takes now; none where the system does not say."""
    file = Path("/proc/self/statm")
    return int(file.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else None


def stream(model: GPT, ids: list[int], every: int, chunk: int, tick=lambda done, loss: None) -> list[dict]:
    """Read a text in one cache: a row for each `every` tokens, with their perplexity and the memory at that point."""
    cache, rows, whole = Cache(model, most=chunk), [], seeing(model, window=None, n_sink=0, block_size=len(ids))
    for start in range(0, len(ids) - 1, every):
        begin = time.perf_counter()
        losses = nats(model, ids[start:start + every + 1], chunk, cache)  # goes on from what the cache holds
        done, seconds, taken = start + len(losses), time.perf_counter() - begin, resident()
        rows.append({
            "tokens": done, "perplexity": losses.mean().exp().item(), "cache, MB": cache.nbytes / 1e6,
            "MB, all kept": kept_bytes(whole, done) / 1e6, "MB of memory": None if taken is None else taken / 1e6,
            "tokens/s": len(losses) / seconds,
        })  # fmt: skip
        tick(done, losses.mean())
    return rows


def draw(curves: dict[str, list[float]], step: int, shares, title: str) -> Figure:
    """Two panels: perplexity of `step` tokens at a time against position, and the first token's share [L, H]."""
    fig = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2)
    for name, values in curves.items():
        left.plot([(i + 0.5) * step for i in range(len(values))], values, label=name, lw=2 if name == "all" else 1.2)
    left.set(title="perplexity", xlabel="position", yscale="log")
    left.grid(alpha=0.3, which="both")
    left.legend(title="in view", fontsize=8)
    layers, percent = range(1, len(shares) + 1), 100 * shares
    right.fill_between(layers, percent.amin(1).tolist(), percent.amax(1).tolist(), alpha=0.15, lw=0,
                       label="from the lowest to the highest head")
    right.plot(layers, percent.mean(1).tolist(), "o-", ms=3, label="mean over the heads")
    right.set(title=f"attention to the first token, {title}", xlabel="layer", ylabel="%", ylim=(0, 100))
    right.legend(fontsize=8)
    return fig


def draw_stream(rows: list[dict]) -> Figure:
    """Two panels against the tokens read: perplexity, and the memory that is taken and that would be."""
    fig = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    tokens = [row["tokens"] for row in rows]
    left.plot(tokens, [row["perplexity"] for row in rows], "o-")
    left.set(title="perplexity", xlabel="tokens read", ylim=(0, None))
    for key in ("MB of memory", "MB, all kept", "cache, MB"):
        if rows[0][key] is not None:
            right.plot(tokens, [row[key] for row in rows], "o-", label=key)
    right.set(title="MB", xlabel="tokens read", ylim=(0, None))
    right.legend(fontsize=8)
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, GGUF file, or name on the hub (default: smollm2)")
    parser.add_argument("--name", help="a run of train.py instead, a folder under out/")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="type of the weights of --model")
    parser.add_argument("--window", type=int, help="positions in view (default: 256; of a run, its block_size)")
    parser.add_argument("--sinks", type=int, nargs="+", default=[1, 2, 4], help="of these (default: 1 2 4)")
    parser.add_argument("--corpus", help="a corpus or a text file (default: shakespeare)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text that all read (default: 2048)")
    parser.add_argument("--step", type=int, default=512, help="tokens of a column (default: 512)")
    parser.add_argument("--look", type=int, default=512, help="tokens of the text that is looked into (default: 512)")
    parser.add_argument("--stream", type=int, default=10_000, help="tokens of the stream; 0: none (default: 10000)")
    parser.add_argument("--every", type=int, default=1000, help="tokens of the stream in a row (default: 1000)")
    parser.add_argument("--chunk", type=int, default=128, help="tokens in a pass (default: 128)")
    args = parser.parse_args(argv)
    if min(args.tokens, args.look) < 2 or min(args.step, args.every, args.chunk, *args.sinks) < 1:
        raise BadInput("--tokens and --look are at least 2; --step, --every, --chunk and each of --sinks at least 1")
    if args.stream < 0 or args.stream == 1:
        raise BadInput(f"--stream {args.stream}: 0 for none, or at least 2")
    setup("cpu")
    if args.name:
        opened = Opened(*checkpoint.load(run_folder(__file__, args.name) / "model.pt")[:2])
    else:
        opened = load(args.model, DTYPES[args.dtype])
    trained = opened.model.config.block_size
    if args.window is None:
        args.window = trained if args.name else 256
    models = kinds(opened.model, args.window, sorted(args.sinks), args.tokens)
    name, ids = text_of(args.corpus, opened.tokenizer, max(args.tokens, args.look, args.stream))
    look = min(args.look, trained)

    log = RunLog(__file__, f"sinks_{args.name}" if args.name else "sinks", vars(args))
    rows, curves, fine = [], {}, max(args.tokens // 32, 1)  # tokens of a point in the figure
    with progress(len(models) * (args.tokens - 1), "reading") as bar:
        for i, (title, model) in enumerate(models.items()):
            losses = nats(model, ids[:args.tokens], args.chunk, cache_for(model, args.chunk),
                          lambda done, i=i, title=title: bar.update(i * (args.tokens - 1) + done, text=title))
            rows.append({
                "in view": title, "MB": kept_bytes(model, args.tokens) / 1e6, "perplexity": losses.mean().exp().item(),
                **perplexities(losses, args.step),
            })  # fmt: skip
            curves[title] = [part.mean().exp().item() for part in losses.split(fine)]
            log.metrics(args.tokens, **rows[-1])
    shares = first_share(opened.model, torch.tensor([ids[:look]]))  # [L, H]
    table(f"{args.name or args.model} reads {args.tokens:,} tokens of {name}", rows)
    mean = shares.mean(1).tolist()
    table(f"attention to the first token, in {look} tokens",
          [{"layer": i, "mean": share, "highest head": most}
           for i, (share, most) in enumerate(zip(mean, shares.amax(1).tolist(), strict=True), 1)])
    say(f"figure: {log.figure(draw(curves, fine, shares, f'in {look} tokens'), 'sinks')}")
    flow = []
    if args.stream:
        title, model = list(models.items())[-1]
        with progress(args.stream - 1, f"streaming, {title}") as bar:
            flow = stream(model, ids[:args.stream], args.every, args.chunk,
                          lambda done, loss: bar.update(done, tokens=done, perplexity=loss.exp()))
        table(f"a stream of {args.stream:,} tokens, {title}", flow)
        say(f"figure: {log.figure(draw_stream(flow), 'stream')}")
    log.finish(corpus=name, rows=rows, curves=curves, share=mean, stream=flow)


if __name__ == "__main__":
    run_program(main)
