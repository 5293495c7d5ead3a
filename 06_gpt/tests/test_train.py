"""Checkpoints of the training: AdamW written out, exact accumulation and resumption, two processes, the script."""

import contextlib
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
from types import SimpleNamespace

from shared import boards, corpus
from shared.errors import BadInput

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train as script
from checkpoint import load
from data import batches
from model import GPT, ModelConfig
from sample import main as write_text
from sample import sample
from train import TrainConfig, evaluate, gradient, log_probs, main, make_optimizer, nll, schedule, train


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """A run's samples have 8 tokens: 160 would take longer than its training."""

    def short(model, context, length, *more):
        return sample(model, context, 8, *more)

    monkeypatch.setattr(script, "sample", short, raising=False)


def tiny(**changes) -> GPT:
    return GPT(ModelConfig(**{"vocab_size": 11, "block_size": 5, "n_embd": 4, "n_head": 2, "n_layer": 1} | changes))


def small(**changes) -> GPT:
    """A float64 model whose weights are far from their start, so that no two characters score alike."""
    model = tiny(**changes).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def recipe(**changes) -> TrainConfig:
    plain = {"steps": 10, "batch_size": 4, "lr": 0.01, "warmup": 0, "weight_decay": 0.1, "beta2": 0.999, "seed": 5}
    plain |= {"clip": math.inf, "precision": "float32"}
    return TrainConfig(**plain | changes)


def fit(model, data, config: TrainConfig) -> list[float]:
    """The losses of all steps on the text `data`."""
    stream = batches(data, model.config.block_size, config.batch_size, config.seed)
    return [loss for _, loss in train(model, stream, config, make_optimizer(model, config))]


class Line(nn.Module):
    """One row of scores for each character, whatever came before: the smallest model that `train` accepts."""

    def __init__(self):
        super().__init__()
        self.config = ModelConfig(vocab_size=5, block_size=2)
        self.table = nn.Parameter(torch.linspace(-1, 1, 25).view(5, 5).double())

    def forward(self, idx):
        return self.table[idx]  # [B, T, V]


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


@pytest.mark.parametrize(("length", "rows"), [(50, 1), (51, 4), (52, 1000), (55, 3), (7, 2)])
def test_evaluation_covers_every_token(length, rows):
    """The validation loss counts every token but the first once, those of the last, shorter window included."""
    model, data = small(), torch.randint(11, (length,))
    surprise = []
    for t in range(1, length):  # slowly: one token, the part of its window that comes before it, -ln P
        begin = (t - 1) // 5 * 5
        probs = torch.softmax(model(data[None, begin:t])[0, -1], dim=0)
        surprise.append(-math.log(probs[data[t]].item()))
    loss = evaluate(model, data.to(torch.uint16), rows=rows)  # as tokens are stored
    expected = sum(surprise) / (length - 1)
    assert loss == pytest.approx(expected, abs=2e-6), (  # the logarithm is taken in float32
        f"{loss:.6f} instead of {expected:.6f} for {length} tokens, {rows} windows at a time: tokens are missing, "
        "count more than others, or are not the ones that follow"
    )


def test_evaluation_leaves_no_trace():
    """Evaluating changes no weight and builds no graph for gradients."""
    model = small()
    before, kept = [p.clone() for p in model.parameters()], []
    model.register_forward_hook(lambda module, args, output: kept.append(output.requires_grad))
    evaluate(model, torch.randint(11, (50,)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "evaluation must not train"
    assert all(p.grad is None for p in model.parameters()), "evaluation computes no gradients"
    assert kept and not any(kept), "evaluation keeps all it computes for a backward pass: use torch.no_grad"


def test_batches_go_to_the_models_device(monkeypatch):
    """Training and evaluation move each batch to the device that the model is on."""
    model, data = small().to("meta"), torch.randint(11, (60,))  # on the device "meta" tensors have a shape alone
    stream = batches(data, model.config.block_size, 4, seed=5)
    steps = train(model, stream, recipe(), torch.optim.SGD(model.parameters(), lr=0.1))

    def tell(model, x, y, *rest):
        raise LookupError(f"{x.device}, {y.device}")

    monkeypatch.setattr(script, "nll", tell)
    for name, work in (("training", lambda: next(steps)), ("evaluation", lambda: evaluate(model, data))):
        with pytest.raises(LookupError) as told:
            work()
        assert str(told.value) == "meta, meta", f"{name}: the model is on meta, and its batch is on {told.value}"


def adamw(table, data, config: TrainConfig):
    """AdamW on one table of scores, written out: Loshchilov & Hutter (2019), algorithm 2, beta 0.9 and 0.999."""
    p, m, v = table.copy(), np.zeros_like(table), np.zeros_like(table)
    losses = []
    stream = batches(data, 2, config.batch_size, config.seed)
    for step, (x, y) in enumerate(itertools.islice(stream, config.steps)):
        lr = config.lr * (1 - step / config.steps)
        grad, loss = np.zeros_like(p), 0.0
        for context, target in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
            probs = np.exp(p[context]) / np.exp(p[context]).sum()
            loss -= math.log(probs[target]) / y.numel()
            grad[context] += (probs - np.eye(5)[target]) / y.numel()
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad**2
        m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        p = p - lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + config.weight_decay * p)
        losses.append(loss)
    return p, losses


def test_each_step_starts_with_fresh_gradients():
    """A step uses the gradient of its own batch: those of earlier steps are cleared."""
    model, data = Line(), torch.randint(5, (40,))
    config = recipe(steps=4, weight_decay=0.0)
    optimizer = make_optimizer(model, config)
    stream = list(itertools.islice(batches(data, 2, 4, 5), 4))
    found = []
    optimizer.register_step_pre_hook(lambda *args: found.append(model.table.grad.clone()))
    tables = [model.table.detach().clone()]
    for _ in train(model, iter(stream), config, optimizer):
        tables.append(model.table.detach().clone())
    for step, (x, y) in enumerate(stream):
        table = tables[step].clone().requires_grad_()
        torch.nn.functional.cross_entropy(table[x].flatten(0, 1), y.flatten()).backward()
        torch.testing.assert_close(
            found[step], table.grad, rtol=1e-5, atol=1e-6,
            msg=lambda m, step=step: f"step {step + 1} uses another gradient than its batch's: is .grad cleared?\n{m}",
        )


def test_the_rate_is_a_share_of_each_groups_own():
    """The schedule rises over the warm-up, falls in a line to 1 / (steps - warmup); each group gets that share."""
    assert [schedule(step, recipe(steps=4)) for step in range(4)] == [1, 0.75, 0.5, 0.25], "no warm-up: a straight fall"
    config = recipe(steps=10, warmup=4)
    shares = [1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [schedule(step, config) for step in range(10)] == pytest.approx(shares), "a rise to 1, then a fall towards 0"
    for steps, expected in ((1, [1]), (4, [1 / 2, 1, 1, 1 / 2])):
        found = [schedule(step, recipe(steps=steps, warmup=500)) for step in range(steps)]
        assert found == expected, f"{steps} steps with a warm-up of 500: half of them are to rise, half to fall"
    model = small()
    groups = [{"params": [model.tok_emb.weight], "lr": 0.5}, {"params": [model.pos_emb], "lr": 0.001}]
    optimizer = torch.optim.SGD(groups)
    stream, seen = batches(torch.randint(11, (50,)), 5, 4, seed=5), []
    for _ in train(model, stream, config, optimizer):
        seen.append([group["lr"] for group in optimizer.param_groups])
    for step, rates in enumerate(seen):
        expected = [0.5 * shares[step], 0.001 * shares[step]]
        assert rates == pytest.approx(expected), f"step {step + 1} has rates {rates}: each group's own, times the share"


def test_only_matrices_decay():
    """Weight decay pulls on matrices and tables; biases and the norms' scales are left alone."""
    model, config = small(), recipe(steps=1, weight_decay=0.5, beta2=0.9)
    optimizer = make_optimizer(model, config)
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decayed) == len(list(model.parameters())), "each parameter belongs to the optimiser, once"
    for name, p in model.named_parameters():
        assert decayed[id(p)] == (0.5 if p.ndim >= 2 else 0.0), (
            f"{name}, of shape {tuple(p.shape)}, decays by {decayed[id(p)]}: matrices and tables decay, vectors do not"
        )
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.9)}, "beta2 is the recipe's"


