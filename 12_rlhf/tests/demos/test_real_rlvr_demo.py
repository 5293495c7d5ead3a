"""Learning to add from right or wrong: what is rewarded, held out, drawn and learned; on a small random model."""

import json
import math
import signal
from collections import Counter

from shared.errors import BadInput

import pytest
import torch
from torch import nn

import checkpoint
import lora
from chat import conversation, form, open_model, ours, prompt, with_tags
from demos import real_rlvr as rlvr
from demos.real_rlvr import Recipe
from model import GPT, ModelConfig
from rollout import Rollout, rollout
from tokenizer import CharTokenizer

LETTERS = "0123456789 +=?.Whatis AnserwithenumbolyH"
ASKED = [[{"role": "user", "content": text}] for text in ("H", "Hello, 2", "Hall the sum is 12 + 345?", "Hall 1 ?")]
QUICK = ["--model", "small", "--steps", "3", "--questions", "3", "--group", "4", "--lr", "0.02", "--length", "5",
         "--rank", "3", "--test", "8", "--shown", "2", "--eval-every", "2", "--dtype", "float32",
         "--forget", "5"]  # fmt: skip


def small(std: float = 0.4):
    """A model of few letters with random weights, to talk to."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer("".join(sorted({*LETTERS, ","})))
    shape = {"block_size": 96, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "n_hidden": 24}
    opened = ours(*with_tags(GPT(ModelConfig(vocab_size=len(tokenizer), **shape)), tokenizer))
    for p in opened.model.parameters():
        nn.init.normal_(p, std=std)
    return opened


@pytest.fixture
def opened():
    """The same in float64, with adapters that already do something."""
    found = small()
    lora.add(found.model.double(), lora.LoRAConfig(3, 12.0))
    for layer in lora.adapters(found.model).values():
        layer.a.data, layer.b.data = layer.a.data.double(), 0.1 * torch.randn(layer.b.shape, dtype=torch.float64)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of runs with the small model in it, and other instructions beside it."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "runs"))
    monkeypatch.setattr(rlvr.corpus, "records", lambda name: tmp_path / f"{name}.json")
    opened = small(0.2)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    file = tmp_path / "runs" / "small" / "model.pt"
    checkpoint.save(file, opened.model, opened.tokenizer, **form(opened), optimizer={}, step=0, seconds=0.0, args={})
    records = [{"instruction": "What is " + "1" * i, "output": "no" * (1 + i % 3)} for i in range(1, 8)]
    (tmp_path / "instructions.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


def law(opened, ids: list[int]):
    """ln P of what follows each token of a text that is read alone: [T, V]."""
    scores = opened.model(torch.tensor([ids]))[0].double()
    return scores - scores.exp().sum(-1, keepdim=True).log()


def of(opened, drawn: Rollout, encoded: list[list[int]], b: int):
    """ln P of the drawn tokens of answer b, and the laws that they were drawn from, read alone: [A'], [A', V]."""
    asked, count = encoded[drawn.which[b]], int(drawn.mask[b].sum())
    answer = drawn.answers[b, :count].tolist()
    found = law(opened, asked + answer)[len(asked) - 1:-1]
    return torch.stack([row[i] for row, i in zip(found, answer, strict=True)]), found


@pytest.mark.parametrize(("text", "ended", "right", "alone"), [
    ("81", True, True, True), ("81", False, False, False), (" 81\n", True, True, True), ("81.", True, True, False),
    ("23 + 58 = 81", True, True, False), ("81 is 23 + 58", True, False, False), ("80", True, False, True),
    ("-81", True, False, False), ("it is −81", True, False, False), ("It's 81, of course.", True, True, False),
    ("0.81", True, False, False), ("1,81", True, False, False), ("81.5", True, False, False), ("", True, False, False),
    ("eighty-one", True, False, False), ("181", True, False, True), ("81 81", True, True, False),
])  # fmt: skip
def test_what_is_rewarded(text, ended, right, alone):
    """An answer is right if it has an end and its last number, whole and with its sign, is the sum; by hand."""
    assert rlvr.right(23, 58, text, ended) is right, "the verifier"
    assert rlvr.alone(23, 58, text, ended) is alone, "the control: any number and nothing else, in an answer that ends"
    drawn = Rollout(*3 * [torch.zeros(2, 1)], ["7", text], [True, ended], [1, 0])
    assert rlvr.checked(rlvr.right, [(23, 58), (3, 4)], drawn).tolist() == [1.0, float(right)], "whose answer is whose"


def test_what_is_held_out_is_not_learned():
    """A held-out sum is not learned from, in neither order; the rest is, in both; every seed holds out the same."""
    learn, held_out = rlvr.divide(100)
    assert rlvr.divide(100) == (learn, held_out), "runs with different seeds are not measured on the same sums"
    assert held_out == rlvr.divide(300)[1][:100], "more sums for the table: not the same sums for the looks"
    assert len({*held_out}) == 100 and not {*held_out} & {*learn}, "a held-out sum is learned from"
    assert not {(b, a) for a, b in held_out} & {*learn}, "a held-out sum is learned from, in the other order"
    unordered = {tuple(sorted(s)) for s in learn} | {tuple(sorted(s)) for s in held_out}
    assert len(unordered) == 90 * 91 // 2 and len({*learn}) == len(learn) == 8100 - sum(
        1 if a == b else 2 for a, b in held_out), "not all sums of two numbers of two digits are used"
    assert {a > b for a, b in held_out} == {True, False}, "the larger number always stands on one side"
    carry = sum(a % 10 + b % 10 >= 10 for a, b in held_out)
    assert 25 < carry < 65, f"{carry} of 100 held-out sums have a carry: take them at random (45 % of all have one)"


def test_answers_are_those_of_a_plain_rollout(opened):
    """Reading what prompts share once changes no answer: the likeliest are those that `rollout` finds, row by row."""
    encoded = [prompt(opened, asked) for asked in ASKED]
    opened.ends.add(int(rollout(opened, ASKED, 7, 0.0).answers[1, 2]))  # so that some answers end before others
    expected = rollout(opened, ASKED, 7, 0.0, n=2)
    assert len({*expected.mask.sum(1).tolist()}) > 1, "the answers to test with are all equally long"
    found = rlvr.answers(opened, encoded, 7, 0.0, n=2)
    assert found.texts == expected.texts and found.which == expected.which == [0, 0, 1, 1, 2, 2, 3, 3], "other answers"
    assert found.ended == expected.ended and torch.equal(found.mask, expected.mask), "which have an end, and where"
    seeds = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    drawn, other = (rlvr.answers(opened, encoded, 12, 1.0, n=6, generator=generator) for generator in seeds)
    assert len({*drawn.mask.sum(1).tolist()}) > 4 and {*drawn.ended} == {True, False}, "the answers to test with"
    assert drawn.texts != other.texts, "the generator is not used"
    surprise, spread = 0.0, 0.0  # of what was drawn, beside what is expected of the law of its own text
    for b, (row, over, which) in enumerate(zip(drawn.answers, drawn.ended, drawn.which, strict=True)):
        kept = row[drawn.mask[b]].tolist()
        assert [i in opened.ends for i in kept] == [False] * (len(kept) - over) + [True] * over, "no end, or not at it"
        assert drawn.ids[b, int(drawn.pad[b]):-12].tolist() == encoded[which], f"answer {b}: the prompt"
        found, laws = of(opened, drawn, encoded, b)
        entropy = -(laws.exp() * laws).sum(-1)
        surprise += (found + entropy).sum().item()
        spread += ((laws.exp() * laws.square()).sum(-1) - entropy.square()).sum().item()
    assert abs(surprise) < 4 * math.sqrt(spread), "tokens are not drawn from the law of their own text"
    with pytest.raises(BadInput, match="there is room for 96"):
        rlvr.answers(opened, encoded, 90)


def test_drawing_follows_the_law(monkeypatch):
    """One random number for a text: tokens come as often as softmax(scores / temperature) says, and 0 means never."""
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0], [3.0, -math.inf, -math.inf, 2.5]])
    generator = torch.Generator().manual_seed(0)
    found = rlvr.draw(logits, torch.arange(2).repeat_interleave(20_000), 1.7, generator).view(2, -1)
    for row, scores in zip(found, logits, strict=True):
        count, weights = Counter(row.tolist()), [math.exp(s / 1.7) for s in scores.tolist()]
        for token, weight in enumerate(weights):
            share = weight / sum(weights)
            assert abs(count[token] / 20_000 - share) <= 4 * math.sqrt(share * (1 - share) / 20_000), (
                f"token {token} is drawn with frequency {count[token] / 20_000:.3f}, its probability is {share:.3f}")
    assert rlvr.draw(logits, torch.tensor([1, 0, 1]), 0.0).tolist() == [0, 3, 0], "at temperature 0: the likeliest"
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.zeros(*shape, dtype=torch.float64))
    never_first = logits[:, [2, 1, 0, 3]]
    assert rlvr.draw(never_first, torch.tensor([0, 1]), 1.0).tolist() == [1, 2], "what cannot be drawn is, for u = 0"


def test_a_tree_holds_each_beginning_once():
    """Texts 5 6 7 and 5 6 8 9 share 5 6, and their last tokens have nothing to predict; worked out by hand."""
    ids = torch.tensor([[0, 5, 6, 7, 0], [0, 5, 6, 8, 9], [4, 5, 6, 0, 0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    drawn = Rollout(ids, torch.tensor([1, 1, 0]), mask, [""] * 3, [True] * 3, [0, 0, 1])
    tokens, before, places = rlvr.tree(drawn)
    assert (tokens, before) == ([5, 6, 8, 4, 5], [-1, 0, 1, -1, 3]), "a tree with other tokens"
    assert places[mask].tolist() == [0, 1, 0, 1, 2, 4], "a drawn token follows another one than it did"


def test_the_tree_gives_each_text_its_own_numbers(opened):
    """ln P, entropies and gradients are those of every text read alone, though none is read twice."""
    encoded = [prompt(opened, asked) for asked in ASKED]
    drawn = rlvr.answers(opened, encoded, 8, 1.0, n=5, generator=torch.Generator().manual_seed(3))
    tuned = [p for p in opened.model.parameters() if p.requires_grad]
    weight = torch.randn(drawn.mask.shape, dtype=torch.float64)
    found, entropy, count = rlvr.log_probs(opened.model.train(), drawn)
    assert len({*map(tuple, drawn.answers.tolist())}) > 12 and count < 0.8 * sum(map(len, encoded)) * 5, "shares little"
    gradients = torch.autograd.grad((found * weight).sum(), tuned)
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(20):
        alone, laws = of(opened, drawn, encoded, b)
        spread = -(laws.exp() * laws).sum(-1)
        kept = drawn.mask[b]
        torch.testing.assert_close(found[b, kept], alone, rtol=1e-4, atol=1e-5, check_dtype=False,
                                   msg=lambda m, b=b: f"ln P of answer {b} is not what it is alone\n{m}")
        torch.testing.assert_close(entropy[b, kept], spread, rtol=1e-4, atol=1e-5, check_dtype=False,
                                   msg=lambda m, b=b: f"entropy of answer {b} is not what it is alone\n{m}")
        assert not found[b, ~kept].any() and not entropy[b, ~kept].any(), "what was not drawn counts"
        expected = expected + (alone * weight[b, kept]).sum()
    for ours_, theirs in zip(gradients, torch.autograd.grad(expected, tuned), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-3, atol=1e-4, msg=lambda m: f"another gradient\n{m}")


class Descent(torch.optim.SGD):
    """Plain steps, so that what a step did is its gradient."""


def step(opened, one, sums, config, monkeypatch=None, worth=None):
    """What `one` moved, as a gradient by name, and what it told. `worth` gives the rewards of the answers."""
    tuned = {name: p for name, p in opened.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in tuned.items()}
    if worth is not None:
        monkeypatch.setitem(rlvr.REWARDS, "right", worth)
    told = one(opened, sums, config, Descent(tuned.values(), lr=1.0), 9)
    return {name: before[name] - p.detach() for name, p in tuned.items()}, told


def test_a_step_is_reinforce_with_the_group_as_baseline(opened, monkeypatch):
    """The gradient is that of -A ln P, a mean over each answer's tokens and over the answers of groups with a signal;
    A = (r - mean) / std of the group, from each text read alone. A step without a signal moves nothing."""
    sums, config = [(11, 22), (40, 19), (35, 38)], Recipe(group=4, length=6, clip=1e9)

    def worth(a, b, text, ended):  # the third question's answers are all wrong
        return a != 35 and sum(map(ord, text)) % 2 == 0

    encoded = [prompt(opened, rlvr.question(*s)) for s in sums]
    drawn = rlvr.answers(opened, encoded, 6, 1.0, 4, rlvr.generator(config, 9))
    rewards = torch.tensor([float(worth(*sums[w], t, True)) for w, t in zip(drawn.which, drawn.texts, strict=True)])
    groups = rewards.view(3, 4)
    useful = [g for g in range(3) if len({*groups[g].tolist()}) == 2]
    assert useful in ([0], [1], [0, 1]), "the answers to test with give no group a signal: take another seed"
    terms = []
    for g in useful:
        for j in range(4):
            b = 4 * g + j
            advantage = (groups[g, j] - groups[g].mean()) / (groups[g].std() + 1e-6)
            terms.append(-advantage * of(opened, drawn, encoded, b)[0].mean())
    loss = torch.stack(terms).mean()
    tuned = {name: p for name, p in opened.model.named_parameters() if p.requires_grad}
    expected = dict(zip(tuned, torch.autograd.grad(loss, tuned.values()), strict=True))
    moved, told = step(opened, rlvr.reinforce, sums, config, monkeypatch, worth)
    for name, gradient in expected.items():
        torch.testing.assert_close(moved[name], gradient, rtol=1e-3, atol=1e-4,
                                   msg=lambda m, name=name: f"gradient of {name}: not that of -A ln P\n{m}")
    assert told["reward"] == pytest.approx(rewards.mean().item()) and told["useful"] == pytest.approx(len(useful) / 3)
    assert told["ended"] == pytest.approx(sum(drawn.ended) / 12), "`ended` is the share of answers that end"
    assert told["length"] == pytest.approx(drawn.mask.sum().item() / 12), "`length` is tokens an answer, with its end"
    assert told["right"] == 0, "`right` is what the verifier says, whatever is rewarded"
    moved, told = step(opened, rlvr.reinforce, sums, config, monkeypatch, lambda *answer: True)
    assert not any(change.any() for change in moved.values()), "all are equally good, and something was learned"
    assert told["reward"] == 1 and told["useful"] == 0 and "gradient" not in told


def test_the_control_learns_the_right_answers(opened):
    """--sft: cross-entropy per answer token, the end's included, of "33" and so on; from each text read alone."""
    sums = [(11, 22), (99, 19), (35, 38)]
    moved, told = step(opened, rlvr.imitate, sums, Recipe(clip=1e9))
    found = small()  # anew, since the step has moved the first
    lora.add(found.model.double(), lora.LoRAConfig(3, 12.0))
    for layer in lora.adapters(found.model).values():
        layer.a.data, layer.b.data = layer.a.data.double(), layer.b.data.double()
    found.model.load_state_dict(
        {name: p + moved.get(name, 0) for name, p in opened.model.state_dict().items()}, assign=True)
    terms = []
    for a, b in sums:
        talk = [{"role": "user", "content": f"What is {a} + {b}? Answer with the number only."},
                {"role": "assistant", "content": str(a + b)}]
        example = conversation(found, talk)
        rows = law(found, example.ids)
        terms += [-rows[t - 1, i] for t, i in enumerate(example.ids) if example.learned[t]]
    assert len(terms) == 3 + 4 + 3, "the answer's digits and its end are what is learned"
    assert told["loss"] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4), "not the cross-entropy per token"


