"""Checkpoints of the tasks: right answers, and test sets that hold what was never trained on."""

import json
import random
import re
from collections import Counter
from functools import cache
from itertools import product

from shared.errors import BadInput

import pytest

import tasks
from data import read_records

# 320 words of three to eight letters, all different.
WORDS = sorted("".join(word) for n in (3, 5, 8) for word in (
    (first, *(vowel if i % 2 else last for i in range(n - 1)))
    for first, vowel, last in product("bdfglmnr", "aeiou", "pstx")
))[:320]  # fmt: skip


@pytest.fixture(scope="module")
def made() -> dict[str, list[dict]]:
    """The three sets, with fewer records than usual, and numbers of up to three digits."""
    return {name: tasks.make(WORDS, name, 2750 if name == "train" else 450, digits=3) for name in tasks.SETS}


def asked(record: dict) -> str:
    return record["messages"][0]["content"]


@cache
def ways_to_ask(family: str) -> list:
    """Each composition that the family allows, and a pattern of the instructions that it makes."""
    chosen, found = tasks.FAMILIES[family], []
    for (before, after), verb, thing in product(tasks.POLITE, chosen.verbs, chosen.objects):
        form = before + verb.format(thing) + after
        form = re.escape(form[0].upper() + form[1:]).replace(r"\{a\}", "([a-z]{3,8}|[0-9]{1,3})")
        found.append((re.compile(form.replace(r"\{b\}", "([0-9]{1,3})")), ((before, after), verb, thing)))
    return found


@cache
def take_apart(text: str, family: str):
    found = [(match.groups(), *way) for form, way in ways_to_ask(family) if (match := form.fullmatch(text))]
    assert len(found) == 1, f"{text!r} can be read in {len(found)} ways: which of them is asked for?"
    return found[0]


def read(record: dict):
    """An instruction taken apart, by trying every composition: (its operands, politeness, verb, object)."""
    return take_apart(asked(record), record["family"])


BY_HAND = {
    "repeat": (("love",), "love"), "reverse": (("love",), "evol"), "upper": (("love",), "LOVE"),
    "first": (("love",), "l"), "last": (("love",), "e"), "spell": (("love",), "l-o-v-e"),
    "sort": (("banana",), "aaabnn"), "larger": (("9", "10"), "10"), "add": (("95", "905"), "1000"),
}  # fmt: skip


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_answers_are_right(family, made):
    """The answer of each family by hand, and worked out anew for every instruction as it is read."""
    assert tasks.FAMILIES.keys() == BY_HAND.keys(), "a family without an example here"
    operands, expected = BY_HAND[family]
    for way in tasks.combinations(family, False):
        record = tasks.instruct(family, way, *operands)
        assert record["messages"][1] == {"role": "assistant", "content": expected}, f"{asked(record)!r}: {expected}"
        assert record["family"] == family and record["messages"][0]["role"] == "user", "whose words are they?"
    work = {  # otherwise than in tasks.py
        "repeat": str, "reverse": lambda a: "".join(reversed(a)), "upper": lambda a: a.swapcase(),
        "first": lambda a: list(a).pop(0), "last": lambda a: list(a).pop(), "spell": lambda a: a.replace("", "-")[1:-1],
        "sort": lambda a: "".join(c * a.count(c) for c in "abcdefghijklmnopqrstuvwxyz"),
        "larger": lambda *ab: sorted(ab, key=int)[1],
        "add": lambda a, b: str(len(" " * int(a) + " " * int(b))),
    }  # fmt: skip
    for record in (record for part in made.values() for record in part if record["family"] == family):
        right = work[family](*read(record)[0])
        assert record["messages"][1]["content"] == right, f"{asked(record)!r} has the answer {right}"


def test_an_instruction_is_composed():
    """Politeness, verb and object make one sentence, which begins with a capital."""
    way = (("could you please ", "?"), "spell {} backwards", "the word '{a}'")
    record = tasks.instruct("reverse", way, "love")
    assert asked(record) == "Could you please spell the word 'love' backwards?", "the parts in their order"
    record = tasks.instruct("add", (("I want you to ", "."), "give the total of {}", "these two: {a}, {b}"), "7", "12")
    assert asked(record) == "I want you to give the total of these two: 7, 12.", "both numbers, the first one first"


