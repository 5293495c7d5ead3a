"""Checkpoints of sampling: temperature, top-k and top-p against plain enumeration; texts of a batch go on apart."""

import itertools
import math
from fractions import Fraction

from shared.errors import BadInput

import pytest
import torch
from torch import nn

import sample as script
from checkpoint import save
from model import GPT, ModelConfig
from sample import SampleConfig, evaluation, filter_logits, generate, main, sample
from tokenizer import CharTokenizer, train_tokenizer

RUN = {"optimizer": {}, "step": 7, "seconds": 1.5, "args": {}}  # what a run needs to go on


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


def test_what_stays_keeps_its_ratios():
    """Among the tokens that stay, top-k and top-p do not change who is how much likelier than whom."""
    scores = torch.tensor([2.0, 5.0, -1.0, 4.0, 0.0])  # P = 0.04, 0.70, 0.00, 0.26, 0.00
    for choice in ({"top_k": 3}, {"top_p": 0.9}, {"top_k": 4, "top_p": 0.95}):
        out = filter_logits(scores, SampleConfig(**choice))
        stay = out > -math.inf
        assert stay.sum() >= 2, f"{choice} leaves {stay.sum()} token of several that it should keep"
        assert torch.equal(out[stay], scores[stay].double()), f"{choice} changes the scores of tokens that stay"


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
        ({"top_k": 0}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
    ],
    ids=str,
)
def test_choices_that_leave_nothing_are_refused(choice, message):
    """k = 0, p = 0 and a negative temperature would leave nothing to draw from and are refused by name."""
    with pytest.raises(BadInput, match=message):
        SampleConfig(**choice)


class Scores(nn.Module):
    """The same scores whatever came before; or, with `copy`, all weight on the oldest token of the window plus 1.

    That is the last position's answer. All others answer the opposite.
    """

    def __init__(self, scores, block_size=3, copy=False):
        super().__init__()
        self.config = ModelConfig(vocab_size=len(scores), block_size=block_size)
        self.scores, self.copy, self.seen = torch.tensor(scores), copy, []

    def forward(self, idx):
        self.seen.append(idx.tolist())
        answer = self.scores.expand(len(idx), -1)
        if self.copy:
            answer = torch.eye(len(self.scores))[(idx[:, 0] + 1) % len(self.scores)] * 100
        return torch.stack([-answer] * (idx.shape[1] - 1) + [answer], dim=1)  # [B, T, V]


@pytest.mark.parametrize("choice", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.7}], ids=str)
def test_draws_have_the_right_frequencies(choice):
    """4,000 draws come as often as the filtered probabilities say, within four standard deviations."""
    scores = [1.0, 0.0, 2.0, 1.5]
    drawn = sample(Scores(scores), torch.zeros(8, 3, dtype=torch.long), 500, SampleConfig(**choice))
    counts = torch.bincount(drawn.flatten(), minlength=4).tolist()
    for i, p in enumerate(probabilities(scores, **choice)):
        slack = 4 * math.sqrt(4000 * p * (1 - p))
        expected = f"expected {4000 * p:.0f} ± {slack:.0f}"
        assert abs(counts[i] - 4000 * p) <= slack, f"token {i} came {counts[i]} times, {expected}"


def test_the_model_sees_the_last_tokens_only():
    """Each draw shows the model the last block_size tokens, what it wrote itself included, in order."""
    model = Scores([0.0] * 10, copy=True)
    [new] = sample(model, torch.tensor([[9, 8, 1, 2, 3]]), 7, SampleConfig(temperature=0.0))
    assert new.tolist() == [2, 3, 4, 3, 4, 5, 4], "each token is the one three back, plus 1"
    windows = [[1, 2, 3], [2, 3, 2], [3, 2, 3], [2, 3, 4], [3, 4, 3], [4, 3, 4], [3, 4, 5]]
    assert [row for [row] in model.seen] == windows, "the window is the newest block_size tokens, oldest first"


def test_texts_of_a_batch_go_on_apart():
    """Several texts are continued at once, each from its own context alone: one token a step for every text."""
    contexts = torch.tensor([[9, 8, 1, 2, 3], [4, 4, 5, 7, 9], [0, 0, 0, 0, 0]])
    first = next(generate(Scores([0.0] * 10, copy=True), contexts, SampleConfig(temperature=0.0)))
    assert first.tolist() == [2, 6, 1], "a step yields [B], one token for each of the three texts"
    new = sample(Scores([0.0] * 10, copy=True), contexts, 6, SampleConfig(temperature=0.0))
    for context, row in zip(contexts, new, strict=True):
        [alone] = sample(Scores([0.0] * 10, copy=True), context[None], 6, SampleConfig(temperature=0.0))
        assert row.tolist() == alone.tolist(), "a text depends on its neighbours in the batch"


def test_equal_texts_of_a_batch_do_not_stay_equal():
    """Each text of a batch draws for itself: two that begin alike part company."""
    new = sample(Scores([0.0] * 10), torch.zeros(2, 3, dtype=torch.long), 20, SampleConfig())
    assert new[0].tolist() != new[1].tolist(), "one draw serves the whole batch"