def test_weight_decay_stands_beside_the_step():
    """A weight without a gradient shrinks by rate times decay at each step: Adam does not rescale the decay."""
    model = Line()
    data = torch.randint(4, (40,))  # character 4 never comes: the gradient of its row is 0
    before = model.table[4].detach().clone()
    fit(model, data, recipe(steps=1, lr=0.01, weight_decay=0.5))
    torch.testing.assert_close(
        model.table[4].detach(), before * (1 - 0.01 * 0.5),
        msg=lambda m: f"decay takes lr * weight_decay of the weight itself, after or before the step of Adam\n{m}",
    )


def test_the_loop_is_adamw():
    """Step by step the loop is AdamW as published, with a rate that falls in a line."""
    config = recipe(steps=30, lr=0.1)
    model, data = Line(), torch.randint(5, (40,))
    expected, losses = adamw(model.table.detach().numpy(), data, config)
    seen = list(train(model, batches(data, 2, config.batch_size, config.seed), config, make_optimizer(model, config)))
    assert [step for step, _ in seen] == list(range(1, 31)), "one (step, loss) after each step, counted from 1"
    for (step, loss), should in zip(seen, losses, strict=True):
        assert loss == pytest.approx(should, abs=1e-5), f"step {step}: loss {loss:.6f}, AdamW has {should:.6f}"
    error = np.abs(model.table.detach().numpy() - expected).max()
    assert error < 1e-4, f"after 30 steps the weights are off by {error:.1e}: the last step is not AdamW's"


def test_a_loss_that_is_not_finite_stops_the_training():
    """The first loss that is infinite or nan ends the training by name, before it reaches a weight."""
    for bad in (math.nan, math.inf):
        model, factors = Line(), iter([1, 1, 1, bad])
        model.register_forward_hook(lambda module, args, output, factors=factors: output * next(factors, 1))
        steps = train(model, batches(torch.randint(5, (40,)), 2, 4, 5), recipe(), make_optimizer(model, recipe()))
        with pytest.raises(BadInput, match="lr") as caught:
            for _ in range(10):
                next(steps)
        assert "step 4" in str(caught.value), "the line does not say at which step the loss stopped being a number"
        assert model.table.isfinite().all(), "nan reached the weights: no later step can mend them"


def test_training_learns_a_small_text_by_heart():
    """A text with one answer to every context is learned until almost nothing about it is left to say."""
    data = torch.arange(11).repeat(20)
    model = GPT(ModelConfig(vocab_size=11, block_size=5, n_embd=16, n_head=2, n_layer=2))
    losses = fit(model, data, recipe(steps=100, batch_size=16, weight_decay=0.0, lr=0.02))
    assert abs(losses[0] - math.log(11)) < 0.1, "it starts at ln V"
    assert losses[-1] < 0.05, f"the loss is still {losses[-1]:.3f}: the model cannot even learn by heart"
    assert evaluate(model, data) < 0.05, "the evaluation does not see what the training learned"


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_leaves_the_mode_as_it_was(mode):
    """A model in training goes on training after an evaluation, and a frozen one in evaluation mode stays in it."""
    model = small().train(mode)
    evaluate(model, torch.randint(11, (50,)))
    assert [module.training for module in model.modules()] == [mode] * len(list(model.modules())), (
        f"evaluate was given a model with training={mode} and left it in the other mode"
    )


def test_the_same_seed_repeats_a_run():
    """Same seed, same losses, to the last bit; another seed draws other batches."""

    def losses(seed):
        torch.manual_seed(1)
        model = tiny()
        return fit(model, torch.arange(11).repeat(5), recipe(seed=seed))

    assert losses(5) == losses(5), "a run must repeat, or no number in a README can be checked"
    assert losses(5) != losses(6), "the seed does not reach the batches"


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("batch_size", -1), ("eval_every", 0), ("lr", 0.0), ("lr", -1.0),
                         ("lr", math.nan), ("lr", math.inf), ("weight_decay", -0.1), ("weight_decay", math.nan),
                         ("weight_decay", math.inf), ("warmup", -1), ("beta2", 1.0), ("beta2", math.nan),
                         ("micro_batch", 0), ("clip", 0.0), ("clip", math.nan)],
)
def test_a_recipe_that_cannot_run_is_refused(field, value):
    """Steps, batch sizes and rates that make no sense are refused by name before any work is done."""
    with pytest.raises(BadInput, match=field):
        TrainConfig(**{field: value})


