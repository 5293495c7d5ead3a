"""How fast a model reads and writes, and what holds it up: times, memory, and the roofline of this machine.

    uv run stages run 08 extras/bench.py                                         # the run "default" of train.py
    uv run stages run 08 extras/bench.py --model smollm2 --dtype bfloat16
    uv run stages run 08 extras/bench.py --model smollm2 --dtype bfloat16 --peers      # beside `transformers`

Why does reading 512 tokens take less time than writing twenty? A pass needs two things of the machine: FLOPs
(additions and multiplications) and bytes from memory. For SmolLM2, 134.5 million parameters of 2 bytes, and T tokens:

    FLOPs:  each parameter multiplies and adds once for each token       2 x 134.5 million x T
    bytes:  each parameter is fetched once for all tokens together       2 x 134.5 million
    intensity, FLOPs for each byte that was fetched                      T

(`work` adds what attention costs, and the head's scores for the last token only.) The machine has an intensity of its
own, its FLOPs per second over its bytes per second. A pass of a lower one waits for memory: it is memory-bound, and
takes the same time with a few tokens more. A pass of a higher one waits for the arithmetic: it is compute-bound.
Prefill is a pass over many tokens. Decode is a pass over one, unless several texts are written at once. In
`roofline.png` two straight lines are the most that the machine can do at each intensity, and the passes lie below. A
small model lies far below: its decode waits for Python, which gives the orders. Williams, Waterman & Patterson,
"Roofline: An Insightful Visual Performance Model for Multicore Architectures" (2009).

Columns of the tables: `first` is the time to the first token, the prefill included. `p50` and `p99` are times from one
token to the next: half of them, and 99 of 100, are not longer. `peak` is the most memory that the process ever held.
"""

import argparse
import itertools
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import torch
from matplotlib.figure import Figure
from torch import nn

import checkpoint
import hf
from cache import Cache
from extras.decoder import Decoder
from sample import SampleConfig, evaluation, generate, timed

PREFILL = (8, 32, 128, 512)  # tokens of one text that are read in a pass
DECODE = (1, 2, 4, 8, 16, 32)  # texts that get one token each in a pass
GREEDY = SampleConfig(temperature=0)


def position_bytes(model) -> int:
    """Bytes that the cache keeps for one position of one text: a key and a value of K D numbers in each layer."""
    c = model.config
    return 2 * c.n_layer * c.n_kv_head * c.head_dim * model.tok_emb.weight.element_size()


def work(model, B: int, T: int, S: int) -> tuple[int, int]:
    """FLOPs and bytes of a pass over T new tokens of each of B texts, which then have S positions each.

    FLOPs: 2 for each parameter of a matrix and token, but the head scores the last token only. Each query meets all S
    keys, those of the future too, which are hidden afterwards: 2 D for the product, 2 D for the average of the values.
    Bytes: all matrices once, and the cache of every text once. Vectors between the layers stay in the processor.
    """
    c, size = model.config, model.tok_emb.weight.element_size()
    inside = sum(layer.weight.numel() for layer in model.blocks.modules() if isinstance(layer, nn.Linear))
    head = model.head.weight.numel()
    flops = 2 * B * (T * inside + head) + 4 * B * T * S * c.n_layer * c.n_head * c.head_dim
    return flops, (inside + head) * size + B * S * position_bytes(model)


def quickest(run, device, after=lambda: None, seconds: float = 0.3) -> float:
    """Seconds of the quickest of at least three runs. Whatever else the machine does can only make a run slower.

    `after` each run something is put back in order, off the clock.
    """
    times, end = [], perf_counter() + seconds
    while len(times) < 4 or perf_counter() < end:
        start = perf_counter()
        run()
        if device.type != "cpu":  # a GPU is still at work when Python goes on
            getattr(torch, device.type).synchronize()
        times.append(perf_counter() - start)
        after()
    return min(times[1:])  # the first one takes memory from the system


