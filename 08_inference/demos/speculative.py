"""Speculative decoding measured: how many drafted tokens are taken, and how much sooner the text is there.

    uv run stages run 08 demos/speculative.py
    uv run stages run 08 demos/speculative.py --drafted 8 --tokens 48 --rounds 1     # a first impression

First the reason why it works: what a pass over several tokens costs, when a pass over one costs 1.

Then SmolLM2 writes at temperature 0: it repeats a text, it corrects one, it explains something (its answer is not in
the question), and it goes on from a scene of Shakespeare's. Drafts come by looking up the newest tokens in the text so
far; for Shakespeare also from counts of the training text. Last, the stage's own model draws characters at
`--temperature`. It is the run `--name`, or a model that is trained here where there is no such run. Its drafts come
from the text so far, from counts, and from a smaller model, which is trained here.

Columns of the table:

- taken: the share of the drafted tokens that the model accepted.
- tokens a pass: 1 would be plain decode.
- drafting: the share of the time that went into making drafts.
- ms a token: without the prefill, which is the same with a draft and without.
- speed-up: against plain decode. All take turns in each round; the median over the rounds is shown.
- alike: how many tokens the text has in common with plain decode's before the first that differs. In exact arithmetic
  all. In bfloat16 the best two scores are often equal but for rounding, and a pass over nine tokens rounds otherwise
  than a pass over one. At temperatures above 0 the texts are drawn, and are not compared.
"""

import argparse
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import console, progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import torch
from matplotlib.figure import Figure

import checkpoint
from cache import Cache
from data import batches, encode, load_data, split
from extras.speculative import Counts, LookUp, ModelDraft, NGramDraft, speculate
from hf import chat, load
from model import GPT, ModelConfig
from sample import SampleConfig, evaluation, generate, prefill
from train import TrainConfig, make_optimizer, train

GARDENER = (
    "The old gardener walks to the river every morning, fills two buckets with cold water, and carries them back to "
    "his roses. The roses are red, white and yellow, and they bloom from May until October. In winter he sits by the "
    "fire and reads about other gardens."
)
TEXTS = {
    "repeats": f"Repeat the following text exactly, word for word:\n\n{GARDENER}",
    "corrects": "Correct the spelling of this text and change nothing else:\n\n"
                + GARDENER.replace("every", "evry").replace("river", "rivver").replace("yellow", "yelow"),
    "explains": "Explain how photosynthesis works.",
}  # fmt: skip
SIZES = (1, 2, 3, 5, 9)  # tokens in a pass: one, or with 1, 2, 4 and 8 drafted ones
ORDERS = {"byte pairs": 3, "characters": 6}  # tokens of an n-gram: with more, counts get no better on a text this short


class Timed:
    """A draft that adds up the seconds it takes."""

    def __init__(self, draft):
        self.draft, self.vocab_size, self.seconds = draft, draft.vocab_size, 0.0

    def propose(self, tokens, n):
        start = time.perf_counter()
        try:
            return self.draft.propose(tokens, n)
        finally:
            self.seconds += time.perf_counter() - start


@dataclass
class Job:
    """A text to write, and the drafts that it is written with."""

    model: GPT
    name: str
    ids: list[int]  # the prompt
    drafts: dict  # {name: a function that makes one}
    config: SampleConfig
    stop: set = frozenset()


@torch.no_grad()
def pass_costs(model, ids: list[int], rounds: int) -> dict[int, float]:
    """Median milliseconds of a pass over 1, 2, ... tokens that follow `ids`. They take turns; the first is no count."""
    cache, times = Cache(model, most=max(*SIZES, len(ids))), {size: [] for size in SIZES}
    with evaluation(model):
        prefill(model, torch.tensor([ids]), cache)
        for _ in range(rounds + 1):
            for size in SIZES:
                start = time.perf_counter()
                model(torch.tensor([[ids[-1]] * size]), cache)
                times[size].append(1000 * (time.perf_counter() - start))
                cache.rewind(cache.lengths - size)
    return {size: median(found[1:]) for size, found in times.items()}


