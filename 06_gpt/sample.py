"""Write text with a trained model, one token at a time.

    uv run python train.py && uv run python sample.py
    uv run python sample.py --prompt "ROMEO:" --temperature 0.8 --top-k 10
"""

import argparse
import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass

from shared import options
from shared.console import say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import run_folder

import torch
import torch.nn.functional as F

from checkpoint import load


@dataclass
class SampleConfig:
    """How to choose from the model's distribution. Raises BadInput for a choice that leaves nothing to draw."""

    temperature: float = 1.0  # below 1 the likely gets likelier, above 1 less so; 0 always takes the likeliest
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the fewest likeliest tokens that together have probability p

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:  # so that nan is refused as well
            raise BadInput(f"temperature is {self.temperature}: it must be 0 or more, and finite")
        if self.top_k is not None and self.top_k < 1:
            raise BadInput(f"top_k is {self.top_k}: it must be at least 1, or none to draw from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p}: it must be above 0 and at most 1, or none to draw from all tokens")


def filter_logits(logits, config: SampleConfig):
    """Apply temperature, then top-k, then top-p: scores [..., V] -> [..., V] with -inf for what may not be drawn.

    Worked out in float64: a sum of many small probabilities must still tell on which side of p it lies. Of tokens that
    tie, the one with the lower id counts as the likelier, so exactly k are kept; p = 1 keeps every token.
    Top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020).
    """
    # 1. temperature; at 0 the limit, which keeps the likeliest token only
    top_k = 1 if config.temperature == 0 else config.top_k
    logits = logits.double() / (config.temperature or 1.0)
    # 2. top-k
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[..., top_k:] = -torch.inf
    # 3. top-p: a token stays if those before it do not reach p yet, so the one that crosses p stays as well
    if config.top_p is not None and config.top_p < 1:
        probs = F.softmax(ranked, dim=-1)
        before = probs.cumsum(dim=-1) - probs
        ranked = ranked.masked_fill(before >= config.top_p, -torch.inf)
    return torch.empty_like(logits).scatter(-1, order, ranked)  # back from rank order to token order


@contextmanager
def evaluation(model):
    """Inside, the model is in evaluation mode: no answer depends on chance or on neighbours. After, it is as found."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def generate(model, context, config: SampleConfig, generator=None):
    """Draw tokens without end, each from the model's distribution given the last block_size before it.

    context [B, T], T >= 1: B texts at once. Yields [B], one new token for each text.
    """
    tokens = context
    while True:
        with evaluation(model):
            logits = model(tokens[:, -model.config.block_size:])[:, -1]  # [B, V]: the last position's answer
        probs = F.softmax(filter_logits(logits.cpu(), config), dim=-1)
        token = torch.multinomial(probs, 1, generator=generator).to(tokens.device)  # [B, 1]
        tokens = torch.cat([tokens, token], dim=1)
        yield token[:, 0]


def sample(model, context, length: int, config: SampleConfig, generator=None):
    """The next `length` tokens of each text: context [B, T] -> [B, length]."""
    steps = generate(model, context, config, generator)
    return torch.stack(list(itertools.islice(steps, length)), dim=1)


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="default", help="the run to load, a folder under out/ (default: default)")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    parser.add_argument("--length", type=int, default=500, help="tokens to write (default: 500)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, SampleConfig)
    args = parser.parse_args(argv)
    if not args.prompt:
        raise BadInput("--prompt is empty: give it at least one character")
    if args.length < 1:
        raise BadInput(f"--length {args.length}: write at least 1 token")
    config = options.build(SampleConfig, args)
    device = setup(args.device, args.seed)

    model, tokenizer, *_ = load(run_folder(__file__, args.name) / "model.pt", device)
    ids = torch.tensor([tokenizer.encode(args.prompt)], dtype=torch.long, device=device)
    say(args.prompt, end="")
    part = []  # tokens that do not make whole characters yet: one of several bytes may be cut between two tokens
    for token in itertools.islice(generate(model, ids, config), args.length):
        part.append(token.item())
        if not (text := tokenizer.decode(part)).endswith("\ufffd"):
            say(text, end="")
            part.clear()
    say(tokenizer.decode(part))


if __name__ == "__main__":
    run_program(main)