TEXT = "the cat sat on the mat and the rat sat on the cat\n" * 40
FLAGS = ["--steps", "40", "--eval-every", "20", "--batch-size", "32", "--block-size", "4", "--n-embd", "6"]
FLAGS += ["--n-head", "2", "--n-layer", "1", "--warmup", "5", "--device", "cpu"]
PASS = 14  # batches of 32 windows of 4 in a pass over 1,800 characters


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A file to train on; runs go to a folder of the test's own."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_the_script_trains_scores_and_saves(text, tmp_path, capsys):
    """`train.py` reports the loss over the whole validation text, beside what it trained, and saves that very model."""
    main(["--corpus", str(text), "--name", "tiny", *FLAGS])
    folder = tmp_path / "out" / "tiny"
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    looks = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in looks] == [20, 40], "the validation loss is taken every eval_every steps and last"
    assert looks[-1]["val_loss"] < looks[0]["val_loss"] < math.log(len(set(TEXT))), "the loss falls"
    assert [row["step"] for row in rows if "train_loss" in row] == [10, 20, 30, 40], "the training loss, now and then"

    model, tokenizer, *_ = load(folder / "model.pt")
    held_out = torch.tensor(tokenizer.encode(TEXT[1800:]))  # the last tenth of 2,000 characters
    assert tokenizer.chars == "".join(sorted(set(TEXT))), "the tokenizer is saved with the model"
    assert summary["val_loss"] == pytest.approx(evaluate(model, held_out, precision="bfloat16"), abs=1e-6), (
        "the reported loss is not the saved model's on the last tenth of the text"
    )
    V = len(tokenizer)
    block = 4 * (6 * 6 + 6) + (6 * 24 + 24) + (24 * 6 + 6) + 2 * 12  # attention, feed-forward, norms
    assert summary["params"] == V * 6 + 4 * 6 + block + 12, "the parameters of the model that was trained"
    assert summary["tokens"] == 40 * 32 * 4 and summary["steps"] == 40, "every position of a window predicts a token"
    assert not list(folder.glob("*.part*")), "half-written files are left behind"
    out = capsys.readouterr().out
    assert "step 20: validation loss" in out, "a look at step 20"
    assert f"{summary['val_loss']:.4f} nats per character" in out.splitlines()[-1], "the last line tells the loss"


def test_the_script_counts_bytes(text, tmp_path):
    """`val_bpb` is bits per byte of the validation text, not per character: an é is two bytes."""
    text.write_text("été, déjà, là: né\n" * 100, encoding="utf-8")
    main(["--corpus", str(text), "--name", "bytes", *FLAGS])
    summary = json.loads((tmp_path / "out" / "bytes" / "summary.json").read_text("utf-8"))
    held_out = text.read_text("utf-8")[1620:]  # the last tenth of 1,800 characters
    expected = summary["val_loss"] / math.log(2) * len(held_out) / len(held_out.encode("utf-8"))
    assert summary["val_bpb"] == pytest.approx(expected), "the loss of a character is shared by its bytes"


def test_the_script_trains_on_the_training_text(text, tmp_path):
    """What only the validation text says cannot be known: on letters that never occurred the loss is above ln V."""
    text.write_text("abcd" * 450 + "wxyz" * 50, encoding="utf-8")
    main(["--corpus", str(text), "--name", "apart", *FLAGS])
    loss = json.loads((tmp_path / "out" / "apart" / "summary.json").read_text("utf-8"))["val_loss"]
    assert loss > math.log(8), f"a loss of {loss:.3f} on letters that are not in the training text: it was shown them"


