"""Checkpoints of preferences: how pairs are made, by whom, from which mistakes, and which files are understood."""

import argparse
import json
import math
import random
import re

from shared.errors import BadInput

import judges
import pytest
from judges import talk

import preferences as script
import sft
import tasks
from data import read_records
from preferences import (
    KINDS,
    Annotator,
    against_gold,
    both,
    compared,
    corrupt,
    corrupted,
    draw_answers,
    flip,
    lazy,
    make_pairs,
    open_policy,
    pair,
    quality,
    read_pairs,
    split_by_prompt,
    understand,
)

LOWER, UPPER, DIGITS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"


def sort(character: str) -> str:
    """The letters of a character's own sort; beside a dash stands a small letter."""
    return next((letters for letters in (LOWER, UPPER, DIGITS) if character in letters), LOWER)


def possible(text: str) -> dict[str, set[str]]:
    """Every text with one mistake, by its kind, listed one by one."""
    places = range(len(text))
    swapped = ([*text[:i], text[i + 1], text[i], *text[i + 2:]] for i in places[:-1])
    return {
        "substitute": {text[:i] + new + text[i + 1:] for i in places for new in sort(text[i])} - {text},
        "delete": {text[:i] + text[i + 1:] for i in places} - {""},
        "insert": {text[:i] + new + text[i:] for i in places for new in sort(text[i])},
        "swap": {"".join(letters) for letters in swapped} - {text},
    }


@pytest.mark.parametrize("text", ["aB7", "noon", "l-o", "x", "222"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_is_one_mistake_of_its_kind(kind, text):
    """Of all texts with one mistake each is made, no other is, and none where there is none: one letter has no pair."""
    rng = random.Random(0)
    found = {corrupt(text, kind, rng) for _ in range(2500)}
    expected = possible(text)[kind] or {None}
    assert text not in found, f"{kind}: the corrupted answer {text!r} is the right one"
    assert found <= expected, f"{kind} of {text!r} gives {sorted(map(str, found - expected))[:3]}, which is none"
    assert found == expected, f"{kind} of {text!r} never gives {sorted(map(str, expected - found))[:3]}"


def test_an_unknown_corruption_is_refused():
    """A kind that does not exist is refused, and the known ones are named."""
    with pytest.raises(BadInput, match="'shuffle'.*substitute, delete, insert, swap"):
        corrupt("abc", "shuffle", random.Random(0))


def record(asked: str, answer: str, family: str | None = None) -> dict:
    return {"messages": talk(asked, answer)} | ({"family": family} if family else {})


def texts(made: dict) -> tuple[str, str]:
    """The chosen and the rejected text of a pair."""
    return tuple(made[side][0]["content"] for side in ("chosen", "rejected"))


def test_corrupted_pairs_have_the_kinds_in_turn():
    """Each record's right answer stands against one with a mistake; the kinds take turns, impossible ones are passed.
    """
    answers = ["love", "Zb12", "no-on", "x", "7", "aaa", "y", "word"]
    records = [record(f"question {i}", answer, f"family {i % 3}") for i, answer in enumerate(answers)]
    records[2]["messages"] = talk("before", "that") + records[2]["messages"]
    made = corrupted(records)
    # In turn: substitute, delete, insert, swap. "x" is the fourth: no swap, so a substitution; "aaa" can lose a letter.
    kinds = ["substitute", "delete", "insert", "substitute", "substitute", "delete", "insert", "swap"]
    assert [each["kind"] for each in made] == kinds, "the kinds do not take turns"
    for each, told, kind in zip(made, records, kinds, strict=True):
        chosen, rejected = texts(each)
        assert chosen == told["messages"][-1]["content"], "the right answer is the chosen one"
        assert rejected in possible(chosen)[kind], f"{kind}: {chosen!r} against {rejected!r}"
        assert each["prompt"] == told["messages"][:-1], "all but the last answer is the prompt"
        assert each["family"] == told["family"], "the family is forgotten"
    alone = corrupted(records, ("swap",))
    assert [each["kind"] for each in alone] == ["swap"] * 4, "x, 7, aaa and y have no two letters to swap"
    assert corrupted(records) == made != corrupted(records, seed=1), "the seed decides"


def test_a_pair_is_two_whole_conversations():
    """Both answers of a pair stand behind the whole prompt, the better one first."""
    asked = [{"role": "system", "content": "Be brief."}, *talk("a", "b"), {"role": "user", "content": "c"}]
    better, worse = both(pair(asked, "good", "bad"))
    assert better == [*asked, {"role": "assistant", "content": "good"}], "the first is not prompt and better answer"
    assert worse == [*asked, {"role": "assistant", "content": "bad"}], "the second is not prompt and worse answer"


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("love", "love", 1.0),
        ("lo", "love", 0.5 * 2 * 2 / 6),  # two letters shared, of 2 + 4
        ("loxe", "love", 0.5 * 2 * 3 / 8),
        ("evol", "love", 0.5 * 2 * 1 / 8),  # letters shared in the same order: one
        ("", "love", 0.0),
        ("love.", "love", 0.5 * 8 / 9),
        ("a" * 300, "a" * 299 + "b", 0.5 * 598 / 600),  # long texts are compared as exactly as short ones
    ],
)
def test_quality_by_hand(answer, gold, expected):
    """Only the right answer has quality 1; half of what it shares with the right one is at most a half."""
    assert quality(answer, gold) == pytest.approx(expected), f"{answer!r} where {gold!r} is right"


