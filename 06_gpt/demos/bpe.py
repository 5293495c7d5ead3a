"""Byte-pair encoding: how fast it is learned, how much it shortens a text, what the tokens look like.

    uv run stages run 06 demos/bpe.py
    uv run stages run 06 demos/bpe.py --vocab-size 2048 --corpus python-docs

Times are of the processor: Python and the encoder use one core, and what else the machine does then does not count.
The naive trainer, `learn_tokens_slowly`, recounts all pairs of the text for every merge. It is asked for a few merges
only; the time that it would need for all of them is extrapolated from its time per token read and the text's length at
each vocabulary size.
"""

import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import say, table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import matplotlib

from data import split
from tokenizer import END, BPETokenizer, learn_tokens, learn_tokens_slowly

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SENTENCE = "If we must be conquered, let the unwilling kings remember our forgetfulness."


def of_size(tokens: list[bytes], size: int) -> BPETokenizer:
    """The tokenizer of the first `size` - 1 tokens and the special one: a small vocabulary begins a larger one."""
    return BPETokenizer({token: i for i, token in enumerate(tokens[:size - 1])}, {END: size - 1})


def timed(function, *args):
    """-> what it returns, and its seconds of processor time."""
    begin = time.process_time()
    result = function(*args)
    return result, time.process_time() - begin


def all_reads(lengths: dict[int, int]) -> float:
    """How many tokens the naive trainer reads on its way through {vocabulary size: length of the text}.

    Each merge reads the text as short as it is by then: the area under the curve of lengths, by trapezoids.
    """
    sizes = sorted(lengths)
    return sum((b - a) * (lengths[a] + lengths[b]) / 2 for a, b in pairwise(sizes))


def sizes_up_to(last: int) -> list[int]:
    """Vocabulary sizes to measure: 257, with no merge yet, and then about doubling, up to and with `last`."""
    return sorted({size for size in (257, 320, 384, *(2**k for k in range(9, 17))) if size < last} | {last})


def draw(rows: list[dict]):
    fig, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for key, label, style in (("train", "the text it was learned on", "--"), ("val", "text it has not seen", "-")):
        axis.plot([row["tokens"] for row in rows], [row[key] for row in rows], style, marker="o", label=label)
    axis.set(xscale="log", xlabel="tokens in the vocabulary", ylabel="bytes per token", ylim=(0, None))
    ticks = [row["tokens"] for row in rows]
    axis.set_xticks(ticks, ticks, fontsize=7)
    axis.minorticks_off()
    axis.legend()
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens to learn (default: 4096)")
    parser.add_argument("--naive-merges", type=int, default=5, help="merges of the naive trainer (default: 5)")
    parser.add_argument("--sentence", default=SENTENCE, help="text to show in tokens")
    args = parser.parse_args(argv)
    if not 258 <= args.vocab_size <= 2**16 or args.naive_merges < 1:
        raise BadInput(f"--vocab-size {args.vocab_size} --naive-merges {args.naive_merges}: 258 to 65536, at least 1")
    source = corpus.load(args.corpus)
    train, val = split(source.text)
    log = RunLog(__file__, "bpe", {**vars(args), "corpus": source.name})

    tokens, seconds = timed(learn_tokens, train, args.vocab_size - 1)  # one place is the special token's
    first, slow = timed(learn_tokens_slowly, train, min(256 + args.naive_merges, len(tokens)))
    if first != tokens[:len(first)]:
        raise AssertionError("both trainers must learn the same tokens")

    rows, lengths = [], {}
    for size in sizes_up_to(len(tokens) + 1):
        tokenizer = of_size(tokens, size)
        lengths[size] = len(tokenizer.encode(train))
        rows.append({"tokens": size, "train": len(train.encode("utf-8")) / lengths[size],
                     "val": len(val.encode("utf-8")) / len(tokenizer.encode(val))})
    sizes = list(lengths)
    measured = {size: len(of_size(tokens, size).encode(train)) for size in (257, len(first) + 1)}
    estimate = slow / all_reads(measured) * all_reads(lengths)

    table(f"{source.name}: learning {len(tokens) + 1:,} tokens", [
        {"trainer": "incremental", "merges": len(tokens) - 256, "core seconds": seconds, "how": "measured"},
        {"trainer": "naive", "merges": len(first) - 256, "core seconds": slow, "how": "measured"},
        {"trainer": "naive", "merges": len(tokens) - 256, "core seconds": estimate, "how": "extrapolated"},
    ])
    table("Bytes per token", rows)
    for size in [size for size in sizes if size in (257, 512, 1024, sizes[-1])]:
        tokenizer = of_size(tokens, size)
        ids = tokenizer.encode(args.sentence)
        parts = [tokenizer.decode([i]) for i in ids]
        say(f"{size:>6,} tokens, {len(ids):>3} for the sentence: {'|'.join(parts)}")

    tokenizer = of_size(tokens, len(tokens) + 1)
    (fast_ids, fast), (slow_ids, plain) = timed(tokenizer.encode, val), timed(tokenizer.encode_slowly, val)
    if fast_ids != slow_ids:
        raise AssertionError("both encoders must give the same tokens")
    say(f"encoding {len(val):,} characters: tiktoken {fast:.3f} s, plain Python {plain:.3f} s, {plain / fast:.0f} x")
    file = log.figure(draw(rows), "bytes_per_token")
    log.finish(learn_seconds=seconds, naive_extrapolated=estimate, rows=rows, encode_ratio=plain / fast)
    say(f"drawn in {file}")


if __name__ == "__main__":
    run_program(main)
