"""Checkpoints of the training: AdamW written out, exact accumulation and resumption, two processes, the script."""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from shared import corpus, options
from shared.errors import BadInput

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train as trunk
from data import batches
from model import GPT, ModelConfig
from sample import load
from sample import main as write_text
from train import PRESETS, TrainConfig, evaluate, gradient, learning_rate, main, make_optimizer, nll, train


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**changes) -> GPT:
    return GPT(ModelConfig(**{"vocab_size": 11, "block_size": 5, "n_embd": 4, "n_head": 2, "n_layer": 1} | changes))


def small(**changes) -> GPT:
    """A model whose weights are far from their start, so that no two characters score alike."""
    model = tiny(**changes)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def recipe(**changes) -> TrainConfig:
    how = {"steps": 10, "batch_size": 4, "lr": 0.01, "warmup": 3, "seed": 5, "precision": "float32"}
    return TrainConfig(**how | changes)


class Line(nn.Module):
    """A row of scores for each character, and a bias: the smallest model with both kinds of parameters."""

    def __init__(self):
        super().__init__()
        self.config = ModelConfig(vocab_size=5, block_size=2)
        self.table = nn.Parameter(torch.linspace(-1, 1, 25).view(5, 5).double())
        self.bias = nn.Parameter(torch.linspace(1, -1, 5).double())

    def forward(self, idx):
        return self.table[idx] + self.bias  # [B, T, V]


def test_the_loss_is_the_mean_surprise():
    """The loss is the mean of -ln P(y): two characters with scores 0 and ln 3 have P = 1/4 and 3/4."""
    scores = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [0.0, 0.0]])
    x, y = torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([[0, 1, 1], [0, 1, 1]])
    expected = (math.log(4) + 3 * math.log(4 / 3) + 2 * math.log(2)) / 6
    loss = nll(lambda idx: scores[idx], x, y)
    assert loss.item() == pytest.approx(expected, abs=1e-6), "cross-entropy of the scores: softmax comes once"


def test_the_loss_survives_large_scores():
    """Scores in the thousands give a finite loss: softmax and logarithm are one safe step."""
    scores = torch.tensor([[5000.0, 0.0]], requires_grad=True)
    loss = nll(lambda idx: scores[idx], torch.tensor([[0]]), torch.tensor([[1]]))
    loss.backward()
    assert loss.item() == 5000.0, "-ln P of a very unlikely character is large, not infinite"
    assert scores.grad.tolist() == [[1.0, -1.0]], "and its gradient is P - 1 at the target, P elsewhere"


def test_bfloat16_is_for_the_products_only():
    """With bfloat16 the model's products are rougher, while the loss is taken in float32: it differs by under 1 %."""
    model = small(n_embd=64)
    x, y = torch.randint(11, (8, 5)), torch.randint(11, (8, 5))
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output))
    exact, rough = nll(model, x, y), nll(model, x, y, "bfloat16")
    assert [out.dtype for out in seen] == [torch.float32, torch.bfloat16], "autocast does not reach the model"
    assert 0 < abs(rough.item() / exact.item() - 1) < 0.01, f"{rough.item():.4f} against {exact.item():.4f} in float32"
    expected = -seen[1].double().log_softmax(-1).gather(-1, y[..., None]).mean().item()
    assert rough.item() == pytest.approx(expected, abs=1e-6), "softmax, logarithm and mean in bfloat16 lose the loss"


@pytest.mark.parametrize(("length", "rows"), [(50, 1), (51, 4), (52, 1000), (55, 3), (7, 2)])
def test_evaluation_covers_every_token(length, rows):
    """The validation loss counts every token but the first once, those of the last, shorter window included."""
    model, data = small(), torch.randint(11, (length,)).to(torch.uint16)
    surprise = []
    for t in range(1, length):  # slowly: one token, the part of its window that comes before it, -ln P
        begin = (t - 1) // 5 * 5
        probs = torch.softmax(model(data[None, begin:t].long())[0, -1].double(), dim=0)
        surprise.append(-math.log(probs[data[t].item()].item()))
    loss = evaluate(model, data, rows=rows)
    expected = sum(surprise) / (length - 1)
    assert loss == pytest.approx(expected, abs=2e-6), (
        f"{loss:.6f} instead of {expected:.6f} for {length} tokens, {rows} windows at a time: tokens are missing, "
        "count more than others, or are not the ones that follow"
    )