def test_the_scripts_seed_reaches_weights_and_batches(text, tmp_path, monkeypatch):
    """--seed decides the first weights and which windows are drawn, and nothing else does."""
    runs = []
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        drawn = []

        def watched(*args, drawn=drawn):
            drawn.clear()  # of what was only tried out before the training
            for x, y in batches(*args):
                drawn.append(x.tolist())
                yield x, y

        monkeypatch.setattr(script, "batches", watched)
        # With such a rate no weight moves: the loss at the end is still that of the first weights.
        main(["--corpus", str(text), "--name", name, *FLAGS, "--seed", seed, "--lr", "1e-30"])
        runs.append((json.loads((tmp_path / "out" / name / "summary.json").read_text("utf-8"))["val_loss"], drawn))
    first, again, other = runs
    assert first == again, "the same seed gives another run"
    assert first[0] != other[0], "another seed begins with the same weights"
    assert first[1] != other[1], "another seed draws the same windows"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of runs with one finished run in it, "tiny": made once, to look at and to copy."""
    out = tmp_path_factory.mktemp("finished")
    file = out / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAGES_OUT", str(out))
        main(["--corpus", str(file), "--name", "tiny", *FLAGS, "--dropout", "0.1"])
    return out


@pytest.fixture
def earlier(finished, text, tmp_path):
    """A finished run "tiny": a function that says which of its files are no longer what they were."""
    folder = shutil.copytree(finished / "tiny", tmp_path / "out" / "tiny")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def changed() -> list[str]:
        now = {file.name: file.read_bytes() for file in folder.iterdir()}
        return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))

    assert {"model.pt", "metrics.jsonl", "train.bin", "val.bin"} <= before.keys() and not changed(), "no earlier run"
    return changed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "nowhere.txt"], "nowhere.txt"),
        (["--n-layer", "0"], "n_layer"),
        (["--n-head", "4"], "n_head"),
        (["--beta2", "1"], "beta2"),
        (["--lr", "-1"], "lr"),
        (["--lr", "1e30"], "lower --lr"),
        (["--steps", "many"], "steps"),
        (["--dropout", "1"], "dropout"),
        (["--micro-batch", "0"], "micro_batch"),
        (["--precision", "float16"], "float16"),
        (["--tokenizer", "word"], "word"),
        (["--tokenizer", "bpe", "--vocab-size", "100"], "vocab_size"),
        (["--preset", "huge"], "huge"),
        (["--board", "paper"], "paper"),
        (["--resume", "--name", "never-begun"], "never-begun"),
        (["--device", "abacus"], "abacus"),
        (["--name", "../up"], "name"),
        (["--n-hidden", "4"], "n-hidden"),
        (["--block-size", "250"], "use a longer text"),
        (["--batch-size", "1000000"], "use a longer text"),
    ],
    ids=lambda value: " ".join(value).strip("-") if isinstance(value, list) else "",
)
def test_the_script_refuses_bad_input(words, message, text, tmp_path, earlier):
    """A wrong value at the command line is one clear line; the record of an earlier run stays, and no new folder."""
    with pytest.raises(BadInput, match=message):
        main(["--corpus", str(text), "--name", "tiny", *FLAGS, *words])
    assert not earlier(), f"a run that was refused wrote over an earlier one's {earlier()}"
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["tiny"], "and it leaves a folder"


@pytest.mark.parametrize("length", [1, 10, 60])
def test_a_text_that_is_too_short_is_refused(length, text, earlier):
    """A text without one whole window on each side of the split is refused with the remedy, before any training."""
    text.write_text(TEXT[:length], encoding="utf-8")
    with pytest.raises(BadInput, match="use a longer text"):
        main(["--corpus", str(text), "--name", "tiny", *FLAGS, "--block-size", "8"])
    assert not earlier(), f"a text that cannot be used cost an earlier run its {earlier()}"


def test_ctrl_c_keeps_the_earlier_run(text, earlier, monkeypatch):
    """A second Ctrl-C, before any checkpoint, says that nothing was kept, and leaves an earlier run as it was."""

    def stopped(*args, **kwargs):
        yield from itertools.islice(train(*args, **kwargs), 15)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", stopped)
    with pytest.raises(KeyboardInterrupt, match="nothing of this run was kept"):
        main(["--corpus", str(text), "--name", "tiny", *FLAGS])
    assert not earlier(), f"a run that was stopped wrote over an earlier one's {earlier()}"
    text.write_text(TEXT[::-1], encoding="utf-8")  # the earlier run's own text is in another file
    with pytest.raises(KeyboardInterrupt, match="nothing of this run was kept"):
        main(["--corpus", str(text), "--name", "tiny", *FLAGS])
    assert earlier() == ["train.bin", "val.bin"], f"of another text: beside the token files, {earlier()} changed"
    monkeypatch.setattr(script, "train", train)
    main(["--resume", "--name", "tiny", "--steps", "41"])
    assert not {"train.bin", "val.bin"} & set(earlier()), "the earlier run, resumed, goes on with the other run's text"


def test_the_loss_is_the_mean_of_log_probs():
    """`log_probs` gives ln P of each target, one for each position; the loss is their mean with the sign changed."""
    model, x, y = small(), torch.randint(11, (3, 5)), torch.randint(11, (3, 5))
    expected = model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]
    found = log_probs(model, x, y)
    assert found.shape == (3, 5), f"log_probs has shape {tuple(found.shape)}, not [B, T]: one number for each target"
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-5, atol=1e-5,
        msg=lambda m: "log_probs is the logarithm of the softmax, at the target of each position\n" + m,
    )
    assert nll(model, x, y).item() == pytest.approx(-expected.mean().item(), abs=1e-5), "the loss is -mean(ln P)"


def test_bfloat16_is_for_the_products_only():
    """With bfloat16 the model's products are rougher, while the loss is taken in float32: it differs by under 1 %."""
    model = small(n_embd=64).float()
    x, y = torch.randint(11, (8, 5)), torch.randint(11, (8, 5))
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output))
    exact, rough = nll(model, x, y), nll(model, x, y, "bfloat16")
    assert seen[0].dtype == torch.float32, "float32 was asked for, and the products are in bfloat16: always autocast"
    assert seen[1].dtype == torch.bfloat16, "bfloat16 was asked for, and the products are in float32: never autocast"
    assert 0 < abs(rough.item() / exact.item() - 1) < 0.01, f"{rough.item():.4f} against {exact.item():.4f} in float32"
    expected = -seen[1].double().log_softmax(-1).gather(-1, y[..., None]).mean().item()
    assert rough.item() == pytest.approx(expected, abs=1e-6), "softmax, logarithm and mean in bfloat16 lose the loss"


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_recipes_precision_is_used(precision):
    """Training and evaluation run in the precision that they are told, and weights and gradients stay in float32."""
    model, data, seen = small().float(), torch.randint(11, (60,)), []
    model.head.register_forward_hook(lambda module, args, output: seen.append(str(output.dtype)))
    gradient(model, data[:20].view(4, 5), data[20:40].view(4, 5), recipe(precision=precision))
    assert set(seen) == {f"torch.{precision}"}, f"a recipe with {precision} is trained in {seen[0]}"
    seen.clear()
    evaluate(model, data, precision=precision)
    assert set(seen) == {f"torch.{precision}"}, f"a run in {precision} is evaluated in {seen[0]}"
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}, "AdamW needs its gradients in float32"


def test_the_precision_is_set_for_the_batchs_device(monkeypatch):
    """bfloat16 is asked for on the device that the batch is on, and not always on the CPU."""
    asked = []

    def autocast(device, *args, **kwargs):
        asked.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    x = torch.zeros(2, 5, dtype=torch.long, device="meta")
    log_probs(lambda idx: torch.zeros(*idx.shape, 11, device=idx.device), x, x, "bfloat16")
    assert asked == ["meta"], f"the batch is on meta, and bfloat16 was asked for on {asked}"


def test_evaluation_drops_nothing():
    """Dropout is off while a model is evaluated: two scores are equal, and those of the model without dropout."""
    model, plain = small(dropout=0.5), small()
    plain.load_state_dict(model.state_dict())
    data = torch.randint(11, (60,))
    first, second = evaluate(model, data), evaluate(model, data)
    assert first == second, "two evaluations differ: units are dropped while the model is scored"
    assert first == evaluate(plain, data), "evaluation must see the whole model"


@pytest.mark.parametrize("micro_batch", [100, 12, 6, 5, 1])
def test_accumulation_is_exact(micro_batch):
    """The gradient taken in micro-batches is the gradient of the whole batch, also when the last one is smaller."""
    model = small(n_layer=2)
    x, y = torch.randint(11, (12, 5)), torch.randint(11, (12, 5))
    expected_loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # all at once
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))
    rows = []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    loss = gradient(model, x, y, recipe(batch_size=12, micro_batch=micro_batch))
    assert sum(rows) == 12 and max(rows) == min(micro_batch, 12), f"12 windows are taken as {rows}, not {micro_batch}"
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5), "the loss is the mean over the whole batch"
    for (name, p), g in zip(model.named_parameters(), expected, strict=True):
        error = (p.grad - g).abs().max().item()
        assert error < 1e-6, f"the gradient of {name} is off by {error:.1e}: each part counts by its share of the batch"