def decode(steps, length: int) -> tuple[list[int], float]:
    """Up to `length` tokens of a generator, and the seconds from the first of them to the last."""
    steps = itertools.islice(steps, length)
    text, start = [int(next(steps))], time.perf_counter()
    text += map(int, steps)
    return text, time.perf_counter() - start


def alike(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def compare(job: Job, args, tick) -> list[dict]:
    """A row for plain decode and for each draft and number of tokens drafted; `tick(text)` after each text."""
    kinds = [(None, 0), *itertools.product(job.drafts, args.drafted)]
    found = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for draft, n in kinds:
            counts, maker = Counts(), Timed(job.drafts[draft]()) if draft else None
            if draft:
                steps = speculate(job.model, job.ids, maker, n, job.config, stop=job.stop, counts=counts)
            else:
                steps = generate(job.model, torch.tensor([job.ids]), job.config, stop=job.stop)
            text, seconds = decode(steps, args.tokens)
            if not draft:
                plain, plain_each = text, seconds / max(1, len(text) - 1)
            each = seconds / max(1, len(text) - 1)
            found[draft, n].append({
                "taken": counts.accepted / counts.drafted if counts.drafted else None,
                "tokens a pass": 1 + counts.accepted / counts.passes if counts.passes else 1.0,
                "drafting": maker.seconds / seconds if maker and seconds else 0.0,
                "ms a token": 1000 * each, "speed-up": plain_each / each if each else 1.0,
                "alike": alike(text, plain) if job.config.temperature == 0 else None, "tokens": len(text),
            })
            tick(f"{job.name}, {draft or 'plain'} {n or ''}")
    rows = []
    for (draft, n), runs in found.items():
        row = {"text": job.name, "draft": draft or "none", "n": n}
        for key in runs[0]:
            values = [run[key] for run in runs if run[key] is not None]
            row[key] = (min if key in ("alike", "tokens") else median)(values) if values else None
        rows.append(row)
    return rows


def fit(data, config: ModelConfig, steps: int, what: str):
    """A model trained on the text with the stage's recipe, in fewer steps."""
    torch.manual_seed(0)
    model, recipe = GPT(config), TrainConfig(steps=steps, warmup=max(1, steps // 10), seed=0)
    stream = batches(data.train, config.block_size, recipe.batch_size, recipe.seed)
    with progress(steps, f"training {what}") as bar:
        for step, loss in train(model, stream, recipe, make_optimizer(model, recipe)):
            bar.update(step, loss=loss)
    return model.eval()


def own(args):
    """The stage's own model and its data: the run `--name`, or trained here where there is none."""
    path = run_folder(__file__, args.name) / "model.pt"
    if path.is_file():
        model, tokenizer, state = checkpoint.load(path)
        return model, load_data(args.corpus or state["args"].get("corpus"), tokenizer=tokenizer)
    say(f"there is no run {args.name}: a model is trained for {args.steps} steps")
    data = load_data(args.corpus)
    return fit(data, ModelConfig(len(data.tokenizer)), args.steps, "the model"), data


def real_jobs(opened, text: str) -> list[Job]:
    """What the real model writes, at temperature 0: answers to TEXTS, and how a scene of `text` goes on."""
    tokenizer, V, greedy = opened.tokenizer, opened.model.config.vocab_size, SampleConfig(temperature=0)
    counted, val = split(text)
    counts = NGramDraft(encode(counted, tokenizer), V, ORDERS["byte pairs"], greedy)
    drafts = {"look-up": lambda: LookUp(V)}
    jobs = []
    for name, words in TEXTS.items():
        raw = opened.start + tokenizer.encode(words)
        ids = chat(opened, [{"role": "user", "content": words}]) if opened.template else raw
        jobs.append(Job(opened.model, name, ids, drafts, greedy, opened.ends))
    ids = opened.start + tokenizer.encode(val[:1000])[:200]
    return [*jobs, Job(opened.model, "goes on", ids, drafts | {"counts": lambda: counts}, greedy, opened.ends)]


def own_job(model, data, small, temperature: float) -> Job:
    """What the stage's own model draws, with all three kinds of drafts."""
    V, config = model.config.vocab_size, SampleConfig(temperature)
    counts = NGramDraft(data.train, V, ORDERS["characters" if V < 200 else "byte pairs"], config)
    drafts = {"look-up": lambda: LookUp(V), "counts": lambda: counts, "model": lambda: ModelDraft(small, config)}
    return Job(model, "own model", data.val[:model.config.block_size // 2].tolist(), drafts, config)


def draw(costs: dict[str, dict[int, float]], rows: list[dict]) -> Figure:
    """Two panels: what a pass over more tokens costs, and the speed-up against the number of drafted tokens."""
    fig = Figure(figsize=(10, 4), layout="constrained")
    left, right = fig.subplots(1, 2)
    for name, found in costs.items():
        left.plot(list(found), [ms / found[1] for ms in found.values()], "o-", label=f"{name}: {found[1]:.1f} ms")
    left.plot(SIZES, SIZES, color="gray", ls=":", lw=1, label="as many passes over one token")
    left.set(title="cost of a pass", xlabel="tokens in the pass", ylabel="times a pass over one token", ylim=(0, 4))
    for text, draft in dict.fromkeys((row["text"], row["draft"]) for row in rows if row["n"]):
        line = [(row["n"], row["speed-up"]) for row in rows if (row["text"], row["draft"]) == (text, draft)]
        right.plot(*zip(*line, strict=True), "o-", label=f"{text}: {draft}")
    right.axhline(1, color="gray", ls=":", lw=1)
    right.set(title="speed-up over plain decode", xlabel="drafted tokens, n", ylim=(0, None))
    right.set_xticks(sorted({row["n"] for row in rows if row["n"]}))
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder, GGUF file, or name on the hub (default: smollm2)")
    parser.add_argument("--name", default="default", help="the run of the stage's own model (default: default)")
    parser.add_argument("--corpus", help="a corpus or a text file (default: shakespeare)")
    parser.add_argument("--drafted", type=int, nargs="+", default=[2, 4, 8], help="n, tokens drafted (default: 2 4 8)")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens to write (default: 96)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that all take (default: 3)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of models made here (default: 300)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the stage's own model (default: 0.8)")
    args = parser.parse_args(argv)
    for flag, value in (("drafted", min(args.drafted)), ("rounds", args.rounds), ("steps", args.steps)):
        if value < 1:
            raise BadInput(f"--{flag} {value}: it must be at least 1")
    if args.tokens < 2:
        raise BadInput(f"--tokens {args.tokens}: at least 2, the first is the prefill's")
    SampleConfig(args.temperature)  # nonsense is refused now, not after the training
    setup("cpu")

    model, data = own(args)
    sizes = model.config
    small = fit(data, ModelConfig(sizes.vocab_size, sizes.block_size, n_embd=32, n_layer=1), args.steps, "the draft")
    with console.status(f"opening {args.model}"):
        opened = load(args.model, torch.bfloat16)
    log = RunLog(__file__, "speculative", vars(args))
    jobs = [*real_jobs(opened, corpus.load(args.corpus).text), own_job(model, data, small, args.temperature)]
    costs = {name: pass_costs(job.model, job.ids, 5 * args.rounds)
             for name, job in ((args.model, jobs[0]), ("own model", jobs[-1]))}  # fmt: skip
    table("milliseconds of a pass over several tokens, and how many times that of a pass over one", [
        {"model": name} | {f"{size}": f"{ms:.2f} ({ms / found[1]:.2f})" for size, ms in found.items()}
        for name, found in costs.items()
    ])
    rows, done = [], itertools.count(1)
    total = args.rounds * sum(1 + len(job.drafts) * len(args.drafted) for job in jobs)
    with progress(total, "writing") as bar:
        for job in jobs:
            rows += compare(job, args, lambda text: bar.update(next(done), text=text))
    table(f"{args.model} at temperature 0, and the stage's own model at {args.temperature}", [
        {key: f"{value:.1%}" if key in ("taken", "drafting") and value is not None else value
         for key, value in row.items()} for row in rows
    ])
    say(f"figure: {log.figure(draw(costs, rows), 'speculative')}")
    log.finish(corpus=data.name, costs=costs, rows=rows)


if __name__ == "__main__":
    run_program(main)
