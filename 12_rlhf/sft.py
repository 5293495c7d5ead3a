"""Supervised fine-tuning: a base model that continues texts becomes one that answers.

    uv run python sft.py                                              # trains a base first, where there is none
    uv run python sft.py --families add --digits 3 --steps 800 --name addition    # one family alone
    uv run python sft.py --data my/records.jsonl --base default --name mine

It is the training of before with three differences: the examples are conversations; the loss counts the tokens of
answers alone, since nobody wants a model that writes the questions; and it begins with a model that can already write.
"""

import argparse
import itertools
import math
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shared import corpus, options
from shared.boards import BOARDS
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.interrupt import Interrupt
from shared.program import command, run_program
from shared.runlog import RunLog, read_metrics, run_folder

import torch
import torch.nn.functional as F

import checkpoint
import hf
import tasks
import train
from chat import conversation, form, ours, run_file, with_tags
from data import Batch, Example, apart, collate, read_records
from evaluate import score, text_loss, text_of

# What train.py is told for the base that this stage trains. Four heads add numbers better than two.
BASE = ["--n-expert", "0", "--n-head", "4", "--n-kv-head", "4", "--steps", "600"]


@dataclass
class SFTConfig(train.TrainConfig):
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 600  # optimiser steps
    batch_size: int = 64  # conversations per step
    lr: float = 1e-2  # highest learning rate of AdamW: embeddings, head, norms
    muon_lr: float = 0.02  # highest learning rate of Muon: the matrices inside the blocks
    warmup: int = 50  # steps over which the learning rates rise
    decay: float = 0.6  # share of the steps, the last ones, over which they fall to 0
    weight_decay: float = 0.1  # pull of the weights towards 0, as a share of the learning rate
    mask: bool = True  # learn the answers alone; otherwise the questions as well
    pack: bool = True  # several conversations in a row, in place of padding
    curriculum: bool = False  # the first pass goes from short answers to long ones
    eval_every: int = 200  # steps between looks at the held-out answers


SKIP = ("compile", "balance", "bias_rate")  # what TrainConfig has, and is of no use here