@pytest.mark.parametrize("micro_batch", [4, 3, 1])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_the_whole_gradient_is_clipped(micro_batch, share):
    """A gradient longer than `clip` is scaled down to it, whole, before the step; a shorter one is left alone."""
    model, data = small(), torch.randint(11, (60,))
    x, y = next(batches(data, 5, 4, seed=5))
    parameters = list(model.parameters())
    whole = torch.autograd.grad(F.cross_entropy(model(x).flatten(0, 1), y.flatten()), parameters)
    length = math.sqrt(sum(g.square().sum().item() for g in whole))
    before = [p.detach().clone() for p in parameters]
    config = recipe(steps=1, micro_batch=micro_batch, clip=share * length)
    descent = torch.optim.SGD(parameters, lr=0.1)  # plain: the step is the rate times the gradient
    list(train(model, iter([(x, y)]), config, descent))
    moved = math.sqrt(sum((p - b).square().sum().item() for p, b in zip(parameters, before, strict=True)))
    assert moved == pytest.approx(0.1 * min(1, share) * length, rel=1e-4), (
        f"a gradient of length {length:.3f}, clipped at {share * length:.3f}, made a step of {moved / 0.1:.3f} times lr"
    )
    for p, b, g in zip(parameters, before, whole, strict=True):
        torch.testing.assert_close(
            p, b - 0.1 * min(1, share) * g, rtol=1e-4, atol=1e-6,
            msg=lambda m: f"clip once, after the last micro-batch, all parameters by the same factor\n{m}",
        )


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_the_rate_belongs_to_the_step(micro_batch):
    """The schedule moves once for each optimiser step, however many micro-batches it takes."""
    rates = []

    class Spy(torch.optim.SGD):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    model, config = small(), recipe(steps=6, warmup=2, micro_batch=micro_batch)
    stream = batches(torch.randint(11, (60,)), 5, config.batch_size, config.seed)
    list(train(model, stream, config, Spy(model.parameters(), lr=0.08)))
    assert len(rates) == 6, f"{len(rates)} optimiser steps for 6: one for each, after its last micro-batch"
    for step, ([rate], expected) in enumerate(zip(rates, [0.04, 0.08, 0.08, 0.06, 0.04, 0.02], strict=True), 1):
        assert rate == pytest.approx(expected), f"step {step} has rate {rate:.4f}, not {expected:.4f}"


def dropped(model) -> list:
    """A list that fills with the units that the model's first dropout zeroes, one tensor for each call."""
    found = []
    model.dropout.register_forward_hook(lambda module, args, output: found.append(output == 0))
    return found


def test_each_step_drops_units_of_its_own():
    """Dropout differs from step to step and from seed to seed, and a run that starts at step k drops what k drops."""
    data = torch.randint(11, (200,))

    def units(start=0, seed=5):
        model, config = small(dropout=0.5), recipe(steps=6, seed=seed)
        found = dropped(model)
        torch.rand(seed)  # whatever was drawn before
        stream = batches(data, 5, config.batch_size, config.seed, start)
        list(train(model, stream, config, make_optimizer(model, config), start))
        return [mask.tolist() for mask in found]

    whole = units()
    assert len({str(mask) for mask in whole}) == 6, "two steps drop the same units: chance must go on from step to step"
    assert units(start=2) == whole[2:], "a run that is resumed at step 2 drops other units than one that never stopped"
    assert not [a for a, b in zip(whole, units(seed=6), strict=True) if a == b], "two seeds drop the same units"


def test_training_starts_anywhere_and_stops_after_a_step():
    """A run can begin at any step, with that step's rate, and when asked to stop it finishes its step."""
    data = torch.randint(11, (200,))
    model, config = small(), recipe(steps=12, warmup=2)
    optimizer, stream = make_optimizer(model, config), batches(data, 5, 4, seed=5)
    asked = iter([False, False, True])
    first = list(train(model, stream, config, optimizer, stop=lambda: next(asked)))
    assert [step for step, _ in first] == [1, 2, 3], "asked to stop during step 3, a run ends after step 3"
    rest = list(train(model, stream, config, optimizer, start=3))
    torch.manual_seed(0)
    torch.randint(11, (200,))
    again = small()
    whole = list(train(again, batches(data, 5, 4, seed=5), config, make_optimizer(again, config)))
    assert first + rest == whole, "3 steps and 9 steps are not 12 steps: the rates differ, or a step is left out"


@pytest.fixture
def run(text, tmp_path):
    """A function: run the script on the text under a name, with flags of the test's own -> the folder of the run."""

    def start(name, *words, code=None):
        found = main(["--corpus", str(text), *FLAGS, "--name", name, *words])
        assert found == code, f"the script ends with exit code {found}, not {code}"
        return tmp_path / "out" / name

    return start


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the seconds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(a, b, path="checkpoint"):
    """Fail where two checkpoints differ in a single bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{path} holds {sorted(a)} in one run and {sorted(b)} in the other"
        for key in a.keys() - {"seconds", "args"}:
            same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{path} has {len(a)} parts in one run and {len(b)} in the other"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{path} differs from that of the run that never stopped"
    else:
        assert a == b, f"{path} is {a!r} instead of {b!r}"


def assert_same_run(folder: Path, whole: Path):
    """Same weights, optimiser and metrics, to the last bit."""
    differs = [a["step"] for a, b in itertools.zip_longest(metrics(whole), metrics(folder)) if a != b]
    assert not differs, f"at steps {differs} the record differs from that of the run that never stopped"
    same(load(folder / "model.pt")[2], load(whole / "model.pt")[2])
    losses = [json.loads((place / "summary.json").read_text("utf-8"))["val_loss"] for place in (folder, whole)]
    assert losses[0] == losses[1], f"the two runs end with {losses[0]} and {losses[1]}"


def during(monkeypatch, step: int, event):
    """Let `event()` happen while the script takes `step`."""
    waiting = [event]

    def share(at, config):
        if at == step - 1 and waiting:
            waiting.pop()()
        return schedule(at, config)

    monkeypatch.setattr(script, "schedule", share)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_run_itself(precision, run, monkeypatch):
    """k steps, Ctrl-C and the rest with --resume are all steps at once, bit for bit, with dropout and across passes."""
    words = ["--precision", precision, "--dropout", "0.2", "--micro-batch", "20"]
    whole = run("whole", *words)
    assert load(whole / "model.pt")[2]["step"] == 40, "the last checkpoint is of the last step"
    for first, second in ((7, 2 * PASS), (PASS - 1, PASS + 1)):  # the last step of a pass, and the first of the next
        during(monkeypatch, first, ctrl_c)
        folder = run("parts", *words, code=130)
        step = load(folder / "model.pt")[2]["step"]
        assert step == first, f"Ctrl-C in step {first} ends the run after it, with a checkpoint of it, not of {step}"
        during(monkeypatch, second, ctrl_c)
        assert main(["--resume", "--name", "parts"]) == 130, "a resumed run can be stopped as well"
        assert load(folder / "model.pt")[2]["step"] == second, "a resumed run that is stopped keeps a checkpoint too"
        assert main(["--resume", "--name", "parts"]) is None, "a run that ends by itself ends without an exit code"
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
    assert metrics(folder)[-1]["step"] == 30, "once there is a checkpoint, metrics are written as they come"
    main(["--resume", "--name", "parts"])
    assert_same_run(folder, whole)


def test_looking_does_not_change_the_run(run):
    """How often a run is scored and writes a sample changes nothing about it: the same weights, with dropout."""
    often, seldom = run("often", "--dropout", "0.2", "--eval-every", "9"), run("seldom", "--dropout", "0.2")
    looks = [row["step"] for row in metrics(often) if "val_loss" in row]
    assert looks == [9, 18, 27, 36, 40], f"looks at steps {looks}: every 9 steps, and at the end"
    same(load(often / "model.pt")[2], load(seldom / "model.pt")[2], "looked at more often: checkpoint")


def test_a_look_draws_from_a_generator_of_its_own():
    """A look takes none of the run's random numbers, and each look writes from the same ones."""
    model, text, written = small(), torch.randint(11, (60,)), []
    tokenizer = SimpleNamespace(decode=written.append)
    data = SimpleNamespace(train=text, val=text, nats_per_char=float, tokenizer=tokenizer)
    before = torch.get_rng_state()
    for step in (1, 2):
        script.look(step, model, data, recipe(), SimpleNamespace(metrics=lambda *args, **kwargs: None))
    assert torch.equal(torch.get_rng_state(), before), "a sample was drawn with the random numbers of the run"
    assert written[0] == written[1], "two looks at the same model write two texts: seed the generator anew for each"


