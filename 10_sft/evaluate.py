"""How good are a tuned model's answers? Against the right ones, by family, and what tuning cost.

    uv run python evaluate.py                                   # the run "default" of sft.py, on its own test sets
    uv run python evaluate.py --model smollm2 --count 180       # a real model on the same tasks

- exact match: the share of answers that are right to the last character, with a 95 % interval.
- token F1: what an answer and the right one share, token by token. It tells "nearly" from "not at all".
- choice: which of four answers the model finds likeliest. It needs no writing, and guessing gives a quarter.
- alignment tax: what the model lost of what it knew before, as the rise of its loss on the text of the base.
"""

import argparse
import itertools
import math
from collections import Counter, defaultdict
from functools import partial

from shared import corpus, options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch

import tasks
import train
from chat import conversation, open_model, prompt, run_flags, said
from data import apart, collate, encode, read_records, split
from hf import Opened
from sample import SampleConfig, pad_left, sample


def interval(right: int, n: int) -> tuple[float, float]:
    """Where a share of `right` of `n` really lies, with 95 % confidence. Raises BadInput for n = 0.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927). Unlike p +- 1.96 standard
    errors it stays within 0 and 1, and does not claim to be certain after ten of ten.
    """
    if n < 1:
        raise BadInput("no answers were counted: give at least one record")
    z, p = 1.96, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def token_f1(answer: list, gold: list) -> float:
    """The harmonic mean of precision and recall of an answer's tokens, in any order: [1, 2, 2] and [2, 2, 3] -> 2/3.

    Rajpurkar et al., "SQuAD" (2016). Two empty answers agree: 1.
    """
    shared = (Counter(answer) & Counter(gold)).total()
    return 2 * shared / (len(answer) + len(gold)) if answer or gold else 1.0


@torch.no_grad()
def answers(opened: Opened, asked: list[list[dict]], length: int, config=None, rows: int = 128, generator=None):
    """What the model answers to each conversation of `asked`, at most `length` tokens: (texts, which have an end).

    Prompts of similar lengths are read together, so that little is padding. By default the likeliest token is taken.
    """
    config = config or SampleConfig(temperature=0.0)
    ids = [prompt(opened, messages) for messages in asked]
    device = opened.model.tok_emb.weight.device
    texts, ended = [""] * len(ids), [False] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with progress(len(ids), "answering") as bar:
        for batch in (order[i:i + rows] for i in range(0, len(order), rows)):
            context, pad = pad_left([ids[i] for i in batch], device)
            drawn = sample(opened.model, context, length, config, generator, pad, opened.ends).tolist()
            for i, row in zip(batch, drawn, strict=True):
                answer = list(itertools.takewhile(lambda token: token >= 0 and token not in opened.ends, row))
                texts[i], ended[i] = said(opened, answer), len(answer) < len(row)
            bar.update(bar.step + len(batch))
    return texts, ended


@torch.no_grad()
def answer_log_probs(opened: Opened, talks: list[list[dict]], rows: int = 32):
    """ln P of the last answer of each conversation, its end included, summed over tokens [N], in nats."""
    examples = [conversation(opened, talk) for talk in talks]
    for example, talk in zip(examples, talks, strict=True):
        earlier = len(prompt(opened, talk[:-1]))  # the answers of earlier turns do not count
        example.learned[:earlier] = [False] * earlier
    device, sums = opened.model.tok_emb.weight.device, []
    with train.evaluation(opened.model):
        for start in range(0, len(examples), rows):
            batch = collate(examples[start:start + rows]).to(device)
            look = apart(opened.model, batch)  # of padding nothing is seen, and no expert spends its time on it
            per_token = train.log_probs(partial(opened.model, look=look), batch.x, batch.y)  # [R, T]
            sums.append((per_token * batch.learned).sum(1))
    return torch.cat(sums)