def bandwidth(device, size: int = 2**28) -> float:
    """Bytes per second from memory: the better of a copy, which reads and writes, and a matrix-vector product.

    `size` bytes are many times what the processor's caches hold. The numbers are written first: pages that were never
    written to are all one page of zeros, and that one would be read from a cache.
    """
    matrix = torch.ones(1024, size // 4096, device=device)  # float32
    other, vector = torch.ones_like(matrix), torch.ones(matrix.shape[1], device=device)
    copied = 2 * matrix.nbytes / quickest(lambda: other.copy_(matrix), device)
    return max(copied, matrix.nbytes / quickest(lambda: torch.mv(matrix, vector), device))


def flop_rate(dtype, device) -> float:
    """FLOPs per second in a product of two large square matrices: n^2 numbers, each a sum of n products."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / quickest(lambda: a @ b, device)


def roof(intensity: float, speed: float, rate: float) -> float:
    """The most FLOPs per second that a pass can reach: `speed` bytes and `rate` FLOPs per second are the machine's."""
    return min(rate, intensity * speed)


def crossing(speed: float, rate: float, size: int) -> float:
    """The tokens in a pass from which on the arithmetic takes longer than fetching weights of `size` bytes."""
    return rate / speed * size / 2  # a weight does 2 FLOPs for each token


def pass_seconds(model, B: int, T: int, S: int) -> float:
    """Seconds of a pass over T new tokens of each of B texts, which then have S positions each."""
    device = model.tok_emb.weight.device
    cache = Cache(model, B, most=S)
    cache.advance(torch.arange(S - T, device=device)[None])  # its zeros are read like any other numbers
    tokens, lengths = torch.zeros(B, T, dtype=torch.long, device=device), cache.lengths
    return quickest(lambda: model(tokens, cache, last=1), device, lambda: cache.rewind(lengths))


def points(model, context: int, speed: float, rate: float) -> list[dict]:
    """A row for each pass of PREFILL and DECODE, the latter with `context` positions."""
    passes = [("prefill", 1, T, T) for T in PREFILL] + [("decode", B, 1, context) for B in DECODE]
    rows = []
    with progress(len(passes), "passes") as bar, torch.no_grad(), evaluation(model):
        for done, (phase, B, T, S) in enumerate(passes, 1):
            (flops, fetched), seconds = work(model, B, T, S), pass_seconds(model, B, T, S)
            best = roof(flops / fetched, speed, rate)
            rows.append({
                "phase": phase, "texts": B, "tokens each": T, "GFLOPs": flops / 1e9, "MB": fetched / 1e6,
                "FLOPs/byte": flops / fetched, "bound by": "memory" if best < rate else "compute",
                "ms": 1e3 * seconds, "tokens/s": B * T / seconds, "GFLOPs/s": flops / seconds / 1e9,
                "of the roof": flops / seconds / best,
            })  # fmt: skip
            bar.update(done)
    return rows


def draw(rows: list[dict], speed: float, rate: float) -> Figure:
    """The roofline of the machine, and the passes under it."""
    fig = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = fig.subplots()
    ridge = rate / speed
    lowest, highest = (pick(row["FLOPs/byte"] for row in rows) for pick in (min, max))
    line = [min(lowest, ridge) / 2, ridge, 2 * max(highest, ridge)]
    axes.plot(line, [roof(x, speed, rate) / 1e9 for x in line], color="black", lw=1)
    axes.axvline(ridge, color="grey", lw=0.8, ls=":")
    for phase, label in (("prefill", "prefill, tokens of one text"), ("decode", "decode, a token of so many texts")):
        found = [row for row in rows if row["phase"] == phase]
        axes.plot(*zip(*((row["FLOPs/byte"], row["GFLOPs/s"]) for row in found), strict=True), "o", label=label)
        for row in found:
            axes.annotate(row["texts"] * row["tokens each"], (row["FLOPs/byte"], row["GFLOPs/s"]), fontsize=8,
                          xytext=(4, -10), textcoords="offset points")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs for each byte that is fetched", ylabel="GFLOPs per second",
             title=f"{speed / 1e9:.0f} GB/s, {rate / 1e9:.0f} GFLOPs/s")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return fig