def test_a_resumed_run_keeps_its_text(run, monkeypatch):
    """A run that fell back on another text goes on with that one, also when its first choice is there again."""
    asked = []

    def only_docs(name):
        asked.append(name)
        return corpus.Corpus("python-docs", TEXT)

    monkeypatch.setattr(corpus, "load", only_docs)
    during(monkeypatch, 3, ctrl_c)
    assert main([*FLAGS, "--name", "docs"]) == 130, "Ctrl-C ends a run with exit code 130"
    assert main(["--resume", "--name", "docs", "--steps", "5"]) is None, "the run goes on to its end"
    assert asked == [None, "python-docs"], "resumed, it asked for the default corpus, which may be another one by now"


def test_a_resumed_run_keeps_its_flags(text, earlier):
    """A flag that differs from the run's own is refused by its name, and nothing is written."""
    others = [["--n-layer", "3"], ["--n-embd", "24"], ["--block-size", "16"], ["--dropout", "0.3"], ["--lr", "0.1"]]
    others += [["--tokenizer", "bpe"], ["--vocab-size", "300"], ["--preset", "long"], ["--corpus", str(text)]]
    others += [["--batch-size", "16"], ["--micro-batch", "8"], ["--seed", "1"], ["--precision", "float32"]]
    for flag, value in others:
        told = "nothing: it was accepted"
        try:
            main(["--resume", "--name", "tiny", "--steps", "50", flag, value])
        except BadInput as error:
            told = str(error)
        assert flag in told, f"resumed with {flag} {value}, which is not the run's own, the script said {told}"
        assert not earlier(), f"a run that was not resumed changed its {earlier()}"


def watch_board(monkeypatch) -> list:
    """A list that fills with what the board "tensorboard" is shown."""
    shown = []

    class Board:
        def show(self, step, numbers):
            shown.append((step, numbers))

        def close(self):
            pass

    monkeypatch.setattr(boards, "start", lambda kind, *about: {None: lambda: None, "tensorboard": Board}[kind]())
    return shown


def test_a_resumed_run_may_be_told_anew(earlier, tmp_path, monkeypatch):
    """Steps, looks, device and board may be given anew, and a flag that says what the run does already is no other."""
    shown = watch_board(monkeypatch)
    words = ["--steps", "44", "--eval-every", "42", "--device", "cpu", "--board", "tensorboard"]
    main(["--resume", "--name", "tiny", *words, "--n-layer", "1", "--lr", "0.008", "--tokenizer", "char"])
    folder = tmp_path / "out" / "tiny"
    assert load(folder / "model.pt")[2]["step"] == 44, "a finished run can be made longer"
    looks = [row["step"] for row in metrics(folder) if "val_loss" in row]
    assert looks == [20, 40, 42, 44], f"looks at steps {looks}: --eval-every has no effect"
    assert [step for step, _ in shown] == [42, 44], "a board that is given anew shows the steps from there on"


def test_the_time_of_all_sessions_counts(earlier, tmp_path):
    """A run that was resumed says how long it took in all, and not since it was resumed."""
    path = tmp_path / "out" / "tiny" / "model.pt"
    torch.save(torch.load(path, weights_only=True) | {"seconds": 3600.0}, path)
    main(["--resume", "--name", "tiny", "--steps", "42"])
    seconds = json.loads((path.parent / "summary.json").read_text("utf-8"))["seconds"]
    assert 3600 < seconds < 4200, f"after an hour and two steps the run says {seconds:.0f} s"


def test_a_finished_run_says_so(earlier):
    """--resume of a run that has done its steps says that it is finished and how to go on, and changes nothing."""
    with pytest.raises(BadInput, match="finished") as caught:
        main(["--resume", "--name", "tiny"])
    assert "--steps" in str(caught.value), "how can it go on?"
    assert not earlier(), f"a finished run changed its {earlier()}"


def test_metrics_reach_the_board(run, monkeypatch):
    """With --board every number of metrics.jsonl is shown there too."""
    shown = watch_board(monkeypatch)
    folder = run("board", "--board", "tensorboard")
    rows = [(row.pop("step"), row) for row in metrics(folder)]
    assert rows and shown == rows, f"the board was shown {shown}, the record has {rows}"
    shown.clear()
    run("plain")
    assert not shown, "a board that nobody asked for"


