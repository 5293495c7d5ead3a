"""The task of indirect indexing: its questions have the answers that counting gives."""

import json
from collections import Counter

from shared.errors import BadInput

import pytest
import torch

from demos import indexing
from demos.ablation import Scale, shape
from demos.positions import build


def read(x, shift: int) -> list[tuple[str, list[tuple]]]:
    """Rows of tokens as (string, [(letter, shift, answer or None), ...])."""
    rows = []
    for row in x.tolist():
        cut = row.index(indexing.COMMA)
        word, rest = "".join(indexing.LETTERS[token] for token in row[:cut]), row[cut + 1:]
        asked = [
            (indexing.LETTERS[a], b - indexing.COMMA - 1 - shift, indexing.LETTERS[c[0]] if c else None)
            for a, b, *c in (rest[i:i + 3] for i in range(0, len(rest), 3))
        ]
        rows.append((word, asked))
    return rows


@pytest.mark.parametrize("n_letters, shift, questions", [(5, 3, 6), (20, 15, 1), (30, 9, 3)])
def test_the_answers_are_found_by_counting(n_letters, shift, questions):
    """In the text of each question, counting from the letter asked about leads to the answer."""
    x, y = indexing.examples(n_letters, shift, questions, 300, torch.Generator().manual_seed(0))
    assert y.shape == (300, questions), "an answer for each question"
    assert x.shape == (300, n_letters + 3 * questions), "string, comma, three tokens a question, not the last answer"
    assert x.max() <= indexing.token(shift, shift) and x.min() >= 0
    for (word, asked), answers in zip(read(x, shift), y.tolist(), strict=True):
        assert word.isalpha() and word.isascii() and len(word) == len(set(word)) == n_letters, f"{word}: letters repeat"
        assert len({(letter, moved) for letter, moved, _ in asked}) == questions, f"{word}: a question is asked twice"
        assert [answer for *_, answer in asked[:-1]] == [indexing.LETTERS[y] for y in answers[:-1]]
        assert asked[-1][2] is None, "the last answer is given away"
        for (letter, moved, _), answer in zip(asked, answers, strict=True):
            place = word.index(letter) + moved
            assert 1 <= abs(moved) <= shift and place >= 0, f"{word}, {letter} {moved:+}: counted past the beginning"
            right = word[place] == indexing.LETTERS[answer]
            assert right, f"{word}, {letter} {moved:+}: {indexing.LETTERS[answer]}? + is to the right, - to the left"


def test_every_question_is_asked():
    """All (place, shift) that stay inside the string come up, about equally often."""
    x, _ = indexing.examples(4, 2, 1, 10_000, torch.Generator().manual_seed(0))
    found = Counter((word.index(letter), moved) for word, [(letter, moved, _)] in read(x, 2))
    possible = {(i, k) for i in range(4) for k in (-2, -1, 1, 2) if 0 <= i + k < 4}
    assert set(found) == possible, f"never asked: {possible - set(found)}, impossible: {set(found) - possible}"
    assert {(i, j - i) for i, j in indexing.pairs(4, 2)} == possible
    assert all(abs(count / 1000 - 1) < 0.15 for count in found.values()), f"10 questions, 1,000 times each: {found}"


def test_batches_have_every_length():
    """Strings are of all lengths asked for, alike within a batch; a seed repeats and another one differs."""
    def some(seed):
        batches = indexing.stream((4, 6), 2, 3, 8, seed)
        return [next(batches) for _ in range(30)]

    first, again, other = some(1), some(1), some(2)
    assert {x.shape for x, _ in first} == {(8, n + 9) for n in (4, 5, 6)}, "three tokens for each question"
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True)), "a seed does not repeat"
    assert not all(a.shape == b.shape and torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


def test_guesses_by_enumeration():
    """The best guess without the letter, or without the shift, counted over every question on strings of 3 and 4."""
    found = indexing.guesses((3, 4), 2)
    shift_alone, letter_alone = [], []
    for n in (3, 4):
        asked = [(i, k) for i in range(n) for k in (-2, -1, 1, 2) if 0 <= i + k < n]
        shift_alone.append(sum(1 / sum(other == k for _, other in asked) for _, k in asked) / len(asked))
        letter_alone.append(sum(1 / sum(other == i for other, _ in asked) for i, _ in asked) / len(asked))
    expected = {"the shift alone": sum(shift_alone) / 2, "the letter alone": sum(letter_alone) / 2}
    assert found == pytest.approx(expected), f"{found}, counted: {expected}"


def test_accuracy_counts_right_answers():
    """One that counts is always right, one that names the letter asked about never."""
    class Counts(torch.nn.Module):
        def forward(self, x):
            answers = [word[word.index(letter) + moved] for word, [(letter, moved, _)] in read(x, 3)]
            return one_hot([indexing.LETTERS.index(answer) for answer in answers])

    class Repeats(torch.nn.Module):
        def forward(self, x):
            return one_hot(x[:, -2].tolist())

    def one_hot(tokens):
        return torch.nn.functional.one_hot(torch.tensor(tokens), 60)[:, None].float()

    assert indexing.accuracy(Counts(), (5, 7), 3, 20) == 1.0, "a right answer was not counted"
    assert indexing.accuracy(Repeats(), (5, 7), 3, 20) == 0.0, "a wrong answer was counted"


def test_only_answers_are_scored():
    """The scores are those at the shifts, after which the answers come, and at no other token."""
    model = build("PoPE", shape(Scale(block_size=14, n_embd=8), 60), 0)
    x, y = indexing.examples(5, 3, 3, 4, torch.Generator().manual_seed(0))
    whole = model(x)
    model.__class__, model.questions = indexing.Answering, 3
    assert torch.equal(model(x), whole[:, [7, 10, 13]]), "the string takes 0-4, the comma 5; then letter, shift, answer"
    assert torch.equal(x[:, [8, 11]], y[:, :2]) and (x[:, [7, 10, 13]] > indexing.COMMA).all()


def test_the_demo_runs(out):
    """Every kind of positions is trained on the task; strings that are too short or too long are refused."""
    small = ["--n-embd", "8", "--n-layer", "1", "--batch-size", "4"]
    words = ["--steps", "2", "--seeds", "2", "--letters", "4", "5", "--shift", "2", "--questions", "3", *small]
    indexing.main(words)
    rows = json.loads((out / "indexing" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["positions"] for row in rows] == [*indexing.KINDS, "(the shift alone)", "(the letter alone)"]
    assert (out / "indexing" / "indexing.png").stat().st_size > 5000, "no figure"
    for words in (["--letters", "2", "2"], ["--letters", "9", "8"], ["--letters", "8", "53"], ["--shift", "0"]):
        with pytest.raises(BadInput, match="shift < low <= high"):
            indexing.main(words)
    for count in ("0", "99"):
        with pytest.raises(BadInput, match="--questions"):
            indexing.main(["--questions", count])
