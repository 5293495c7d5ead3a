"""A small world of instructions whose answers can be checked: the data that a base model is tuned on.

    uv run python tasks.py                  # shows some, and writes train.jsonl, words.jsonl and phrasings.jsonl
    uv run python tasks.py --families add larger --count 5000

Nine families of tasks on words of the corpus and on numbers. What an instruction says is composed of three parts:

    politeness x verb x object:   "Could you please" + "spell ... backwards" + "the word 'love'" + "?"

With a few fixed sentences for each family, a model learns the sentences by heart and fails on a new one. Composed, it
has to find the verb and the object wherever they stand. Words, numbers and combinations of the three parts are split
before any instruction is made, so each test set holds one thing that was never trained on.
"""

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from shared import corpus, options
from shared.atomic import write
from shared.console import say, table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import run_folder

POLITE = (  # what stands before the verb, and what ends the sentence
    ("", "."), ("please ", "."), ("can you ", "?"), ("could you please ", "?"), ("I want you to ", "."), ("now ", "!"),
)  # fmt: skip
WORD = ("{a}", "'{a}'", "the word {a}", "the word '{a}'", "this word: {a}")
PAIR = ("{a} and {b}", "the numbers {a} and {b}", "these two: {a}, {b}", "both {a} and {b}")
HELD_OUT = 6  # one combination of phrases in so many is kept for the test
SETS = ("train", "words", "phrasings")


@dataclass(frozen=True)
class Family:
    """Tasks of one kind: how they are asked for, and what is right."""

    verbs: tuple[str, ...]  # each with a place for the object
    answer: Callable[..., str]  # of the word, or of the two numbers
    objects: tuple[str, ...] = WORD


FAMILIES = {
    "repeat": Family(("repeat {}", "say {} again", "copy {}", "write down {}"), lambda a: a),
    "reverse": Family(("reverse {}", "spell {} backwards", "turn {} around", "write {} from its end"),
                      lambda a: a[::-1]),
    "upper": Family(("write {} in capitals", "put {} in upper case", "shout {}", "make {} all large letters"),
                    lambda a: a.upper()),
    "first": Family(("give the first letter of {}", "tell me how {} begins", "say which letter {} starts with",
                     "name the letter at the start of {}"), lambda a: a[0]),
    "last": Family(("give the last letter of {}", "tell me how {} ends", "say which letter {} stops with",
                    "name the letter at the end of {}"), lambda a: a[-1]),
    "spell": Family(("spell {} with dashes", "put dashes into {}", "write {} letter by letter",
                     "take {} apart"), lambda a: "-".join(a)),
    "sort": Family(("sort the letters of {}", "put {} in order of the alphabet", "order {} from a to z",
                    "arrange {} by letter"), lambda a: "".join(sorted(a))),
    "larger": Family(("give the larger of {}", "find the maximum of {}", "say which is more of {}",
                      "pick the bigger of {}"), lambda a, b: str(max(int(a), int(b))), PAIR),
    "add": Family(("add {}", "sum up {}", "give the total of {}", "find the sum of {}"),
                  lambda a, b: str(int(a) + int(b)), PAIR),
}  # fmt: skip


PRACTICE = (*FAMILIES, "add", "add")  # the families of a training set, in turn: adding takes more practice


def words(text: str, low: int = 3, high: int = 8) -> list[str]:
    """The distinct words of `low` to `high` lower-case letters in a text, sorted. Raises BadInput for too few."""
    found = sorted(set(re.findall(rf"(?<![A-Za-z'])[a-z]{{{low},{high}}}(?![A-Za-z'])", text)))
    if len(found) < 100:
        raise BadInput(f"the text has {len(found)} words of {low} to {high} letters: use a longer one")
    return found


def combinations(family: str, test: bool) -> list[tuple[tuple[str, str], str, str]]:
    """Politeness, verb and object of each way to ask: those held out for the test, or all others.

    Each single part stands in some of the others as well: what is new in the test is their combination.
    """
    verbs, objects = FAMILIES[family].verbs, FAMILIES[family].objects
    ways = product(enumerate(POLITE), enumerate(verbs), enumerate(objects))
    return [(p, v, o) for (i, p), (j, v), (k, o) in ways if ((i + j + k) % HELD_OUT == 0) == test]


