"""Characters, bytes and byte pairs on the same text: why losses per token do not compare, and bits per byte do.

    uv run stages run 06 demos/bits_per_byte.py
    uv run stages run 06 demos/bits_per_byte.py --steps 200 --tokenizers char byte bpe:2048

Every model has the same blocks and takes the same number of steps of the same number of tokens. A byte-pair model
reads several characters per token, so it sees more text in its steps and further back in its window, and it has more
parameters in its embedding. Its loss per token is much higher all the same: naming the next word is harder than naming
the next letter. Divided by the characters that a token stands for, the order is another one.
"""

import math
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

import matplotlib
import torch

from data import batches, load_data
from model import GPT, ModelConfig
from train import TrainConfig, evaluate, make_optimizer, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def kind_and_size(name: str) -> tuple[str, int]:
    """"bpe:512" -> ("bpe", 512), "char" -> ("char", 0). Raises BadInput."""
    kind, _, size = name.partition(":")
    if kind not in ("char", "byte", "bpe") or (kind == "bpe") != size.isdecimal():
        raise BadInput(f"--tokenizers {name}: write char, byte or bpe:SIZE, as in bpe:512")
    return kind, int(size or 0)


def draw(rows: list[dict]):
    """Two panels of bars, one for each unit: the same models in two orders."""
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
    names = [row["tokenizer"] for row in rows]
    for axis, key, colour in zip(axes, ("nats per token", "bits per byte"), ("tab:grey", "tab:blue"), strict=True):
        axis.bar_label(axis.bar(names, [row[key] for row in rows], color=colour), fmt="%.2f", fontsize=8)
        axis.set(title=key, ylim=(0, 1.12 * max(row[key] for row in rows)))
        axis.tick_params(axis="x", labelsize=8)
    axes[0].set_ylabel("validation loss")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--steps", type=int, default=600, help="training steps of each model (default: 600)")
    parser.add_argument("--tokenizers", nargs="+", default=["char", "byte", "bpe:512", "bpe:1024", "bpe:4096"],
                        help="char, byte or bpe:SIZE (default: char byte bpe:512 bpe:1024 bpe:4096)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, ModelConfig)
    args = parser.parse_args(argv)
    kinds = [kind_and_size(name) for name in args.tokenizers]
    config = TrainConfig(steps=args.steps, warmup=args.steps // 10, seed=args.seed)
    setup("cpu")
    log = RunLog(__file__, "bits_per_byte", vars(args))

    rows = []
    with progress(len(kinds) * args.steps, "training") as bar:
        for i, (kind, size) in enumerate(kinds):
            data = load_data(args.corpus, kind, size)
            torch.manual_seed(args.seed)
            model, begin = GPT(options.build(ModelConfig, args, vocab_size=len(data.tokenizer))), time.process_time()
            stream = batches(data.train, model.config.block_size, config.batch_size, config.seed)
            for step, loss in train(model, stream, config, make_optimizer(model, config)):
                bar.update(i * args.steps + step, loss=loss, text=args.tokenizers[i])
            seconds = time.process_time() - begin
            per_token = evaluate(model, data.val, precision=config.precision)
            per_char = data.nats_per_char(per_token)
            rows.append({
                "tokenizer": args.tokenizers[i], "tokens": len(data.tokenizer),
                "params": sum(p.numel() for p in model.parameters()), "chars per token": 1 / data.tokens_per_char,
                "passes": args.steps * config.batch_size * model.config.block_size / len(data.train),
                "nats per token": per_token, "knowing nothing": math.log(len(data.tokenizer)),
                "nats per char": per_char, "bits per byte": data.bits_per_byte(per_char), "core seconds": seconds,
            })
            log.metrics(i, **rows[-1])
    table(f"{data.name}: validation loss after {args.steps} steps of {config.batch_size} windows", rows)
    say("passes: how often the training text was read; knowing nothing: nats per token of equal chances, ln V")
    file = log.figure(draw(rows), "bits_per_byte")
    log.finish(corpus=data.name, rows=rows)
    say(f"drawn in {file}")


if __name__ == "__main__":
    run_program(main)
