"""Distillation: what is pulled towards the teacher, how hard, and what is left alone."""

import json
import math
from dataclasses import replace

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

import lora
import train
from chat import conversation, ours, with_tags
from data import collate
from extras import distill
from extras.distill import DistillConfig, distil, divergence, gradient, main, teacher_texts
from model import GPT, ModelConfig
from sft import passes
from tokenizer import CharTokenizer

TALKS = [
    [{"role": "user", "content": "Say ab again."}, {"role": "assistant", "content": "ab"}],
    [{"role": "user", "content": "Spell: bad"}, {"role": "assistant", "content": "b-a-d"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"},
     {"role": "user", "content": "And the next letter is?"}, {"role": "assistant", "content": "b"}],
]  # fmt: skip
TEXT = "".join(sorted({letter for talk in TALKS for message in talk for letter in message["content"]}))


def opened(width: int, layers: int, seed: int, block_size: int = 64):
    """A model with random weights that differ from one another, and knows the tags."""
    torch.manual_seed(seed)
    tokenizer = CharTokenizer(TEXT)
    model = GPT(ModelConfig(len(tokenizer), block_size=block_size, n_embd=width, n_head=2, n_kv_head=1, n_layer=layers))
    made = ours(*with_tags(model, tokenizer))
    with torch.no_grad():
        made.model.norm.weight.fill_(1.0)
    return made


@pytest.fixture
def pair():
    """A teacher and a smaller student, of double precision."""
    teacher, student = opened(24, 3, 1), opened(16, 1, 2)
    return teacher.model.double(), student.model.double()


@pytest.fixture
def examples():
    return [conversation(opened(16, 1, 0), talk) for talk in TALKS]


@pytest.fixture
def logits():
    """Scores of student and teacher [2, 4, 7] in double precision, and which tokens are learned, three in each row."""
    draw = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(2, 4, 7, generator=draw, dtype=torch.double) for _ in range(2))
    return student.requires_grad_(), teacher, torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1]]).bool()


def config(**more) -> DistillConfig:
    return DistillConfig(**{"steps": 4, "batch_size": 2, "precision": "float32", "warmup": 1} | more)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_torch_gives_the_same_divergence(logits, temperature, reverse):
    """T^2 KL and its gradient equal those of torch's kl_div over the learned tokens, in both directions, to 1e-12."""
    student, teacher, learned = logits
    mine = divergence(student, teacher, learned, temperature, reverse)
    [slope] = torch.autograd.grad(mine, student)
    log_q, log_p = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    given, target = (log_p, log_q) if reverse else (log_q, log_p)
    each = F.kl_div(given, target, log_target=True, reduction="none").sum(-1)  # [R, T]
    theirs = temperature**2 * each[learned].sum()
    way = "KL(student || teacher)" if reverse else "KL(teacher || student)"
    assert abs(mine - theirs) < 1e-12, f"at temperature {temperature} this is not T^2 {way} over the learned tokens"
    assert (slope - torch.autograd.grad(theirs, student)[0]).abs().max() < 1e-12, f"not the gradient of T^2 {way}"
    assert (slope[~learned] == 0).all(), "a token that is not learned has a gradient"


def test_both_directions_by_enumeration():
    """With p = (3/4, 1/4) and q = (1/2, 1/2): forward 0.131, reverse 0.144, worked by hand; twice the tokens, twice."""
    teacher, student = torch.tensor([3.0, 1.0]).log(), torch.zeros(2)
    both = [scores.double().expand(3, 2, 2) for scores in (student, teacher)]
    learned = torch.tensor([[1, 0], [0, 0], [1, 0]]).bool()
    forward = 3 / 4 * math.log((3 / 4) / (1 / 2)) + 1 / 4 * math.log((1 / 4) / (1 / 2))
    reverse = 1 / 2 * math.log((1 / 2) / (3 / 4)) + 1 / 2 * math.log((1 / 2) / (1 / 4))
    assert divergence(*both, learned).item() == pytest.approx(2 * forward, abs=1e-7), "forward: the teacher weighs"
    assert divergence(*both, learned, reverse=True).item() == pytest.approx(2 * reverse, abs=1e-7), \
        "reverse: the student's own probabilities weigh"