def test_annotators_by_hand():
    """Quality decides, less a price for each letter; of equal ones the first, and now and then the other by mistake."""
    rng = random.Random(0)
    two = ("c", "cat")  # qualities beside "cats": 0.5 * 2/5 = 0.2 and 0.5 * 6/7 = 0.43
    for brevity, best in {0.0: 1, 0.1: 1, 0.13: 0, -0.2: 1}.items():  # 0.23 for two letters: 0.114 a letter
        assert Annotator(brevity).prefers(two, "cats", rng) == best, f"a letter costs {brevity}"
        assert Annotator(brevity).prefers(two[::-1], "cats", rng) == 1 - best, "another order, another preference"
        assert Annotator(brevity, noise=1.0).prefers(two, "cats", rng) == 1 - best, "always mistaken: the other one"
    assert Annotator(-0.2).prefers(("cats", "cats and dogs"), "cats", rng) == 1, "whoever likes letters takes more"
    assert Annotator().prefers(("xx", "yy"), "cats", rng) == 0, "of two that are equally bad, the first"
    for noise in (0.1, 0.25):
        named = [Annotator(noise=noise).prefers(two, "cats", rng) for _ in range(4000)]
        assert sum(named) / 4000 == pytest.approx(1 - noise, abs=0.03), f"mistaken in {noise:.0%} of the pairs"


def test_annotators_take_turns():
    """Pairs of two different drawn answers go to the annotators in turn; a record with one answer gives no pair."""
    records = [record(f"q {i}", "cats", "f") for i in range(40)]
    drawn = [["c", "cat", "cat"] if i % 3 else ["c", "c", "c"] for i in range(40)]
    made = compared(drawn, records, [Annotator(), Annotator(brevity=0.13), Annotator(noise=1.0)])
    assert [each["prompt"] for each in made] == [r["messages"][:1] for i, r in enumerate(records) if i % 3], (
        "a pair of two equal answers, or records and answers are mixed up"
    )
    chosen = [texts(each)[0] for each in made]
    assert all(sorted(texts(each)) == ["c", "cat"] for each in made), "an answer that was not drawn"
    for i, (who, best) in enumerate([("likes the better", "cat"), ("likes the shorter", "c"), ("is mistaken", "c")]):
        assert {*chosen[i::3]} == {best}, f"annotator {i} {who}, and chooses {chosen[i::3][:4]}"
    assert {(each["kind"], each["family"]) for each in made} == {("compared", "f")}, "the kind or family is not told"
    alike = compared([["xx", "yy"]] * 200, records * 5, [Annotator()])
    first = sum(texts(each)[0] == "xx" for each in alike)
    assert 70 < first < 130, f"of two equally bad answers the one that is first in the alphabet wins {first} of 200"


