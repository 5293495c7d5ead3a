"""How well does a real open model know the text that the small models here are trained on?

    uv run stages run 07 demos/reference.py
    uv run stages run 07 demos/reference.py --model Qwen/Qwen3-0.6B     # where there is a network

The model reads the validation text in windows of 1,024 of its own tokens and is scored like every other model of the
course: nats per character over the whole text, each token but the first predicted once. Nothing is trained.

The number is no fair rung. The model has read trillions of tokens, and this text is on the web many times: its
training set is *contaminated* with our validation set. It says what is possible, not how well the model generalises.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import console, say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

from data import load_data
from hf import DTYPES, load
from train import evaluate


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, a GGUF file or a name on the hub")
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window (default: 1024)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the weights (default: bfloat16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = parser.parse_args(argv)
    device, begin = setup(args.device, 1337), time.perf_counter()
    with console.status(f"opening {args.model}"):
        opened = load(args.model, DTYPES[args.dtype])
    model, tokenizer = opened.model.to(device), opened.tokenizer
    if not 1 <= args.window <= model.config.block_size:
        raise BadInput(f"--window {args.window}: {args.model} takes 1 to {model.config.block_size} tokens")
    data = load_data(args.corpus, tokenizer=tokenizer)
    model.config.block_size = args.window
    log = RunLog(__file__, "reference", vars(args) | {"corpus": data.name})
    with console.status(f"reading {len(data.val):,} tokens"):
        val_loss = data.nats_per_char(evaluate(model, data.val, rows=1))
    params, seconds = sum(p.numel() for p in model.parameters()), time.perf_counter() - begin
    bpb = data.bits_per_byte(val_loss)
    # The ladder's seconds are those of training, and nothing was trained here.
    log.finish(corpus=data.name, params=params, seconds=None, reading=seconds, val_loss=val_loss, val_bpb=bpb)
    say(f"{args.model} on {data.name}: {len(data.val):,} tokens, {1 / data.tokens_per_char:.2f} characters each")
    say(f"validation loss {val_loss:.4f} nats per character, {bpb:.3f} bits per byte, after {seconds:.0f} s")


if __name__ == "__main__":
    run_program(main)