def test_the_gradient_keeps_its_size(logits):
    """At high temperatures T^2 makes the gradient (z - v) / V for scores of mean 0, whatever T (Hinton, equation 4)."""
    student, teacher, learned = logits
    student, teacher = (z.detach() - z.detach().mean(-1, keepdim=True) for z in (student, teacher))
    expected = (student - teacher)[learned] / 7
    for temperature in (1e3, 1e4):
        for reverse in (False, True):
            leaf = student.clone().requires_grad_()
            divergence(leaf, teacher, learned, temperature, reverse).backward()
            apart = (leaf.grad[learned] - expected).norm() / expected.norm()
            assert apart < 0.02, f"temperature {temperature:g} changes the gradient's size: the factor T^2 is missing"


def test_a_student_like_its_teacher_has_nothing_to_learn(logits):
    """Equal scores, or scores that differ by a constant: divergence 0 and gradient 0."""
    student, _, learned = logits
    for reverse in (False, True):
        found = divergence(student, student.detach() + 5.0, learned, 2.0, reverse)
        assert abs(found) < 1e-12, "a student that says what its teacher says has a loss"
        assert torch.autograd.grad(found, student)[0].abs().max() < 1e-12, "and is moved"


@pytest.mark.parametrize("pack", [False, True])
def test_answers_alone_count(pair, examples, pack):
    """The loss of a ragged batch, padded or packed, in parts or whole, is a plain loop's over the answers' tokens."""
    teacher, student = pair
    expected, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.ids])
        log_q, log_p = ((model(ids)[0, :-1]).double() for model in (student, teacher))
        for t in range(len(example.ids) - 1):
            if example.learned[t + 1]:
                q, p = (F.log_softmax(z[t] / 3.0, -1) for z in (log_q, log_p))
                right = F.log_softmax(log_q[t], -1)[example.ids[t + 1]]
                expected, count = expected + 0.3 * 9 * (p.exp() * (p - q)).sum() - 0.7 * right, count + 1
    slopes = torch.autograd.grad(expected / count, list(student.parameters()))
    for micro_batch in (64, 2):
        student.zero_grad()
        told = config(temperature=3.0, mix=0.3, pack=pack, micro_batch=micro_batch, batch_size=3)
        found = gradient(student, teacher, examples, told)
        assert found.item() == pytest.approx(expected.item() / count, abs=1e-10), \
            "not the mean over answer tokens: padding or questions are counted, or parts weigh alike"
        for p, slope in zip(student.parameters(), slopes, strict=True):
            assert (p.grad - slope).abs().max() < 1e-6, "the gradient is of another loss"


def test_padding_may_reach_beyond_the_context(examples):
    """Where the context is no multiple of the padding's 16, the longest conversation is taught as in a larger one."""
    batch, found = collate(examples), []
    assert 40 < batch.x.shape[1] == 48, "the padding does not reach beyond a context of 40"
    for size in (64, 40):
        teacher, student = opened(24, 3, 1, size).model, opened(16, 1, 2, size).model
        with torch.no_grad():
            found.append(distill.loss(student, teacher, batch, config(mix=0.5)).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5), "the same weights, another context, and another loss"


def test_the_shares_of_the_loss(pair, examples):
    """mix 0 is plain tuning, which asks no teacher; mix 1 does not look at the right answers."""
    teacher, student = pair
    batch = collate(examples)
    plain = -(train.log_probs(student, batch.x, batch.y) * batch.learned).sum()
    assert distill.loss(student, None, batch, config(mix=0.0)).item() == pytest.approx(plain.item(), abs=1e-4)
    other = replace(batch, y=(batch.y + 1) % 5)
    whole = [distill.loss(student, teacher, b, config(mix=1.0)).item() for b in (batch, other)]
    assert whole[0] == whole[1] > 0, "with the teacher alone, the right answer still counts"