def test_the_first_wrong_answer_stands_against_the_right_one():
    """The right answer against the first drawn one that is wrong; a record that is always right gives no pair."""
    records = [record("a", "1", "f"), record("b", "2"), record("c", "3")]
    made = against_gold([["1", "7", "8"], ["2", "2", "2"], ["", "3", "9"]], records)
    assert [texts(each) for each in made] == [("1", "7"), ("3", "")], "right against the first wrong one"
    assert [each["prompt"][0]["content"] for each in made] == ["a", "c"], "the answers of another record"
    assert made[0] | {"kind": "sampled", "family": "f"} == made[0], "the kind or the family is not told"


def test_answers_are_drawn_for_the_right_questions(monkeypatch):
    """Each record's answers are drawn, not greedy, from its prompt alone: the right answer is never shown."""
    def answer(opened, asked, length, config, rows, generator):
        assert config.temperature == 0.7 and length == 12, "another temperature or length than was asked for"
        assert all(talk[-1]["role"] == "user" for talk in asked), "the right answer is shown to the policy"
        return [f"{talk[-1]['content']} {generator.initial_seed()}.{i}" for i, talk in enumerate(asked)], None

    monkeypatch.setattr(script, "answers", answer)
    found = draw_answers("a policy", [record("a", "1"), record("b", "2")], 3, 0.7, seed=5, length=12)
    assert found == [["a 5.0", "a 5.1", "a 5.2"], ["b 5.3", "b 5.4", "b 5.5"]], "another record's answers"


def test_drawn_answers_are_random_and_repeat():
    """The same seed draws the same answers; those of one record differ, and so do those of another seed."""
    opened, records = judges.policy(), [record("a", "1"), record("say b", "2")]
    first, again, other = (draw_answers(opened, records, 3, seed=seed, length=6) for seed in (5, 5, 6))
    assert first == again != other, "the seed does not decide"
    assert [len(set(drawn)) for drawn in first] == [3, 3], "three answers of a random model are three"


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 1])
def test_a_share_of_pairs_is_flipped(share):
    """Exactly the share of the pairs is the wrong way round, spread over all; nothing else changes, nor do the pairs.
    """
    made = [pair(talk(f"q {i}", "-")[:1], f"good {i}", f"bad {i}", kind="swap") for i in range(200)]
    found = flip(made, share)
    wrong = [i for i, each in enumerate(found) if texts(each) == (f"bad {i}", f"good {i}")]
    assert len(wrong) == 200 * share, f"{len(wrong)} of 200 pairs are flipped, {share:.0%} were asked for"
    back = [{**e, "chosen": e["rejected"], "rejected": e["chosen"]} if i in wrong else e for i, e in enumerate(found)]
    assert back == made, "more is changed than which answer is chosen"
    assert texts(made[wrong[0] if wrong else 0])[0].startswith("good"), "the pairs that were given are changed"
    if 0 < share < 1:
        assert min(wrong) < 60 and max(wrong) > 140, "only one end of the set is flipped"
        assert flip(made, share) == found != flip(made, share, seed=1), "the seed decides which"


def test_flipped_pairs_are_not_learned_first():
    """Pairs flipped and then shuffled with one seed, as training does: a half of each half of the order is flipped."""
    pairs = [{"chosen": f"a{i}", "rejected": f"b{i}"} for i in range(1000)]
    for seed in (0, 1337):
        order = random.Random(seed).sample(flip(pairs, 0.5, seed), len(pairs))
        share = sum(each["chosen"].startswith("b") for each in order[:500]) / 500
        assert abs(share - 0.5) < 0.1, f"{share:.0%} of the first half are flipped: two draws share random numbers"


@pytest.mark.parametrize("share", [-0.1, 1.01, math.nan])
def test_an_impossible_share_is_refused(share):
    """A share below 0, above 1 or nan is refused."""
    with pytest.raises(BadInput, match="from 0 to 1"):
        flip(judges.pairs(), share)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_no_prompt_is_on_both_sides(share):
    """Every pair is kept, and all pairs of one prompt stand on one side, however the pairs are ordered."""
    rng = random.Random(1)
    made = [pair(talk(f"q {i % 50}", "-")[:1], f"good {i}", f"bad {i}") for i in range(170)]
    rng.shuffle(made)
    training, test = split_by_prompt(made, share, seed=4)
    prompts = [{each["prompt"][0]["content"] for each in part} for part in (training, test)]
    assert not prompts[0] & prompts[1], f"{len(prompts[0] & prompts[1])} prompts are trained on and tested"
    assert len(prompts[1]) == 50 * share, f"{len(prompts[1])} of 50 prompts are held out, not {share:.0%}"
    assert sorted(map(str, training + test)) == sorted(map(str, made)), "a pair is lost, or comes twice"
    assert (training, test) == split_by_prompt(made, share, seed=4), "the same seed, another split"
    assert (training, test) != split_by_prompt(made, share, seed=5), "another seed, the same split"
    assert len(split_by_prompt(made[:3], 0.1)[1]) >= 1, "of few prompts one is held out all the same"


