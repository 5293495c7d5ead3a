"""Checkpoints of the training: the loss, the loop against AdamW written out in numpy, honest evaluation, the script."""

import itertools
import json
import math

from shared.errors import BadInput

import numpy as np
import pytest
import torch
from torch import nn

from data import batches
from model import GPT, ModelConfig
from sample import load
from train import TrainConfig, evaluate, main, nll, train


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny() -> GPT:
    return GPT(ModelConfig(vocab_size=11, block_size=5, n_embd=4, n_head=2, n_layer=1))


def small() -> GPT:
    """A float64 model whose weights are far from their start, so that no two characters score alike."""
    model = tiny().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def recipe(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "batch_size": 4, "lr": 0.01, "weight_decay": 0.1, "seed": 5} | changes)


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
    loss = evaluate(model, data, rows=rows)
    expected = sum(surprise) / (length - 1)
    assert loss == pytest.approx(expected, abs=1e-12), (
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


def test_the_loop_is_adamw():
    """Step by step the loop is AdamW: fresh gradients, decay beside the step, a rate that falls in a line."""
    config = recipe(steps=30, lr=0.1)
    model, data = Line(), torch.randint(5, (40,))
    expected, losses = adamw(model.table.detach().numpy(), data, config)
    seen = list(train(model, data, config))
    assert [step for step, _ in seen] == list(range(1, 31)), "one (step, loss) after each step, counted from 1"
    for (step, loss), should in zip(seen, losses, strict=True):
        assert loss == pytest.approx(should, abs=1e-9), (
            f"step {step}: loss {loss:.6f} instead of {should:.6f}: gradients of earlier steps are still in .grad, or "
            "the step, the decay or the learning rate is not AdamW's"
        )
    error = np.abs(model.table.detach().numpy() - expected).max()
    assert error < 1e-9, f"after 30 steps the weights are off by {error:.1e}"


def test_the_learning_rate_falls_to_nothing():
    """The first steps are long and the last ones short, so that the noise of the batches averages out."""
    model, data = Line(), torch.randint(5, (400,))
    moved, before = [], model.table.detach().clone()
    for _ in train(model, data, recipe(steps=100, batch_size=16, weight_decay=0.0)):
        moved.append((model.table - before).abs().max().item())
        before = model.table.detach().clone()
    assert moved[0] == pytest.approx(0.01, rel=1e-3), "Adam's first step is the learning rate, whatever the gradient"
    assert moved[-1] < 0.0005, f"the last step still moves a weight by {moved[-1]:.4f}: the rate does not fall to 0"


def test_training_learns_a_small_text_by_heart():
    """A text with one answer to every context is learned until almost nothing about it is left to say."""
    data = torch.arange(11).repeat(20)
    model = GPT(ModelConfig(vocab_size=11, block_size=5, n_embd=16, n_head=2, n_layer=2))
    losses = [loss for _, loss in train(model, data, recipe(steps=100, batch_size=16, weight_decay=0.0))]
    assert abs(losses[0] - math.log(11)) < 0.1, "it starts at ln V"
    assert losses[-1] < 0.05, f"the loss is still {losses[-1]:.3f}: the model cannot even learn by heart"
    assert evaluate(model, data) < 0.05, "the evaluation does not see what the training learned"


def test_training_never_sees_the_other_texts_windows():
    """Characters that only the validation text has keep their first embedding: nothing of it reached the training."""
    data = torch.randint(8, (200,))  # 8, 9 and 10 never occur
    model = tiny()
    before = model.tok_emb.weight.detach().clone()
    for _ in train(model, data, recipe(weight_decay=0.0)):
        pass
    changed = (model.tok_emb.weight != before).any(dim=1).tolist()
    assert changed == [True] * 8 + [False] * 3, "only characters of the training text may move"


def test_the_same_seed_repeats_a_run():
    """Same seed, same losses, to the last bit; another seed draws other batches."""

    def losses(seed):
        torch.manual_seed(1)
        model = tiny()
        return [loss for _, loss in train(model, torch.arange(11).repeat(5), recipe(seed=seed))]

    assert losses(5) == losses(5), "a run must repeat, or no number in a README can be checked"
    assert losses(5) != losses(6), "the seed does not reach the batches"


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("batch_size", -1), ("eval_every", 0), ("lr", 0.0), ("lr", -1.0),
                         ("lr", math.nan), ("weight_decay", -0.1), ("weight_decay", math.nan)],
)
def test_a_recipe_that_cannot_run_is_refused(field, value):
    """Steps, batch sizes and rates that make no sense are refused by name before any work is done."""
    with pytest.raises(BadInput, match=field):
        TrainConfig(**{field: value})