def test_evaluation_leaves_no_trace():
    """Evaluating changes no weight and builds no graph for gradients."""
    model = small()
    before = [p.clone() for p in model.parameters()]
    evaluate(model, torch.randint(11, (50,)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "evaluation must not train"
    assert all(p.grad is None for p in model.parameters()), "evaluation computes no gradients"


def test_evaluation_drops_nothing():
    """Dropout is off while a model is evaluated, and on again afterwards."""
    model, plain = small(dropout=0.5), small()
    plain.load_state_dict(model.state_dict())
    data = torch.randint(11, (60,))
    first, second = evaluate(model, data), evaluate(model, data)
    assert first == second, "two evaluations differ: units are dropped while the model is scored"
    assert first == evaluate(plain, data), "evaluation must see the whole model"
    assert model.training, "after the first evaluation the training goes on without dropout"


def test_the_learning_rate_by_hand():
    """The rate rises in a line over the warm-up and falls along half a cosine: at points worked out by hand."""
    config = TrainConfig(steps=12, warmup=4, lr=0.8)
    points = {
        0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8,  # the first step has a rate above 0, the last of the warm-up the highest
        4: 0.8, 6: 0.4 * (1 + 0.5**0.5), 8: 0.4, 10: 0.4 * (1 - 0.5**0.5),  # cos 0, cos 45°, cos 90°, cos 135°
        11: 0.4 * (1 - 0.92387953),  # cos 157.5°: the last step is short, but it is a step
    }
    for step, expected in points.items():
        rate = learning_rate(step, config)
        assert rate == pytest.approx(expected), f"step {step} of 12, 4 of them warm-up, has rate {rate}, not {expected}"
    rates = [learning_rate(step, config) for step in range(12)]
    assert max(rates) == 0.8 and rates[4:] == sorted(rates[4:], reverse=True), "up to lr, then down without a jump"
    assert learning_rate(0, TrainConfig(steps=12, warmup=0, lr=0.8)) == 0.8, "without a warm-up it starts at the top"
    assert learning_rate(4, TrainConfig(steps=5, warmup=10, lr=0.8)) == pytest.approx(0.4), "a run may end warming up"


def test_decay_is_for_matrices():
    """Every parameter is in one group: matrices and embeddings, which decay, or norms and biases, which do not."""
    model = tiny(n_layer=2)
    optimizer = make_optimizer(model, recipe(weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}  # names the tied weight once
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(decays) == len(names), "a parameter is left out, or steps twice: the tied one, perhaps"
    for name, decay in decays.items():
        still = "norm" in name or name.endswith("bias")
        assert decay == (0.0 if still else 0.3), f"{name} has decay {decay}: scales, shifts and biases have none"


def test_the_optimizer_is_adamw():
    """Given gradients, the optimiser moves every weight as AdamW, written out in float64, does."""
    model, config = tiny().double(), recipe(lr=0.05, weight_decay=0.2, beta2=0.9)
    optimizer = make_optimizer(model, config)
    expected = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    m = {name: np.zeros_like(p) for name, p in expected.items()}
    v = {name: np.zeros_like(p) for name, p in expected.items()}
    for step in range(1, 6):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.numpy()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            update = (m[name] / (1 - 0.9**step)) / (np.sqrt(v[name] / (1 - 0.9**step)) + 1e-8)
            decay = 0.2 if p.ndim == 2 else 0.0
            expected[name] = expected[name] - 0.05 * (update + decay * expected[name])
        optimizer.step()
        for name, p in model.named_parameters():
            error = np.abs(p.detach().numpy() - expected[name]).max()
            assert error < 1e-12, f"step {step}: {name} is off by {error:.1e}: betas, decay or its correction"


def adamw(model, data, config: TrainConfig):
    """The whole loop on `Line`, written out: schedule, one gradient of the whole batch, clipping, AdamW."""
    p = [model.table.detach().numpy().copy(), model.bias.detach().numpy().copy()]
    m, v = [np.zeros_like(a) for a in p], [np.zeros_like(a) for a in p]
    losses = []
    for step, (x, y) in enumerate(itertools.islice(batches(data, 2, config.batch_size, config.seed), config.steps)):
        lr = config.lr * (step + 1) / config.warmup
        if step >= config.warmup:
            angle = math.pi * (step - config.warmup) / (config.steps - config.warmup)
            lr = config.lr * (1 + math.cos(angle)) / 2
        grad, loss = [np.zeros_like(a) for a in p], 0.0
        for context, target in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
            scores = p[0][context] + p[1]
            probs = np.exp(scores) / np.exp(scores).sum()
            loss -= math.log(probs[target]) / y.numel()
            slope = (probs - np.eye(5)[target]) / y.numel()
            grad[0][context] += slope
            grad[1] += slope
        norm = math.sqrt(sum((g**2).sum() for g in grad))
        for i, g in enumerate(grad):
            g = g * min(1, config.clip / norm)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = config.beta2 * v[i] + (1 - config.beta2) * g**2
            m_hat, v_hat = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - config.beta2 ** (step + 1))
            p[i] = p[i] - lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + (config.weight_decay if i == 0 else 0) * p[i])
        losses.append(loss)
    return p, losses


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_the_loop_is_adamw(accumulate, clip):
    """Step by step the loop is AdamW on the clipped gradient of the whole batch, in however many parts it was taken."""
    config = recipe(steps=30, batch_size=8, lr=0.1, warmup=5, accumulate=accumulate, clip=clip)
    model, data = Line(), torch.randint(5, (40,))
    (table, bias), losses = adamw(model, data, config)
    seen = list(train(model, data, config, make_optimizer(model, config), 2))
    assert [step for step, _ in seen] == list(range(1, 31)), "one (step, loss) after each step, counted from 1"
    for (step, loss), should in zip(seen, losses, strict=True):
        assert loss == pytest.approx(should, abs=1e-5), (
            f"step {step}: loss {loss:.6f} instead of {should:.6f}: gradients of earlier steps are still in .grad, or "
            "the parts, the clipping, the step, the decay or the learning rate are not right"
        )
    error = max(np.abs(p.detach().numpy() - e).max() for p, e in ((model.table, table), (model.bias, bias)))
    assert error < 1e-4, f"after 30 steps the weights are off by {error:.1e}"


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_accumulation_is_exact(accumulate):
    """The gradient of m micro-batches of b windows is the gradient of one batch of m b windows, to 1e-6."""
    model = small(n_layer=2)
    x, y = torch.randint(11, (12, 5)), torch.randint(11, (12, 5))
    expected_loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # all at once
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))
    loss = gradient(model, x, y, recipe(batch_size=12, accumulate=accumulate))
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-6), "the loss is the mean over the whole batch"
    for (name, p), g in zip(model.named_parameters(), expected, strict=True):
        error = (p.grad - g).abs().max().item()
        assert error < 1e-6, f"the gradient of {name} is off by {error:.1e}: each part counts by its share of the batch"


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_rate_belongs_to_the_step(accumulate):
    """The schedule moves once for each optimiser step, however many micro-batches it takes."""
    rates = []

    class Spy(torch.optim.SGD):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    model, config = small(), recipe(steps=6, warmup=2, lr=0.08, accumulate=accumulate)
    groups = [{"params": [p]} for p in model.parameters()]
    list(train(model, torch.randint(11, (60,)), config, Spy(groups, lr=1.0), 5))
    expected = [0.04, 0.08, 0.08, 0.04 * (1 + 0.5**0.5), 0.04, 0.04 * (1 - 0.5**0.5)]
    assert len(rates) == 6, "one optimiser step for a step, after its last micro-batch"
    for step, (row, rate) in enumerate(zip(rates, expected, strict=True)):
        assert row == pytest.approx([rate] * len(groups)), f"step {step} has rate {row[0]:.4f}, not {rate:.4f}"


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_the_whole_gradient_is_clipped(accumulate, share):
    """A gradient longer than `clip` is scaled down to it, whole, before the step; a shorter one is left alone."""
    model, data = small(), torch.randint(11, (60,))
    x, y = next(batches(data, 5, 4, seed=5))
    parameters = list(model.parameters())
    whole = torch.autograd.grad(F.cross_entropy(model(x).flatten(0, 1), y.flatten()), parameters)
    length = math.sqrt(sum(g.square().sum().item() for g in whole))
    before = [p.detach().clone() for p in parameters]
    config = recipe(steps=1, warmup=1, lr=0.1, accumulate=accumulate, clip=share * length)
    list(train(model, data, config, torch.optim.SGD(parameters), 5))  # plain descent: the step is lr times the gradient
    moved = math.sqrt(sum((p - b).square().sum().item() for p, b in zip(parameters, before, strict=True)))
    assert moved == pytest.approx(0.1 * min(1, share) * length, rel=1e-4), (
        f"a gradient of length {length:.3f}, clipped at {share * length:.3f}, made a step of {moved / 0.1:.3f} times lr"
    )
    for p, b, g in zip(parameters, before, whole, strict=True):
        torch.testing.assert_close(
            p, b - 0.1 * min(1, share) * g, rtol=1e-4, atol=1e-6,
            msg=lambda m: f"clip once, after the last micro-batch, all parameters by the same factor\n{m}",
        )


