"""Thinking on paper: questions, chains, verdicts and votes are those worked by hand, and budgets are kept."""

import json
import random

from shared.errors import BadInput

import pytest

from demos import reasoning
from demos.reasoning import LETTERS, Scale, chain, cut, make, right, seen, vote, waits
from demos.small import record, rolled, small, write

TINY = Scale(n_embd=16, batch_size=4)


def answers(texts: list[str], records: list[dict]):
    """These texts as drawn answers, as many to each question."""
    opened = small(LETTERS, TINY, 0, "cpu")
    return rolled(opened, records, texts, [[True] * len(text) for text in texts])


def test_questions_are_about_single_cycles():
    """The gold is where the pairs lead, never the start; a wrong number of steps is never right; tests are new."""
    known, unseen = reasoning.cycles()
    assert len({*known} | {*unseen}) == 120 and not {*known} & {*unseen}, "cycles of the test are learned from"
    asked, counts = set(), set()
    for r in make(known, 200, 4, random.Random(1)):
        text, gold = (message["content"] for message in r["messages"])
        after, at = {text[i].lower(): text[i + 1] for i in range(0, 12, 2)}, text[13]
        assert text[12] == "?" and len(text) == 15 and {*after} == {*after.values()} == {*"abcdef"}
        places = [at]
        for _ in range(5):
            places.append(after[places[-1]])
        assert len({*places}) == 6, "the symbols are not on one cycle: a wrong number of steps may be right by luck"
        n = int(text[14])
        assert places[n] == gold and "".join(places[1:n + 1]) == r["path"], "the gold is not where the pairs lead"
        asked.add(text)
        counts.add(n)
    assert len(asked) > 190 and counts == {1, 2, 3, 4}, "the questions are not different, or not of 1 to 4 steps"


def test_chains_are_those_of_the_text():
    """Each place has the steps that are left; a W changes no answer; a hasty chain answers where it stopped."""
    pick = random.Random(3)
    assert chain("daf", pick, wait=0) == "d2a1f0=f.", "each place has the number of steps that are left"
    assert chain("d", pick, wait=0, hasty=1) == "d0=d.", "a chain of one place cannot stop early"
    waiting, early = ({chain("daf", pick, wait, hasty=1) for _ in range(60)} for wait in (1, 0))
    assert waiting == {"d2Wa1f0=f.", "d2a1Wf0=f.", "d2a1f0Wf0=f."}, f"{waiting}: a W stands behind a place"
    assert early == {"d2=d.", "d2a1=a."}, f"{early}: who stops early answers with the place where he stopped"
    share = sum("W" in chain("daf", pick, wait=0.3) for _ in range(2000)) / 2000
    assert abs(share - 0.3) < 0.05, f"{share} of the chains have a W, and 0.3 were asked for"
    assert [seen(text) for text in ("d2a1Wf0Wf0=f", "=f", "d2a1d0")] == ["daf", "", "dad"], "a place is said again once"


def test_only_the_final_answer_counts():
    """The verifier looks behind the last "=", wants an end, and does not look at the chain; votes by hand."""
    records = [record("Ab?a1", "f"), record("Fe?f1", "a")]
    texts = ["d2a1f0=f.", "b0=f.", "=f", "f.", "=a=f.", "=f=a.", "a0=a.", "a0=b."]
    drawn = answers(texts, records)
    assert right(records, drawn).tolist() == [1, 1, 0, 0, 0, 1, 1, 0], "not the final answer alone decides"
    drawn = answers(["=f.", "=b.", "=b.", "=f.", "=f.", "=c.", "=d.", "=a."], records)
    assert vote(records, drawn, 4, 1) == (3 / 8, 3 / 8), "one vote at a time is the share of right answers"
    assert vote(records, drawn, 4, 2) == (1 / 4, 3 / 4), "f b, b f; f c, d a: of two, the first named counts"
    assert vote(records, drawn, 4, 4) == (1 / 2, 1.0), "f b b f: the first of those named equally often; f c d a: f"


def test_shares_by_the_steps_asked_for(monkeypatch):
    """Questions of each number of steps are counted on their own; where none was asked, there is no share."""
    records = [record("Ab?a1", path[-1], path=path) for path in ("b", "c", "bc", "bcde", "fedc")]
    monkeypatch.setattr(reasoning, "write", lambda opened, *args: answers(["=b.", "=b.", "=c.", "=e.", "=f."], records))
    found = reasoning.by_steps(None, records, 4)
    assert found == {"steps: 1": 0.5, "steps: 2": 1, "steps: 3": None, "steps: 4": 0.5, "all": 0.6}, f"{found}"


def test_budgets_are_kept():
    """Cut short, a chain has no more places than allowed; told to wait, it has a W in place of its "=", not its own."""
    opened = small(LETTERS, TINY, 1, "cpu")
    records = make(reasoning.cycles()[0], 40, 5, random.Random(0))
    for places in (0, 2):
        drawn = write(opened, records, 24, meddle=cut(places))
        texts = [text.partition("=")[0] for text in drawn.texts]
        assert max(len(seen(text)) for text in texts) == places, "a chain is not cut where it should be, or not at all"
    text = ""
    for letter in "d2a1f0=f":
        text += cut(2)(text, letter) or letter
    assert text == "d2a1=0=f", "the third place is replaced, and what stands behind the first end is left alone"
    text = ""
    for letter in "d2=a1=f0=f":
        text += waits(2)(text, letter) or letter
    assert text == "d2Wa1Wf0=f", "the first two ends are replaced, and the third is not"
    drawn = write(opened, records, 24, meddle=waits(2))
    for text in drawn.texts:
        begin = text.partition("=")[0]
        assert "=" not in text or begin.count("W") >= 2, f"{text}: it ends before it was told twice to go on"
    forced = [(text, mask) for text, mask in zip(drawn.texts, drawn.mask.tolist(), strict=True) if "=" in text]
    hidden = [mask[:len(text)].count(False) for text, mask in forced]
    assert max(hidden) in (1, 2), f"{hidden} letters do not count as the policy's: a forced W does not, and no other"


def test_the_demo_runs(tmp_path, monkeypatch, capsys):
    """Its tables and a figure from tiny models; nonsense is refused."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    argv = ["--device", "cpu", "--n-embd", "16", "--batch-size", "3", "--steps", "4", "--direct-steps", "2",
            "--votes", "4", "--hasty-steps", "1", "--rl-steps", "2", "--questions", "3", "--group", "2", "--test", "12",
            "--early", "1e-9", "--longest", "3"]  # fmt: skip
    reasoning.main(argv)
    told = json.loads((tmp_path / "reasoning" / "summary.json").read_text("utf-8"))
    assert [row["model"] for row in told["steps"]] == ["direct", "scratchpad"]
    assert [row["budget"] for row in told["budget"]][:4] == ["cut at 0", "cut at 1", "cut at 2", "free"]
    assert [row["k"] for row in told["votes"]] == [1, 2, 4]
    assert [row["policy"] for row in told["rl"]] == ["stopped early", "and GRPO", "not stopped"]
    assert (tmp_path / "reasoning" / "reasoning.png").stat().st_size > 5000
    assert "Budget forcing" in capsys.readouterr().out
    for flag, value in (("--longest", "6"), ("--test", "0"), ("--early", "nan"), ("--device", "abacus")):
        with pytest.raises(BadInput):
            reasoning.main([*argv, flag, value])
