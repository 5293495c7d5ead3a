"""Preferences: two answers to one prompt, and which of them is better. What a reward model learns from.

    uv run python preferences.py                     # shows some, and writes corrupted.jsonl
    uv run python preferences.py --data my.jsonl     # checks a file of pairs

A person who cannot write a good answer can often tell the better of two. Here the pairs come from three places:

- a right answer against the same with one letter substituted, deleted, inserted, or two swapped;
- a right answer against one that a model wrote and that is wrong;
- two answers that a model wrote, of which annotators prefer one. They make mistakes, and do not all like the same.

In files a pair is {"prompt": ..., "chosen": ..., "rejected": ...}, each a text or a list of messages, as the library
TRL reads and writes them.
"""

import argparse
import random
import string
import sys
from collections import defaultdict
from dataclasses import dataclass
from difflib import SequenceMatcher

from shared import corpus, options
from shared.atomic import write
from shared.console import say, table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import run_folder

import torch

import sft
import tasks
from chat import open_model
from data import messages_of, read_records
from evaluate import answers
from hf import Opened
from sample import SampleConfig

KINDS = ("substitute", "delete", "insert", "swap")


def corrupt(text: str, kind: str, rng: random.Random) -> str | None:
    """`text` with one mistake of the kind, or None where it cannot be made: one letter has no neighbour to swap with.

    A letter is replaced by another of its sort, and what is inserted is of the sort of its neighbour: "417" never
    becomes "4x7". So a model has to know the answer to tell which is wrong.
    """
    i = rng.randrange(len(text))
    sorts = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
    sort = next((sort for sort in sorts if text[i] in sort), string.ascii_lowercase)
    if kind == "substitute":
        return text[:i] + rng.choice(sort.replace(text[i], "")) + text[i + 1:]
    if kind == "delete":
        return text[:i] + text[i + 1:] if len(text) > 1 else None
    if kind == "insert":
        return text[:i] + rng.choice(sort) + text[i:]
    if kind == "swap":
        places = [i for i in range(len(text) - 1) if text[i] != text[i + 1]]
        if not places:
            return None
        i = rng.choice(places)
        return text[:i] + text[i + 1] + text[i] + text[i + 2:]
    raise BadInput(f"corruption {kind!r}: choose from {', '.join(KINDS)}")


def pair(prompt: list[dict], chosen: str, rejected: str, **more) -> dict:
    """A record of two answers to `prompt`, in TRL's form for conversations."""
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, **{k: [{"role": "assistant", "content": text}] for k, text in sides.items()}, **more}


def both(pair: dict) -> list[list[dict]]:
    """The two conversations of a pair, the better one first."""
    return [pair["prompt"] + pair[side] for side in ("chosen", "rejected")]


def corrupted(records: list[dict], kinds=KINDS, seed: int = 1337) -> list[dict]:
    """The right answer of each record against a corrupted one, the kinds in turn. Each pair says its kind."""
    rng, pairs = random.Random(seed), []
    for i, record in enumerate(records):
        *prompt, answer = record["messages"]
        for j in range(len(kinds)):  # the first kind from the i-th on that can be made
            kind = kinds[(i + j) % len(kinds)]
            if (wrong := corrupt(answer["content"], kind, rng)) is not None:
                pairs.append(pair(prompt, answer["content"], wrong, kind=kind, family=record.get("family")))
                break
    return pairs


def quality(answer: str, gold: str) -> float:
    """How good an answer is, from 0 to 1: 1 if it is right, else half of how much it shares with the right one.

    The hidden scorer: annotators feel it, and the reward model has to find it out from what they prefer.
    """
    return 1.0 if answer == gold else 0.5 * SequenceMatcher(None, answer, gold, autojunk=False).ratio()


@dataclass(frozen=True)
class Annotator:
    """Someone who compares two answers: by their quality, by their length, and now and then by mistake."""

    brevity: float = 0.0  # how much of quality a letter less makes up for; below 0, more letters are liked
    noise: float = 0.0  # share of the pairs in which the other answer is named

    def prefers(self, answers: tuple[str, str], gold: str, rng: random.Random) -> int:
        """0 or 1: which of two answers this annotator says is better; of equal ones the first."""
        felt = [quality(answer, gold) - self.brevity * len(answer) for answer in answers]
        return int(felt[1] > felt[0]) ^ int(rng.random() < self.noise)