def test_training_starts_anywhere_and_stops_after_a_step():
    """A run can begin at any step, with that step's batch and rate, and when asked to stop it finishes its step."""
    data = torch.randint(11, (200,))
    model, config = small(), recipe(steps=12)
    optimizer = make_optimizer(model, config)
    asked = iter([False, False, True])
    first = list(train(model, data, config, optimizer, 5, stop=lambda: next(asked)))
    assert [step for step, _ in first] == [1, 2, 3], "asked during step 3, it ends after step 3"
    rest = list(train(model, data, config, optimizer, 5, start=3))
    torch.manual_seed(0)
    torch.randint(11, (200,))
    again = small()
    whole = list(train(again, data, config, make_optimizer(again, config), 5))
    assert first + rest == whole, "3 steps and 9 steps are not 12 steps: the batches or the rates differ"


def test_training_learns_a_small_text_by_heart():
    """A text with one answer to every context is learned until almost nothing about it is left to say."""
    data = torch.arange(11).repeat(20)
    model = GPT(ModelConfig(vocab_size=11, block_size=5, n_embd=16, n_head=2, n_layer=2))
    config = recipe(steps=100, batch_size=16, lr=0.02, precision="bfloat16")
    losses = [loss for _, loss in train(model, data, config, make_optimizer(model, config), 5)]
    assert losses[0] < math.log(11) + 1, "the first loss is far above ln V: the model starts with strong opinions"
    assert losses[-1] < 0.05, f"the loss is still {losses[-1]:.3f}: the model cannot even learn by heart"
    assert evaluate(model, data) < 0.05, "the evaluation does not see what the training learned"


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", -1), ("accumulate", 0), ("eval_every", 0), ("lr", 0.0), ("lr", -1.0),
     ("lr", math.nan), ("clip", 0.0), ("clip", math.nan), ("warmup", -1), ("weight_decay", -0.1),
     ("weight_decay", math.nan), ("beta2", 1.0), ("beta2", math.nan), ("minutes", 0.0), ("minutes", math.nan)],
)
def test_a_recipe_that_cannot_run_is_refused(field, value):
    """Steps, batch sizes and rates that make no sense are refused by name before any work is done."""
    with pytest.raises(BadInput, match=f"{field} is"):
        TrainConfig(**{field: value})