def percentile(values: list[float], p: float) -> float:
    """The value that p percent are not above, on a straight line between two neighbours: [1, 2, 4], 75 -> 3."""
    values = sorted(values)
    place = (len(values) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def figures(runs: list[list[float]], prompt: int) -> dict:
    """Times and speeds of one text, from the seconds of each step of several runs: the prefill, then every decode."""
    first, between = percentile([run[0] for run in runs], 50), [each for run in runs for each in run[1:]]
    return {
        "first, ms": 1e3 * first, "p50, ms": 1e3 * percentile(between, 50), "p99, ms": 1e3 * percentile(between, 99),
        "prefill, tokens/s": prompt / first, "decode, tokens/s": len(between) / sum(between),
    }  # fmt: skip


def peak_bytes(device) -> int | None:
    """The most memory that was taken since the process began: on a GPU by tensors, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_once(model, ids, length: int) -> tuple[list[float], list[int]]:
    """Continue ids [1, P] by `length` likeliest tokens: the seconds of each step, and the tokens."""
    seconds = []
    steps = model.generate(ids, GREEDY) if isinstance(model, Decoder) else generate(model, ids, GREEDY)
    steps = itertools.islice(steps, length)
    return seconds, [token.item() for token in timed(steps, seconds)]


def latency(model, prompts: list[int], length: int, rounds: int) -> list[dict]:
    """A row for each length of a prompt, the shortest first: `peak` never falls."""
    device, rows = model.tok_emb.weight.device, []
    write_once(model, random_ids(model, min(prompts)), 2)  # the first pass of a process is slower
    with progress(len(prompts) * rounds, "latency") as bar:
        for P in sorted(prompts):
            runs = []
            for _ in range(rounds):
                runs.append(write_once(model, random_ids(model, P), length)[0])
                bar.update(len(rows) * rounds + len(runs))
            peak = peak_bytes(device)
            rows.append({"prompt": P, **figures(runs, P), "cache, MB": (P + length) * position_bytes(model) / 1e6,
                         "peak, MB": None if peak is None else peak / 1e6})  # fmt: skip
    return rows


def random_ids(model, P: int):
    """A prompt of P tokens, [1, P]: how long a pass takes does not depend on what it reads."""
    return torch.randint(model.config.vocab_size, (1, P), device=model.tok_emb.weight.device)


class Ticks:
    """A streamer of `transformers`, which it hands the prompt and then each token: when that happened."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(perf_counter())

    def end(self):
        pass


def open_peer(model, tokenizer):
    """The same weights in `transformers`, by way of a folder. Raises BadInput where it is not installed."""
    if find_spec("transformers") is None:
        raise BadInput("--peers needs the package transformers, which is missing: run uv sync --all-packages")
    transformers = import_module("transformers")  # only for this comparison; it takes seconds
    transformers.utils.logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        place, like = hf.export(model, tokenizer, Path(folder, "model")), model.tok_emb.weight
        theirs = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=like.dtype).to(like.device).eval()
    theirs.generation_config.eos_token_id = None  # it writes as many tokens as it is asked for, like ours
    theirs.generation_config.pad_token_id = 0
    return theirs


def peers(model, theirs, context: int, rounds: int) -> tuple[list[dict], bool]:
    """Rows for our model, its decoder and its peer, which take turns, and whether all wrote the same.

    The last quarter of `context` tokens is written, the rest is the prompt.
    """
    length = max(2, context // 4)
    ids, same = random_ids(model, context - length), True
    ours = {"sample.py": model, "decoder.py": Decoder(model)}
    runs = {name: [] for name in (*ours, "transformers")}
    with progress(rounds, "peers") as bar:
        for turn in range(-1, rounds):  # one for nothing: the first is slower
            wrote = {name: write_once(each, ids, length) for name, each in ours.items()}
            clock = Ticks()
            written = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, use_cache=True,
                streamer=clock,
            )  # fmt: skip
            same = same and all(written[0, ids.shape[1]:].tolist() == tokens for _, tokens in wrote.values())
            if turn >= 0:
                for name, (seconds, _) in wrote.items():
                    runs[name].append(seconds)
                runs["transformers"].append([b - a for a, b in itertools.pairwise(clock.times)])
                bar.update(turn + 1)
    return [{"by": name, **figures(each, ids.shape[1])} for name, each in runs.items()], same