def choose(opened: Opened, records: list[dict], n: int = 4) -> float:
    """The share of records whose answer is likelier than those of n - 1 others of the same family. A tie is wrong.

    Wrong ones as long as the right one come first: a longer text is less likely for its length alone.
    """
    right = 0
    by_family = defaultdict(list)
    for record in records:
        by_family[record.get("family")].append(record["messages"])
    talks, counted = [], 0
    for group in by_family.values():
        golds = sorted({messages[-1]["content"] for messages in group})
        for i, messages in enumerate(group):
            gold = messages[-1]["content"]
            others = [golds[(i + j) % len(golds)] for j in range(len(golds))]
            others = sorted((other for other in others if other != gold), key=lambda other: abs(len(other) - len(gold)))
            if len(others) >= n - 1:
                counted += 1
                talks += [[*messages[:-1], {"role": "assistant", "content": text}] for text in (gold, *others[:n - 1])]
    if counted:
        found = answer_log_probs(opened, talks).view(counted, n)
        right = (found[:, 0] > found[:, 1:].amax(1)).sum().item()  # argmax would find the first of equal ones, and nan
    return right / counted if counted else math.nan


def score(opened: Opened, records: list[dict], length: int = 40) -> list[dict]:
    """A row for each family, and the mean over families: exact match with its interval, token F1, share that ended.

    The asked is all of a conversation but its last answer.
    """
    texts, ended = answers(opened, [record["messages"][:-1] for record in records], length)
    seen = defaultdict(list)
    for record, text, over in zip(records, texts, ended, strict=True):
        gold = record["messages"][-1]["content"]
        f1 = token_f1(*(opened.tokenizer.encode(each) for each in (text, gold)))
        seen[record.get("family", "all")].append((text == gold and over, f1, over))
    rows = []
    for family, results in seen.items():
        exact, f1, over = (sum(column) for column in zip(*results, strict=True))
        low, high = interval(exact, len(results))
        n = len(results)
        rows.append({"family": family, "exact": exact / n, "low": low, "high": high, "f1": f1 / n, "ended": over / n})
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("exact", "f1", "ended")}
    # The families are independent: the variance of the mean is the mean of the variances, divided by their number.
    spread = 1.96 * math.sqrt(sum(((row["high"] - row["low"]) / 3.92) ** 2 for row in rows)) / len(rows)
    low, high = max(0.0, mean["exact"] - spread), min(1.0, mean["exact"] + spread)
    return [*rows, {"family": "mean", "low": low, "high": high, **mean}]


def text_of(name: str, given: str | None) -> str:
    """The name of the text that goes with the run `name`: the given one, or the run's own, or the default.

    Without a network the default is another text than with one: what it is now belongs in the record.
    """
    return corpus.load(given or run_flags(name).get("corpus")).name


def text_loss(model, tokenizer, name: str | None = None) -> float:
    """The model's loss on the validation text of the corpus, nats per character: the ladder's unit."""
    val = split(corpus.load(name).text)[1]
    ids = encode(val, tokenizer)
    return train.evaluate(model, ids) * (len(ids) - 1) / (len(val) - 1)


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a run of sft.py, or what hf.py opens (default: default)")
    parser.add_argument("--data", help="a file of records (default: the test sets of tasks.py)")
    parser.add_argument("--corpus", help="where the tasks' words are from (default: the run's, or shakespeare)")
    parser.add_argument("--families", nargs="+", default=list(tasks.PRACTICE), help="default: the run's, or all")
    parser.add_argument("--digits", type=int, default=2, help="of the longest numbers (default: the run's, or 2)")
    parser.add_argument("--count", type=int, default=900, help="records of each test set (default: 900)")
    parser.add_argument("--length", type=int, default=40, help="most tokens of an answer (default: 40)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337, help="of the test sets (default: the run's, or 1337)")
    # The seed of a run decided which words it was trained on: with another one, the test would ask for them.
    own = run_flags(parser.parse_args(argv).model)
    if "families" in own:  # a run of sft.py
        parser.set_defaults(**{name: own[name] for name in ("corpus", "families", "digits", "seed")})
    args = parser.parse_args(argv)
    if min(args.count, args.length, args.digits) < 1:
        raise BadInput("--count, --length and --digits must be at least 1")
    device = setup(args.device, args.seed)
    opened = open_model(args.model, device)
    if args.data is not None:
        sets = {args.data: read_records(args.data)}
    else:
        known = tasks.words(corpus.load(args.corpus).text)
        families = tuple(args.families)
        sets = {name: tasks.make(known, name, args.count, families, args.seed, args.digits) for name in tasks.SETS[1:]}
    for name, records in sets.items():
        table(name, score(opened, records, args.length))
        say(f"choice of four: {choose(opened, records):.3f}")


if __name__ == "__main__":
    run_program(main)