def test_the_teacher_is_left_alone(pair, examples):
    """A teacher in training mode, whose adapters drop inputs at random, teaches as in evaluation mode, and stays so."""
    teacher, student = pair
    lora.add(teacher, lora.LoRAConfig(4, 12.0, dropout=0.5))
    for layer in lora.adapters(teacher).values():
        torch.nn.init.normal_(layer.b, std=0.5)
    batch = collate(examples)
    teacher.eval()
    with torch.no_grad():
        calm = teacher(batch.x)
    teacher.train()
    for _ in range(2):
        found = distill.taught(teacher, batch)
        assert torch.equal(found, calm), "the teacher is in training mode: what it says is partly chance"
    assert teacher.training, "the teacher's mode was not left as it was found"
    assert not found.requires_grad, "the teacher's scores carry a graph"
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    told = config(steps=3, mix=0.5)
    for _ in distil(student, teacher, passes(examples, told), told, torch.optim.SGD(student.parameters(), lr=0.1)):
        pass
    assert all(p.grad is None for p in teacher.parameters()), "the teacher has a gradient"
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items()), "it was trained"


def test_a_student_learns_what_its_teacher_says(examples):
    """In 60 steps on scores alone the student's probabilities come close to the teacher's, in either direction."""
    for reverse in (False, True):
        teacher, student = opened(24, 3, 1).model, opened(16, 1, 2).model
        told = config(steps=60, batch_size=3, mix=1.0, temperature=1.0, reverse=reverse)
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.03)
        losses = [value for _, value in distil(student, teacher, passes(examples, told), told, optimizer)]
        assert losses[-1] < 0.2 * losses[0], f"from {losses[0]:.3f} to {losses[-1]:.3f}: the student learns nothing"


def test_what_cannot_be_taught_is_refused(pair, examples):
    """Two vocabularies, a temperature of 0, a share above 1 and a loss of nan are one line each."""
    teacher, student = pair
    small = GPT(ModelConfig(9, block_size=64, n_embd=16, n_head=2, n_layer=1))
    with pytest.raises(BadInput, match="one vocabulary"):
        next(distil(small, teacher, None, config(), train.make_optimizer(small, config())))
    for wrong in ({"temperature": 0.0}, {"temperature": math.nan}, {"mix": 1.5}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            config(**wrong)
    with torch.no_grad():
        student.tok_emb.weight[:] = math.nan
    with pytest.raises(BadInput, match="loss is nan"):
        next(distil(student, teacher, passes(examples, config()), config(), train.make_optimizer(student, config())))


@pytest.fixture
def parrot(monkeypatch):
    """A teacher that answers "yes", has no end for the second question, and says nothing to the third."""
    def answers(teacher, asked, length, config=None, generator=None):
        assert all(messages[-1]["role"] == "user" for messages in asked), "the teacher was shown the right answer"
        return [" yes", "a-b-c", ""][:len(asked)], [True, False, True][:len(asked)]

    monkeypatch.setattr(distill, "answers", answers)


def test_the_teachers_own_answers(parrot):
    """Its texts stand where the right ones stood; what has no end or is empty is left out."""
    records = [{"messages": talk, "family": str(i)} for i, talk in enumerate(TALKS)]
    kept = teacher_texts(None, records, 8)
    assert len(kept) == 1, "an answer that has no end, or is empty, would be taught"
    assert kept[0] == {"messages": [TALKS[0][0], {"role": "assistant", "content": "yes"}], "family": "0"}, \
        "not the teacher's answer in place of the right one"
    assert records[0]["messages"][1]["content"] == "ab", "the records that were given have changed"


def test_answers_are_written_as_records(parrot, tmp_path, monkeypatch, capsys):
    """The program writes JSON lines that sft.py reads, and says how many answers had no end."""
    monkeypatch.setenv("STAGES_FROM", str(tmp_path))
    monkeypatch.setattr(distill, "open_model", lambda name, device: opened(16, 1, 0))
    lines = [json.dumps({"messages": talk}) for talk in TALKS]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines), "utf-8")
    main(["--data", "asked.jsonl", "--into", "new/texts.jsonl"])
    [line] = (tmp_path / "new" / "texts.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["messages"][-1] == {"role": "assistant", "content": "yes"}
    assert "2 had no end" in capsys.readouterr().out, "what is left out is not said"
    with pytest.raises(BadInput, match="--records"):
        main(["--records", "0", "--into", "x"])