def model_parser(description: str) -> options.Parser:
    """A parser with the flags that name a model."""
    parser = options.Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="smollm2, a folder, a GGUF file or a name on the hub (default: a run)")
    parser.add_argument("--name", default="default", help="the run of train.py to load (default: default)")
    choices = ["auto", *hf.DTYPES]
    parser.add_argument("--dtype", choices=choices, default="auto", help="type of the weights (default: as stored)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    return parser


def open_model(args, device, needed: int):
    """The model that the flags name, with room for `needed` positions, its tokenizer, and what to call it.

    Raises BadInput where there is no such model.
    """
    dtype = hf.DTYPES.get(args.dtype)
    if args.model is None:
        model, tokenizer, _ = checkpoint.load(run_folder(__file__, args.name) / "model.pt")
        model = model.to(dtype)
    else:
        opened = hf.load(args.model, dtype)
        model, tokenizer = opened.model, opened.tokenizer
    # Caches are as long as this says. A model that was trained on less writes nonsense, and as fast.
    model.config = replace(model.config, block_size=max(needed, model.config.n_sink + (model.config.window or 0)))
    name = f"{args.model or args.name}, {str(model.tok_emb.weight.dtype).removeprefix('torch.')}"
    return model.to(device), tokenizer, name


def main(argv: list[str] | None = None) -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 128, 512], help="their lengths, in tokens")
    parser.add_argument("--length", type=int, default=64, help="tokens to write (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each text is written (default: 3)")
    parser.add_argument("--context", type=int, default=256, help="positions of each text in decode (default: 256)")
    parser.add_argument("--peers", action="store_true", help="only compare with transformers, in turns")
    args = parser.parse_args(argv)
    for flag, least in {"length": 2, "rounds": 1, "context": 8}.items():
        if getattr(args, flag) < least:
            raise BadInput(f"--{flag} {getattr(args, flag)}: it must be at least {least}")
    if min(args.prompts) < 1:
        raise BadInput(f"--prompts {min(args.prompts)}: a prompt has at least 1 token")
    device = setup(args.device)
    needed = max(*PREFILL, args.context, *args.prompts) + args.length
    model, tokenizer, name = open_model(args, device, needed)
    log, dtype, found = RunLog(__file__, "bench", vars(args)), model.tok_emb.weight.dtype, {}

    if args.peers:
        found["peers"], found["same"] = peers(model, open_peer(model, tokenizer), args.context, args.rounds)
        table(f"{name}: {args.context} tokens, three quarters of them the prompt", found["peers"])
        *ours, theirs = (row["decode, tokens/s"] for row in found["peers"])
        found["faster"] = [speed / theirs for speed in ours]
        say(f"decode is {ours[0] / theirs:.2f} and {ours[1] / theirs:.2f} times as fast as transformers', "
            f"the texts are {'equal' if found['same'] else 'different'}")
    else:
        found["latency"] = latency(model, args.prompts, args.length, args.rounds)
        table(f"{name}: one text, {args.length} tokens written", found["latency"])
        speed, rate, size = bandwidth(device), flop_rate(dtype, device), dtype.itemsize
        found |= {"bandwidth": speed, "flop_rate": rate, "passes": points(model, args.context, speed, rate)}
        table(f"{name}: passes, decode with {args.context} positions in each text", found["passes"])
        say(f"this machine: {speed / 1e9:.1f} GB/s, {rate / 1e9:,.0f} GFLOPs/s, so {rate / speed:.1f} FLOPs for a byte")
        say(f"a pass over fewer than {crossing(speed, rate, size):.0f} tokens waits for weights of {size} bytes")
        say(f"figure: {log.figure(draw(found['passes'], speed, rate), 'roofline')}")
    log.finish(measured=name, **found)


if __name__ == "__main__":
    run_program(main)
