"""Write text with a trained model, one token at a time.

    uv run python train.py && uv run python sample.py
    uv run python sample.py --prompt "ROMEO:" --temperature 0.8 --top-k 10
    uv run python sample.py --prompt "ROMEO:" "O, what a day" "Speak" --length 100     # a batch
    uv run python sample.py --window 60 --sinks 4 --length 10000            # far beyond block_size, in constant memory

It works in two phases. Prefill reads the prompt, many tokens in one pass: the processor multiplies as fast as it can.
Decode writes one token in a pass, and for each has to fetch all weights from memory: the processor waits for them.
"""

import argparse
import itertools
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

from shared import options
from shared.console import say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import run_folder

import torch
import torch.nn.functional as F

from cache import Cache
from checkpoint import load

CHUNK = 256  # tokens of a prompt that are read in one pass; more take more memory and hardly less time


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
    if top_k is None and config.top_p in (None, 1):
        return logits  # sorting a large vocabulary takes longer than a layer of the model
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


def draw(logits, config: SampleConfig, generator=None):
    """One token for each row of scores [..., V] -> [...]. At temperature 0 the likeliest, of several the first."""
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    probs = F.softmax(filter_logits(logits, config), dim=-1)
    return torch.multinomial(probs.view(-1, probs.shape[-1]), 1, generator=generator).view(probs.shape[:-1])


@contextmanager
def evaluation(model):
    """Inside, the model is in evaluation mode: no answer depends on chance or on neighbours. After, it is as found."""
    # All of this visits every layer, which for each token is too often: a model in evaluation mode is left alone.
    modes = [(module, module.training) for module in model.modules()] if model.training else []
    if modes:
        model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def pad_left(prompts: list[list[int]], device=None):
    """Prompts of any lengths >= 1 as one batch: ids [B, T], and how many of each row's are padding [B].

    The padding stands on the left, so that all prompts end in the last column. [[5, 6, 7], [8]] becomes
    [[5, 6, 7], [0, 0, 8]] and [0, 2]. Token 0 fills up: nobody looks at it.
    """
    T = max(map(len, prompts))
    pad = torch.tensor([T - len(ids) for ids in prompts], device=device)
    return torch.tensor([[0] * (T - len(ids)) + ids for ids in prompts], device=device), pad


@torch.no_grad()
def prefill(model, context, cache, pad=None):
    """Read context [B, T] into the cache, as many tokens in a pass as it takes: the scores of what comes next, [B, V].

    Raises BadInput for a prompt that is longer than the context, unless the model looks through a window anyhow.
    """
    B, T = context.shape
    pad = torch.zeros(B, dtype=torch.long, device=context.device) if pad is None else pad
    longest = T - int(pad.min())
    if longest > model.config.block_size and model.config.window is None:
        raise BadInput(f"a prompt of {longest} tokens, and the model looks back over {model.config.block_size}: "
                       "shorten it, or give the model a window")
    for start in range(0, T, cache.most):
        part = context[:, start:start + cache.most]
        logits = model(part, cache, (pad - start).clamp(0, part.shape[1]), last=1)
    return logits[:, -1]