def passes(examples: list[Example], config: SFTConfig, start: int = 0):
    """Batches of `batch_size` examples without end, from step `start` on: a pass has each example once, in a new order.

    What does not fill a batch is left out of the pass. With a curriculum, the first pass goes from few answer tokens to
    many.
    Raises BadInput for fewer examples than a batch.
    """
    per_pass = len(examples) // config.batch_size
    if per_pass < 1:
        raise BadInput(f"{len(examples)} conversations do not fill a batch of {config.batch_size}: "
                       "use more, or a smaller --batch-size")
    for turn in itertools.count(start // per_pass):
        order = random.Random(config.seed * 1_000_003 + turn).sample(examples, per_pass * config.batch_size)
        if config.curriculum and turn == 0:
            order.sort(key=lambda example: sum(example.learned))
        for place in range(start % per_pass if turn == start // per_pass else 0, per_pass):
            yield order[place * config.batch_size:(place + 1) * config.batch_size]


def answer_loss(model, batch: Batch, learned, precision: str = "float32"):
    """The sum of -ln P over the tokens that are `learned` [R, T], in nats; 0 where there are none.

    Only these are scored: with a large vocabulary, scores of the others would cost more than the rest of the model.
    """
    # One text in each row is what the model takes anyway, unless a mixture has to know what is padding, or padding
    # reaches beyond the context.
    plain = batch.part.max() == 0 and batch.x.shape[1] <= model.config.block_size and not train.mixtures(model)
    with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        h = model.features(batch.x, look=None if plain else apart(model, batch))  # [R, T, C]
        logits = model.head(h[learned])  # [N, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # the logarithm needs more than 8 bits
    return F.cross_entropy(logits, batch.y[learned], reduction="sum")


def gradient(model, examples: list[Example], config: SFTConfig):
    """Add the gradient of the mean loss per learned token to the parameters, a micro-batch at a time -> loss.

    Parts have different numbers of such tokens, and each counts by its share of the tokens. In a mean of the parts'
    means, the tokens of a part with few of them would weigh more. What routers add counts by the same share, and is not
    in the loss that is returned.
    """
    parts = [examples[i:i + config.micro_batch] for i in range(0, len(examples), config.micro_batch)]
    batches = [collate(part, room(model, part) if config.pack else None) for part in parts]
    batches = [batch.to(next(model.parameters()).device) for batch in batches]
    learned = [batch.learned if config.mask else batch.part >= 0 for batch in batches]
    count, total = sum(part.sum() for part in learned).clamp(min=1), 0.0
    for batch, part in zip(batches, learned, strict=True):
        loss = answer_loss(model, batch, part, config.precision) / count
        (loss + train.routing_loss(model, config) * (part.sum() / count)).backward()
        total += loss.detach()
    return total


def room(model, examples: list[Example]) -> int:
    """Tokens in a packed row: as many as the model's context, but 512 at most, and enough for the longest example.

    An example of N tokens takes N - 1 places.
    """
    return max(min(model.config.block_size, 512), *(len(example.ids) - 1 for example in examples))


def tune(model, stream, config: SFTConfig, optimizer, start: int = 0, stop=lambda: False):
    """Train on the batches of examples of `stream`, from step `start` on; ends early once `stop()` is true.

    Yields (step, loss) after each step. Raises BadInput at the first loss that is infinite or nan.
    """
    tuned = [p for p in model.parameters() if p.requires_grad]
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    model.train()
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * train.schedule(step, config)
        loss = gradient(model, next(stream), config).item()
        if not math.isfinite(loss):
            raise BadInput(f"the loss is {loss} at step {step + 1}: lower --lr, {config.lr:g}, and --muon-lr")
        torch.nn.utils.clip_grad_norm_(tuned, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1, loss
        if stop():
            return


@torch.no_grad()
def held_out_loss(model, examples: list[Example], rows: int = 32) -> float:
    """The mean loss per answer token of examples that are not trained on, nats."""
    total, count, device = 0.0, 0, next(model.parameters()).device
    ranked = sorted(examples, key=lambda example: len(example.ids))
    with train.evaluation(model):
        for start in range(0, len(ranked), rows):
            batch = collate(ranked[start:start + rows]).to(device)
            total += answer_loss(model, batch, batch.learned).item()
            count += int(batch.learned.sum())
    return total / count


def open_base(args, device) -> hf.Opened:
    """The model that is tuned, with a form of conversation: a run, or what `hf.load` opens. Raises BadInput.

    The run "base" is trained where there is none, or trained on where it was stopped.
    """
    folder = run_folder(__file__, "base")
    if args.base == "base" and not (folder / "summary.json").is_file():
        flags = [*BASE, "--name", "base", "--device", args.device, *(["--corpus", args.corpus] if args.corpus else [])]
        stopped = (folder / "model.pt").is_file()
        say("first a base: " + command(Path(__file__).parent.name, "train.py", *flags))
        # The training takes random numbers. What is drawn later, new tokens' vectors, must not depend on it.
        with torch.random.fork_rng(devices=[]):
            left = train.main(["--resume", "--name", "base"] if stopped else flags)
        if left:
            sys.exit(130)
    if file := run_file(args.base):
        model, tokenizer, state = checkpoint.load(file, device)
        own = state["args"].get("corpus")
        if args.corpus and own not in (None, corpus.load(args.corpus).name):
            raise BadInput(f"the base {args.base} was trained on {own}: give that as --corpus, or train another on "
                           f"{args.corpus} with train.py --n-expert 0 --name NAME, and say --base NAME")
        if "template" in state:
            return ours(model, tokenizer, state)
        return hf.Opened(model, tokenizer)
    found = hf.load(args.base)
    found.model.to(device)
    return found


def prepare(args) -> tuple[list[dict], dict[str, list[dict]]]:
    """The records to train on, and those that are held out, by the name of their set. Raises BadInput."""
    if args.data is None:
        known = tasks.words(corpus.load(args.corpus).text)
        make = partial(tasks.make, known, families=tuple(args.families), seed=args.seed, digits=args.digits)
        return make("train", args.records), {name: make(name, args.test) for name in tasks.SETS[1:]}
    groups = defaultdict(list)  # a question that is asked twice is trained on or held out, and never both
    for record in read_records(args.data):
        groups[str(record["messages"][:-1])].append(record)
    parts = list(groups.values())
    random.Random(args.seed).shuffle(parts)
    cut = max(1, len(parts) // 10)
    if len(parts) < 2:
        raise BadInput(f"{args.data} has one question: one is held out, so there must be more")
    held_out, training = (list(itertools.chain.from_iterable(part)) for part in (parts[:cut], parts[cut:]))
    return training, {"held out": held_out}


def fitting(opened: hf.Opened, records: list[dict], what: str) -> list[Example]:
    """Records as tokens. Those that are longer than the model's context are left out whole, and that is said.

    Cut at the end, they would teach answers that stop anywhere; cut at the beginning, answers to nothing.
    """
    examples = [conversation(opened, record["messages"]) for record in records]
    kept = [example for example in examples if len(example.ids) <= opened.model.config.block_size]
    if len(kept) < len(examples):
        say(f"{what}: {len(examples) - len(kept)} of {len(examples)} conversations are longer than the model's context "
            f"of {opened.model.config.block_size} tokens and are left out")
    if not kept:
        raise BadInput(f"{what}: no conversation fits into the model's context")
    return kept


def draw(rows: list[dict], scores: dict[str, list[dict]], log):
    """The figures of a run: losses by step, and the exact matches of each family."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(6, 3.2))
    axes = figure.subplots()
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds")):
        seen = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*seen, strict=True), label={"train_loss": "training"}.get(name, f"new {name}"))
    axes.set(xlabel="step", ylabel="nats per answer token", yscale="log")
    axes.legend()
    log.figure(figure, "loss")
    if not scores:
        return
    figure = Figure(figsize=(7, 3.2))
    axes = figure.subplots()
    for i, (name, found) in enumerate(scores.items()):
        x = [j + 0.4 * (i - 0.5) for j in range(len(found))]
        y = [row["exact"] for row in found]
        reach = [[abs(row["exact"] - row[end]) for row in found] for end in ("low", "high")]
        axes.bar(x, y, 0.38, yerr=reach, capsize=2, label=f"new {name}")
    axes.set(xticks=range(len(found)), ylabel="exact match", ylim=(0, 1.2), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xticklabels([row["family"] for row in found], rotation=30)
    axes.legend(loc="upper center", ncols=2, frameon=False)
    log.figure(figure, "families")


def arguments(argv):
    """The command line as flags, and with --resume, which brings the run's own flags, the run's checkpoint."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="base", help="a run, or what hf.py opens (default: base, which is trained)")
    parser.add_argument("--data", help="a file of records (default: the tasks of tasks.py)")
    parser.add_argument("--corpus", help="the text of the base, where the tasks' words are from (default: shakespeare)")
    parser.add_argument("--families", nargs="+", default=list(tasks.PRACTICE), help="of tasks (default: all)")
    parser.add_argument("--digits", type=int, default=2, help="of the tasks' longest numbers (default: 2)")
    parser.add_argument("--records", type=int, default=40_000, help="tasks to train on (default: 40000)")
    parser.add_argument("--test", type=int, default=900, help="tasks of each test set (default: 900)")
    parser.add_argument("--name", default="default", help="the run's folder under out/ (default: default)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint, with its flags")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--board", choices=BOARDS, help="show the metrics there too (default: none)")
    options.add(parser, SFTConfig, SKIP)
    args = parser.parse_args(argv)
    if not args.resume:
        return args, None
    folder = run_folder(__file__, args.name)
    saved = *_, state = checkpoint.load(folder / "model.pt")
    if "template" not in state:
        raise BadInput(f"the run {args.name} is a base's: --resume goes on with a run of this script")
    args = options.resume(parser, argv, state["args"], free=("steps", "eval_every", "device", "board"))
    # A run that was ended by force behind its last step still has to be scored.
    if state["step"] >= args.steps and (folder / "summary.json").is_file():
        raise BadInput(f"the run {args.name} has finished its {state['step']} steps: to go on, give it more --steps")
    return args, saved


def main(argv=None):
    args, saved = arguments(argv)
    config = options.build(SFTConfig, args)
    if args.name == args.base:
        raise BadInput(f"--name {args.name} is the base's own name: choose another")
    if min(args.records, args.test, args.digits) < 1:
        raise BadInput("--records, --test and --digits must be at least 1")
    device = setup(args.device, config.seed)
    args.corpus = text_of(args.base, args.corpus)
    records, held_out = prepare(args)  # a bad record is said before a base is trained
    opened = ours(*saved) if saved else open_base(args, device)
    if opened.template is None:  # a base: it gets the tags, and the characters of the records
        used = (message["content"] for part in (records, *held_out.values()) for r in part for message in r["messages"])
        opened = ours(*with_tags(opened.model, opened.tokenizer, "".join(sorted(set("".join(used))))))
    model = opened.model.to(device)
    examples = fitting(opened, records, "training")
    tests = {name: fitting(opened, part, name) for name, part in held_out.items()}
    next(passes(examples, config))  # too few are refused now
    optimizer, state = train.make_optimizer(model, config), saved[-1] if saved else {"step": 0, "seconds": 0.0}
    if saved:
        optimizer.load_state_dict(state["optimizer"])
    known = state["text_loss"] if saved else None  # of the base
    if not saved and run_file(args.base):  # of no other model: its windows may be too long for the memory
        known = text_loss(model, opened.tokenizer, args.corpus)
    say(f"{len(examples):,} conversations with {sum(sum(each.learned) for each in examples):,} answer tokens, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters")

    step, begin = state["step"], time.perf_counter() - state["seconds"]
    flags = vars(args) | {"resume": False}
    with RunLog(__file__, args.name, flags, step, args.board) as log, Interrupt() as interrupt:

        def keep():
            run = {"optimizer": optimizer.state_dict(), "step": step, "seconds": time.perf_counter() - begin}
            run |= {"text_loss": known, "before": before}
            checkpoint.save(log.folder / "model.pt", model, opened.tokenizer, **run, **form(opened), args=flags)
            log.keep()

        def look() -> dict[str, float]:
            losses = {name: held_out_loss(model, part) for name, part in tests.items()}
            log.metrics(step, **losses)
            return losses

        before = state["before"] if saved else look()
        stream = passes(examples, config, step)
        with progress(config.steps, "tuning") as bar:
            for step, loss in tune(model, stream, config, optimizer, state["step"], lambda: interrupt.asked):
                bar.update(step, loss=loss)
                if step % 10 == 0:
                    log.metrics(step, train_loss=loss)
                if step % config.eval_every == 0 and step < config.steps and not interrupt.asked:
                    look()
                    keep()
        keep()
        if step < config.steps:
            go_on = command(log.stage, log.script, "--resume", "--name", args.name)
            say(f"stopped at step {step}, saved in {log.folder}: go on with {go_on}")
            return 130
        after, seconds = look(), time.perf_counter() - begin
        table("held out", [{"set": name, "before": before[name], "after": after[name]} for name in tests])
        scores = {} if args.data else {name: score(opened, part) for name, part in held_out.items()}
        for name, rows in scores.items():
            table(f"new {name}", rows)
        tax = None if known is None else text_loss(model, opened.tokenizer, args.corpus) - known
        draw(read_metrics(log.folder), scores, log)
        log.finish(
            corpus=args.corpus, seed=config.seed, steps=config.steps, seconds=seconds, tax=tax,
            **{f"loss_{name.replace(' ', '_')}": loss for name, loss in after.items()},
            **{f"exact_{name}": rows[-1]["exact"] for name, rows in scores.items()},
        )
    if tax is not None:
        say(f"on the text of the base, the loss rose by {tax:.3f} nats per character")
    say(f"saved in {log.folder}; talk to it: " + command(log.stage, "chat.py", "--model", args.name))


if __name__ == "__main__":
    run_program(main)
