"""Checkpoints of training: the loss and its units, gradient descent, the two bigrams meet, the whole run."""

import json
import math
import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

from shared import corpus
from shared.errors import BadInput

import pytest
import torch

from data import load_data, windows
from model import KneserNey, ModelConfig, NeuralBigram, NGram
from train import TrainConfig, distance, evaluate, main, nll, perplexity, train

WORDS = "the cat and the dog sat on a mat then they ran to that tree at ten and had tea".split()


class Told:
    """A model that answers with the probabilities it was made with: prob(x, y) = table[x's newest token, y]."""

    def __init__(self, table):
        self.table = torch.tensor(table, dtype=torch.double)

    def probs(self, x):
        return self.table[x[:, -1]]

    def prob(self, x, y):
        return self.table[x[:, -1], y]


@pytest.fixture
def text(tmp_path):
    """A file of 12,000 characters, words drawn at random."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join(random.Random(0).choices(WORDS, k=4000))[:12_000], encoding="utf-8")
    return file


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    return tmp_path / "out"


def test_loss_perplexity_and_bits_by_hand():
    """The loss is the mean of -ln p; e to it is the perplexity, and divided by ln 2 it is bits."""
    model = Told([[1 / 2, 1 / 4, 1 / 8, 1 / 8]])
    x, y = torch.zeros(4, 1, dtype=torch.long), torch.tensor([0, 1, 2, 3])
    loss = nll(model, x, y).item()  # 1, 2, 3 and 3 bits: 2.25 bits on average
    assert loss == pytest.approx(1.559581156), "nats: the natural logarithm, averaged"
    assert loss / math.log(2) == pytest.approx(2.25), "p = 1/2, 1/4, 1/8, 1/8 cost 1, 2, 3, 3 bits"
    assert perplexity(loss) == pytest.approx(2**2.25), "perplexity is e to the nats or 2 to the bits, never mixed"
    even = nll(Told([[1 / 8] * 8]), x, y).item()
    assert perplexity(even) == pytest.approx(8), "eight equally likely tokens have perplexity 8"


@pytest.mark.parametrize("rows", [1, 7, 64, 99, 100, 1000])
def test_the_loss_of_a_text_does_not_depend_on_how_it_is_cut(rows):
    """Evaluation in chunks gives the mean over all examples: a short last chunk weighs no more than its examples."""
    generator = torch.Generator().manual_seed(0)
    table = torch.softmax(torch.randn(4, 4, generator=generator, dtype=torch.double), 1).tolist()
    x = torch.randint(4, (100, 3), generator=generator)
    y = torch.arange(100) // 90  # the last 10 are different from the rest
    expected = -sum(math.log(table[a][b]) for a, b in zip(x[:, -1].tolist(), y.tolist(), strict=True)) / 100
    assert evaluate(Told(table), x, y, rows) == pytest.approx(expected), f"chunks of {rows}: a mean of means is no mean"


def test_each_step_goes_against_its_own_gradient():
    """Every step subtracts lr x (p - one_hot) of this step only, and lr falls to 0 in a straight line."""
    # All examples alike, so that it does not matter which are drawn: after token 2 comes token 1.
    x, y = torch.full((50, 1), 2), torch.full((50,), 1)
    model = NeuralBigram(ModelConfig(vocab_size=3, block_size=1))
    scores = [0.0, 0.0, 0.0]
    for step, loss in train(model, x, y, TrainConfig(steps=10, batch_size=8, lr=1.5)):
        exps = [math.exp(score) for score in scores]
        p = [e / sum(exps) for e in exps]
        assert loss == pytest.approx(-math.log(p[1]), abs=1e-5), f"step {step}: not the loss before the step"
        lr = 1.5 * (1 - (step - 1) / 10)
        scores = [score - lr * (q - (i == 1)) for i, (score, q) in enumerate(zip(scores, p, strict=True))]
        assert model.table[2].tolist() == pytest.approx(scores, abs=1e-5), (
            f"step {step}: not one step against this step's gradient (gradients add up if they are not forgotten)"
        )
    assert step == 10 and (model.table[[0, 1]] == 0).all(), "scores of contexts that never came must not move"


def test_steps_draw_random_examples():
    """Each step sees batch_size examples drawn at random, contexts with their own targets; the seed decides which."""

    class Watched(Told):
        def __init__(self):
            self.weight, self.drawn = torch.ones(1, requires_grad=True), []

        def parameters(self):
            return [self.weight]

        def prob(self, x, y):
            self.drawn.append(y.tolist())
            assert torch.equal(x[:, 0] + 100, y), "contexts and targets got separated"
            return torch.sigmoid(self.weight).expand(len(y))

    x, y = torch.arange(40)[:, None], torch.arange(40) + 100

    def drawn(seed):
        model = Watched()
        for _ in train(model, x, y, TrainConfig(steps=30, batch_size=16, seed=seed)):
            pass
        return model.drawn

    first = drawn(1)
    assert len(first) == 30 and all(len(batch) == 16 for batch in first)
    assert set(sum(first, [])) == set(y.tolist()), "some examples are never drawn"
    assert len({tuple(batch) for batch in first}) == 30, "every step sees the same examples"
    assert first == drawn(1) != drawn(2), "the seed decides what is drawn, and nothing else"


def test_the_trained_softmax_meets_the_counts():
    """Gradient descent ends where counting starts: the learned softmax is the share of each pair in the text."""
    rng = random.Random(3)
    text, weights = [0], [(5, 3, 1, 1), (1, 1, 6, 2), (4, 0, 4, 2), (1, 7, 0, 2)]
    for _ in range(3000):
        text += rng.choices(range(4), weights=weights[text[-1]])
    x, y = torch.tensor(text[:-1])[:, None], torch.tensor(text[1:])
    model = NeuralBigram(ModelConfig(vocab_size=4, block_size=1))
    for _ in train(model, x, y, TrainConfig(steps=800, batch_size=1024, lr=20.0)):
        pass
    pairs, firsts = Counter(pairwise(text)), Counter(text[:-1])
    learned = model.probs(torch.arange(4)[:, None]).tolist()
    for a in range(4):
        for b in range(4):
            share = pairs[a, b] / firsts[a]
            assert learned[a][b] == pytest.approx(share, abs=0.02), f"P({b} | {a}) is not its share of the text"
    best = -sum(n * math.log(n / firsts[a]) for (a, _), n in pairs.items()) / 3000
    assert best <= evaluate(model, x, y) < best + 0.002, "no bigram beats the counts, and the trained one comes close"
    counted = NGram(ModelConfig(vocab_size=4, block_size=1, add_k=1e-9)).fit(x, y)
    assert distance(counted, model, x) < 0.01, "averaged over the text, the two still disagree"


def test_distance_by_hand():
    """The distance of two bigrams is half the sum of |p - q|, and frequent contexts weigh more."""
    a = Told([[0.5, 0.5], [1.0, 0.0]])
    b = Told([[0.25, 0.75], [0.0, 1.0]])
    x = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 1]])  # the newest token: three times 0, once 1
    assert distance(a, a, x) == 0
    assert distance(a, b, x[3:]) == pytest.approx(1), "what one expects the other rules out"
    assert distance(a, b, x) == pytest.approx((3 * 0.25 + 1 * 1) / 4), "each context as often as it occurs"


def test_the_run_states_what_it_found(text, out, capsys):
    """The run prints both smoothings side by side for each order, and its record holds the rungs of the ladder."""
    main(["--corpus", str(text), "--max-order", "7", "--steps", "300", "--batch-size", "256", "--lr", "20"])
    screen = capsys.readouterr().out
    content = text.read_text("utf-8")
    learn, judge = content[:10_800], content[10_800:]
    # The bigram by dictionaries. A window of 6 + 1 fits before every character but the first 6.
    pairs, firsts = Counter(pairwise(learn[5:])), Counter(learn[5:-1])
    vocab = len(set(content))
    scored = [(pairs[a, b] + 0.01) / (firsts[a] + 0.01 * vocab) for a, b in pairwise(judge[5:])]
    bigram = -sum(map(math.log, scored)) / len(scored)
    row = next(line for line in screen.splitlines() if line.startswith("│     2"))
    assert f" {bigram:.3f} " in row, "the add-k bigram of the table is not the one that dictionaries count"
    assert max(map(len, screen.splitlines())) <= 80, "the table must fit a terminal of 80 columns"

    summary = json.loads((out / "default" / "summary.json").read_text("utf-8"))
    names = ["bigram, Kneser-Ney", "trigram, Kneser-Ney", "5-gram, Kneser-Ney", "7-gram, Kneser-Ney", "neural bigram"]
    assert [rung["name"] for rung in summary["rungs"]] == names
    for rung in summary["rungs"]:
        assert rung["val_bpb"] == pytest.approx(rung["val_loss"] / math.log(2)), "plain ASCII: one byte a character"
        assert rung["params"] > 0 and rung["seconds"] >= 0
    assert summary["rungs"][0]["tokens"] == 10_800 - 6 and summary["rungs"][-1]["tokens"] == 300 * 256
    neural = summary["rungs"][-1]["val_loss"]
    assert abs(neural - bigram) < 0.02, "the neural bigram ends far from the counted one"
    assert summary["val_loss"] <= min(rung["val_loss"] for rung in summary["rungs"]), "the headline is the best model's"
    steps = [json.loads(line)["step"] for line in (out / "default" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps == list(range(10, 301, 10)), "the training loss is recorded every 10 steps"


def test_a_word_list_runs(tmp_path, out, capsys):
    """With --words the run reads a word list, one word a line, and orders beyond the longest word change nothing."""
    file = tmp_path / "words.txt"
    file.write_text("\n".join(random.Random(0).choices(["ab", "ba", "abb", "aab"], k=400)), encoding="utf-8")
    main(["--corpus", str(file), "--words", "--max-order", "6", "--steps", "5", "--lr", "5"])
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    add_k = {int(row[1]): float(row[2]) for row in rows}
    # A 4-gram sees a word of up to three letters whole, with its beginning.
    assert add_k[2] > add_k[3] > add_k[4], "more of the word must help"
    assert add_k[4] == add_k[5] == add_k[6], "contexts reach across the boundary between words"
    recorded = json.loads((out / "default" / "summary.json").read_text("utf-8"))["corpus"]
    assert recorded != str(file), "a list of shuffled words goes by the name of the text: their losses do not compare"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--corpus", "nowhere"], "no corpus or file .*nowhere'"),
        (["--max-order", "1"], "--max-order 1"),
        (["--max-order", "x"], "invalid int value"),
        (["--max-order", "40"], "do not fit into 64 bits"),
        (["--steps", "0"], "steps is 0"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--lr", "0"], "lr is 0.0"),
        (["--lr", "1e30"], "lower --lr"),
        (["--add-k", "0"], "add_k is 0.0"),
        (["--name", "../up"], "run name"),
    ],
)
def test_bad_arguments_are_refused(args, message, text, out):
    """What cannot run is refused with one line that names the cause."""
    corpus_args = [] if "--corpus" in args else ["--corpus", str(text)]
    with pytest.raises(BadInput, match=message):
        main([*corpus_args, "--steps", "20", *args])
    assert not (out / "default" / "summary.json").exists(), "a run that failed must not leave a result"


@pytest.mark.parametrize("length", [1, 10])
def test_a_tiny_text_is_refused(length, tmp_path, out):
    """A text of a few characters is refused with the advice to use a longer one."""
    file = tmp_path / "tiny.txt"
    file.write_text("ab" * (length // 2) or "a", encoding="utf-8")
    with pytest.raises(BadInput, match="use a longer text"):
        main(["--corpus", str(file)])


def test_counting_reaches_its_bars_on_shakespeare():
    """On the whole validation text of Tiny Shakespeare: bigram 2.48, trigram 2.04, 5-gram 1.56, 7-gram below 1.52."""
    source = corpus.SOURCES["shakespeare"]
    folders = [Path(os.environ.get("STAGES_DATA") or "."), corpus.cache_folder()]
    if not any((folder / source.file).is_file() for folder in folders):
        pytest.skip("Tiny Shakespeare is not on this machine; uv run stages run 02 downloads it")
    data = load_data("shakespeare")
    x, y = windows(data.train, 7)
    val_x, val_y = windows(data.val, 7)
    for order, bar in ((2, 2.485), (3, 2.04), (5, 1.565), (7, 1.52)):
        model = KneserNey(ModelConfig(vocab_size=len(data.tokenizer), block_size=order - 1)).fit(x, y)
        loss = evaluate(model, val_x, val_y)
        assert bar - 0.01 < loss < bar, f"order {order}: {loss:.4f} nats per character"