def instruct(family: str, way, *operands: str) -> dict:
    """One record: an instruction, its answer, and the family. `way` is one of `combinations`."""
    (before, after), verb, thing = way
    asked = before + verb.format(thing.format(**dict(zip("ab", operands, strict=False)))) + after
    told = [{"role": "user", "content": asked[0].upper() + asked[1:]}]
    told.append({"role": "assistant", "content": FAMILIES[family].answer(*operands)})
    return {"messages": told, "family": family}


def numbers(rng: random.Random, test: bool, digits: int) -> tuple[str, str]:
    """Two different numbers of one to `digits` digits each. One pair in ten is for the test, whichever stands first.

    Which ones must look like chance. Those whose sum is a multiple of 10, say, would be the pairs with certain last
    digits, and no sum of such digits would ever be trained.
    """
    while True:
        a, b = (rng.randrange(10 ** rng.randint(1, digits)) for _ in range(2))
        if a != b and (zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 10 == 0) == test:
            return str(a), str(b)


def make(known: list[str], which: str, count: int, families=PRACTICE, seed: int = 1337, digits: int = 2):
    """`count` different records of the set `which`: [{"messages": ..., "family": ...}, ...].

    The families take turns; in a training set, one that is named twice has twice as many.

    "words" has words (or pairs of numbers) that no other set has, "phrasings" combinations that no other set has.
    Raises BadInput for an unknown family or set, or for more records than can be told apart.
    """
    if unknown := {*families} - {*FAMILIES}:
        raise BadInput(f"family {', '.join(sorted(unknown))}: choose from {', '.join(FAMILIES)}")
    if which not in SETS:
        raise BadInput(f"set {which!r}: choose from {', '.join(SETS)}")
    families = tuple(families if which == "train" else dict.fromkeys(families))
    known = random.Random(seed).sample(known, len(known))
    cut = len(known) // 10
    known = known[:cut] if which == "words" else known[cut:]
    rng, records, tries = random.Random(f"{seed} {which}"), {}, 0
    ways = {family: combinations(family, which == "phrasings") for family in families}
    while len(records) < count:
        family = families[len(records) % len(families)]
        pair = FAMILIES[family].objects is PAIR
        operands = numbers(rng, which == "words", digits) if pair else (rng.choice(known),)
        record = instruct(family, rng.choice(ways[family]), *operands)
        records.setdefault(record["messages"][0]["content"], record)
        tries += 1
        if tries > 20 * count + 1000:
            raise BadInput(f"{count} different records of the set {which} cannot be made from {len(known)} words: "
                           "ask for fewer")
    return list(records.values())


def dumps(records: list[dict]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="where the words are from (default: shakespeare)")
    parser.add_argument("--families", nargs="+", default=list(PRACTICE), help="default: all")
    parser.add_argument("--digits", type=int, default=2, help="of the longest numbers (default: 2)")
    parser.add_argument("--count", type=int, default=20_000, help="records of the training set (default: 20000)")
    parser.add_argument("--test", type=int, default=900, help="records of each test set (default: 900)")
    parser.add_argument("--name", default="tasks", help="the folder under out/ (default: tasks)")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    if min(args.count, args.test, args.digits) < 1:
        raise BadInput("--count, --test and --digits must be at least 1")
    known = words(corpus.load(args.corpus).text)
    folder = run_folder(__file__, args.name)
    made = {s: make(known, s, args.count if s == "train" else args.test, tuple(args.families), args.seed, args.digits)
            for s in SETS}
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in made.items():
        write(folder / f"{name}.jsonl", dumps(records))
    shown = [dict(zip(("instruction", "answer"), (m["content"] for m in record["messages"]), strict=True))
             for record in made["train"][:2 * len(args.families)]]
    table(f"from {folder / 'train.jsonl'}", shown)
    say(f"{len(known):,} words; written: " + ", ".join(f"{name} {len(records):,}" for name, records in made.items()))


if __name__ == "__main__":
    run_program(main)
