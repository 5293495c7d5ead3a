"""Checkpoints of sampling: temperature, top-k and top-p against plain enumeration; checkpoints read without trust."""

import math
import pickle
from fractions import Fraction

from shared.errors import BadInput

import pytest
import torch
from torch import nn

import train
from data import Vocabulary
from model import MLP, ModelConfig
from sample import SampleConfig, filter_logits, load, main, sample


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def kept(logits, **choice) -> list[int]:
    """The tokens that may still be drawn."""
    return (filter_logits(torch.tensor(logits), SampleConfig(**choice)) > -math.inf).nonzero().flatten().tolist()


def ranking(scores) -> list[int]:
    """Token ids from the likeliest down, of two that tie the lower id first: the slow way."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def probabilities(scores, temperature=1.0, top_k=None, top_p=None):
    """What should be drawn with which probability, in plain Python."""
    if temperature == 0:
        temperature, top_k = 1.0, 1
    weight = [math.exp((s - max(scores)) / temperature) for s in scores]
    order = ranking(scores)[:top_k]
    total = sum(weight[i] for i in order)
    nucleus, reached = [], 0.0
    for i in order:
        if top_p is None or reached < top_p:
            nucleus.append(i)
        reached += weight[i] / total
    total = sum(weight[i] for i in nucleus)
    return [weight[i] / total if i in nucleus else 0.0 for i in range(len(scores))]


def test_temperature_divides_the_scores():
    """Temperature divides the scores: 0.5 squares the ratio of two probabilities, 2 takes its root."""
    logits = torch.log(torch.tensor([0.1, 0.9]))
    for temperature, ratio in ((1.0, 9.0), (0.5, 81.0), (2.0, 3.0)):
        p = torch.softmax(filter_logits(logits, SampleConfig(temperature=temperature)), dim=0)
        assert (p[1] / p[0]).item() == pytest.approx(ratio, rel=1e-5), (
            f"at temperature {temperature} odds of 9 to 1 become {(p[1] / p[0]).item():.2f} to 1, not {ratio} to 1"
        )


def test_temperature_zero_takes_the_likeliest():
    """Temperature 0 leaves the likeliest token only, the lower id of two that tie, whatever top-k says."""
    assert kept([1.0, 3.0, 2.0], temperature=0.0) == [1], "temperature 0 is the argmax"
    assert kept([1.0, 3.0, 3.0], temperature=0.0) == [1], "of two that tie, the lower id"
    assert kept([1.0, 3.0, 2.0], temperature=0.0, top_k=3) == [1], "temperature 0 is the argmax, with any top_k"
    assert kept([1.0, 3.0, 2.0], temperature=0.0, top_p=1.0) == [1], "temperature 0 is the argmax, with any top_p"


def test_top_k_keeps_exactly_k():
    """Top-k keeps the k likeliest tokens and no more, whatever ties; k = V and larger keep all."""
    scores = [2.0, 5.0, -1.0, 4.0, 0.0]
    for k in range(1, 8):
        assert kept(scores, top_k=k) == sorted(ranking(scores)[:k]), f"k = {k}"
    tied = [1.0, 2.0, 2.0, 2.0, 0.0, 1.0]
    for k in range(1, 7):
        assert kept(tied, top_k=k) == sorted(ranking(tied)[:k]), f"k = {k} of six with ties: exactly k, lower ids first"
    assert kept([0.0] * 300, top_k=7) == list(range(7)), "300 tokens that tie: the sort must be stable"


def test_top_k_leaves_the_ratios():
    """Among the tokens that stay, top-k and top-p do not change who is how much likelier than whom."""
    scores = torch.tensor([2.0, 5.0, -1.0, 4.0, 0.0])
    for choice in ({"top_k": 3}, {"top_p": 0.9}, {"top_k": 4, "top_p": 0.95}):
        out = filter_logits(scores, SampleConfig(**choice))
        stay = out > -math.inf
        assert stay.sum() >= 2 and torch.equal(out[stay], scores[stay].double()), f"{choice} changes scores that stay"


def test_top_p_keeps_the_token_that_crosses_p():
    """Top-p adds tokens from the likeliest down until p is reached: the one that crosses p is the last to stay."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.double).log2() * math.log(2)
    logits = logits.tolist()
    for p, count in ((1e-9, 1), (0.1, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.87, 3), (0.88, 4), (1.0, 4)):
        assert kept(logits, top_p=p) == list(range(count)), f"p = {p}: of 1/2, 1/4, 1/8, 1/8 {count} are needed"


def test_top_p_is_exact_where_p_is_a_cumulative_sum():
    """When the likeliest tokens together have exactly probability p, they are enough: no further token is let in."""
    for count in (2, 4, 8, 16, 64):  # equal scores: the sums are multiples of 1 / count, and exact in floating point
        for n in range(1, count + 1):
            p = Fraction(n, count)
            assert kept([0.7] * count, top_p=float(p)) == list(range(n)), (
                f"{count} equally likely tokens, p = {p}: exactly {n} of them, the lower ids first"
            )


