"""Write text with an n-gram model, one character at a time.

    uv run python sample.py --block-size 6
    uv run python sample.py --corpus names --words --block-size 3 --length 200
"""

import argparse

from shared import options
from shared.console import say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch
import torch.nn.functional as F

from data import forget, load_data, windows
from model import KneserNey, ModelConfig


def sample(model, context, length: int, boundary: int | None = None, generator=None):
    """Draw `length` tokens, each from the model's distribution given all that was drawn before.

    context [T] with T >= block_size -> the new tokens [length]. With a `boundary` token, nothing before it is used.
    """
    tokens = context
    for _ in range(length):
        x = tokens[None, len(tokens) - model.config.block_size:]  # [1, block_size]
        probs = model.probs(x if boundary is None else forget(x, boundary))[0]  # [V]
        tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)])
    return tokens[len(context):]


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--words", action="store_true", help="a word list: no context reaches past a line break")
    parser.add_argument("--prompt", default="", help="text to continue (default: none)")
    parser.add_argument("--length", type=int, default=500, help="characters to write (default: 500)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, ModelConfig, skip=("add_k",))
    args = parser.parse_args(argv)
    if args.length < 1:
        raise BadInput(f"--length {args.length}: write at least 1 character")
    setup("cpu", args.seed)

    data = load_data(args.corpus, args.words, args.seed)
    config = options.build(ModelConfig, args, vocab_size=len(data.vocab))
    x, y = windows(data.train, config.block_size)
    boundary = data.vocab.index["\n"] if args.words else None
    model = KneserNey(config).fit(x if boundary is None else forget(x, boundary), y)
    # Token 0, the line break in most texts, as far back as the model sees: as if the text had just begun.
    context = F.pad(data.vocab.encode(args.prompt), (config.block_size, 0))
    say(args.prompt + data.vocab.decode(sample(model, context, args.length, boundary)))


if __name__ == "__main__":
    run_program(main)
