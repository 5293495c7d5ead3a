"""Checkpoints of evaluation: intervals, token F1, answers in batches, the choice of four, the loss on a text."""

import math

from shared.errors import BadInput

import numpy as np
import pytest
import random_talks
import torch
from torch import nn

import checkpoint
import evaluate as script
import tasks
from chat import conversation, form, ours, prompt, with_tags
from evaluate import answer_log_probs, answers, choose, interval, main, score, text_loss, token_f1
from model import GPT, ModelConfig
from sample import SampleConfig
from tokenizer import train_tokenizer


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(right, n, low, high):
    """Wilson's interval for four published shares, and for their complements turned around."""
    assert interval(right, n) == pytest.approx((low, high), abs=6e-5), f"{right} of {n}: not Wilson's interval"
    assert interval(n - right, n) == pytest.approx((1 - high, 1 - low), abs=6e-5), "right and wrong are not alike"


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (10, 10), (3, 7), (450, 900), (899, 900)])
def test_the_interval_ends_where_the_share_would_be_odd(right, n):
    """At both ends p the observed share is 1.96 standard errors of p away: the two roots of a quadratic equation."""
    p, z2 = right / n, 1.96**2
    roots = np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p]).real  # (p - x)^2 = z^2 x (1 - x) / n
    assert interval(right, n) == pytest.approx(sorted(roots), abs=1e-9), f"{right} of {n}: other ends than by the roots"
    low, high = interval(right, n)
    assert 0 <= low <= p <= high <= 1 and high - low > 0, "a share lies within 0 and 1, and is never certain"


def test_no_answers_have_no_interval():
    """Of no answers nothing can be said."""
    with pytest.raises(BadInput, match="at least one record"):
        interval(0, 0)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ([1, 2, 2], [2, 2, 3], 2 / 3), ([1, 2], [1, 2], 1), ([2, 1], [1, 2], 1), ([1], [2], 0), ([], [1], 0),
        ([1], [], 0), ([], [], 1),
        ([7, 7, 7, 7], [7], 2 / 5),  # precision 1/4, recall 1: an answer does not get better by being said again
        ([1, 2, 3], [3, 4, 5, 6, 7], 1 / 4),  # precision 1/3, recall 1/5
    ],
)  # fmt: skip
def test_token_f1_by_hand(answer, gold, expected):
    """The harmonic mean of precision and recall, tokens counted as often as they are in both, in any order."""
    assert token_f1(answer, gold) == pytest.approx(expected), f"{answer} for {gold}: F1 is 2 shared / (all of both)"


ASKED = [
    [{"role": "user", "content": "a"}], [{"role": "user", "content": "bad cab. no"}],
    [{"role": "system", "content": "be fine"}, {"role": "user", "content": "do it"}],
    [{"role": "user", "content": "make a chain of all"}], [{"role": "user", "content": "come"}],
    [{"role": "user", "content": "go"}, {"role": "assistant", "content": "of"}, {"role": "user", "content": "go on"}],
    [{"role": "user", "content": "lick"}],
]  # fmt: skip


@torch.no_grad()
def greedy(opened, messages, length: int) -> tuple[str, bool]:
    """The likeliest token, again and again, each from a pass over all before it: no cache, no padding, no batch."""
    ids, written, texts = prompt(opened, messages), [], opened.tokenizer.texts
    while len(written) < length:
        token = opened.model(torch.tensor([ids + written]))[0, -1].argmax().item()
        if token in opened.ends:
            break
        written.append(token)
    said = "".join("?" if texts[token] in opened.tokenizer.special else texts[token] for token in written)
    return said, len(written) < length


def chatty():
    """A random model that ends some of its answers early and others not at all."""
    opened = random_talks.opened(block_size=64, tied=False)
    opened.ends = {*opened.ends, 3}  # some models have several ends
    return opened


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_answers_in_a_batch_are_those_one_by_one(rows):
    """Prompts of ragged lengths answered together get the answers, and the ends, of a plain loop over each alone."""
    opened = chatty()
    expected = [greedy(opened, messages, 9) for messages in ASKED]
    assert {over for _, over in expected} == {True, False}, "the model ends all of its answers, or none"
    assert len({len(text) for text, over in expected if over}) > 1, "all answers are of one length"
    texts, ended = answers(opened, ASKED, 9, rows=rows)
    assert texts == [text for text, _ in expected], f"{rows} at once: a neighbour or padding changes the answer"
    assert ended == [over for _, over in expected], f"{rows} at once: which answers are over is not told right"
    last = max((text for text, over in expected if over), key=len)
    assert answers(opened, ASKED, len(last) + 1, rows=rows)[1][texts.index(last)], "its last token is the end: over"
    assert not answers(opened, ASKED, len(last), rows=rows)[1][texts.index(last)], "cut before its end: not over"