def test_tokens_come_as_they_are_drawn():
    """Generating works step by step: the model runs once for each token that is asked for, and never ahead."""
    model = Scores([0.0] * 10, copy=True)
    steps = generate(model, torch.tensor([[1, 2, 3]]), SampleConfig())
    assert len(model.seen) == 0, "nothing is drawn before it is asked for"
    for _ in itertools.islice(steps, 4):
        pass
    assert len(model.seen) == 4, f"4 tokens took {len(model.seen)} runs of the model: a text could not be shown live"


class Places(nn.Module):
    """The position at place t of the window answers t, with certainty."""

    def __init__(self, block_size):
        super().__init__()
        self.config = ModelConfig(vocab_size=block_size, block_size=block_size)

    def forward(self, idx):
        return 100 * torch.eye(self.config.block_size)[:idx.shape[1]].expand(len(idx), -1, -1)


def test_the_last_position_answers():
    """The next token is drawn from the last position's scores, be the context short or full."""
    [new] = sample(Places(6), torch.zeros(1, 3, dtype=torch.long), 6, SampleConfig())
    assert new.tolist() == [2, 3, 4, 5, 5, 5], "each position answers for the token after it: the new one comes last"
    [new] = sample(Places(6), torch.zeros(1, 1, dtype=torch.long), 3, SampleConfig())
    assert new.tolist() == [0, 1, 2], "a context of one token is enough"


def test_sampling_repeats_with_its_generator():
    """The same generator state writes the same text, another one another text, and `length` tokens of it."""
    model = GPT(ModelConfig(vocab_size=11, block_size=3, n_embd=4, n_head=2, n_layer=1))
    context = torch.zeros(1, 3, dtype=torch.long)
    texts = [
        sample(model, context, 50, SampleConfig(), torch.Generator().manual_seed(s))[0].tolist() for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2], "the generator decides what is drawn"
    assert all(len(text) == 50 for text in texts), "length tokens, the context not among them"


def test_sampling_records_no_gradients():
    """Nothing that sampling computes is kept for a backward pass: memory would grow with every token."""
    kept = []

    class Watch(Scores):
        def forward(self, idx):
            kept.append(torch.is_grad_enabled())
            return super().forward(idx)

    steps = generate(Watch([0.0] * 10), torch.tensor([[1, 2, 3]]), SampleConfig())
    next(steps)
    assert torch.is_grad_enabled(), "while a token is looked at, the caller's own gradients are switched off"
    next(steps)
    assert kept == [False, False], "the model runs with gradients on: use torch.no_grad"


@pytest.mark.parametrize("mode", [True, False])
def test_sampling_leaves_the_mode_as_it_was(mode):
    """Between two tokens and after the last the model is in the mode it was found in, training or evaluation."""
    model = GPT(ModelConfig(vocab_size=11, block_size=3, n_embd=4, n_head=2, n_layer=1)).train(mode)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(module.training))
    steps = generate(model, torch.zeros(1, 3, dtype=torch.long), SampleConfig())
    for _ in range(2):
        next(steps)
        assert [module.training for module in model.modules()] == [mode] * len(list(model.modules())), (
            f"the model had training={mode} and is left in the other mode: what trains it next goes wrong"
        )
    assert seen == [False, False], "the model runs in training mode while it samples"


def test_each_part_is_in_the_mode_it_was_found_in():
    """After a stretch in evaluation mode each part of a model is in its own mode again, if an error ended it too."""
    model = GPT(ModelConfig(vocab_size=11, block_size=3, n_embd=4, n_head=2, n_layer=2))
    model.blocks[0].eval()  # a part that is not being trained
    before = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="an error"), evaluation(model):
        assert not any(module.training for module in model.modules()), "inside, a part is in training mode"
        raise ValueError("an error")
    after = [module.training for module in model.modules()]
    assert after == before, "a part of the model is left in another mode than the one it was found in"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A checkpoint in its place, as the run "tiny"."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    tokenizer = CharTokenizer("the cat sat\n")
    model = GPT(ModelConfig(vocab_size=len(tokenizer), block_size=3, n_embd=4, n_head=2, n_layer=1))
    save(tmp_path / "out" / "tiny" / "model.pt", model, tokenizer, **RUN)
    return ["--name", "tiny", "--device", "cpu"]


def test_the_script_continues_the_prompt(run, capsys):
    """`sample.py` prints the prompt and as many characters after it as asked for; the same seed writes the same."""
    texts = []
    for seed in (1, 1, 2):
        main([*run, "--prompt", "the cat", "--length", "40", "--seed", str(seed)])
        texts.append(capsys.readouterr().out.removesuffix("\n"))
    assert all(text.startswith("the cat") and len(text) == 47 for text in texts), "the prompt, then 40 characters"
    assert texts[0] == texts[1] != texts[2], "the seed decides what is written"


