"""The cache of a real model looked into: how large the numbers in it are, how few bits they need, and what it costs.

    uv run stages run 08 demos/look_at_cache.py
    uv run stages run 08 demos/look_at_cache.py --tokens 128 --bits 4 --write 4     # a look, in a minute

SmolLM2 reads `--tokens` tokens of a text. Then:

- Sizes. Of all keys, and of all values, that a layer keeps: the root of their mean square, the largest, and `outlier`:
  how many times larger the largest channel is than the median one (channels are compared by their root mean square over
  the tokens). A few channels of the keys are some ten times as large as the others, whatever the token is. They belong
  to pairs that RoPE turns slowly. In most layers the channels of the values are more alike.
- Rounding. Whole numbers of 0 ... 2^bits - 1 need a scale and a lowest value. "Per token" has one pair for the channels
  of a token in a head: one large channel makes steps that are too wide for all the others. "Per channel" has one for
  `--group` tokens of a channel; with as many tokens as a head has channels, it takes as many pairs. `error` is the root
  of the mean square of what rounding changed, as a share of what was there. `perplexity` is that of the text, read with
  rounded keys or rounded values.
  Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (2024), section 3.
- With and without. The model writes on, and each token is worked out twice: from the cache, and from a pass over the
  whole text. The token should be the same. (In bfloat16 two tokens that are nearly as likely may change places.)
- Cost, by formula: bytes in bfloat16 of the caches of large models, and of the same models if each head of queries had
  a key and a value of its own (`MHA`). GB are 10^9 bytes, k is 1,024 tokens. DeepSeek-V3 keeps a vector of 512 numbers
  and a key of 64 for all its heads: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.1.1.
"""

import argparse
import sys
import time
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

from cache import Cache
from demos.yarn import nats, read, text_of
from hf import DTYPES, load
from sample import SampleConfig, evaluation, generate

LARGE = {  # layers, heads of queries, channels of a head, numbers kept of a position in a layer
    "Llama 3 70B": (80, 64, 128, 2 * 8 * 128),
    "Qwen3-32B": (64, 64, 128, 2 * 8 * 128),
    "DeepSeek-V3": (61, 128, 128, 512 + 64),
}


def sizes(x) -> dict[str, float]:
    """How large the numbers of one layer are: [K, S, D] -> root mean square, largest, outlier."""
    x = x.float()
    channels = x.square().mean(1).sqrt()  # [K, D], over the tokens
    return {"rms": x.square().mean().sqrt().item(), "largest": x.abs().max().item(),
            "outlier": (channels.max() / channels.median()).item()}  # fmt: skip


def rounded(x, bits: int, dim: int):
    """`x` as it is read back from 2^bits numbers, evenly spaced from the lowest to the highest along `dim`.

    [0, 1, 2, 9] in 2 bits: 0, 3, 6 or 9 can be kept, so [0, 0, 3, 9].
    """
    low, high = x.float().aminmax(dim=dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-9)  # all alike: any step will do
    return (low + ((x.float() - low) / step).round() * step).type_as(x)


class RoundedCache(Cache):
    """Keeps keys or values rounded, in pieces of `most` tokens, and notes how much that changes."""

    def __init__(self, model, most: int, what: str, along: str, bits: int):
        super().__init__(model, most=most)
        self.what, self.dim, self.bits = what, {"token": -1, "channel": -2}[along], bits  # of [B, K, T, D]
        self.change = self.total = 0.0

    def update(self, layer: int, k, v):
        x = k if self.what == "keys" else v
        short = rounded(x, self.bits, self.dim)
        self.change += (short - x).float().square().sum().item()
        self.total += x.float().square().sum().item()
        return super().update(layer, *((short, v) if self.what == "keys" else (k, short)))


def compare(model, ids: list[int], bits: list[int], group: int, tick) -> list[dict]:
    """A row without rounding, and one for keys and values, along tokens and channels, in so many bits."""
    exact = nats(model, ids, group).mean().exp().item()
    rows = [{"kept": "as they are", "perplexity": exact}]
    tick(1)
    for what in ("keys", "values"):
        for along in ("token", "channel"):
            for b in bits:
                cache = RoundedCache(model, group, what, along, b)
                found = nats(model, ids, group, cache).mean().exp().item()
                rows.append({"kept": f"{what}, {b} bits per {along}", "perplexity": found, "rise": found / exact - 1,
                             "error": (cache.change / cache.total) ** 0.5})  # fmt: skip
                tick(len(rows))
    return rows


def side_by_side(model, ids: list[int], length: int, tick=lambda done: None) -> list[dict]:
    """Write `length` tokens, each once from the cache and once without: what they are, and the seconds of both."""
    steps, text, rows = generate(model, torch.tensor([ids]), SampleConfig(temperature=0)), list(ids), []
    for _ in range(length):
        begin = time.perf_counter()
        token = next(steps).item()
        middle = time.perf_counter()
        with evaluation(model), torch.no_grad():
            other = int(model(torch.tensor([text]), last=1)[0, -1].argmax())
        end = time.perf_counter()
        rows.append({"before": len(text), "with": middle - begin, "without": end - middle, "same": other == token})
        text.append(token)
        tick(len(rows))
    return rows


def cost(layers: int, heads: int, head_dim: int, kept: int, size: int = 2) -> dict[str, float]:
    """What a cache of `kept` numbers for each position and layer takes, at `size` bytes for each number."""
    each, full = layers * kept * size, layers * 2 * heads * head_dim * size
    row = {"kB a token": each / 1e3} | {f"{k} k, GB": each * k * 1024 / 1e9 for k in (8, 32, 128)}
    return row | {"128 k with MHA, GB": full * 128 * 1024 / 1e9, "times less": full / each}