def test_the_table_of_errors():
    """Rows by carry and by the sum's digits, and digits counted from the end of the number; by hand."""
    sums = [(23, 58), (17, 25), (60, 52), (11, 12), (99, 99), (70, 10)]

    def drawn(*texts, over=True):
        return Rollout(*3 * [torch.zeros(6, 1)], list(texts), [over] * 5 + [True], [*range(6)])

    before = drawn("81", "?", "?", "?", "?", "8"), drawn("81", "42", "", "", "19 8", " 80", over=False)
    after = drawn("71", "it is 42.", "112", "none", "98", "8"), drawn("81", "42.", "112 or 113", "230", "98", "80")
    rows = {row["sums"]: row for row in rlvr.errors(sums, before, after)}
    assert [*rows] == ["carry, 2 digits", "carry, 3 digits", "no carry, 2 digits", "no carry, 3 digits", "all"]
    assert [row["count"] for row in rows.values()] == [2, 1, 2, 1, 6], "a sum stands in another row"
    assert rows["carry, 2 digits"] == {
        "sums": "carry, 2 digits", "count": 2, "before": 0.5, "after": 0.5, "begun before": 1.0, "begun after": 1.0,
        "ones": 1.0, "tens": 0.5,
    }, "71 for 81 has the ones right and forgot the carry"  # fmt: skip
    assert rows["no carry, 2 digits"]["tens"] == 0, "an answer of one digit has no tens; one without a number, no digit"
    assert rows["carry, 3 digits"]["tens"] == 1, "98 for 198: of its digits, 8 and 9 are right"
    assert rows["all"]["ones"] == pytest.approx(4 / 6) and rows["all"]["after"] == pytest.approx(2 / 6)
    assert rows["all"]["begun before"] == pytest.approx(2 / 6), "the number right behind the = counts, and all of it"
    assert rows["all"]["begun after"] == pytest.approx(4 / 6), "the number right behind the = counts, and all of it"
    cut = rlvr.errors(sums, before, (drawn(*after[0].texts, over=False), after[1]))[-1]
    assert cut["ones"] == cut["after"] == 0 and cut["begun after"] > 0, "the digits of an answer without an end count"