def test_answers_can_be_drawn():
    """With a temperature answers are drawn, the same ones for the same seed."""
    opened, config = chatty(), SampleConfig(temperature=1.0)
    seeds = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    first, again, other = (answers(opened, ASKED, 9, config, generator=seed)[0] for seed in seeds)
    assert first == again != other, "the same seed draws the same answers, another one others"
    assert first != answers(opened, ASKED, 9)[0], "drawn answers are the likeliest ones"


TALKS = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in (
    ("a cab", "b"), ("bad", "a long one. and no end of it"), ("fine?", "no"), ("a black kid came", "black"),
    ("go", "mad"),
)]  # fmt: skip
TALKS.append([*TALKS[2], {"role": "user", "content": "go on"}, {"role": "assistant", "content": "of old"}])


@torch.no_grad()
def told(opened, messages) -> float:
    """ln P of the last answer and its end, one token after another, in float64."""
    ids, start = prompt(opened, messages, add_generation_prompt=False), len(prompt(opened, messages[:-1]))
    scores = opened.model(torch.tensor([ids]))[0].log_softmax(-1)  # [N, V]
    assert ids[-1] in opened.ends, "an answer ends with its end token"
    return sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids)))


@pytest.mark.parametrize("rows", [2, 100])
def test_the_likelihood_of_an_answer_is_its_own(rows):
    """ln P of ragged answers in one batch: the sum over the answer's tokens and its end, as for each alone."""
    opened = random_talks.opened()
    for mode in (True, False):
        opened.model.train(mode)
        found = answer_log_probs(opened, TALKS, rows)
        assert found.tolist() == pytest.approx([told(opened, talk) for talk in TALKS], rel=1e-5), (
            "the sum over the answer's tokens: those of the question or of padding are in it, or its end is not"
        )
        assert opened.model.training is mode, "scoring changes the mode of the model"


def records(family: str, *golds: str) -> list[dict]:
    return [{"messages": [{"role": "user", "content": f"ask {chr(97 + i)}"}, {"role": "assistant", "content": gold}],
             "family": family} for i, gold in enumerate(golds)]  # fmt: skip


def test_the_wrong_answers_to_choose_from(monkeypatch):
    """Wrong answers are other ones of the same family, those as long as the right one first, none of them twice."""
    asked = []

    def likes(opened, talks):
        asked.extend([talk[0]["content"], talk[1]["content"]] for talk in talks)
        return torch.tensor([float(talk[1]["content"] in ("ab", "123")) for talk in talks])

    monkeypatch.setattr(script, "answer_log_probs", likes)
    given = records("x", "ab", "cd", "efghij", "k", "ab", "op") + records("y", "123", "4567", "89")
    found = choose(None, given, 3)
    groups = [asked[i:i + 3] for i in range(0, len(asked), 3)]
    assert len(groups) == 9 and all(len({question for question, _ in group}) == 1 for group in groups)
    told = [[answer for _, answer in group] for group in groups]
    assert [group[0] for group in told] == [record["messages"][1]["content"] for record in given], "the right one first"
    families = {"ab", "cd", "efghij", "k", "op"}, {"123", "4567", "89"}
    for group in told:
        assert len({*group}) == 3, f"{group}: an answer stands twice among those to choose from"
        assert any({*group} <= family for family in families), f"{group}: a wrong answer of another family tells itself"
    assert {*told[0][1:]} == {"cd", "op"} and {*told[1][1:]} == {"ab", "op"}, "wrong answers as long as the right one"
    assert found == pytest.approx(3 / 9), f"{found:.2f}: right are both 'ab' and '123', of nine records"


def test_the_choice_is_the_likeliest_answer():
    """The share of right choices of a real model is that of the likelihoods worked out one by one."""
    opened = random_talks.opened()
    given = records("x", "ab", "cd", "ef", "gh") + records("y", "a", "b", "c", "d")
    hits = []
    for record in given:
        golds = {r["messages"][1]["content"] for r in given if r["family"] == record["family"]}
        gold = record["messages"][1]["content"]
        asked = record["messages"][:1]
        chance = {text: told(opened, [*asked, {"role": "assistant", "content": text}]) for text in golds}
        hits.append(max(chance, key=chance.get) == gold)
    assert 0 < sum(hits) < len(hits), "all choices are right, or none is"
    assert choose(opened, given) == pytest.approx(sum(hits) / 8), "not the share of records whose answer is likeliest"
    few = choose(opened, [*given, *records("z", "a", "b", "c")])
    assert few == pytest.approx(sum(hits) / 8), "a family of three answers has no choice of four, and does not count"
    assert math.isnan(choose(opened, records("z", "a", "b"))), "where nothing can be chosen there is no share"