def test_top_p_of_one_keeps_everything():
    """p = 1 keeps every token, however unlikely, though the sum of the others may round to 1."""
    assert kept([0.0, -100.0, 50.0, -800.0], top_p=1.0) == [0, 1, 2, 3], "p = 1 must not cut off the tail"


def test_top_p_looks_at_what_top_k_left():
    """Top-p comes after top-k and counts probabilities among the tokens that top-k left, after temperature."""
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0]).log().tolist()  # P = 0.4, 0.3, 0.2, 0.1; of the first two 4/7, 3/7
    assert kept(logits, top_p=0.5) == [0, 1], "0.4 is not yet 0.5"
    assert kept(logits, top_k=2, top_p=0.5) == [0], "of the two that top-k left the first has 4/7, which is over 0.5"
    assert kept(logits, top_p=0.5, temperature=0.5) == [0], "at temperature 0.5 the first has 16/30, over 0.5"
    assert kept(logits, top_p=0.5, temperature=2.0) == [0, 1], "at temperature 2 the first has 0.33"


def test_every_combination_against_enumeration():
    """Temperature, top-k and top-p in all combinations give the probabilities that plain Python works out."""
    rows = torch.randn(4, 9) * 2
    rows[2] = rows[2].round()  # with ties
    rows[3, :] = 0.25
    for temperature in (0.0, 0.3, 1.0, 2.5):
        for top_k in (None, 1, 2, 5, 9, 20):
            for top_p in (None, 0.05, 0.35, 0.85, 1.0):
                choice = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p)
                found = torch.softmax(filter_logits(rows, choice), dim=-1)
                expected = [probabilities(row, temperature, top_k, top_p) for row in rows.tolist()]
                gap = (found - torch.tensor(expected, dtype=torch.double)).abs().max().item()
                assert gap < 1e-12, f"{choice}: probabilities are off by {gap:.1e}"


def test_the_scores_are_left_alone():
    """Filtering returns new scores and leaves the model's own as they were."""
    logits = torch.randn(3, 5)
    before = logits.clone()
    filter_logits(logits, SampleConfig(temperature=0.5, top_k=2, top_p=0.5))
    filter_logits(logits.double(), SampleConfig(top_k=2))
    assert torch.equal(logits, before), "filtering wrote into the scores it was given"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"temperature": -0.5}, "temperature is -0.5: it must be 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
    ],
    ids=str,
)
def test_choices_that_leave_nothing_are_refused(choice, message):
    """k = 0, p = 0 and a negative temperature would leave nothing to draw from and are refused by name."""
    with pytest.raises(BadInput, match=message):
        SampleConfig(**choice)


class Scores(nn.Module):
    """The same scores whatever came before; or, with `copy`, all weight on the oldest token of the window plus 1."""

    def __init__(self, scores, block_size=3, copy=False):
        super().__init__()
        self.config = ModelConfig(vocab_size=len(scores), block_size=block_size)
        self.scores, self.copy, self.seen = torch.tensor(scores), copy, []

    def forward(self, idx):
        self.seen.append(idx.tolist())
        if self.copy:
            return torch.eye(len(self.scores))[(idx[:, 0] + 1) % len(self.scores)] * 100
        return self.scores.expand(len(idx), -1)


@pytest.mark.parametrize("choice", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.7}], ids=str)
def test_draws_have_the_right_frequencies(choice):
    """4,000 draws come as often as the filtered probabilities say, within four standard deviations."""
    scores = [1.0, 0.0, 2.0, 1.5]
    drawn = sample(Scores(scores), torch.zeros(3, dtype=torch.long), 4000, SampleConfig(**choice))
    counts = torch.bincount(drawn, minlength=4).tolist()
    for i, p in enumerate(probabilities(scores, **choice)):
        slack = 4 * math.sqrt(4000 * p * (1 - p))
        expected = f"expected {4000 * p:.0f} ± {slack:.0f}"
        assert abs(counts[i] - 4000 * p) <= slack, f"token {i} came {counts[i]} times, {expected}"


def test_the_model_sees_the_last_tokens_only():
    """Each draw shows the model the last block_size tokens, what it wrote itself included, in order."""
    model = Scores([0.0] * 10, copy=True)
    new = sample(model, torch.tensor([9, 8, 1, 2, 3]), 7, SampleConfig(temperature=0.0))
    assert new.tolist() == [2, 3, 4, 3, 4, 5, 4], "each token is the one three back, plus 1"
    windows = [[1, 2, 3], [2, 3, 2], [3, 2, 3], [2, 3, 4], [3, 4, 3], [4, 3, 4], [3, 4, 5]]
    assert [row for [row] in model.seen] == windows


def test_sampling_repeats_with_its_generator():
    """The same generator state writes the same text, another one another text, and `length` tokens of it."""
    model = MLP(ModelConfig(vocab_size=11, block_size=3, n_embd=4, n_hidden=7))
    context = torch.zeros(3, dtype=torch.long)
    texts = [
        sample(model, context, 50, SampleConfig(), torch.Generator().manual_seed(s)).tolist() for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2], "the generator decides what is drawn"
    assert all(len(text) == 50 for text in texts), "length tokens, the context not among them"


