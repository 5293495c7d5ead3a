"""What each choice of speed is worth on this machine: bfloat16, attention written out, memory that is kept.

    uv run stages run 06 demos/precision.py
    uv run stages run 06 demos/precision.py --rounds 20 --n-embd 192 --n-head 3 --block-size 128

The variants take turns, a step each, so that whatever else the machine does hits all of them; the medians count. The
allocator's settings hold for a whole process, so they are compared in two that are started one after the other.
Then two models are trained from the same weights on the same batches, one in each precision.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F

import model as stage
from data import batches, load_data
from model import GPT, ModelConfig
from train import TrainConfig, evaluate, gradient, make_optimizer, train

WRITTEN = stage.attention


def fused(q, k, v, dropout: float = 0.0):
    """torch's own kernel, which the stage uses on a GPU only."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


VARIANTS = {  # name: precision, attention
    "bfloat16, written out": ("bfloat16", WRITTEN),
    "bfloat16, fused": ("bfloat16", fused),
    "float32, written out": ("float32", WRITTEN),
    "float32, fused": ("float32", fused),
}
USUAL = "bfloat16, written out"


def step_times(args, vocab_size: int, names, rounds: int) -> dict[str, list[float]]:
    """Median milliseconds of a training step for each variant: on the clock, and of all cores together.

    The first round, which warms up, does not count.
    """
    model = GPT(options.build(ModelConfig, args, vocab_size=vocab_size))
    x = torch.randint(vocab_size, (args.batch_size, args.block_size + 1))
    times = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name in names:
            precision, stage.attention = VARIANTS[name]
            config = TrainConfig(batch_size=args.batch_size, micro_batch=args.batch_size, precision=precision)
            optimizer = make_optimizer(model, config)
            clock, cores = time.perf_counter(), time.process_time()
            gradient(model, x[:, :-1], x[:, 1:], config)
            optimizer.step()
            optimizer.zero_grad()
            times[name].append((time.perf_counter() - clock, time.process_time() - cores))
    stage.attention = WRITTEN
    return {
        name: [1000 * statistics.median(part) for part in zip(*values[1:], strict=True)]
        for name, values in times.items()
    }


def row(name: str, times: list[float], usual: list[float]) -> dict:
    """A line of the table: milliseconds, and how many times the usual variant's."""
    return {"variant": name, "ms": times[0], "ratio": times[0] / usual[0],
            "core ms": times[1], "ratio of core ms": times[1] / usual[1]}


def without_settings(argv: list[str]) -> list[float]:
    """The usual step in a process that leaves the allocator as it is."""
    command = [sys.executable, __file__, *argv, "--plain-allocator"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    return json.loads(done.stdout.splitlines()[-1])


def losses(args, data) -> dict[str, float]:
    """Validation loss in float32 after the same training in either precision."""
    found = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(args.seed)
        model = GPT(options.build(ModelConfig, args, vocab_size=len(data.tokenizer)))
        config = TrainConfig(steps=args.steps, warmup=args.steps // 10, batch_size=args.batch_size,
                             precision=precision, seed=args.seed)
        stream = batches(data.train, args.block_size, config.batch_size, config.seed)
        for _ in train(model, stream, config, make_optimizer(model, config)):
            pass
        found[precision] = evaluate(model, data.val)
    return found


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--rounds", type=int, default=30, help="steps timed of each variant (default: 30)")
    parser.add_argument("--batch-size", type=int, default=32, help="windows in a batch (default: 32)")
    parser.add_argument("--steps", type=int, default=150, help="training steps in each precision (default: 150)")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--plain-allocator", action="store_true", help="only time the usual step, without settings")
    options.add(parser, ModelConfig)
    args = parser.parse_args(argv)
    if min(args.rounds, args.batch_size, args.steps) < 1:
        raise BadInput(f"--rounds {args.rounds} --batch-size {args.batch_size} --steps {args.steps}: at least 1 each")
    if args.plain_allocator:
        torch.manual_seed(args.seed)
        print(json.dumps(step_times(args, 65, [USUAL], args.rounds)[USUAL]))
        return
    setup("cpu", args.seed)
    log = RunLog(__file__, "precision", vars(args))
    data = load_data(args.corpus)

    times = step_times(args, 65, list(VARIANTS), args.rounds)
    rows = [row(name, found, times[USUAL]) for name, found in times.items()]
    kept = step_times(args, 65, [USUAL], args.rounds)[USUAL]
    plain = without_settings(argv)
    rows += [row("alone", kept, kept), row("alone, plain allocator", plain, kept)]
    table(f"A training step of {args.batch_size} x {args.block_size} tokens, {torch.get_num_threads()} threads", rows)
    found = losses(args, data)
    say(f"validation loss after {args.steps} steps: float32 {found['float32']:.4f}, bfloat16 {found['bfloat16']:.4f}")
    log.finish(corpus=data.name, rows=rows, losses=found)


if __name__ == "__main__":
    run_program(main)
