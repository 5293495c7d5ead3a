"""A real model looked into, layer by layer: whom it attends to, what it would say, and how large its vectors grow.

    uv run stages run 07 demos/look_inside.py
    uv run stages run 07 demos/look_inside.py --text "To be, or not to be, that is the"
    uv run stages run 07 demos/look_inside.py --model Qwen/Qwen3-0.6B

The default is SmolLM2-135M-Instruct; any model that hf.py opens will do. Three things are looked at, without a change
to the model: hooks listen while it reads the text.

- Attention. `maps.png` has a picture for each layer: row t shows on which positions token t spends its weight, averaged
  over the heads. In most layers the first column is dark: the first token, whatever it is, gets much of the weight. It
  is an "attention sink". A softmax has to give its weight to something, and a head that finds nothing leaves it there
  (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023). `share` is the part of the attention
  that the first token gets, in the sentence and in a longer text, where all tokens alike would get next to nothing.
- The length of the vectors in the residual stream. From some layer on that of the first token is a hundred times as
  long as the others (Sun et al., "Massive Activations in Large Language Models", 2024), and nearly the same whatever
  the token is: `cosine` compares the first tokens of the two texts.
- The logit lens (nostalgebraist, "interpreting GPT: the logit lens", 2020). The final norm and the head turn the last
  layer's output into scores. Applied to an earlier layer's, they show what the model would say if it stopped there.
  `rank` is the place that the model's final answer has after each layer, 1 being the likeliest token.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import split
from hf import load
from model import attention_weights, rotate
from sample import evaluation

TEXT = "The capital of France is Paris, the capital of Italy is Rome, and the capital of Spain is"
COLUMNS = 6  # of the grid of maps


@dataclass
class Inside:
    """What the hooks saw: L layers, H heads, T tokens, C channels."""

    streams: torch.Tensor  # [L + 1, T, C]: the residual stream before the first layer and after each
    maps: torch.Tensor  # [L, H, T, T]: the attention weights


@torch.no_grad()
def look(model, idx) -> Inside:
    """Let the model read tokens [1, T], and keep what passes from layer to layer and what each head attends to."""
    streams, maps = [], []

    def enter(block, args):
        streams.append(args[0][0])

    def leave(block, args, output):
        streams.append(output[0])

    def attend(attn, args, output):
        x, rope = args
        q, k = (attn.split_heads(layer(x)) for layer in (attn.query, attn.key))
        q, k = attn.query_norm(q), attn.key_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [1, H, T, D]
        maps.append(attention_weights(q, k)[0])

    hooks = [model.blocks[0].register_forward_pre_hook(enter)]
    for block in model.blocks:
        hooks += [block.register_forward_hook(leave), block.attn.register_forward_hook(attend)]
    try:
        with evaluation(model):
            model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return Inside(torch.stack(streams), torch.stack(maps))


def sink_share(maps):
    """How much of its attention each head gives to the first token: [..., T, T] -> [...], the mean over tokens.

    The first token itself is left out: it can look at nothing else.
    """
    return maps[..., 1:, 0].mean(-1)


def even_share(T: int) -> float:
    """The same for a head that looks at all positions alike: token t gives 1 / (t + 1) to each."""
    return sum(1 / (t + 1) for t in range(1, T)) / (T - 1)


@torch.no_grad()
def lens(model, streams):
    """What the model would say after each layer: [..., C] -> log-probabilities [..., V]."""
    return model.head(model.norm(streams)).log_softmax(-1)


def likeliest(model, tokenizer, streams) -> list[list[tuple[str, float]]]:
    """The likeliest token under the lens and its probability, as rows of the layers: streams [L + 1, n, C]."""
    best, tokens = lens(model, streams).exp().max(-1)
    texts = [[tokenizer.decode([i]) for i in row] for row in tokens.tolist()]
    return [list(zip(*row, strict=True)) for row in zip(texts, best.tolist(), strict=True)]


def ranks(model, streams):
    """After each layer, the place of the token that is likeliest after the last: [L + 1, C] -> [L + 1], from 1 on."""
    scores = lens(model, streams)  # [L + 1, V]
    return (scores > scores[:, scores[-1].argmax(), None]).sum(-1) + 1


def visible(text: str) -> str:
    """A token as a label: spaces and line ends are seen, and what the figure's font lacks is a box."""
    text = text.replace(" ", "␣").replace("\n", "¶")
    return "".join(c if c in "␣¶" or (c.isprintable() and ord(c) < 0x250) else "□" for c in text)


