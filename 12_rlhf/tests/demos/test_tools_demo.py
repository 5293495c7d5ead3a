"""Small agents: what the tool writes is read and not learned; calls, verdicts and masks are those worked by hand."""

import json
import random

from shared.errors import BadInput

import pytest
import torch

from demos import tools
from demos.small import fit, imitation, record, rolled, small, write
from demos.tools import LETTERS, Scale, calculator, demonstration, everything, make, right, shown
from grpo import GRPOConfig

TINY = Scale(n_embd=16, batch_size=4)


def policy(seed: int = 0):
    """A model with large random weights, whose answers differ and of which some end early."""
    opened = small(LETTERS, TINY, seed, "cpu")
    for p in opened.model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return opened


def test_the_tool_adds_what_it_is_asked():
    """A call is what stands behind the last open bracket; what is no sum gets a "?"; elsewhere nothing happens."""
    assert calculator("[123456+654321", "=") == "=777777]", "the tool writes the sum and closes the call"
    assert calculator("[2+3=5][10+7", "=") == "=17]", "the last call counts"
    assert [calculator(text, "=") for text in ("[2+", "[2+3+4", "[", "[2+?3")] == ["=?]"] * 4, "these are no sums"
    assert not any(calculator(*drawn) for drawn in (("2+3", "="), ("[2+3=5]", "="), ("[2+3", "]"))), "nobody called"


def test_demonstrations_are_marked():
    """The tool's letters are not learned; a poor demonstration answers directly or miscopies one digit of the call."""
    r, pick = record("123456+954321?", "1077777", pair=(123456, 954321)), random.Random(2)
    text, marks = demonstration(r, pick)
    assert text == "[123456+954321=1077777]1077777.", f"{text}: not a call, its result, and the answer"
    hidden = [i for i, own in enumerate(marks) if not own]
    assert hidden == list(range(15, 23)), f"the tool wrote places 15 to 22, and {hidden} are not learned"
    assert demonstration(r, pick, rare=1.0) == ("1077777.", [True] * 8), "a direct answer is all the model's own"
    for _ in range(30):
        text, marks = demonstration(r, pick, wrong=1.0)
        a, b = map(int, text[1:14].split("+"))
        wrong = [x != y for x, y in zip(text[1:15], "123456+954321=", strict=False)]
        assert sum(wrong) == 1 and text == f"[{a}+{b}={a + b}]{a + b}.", "one digit of the call is wrong, no more"
        assert marks.count(False) == len(str(a + b)) + 1, "the tool's letters are learned where the call is wrong"
    kinds = [demonstration(r, pick, 0.5, 0.2)[0] for _ in range(2000)]
    calls, good = (sum(part in text for text in kinds) / 2000 for part in ("[", "[123456+954321="))
    assert abs(calls - 0.5) < 0.04, f"a share {calls} has a call, and 0.5 were to have one"
    assert abs(good - 0.3) < 0.04, f"a share {good} has the right call, and 0.3 were to have it"


def test_a_hand_in_the_text():
    """The mask has what was drawn; what a program wrote is read by the model like any text, in texts of any length."""
    opened = policy()
    records = make(12, random.Random(1)) + [record("1+2?", "3")]

    def meddle(text, letter):  # another program, which answers to a digit, at places that differ from text to text
        return letter + "[=]" if letter in "13579" and "[" not in text else None

    drawn = write(opened, records, 12, seed=3, n=2, meddle=meddle)
    assert drawn.which == [i for i in range(13) for _ in range(2)], "answers to one question do not stand together"
    assert any(drawn.ended) and not all(drawn.ended), "all answers end, or none: the test shows little"
    starts, greedy = set(), write(opened, records, 12, temperature=0.0, meddle=meddle)
    for text, over, mask in zip(drawn.texts, drawn.ended, drawn.mask.tolist(), strict=True):
        begin = text.index("[") if "[" in text and text[text.index("[") - 1:][:1] in "13579" else None
        length = len(text) + over
        assert not any(mask[length:]), "what stands behind the end counts as drawn"
        hidden = [i for i in range(length) if not mask[i]]
        if begin is not None and hidden:
            assert text[hidden[0]:].startswith("[=]"[:len(hidden)]) and len(hidden) <= 3, (text, hidden)
            starts.add(hidden[0])
    assert len(starts) > 1, "the program wrote at one place only: the test shows little"
    for r, text, over, mask in zip(records, greedy.texts, greedy.ended, greedy.mask.tolist(), strict=True):
        whole = text + "." * over
        for i, letter in enumerate(whole):  # each letter alone, without a cache and without other texts
            ids = torch.tensor([opened.tokenizer.encode(r["messages"][0]["content"] + whole[:i])])
            best = opened.tokenizer.texts[opened.model(ids)[0, -1].argmax()]
            assert not mask[i] or best == letter, f"{whole}: letter {i} is not what the model says after all before it"


def test_the_verdict_and_the_wrong_mask():
    """What stands behind the last call is the answer; the wrong mask has all letters, and neither has the padding."""
    records = [record("2+3?", "5"), record("22+33?", "55")]
    texts = ["5.", "[2+3=5]5.", "[2+3=5].", "[2+3=5]5", "55.", "[2+3=5]55.", "[22+33=55]5.", "5"]
    marks = [[i % 3 != 1 for i in range(len(text))] for text in texts]
    drawn = rolled(small(LETTERS, TINY, 0, "cpu"), records, texts, marks)
    assert drawn.which == [0] * 4 + [1] * 4
    verdicts = right(records, drawn).tolist()
    assert verdicts == [1, 1, 0, 0, 1, 1, 0, 0], f"{verdicts}: what is behind the last call counts, if it ends"
    assert everything(drawn).sum(1).tolist() == [len(text) for text in texts], "the wrong mask has padding, or not all"
    assert [row[:len(m)] for row, m in zip(drawn.mask.tolist(), marks, strict=True)] == marks, "the mask is another"