def summary(place, name) -> dict:
    return json.loads((place / "runs" / name / "summary.json").read_text("utf-8"))


def test_a_run_writes_what_it_measured(place, monkeypatch, capsys):
    """The shares are those of base and base plus saved adapter; controls are runs of their own; seeds differ."""

    def odd(a, b, text, ended):  # a verifier that finds some answers of a random model right
        return (a + len({*text})) % 2 == 1

    monkeypatch.setattr(rlvr, "right", odd)
    monkeypatch.setitem(rlvr.REWARDS, "right", odd)
    runs = {"rl": ["--seed", "1"], "form": ["--reward", "format"], "sft": ["--sft", "4"]}
    for name, more in runs.items():
        assert not rlvr.main([*QUICK, "--name", name, *more])
    printed = capsys.readouterr().out
    assert printed.count("step   0, right ") == 3 and printed.count("step   2, right ") == 3, "no look along the way"
    _, held_out = rlvr.divide(8)
    seen = {}
    for name in runs:
        found, folder = summary(place, name), place / "runs" / name
        assert {"seconds", "training", "dtype", "seed"} <= found.keys()
        assert found["loss_before"] == summary(place, "rl")["loss_before"], "`loss_before` is not the base's"
        rows = seen[name] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        assert [row["step"] for row in rows if "held_out" in row] == [0, 2, 3], f"{name}: looks at other steps"
        a, b = held_out[0]
        assert all(row["answers"][0].startswith(f"{a} + {b}:") and len(row["answers"]) == 2 for row in rows
                   if "answers" in row), "the sums whose answers are printed change"
        assert (folder / "curve.png").stat().st_size > 3000
        for which, tuned in (("before", False), ("after", True)):
            opened = open_model("small")
            if tuned:
                lora.load_adapter(opened.model, folder / "adapter")
            texts = rollout(opened, [rlvr.question(*s) for s in held_out], 5, 0.0)
            marks = [odd(*s, t, e) for s, t, e in zip(held_out, texts.texts, texts.ended, strict=True)]
            assert found["rows"][-1][which] == sum(marks) / 8 and 0 < sum(marks) < 8, f"{name}: not {which}"
            assert found["last" if tuned else "first"] == sum(marks) / 8, f"{name}: the looks are not at these sums"
    rewards = {name: [row["reward"] for row in rows if "reward" in row] for name, rows in seen.items()}
    assert sum(rewards["rl"]) > 0 == sum(rewards["form"]) and not rewards["sft"], "the runs learn from the same"
    losses = [row["loss"] for row in seen["sft"] if "loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0], "the control's loss does not fall"
    assert summary(place, "sft")["loss_after"] != summary(place, "sft")["loss_before"], "nothing was learned"


def test_the_control_sees_so_many_sums_and_no_more(place, monkeypatch):
    """--sft 4 with 3 sums a step: 1 2 3, 4 1 2, 3 4 1; they are the first that the run with rewards would ask."""
    asked = {}
    for name, other in (("reinforce", []), ("imitate", ["--sft", "4"])):
        seen = asked.setdefault(name, [])

        def note(opened, sums, *rest, seen=seen):
            seen.append(sums)
            return {"gradient": 0.0}

        monkeypatch.setattr(rlvr, name, note)
        rlvr.main([*QUICK, "--forget", "0", *other])
    first = [s for sums in asked["reinforce"] for s in sums][:4]
    assert asked["imitate"] == [first[:3], [first[3], *first[:2]], [*first[2:], first[0]]], "other sums, or more"
    assert len({s for sums in asked["reinforce"] for s in sums}) == 9, "a run with rewards asks new sums at each step"


def test_an_interrupt_keeps_the_adapter(place, monkeypatch, capsys):
    """After Ctrl-C the step is finished, the adapter of the steps so far is saved, and 130 is the exit code."""
    imitate, calls = rlvr.imitate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return imitate(*args)

    monkeypatch.setattr(rlvr, "imitate", interrupted)
    assert rlvr.main([*QUICK, "--sft", "9"]) == 130, "an interrupted run is not a success"
    assert len(calls) == 2 and "stopped at step 2" in capsys.readouterr().out
    tuned = lora.load_adapter(open_model("small").model, place / "runs" / "rlvr" / "adapter")
    assert all(layer.b.any() for layer in lora.adapters(tuned).values()), "what was learned is lost"
    assert not (place / "runs" / "rlvr" / "summary.json").exists(), "a run that was stopped has a summary"


def test_what_cannot_be_is_refused(place, monkeypatch, capsys):
    """Sizes that cannot be are refused in one line; without other instructions a run goes on without them."""
    for flag, value, told in (
        ("--steps", "0", "steps"), ("--group", "1", "group"), ("--questions", "0", "questions"),
        ("--shown", "-1", "--shown"), ("--forget", "-1", "--forget"),
        ("--sft", "-1", "--sft"), ("--test", "0", "--test"), ("--length", "90", "there is room for"),
        ("--lr", "nan", "lr"), ("--rank", "0", "rank"), ("--model", "other.gguf", "other.gguf"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=told):
            rlvr.main([*QUICK, flag, value])
    opened = open_model("small")
    assert len(rlvr.others(opened, 5)) == 5 and len(rlvr.others(opened, 50)) == 7 and not rlvr.others(opened, 0)

    def offline(name):
        raise BadInput("no network")

    monkeypatch.setattr(rlvr.corpus, "records", offline)
    assert rlvr.others(opened, 5) == [], "what is no part of the lesson ends it"
    assert "not measured: no network" in capsys.readouterr().out, "a number is left out, and nobody is told"
    assert rlvr.quicker(torch.device("cpu")) in ("float32", "bfloat16")