def draw_channels(keys, values) -> Figure:
    """Two panels on one scale: the root mean square of each channel over the tokens, [L, K D] x 2."""
    fig = Figure(figsize=(9.5, 3.8), layout="constrained")
    top = keys.max().item()
    for axis, name, sizes in zip(fig.subplots(1, 2, sharey=True), ("keys", "values"), (keys, values), strict=True):
        image = axis.imshow(sizes.tolist(), aspect="auto", cmap="magma", vmax=top, vmin=0, interpolation="nearest",
                            extent=(0, sizes.shape[1], len(sizes) + 0.5, 0.5))  # fmt: skip
        axis.set(title=f"{name}: root mean square", xlabel="channel, head by head")
    fig.axes[0].set_ylabel("layer")
    fig.colorbar(image, ax=fig.axes)
    return fig


def draw_cost(rows: list[dict], bits: list[int], turns: list[dict]) -> Figure:
    """Two panels: perplexity by the bits that keys or values are kept in, and seconds for a token by its place."""
    fig = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    found = {row["kept"]: row["perplexity"] for row in rows}
    for what in ("keys", "values"):
        for along in ("token", "channel"):
            left.plot(bits, [found[f"{what}, {b} bits per {along}"] for b in bits], "o-", label=f"{what}, per {along}")
    left.axhline(rows[0]["perplexity"], color="gray", ls=":", label="not rounded")
    left.set(title="perplexity with a rounded cache", xlabel="bits", yscale="log", xticks=bits)
    left.legend(fontsize=8)
    for key, label in (("without", "a pass over the whole text"), ("with", "from the cache")):
        right.plot([row["before"] for row in turns[1:]], [row[key] for row in turns[1:]], "o-", ms=3, label=label)
    right.set(title="seconds for one more token", xlabel="tokens before it", ylim=(0, None))
    right.legend(fontsize=8)
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, GGUF file, or name on the hub (default: smollm2)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="type of the weights")
    parser.add_argument("--corpus", help="a corpus or a text file (default: shakespeare)")
    parser.add_argument("--tokens", type=int, default=512, help="of the text (default: 512)")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2], help="to round to (default: 8 4 3 2)")
    parser.add_argument("--group", type=int, help="tokens of a channel with one scale (default: a head's channels)")
    parser.add_argument("--write", type=int, default=32, help="tokens to write with and without (default: 32)")
    args = parser.parse_args(argv)
    if args.tokens < 2 or args.write < 2 or (args.group is not None and args.group < 2):
        raise BadInput(f"--tokens {args.tokens} --write {args.write} --group {args.group}: 2 is the least")
    if not all(1 <= b <= 8 for b in args.bits):
        raise BadInput(f"--bits {args.bits}: from 1 to 8")
    setup("cpu")
    opened = load(args.model, DTYPES[args.dtype])
    model, c = opened.model, opened.model.config
    if args.tokens + args.write > c.block_size:
        raise BadInput(f"--tokens {args.tokens} --write {args.write}: the model looks at {c.block_size}")
    name, ids = text_of(args.corpus, opened.tokenizer, args.tokens)
    group = args.group or c.head_dim

    log = RunLog(__file__, "look_at_cache", vars(args))
    cache = Cache(model, most=group)
    for _ in read(model, ids, group, cache, last=1):
        pass
    kept = {"keys": cache.keys[:, 0, :, :len(ids)], "values": cache.values[:, 0, :, :len(ids)]}  # [L, K, S, D] x 2
    layers = [
        {"layer": i} | {f"{what}, {name}": x for what, part in kept.items() for name, x in sizes(part[i - 1]).items()}
        for i in range(1, c.n_layer + 1)
    ]
    table(f"{args.model} keeps {len(ids)} tokens of {name}", layers)
    say(f"keys and values: 2 x {tuple(kept['keys'].shape)} (layers, heads, positions, channels), "
        f"{kept['keys'].dtype}, {2 * kept['keys'].numel() * kept['keys'].element_size():,} bytes")
    with progress(1 + 4 * len(args.bits), "rounding") as bar:
        rows = compare(model, ids, args.bits, group, bar.update)
    table(f"perplexity of {len(ids)} tokens, in groups of {group} tokens or a head's {c.head_dim} channels", rows)
    with progress(args.write, "with and without") as bar:
        turns = side_by_side(model, ids, args.write, bar.update)
    total = {key: sum(row[key] for row in turns[1:]) for key in ("with", "without", "same")}
    say(f"{len(turns) - 1} tokens: {total['with']:.2f} s with the cache, {total['without']:.2f} s without, "
        f"{total['without'] / total['with']:.1f} times as long; {total['same']} of them the same")
    large = LARGE | {args.model: (c.n_layer, c.n_head, c.head_dim, 2 * c.n_kv_head * c.head_dim)}
    costs = [{"model": name, "layers": shape[0], "kept of each": shape[-1]} | cost(*shape)
             for name, shape in large.items()]  # fmt: skip
    table("caches in bfloat16; kept of each: numbers for a position and a layer", costs)
    channels = [x.float().square().mean(2).sqrt().flatten(1) for x in kept.values()]  # [L, K D] x 2
    for title, fig in {"channels": draw_channels(*channels), "cost": draw_cost(rows, args.bits, turns)}.items():
        say(f"figure: {log.figure(fig, title)}")
    log.finish(corpus=name, layers=layers, rows=rows, turns=turns, costs=costs)


if __name__ == "__main__":
    run_program(main)
