"""Many texts at once: what a batch saves, and whether each text is what the model writes when it is alone.

    uv run stages run 08 demos/batching.py                                       # the run "default" of train.py
    uv run stages run 08 demos/batching.py --model smollm2 --dtype float32

To write one token the processor fetches all weights from memory. For a token of each of 32 texts it fetches them once.
The prompts have different lengths, so the shorter ones are filled up on the left, and nobody may look at the filling.
Each text should then be the one that the model writes for this prompt alone. In float32 it is. A batch sums in another
order than a single text does, so in bfloat16 two scores may round to the same number, and another token comes first.

`one by one` and `at once` are tokens written per second, reading the prompts included. `equal` counts the texts that
are the same both ways, `distinct` how many of them there are: texts that are all alike would prove little.
"""

import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared.console import progress, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch

from extras.bench import GREEDY, model_parser, open_model, random_ids
from sample import pad_left, sample


def mixed_prompts(model, texts: int, longest: int) -> list[list[int]]:
    """Prompts of 1 to `longest` random tokens, their lengths at equal distances."""
    return [random_ids(model, P)[0].tolist() for P in torch.linspace(1, longest, texts).long().tolist()]


def compare(model, prompts: list[list[int]], length: int) -> dict:
    """Continue the prompts by `length` likeliest tokens, one after the other and all at once."""
    device, alone = model.tok_emb.weight.device, []
    sample(model, torch.tensor(prompts[:1], device=device), 2, GREEDY)  # the first pass of a process is slower
    start = perf_counter()
    with progress(len(prompts), "one by one") as bar:
        for done, ids in enumerate(prompts, 1):
            alone.append(sample(model, torch.tensor([ids], device=device), length, GREEDY)[0].tolist())
            bar.update(done)
    middle = perf_counter()
    ids, pad = pad_left(prompts, device)
    together = sample(model, ids, length, GREEDY, pad=pad).tolist()
    end, tokens = perf_counter(), len(prompts) * length
    return {
        "texts": len(prompts), "one by one": tokens / (middle - start), "at once": tokens / (end - middle),
        "times as fast": (middle - start) / (end - middle),
        "equal": sum(a == b for a, b in zip(alone, together, strict=True)), "distinct": len(set(map(tuple, alone))),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--texts", type=int, default=32, help="prompts (default: 32)")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest prompt (default: 128)")
    parser.add_argument("--length", type=int, default=64, help="tokens to write of each text (default: 64)")
    args = parser.parse_args(argv)
    for flag in ("texts", "longest", "length"):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag} {getattr(args, flag)}: it must be at least 1")
    device = setup(args.device)
    model, _, name = open_model(args, device, args.longest + args.length)
    log = RunLog(__file__, "batching", vars(args))
    found = compare(model, mixed_prompts(model, args.texts, args.longest), args.length)
    table(f"{name}: prompts of 1 to {args.longest} tokens, {args.length} written after each", [found])
    log.finish(measured=name, **found)


if __name__ == "__main__":
    run_program(main)