def test_the_loss_is_that_of_each_text_alone():
    """The loss of a batch is the mean over its marked letters, each scored in its own text alone."""
    opened = policy()
    records, texts = [record("2+3?", "5"), record("22+33?", "55")], ["[2+3=5]5.", "5.", "[22+33=55]55.", "5"]
    marks = [[i % 3 != 1 for i in range(len(text))] for text in texts]
    nats = []
    for i, (text, own) in enumerate(zip(texts, marks, strict=True)):
        question = records[i // 2]["messages"][0]["content"]
        ids = opened.tokenizer.encode(question + text)
        law = opened.model(torch.tensor([ids]))[0].double().log_softmax(-1)  # [T, V], place t scores letter t + 1
        nats += [-law[t - 1, ids[t]] for t in range(len(question), len(ids)) if own[t - len(question)]]
    loss = imitation(opened, rolled(opened, records, texts, marks)).item()
    mean = torch.stack(nats).mean().item()
    assert loss == pytest.approx(mean, abs=1e-4), f"{loss:.4f} nats a letter in the batch, {mean:.4f} one by one"


@pytest.mark.parametrize("masked", (True, False))
def test_the_tools_letters_have_no_gradient(masked):
    """With the mask, the loss does not depend on what the model thinks of the tool's letters; without, it does."""
    opened, pick = small(LETTERS, TINY, 0, "cpu"), random.Random(0)
    drawn = shown(opened, make(5, pick), pick, demonstration, masked)
    found = {}

    def keep(module, args, out):
        out.retain_grad()
        found["out"] = out

    hook = opened.model.head.register_forward_hook(keep)
    imitation(opened, drawn).backward()
    hook.remove()
    pulled = found["out"].grad.abs().sum(-1) > 0  # [B, A]: the scores of letter t
    own = [demonstration(r, random.Random(0))[1] for r in make(5, random.Random(0))]
    for row, marks in zip(pulled.tolist(), own, strict=True):
        assert row[:len(marks)] == (marks if masked else [True] * len(marks)), "a letter is pulled that should not be"
        assert not any(row[len(marks):]), "padding is learned"


def test_rewards_reach_the_right_letters():
    """Good answers become likelier and bad ones less likely, in their own letters; the tool's share is measured."""
    for masked in (True, False):
        opened, records = small(LETTERS, TINY, 3, "cpu"), make(2, random.Random(4))
        shown = [demonstration(r, random.Random(1), wrong=wrong) for r in records for wrong in (0.0, 1.0)]
        texts, marks = zip(*shown, strict=True)
        drawn = rolled(opened, records, texts, marks)
        reward = right(records, drawn)
        assert reward.tolist() == [1, 0, 1, 0], "the calls with a wrong digit are not the wrong answers"
        config = GRPOConfig(group=2, questions=2, lr=1e-2, warmup=0, length=34)
        before = tools.log_probs(opened.model, drawn)[0].sum(1)
        sgd = torch.optim.SGD(opened.model.parameters(), lr=1e-2)
        told = tools.learn(opened, drawn, reward, config, sgd, 0, masked)
        gap = (tools.log_probs(opened.model, drawn)[0].sum(1) - before).view(2, 2)
        assert (gap[:, 0] > gap[:, 1]).all(), "the better answer of a group has not gained on the worse one"
        assert ("tool" in told) == (not masked), "only with the wrong mask has the tool a gradient"
        assert 0 < told.get("tool", 0.5) < 1, "both the tool's letters and the policy's have a part in the gradient"
        assert tools.learn(opened, drawn, torch.ones(4), config, sgd, 0, masked) == {}, "groups of one mind teach"


def test_fit_takes_the_recipe():
    """`fit` minimises what it is given, tells its steps, and leaves no gradient behind."""
    opened, steps = small(LETTERS, TINY, 0, "cpu"), []
    drawn = shown(opened, make(4, random.Random(0)), random.Random(0), demonstration)
    first = imitation(opened, drawn).item()
    fit(opened.model, 60, lambda step: imitation(opened, drawn), "fit", after=steps.append)
    assert steps == list(range(1, 61)), "not told after each step"
    last = imitation(opened, drawn).item()
    assert last < 0.7 * first, f"60 steps on four demonstrations: {first:.2f} to {last:.2f} nats a letter"
    assert all(p.grad is None for p in opened.model.parameters()), "a gradient is left and adds to the next one"


def test_the_demo_runs(tmp_path, monkeypatch, capsys):
    """Two tables and a figure from tiny models; nonsense is refused."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    argv = ["--device", "cpu", "--n-embd", "16", "--batch-size", "3", "--steps", "2", "--rl-steps", "2", "--questions",
            "2", "--group", "2", "--seeds", "2", "--test", "5"]  # fmt: skip
    tools.main(argv)
    told = json.loads((tmp_path / "tools" / "summary.json").read_text("utf-8"))
    assert [row["tuned on"] for row in told["sft"]] == ["direct answers", "calls", "calls, unmasked"]
    assert [row["policy"] for row in told["rl"]] == ["poor demonstrations", "rewards, masked", "rewards, unmasked"]
    assert (tmp_path / "tools" / "tools.png").stat().st_size > 5000
    assert "Supervised tuning" in capsys.readouterr().out
    for flag, value in (("--rare", "0.9"), ("--test", "0"), ("--wrong", "nan"), ("--device", "abacus")):
        with pytest.raises(BadInput):
            tools.main([*argv, flag, value])