WORDS = ["love", "noon", "eye", "level", "aaa", "abc", "cba", "deed", "sees", "zoo", "abccba"]
WORDS += ["".join(random.Random(i).choices("abc", k=3 + i % 5)) for i in range(300)]
MISTAKES = {  # what each family's lazy answer is for one record, by hand
    "repeat": (("love",), "lov"), "reverse": (("love",), "love"), "upper": (("love",), "Love"),
    "first": (("love",), "L"), "last": (("love",), "E"), "spell": (("love",), "love"), "sort": (("love",), "vole"),
    "larger": (("9", "12"), "120"), "add": (("9", "90"), "100"),
}  # fmt: skip


def told(family: str, *operands: str) -> dict:
    return tasks.instruct(family, tasks.combinations(family, False)[0], *operands)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_a_lazy_answer_is_never_right(family):
    """Each family has its own mistake, and it is always wrong: a palindrome written as it stands would be right."""
    operands, expected = MISTAKES[family]
    [done] = lazy([told(family, *operands)], share=1.0)
    assert done["messages"][-1]["content"] == expected, f"{family} of {operands} is done lazily"
    numbers = [(str(a), str(b)) for a in range(12) for b in range(12) if a != b]
    records = [told(family, *o) for o in (numbers if family in ("larger", "add") else zip(WORDS))]
    before = json.dumps(records)
    for given, found in zip(records, lazy(records, share=1.0), strict=True):
        right, wrong = (each["messages"][-1]["content"] for each in (given, found))
        assert wrong != right, f"the mistake in {given['messages'][0]['content']!r} is the right answer, {right!r}"
        assert wrong.strip(), f"the answer to {given['messages'][0]['content']!r} is empty"
        assert found["messages"][:-1] == given["messages"][:-1] and found["family"] == family, "the question changed"
    assert json.dumps(records) == before, "the right records themselves were changed"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_the_share_of_lazy_answers(share):
    """That share of the answers is wrong, the others are as they were, and the seed decides which."""
    records = [told(family, *MISTAKES[family][0]) for family in tasks.FAMILIES] * 300
    found = lazy(records, share)
    wrong = [a != b for a, b in zip(found, records, strict=True)]
    assert sum(wrong) / len(wrong) == pytest.approx(share, abs=0.03), f"{sum(wrong)} of {len(wrong)} are wrong"
    assert found == lazy(records, share), "the same seed, and other mistakes"
    assert share == 0 or found != lazy(records, share, seed=1), "another seed, and the same mistakes"