def test_micro_batches_are_equal():
    """A batch that does not split into equal micro-batches is refused: they would count differently."""
    with pytest.raises(BadInput, match="batch_size 10 does not split into 4 micro-batches"):
        TrainConfig(batch_size=10, accumulate=4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recipes(name):
    """Every preset is a shape and a recipe that can run, and flags given beside it win."""
    args, *_ = trunk.arguments(["--preset", name, "--lr", "0.5"])
    model, config = options.build(ModelConfig, args, vocab_size=65), options.build(TrainConfig, args)
    assert args.name == name and config.lr == 0.5, "a run of a preset has its name; what is asked for wins"
    for key, value in PRESETS[name].items():
        assert key == "lr" or getattr(args, key) == value, f"the preset's {key} does not reach the run"
    assert model.n_embd % model.n_head == 0


def some_steps(model, stop):
    """Plain descent, where rounding stays rounding: AdamW would make a step of the noise in a gradient that is 0."""
    config = recipe(steps=6, batch_size=8, accumulate=2, lr=0.3, clip=0.5)
    data = torch.randint(11, (300,), generator=torch.Generator().manual_seed(1))
    return list(train(model, data, config, torch.optim.SGD(model.parameters()), 5, stop=stop))


def process(rank: int, port: int, folder: Path, flags: list[str]):
    """One process of two: a few steps by `train`, then a whole run of the script, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "STAGES_OUT": str(folder)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=2)
    torch.manual_seed(0)
    model, rows = small(), []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    asked = iter([False] * 3 + [rank == 1])  # one process is asked to stop in step 4, the other never
    losses = some_steps(DistributedDataParallel(model), stop=lambda: next(asked))
    torch.save({"losses": losses, "rows": rows, "model": model.state_dict()}, folder / f"{rank}.pt")
    with pytest.raises(BadInput, match="batch_size 3 does not split into 1 micro-batches on 2 processes"):
        next(train(model, torch.randint(11, (300,)), recipe(batch_size=3), None, 5))
    dist.destroy_process_group()
    main([*flags, "--name", "two"])


TEXT = "the cat sat on the mat and the rat sat on the cat\n" * 40
FLAGS = ["--steps", "36", "--eval-every", "20", "--batch-size", "8", "--accumulate", "2", "--warmup", "5"]
FLAGS += ["--block-size", "8", "--n-embd", "12", "--n-head", "3", "--n-layer", "1", "--device", "cpu"]
PASS = 28  # batches of 8 windows of 8 in a pass over 1,800 characters


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A file to train on; runs go to a folder of the test's own."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def run(text, tmp_path):
    """A function: run the script on the text under a name, with flags of the test's own -> the folder of the run."""

    def start(name, *words, code=None):
        assert main(["--corpus", str(text), *FLAGS, "--name", name, *words]) == code
        return tmp_path / "out" / name

    return start


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of runs with one finished run in it, "done". To look at, or to copy."""
    out = tmp_path_factory.mktemp("finished")
    file = out / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAGES_OUT", str(out))
        main(["--corpus", str(file), *FLAGS, "--name", "done"])
    return out


@pytest.fixture
def done(finished, text, tmp_path):
    """A copy of the finished run, to damage and to go on from."""
    return shutil.copytree(finished / "done", tmp_path / "out" / "done")


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the seconds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(a, b, path="checkpoint"):
    """Fail where two checkpoints differ in a single bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds", "args"}:
            same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{path} differs from that of the run that never stopped"
    else:
        assert a == b, f"{path} is {a!r} instead of {b!r}"


def assert_same_run(folder: Path, whole: Path):
    """Same weights, optimiser, random numbers and metrics, to the last bit."""
    assert metrics(folder) == metrics(whole), "losses differ from those of the run that never stopped"
    same(load(folder / "model.pt")[2], load(whole / "model.pt")[2])
    losses = [json.loads((place / "summary.json").read_text("utf-8"))["val_loss"] for place in (folder, whole)]
    assert losses[0] == losses[1], f"the two runs end with {losses[0]} and {losses[1]}"


def during(monkeypatch, step: int, event):
    """Let `event()` happen while the script takes `step`."""
    waiting = [event]

    def rate(at, config):
        if at == step - 1 and waiting:
            waiting.pop()()
        return learning_rate(at, config)

    monkeypatch.setattr(trunk, "learning_rate", rate)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_run_itself(precision, run, monkeypatch):
    """k steps, Ctrl-C and the rest with --resume are all steps at once, bit for bit, with dropout and across passes."""
    words = ["--precision", precision, "--dropout", "0.2"]
    whole = run("whole", *words)
    assert load(whole / "model.pt")[2]["step"] == 36
    for first, second in ((17, PASS), (PASS - 1, PASS + 1)):  # the last step of a pass, and the first of the next
        during(monkeypatch, first, ctrl_c)
        folder = run("parts", *words, code=130)
        state = load(folder / "model.pt")[2]
        assert state["step"] == first, f"Ctrl-C in step {first} ends the run after it, with a checkpoint of it"
        during(monkeypatch, second, ctrl_c)
        assert main(["--resume", "--name", "parts"]) == 130, "a resumed run can be stopped as well"
        assert load(folder / "model.pt")[2]["step"] == second
        assert main(["--resume", "--name", "parts"]) is None
        assert_same_run(folder, whole)


def test_a_crash_costs_the_steps_since_the_last_look(run, monkeypatch):
    """After a power cut a run goes on from its last checkpoint, and what was logged after it is logged once."""
    whole = run("whole", "--dropout", "0.2")

    def power_cut():
        raise SystemError("power cut")

    during(monkeypatch, 35, power_cut)
    with pytest.raises(SystemError, match="power cut"):
        run("parts", "--dropout", "0.2")
    folder = whole.parent / "parts"
    assert load(folder / "model.pt")[2]["step"] == 20, "each look at the validation text keeps a checkpoint"
    assert metrics(folder)[-1]["step"] == 30, "the log is ahead of the checkpoint"
    main(["--resume", "--name", "parts"])
    assert_same_run(folder, whole)


def test_time_is_up_and_the_run_goes_on_later(run):
    """--minutes ends a run with a checkpoint and a score; a resumed run has as long again."""
    whole, folder = run("whole"), run("parts", "--minutes", "1e-9")
    state = load(folder / "model.pt")[2]
    assert state["step"] == 1, "time is up after the first step, which is finished"
    assert json.loads((folder / "summary.json").read_text("utf-8"))["steps"] == 1, "it is scored like any other end"
    torch.save(state | {"seconds": 3600.0}, folder / "model.pt")  # as if that step had taken an hour
    main(["--resume", "--name", "parts", "--minutes", "30"])
    same(load(folder / "model.pt")[2], load(whole / "model.pt")[2], "with half an hour more: checkpoint")
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert 3600 < summary["seconds"] < 5400, "while the run's record counts all the time it took"


def test_looking_does_not_change_the_run(run):
    """How often a run is scored and writes a sample changes nothing about it: the same weights, with dropout."""
    often, seldom = run("often", "--dropout", "0.2", "--eval-every", "9"), run("seldom", "--dropout", "0.2")
    assert [row["step"] for row in metrics(often) if "val_loss" in row] == [9, 18, 27, 36]
    same(load(often / "model.pt")[2], load(seldom / "model.pt")[2])


def test_a_resumed_run_keeps_its_text(run, text, monkeypatch):
    """A run that fell back on another text goes on with that one, also when its first choice is there again."""
    asked = []

    def only_docs(name):
        asked.append(name)
        return corpus.Corpus("python-docs", TEXT)

    monkeypatch.setattr(corpus, "load", only_docs)
    during(monkeypatch, 3, ctrl_c)
    assert main([*FLAGS, "--name", "docs"]) == 130
    assert main(["--resume", "--name", "docs", "--steps", "5"]) is None
    assert asked == [None, "python-docs"], "resumed, it asked for the default corpus, which may be another one by now"


def test_a_resumed_run_takes_new_flags_but_keeps_its_shape(done):
    """Flags given with --resume win over the run's own, except for the model's shape, which is built already."""
    main(["--resume", "--name", "done", "--steps", "40"])
    assert load(done / "model.pt")[2]["step"] == 40, "a finished run can be made longer"
    for words in (["--n-layer", "3"], ["--n-embd", "24"], ["--block-size", "16"]):
        with pytest.raises(BadInput, match="a resumed run keeps its shape"):
            main(["--resume", "--name", "done", *words])


def test_two_processes_are_one(run, text, tmp_path, monkeypatch):
    """Two processes, each with half of every batch, do what one does with the whole batch, to 1e-6."""
    # Forked from a server that has imported torch, where there is fork: the import takes longer than the test.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["torch"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--corpus", str(text), *FLAGS, "--precision", "float32", "--steps", "12", "--eval-every", "5"]
    pair = [context.Process(target=process, args=(rank, port, tmp_path, words)) for rank in range(2)]
    for one in pair:
        one.start()
    try:
        deadline = time.monotonic() + 100
        for one in pair:
            one.join(max(0, deadline - time.monotonic()))
        assert [one.exitcode for one in pair] == [0, 0], "a process failed or hangs: what it said stands above"
    finally:
        for one in pair:
            one.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["losses"]) == len(second["losses"]) == 4, "when one process is asked to stop, all stop together"
    torch.manual_seed(0)
    model, asked = small(), iter([False] * 3 + [True])
    losses = some_steps(model, stop=lambda: next(asked))
    for rank, found in enumerate((first, second)):
        assert found["rows"] == [2] * 8, "of 8 windows a process takes 4, in two micro-batches: half the work, not all"
        for (step, loss), (_, expected) in zip(found["losses"], losses, strict=True):
            assert abs(loss - expected) < 1e-6, f"process {rank}, step {step}: loss {loss}, in one process {expected}"
        for name, p in model.state_dict().items():
            error = (found["model"][name] - p).abs().max().item()
            assert error < 1e-6, f"process {rank}: {name} is off by {error:.1e}: each counts by its share of the batch"

    one = run("one", "--precision", "float32", "--steps", "12", "--eval-every", "5")
    rows, expected = metrics(tmp_path / "two"), metrics(one)
    assert [row["step"] for row in rows] == [row["step"] for row in expected], "one process writes the record, not both"
    for row, should in zip(rows, expected, strict=True):
        assert row == pytest.approx(should, abs=1e-4), "the script's run in two processes is not the run in one"
    assert not [name for name in load(tmp_path / "two" / "model.pt")[2]["model"] if name.startswith("module.")], (
        "the checkpoint is of the model, not of its wrapper, so that one process can read it"
    )


