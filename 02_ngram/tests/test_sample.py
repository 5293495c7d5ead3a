"""Checkpoints of sampling: tokens come as often as the model says, from the right context, and words stay apart."""

import random
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

from shared.errors import BadInput

import pytest
import torch

from sample import generate, main, sample

WORDS = ["ann", "bo", "cid", "dan", "eva", "flo", "gus", "hal", "ida", "joe", "kit", "leo", "max", "ned", "ola", "pia"]


class Told:
    """A model whose next-token probabilities are what `answer` says of a context, a list of block_size tokens."""

    def __init__(self, block_size: int, answer):
        self.config = SimpleNamespace(block_size=block_size)
        self.answer, self.contexts = answer, []

    def probs(self, x):
        assert x.shape[1] == self.config.block_size, "the model is given block_size tokens of each text"
        self.contexts.append(x[0].tolist())
        return torch.tensor([self.answer(row) for row in x.tolist()])


def certain(token: int, vocab_size: int = 5):
    """All probability on one token."""
    return [float(i == token) for i in range(vocab_size)]


def test_sampled_frequencies_match_the_probabilities():
    """After each token the next ones come as often as their probabilities say (chi-square, one in 10,000 by chance)."""
    table = [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.05, 0.45, 0.45]]
    model = Told(1, lambda context: table[context[-1]])
    text = [0, *sample(model, torch.tensor([[0]]), 4000, generator=torch.Generator().manual_seed(0))[0].tolist()]
    pairs, firsts = Counter(pairwise(text)), Counter(text[:-1])
    for a in range(4):
        expected = [firsts[a] * p for p in table[a]]
        chi2 = sum((pairs[a, b] - e) ** 2 / e for b, e in enumerate(expected))
        assert chi2 < 21.1, f"after token {a}: chi-square {chi2:.1f} with 3 degrees of freedom"


def test_impossible_tokens_never_come():
    """A token with probability 0 is never drawn."""
    model = Told(1, lambda context: [0.5, 0.0, 0.5, 0.0])
    drawn = sample(model, torch.tensor([[0]]), 500, generator=torch.Generator().manual_seed(0))
    assert set(drawn[0].tolist()) == {0, 2}, "a token of probability 0 was drawn, or one of probability 1/2 never"


def test_each_token_is_drawn_given_the_newest():
    """What was drawn becomes context: the sum of the last two tokens, mod 5, gives the Fibonacci numbers mod 5."""
    model = Told(2, lambda context: certain((context[0] + context[1]) % 5))
    drawn = sample(model, torch.tensor([[4, 4, 0, 1]]), 8)[0].tolist()
    assert drawn == [1, 2, 3, 0, 3, 3, 1, 4], "the context is not the newest two tokens"
    nothing = Told(0, lambda context: certain(3))
    assert sample(nothing, torch.tensor([[1]]), 3).tolist() == [[3, 3, 3]], "no context at all"


def test_texts_of_a_batch_go_on_apart():
    """Several texts are continued at once, each from its own context alone, one token a step for every text."""
    model = Told(2, lambda context: certain((context[0] + context[1]) % 5))
    contexts = [[4, 4, 0, 1], [0, 0, 3, 3], [1, 1, 2, 0]]
    steps = generate(model, torch.tensor(contexts))
    first = next(steps)
    assert first.tolist() == [1, 1, 2], "the first step yields one token for each of the three texts"
    alone = [sample(model, torch.tensor([context]), 6)[0].tolist() for context in contexts]
    assert sample(model, torch.tensor(contexts), 6).tolist() == alone, "a text depends on its neighbours in the batch"


def test_sampling_forgets_at_a_boundary():
    """With a boundary token nothing before it is used, so that each word begins afresh."""
    model = Told(3, lambda context: certain(0 if context[-2:] == [1, 2] else context[-1] % 2 + 1))
    assert sample(model, torch.tensor([[4, 3, 1]]), 5, boundary=0)[0].tolist() == [2, 0, 1, 2, 0]
    given = [[4, 3, 1], [3, 1, 2], [0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert model.contexts == given, "letters of the word before are used"
    model.contexts.clear()
    sample(model, torch.tensor([[4, 3, 1]]), 3)
    assert model.contexts[-1] == [1, 2, 0], "without a boundary the whole context is used"


def test_a_seed_repeats_a_sample():
    """The same generator state gives the same text, another one another text."""
    model = Told(1, lambda context: [0.25] * 4)
    first, again, other = (
        sample(model, torch.tensor([[0]]), 50, generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    )
    assert first == again != other, "the generator decides what is drawn, and nothing else does"


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\n".join(random.Random(0).choices(WORDS, k=300)), encoding="utf-8")
    return str(file)


def test_a_sample_of_a_word_list_is_words(words, capsys):
    """A 4-gram of a list of three-letter words writes words of the list and nothing else."""
    main(["--corpus", words, "--words", "--block-size", "3", "--length", "400", "--seed", "3"])
    screen = capsys.readouterr().out
    assert len(screen) == 402, "a line break, 400 characters and the end of the line"
    written = screen.split()
    known = [word for word in written[:-1] if word in WORDS]
    assert len(known) > 0.9 * len(written), f"most of {written[:9]} are no words of the list"


def test_a_sample_continues_its_prompt(words, capsys):
    """The prompt is printed and continued, whatever the length of the prompt; the seed decides how."""

    def written(*more):
        main(["--corpus", words, "--block-size", "3", "--length", "30", *more])
        return capsys.readouterr().out

    for prompt in ("a", "an", "ann", "ann\nbo\ncid"):
        text = written("--prompt", prompt)
        assert text.startswith(prompt) and len(text) == len(prompt) + 31, "prompt, 30 characters, end of the line"
    third = [written("--prompt", "ma", "--seed", str(seed))[2] for seed in range(10)]
    assert third.count("x") >= 7, f"after 'ma' the list has 'x' only, a smoothed model seldom more than that: {third}"
    assert written("--seed", "1") == written("--seed", "1") != written("--seed", "2")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "Z"], "character 'Z' is not among"),
        (["--length", "0"], "--length 0"),
        (["--block-size", "-1"], "block_size -1"),
        (["--block-size", "60"], "do not fit into 64 bits"),
        (["--corpus", "nowhere"], "no corpus or file .*nowhere'"),
        (["--temperature", "1"], "--temperature"),
    ],
)
def test_bad_arguments_are_refused(args, message, words):
    """What cannot be written is refused with one line that names the cause."""
    with pytest.raises(BadInput, match=message):
        main([*([] if "--corpus" in args else ["--corpus", words]), *args])