def some_steps(model, stop):
    """Plain descent, where rounding stays rounding: AdamW would make a step of the noise in a gradient that is 0."""
    config = recipe(steps=6, batch_size=8, micro_batch=2, clip=0.5)
    data = torch.randint(11, (300,), generator=torch.Generator().manual_seed(1))
    descent = torch.optim.SGD(model.parameters(), lr=0.3)
    return list(train(model, batches(data, 5, 8, seed=5), config, descent, stop=stop))


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
    engine, alone = DistributedDataParallel(model), []
    no_sync = engine.no_sync
    engine.no_sync = lambda: (alone.append(True), no_sync())[1]
    losses = some_steps(engine, stop=lambda: next(asked))
    found = {"losses": losses, "rows": rows, "model": model.state_dict(), "alone": len(alone)}
    for name, start in (("whole", 0), ("half", 3)):  # all of a run with dropout, and its second half
        model, config = small(dropout=0.5), recipe(steps=6)
        found[name] = dropped(model)
        stream = batches(torch.arange(11).repeat(9), 5, 4, 5, start)
        list(train(DistributedDataParallel(model), stream, config, make_optimizer(model, config), start))
    dist.destroy_process_group()

    found["saves"], save = 0, script.save

    def count(*args, **kwargs):
        found["saves"] += 1
        save(*args, **kwargs)

    script.save = count
    with pytest.raises(BadInput, match="batch_size"):
        main([*flags, "--name", "odd", "--batch-size", "3"])
    assert not (folder / "odd").exists(), "a run that was refused leaves a folder"
    main([*flags, "--name", "two"])
    torch.save(found, folder / f"{rank}.pt")


def vacant_port() -> int:
    """A port that nobody uses, below those that the system hands out: one of its own could be taken before we bind."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of two processes found, and the folder of their run "two"."""
    folder = tmp_path_factory.mktemp("pair")
    file = folder / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    # Forked from a server that has imported torch, where there is fork: the import takes longer than the test.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["torch", "torch._dynamo"])  # the latter comes with the first optimiser
    port = vacant_port()
    words = ["--corpus", str(file), *FLAGS, "--precision", "float32", "--steps", "12", "--eval-every", "5"]
    both = [context.Process(target=process, args=(rank, port, folder, words)) for rank in range(2)]
    for one in both:
        one.start()
    try:
        deadline = time.monotonic() + 90
        while any(one.is_alive() for one in both) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(one.exitcode for one in both):  # the other would wait for it
                break
        codes = [one.exitcode for one in both]
    finally:
        for one in both:
            one.kill()
            one.join()
    assert codes == [0, 0], f"of two processes one failed or hangs ({codes}): what it said stands above"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], folder


def test_two_processes_are_one(pair):
    """Two processes, each with half of every batch, do what one does with the whole batch, to 1e-6."""
    torch.manual_seed(0)
    model, asked = small(), iter([False] * 3 + [True])
    losses = some_steps(model, stop=lambda: next(asked))
    assert [len(found["losses"]) for found in pair[0]] == [4, 4], "when one process is asked to stop, all stop together"
    first, second = (found["model"] for found in pair[0])
    apart = [name for name in first if not torch.equal(first[name], second[name])]
    assert not apart, f"{apart} differ between the processes: they have to exchange their gradients before each step"
    for rank, found in enumerate(pair[0]):
        assert found["rows"] == [2] * 8, (
            f"process {rank} takes {found['rows']} windows at a time: of 8 windows 4 are its own, in two micro-batches"
        )
        assert found["alone"] == 4, "gradients are exchanged with each micro-batch: once a step is enough"
        for (step, loss), (_, expected) in zip(found["losses"], losses, strict=True):
            assert abs(loss - expected) < 1e-5, (
                f"process {rank} says {loss:.4f} in step {step}, one process alone {expected:.4f}: the loss is the "
                "mean over all processes, each with windows of its own"
            )
        for name, p in model.state_dict().items():
            error = (found["model"][name] - p).abs().max().item()
            assert error < 1e-6, (
                f"process {rank}: {name} is off by {error:.1e}: each process counts by its share of the batch"
            )


def test_two_processes_drop_different_units(pair):
    """Each process drops units of its own, and when a run is resumed each drops again what it would have dropped."""
    first, second = pair[0]
    for step, (a, b) in enumerate(zip(first["whole"], second["whole"], strict=True)):
        assert not torch.equal(a, b), f"in step {step} both processes drop the same units: half of the chance is lost"
    for rank, found in enumerate(pair[0]):
        for step, (a, b) in enumerate(zip(found["half"], found["whole"][3:], strict=True), 3):
            assert torch.equal(a, b), (
                f"process {rank}, resumed at step 3, drops other units in step {step} than a run that never stopped"
            )


def test_one_process_keeps_the_record(pair, run):
    """The script's run in two processes is the run in one: one of them writes, and what it saves can be read by one."""
    (first, second), folder = pair
    assert second["saves"] == 0, "every process writes the checkpoint: they overwrite one another's file"
    assert first["saves"] == 3, f"{first['saves']} checkpoints for looks at steps 5, 10 and 12"
    one = run("one", "--precision", "float32", "--steps", "12", "--eval-every", "5")
    rows, expected = metrics(folder / "two"), metrics(one)
    assert [row["step"] for row in rows] == [row["step"] for row in expected], "one process writes the record, not both"
    for row, should in zip(rows, expected, strict=True):
        assert row == pytest.approx(should, abs=1e-4), "the script's run in two processes is not the run in one"
    assert not [name for name in load(folder / "two" / "model.pt")[2]["model"] if name.startswith("module.")], (
        "the checkpoint is of the model, not of its wrapper, so that one process can read it"
    )


