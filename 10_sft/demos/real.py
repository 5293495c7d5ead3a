"""A real model learns a way of answering: LoRA on SmolLM2, with a thousand records, in a few minutes on a laptop.

    uv run stages run 10 demos/real.py                                  # 1,100 instructions, which are downloaded
    uv run stages run 10 demos/real.py --data my/records.jsonl --name mine
    uv run stages run 10 demos/real.py --four-bit --name four           # the base in four bits, as in QLoRA

The base is frozen, and each matrix of its blocks gets an adapter of `--rank` (lora.py). Every conversation is written
with the model's own chat template, and the loss counts the tokens of the answer and the one that ends it.

A tenth of the records is held out, the same for every `--seed`. On it the loss is measured before and after, in nats
per answer token. The table shows what the model answers to the first of these questions. The model could answer
before: what it learns is how these records answer, mostly in one short sentence, and the loss falls for that.

The adapter is all that changes: a few percent of the model's size, in the form of PEFT, which other programs open.
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.interrupt import Interrupt
from shared.program import run_program
from shared.runlog import RunLog, dumps

import torch
from matplotlib.figure import Figure

import chat
import lora
import sft
from data import read_records
from evaluate import answers
from extras.four_bit import four_bit, nbytes

HUB = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # where other programs find the base


@dataclass
class Real:
    """The run. Raises BadInput for one that cannot be."""

    steps: int = 120  # optimiser steps
    batch_size: int = 8  # conversations per step
    lr: float = 2e-3  # highest learning rate of the adapters; it rises for a twentieth of the steps, then falls to 0
    seed: int = 1337  # of the adapters' first weights and of the order of the records
    shown: int = 6  # held-out questions in the table
    length: int = 48  # most tokens of an answer in the table

    def __post_init__(self):
        for name in ("shown", "length"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: it must be at least 1")

    def recipe(self) -> sft.SFTConfig:
        """For `sft.tune`. Raises BadInput."""
        return sft.SFTConfig(
            steps=self.steps, batch_size=self.batch_size, micro_batch=8, lr=self.lr, seed=self.seed,
            warmup=self.steps // 20, decay=1.0,
        )  # fmt: skip


def divide(records: list[dict]) -> tuple[list[dict], list[dict]]:
    """Records to learn from, and a tenth that is held out, at random but always the same. Raises BadInput for one.

    Of records with the same question only the first is used: one of them held out and one learned would make the model
    look better than it is.
    """
    asked = {}
    for record in records:
        asked.setdefault(dumps(record["messages"][:-1]).casefold(), record)
    if len(asked) < len(records):
        say(f"{len(records) - len(asked)} of {len(records)} records ask what an earlier one asks and are left out")
    if len(asked) < 2:
        raise BadInput("there is only one question: one is held out, so there must be more")
    distinct = list(asked.values())
    random.Random(0).shuffle(distinct)
    cut = max(1, len(distinct) // 10)
    return distinct[cut:], distinct[:cut]


def draw(losses: list[float], before: float, after: float) -> Figure:
    """Training loss by step, smoothed, and the held-out loss before and after."""
    fig = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = fig.subplots()
    width = max(1, len(losses) // 20)
    ends = range(width, len(losses) + 1, width)
    axes.plot(ends, [mean(losses[end - width:end]) for end in ends], label=f"training, mean of {width} steps")
    axes.plot([0, len(losses)], [before, after], "o", label="held out")
    axes.set(xlabel="step", ylabel="nats per answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    return fig


def main(argv: list[str] | None = None):
    begin = time.perf_counter()
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="a file of records (default: the published instructions.json)")
    parser.add_argument("--model", default="smollm2", help="a run of sft.py, or what hf.py opens (default: smollm2)")
    parser.add_argument("--four-bit", action="store_true", help="keep the matrices of the blocks in four bits")
    parser.add_argument("--name", default="real", help="the run's folder under out/ (default: real)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    options.add(parser, Real)
    options.add(parser, lora.LoRAConfig)
    args = parser.parse_args(argv)
    real, adapter = options.build(Real, args), options.build(lora.LoRAConfig, args)
    config, device = real.recipe(), setup(args.device, args.seed)
    learn, held_out = divide(read_records(args.data or corpus.records("instructions")))
    opened = chat.open_model(args.model, device)
    model = opened.model
    examples, tests = sft.fitting(opened, learn, "training"), sft.fitting(opened, held_out, "held out")
    stream = sft.passes(examples, config)
    next(sft.passes(examples, config))  # too few are refused now
    limit = model.config.block_size - real.length
    talks = [record["messages"] for record in held_out]
    talks = [talk for talk in talks if len(chat.prompt(opened, talk[:-1])) <= limit][:real.shown]
    if args.four_bit:
        full = nbytes(model)
        say(f"the base takes {nbytes(four_bit(model)) / 1e6:.0f} MB in place of {full / 1e6:.0f}")

    def look() -> tuple[float, list[str]]:
        """The loss on the held-out answers, and the model's own answers."""
        texts, ended = answers(opened, [talk[:-1] for talk in talks], real.length)
        texts = [text.strip() + ("" if over else " ...") for text, over in zip(texts, ended, strict=True)]
        return sft.held_out_loss(model, tests, rows=8), texts

    with RunLog(__file__, args.name, vars(args)) as log:
        before, early = look()
        lora.add(model, adapter)
        tuned = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in tuned)
        say(f"{len(examples):,} conversations, {len(tests)} held out; held-out loss {before:.4f}; "
            f"{count:,} parameters are trained")
        optimizer, losses = torch.optim.AdamW(tuned, lr=config.lr, weight_decay=0.0), []
        with Interrupt() as interrupt, progress(config.steps, "tuning") as bar:
            for step, loss in sft.tune(model, stream, config, optimizer, stop=lambda: interrupt.asked):
                losses.append(loss)
                bar.update(step, loss=loss)
                log.metrics(step, train_loss=loss)
        folder = lora.save_adapter(model, log.folder / "adapter", HUB.get(args.model, args.model))
        log.keep()
        how = (f"the adapter is in {folder}: lora.load_adapter(chat.open_model({args.model!r}).model, folder) puts it "
               "beside its base, and so does peft's PeftModel.from_pretrained(model, folder)")
        if len(losses) < config.steps:
            say(f"stopped at step {len(losses)}; {how}")
            return 130
        after, late = look()
        rows = [{"question": talk[-2]["content"], "right": talk[-1]["content"], "before": a, "after": b}
                for talk, a, b in zip(talks, early, late, strict=True)]
        table(f"held-out questions; an answer that is longer than {real.length} tokens ends in ...", rows)
        log.figure(draw(losses, before, after), "loss")
        seconds = time.perf_counter() - begin
        log.finish(steps=config.steps, seconds=seconds, trained=count, bytes=nbytes(model), before=before, after=after,
                   rows=rows)
    say(f"held-out loss per answer token {before:.4f} -> {after:.4f} after {seconds:.0f} s")
    say(how)


if __name__ == "__main__":
    run_program(main)