TEXT = "the cat sat on the mat and the rat sat on the cat\n" * 40
FLAGS = ["--steps", "40", "--eval-every", "20", "--batch-size", "32", "--block-size", "4", "--n-embd", "6"]
FLAGS += ["--n-head", "2", "--n-layer", "1", "--device", "cpu"]


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
    assert [row["step"] for row in rows] == [20, 40], "the validation loss is taken every eval_every steps and last"
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < math.log(len(set(TEXT))), "the loss falls"

    model, vocab = load(folder / "model.pt")
    held_out = vocab.encode(TEXT[1800:])  # the last tenth of 2,000 characters
    assert vocab.chars == "".join(sorted(set(TEXT))), "the vocabulary is saved with the model"
    assert summary["val_loss"] == pytest.approx(evaluate(model, held_out), abs=1e-6), (
        "the reported loss is not the saved model's on the last tenth of the text"
    )
    V = len(vocab)
    block = 4 * (6 * 6 + 6) + (6 * 24 + 24) + (24 * 6 + 6) + 2 * 12  # attention, feed-forward, norms
    assert summary["params"] == V * 6 + 4 * 6 + block + 12 + 6 * V + V, "the parameters of the model that was trained"
    assert summary["tokens"] == 40 * 32 * 4 and summary["steps"] == 40, "every position of a window predicts a token"
    assert summary["val_bpb"] == pytest.approx(summary["val_loss"] / math.log(2)), "one byte per character here"
    assert not list(folder.glob("*.part*")), "half-written files are left behind"
    out = capsys.readouterr().out
    assert f"{summary['val_loss']:.4f} nats per character" in out, "the last line tells the loss"


def test_the_script_trains_on_the_training_text(text, tmp_path):
    """What only the validation text says cannot be known: on letters that never occurred the loss is above ln V."""
    text.write_text("abcd" * 450 + "wxyz" * 50, encoding="utf-8")
    main(["--corpus", str(text), "--name", "apart", *FLAGS])
    loss = json.loads((tmp_path / "out" / "apart" / "summary.json").read_text("utf-8"))["val_loss"]
    assert loss > math.log(8), f"a loss of {loss:.3f} on letters that are not in the training text: it was shown them"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "nowhere.txt"], "no corpus or file"),
        (["--n-layer", "0"], "n_layer is 0"),
        (["--n-head", "4"], "n_embd 6 does not split into n_head 4"),
        (["--lr", "-1"], "lr -1.0"),
        (["--steps", "many"], "invalid int value"),
        (["--norm", "batch"], "invalid choice: 'batch'"),
        (["--device", "abacus"], "unknown device"),
        (["--name", "../up"], "run name"),
        (["--n-hidden", "4"], "unrecognized arguments"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_the_script_refuses_bad_input(words, message, text, tmp_path):
    """A wrong value at the command line is one clear line, and nothing is written."""
    with pytest.raises(BadInput, match=message):
        main(["--corpus", str(text), *FLAGS, *words])
    assert not (tmp_path / "out").exists(), "a run that never began must not leave a folder"


@pytest.mark.parametrize("length", [1, 10, 60])
def test_a_text_that_is_too_short_is_refused(length, text, tmp_path):
    """A text without one whole window on each side of the split is refused with the remedy, before any training."""
    text.write_text(TEXT[:length], encoding="utf-8")
    with pytest.raises(BadInput, match="use a longer text"):
        main(["--corpus", str(text), *FLAGS, "--block-size", "8"])
    assert not (tmp_path / "out").exists(), "a run that cannot be scored must not begin"