def default_sigint():
    """Started in the background (`nohup uv run pytest &`), the tests' own children would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_mid_run(text, tmp_path):
    """Ctrl-C ends the script with exit code 130, one line that says how to go on, and a checkpoint to go on from."""
    if os.name == "nt":
        pytest.skip("Windows cannot send Ctrl-C to one process")
    words = [sys.executable, "train.py", "--corpus", str(text), *FLAGS, "--name", "cut"]
    words += ["--steps", "1000000", "--eval-every", "10"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("STAGES_TRACEBACK", None)
    child = subprocess.Popen(
        words, cwd=Path(script.__file__).parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=default_sigint,
    )
    try:
        saved, deadline = tmp_path / "out" / "cut" / "model.pt", time.monotonic() + 60
        while not saved.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=40)[0].decode("utf-8")
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130, f"exit code {child.returncode} after Ctrl-C\n{said}"
    assert "Traceback" not in said, f"Ctrl-C is no error\n{said}"
    assert "train.py --resume --name cut" in said.splitlines()[-1], f"the last line says how to go on\n{said}"
    step = load(saved)[2]["step"]
    assert step >= 10, "the checkpoint is of the step that Ctrl-C came in"
    assert main(["--resume", "--name", "cut", "--steps", str(step + 3)]) is None, "the run goes on to its end"
    steps = json.loads((saved.parent / "summary.json").read_text("utf-8"))["steps"]
    assert steps == step + 3, f"resumed at step {step} for 3 more, the run ends at {steps}"


def test_what_a_run_says(run, capsys):
    """A run shows its text, its size, a sample at each look and, in the last line, the loss in nats per character."""
    folder = run("tiny", "--steps", "6", "--eval-every", "3")
    out = capsys.readouterr().out
    loss = json.loads((folder / "summary.json").read_text("utf-8"))["val_loss"]
    assert "1,800 training and 200 validation tokens" in out, "how much text is there?"
    assert out.count("nats per character") == 3 and "step 3: validation loss" in out, "a look at step 3 and at the end"
    assert f"{loss:.4f} nats per character" in out.splitlines()[-1], "the last line tells the loss"
    rates = [row["lr"] for row in metrics(run("more", "--steps", "10")) if "lr" in row]
    assert rates == pytest.approx([0.0016]), f"step 10 of 10 has a fifth of the rate 0.008, and {rates} was logged"


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
    write_text(["--name", kind, "--prompt", "the", "--length", "5", "--temperature", "0", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the"), "a run on other tokens cannot be sampled from"


def test_tokens_are_stored_in_files(finished):
    """A run keeps its text as two files of 16-bit tokens."""
    sizes = [(finished / "tiny" / f"{part}.bin").stat().st_size for part in ("train", "val")]
    assert sizes == [2 * 1800, 2 * 200], f"the files have {sizes} bytes: 1,800 and 200 tokens of two bytes"


def test_the_compiled_model_is_only_an_engine(run, monkeypatch):
    """With --compile the steps are taken by the compiled model; scores, samples and the checkpoint are the model's."""
    calls = []

    class Compiled(nn.Module):
        """Stands for what torch.compile returns, which takes half a minute to make."""

        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)

        def forward(self, idx):
            calls.append(tuple(idx.shape))
            return self._orig_mod(idx)

    monkeypatch.setattr(torch, "compile", Compiled)
    words = ["--micro-batch", "16"]
    saved = run("compiled", "--compile", *words) / "model.pt"
    inside = [name for name in torch.load(saved, weights_only=True)["model"] if name.startswith("_orig_mod.")]
    assert not inside, f"the checkpoint is of the compiled model, which calls its weights {inside}"
    same(load(saved)[2], load(run("plain", *words) / "model.pt")[2], "compiled: checkpoint")
    assert calls == [(16, 4)] * 80, "40 steps of two micro-batches are taken by the compiled model, and nothing else"


@pytest.mark.parametrize("part", ["nll", "evaluate"])
def test_diverged_training_keeps_what_was_saved(part, run, tmp_path, monkeypatch):
    """When a loss is nan, in training or at a look, the run ends by name and keeps its last good checkpoint."""

    def diverge():
        found = torch.tensor(math.nan, requires_grad=True) * 1 if part == "nll" else math.nan
        monkeypatch.setattr(script, part, lambda *args, **kwargs: found)

    during(monkeypatch, 25, diverge)
    with pytest.raises(BadInput, match="lower --lr"):
        run("wild", "--eval-every", "10")
    folder = tmp_path / "out" / "wild"
    model, _, state = load(folder / "model.pt")
    assert state["step"] == 20, f"the checkpoint is of step {state['step']}, the last one that was good is of step 20"
    assert all(p.isfinite().all() for p in model.parameters()), "nan was saved"
    assert not (folder / "summary.json").exists(), "a run that diverged has no result"


RAN = []


class Bomb:
    """Unpickling this calls a function: what a hostile checkpoint does."""

    def __reduce__(self):
        return RAN.append, ("boom",)


@pytest.mark.parametrize(
    "damage", ["cut short", "random bytes", "empty", "code", "optimizer", "step", "seconds", "args"]
)
def test_a_damaged_checkpoint_is_not_resumed(damage, earlier, tmp_path):
    """A checkpoint that is damaged, incomplete or holds code is refused in one line, and the record stays."""
    path = tmp_path / "out" / "tiny" / "model.pt"
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    content = {"cut short": whole[:len(whole) // 2], "random bytes": os.urandom(1000), "empty": b""}
    if damage in content:
        path.write_bytes(content[damage])
    else:
        rest = {key: value for key, value in state.items() if key != damage}
        torch.save(rest | {"args": Bomb()} if damage == "code" else rest, path)
    for program, words in ((main, ["--resume", "--steps", "50"]), (write_text, [])):
        with pytest.raises(BadInput, match="damaged") as caught:
            program(["--name", "tiny", *words])
        assert "\n" not in str(caught.value), f"more than one line: {caught.value}"
    assert RAN == [], "opening a stranger's file ran the code in it: load weights only"
    assert earlier() == ["model.pt"], "the record of the run was changed"


@pytest.mark.parametrize("change", ["no groups", "one group", "another group"])
def test_an_optimizer_of_another_model_is_not_resumed(change, earlier, tmp_path):
    """A checkpoint whose optimiser does not fit its model is refused in one line, and the record stays."""
    path = tmp_path / "out" / "tiny" / "model.pt"
    state = torch.load(path, weights_only=True)
    matrices, vectors = state["optimizer"]["param_groups"]
    groups = {"one group": [matrices], "another group": [matrices | {"params": [0]}, vectors]}
    optimizer = {} if change == "no groups" else state["optimizer"] | {"param_groups": groups[change]}
    torch.save(state | {"optimizer": optimizer}, path)
    with pytest.raises(BadInput, match="damaged"):
        main(["--resume", "--name", "tiny", "--steps", "50"])
    assert earlier() == ["model.pt"], "the record of the run was changed"


def test_a_full_disk_at_the_first_checkpoint_keeps_the_earlier_run(text, earlier, monkeypatch):
    """When not even the first checkpoint can be written, the earlier run of that name stays whole, record and all."""

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        main(["--corpus", str(text), "--name", "tiny", *FLAGS])
    assert not earlier(), f"without a checkpoint of its own, a run wrote over an earlier one's {earlier()}"


def test_a_full_disk_keeps_what_was_saved(run, tmp_path, monkeypatch):
    """When the disk fills up in mid-run, the run ends with an error, and the checkpoint before it can be resumed."""
    saves, replace = [], os.replace

    def full_disk(half, file):
        if Path(file).name == "model.pt":
            saves.append(file)
            if len(saves) == 2:
                raise OSError(28, "No space left on device")
        replace(half, file)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run("full", "--eval-every", "10")
    monkeypatch.undo()
    folder = tmp_path / "out" / "full"
    assert load(folder / "model.pt")[2]["step"] == 10, "write to another file and rename it: the old one stays"
    assert not list(folder.glob("*.part*")), "half a checkpoint fills the disk for nothing"
