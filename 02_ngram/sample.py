"""Write text with an n-gram model, one token at a time.

    uv run python sample.py --block-size 6
    uv run python sample.py --corpus names --words --block-size 3 --length 200
"""

import argparse
import itertools

from shared import options
from shared.console import say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch
import torch.nn.functional as F

from data import forget, load_data, windows
from model import KneserNey, ModelConfig


def generate(model, context, boundary: int | None = None, generator=None):
    """Draw tokens without end, each from the model's distribution given the block_size tokens before it.

    context [B, T], T >= block_size: B texts at once. Yields [B], one new token for each text. With a `boundary` token,
    nothing before it is used.
    """
    tokens = context
    while True:
        x = tokens[:, tokens.shape[1] - model.config.block_size:]  # [B, block_size]
        probs = model.probs(x if boundary is None else forget(x, boundary))  # [B, V]
        token = torch.multinomial(probs, 1, generator=generator)  # [B, 1]
        tokens = torch.cat([tokens, token], dim=1)
        yield token[:, 0]


def sample(model, context, length: int, boundary: int | None = None, generator=None):
    """The next `length` tokens of each text: context [B, T] -> [B, length]."""
    steps = generate(model, context, boundary, generator)
    return torch.stack(list(itertools.islice(steps, length)), dim=1)


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--words", action="store_true", help="a word list: no context reaches past a line break")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    parser.add_argument("--length", type=int, default=500, help="tokens to write (default: 500)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, ModelConfig, skip=("add_k",))
    args = parser.parse_args(argv)
    if args.length < 1:
        raise BadInput(f"--length {args.length}: write at least 1 token")
    setup("cpu", args.seed)

    data = load_data(args.corpus, args.words, args.seed)
    config = options.build(ModelConfig, args, vocab_size=len(data.tokenizer))
    x, y = windows(data.train, config.block_size)
    boundary = data.tokenizer.index["\n"] if args.words else None
    model = KneserNey(config).fit(x if boundary is None else forget(x, boundary), y)
    ids = torch.tensor([data.tokenizer.encode(args.prompt)], dtype=torch.long)
    # Before the prompt stands token 0, the line break in most texts, as far back as the model sees.
    context = F.pad(ids, (model.config.block_size, 0))
    say(args.prompt, end="")
    for token in itertools.islice(generate(model, context, boundary), args.length):
        say(data.tokenizer.decode(token), end="")
    say()


if __name__ == "__main__":
    run_program(main)