def test_ctrl_c_in_mid_run(text, tmp_path):
    """Ctrl-C ends the script with exit code 130, one line that says how to go on, and a checkpoint to go on from."""
    if os.name == "nt":
        pytest.skip("Windows cannot send Ctrl-C to one process")
    stage = Path(trunk.__file__).parent
    words = [sys.executable, "train.py", "--corpus", str(text), *FLAGS, "--name", "cut", "--steps", "1000000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("STAGES_TRACEBACK", None)
    script = subprocess.Popen(words, cwd=stage, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        log, deadline = tmp_path / "out" / "cut" / "metrics.jsonl", time.monotonic() + 100
        while not (log.exists() and log.stat().st_size) and script.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        script.send_signal(signal.SIGINT)
        said = script.communicate(timeout=60)[0].decode("utf-8")
    finally:
        script.kill()
    assert script.returncode == 130, f"exit code {script.returncode} after Ctrl-C\n{said}"
    assert "Traceback" not in said and "go on with --resume --name cut" in said, said
    step = load(tmp_path / "out" / "cut" / "model.pt")[2]["step"]
    assert step >= 10, "the checkpoint is of the step that Ctrl-C came in"
    assert main(["--resume", "--name", "cut", "--steps", str(step + 3)]) is None
    assert json.loads((log.parent / "summary.json").read_text("utf-8"))["steps"] == step + 3


def test_the_script_trains_scores_and_saves(finished):
    """`train.py` reports the loss over the whole validation text, beside what it trained, and saves that very model."""
    folder = finished / "done"
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    rows = [row for row in metrics(folder) if "val_loss" in row]
    assert [row["step"] for row in rows] == [20, 36], "the validation loss is taken every 20 steps and at the end"
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < math.log(len(set(TEXT))), "the loss falls"

    model, tokenizer, state = load(folder / "model.pt")
    held_out = torch.tensor(tokenizer.encode(TEXT[1800:]))  # the last tenth of 2,000 characters
    assert tokenizer.chars == "".join(sorted(set(TEXT))), "the tokenizer is saved with the model"
    assert summary["val_loss"] == pytest.approx(evaluate(model, held_out, precision="bfloat16"), abs=1e-6), (
        "the reported loss is not the saved model's on the last tenth of the text"
    )
    V, C = len(tokenizer), 12
    block = C * 3 * C + 3 * C + C * C + C + 4 * C * C + 4 * C + 4 * C * C + C + 4 * C  # attention, feed-forward, norms
    assert summary["params"] == V * C + 8 * C + block + 2 * C, "the parameters of the model that was trained"
    assert summary["tokens"] == 36 * 8 * 8 and summary["steps"] == 36, "every position of a window predicts a token"
    assert summary["val_bpb"] == pytest.approx(summary["val_loss"] / math.log(2)), "one byte per character here"
    assert not list(folder.glob("*.part*")), "half-written files are left behind"
    assert (folder / "train.bin").stat().st_size == 2 * 1800, "the text as tokens of 16 bits"


def test_what_a_run_says(run, capsys):
    """A run shows its text, its size, a sample at each look and, in the last line, the loss in nats per character."""
    folder = run("tiny", "--steps", "6", "--eval-every", "3")
    out = capsys.readouterr().out
    loss = json.loads((folder / "summary.json").read_text("utf-8"))["val_loss"]
    assert "1,800 training and 200 validation tokens" in out
    assert out.count("nats per character") == 3 and "step 3: validation loss" in out, "a look at step 3 and at the end"
    assert f"{loss:.4f} nats per character" in out.splitlines()[-1], "the last line tells the loss"
    assert [row["lr"] for row in metrics(run("more", "--steps", "10")) if "lr" in row] == [
        pytest.approx(learning_rate(9, TrainConfig(steps=10, warmup=5)))
    ], "the rate logged for a step is the one it was made with"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_other_tokens_same_unit(kind, run, capsys):
    """A run on bytes or byte pairs reports its loss per character too, and writes text."""
    folder = run(kind, "--tokenizer", kind, "--vocab-size", "280", "--steps", "12", "--batch-size", "4")
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    model, tokenizer, _ = load(folder / "model.pt")
    held_out = tokenizer.encode(TEXT[1800:])
    total = evaluate(model, torch.tensor(held_out), precision="bfloat16") * (len(held_out) - 1)
    characters = 200 - len(tokenizer.decode(held_out[:1]))
    assert summary["val_loss"] == pytest.approx(total / characters, rel=1e-6), "nats of all tokens over all characters"
    capsys.readouterr()
    write_text(["--name", kind, "--prompt", "the", "--length", "5", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("the"), "and the run can be sampled from"


def test_the_script_trains_on_the_training_text(run, text):
    """What only the validation text says cannot be known: on letters that never occurred the loss is above ln V."""
    text.write_text("abcd" * 450 + "wxyz" * 50, encoding="utf-8")
    loss = json.loads((run("apart", "--lr", "0.02") / "summary.json").read_text("utf-8"))["val_loss"]
    assert loss > math.log(8), f"a loss of {loss:.3f} on letters that are not in the training text: it was shown them"


def test_the_compiled_model_is_only_an_engine(run, monkeypatch):
    """With --compile the steps are taken by the compiled model; scores, samples and the checkpoint are the model's."""
    calls = []

    class Compiled(nn.Module):
        """Stands for what torch.compile returns, which takes half a minute to make."""

        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def forward(self, idx):
            calls.append(idx.shape)
            return self._orig_mod(idx)

    monkeypatch.setattr(torch, "compile", Compiled)
    same(load(run("compiled", "--compile") / "model.pt")[2], load(run("plain") / "model.pt")[2])
    assert calls == [(4, 8)] * 72, "36 steps of two micro-batches"


def test_metrics_for_tensorboard(run):
    """With --tensorboard the numbers of metrics.jsonl are written for TensorBoard too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    folder = run("board", "--tensorboard", "--steps", "20", "--eval-every", "10")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for key in ("train_loss", "lr", "val_loss"):
        expected = [(row["step"], pytest.approx(row[key])) for row in metrics(folder) if key in row]
        assert len(expected) == 2 and [(e.step, e.value) for e in events.Scalars(key)] == expected, f"{key} differs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "nowhere.txt"], "no corpus or file"),
        (["--corpus", "shakespear"], "no corpus or file 'shakespear': choose shakespeare, names"),
        (["--n-head", "3", "--n-embd", "128"], "n_embd 128 does not split into n_head 3"),
        (["--n-layer", "0"], "n_layer is 0"),
        (["--lr", "-1"], "lr is -1.0"),
        (["--steps", "many"], "invalid int value"),
        (["--accumulate", "3"], "batch_size 8 does not split into 3"),
        (["--minutes", "-5"], "minutes is -5.0"),
        (["--precision", "float16"], "invalid choice: 'float16'"),
        (["--tokenizer", "word"], "invalid choice: 'word'"),
        (["--tokenizer", "bpe", "--vocab-size", "100"], "vocab_size 100"),
        (["--batch-size", "1000000"], "do not fill a batch of 1000000 windows"),
        (["--block-size", "200", "--batch-size", "2"], "a text of 200 tokens has no window of 200"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--device", "abacus"], "unknown device"),
        (["--name", "../up"], "run name"),
        (["--n-hidden", "4"], "unrecognized arguments"),
        (["--resume", "--name", "never-begun"], "no checkpoint at .*never-begun"),
    ],
    ids=lambda value: " ".join(value).strip("-") if isinstance(value, list) else "",
)
def test_the_script_refuses_bad_input(words, message, text, done):
    """A wrong value at the command line is one clear line, and an earlier run of that name is left as it was."""
    before = {file.name: file.read_bytes() for file in done.iterdir() if file.suffix != ".bin"}
    with pytest.raises(BadInput, match=message):
        main(["--corpus", str(text), *FLAGS, "--batch-size", "8", "--name", "done", *words])
    after = {file.name: file.read_bytes() for file in done.iterdir() if file.suffix != ".bin"}
    assert after == before and "model.pt" in after, "a run that never began wrote over the record of an earlier one"
    assert [folder.name for folder in done.parent.iterdir()] == ["done"], "and it leaves no folder"


@pytest.mark.parametrize("length", [1, 10, 60, 150])
def test_a_text_that_is_too_short_is_refused(length, text, done):
    """A text that does not fill a batch, or leaves no window to validate on, is refused before any training."""
    before = {file.name: file.read_bytes() for file in done.iterdir() if file.suffix != ".bin"}
    text.write_text(TEXT[:length], encoding="utf-8")
    with pytest.raises(BadInput, match="use a longer text"):
        main(["--corpus", str(text), *FLAGS, "--name", "done", "--batch-size", "2", "--block-size", "16"])
    after = {file.name: file.read_bytes() for file in done.iterdir() if file.suffix != ".bin"}
    assert after == before, "a run that never began wrote over the record of an earlier one"


RAN = []


class Bomb:
    """Unpickling this calls a function: what a hostile checkpoint does."""

    def __reduce__(self):
        return RAN.append, ("boom",)


@pytest.mark.parametrize("damage", ["cut short", "random bytes", "empty", "code"])
def test_a_damaged_checkpoint_is_not_resumed(damage, done):
    """A checkpoint that is damaged, or holds code, is refused in one line; the code does not run, the record stays."""
    path, before = done / "model.pt", (done / "metrics.jsonl").read_bytes()
    whole = path.read_bytes()
    content = {"cut short": whole[:len(whole) // 2], "random bytes": os.urandom(1000), "empty": b""}
    if damage == "code":
        torch.save(load(path)[2] | {"args": Bomb()}, path)
    else:
        path.write_bytes(content[damage])
    for script in (lambda: main(["--resume", "--name", "done"]), lambda: write_text(["--name", "done"])):
        with pytest.raises(BadInput, match="model.pt is damaged or from another version"):
            script()
    assert RAN == [], "opening a stranger's file ran the code in it: load weights only"
    assert (done / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_keeps_what_was_saved(run, monkeypatch):
    """When the disk fills up in mid-run, the run ends with an error, and the checkpoint before it can be resumed."""
    real = torch.save
    whole = run("whole", "--eval-every", "10")

    def full_disk(state, path):
        if state["step"] == 20:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run("full", "--eval-every", "10")
    monkeypatch.undo()
    folder = whole.parent / "full"
    assert load(folder / "model.pt")[2]["step"] == 10, "write to another file and rename it: the old one stays"
    assert not list(folder.glob("*.part*")), "half a checkpoint fills the disk for nothing"


def test_a_prompt_outside_the_vocabulary_is_refused(done):
    """A prompt with a character that the text does not have is refused by name."""
    with pytest.raises(BadInput, match="character 'R' is not among the 13 known"):
        write_text(["--name", "done", "--prompt", "ROMEO:"])