def test_no_word_or_number_is_in_two_sets(made):
    """The words and pairs of numbers of the set "words" are in no other set; a pair is the same either way round."""
    used = {name: {frozenset(read(record)[0]) for record in part} for name, part in made.items()}
    both = used["words"] & (used["train"] | used["phrasings"])
    assert not both, f"{sorted(map(sorted, both))[:5]} were trained on, perhaps the other way round"
    pairs = {name: sum(len(each) == 2 for each in part) for name, part in used.items()}
    assert min(pairs.values()) > 80, f"few pairs of numbers are in the sets: {pairs}"
    words = {name: {w for each in part if len(each) == 1 for w in each} for name, part in used.items()}
    assert len(words["words"]) == 32 and len(words["train"]) > 280, "one word in ten of 320 is kept for the test"
    assert not words["phrasings"] & words["words"], "a new phrasing is asked of a new word: one thing is new at a time"


def test_no_combination_is_in_two_sets(made):
    """The phrasings of the set "phrasings" are in no other set, though each of their parts is in the training set."""
    used = {name: {(record["family"], *read(record)[1:]) for record in part} for name, part in made.items()}
    both = used["phrasings"] & (used["train"] | used["words"])
    assert not both, f"{sorted(both)[:2]}: this combination was trained on"
    for place, part in ((1, "politeness"), (2, "verb"), (3, "object")):
        seen = {(way[0], way[place]) for way in used["train"]}
        new = {(way[0], way[place]) for way in used["phrasings"]} - seen
        assert not new, f"the {part} {new} was never trained on: it is the combination that is to be new"


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_combinations_are_split(family):
    """Each way to ask is trained on or held out, one in six; each part, and each two of them, stand on both sides."""
    chosen = tasks.FAMILIES[family]
    train, test = tasks.combinations(family, False), tasks.combinations(family, True)
    every = set(product(tasks.POLITE, chosen.verbs, chosen.objects))
    assert {*train} | {*test} == every and len(train) + len(test) == len(every), "a way to ask is lost, or there twice"
    assert abs(len(test) / len(every) - 1 / 6) < 0.02, f"{len(test)} of {len(every)} are held out, not one in six"
    for place in range(3):
        assert {way[place] for way in train} == {way[place] for way in every}, "a part was never trained on"
        assert {way[place] for way in test} == {way[place] for way in every}, "a part is never tested"
        pairs = {(*way[:place], *way[place + 1:]) for way in train}
        assert pairs == {(*way[:place], *way[place + 1:]) for way in every}, "two parts never met in training"