def compared(drawn: list[list[str]], records: list[dict], annotators: list[Annotator], seed: int = 1337) -> list[dict]:
    """For each record, two different ones of its drawn answers, compared by one of the annotators, who take turns.

    A record whose answers are all the same teaches nothing and gives no pair.
    """
    rng, pairs = random.Random(seed), []
    for record, texts in zip(records, drawn, strict=True):
        *prompt, gold = record["messages"]
        different = sorted(set(texts))
        if len(different) > 1:
            two = tuple(rng.sample(different, 2))
            best = annotators[len(pairs) % len(annotators)].prefers(two, gold["content"], rng)
            pairs.append(pair(prompt, two[best], two[1 - best], kind="compared", family=record.get("family")))
    return pairs


def against_gold(drawn: list[list[str]], records: list[dict]) -> list[dict]:
    """The right answer of each record against the first drawn one that is wrong, where there is one."""
    pairs = []
    for record, texts in zip(records, drawn, strict=True):
        *prompt, gold = record["messages"]
        if wrong := [text for text in texts if text != gold["content"]]:
            pairs.append(pair(prompt, gold["content"], wrong[0], kind="sampled", family=record.get("family")))
    return pairs


def draw_answers(opened: Opened, records: list[dict], n: int, temperature: float = 1.0, seed: int = 1337, length=40):
    """`n` answers of the model to each record's prompt: [[text, ...], ...], each of at most `length` tokens."""
    asked = [record["messages"][:-1] for record in records for _ in range(n)]
    generator = torch.Generator().manual_seed(seed)
    texts, _ = answers(opened, asked, length, SampleConfig(temperature), rows=256, generator=generator)
    return [texts[i:i + n] for i in range(0, len(texts), n)]


def flip(pairs: list[dict], share: float, seed: int | str = 1337) -> list[dict]:
    """The pairs with `share` of them the wrong way round, as hasty annotators make them. Raises BadInput."""
    if not 0 <= share <= 1:
        raise BadInput(f"a share of {share} flipped pairs: it must be from 0 to 1")
    # Not plainly `seed`: who shuffles the pairs with the same seed for training would get all flipped ones first.
    wrong = set(random.Random(f"{seed} flip").sample(range(len(pairs)), round(share * len(pairs))))
    return [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} if i in wrong else p for i, p in enumerate(pairs)]


def split_by_prompt(pairs: list[dict], share: float = 0.1, seed: int = 1337) -> tuple[list[dict], list[dict]]:
    """Pairs to train on and pairs to test on, such that no prompt is on both sides.

    One prompt often has several pairs. If it stood on both sides, a model that knows its answers by heart would look
    as if it could judge.
    """
    groups = defaultdict(list)
    for each in pairs:
        groups[str(each["prompt"])].append(each)
    prompts = list(groups)
    random.Random(seed).shuffle(prompts)
    cut = max(1, round(share * len(prompts)))
    test, training = ([each for prompt in part for each in groups[prompt]] for part in (prompts[:cut], prompts[cut:]))
    return training, test


# One systematic mistake for each family: what a model learns from hasty demonstrations.
LAZY = {
    "repeat": lambda gold: gold[:-1] if len(gold) > 1 else gold + gold, "reverse": lambda gold: gold[::-1],
    "upper": lambda gold: gold.capitalize(), "first": lambda gold: gold.upper(), "last": lambda gold: gold.upper(),
    "spell": lambda gold: gold.replace("-", ""), "sort": lambda gold: gold[::-1], "larger": lambda gold: gold + "0",
    "add": lambda gold: str(int(gold) + 1),
}  # fmt: skip


def lazy(records: list[dict], share: float = 0.6, seed: int = 1337) -> list[dict]:
    """The records, of which `share` have an answer with their family's mistake.

    A model that is tuned on them makes the mistake when it answers with what is likeliest, and still knows how to do
    it right: it does so when it is sampled from. That is where learning from rewards begins.
    """
    rng, done = random.Random(seed), []
    for record in records:
        *prompt, gold = record["messages"]
        answer = gold["content"]
        if rng.random() < share:
            wrong = LAZY[record["family"]](answer)
            answer = wrong if wrong != answer else answer[1:]  # "noon" is right from its end as well
        done.append({**record, "messages": [*prompt, {"role": "assistant", "content": answer}]})
    return done