@pytest.mark.parametrize("prompt", ["t", "the", "the cat sat"])
def test_the_script_shows_the_model_the_end_of_the_prompt(prompt, run, capsys, monkeypatch):
    """The first draw is given the newest characters of the prompt, whatever its length, and the prompt stands first."""
    seen, forward = [], GPT.forward

    def watch(self, idx):
        seen.append(idx.tolist())
        return forward(self, idx)

    monkeypatch.setattr(GPT, "forward", watch)
    main([*run, "--prompt", prompt, "--length", "2"])
    [first], text = seen[0], capsys.readouterr().out
    given = [CharTokenizer("the cat sat\n").index[char] for char in prompt][-3:]
    assert first == given, f"the model saw {first}, and {prompt!r} ends in {given}"
    assert text.startswith(prompt) and len(text) == len(prompt) + 3, "the prompt, 2 characters, the end of the line"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "never-trained"], "never-trained"),
        (["--prompt", "the dog"], "'d'"),
        (["--prompt", ""], "--prompt"),
        (["--length", "0"], "--length"),
        (["--top-k", "0"], "top_k"),
        (["--top-p", "0"], "top_p"),
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "few"], "top-k"),
        (["--device", "abacus"], "abacus"),
    ],
    ids=lambda value: value[0].strip("-") + value[1] if isinstance(value, list) else "",
)
def test_the_script_refuses_bad_input(words, message, run):
    """A wrong value at the command line is one clear line."""
    with pytest.raises(BadInput, match=message):
        main([*run, *words])


def test_sampling_drops_nothing():
    """Text is drawn from the whole model: dropout is off while it writes, and on again for the training after it."""
    model = GPT(ModelConfig(vocab_size=11, block_size=3, n_embd=16, n_head=2, n_layer=2, dropout=0.5))
    nn.init.ones_(model.norm.weight)  # so that scores differ enough for a dropped unit to matter
    context = torch.zeros(1, 3, dtype=torch.long)
    texts = [sample(model, context, 50, SampleConfig(temperature=0.0)).tolist() for _ in range(2)]
    assert texts[0] == texts[1], "the likeliest token changes from call to call: units are dropped while sampling"
    assert model.training, "training would go on without dropout"


def test_a_generator_of_its_own_leaves_the_others_alone():
    """With a generator of its own, sampling uses none of the random numbers of the training around it."""
    model = GPT(ModelConfig(vocab_size=11, block_size=3, n_embd=4, n_head=2, n_layer=1, dropout=0.5))
    before = torch.get_rng_state()
    expected = torch.rand(3)
    torch.set_rng_state(before)
    sample(model, torch.zeros(2, 3, dtype=torch.long), 5, SampleConfig(), torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(3), expected), "the run's next random numbers are others after a sample was written"


@pytest.fixture
def bytes_run(run, tmp_path, monkeypatch):
    """A run on bytes, and a function: ids that the model "draws" -> pieces of text, printed before each draw."""
    tokenizer = train_tokenizer("byte", "", 0)
    model = GPT(ModelConfig(vocab_size=len(tokenizer), block_size=3, n_embd=4, n_head=2, n_layer=1))
    save(tmp_path / "out" / "tiny" / "model.pt", model, tokenizer, **RUN)
    said = []
    monkeypatch.setattr(script, "say", lambda text="", end="\n": said.append(text + end))

    def write(ids) -> list[str]:
        said.clear()
        after = []

        def drawn(*args, **kwargs):
            for i in ids:
                yield torch.tensor([i])
                after.append("".join(said))

        monkeypatch.setattr(script, "generate", drawn)
        main([*run, "--prompt", "ö:", "--length", str(len(ids))])
        return [*after[:len(ids)], "".join(said)]

    return write


def test_a_character_cut_between_tokens_is_printed_whole(bytes_run):
    """Text appears token by token, but a character of several bytes only when its last byte has come."""
    text = "aé€🙂!言葉"
    ids = list(text.encode("utf-8"))
    *pieces, whole = bytes_run(ids)
    for i, piece in enumerate(pieces, 1):
        expected = "ö:" + bytes(ids[:i]).decode("utf-8", errors="ignore")
        assert piece == expected, f"after {i} bytes of {text!r} the script has printed {piece!r}, not {expected!r}"
    assert whole == f"ö:{text}\n", "the prompt, the text and the end of the line"


@pytest.mark.parametrize("seed", range(5))
def test_printed_in_pieces_the_text_is_the_same(seed, bytes_run):
    """Whatever a young model writes, the pieces printed are the decoded text: no byte is lost, and none comes twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (40,), generator=generator).tolist()  # mostly no UTF-8
    ids = [*ids[:20], *"né".encode()[:2 + seed % 2], *ids[20:], *"🙂".encode()[:seed % 5]]  # cut at the end, perhaps
    whole = bytes_run(ids)[-1]
    assert whole == "ö:" + bytes(ids).decode("utf-8", errors="replace") + "\n", "the printed text is not the tokens'"