def test_families_take_turns(made):
    """Each family has as many records as it is named, in a test set all the same; numbers have 1 to 3 digits."""
    for name, part in made.items():
        counts = Counter(record["family"] for record in part)
        times = Counter(tasks.PRACTICE if name == "train" else [*tasks.FAMILIES])
        expected = {family: len(part) * n // times.total() for family, n in times.items()}
        assert counts == expected and counts.keys() == tasks.FAMILIES.keys(), f"{name}: {counts}, not {expected}"
        assert len({asked(record) for record in part}) == len(part), f"{name}: an instruction comes twice"
    twice = {name: tasks.make(WORDS, name, 60, ("last", "add", "last")) for name in ("train", "words")}
    counts = {name: Counter(record["family"] for record in part) for name, part in twice.items()}
    assert counts == {"train": {"last": 40, "add": 20}, "words": {"last": 30, "add": 30}}, (
        f"{counts}: one that is named twice is trained twice as often, and tested like any other"
    )
    digits = Counter(len(n) for record in made["train"] if record["family"] == "add" for n in read(record)[0])
    assert min(digits[n] for n in (1, 2, 3)) > 150 and len(digits) == 3, f"numbers of 1, 2 and 3 digits: {digits}"
    assert all(a != b for a, b in (read(r)[0] for r in made["train"] if r["family"] == "larger")), "neither is larger"
    short = {n for record in tasks.make(WORDS, "words", 200, ("add",)) for n in read(record)[0]}
    assert {len(n) for n in short} == {1, 2}, "without being asked for longer ones, numbers have one or two digits"


def test_held_out_pairs_have_no_pattern():
    """One pair of numbers in ten is held out, as if by chance: each two last digits are trained on and tested."""
    rng = random.Random(0)
    drawn = {test: {tasks.numbers(rng, test, 2) for _ in range(6000)} for test in (False, True)}
    for test, pairs in drawn.items():
        missing = set(product("0123456789", repeat=2)) - {(a[-1], b[-1]) for a, b in pairs}
        assert not missing, f"{'test' if test else 'training'}: no number in {min(missing)[0]} meets one in "\
            f"{min(missing)[1]}: the rule that holds pairs out is one about digits"
    unordered = {test: {frozenset(pair) for pair in pairs} for test, pairs in drawn.items()}
    assert not unordered[True] & unordered[False], "a pair is trained on and tested"
    share = len(unordered[True]) / (100 * 99 / 2)
    assert 0.08 < share < 0.12, f"{share:.0%} of the pairs of small numbers are held out, not one in ten"


def test_tasks_repeat_with_their_seed():
    """The same seed gives the same records, whatever is made beside them; another seed other words for the test."""
    first, again, other = (tasks.make(WORDS, "words", 700, ("first", "add"), seed) for seed in (5, 5, 6))
    assert first == again, "the same seed, and other records"
    words = [{read(r)[0] for r in part if r["family"] == "first"} for part in (first, other)]
    assert len(words[0]) == len(words[1]) == 32 and words[0] != words[1], "the seed chooses which words are held out"
    held_out = {word for (word,) in words[0]}
    trained = {word for r in tasks.make(WORDS, "train", 900, ("repeat", "sort"), 5) for word in read(r)[0]}
    assert not held_out & trained, "words held out for one family are trained on in another"


def test_the_words_are_whole_words():
    """Words have 3 to 8 small letters: no names, no parts of longer or apostrophised words; few are refused."""
    others = " ".join(WORDS)
    text = f"To be or not, Romeo: don't o'er-run extraordinary 'tis eightlet ninelette McLove lovE. {others} {others}"
    found = tasks.words(text)
    assert sorted({*found} - {*WORDS}) == ["eightlet", "not", "run"], "whole words of small letters, and no others"
    assert found == sorted(set(found)), "sorted, each once: a set has another order in each process"
    with pytest.raises(BadInput, match="99 words.*longer"):
        tasks.words(" ".join(WORDS[:99]))


@pytest.mark.parametrize(
    ("which", "count", "families", "message"),
    [
        ("train", 10, ("add", "multiply", "divide"), "divide, multiply: choose from repeat"),
        ("test", 10, ("add",), "'test': choose from train"),
        ("words", 201, ("first",), "cannot be made from 2 words"),  # each can be asked of in 100 ways
    ],
    ids=["family", "set", "too many"],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(which, count, families, message):
    """An unknown family or set, and more records than can differ, are refused with what to choose from."""
    with pytest.raises(BadInput, match=message):
        tasks.make(WORDS[:20], which, count, families)
    assert len(tasks.make(WORDS[:20], "words", 200, ("first",))) == 200, "two words in 100 ways are 200 records"


def test_files_are_written(tmp_path, monkeypatch, capsys):
    """tasks.py writes the three sets as JSON lines of messages, which are read back as they were made."""
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text(" ".join(WORDS), encoding="utf-8")
    monkeypatch.setenv("STAGES_OUT", str(out))
    flags = ["--corpus", str(file), "--count", "60", "--test", "20", "--seed", "3", "--digits", "4"]
    flags += ["--families", "add", "reverse"]
    tasks.main([*flags, "--name", "mine"])
    for name, count in (("train", 60), ("words", 20), ("phrasings", 20)):
        path = out / "mine" / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert len(lines) == count and lines[0].keys() == {"messages", "family"}, f"{name}: one record in each line"
        expected = tasks.make(WORDS, name, count, ("add", "reverse"), 3, 4)
        assert read_records(path) == lines == expected, f"{name}: other records than were made"
    said = capsys.readouterr().out
    assert "320 words" in said and asked(lines[0]) not in said, "the training set is shown, and no test set"
    assert asked(json.loads((out / "mine" / "train.jsonl").read_text("utf-8").splitlines()[0])) in said, "nothing shown"
    wrong = {"--count": "0", "--test": "-1", "--digits": "0", "--families": "swim", "--corpus": str(out / "none.txt")}
    for flag in wrong.items():
        with pytest.raises(BadInput):
            tasks.main([*flags, *flag, "--name", "bad"])
    assert not (out / "bad").exists(), "what is refused leaves no folder"