def draw_maps(maps, labels: list[str]) -> Figure:
    """A picture for each layer, the mean over its heads: maps [L, H, T, T]."""
    L, _, T, _ = maps.shape
    rows = math.ceil(L / COLUMNS)
    fig = Figure(figsize=(1.5 * COLUMNS, 1.6 * rows), layout="constrained")
    axes = fig.subplots(rows, COLUMNS, squeeze=False)
    for i, axis in enumerate(axes.flat):
        if i >= L:
            axis.set_axis_off()
            continue
        # The root of the weights, so that small ones show as well.
        axis.imshow(maps[i].mean(0).sqrt().tolist(), cmap="Greys", vmin=0, vmax=1)
        axis.set_title(f"layer {i + 1}", fontsize=9)
        named = range(0, T, math.ceil(T / 10)) if i % COLUMNS == 0 else []
        axis.set_yticks(named, [labels[t] for t in named], fontsize=6, parse_math=False)
        axis.set_xticks([])
        axis.tick_params(length=0, pad=1)
    return fig


def draw_sink(inside: Inside, long: Inside) -> Figure:
    """Two panels over the layers: the first token's share of attention, and the lengths of the vectors."""
    L, _, T, _ = inside.maps.shape
    fig = Figure(figsize=(9, 4), layout="constrained")
    left, right = fig.subplots(1, 2)
    share, layers = 100 * sink_share(long.maps), range(1, L + 1)  # [L, H]
    left.fill_between(layers, share.amin(1).tolist(), share.amax(1).tolist(), color="tab:blue", alpha=0.15, lw=0,
                      label="from the lowest to the highest head")
    left.plot(layers, share.mean(1).tolist(), color="tab:blue", lw=2, label=f"{long.maps.shape[-1]} tokens, mean")
    left.plot(layers, (100 * sink_share(inside.maps).mean(1)).tolist(), color="gray", lw=1, label=f"{T} tokens")
    left.axhline(100 * even_share(T), color="gray", ls=":", lw=1, label=f"{T} tokens, if all were alike")
    left.set(title="attention to the first token", xlabel="layer", ylabel="%", ylim=(0, 125), yticks=range(0, 101, 20))
    left.legend(fontsize=7, loc="upper right")
    norms = inside.streams.norm(dim=-1)  # [L + 1, T]
    for t in range(T - 1, -1, -1):  # the first token on top
        style = {"color": "tab:red", "lw": 2} if t == 0 else {"color": "gray", "lw": 0.7, "alpha": 0.7}
        right.plot(norms[:, t].tolist(), **style, label={0: "the first token", 1: "each other token"}.get(t))
    right.set(title="length of the vectors in the residual stream", xlabel="after layer", yscale="log")
    right.legend(fontsize=7)
    return fig


def draw_lens(said: list[list[tuple[str, float]]], places: list[int], labels: list[str]) -> Figure:
    """Two panels, layers from below to above: the likeliest tokens of the last positions, and the answer's rank."""
    fig = Figure(figsize=(7.5, 1 + 0.17 * len(said)), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(2.5, 1), sharey=True)
    left.imshow([[p for _, p in row] for row in said], cmap="Greens", vmin=0, vmax=2, aspect="auto", origin="lower")
    for layer, row in enumerate(said):
        for i, (token, _) in enumerate(row):
            left.text(i, layer, visible(token)[:12], ha="center", va="center", fontsize=7, parse_math=False)
    left.set_xticks(range(len(said[0])), labels[-len(said[0]):], fontsize=8, parse_math=False)
    left.set(title="what each layer would say next", xlabel="the text's last tokens", ylabel="after layer")
    right.plot(places, range(len(said)), "o-", color="tab:green", ms=3)
    right.set(title="rank of the final answer", xscale="log", xlabel="1 is the likeliest")
    return fig