ASKED, MORE = talk("What is 2 + 3?", "-")[:1], [{"role": "system", "content": "Count."}]
PLAIN = pair(ASKED, "5", "23")
# The forms of TRL: docs/source/dataset_formats.md, "Preference". The last one is Alpaca's.
FORMS = {
    "texts": ({"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "23"}, PLAIN),
    "spaces around texts": ({"prompt": "What is 2 + 3? ", "chosen": " 5", "rejected": " 23\n"}, PLAIN),
    "messages": ({"prompt": ASKED, "chosen": talk("-", "5")[1:], "rejected": talk("-", "23")[1:]}, PLAIN),
    "a prompt of several turns": (
        {"prompt": MORE + talk("a", "b") + ASKED, "chosen": talk("-", "5")[1:], "rejected": talk("-", "23")[1:]},
        pair(MORE + talk("a", "b") + ASKED, "5", "23"),
    ),
    "whole conversations": (
        {"chosen": MORE + talk("What is 2 + 3?", "5"), "rejected": MORE + talk("What is 2 + 3?", "23")},
        pair(MORE + ASKED, "5", "23"),
    ),
    "an instruction": ({"instruction": "What is 2 + 3?", "input": "", "output": "5!", "chosen": "5", "rejected": "23"},
                       PLAIN),
    "an instruction with input": (
        {"instruction": "Add.", "input": "2, 3", "chosen": "5", "rejected": "23"},
        pair(talk("Add.\n\n2, 3", "-")[:1], "5", "23"),
    ),
    "our own": (PLAIN | {"kind": "insert", "family": "add"}, PLAIN | {"kind": "insert", "family": "add"}),
    "with what we have no use for": ({"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "23", "score": 4}, PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_usual_forms_of_pairs_are_understood(name, tmp_path):
    """TRL's forms with a prompt, texts or messages, whole conversations and Alpaca's: all become the same pair."""
    given, expected = FORMS[name]
    assert understand(given) == expected, f"{name}: another pair"
    for content in (json.dumps(given) + "\n\n" + json.dumps(given), json.dumps([given, given], indent=1)):
        (tmp_path / "pairs.json").write_text(content, encoding="utf-8")
        assert read_records(tmp_path / "pairs.json", understand) == [expected] * 2, f"{name}: in a file"


BAD = {
    "no chosen": ({"prompt": "a", "completion": "b"}, "no chosen and rejected"),
    "no object": (["chosen", "rejected"], "no chosen and rejected"),
    "no prompt": ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "messages must be a list"),
    "other prompts": ({"chosen": talk("a", "b"), "rejected": talk("c", "d")}, "different prompts"),
    "other turns before": (
        {"prompt": "a", "chosen": [*talk("-", "b")[1:], *talk("c", "d")], "rejected": [*talk("-", "x")[1:],
         *talk("c", "e")]}, "different prompts",
    ),
    "an empty answer": ({"prompt": "a", "chosen": "b", "rejected": " "}, "no text, or empty"),
    "a number": ({"prompt": "a", "chosen": 1, "rejected": "b"}, "."),
    "no instruction": ({"instruction": 3, "chosen": "1", "rejected": "b"}, "must be texts"),
    "a question last": ({"chosen": ASKED, "rejected": ASKED}, "ends with an answer"),
    "a stranger": ({"prompt": [{"role": "boss", "content": "x"}], "chosen": "b", "rejected": "c"}, "'boss'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs_are_refused(name, tmp_path):
    """What is no pair is refused with its file and line, in one line that says why."""
    given, reason = BAD[name]
    with pytest.raises(ValueError, match=reason):
        understand(given)
    (tmp_path / "mine.jsonl").write_text(json.dumps(PLAIN) + "\n" + json.dumps(given) + "\n", encoding="utf-8")
    with pytest.raises(BadInput, match=r"mine\.jsonl, line 2: ") as refused:
        read_records(tmp_path / "mine.jsonl", understand)
    assert "\n" not in str(refused.value), "one line"


def test_pairs_of_twice_the_same_answer_are_left_out(tmp_path, capsys):
    """Real files have pairs of two equal answers: they say nothing, and are left out, which is said."""
    ties = [{"prompt": "a", "chosen": "b", "rejected": "b "}, {"prompt": "a", "chosen": "c", "rejected": "c"}]
    (tmp_path / "mine.jsonl").write_text(tasks.dumps([ties[0], PLAIN, ties[1]]), encoding="utf-8")
    assert read_pairs(tmp_path / "mine.jsonl") == [PLAIN], "a pair of two equal answers is learned, or tested"
    assert "2 of 3 pairs" in " ".join(capsys.readouterr().out.split()), "it is not said that pairs are left out"
    (tmp_path / "ties.jsonl").write_text(tasks.dumps(ties), encoding="utf-8")
    with pytest.raises(BadInput, match=r"ties\.jsonl has no pair of two different answers"):
        read_pairs(tmp_path / "ties.jsonl")


def test_written_pairs_are_in_trls_form_and_come_back(tmp_path):
    """What is written are lines of `prompt`, `chosen` and `rejected`, each a list of messages, and reads as it was."""
    made = corrupted([told(family, *MISTAKES[family][0]) for family in tasks.FAMILIES])
    file = tmp_path / "pairs.jsonl"
    file.write_text(tasks.dumps(made), encoding="utf-8")
    for row in map(json.loads, file.read_text("utf-8").splitlines()):
        for side in ("prompt", "chosen", "rejected"):
            assert all(message.keys() == {"role", "content"} for message in row[side]), f"{side} is no list of messages"
        roles = [[message["role"] for message in row[side]] for side in ("prompt", "chosen", "rejected")]
        assert roles == [["user"], ["assistant"], ["assistant"]], "an answer stands in the prompt, or the reverse"
    assert read_records(file, understand) == made, "written and read again, the pairs have changed"


def flags(**changes):
    plain = {"data": None, "corpus": None, "pairs": 40, "kinds": list(KINDS), "noise": 0.0, "seed": 7}
    return argparse.Namespace(**plain | {"policy": "lazy", "device": "cpu"} | changes)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The flags of pairs from a small text; few records are made, and the policy is always wrong but for `add`."""
    (tmp_path / "text.txt").write_text(judges.corpus(), encoding="utf-8")
    real, asked = tasks.make, []

    def draw(opened, records, n, seed):
        asked.append((len(records), n, seed))
        return [[r["messages"][-1]["content"] if r["family"] == "add" else f"wrong {i}" for i in range(n)]
                for r in records]  # fmt: skip

    monkeypatch.setattr(tasks, "make", lambda known, name, n, **how: real(known, name, min(n, 90), **how))
    monkeypatch.setattr(script, "draw_answers", draw)
    return lambda **changes: (make_pairs(flags(corpus=str(tmp_path / "text.txt"), **changes), "a policy"), asked)


def prompts(made: list[dict]) -> set[str]:
    return {each["prompt"][0]["content"] for each in made}


def test_the_pairs_of_the_default_run(small):
    """Every kind of corruption and the policy's own mistakes are learned, and each is held out by itself, on new words.
    """
    (training, held_out), asked = small()
    assert [*held_out] == [*KINDS, "sampled"], "a kind is not tested by itself"
    for kind, made in held_out.items():
        assert {each["kind"] for each in made} == {kind}, f"{kind}: other pairs among them"
        assert not prompts(made) & prompts(training), f"{kind}: prompts that are trained on"
        assert all(texts(each)[0] != texts(each)[1] for each in made), "an answer against itself"
    assert len(held_out["insert"]) == 90 and len(held_out["sampled"]) == 80, "every record that has a wrong answer"
    kinds = [each["kind"] for each in training]
    assert {*kinds} == {*KINDS, "sampled"} and kinds.count("insert") >= 10, f"{kinds}: not all kinds are learned"
    assert asked == [(10, 2, 7), (90, 4, 8)], "the policy's answers for training and test are drawn apart"
    (deletions, others), _ = small(kinds=["delete"])
    assert {each["kind"] for each in deletions} == {"delete"}, "of deletions alone, other pairs are learned"
    assert others == held_out, "what is learned changes what is held out"
    (noisy, clean), _ = small(noise=0.25)
    wrong = [a != b for a, b in zip(noisy, training, strict=True)]
    assert sum(wrong) == round(len(training) / 4) and clean == held_out, "a quarter of what is learned, and no test"


def test_the_words_of_the_test_are_those_of_every_seed(small, tmp_path):
    """Another seed has other mistakes in the same tasks: the policy and all judges are tested on the same new words."""
    known = tasks.words((tmp_path / "text.txt").read_text("utf-8"))
    held_out, learned = (prompts([pair(r["messages"][:1], "a", "b") for r in tasks.make(known, which, 90)])
                         for which in ("words", "train"))
    (first, test), _ = small(seed=1)
    (second, other), _ = small(seed=2)
    assert prompts(test["swap"]) <= held_out and prompts(other["insert"]) == prompts(test["insert"]) == held_out, (
        "the seed decides which words are new: the policy, which has one seed, was tuned on most of them"
    )
    assert prompts(first) | prompts(second) <= learned, "words of the test are learned by the judge of another seed"
    assert [texts(each) for each in test["insert"]] != [texts(each) for each in other["insert"]], "the same mistakes"


def test_a_policy_that_is_always_right_leaves_a_kind_out(small, monkeypatch):
    """Where the policy makes no mistakes there are none to rank, and the other kinds are there all the same."""
    monkeypatch.setattr(script, "draw_answers",
                        lambda opened, records, n, seed: [[r["messages"][-1]["content"]] * n for r in records])
    (training, held_out), _ = small()
    assert [*held_out] == [*KINDS], "a set of no pairs is tested"
    assert {each["kind"] for each in training} == {*KINDS}, "a right answer against itself"


def test_the_pairs_of_a_file(tmp_path):
    """A file is split by prompts; noise flips what is learned and nothing that is held out."""
    made = [pair(talk(f"q {i % 40}", "-")[:1], f"good {i}", f"bad {i}") for i in range(80)]
    (tmp_path / "pairs.jsonl").write_text(tasks.dumps(made), encoding="utf-8")
    training, held_out = make_pairs(flags(data=tmp_path / "pairs.jsonl"), None)
    assert [*held_out] == ["held out"] and len(held_out["held out"]) == 8, "a tenth of the prompts, with all pairs"
    assert not prompts(training) & prompts(held_out["held out"]), "prompts that are trained on and tested"
    noisy, same = make_pairs(flags(data=tmp_path / "pairs.jsonl", noise=0.25), None)
    assert sum(texts(each)[0].startswith("bad") for each in noisy) == 18, "a quarter of 72 pairs is flipped"
    assert same == held_out, "the pairs that are tested are flipped as well"


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("STAGES_FROM", str(tmp_path))
    (tmp_path / "text.txt").write_text(judges.corpus(), encoding="utf-8")
    return tmp_path / "out"


def test_the_policy_is_tuned_where_there_is_none(out, monkeypatch, capsys):
    """The run "lazy" is tuned on demonstrations with mistakes, resumed where it was stopped, and opened when it is
    there; any other name is only opened."""
    real, words = tasks.make, []
    monkeypatch.setattr(tasks, "make", lambda known, name, n: real(known, name, 450))

    def tune(argv):
        words.append(argv)
        if len(words) == 1:  # stopped by Ctrl-C
            judges.write(out, "lazy", judges.policy())
            (out / "lazy" / "summary.json").unlink()
            return 130
        (out / "lazy" / "summary.json").write_text("{}")

    monkeypatch.setattr(sft, "main", tune)
    with pytest.raises(SystemExit) as left:
        open_policy(flags(corpus="text.txt"), "cpu")
    assert left.value.code == 130, "after Ctrl-C in the policy's tuning, the judge is trained all the same"
    told = dict(zip(words[0][::2], words[0][1::2], strict=True))
    assert {"--data", "--corpus", "--device"} <= told.keys() and told["--name"] == "lazy", f"sft.py is told {words[0]}"
    assert (told["--corpus"], told["--device"]) == ("text.txt", "cpu"), "another corpus or device than was asked for"
    shown = [each["messages"] for each in read_records(told["--data"]) if each["family"] == "repeat"]
    wrong = sum(not re.search(rf"\b{answer['content']}\b", asked["content"]) for asked, answer in shown)
    assert wrong / len(shown) == pytest.approx(0.6, abs=0.15), f"{wrong} of {len(shown)} demonstrations are wrong"
    opened = open_policy(flags(corpus="text.txt"), "cpu")
    assert words[1] == ["--name", "lazy", "--resume"], "a policy that was stopped is begun anew"
    assert opened.model.config.n_embd == 16, "not the policy that was tuned"
    open_policy(flags(), "cpu")
    assert len(words) == 2, "a policy that is there is tuned again"
    with pytest.raises(BadInput):
        open_policy(flags(policy="nowhere"), "cpu")
    assert len(words) == 2, "another policy than the default was tuned"


def test_the_script_writes_and_checks_pairs(out, tmp_path, capsys):
    """`preferences.py` writes pairs and shows some; with --data it shows a file's, and refuses a bad one by line."""
    assert script.main(["--corpus", "text.txt", "--count", "50", "--name", "mine"]) is None
    assert "50 pairs" in capsys.readouterr().out, "it is not said how many pairs there are"
    file = out / "mine" / "corrupted.jsonl"
    assert {each["kind"] for each in read_records(file, understand)} == {*KINDS}, "a kind is missing"
    script.main(["--data", str(file)])
    assert "50 pairs" in capsys.readouterr().out, "a file that was written is not read whole"
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n', encoding="utf-8")
    for words, reason in {("--data", "bad.jsonl"): "bad.jsonl, line 1", ("--count", "0"): "at least 1"}.items():
        with pytest.raises(BadInput, match=reason):
            script.main([*words])