@pytest.fixture
def checkpoint(tmp_path):
    """A model with its vocabulary, and the file that train.save wrote of them."""
    vocab = Vocabulary("the cat sat\n")
    model = MLP(ModelConfig(vocab_size=len(vocab), block_size=3, n_embd=4, n_hidden=7, activation="relu"))
    path = tmp_path / "model.pt"
    train.save(path, model, vocab)
    return model, vocab, path


def test_a_checkpoint_comes_back_as_it_was(checkpoint):
    """What train.save wrote, sample.load reads: same shape, same weights, same characters, and nothing else on disk."""
    model, vocab, path = checkpoint
    again, chars = load(path)
    assert again.config == model.config, "the shape is saved with the weights"
    assert chars.chars == vocab.chars, "ids mean nothing without the vocabulary they were made with"
    idx = torch.randint(len(vocab), (5, 3))
    assert torch.equal(again(idx), model(idx)), "a weight changed on its way through the file"
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"], "the partial file is renamed, not left behind"


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_failed_save_keeps_the_old_checkpoint(error, checkpoint, monkeypatch):
    """A save that breaks off half-way leaves the checkpoint of before untouched, and no half of a new one."""
    model, vocab, path = checkpoint
    before = path.read_bytes()

    def full_disk(state, file):
        file.write_bytes(b"half of it")
        raise error("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left|is the disk full"):
        train.save(path, model, vocab)
    assert path.read_bytes() == before, "write to another file and rename it: the old one stays until the new is whole"
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"], "half a checkpoint fills the disk for nothing"


def test_a_missing_checkpoint_is_explained(tmp_path):
    """Without a checkpoint the message says where it was looked for and how to make one."""
    with pytest.raises(BadInput, match="no checkpoint at .*nowhere.pt: train first"):
        load(tmp_path / "nowhere.pt")


@pytest.mark.filterwarnings("ignore")  # torch grumbles about them before it gives up
def test_damaged_checkpoints_are_refused(checkpoint, tmp_path):
    """A file that was cut short, overwritten, or holds something else is refused in one line."""
    model, vocab, path = checkpoint
    whole = path.read_bytes()
    damaged = {"empty": b"", "text": b"ROMEO:\n", "pickle": pickle.dumps([1, 2])}
    damaged |= {f"{share} %": whole[:len(whole) * share // 100] for share in (1, 50, 99)}
    for name, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(BadInput, match="damaged or from another version"):
            load(path)
            pytest.fail(f"{name}: read without complaint")
    state = {"config": {"vocab_size": len(vocab)}, "chars": vocab.chars, "model": model.state_dict()}
    others = {
        "list": [1, 2], "tensor": torch.zeros(3), "no weights": {"config": state["config"], "chars": "ab"},
        "other shape": state, "unknown field": state | {"config": {"vocab_size": 5, "n_head": 4}},
        "impossible shape": state | {"config": {"vocab_size": 0}}, "no characters": state | {"chars": None},
    }
    for name, content in others.items():
        torch.save(content, path)
        with pytest.raises(BadInput, match="damaged or from another version"):
            load(path)
            pytest.fail(f"{name}: read without complaint")


RAN = []


def explode(word):
    RAN.append(word)


class Bomb:
    """Unpickling this calls a function: what a hostile checkpoint does."""

    def __reduce__(self):
        return explode, ("boom",)


def test_opening_a_checkpoint_never_runs_code(checkpoint):
    """A checkpoint is data: one that carries code is refused, and the code does not run."""
    _, _, path = checkpoint
    torch.save({"config": Bomb()}, path)
    torch.load(path, weights_only=False)
    assert RAN == ["boom"], "the bomb of this test must be a live one"
    RAN.clear()
    with pytest.raises(BadInput, match="damaged or from another version"):
        load(path)
    assert RAN == [], "opening a stranger's file ran the code in it: load weights only"


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """The checkpoint in its place, as the run "tiny"."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    checkpoint[2].rename(folder / "model.pt")
    return ["--name", "tiny"]


def test_the_script_continues_the_prompt(run, capsys):
    """`sample.py` prints the prompt and as many characters after it as asked for; the same seed writes the same."""
    texts = []
    for seed in (1, 1, 2):
        main([*run, "--prompt", "the cat", "--length", "40", "--seed", str(seed)])
        texts.append(capsys.readouterr().out.removesuffix("\n"))
    assert all(text.startswith("the cat") and len(text) == 47 for text in texts), "the prompt, then 40 characters"
    assert texts[0] == texts[1] != texts[2], "the seed decides what is written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "never-trained"], "no checkpoint at"),
        (["--prompt", "the dog"], "'d' is not among the 8 known"),
        (["--length", "0"], "write at least 1"),
        (["--top-k", "0"], "top_k is 0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-k", "few"], "invalid int value"),
    ],
    ids=lambda value: value[0].strip("-") + value[1] if isinstance(value, list) else "",
)
def test_the_script_refuses_bad_input(words, message, run):
    """A wrong value at the command line is one clear line."""
    with pytest.raises(BadInput, match=message):
        main([*run, *words])