def understand(record) -> dict:
    """A pair in one of the usual forms as `pair` makes it. Raises ValueError.

    `prompt`, `chosen` and `rejected`, as texts or as messages; `chosen` and `rejected` as whole conversations with the
    same beginning; `instruction`, `input`, `chosen` and `rejected`.
    """
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise ValueError("it has no chosen and rejected")
    sides = []
    for side in ("chosen", "rejected"):
        text = record[side]
        if isinstance(text, str) and "instruction" in record:
            form = {**record, "output": text}
        elif "prompt" in record:
            form = {"prompt": record["prompt"], "completion": text}
        else:
            form = {"messages": text}
        sides.append(messages_of(form))
    if sides[0][:-1] != sides[1][:-1]:
        raise ValueError("chosen and rejected answer different prompts")
    more = {key: record[key] for key in ("kind", "family") if key in record}
    return pair(sides[0][:-1], sides[0][-1]["content"], sides[1][-1]["content"], **more)


def read_pairs(path) -> list[dict]:
    """The pairs of a file, without those of twice the same answer, and that is said. Raises BadInput."""
    pairs = read_records(path, understand)
    kept = [each for each in pairs if each["chosen"] != each["rejected"]]
    if len(kept) < len(pairs):
        say(f"{path}: {len(pairs) - len(kept)} of {len(pairs)} pairs have twice the same answer and are left out")
    if not kept:
        raise BadInput(f"{path} has no pair of two different answers")
    return kept


def open_policy(args, device) -> Opened:
    """The tuned model whose answers are judged. The run "lazy" is tuned where there is none.

    It is tuned on demonstrations of which many have a mistake: a model that is always right leaves nothing to learn.
    """
    folder = run_folder(__file__, "lazy")
    if args.policy == "lazy" and not (folder / "summary.json").is_file():
        say("first a policy, tuned on demonstrations with mistakes")
        stopped = (folder / "model.pt").is_file()
        data = folder.with_name("demonstrations.jsonl")
        folder.parent.mkdir(parents=True, exist_ok=True)
        known = tasks.words(corpus.load(args.corpus).text)
        write(data, tasks.dumps(lazy(tasks.make(known, "train", 40_000))))
        flags = ["--data", str(data.absolute()), "--device", args.device, "--steps", "1000"]
        flags += ["--corpus", args.corpus] if args.corpus else []
        if sft.main(["--name", "lazy", *(["--resume"] if stopped else flags)]):
            sys.exit(130)
    return open_model(args.policy, device)


def make_pairs(args, policy: Opened) -> tuple[list[dict], dict[str, list[dict]]]:
    """The pairs to train on, and those that are held out by their kind. Raises BadInput."""
    if args.data is not None:
        training, test = split_by_prompt(read_pairs(args.data), seed=args.seed)
        return flip(training, args.noise, args.seed), {"held out": test}
    known = tasks.words(corpus.load(args.corpus).text)
    # Without the seed, which would decide the words of the test: the policy was tuned on some of them then.
    training, test = (tasks.make(known, name, n) for name, n in (("train", args.pairs), ("words", 900)))
    pairs = corrupted(training, tuple(args.kinds), args.seed)
    held_out = {kind: corrupted(test, (kind,), args.seed) for kind in KINDS}
    if set(args.kinds) == set(KINDS):  # the model's own mistakes as well
        drawn = draw_answers(policy, training[:args.pairs // 4], 2, seed=args.seed)
        pairs += against_gold(drawn, training[:args.pairs // 4])
    held_out["sampled"] = against_gold(draw_answers(policy, test, 4, seed=args.seed + 1), test)
    # A policy that is always right leaves no wrong answer to hold out.
    return flip(pairs, args.noise, args.seed), {kind: some for kind, some in held_out.items() if some}


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file of pairs to check and show (default: make some)")
    parser.add_argument("--corpus", help="where the words are from (default: shakespeare)")
    parser.add_argument("--count", type=int, default=2000, help="pairs to make (default: 2000)")
    parser.add_argument("--name", default="preferences", help="the folder under out/ (default: preferences)")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    if args.count < 1:
        raise BadInput(f"--count {args.count}: make at least 1")
    if args.data is not None:
        pairs = read_pairs(args.data)
    else:
        known = tasks.words(corpus.load(args.corpus).text)
        pairs = corrupted(tasks.make(known, "train", args.count), seed=args.seed)
        folder = run_folder(__file__, args.name)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "corrupted.jsonl", tasks.dumps(pairs))
        say(f"written: {folder / 'corrupted.jsonl'}")
    shown = [{"prompt": p["prompt"][-1]["content"], "chosen": p["chosen"][0]["content"],
              "rejected": p["rejected"][0]["content"]} for p in pairs[:12]]
    table(f"{len(pairs):,} pairs", shown)


if __name__ == "__main__":
    run_program(main)