@pytest.mark.parametrize("value", [-1.5, math.nan])
def test_a_tie_is_no_right_choice(value, monkeypatch):
    """A model that finds all four answers equally likely, or is broken, has chosen nothing: the first is not right."""
    monkeypatch.setattr(script, "answer_log_probs", lambda opened, talks: torch.full((len(talks),), value))
    found = choose(None, records("x", "ab", "cd", "ef", "gh"))
    assert found == 0, f"where every answer has ln P {value}, {found:.0%} of the choices are right"


def test_the_score_by_hand(monkeypatch):
    """A row for each family, and their mean: exact only with an end, F1 by tokens, and the interval of the mean."""
    opened = random_talks.opened()
    given = records("x", "abc", "dea", "fab") + records("y", "ba", "c")
    texts, over = ["abc", "dea", "f", "ab", "c"], [True, False, True, True, True]

    def answered(opened, asked, length):
        assert asked == [record["messages"][:-1] for record in given], "the right answer is told with the question"
        assert length == 17, "another length than was asked for"
        return texts, over

    monkeypatch.setattr(script, "answers", answered)
    found = score(opened, given, 17)
    assert [row["family"] for row in found] == ["x", "y", "mean"], "a row for each family, and one for their mean"
    x, y, mean = found
    assert (x["exact"], y["exact"]) == (1 / 3, 1 / 2), "right to the last character, and with an end: 1 of 3, 1 of 2"
    assert x["f1"] == pytest.approx((1 + 1 + 1 / 2) / 3) and y["f1"] == 1, "F1 of tokens, in any order"
    assert x["ended"] == pytest.approx(2 / 3) and y["ended"] == 1, "the share of answers that ended"
    assert (x["low"], x["high"]) == interval(1, 3), "the interval of 1 right answer of 3"
    assert mean["exact"] == pytest.approx(5 / 12) and mean["f1"] == pytest.approx((5 / 6 + 1) / 2), (
        "families count alike, however many records they have"
    )
    assert mean["ended"] == pytest.approx(5 / 6)
    widths = [row["high"] - row["low"] for row in (x, y)]
    assert (mean["low"] + mean["high"]) / 2 == pytest.approx(5 / 12), "the interval lies about the mean"
    spread = mean["high"] - mean["low"]
    assert spread == pytest.approx(math.hypot(*widths) / 2), "of independent families: squares add up, then the root"
    texts[:], over[:] = [record["messages"][1]["content"] for record in given], [True] * 5
    best = score(opened, given, 17)[-1]
    assert best["exact"] == best["high"] == 1 and 0 < best["low"] < 1, "a share is never above 1, nor is its interval"
    bare = [{"messages": record["messages"]} for record in given]
    assert [row["family"] for row in score(opened, bare, 17)] == ["all", "mean"], "records without a family are one"