@torch.no_grad()
def generate(model, context, config: SampleConfig, generator=None, pad=None, stop=()):
    """Draw tokens, each from the model's distribution given those before it, until every text has drawn one of `stop`.

    context [B, T], T >= 1: B texts at once, of which the first pad [B] tokens are padding. Yields [B], one new token
    for each text, and -1 for a text that is over. Once block_size positions are full, the oldest are forgotten.
    """
    # The room for a chunk beside a short window is looked through again for each token: a quarter of it is enough.
    most = min(CHUNK, context.shape[1], max(64, model.config.span // 4))
    cache = Cache(model, len(context), most)
    stop = torch.tensor(list(stop), dtype=torch.long)
    over = torch.zeros(len(context), dtype=torch.bool)
    with evaluation(model):
        logits = prefill(model, context, cache, pad)
    while True:
        token = draw(logits.cpu(), config, generator)[:, None]  # [B, 1]
        yield token[:, 0].masked_fill(over, -1)
        over = over | torch.isin(token[:, 0], stop)
        if over.all():
            return
        with evaluation(model):
            logits = model(token.to(context.device), cache)[:, -1]  # [B, V]


def sample(model, context, length: int, config: SampleConfig, generator=None, pad=None, stop=()):
    """The next tokens of each text, -1 behind its end: context [B, T] -> [B, at most length]."""
    steps = generate(model, context, config, generator, pad, stop)
    return torch.stack(list(itertools.islice(steps, length)), dim=1)


def timed(steps, seconds: list):
    """Pass on what `steps` yields, and append to `seconds` how long each took: first the prefill, then every decode."""
    start = time.perf_counter()
    for step in steps:
        seconds.append(time.perf_counter() - start)
        yield step
        start = time.perf_counter()


def speeds(seconds: list, prompt: int, decoded: int) -> str:
    """The two phases in one line, from the seconds of each step, the prompt's tokens and those after the first step."""
    first, others = seconds[0], seconds[1:]
    told = f"prefill: {prompt:,} tokens in {first:.3f} s, {prompt / first:,.0f} tokens/s"
    if others:
        spent = sum(others)
        told += f"; decode: {decoded:,} tokens in {spent:.2f} s, {decoded / spent:,.0f} tokens/s"
    return told


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="default", help="the run to load, a folder under out/ (default: default)")
    parser.add_argument("--prompt", nargs="+", default=["\n"], help="texts to continue (default: a line break)")
    parser.add_argument("--length", type=int, default=500, help="tokens to write (default: 500)")
    parser.add_argument("--stop", help="a character that ends a text")
    parser.add_argument("--window", type=int, help="newest tokens that each looks at (default: the model's own)")
    parser.add_argument("--sinks", type=int, help="first tokens that all look at (default: the model's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, SampleConfig)
    args = parser.parse_args(argv)
    if not all(args.prompt):
        raise BadInput("--prompt is empty: give it at least one character")
    if args.length < 1:
        raise BadInput(f"--length {args.length}: write at least 1 token")
    config = options.build(SampleConfig, args)
    device = setup(args.device, args.seed)

    model, tokenizer, *_ = load(run_folder(__file__, args.name) / "model.pt", device)
    look = {"window": args.window, "n_sink": args.sinks}
    model.config = replace(model.config, **{name: value for name, value in look.items() if value is not None})
    stop = tokenizer.encode(args.stop) if args.stop else []
    if len(stop) > 1:
        raise BadInput(f"--stop {args.stop!r} is {len(stop)} tokens: give one")
    ids, pad = pad_left([tokenizer.encode(prompt) for prompt in args.prompt], device)
    seconds, texts = [], [[] for _ in args.prompt]
    steps = itertools.islice(generate(model, ids, config, pad=pad, stop=stop), args.length)
    part = []  # tokens that do not make whole characters yet: one of several bytes may be cut between two tokens
    for tokens in timed(steps, seconds):
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text += [] if token < 0 else [token]
        if len(texts) == 1:
            if len(seconds) == 1:  # the prompt was read, and not refused
                say(args.prompt[0], end="")
            part.append(tokens.item())
            if not (text := tokenizer.decode(part)).endswith("\ufffd"):
                say(text, end="")
                part.clear()
    if len(texts) == 1:
        say(tokenizer.decode(part))
    else:
        for prompt, text in zip(args.prompt, texts, strict=True):
            say(f"--- {prompt}{tokenizer.decode(text)}")
    decoded = sum(len(text) - 1 for text in texts)  # the first token of each text comes with the prefill
    print(speeds(seconds, int(ids.numel() - pad.sum()), decoded), file=sys.stderr)  # stdout is the text's alone


if __name__ == "__main__":
    run_program(main)
