"""Checkpoints of the training: the loss, the loop against AdamW written out in numpy, honest evaluation, the script."""

import itertools
import json
import math
from types import SimpleNamespace

from shared.errors import BadInput

import numpy as np
import pytest
import torch
from torch import nn

import train as script
from checkpoint import load
from data import batches
from model import MLP, ModelConfig
from train import TrainConfig, evaluate, main, make_optimizer, nll, schedule, train


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small() -> MLP:
    """A float64 model whose weights are far from their start, so that no two characters score alike."""
    model = MLP(ModelConfig(vocab_size=11, block_size=3, n_embd=4, n_hidden=7)).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def recipe(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "batch_size": 4, "lr": 0.01, "weight_decay": 0.1, "seed": 5} | changes)


def fit(model, data, config: TrainConfig) -> list[float]:
    """The losses of all steps on the text `data`."""
    stream = batches(data, model.config.block_size, config.batch_size, config.seed)
    return [loss for _, loss in train(model, stream, config, make_optimizer(model, config))]


class Line(nn.Module):
    """One weight for each character, no scores before the last: the smallest model that `train` accepts."""

    def __init__(self):
        super().__init__()
        self.config = ModelConfig(vocab_size=5, block_size=1)
        self.table = nn.Parameter(torch.linspace(-1, 1, 25).view(5, 5).double())

    def forward(self, idx):
        return self.table[idx[:, -1]]


def test_the_loss_is_the_mean_surprise():
    """The loss is the mean of -ln P(y): two characters with scores 0 and ln 3 have P = 1/4 and 3/4."""
    scores = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [0.0, 0.0]])
    x, y = torch.arange(3)[:, None], torch.tensor([0, 1, 1])
    expected = (math.log(4) + math.log(4 / 3) + math.log(2)) / 3
    loss = nll(lambda idx: scores[idx[:, 0]], x, y)
    assert loss.item() == pytest.approx(expected, abs=1e-6), "cross-entropy of the scores: softmax comes once"


def test_the_loss_survives_large_scores():
    """Scores in the thousands give a finite loss: softmax and logarithm are one safe step."""
    scores = torch.tensor([[5000.0, 0.0]], requires_grad=True)
    loss = nll(lambda idx: scores, torch.tensor([[0]]), torch.tensor([1]))
    loss.backward()
    assert loss.item() == 5000.0, "-ln P of a very unlikely character is large, not infinite"
    assert scores.grad.tolist() == [[1.0, -1.0]], "and its gradient is P - 1 at the target, P elsewhere"