@pytest.mark.parametrize("tagged", [False, True])
def test_the_loss_on_a_text_is_per_character(tagged, tmp_path):
    """The mean of -ln P over the validation text's characters but the first, from windows side by side."""
    text = random_talks.text(1000)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = train_tokenizer("char", text, 0)
    model = GPT(ModelConfig(vocab_size=len(tokenizer), block_size=16, n_embd=8, n_head=2, n_layer=1)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    if tagged:  # a tuned model writes the same text in the same characters, with other ids
        model, tokenizer = with_tags(model, tokenizer, "0123")
        model.double()
    ids = torch.tensor(tokenizer.encode(text[int(0.9 * len(text)):]))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            scores = model(ids[None, start:min(start + 16, len(ids) - 1)])[0].log_softmax(-1)
            total -= sum(scores[i, ids[start + i + 1]].item() for i in range(len(scores)))
    found = text_loss(model, tokenizer, str(tmp_path / "text.txt"))
    assert found == pytest.approx(total / (len(ids) - 1), rel=1e-5), "nats per character of the last tenth of the text"


def test_byte_pairs_are_told_per_character_too(tmp_path):
    """With tokens of several characters the loss is still per character: a loss per token would be several times it."""
    text = random_talks.text(6000)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer("bpe", text, 300)
    model = GPT(ModelConfig(vocab_size=len(tokenizer), block_size=16, n_embd=8, n_head=2, n_layer=1))
    nn.init.zeros_(model.tok_emb.weight)  # every token is equally likely: ln V nats each
    held_out = text[int(0.9 * len(text)):]
    tokens = len(tokenizer.encode(held_out))
    expected = math.log(len(tokenizer)) * tokens / len(held_out)
    found = text_loss(model, tokenizer, str(tmp_path / "text.txt"))
    assert found == pytest.approx(expected, rel=0.01), f"{tokens} tokens for {len(held_out)} characters: per character"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A tuned run "tiny" that has learned nothing, a text with the words of its tasks, and where the user stands."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("STAGES_FROM", str(tmp_path))
    (tmp_path / "text.txt").write_text(random_talks.text(), encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = train_tokenizer("char", "".join(map(chr, range(32, 127))), 0)
    model = GPT(ModelConfig(vocab_size=len(tokenizer), block_size=96, n_embd=8, n_head=2, n_layer=1))
    opened = ours(*with_tags(model, tokenizer))
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    checkpoint.save(tmp_path / "out" / "tiny" / "model.pt", opened.model, opened.tokenizer, **form(opened),
                    optimizer={}, args={}, step=1, seconds=1.0)  # fmt: skip
    return tmp_path


def test_the_script_scores_a_run(run, capsys):
    """`evaluate.py` tells both test sets by family, or the records of a file, and the choice of four."""
    words = ["--model", "tiny", "--corpus", "text.txt", "--count", "9", "--length", "5", "--device", "cpu"]
    main(words)
    out = capsys.readouterr().out
    assert all(name in out for name in ("words", "phrasings", *tasks.FAMILIES, "mean")), f"a row is missing\n{out}"
    assert out.count("choice of four") == 2, "a choice of four for each set"
    (run / "my.jsonl").write_text(tasks.dumps(records("mine", "ab", "cd")), encoding="utf-8")
    main([*words, "--data", "my.jsonl"])
    out = capsys.readouterr().out
    assert "my.jsonl" in out and "mine" in out and "phrasings" not in out, "the records of the file, and no others"


def test_a_run_is_scored_on_its_own_test_sets(run, monkeypatch):
    """Without flags the test sets are those of the run: its text, families, digits and seed; a flag wins over them."""
    file = run / "out" / "tiny" / "model.pt"
    model, tokenizer, state = checkpoint.load(file)
    rest = {name: state[name] for name in ("template", "names", "ends", "optimizer", "step", "seconds")}
    own = {"corpus": "text.txt", "families": ["upper", "add"], "digits": 3, "seed": 1, "steps": 5}
    checkpoint.save(file, model, tokenizer, **rest, args=own)
    scored, chosen = [], []
    monkeypatch.setattr(script, "score", lambda opened, records, length: scored.append(records) or [])
    monkeypatch.setattr(script, "choose", lambda opened, records: chosen.append(records) or 0.0)
    known = tasks.words((run / "text.txt").read_text("utf-8"))
    for words, how in (([], {"seed": 1}), (["--seed", "5", "--families", "add"], {"seed": 5, "families": ("add",)})):
        main(["--model", "tiny", "--count", "9", "--device", "cpu", *words])
        how = {"families": ("upper", "add"), "digits": 3} | how
        expected = [tasks.make(known, which, 9, **how) for which in ("words", "phrasings")]
        assert scored == expected, f"{words}: not the run's test sets, or the flags do not win; some are trained on"
        assert chosen == expected, f"{words}: the choice of four is asked of other records"
        scored.clear(), chosen.clear()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--count", "0"], "--count"), (["--length", "0"], "--length"), (["--digits", "0"], "--digits"),
     (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--model", "nobody"], "nobody")],
    ids=str,
)  # fmt: skip
def test_the_script_refuses_bad_input(words, message, run):
    """A wrong value at the command line is one clear line."""
    with pytest.raises(BadInput, match=message) as refused:
        main(["--model", "tiny", "--corpus", "text.txt", "--device", "cpu", *words])
    assert "\n" not in str(refused.value), "a mistake of the user is told in one line"


def test_what_is_scored_is_what_is_learned():
    """The tokens whose likelihood counts are those that tuning learns: answer and end, of a conversation of one turn.
    """
    opened = random_talks.opened()
    example = conversation(opened, TALKS[3])
    said = "".join(opened.tokenizer.texts[i] for i, on in zip(example.ids, example.learned, strict=True) if on)
    assert said == "black<|end|>", f"{said!r} is learned: the answer and its end, without the tag before it"