def long_text(name: str | None, tokenizer, T: int) -> tuple[str, list[int]]:
    """A corpus' name and up to T tokens of its validation text, from the first paragraph that is whole."""
    found = corpus.load(name)
    text = split(found.text)[1]
    text = text.partition("\n\n")[2] or text
    return found.name, tokenizer.encode(text[:20 * T])[:T]  # few tokens are longer than 20 characters


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, GGUF file, or name on the hub (default: smollm2)")
    parser.add_argument("--text", default=TEXT, help="the text to read (default: a sentence on capitals)")
    parser.add_argument("--positions", type=int, default=5, help="last tokens under the lens (default: 5)")
    parser.add_argument("--corpus", help="the long text: a corpus or a text file (default: shakespeare)")
    parser.add_argument("--tokens", type=int, default=512, help="of the long text (default: 512)")
    args = parser.parse_args(argv)
    if args.positions < 1 or args.tokens < 2:
        raise BadInput(f"--positions {args.positions} --tokens {args.tokens}: 1 and 2 are the least")
    setup("cpu")
    opened = load(args.model, torch.float32)
    model, tokenizer, most = opened.model, opened.tokenizer, opened.model.config.block_size
    ids = [*opened.start, *tokenizer.encode(args.text)]
    name, more = long_text(args.corpus, tokenizer, args.tokens)
    more = [*opened.start, *more]
    for flag, length in (("--text", len(ids)), ("--corpus", len(more))):
        if not 2 <= length <= most:
            raise BadInput(f"{flag} has {length} tokens: the model looks at 2 to {most}")

    log = RunLog(__file__, "look_inside", vars(args))
    inside, long = (look(model, torch.tensor([each])) for each in (ids, more))
    share, shares = (sink_share(each.maps).mean(1) for each in (inside, long))  # [L] x 2
    norms = inside.streams.norm(dim=-1)  # [L + 1, T]
    first, others = norms[:, 0], norms[:, 1:].median(1).values  # [L + 1] x 2
    peak = int(first.argmax())
    held = inside.streams[peak, 0].square().topk(3).values.sum().item() / first[peak].item() ** 2
    cosine = F.cosine_similarity(inside.streams[:, 0], long.streams[:, 0], dim=-1)  # [L + 1]
    said = likeliest(model, tokenizer, inside.streams[:, -args.positions:])
    places = ranks(model, inside.streams[:, -1])
    labels = [visible(tokenizer.decode([i])) for i in ids]
    columns = [f"{t}: {label}" for t, label in enumerate(labels)][-args.positions:]
    rows = []
    for layer, words in enumerate(said):
        row = {
            "after layer": layer, "share": share[layer - 1].item() if layer else None,
            f"in {len(more)} tokens": shares[layer - 1].item() if layer else None,
            "length of the first": first[layer].item(), "others' median": others[layer].item(),
            "cosine": cosine[layer].item(), "rank": places[layer].item(),
        }  # fmt: skip
        rows.append(row | {label: f"{visible(word)} {p:.2f}" for label, (word, p) in zip(columns, words, strict=True)})
        log.metrics(layer, **row, says=words)
    table(f"{args.model} reads {len(ids)} tokens, and {len(more)} of {name}", rows)
    say(f"if all tokens were alike, the first would get {even_share(len(ids)):.3f} and {even_share(len(more)):.3f}")
    say(f"the first token's vector is longest after layer {peak}; 3 channels then hold {held:.1%} of its square")
    figures = {"maps": draw_maps(inside.maps, labels), "sink": draw_sink(inside, long),
               "lens": draw_lens(said, places.tolist(), labels)}  # fmt: skip
    for title, fig in figures.items():
        say(f"figure: {log.figure(fig, title)}")
    log.finish(corpus=name, share=share, long_share=shares, first=first, others=others, cosine=cosine, rank=places,
               answer=said[-1][-1], peak=peak, held=held)


if __name__ == "__main__":
    run_program(main)