@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
def test_evaluation_covers_every_window(rows):
    """The validation loss counts every character that has a full context once, however the text is cut into pieces."""
    model, data = small(), torch.randint(11, (50,))
    surprise = []
    for i in range(3, 50):  # slowly: one character, one context, -ln P
        probs = torch.softmax(model(data[None, i - 3:i])[0], dim=0)
        surprise.append(-math.log(probs[data[i]].item()))
    loss = evaluate(model, data, rows=rows)
    expected = sum(surprise) / 47
    assert loss == pytest.approx(expected, abs=1e-12), (
        f"{loss:.6f} instead of {expected:.6f} in pieces of {rows}: windows are missing, or the odd last piece counts "
        "as much as a full one"
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
    stream = batches(data, 1, config.batch_size, config.seed)
    for step, (x, y) in enumerate(itertools.islice(stream, config.steps)):
        lr = config.lr * (1 - step / config.steps)
        grad, loss = np.zeros_like(p), 0.0
        for context, target in zip(x[:, 0].tolist(), y.tolist(), strict=True):
            probs = np.exp(p[context]) / np.exp(p[context]).sum()
            loss -= math.log(probs[target]) / len(y)
            grad[context] += (probs - np.eye(5)[target]) / len(y)
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
    stream = list(itertools.islice(batches(data, 1, 4, 5), 4))
    found = []
    optimizer.register_step_pre_hook(lambda *args: found.append(model.table.grad.clone()))
    tables = [model.table.detach().clone()]
    for _ in train(model, iter(stream), config, optimizer):
        tables.append(model.table.detach().clone())
    for step, (x, y) in enumerate(stream):
        table = tables[step].clone().requires_grad_()
        torch.nn.functional.cross_entropy(table[x[:, -1]], y).backward()
        torch.testing.assert_close(
            found[step], table.grad,
            msg=lambda m, step=step: f"step {step + 1} uses another gradient than its batch's: is .grad cleared?\n{m}",
        )


def test_the_rate_is_a_share_of_each_groups_own():
    """The schedule falls from 1 in a line to 1 / steps, and each group of weights gets that share of its own rate."""
    config = recipe(steps=10)
    shares = [1 - step / 10 for step in range(10)]
    assert [schedule(step, config) for step in range(10)] == pytest.approx(shares), "from 1 in a line towards 0"
    model = small()
    groups = [{"params": [model.tok_emb.weight], "lr": 0.5}, {"params": [model.head.weight], "lr": 0.001}]
    optimizer = torch.optim.SGD(groups)
    stream, seen = batches(torch.randint(11, (50,)), 3, 4, seed=5), []
    for _ in train(model, stream, config, optimizer):
        seen.append([group["lr"] for group in optimizer.param_groups])
    for step, rates in enumerate(seen):
        expected = [0.5 * shares[step], 0.001 * shares[step]]
        assert rates == pytest.approx(expected), f"step {step + 1} has rates {rates}: each group's own, times the share"


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
    seen = list(train(model, batches(data, 1, config.batch_size, config.seed), config, make_optimizer(model, config)))
    assert [step for step, _ in seen] == list(range(1, 31)), "one (step, loss) after each step, counted from 1"
    for (step, loss), should in zip(seen, losses, strict=True):
        assert loss == pytest.approx(should, abs=1e-9), f"step {step}: loss {loss:.6f}, AdamW has {should:.6f}"
    error = np.abs(model.table.detach().numpy() - expected).max()
    assert error < 1e-9, f"after 30 steps the weights are off by {error:.1e}: the last step is not AdamW's"


def test_a_loss_that_is_not_finite_stops_the_training():
    """The first loss that is infinite or nan ends the training by name, before it reaches a weight."""
    for bad in (math.nan, math.inf):
        model, factors = Line(), iter([1, 1, 1, bad])
        model.register_forward_hook(lambda module, args, output, factors=factors: output * next(factors, 1))
        steps = train(model, batches(torch.randint(5, (40,)), 1, 4, 5), recipe(), make_optimizer(model, recipe()))
        with pytest.raises(BadInput, match="lr") as caught:
            for _ in range(10):
                next(steps)
        assert "step 4" in str(caught.value), "the line does not say at which step the loss stopped being a number"
        assert model.table.isfinite().all(), "nan reached the weights: no later step can mend them"


def test_a_validation_loss_that_is_not_finite_is_told(monkeypatch):
    """A look whose loss is infinite or nan ends the run with its step: it is shown and logged as no result."""
    for bad in (math.nan, math.inf):
        monkeypatch.setattr(script, "evaluate", lambda *args, bad=bad: bad)
        with pytest.raises(BadInput, match="step 7"):
            script.look(7, None, SimpleNamespace(val=None), recipe(), None)


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


def test_training_learns_a_small_text_by_heart():
    """A text with one answer to every context is learned until almost nothing about it is left to say."""
    data = torch.arange(11).repeat(20)
    model = MLP(ModelConfig(vocab_size=11, block_size=3, n_embd=4, n_hidden=32))
    losses = fit(model, data, recipe(steps=200, batch_size=32, weight_decay=0.0))
    assert abs(losses[0] - math.log(11)) < 0.1, "it starts at ln V"
    assert losses[-1] < 0.05, f"the loss is still {losses[-1]:.3f}: the model cannot even learn by heart"
    assert evaluate(model, data) < 0.05, "the evaluation does not see what the training learned"


def test_the_same_seed_repeats_a_run():
    """Same seed, same losses, to the last bit; another seed draws other batches."""

    def losses(seed):
        torch.manual_seed(1)
        model = MLP(ModelConfig(vocab_size=11, block_size=3, n_embd=4, n_hidden=7))
        return fit(model, torch.arange(11).repeat(5), recipe(seed=seed))

    assert losses(5) == losses(5), "a run must repeat, or no number in a README can be checked"
    assert losses(5) != losses(6), "the seed does not reach the batches"


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("batch_size", -1), ("eval_every", 0), ("lr", 0.0), ("lr", -1.0),
                         ("lr", math.nan), ("lr", math.inf), ("weight_decay", -0.1), ("weight_decay", math.nan),
                         ("weight_decay", math.inf)],
)
def test_a_recipe_that_cannot_run_is_refused(field, value):
    """Steps, batch sizes and rates that make no sense are refused by name before any work is done."""
    with pytest.raises(BadInput, match=field):
        TrainConfig(**{field: value})


TEXT = "the cat sat on the mat and the rat sat on the cat\n" * 40
FLAGS = ["--steps", "40", "--eval-every", "20", "--batch-size", "32", "--block-size", "4", "--n-embd", "6"]
FLAGS += ["--n-hidden", "16", "--device", "cpu"]


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
    assert summary["val_loss"] == pytest.approx(evaluate(model, held_out), abs=1e-6), (
        "the reported loss is not the saved model's on the last tenth of the text"
    )
    V = len(tokenizer)
    assert summary["params"] == V * 6 + 24 * 16 + 16 + 16 * V + V, "the parameters of the model that was trained"
    assert summary["tokens"] == 40 * 32 and summary["steps"] == 40, "one token is predicted for each window"
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


@pytest.fixture
def earlier(text, tmp_path):
    """A finished run "tiny": a function that says which of its files are no longer what they were."""
    main(["--corpus", str(text), "--name", "tiny", *FLAGS])
    folder = tmp_path / "out" / "tiny"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def changed() -> list[str]:
        now = {file.name: file.read_bytes() for file in folder.iterdir()}
        return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))

    assert "model.pt" in before and "metrics.jsonl" in before and not changed()
    return changed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "nowhere.txt"], "nowhere.txt"),
        (["--n-hidden", "0"], "n_hidden"),
        (["--lr", "-1"], "lr"),
        (["--lr", "1e30"], "lower --lr"),
        (["--steps", "many"], "steps"),
        (["--activation", "swish"], "swish"),
        (["--device", "abacus"], "abacus"),
        (["--name", "../up"], "name"),
        (["--n-head", "4"], "n-head"),
        (["--block-size", "250"], "use a longer text"),
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
    """Ctrl-C in mid-run says that nothing was kept, and leaves an earlier run of the same name as it was."""

    def stopped(*args, **kwargs):
        yield from itertools.islice(train(*args, **kwargs), 30)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", stopped)
    with pytest.raises(KeyboardInterrupt, match="nothing of this run was kept"):
        main(["--corpus", str(text), "--name", "tiny", *FLAGS])
    assert not earlier(), f"a run that was stopped wrote over an earlier one's {earlier()}"
