"""The map of the embedding is the one that linear algebra defines."""

import json

from shared.errors import BadInput

import numpy as np
import pytest
import torch

from checkpoint import save
from demos import embedding
from model import MLP, ModelConfig
from tokenizer import CharTokenizer


def test_principal_components_are_the_covariance_s_eigenvectors():
    """The two directions are the leading eigenvectors of the covariance, and the shares their eigenvalues."""
    torch.manual_seed(0)
    points = torch.randn(30, 5, dtype=torch.double) * torch.tensor([3.0, 1.0, 2.0, 0.5, 0.1]) + 7
    found, shares = embedding.principal(points)
    values, vectors = np.linalg.eigh(np.cov(points.numpy().T))
    expected = (points.numpy() - points.numpy().mean(0)) @ vectors[:, ::-1][:, :2]
    for i in range(2):
        assert np.allclose(found[:, i].abs().numpy(), np.abs(expected[:, i])), f"component {i + 1}, up to its sign"
    assert np.allclose(shares.numpy(), values[::-1][:2] / values.sum()), "shares of the variance"


def test_neighbours_are_the_nearest_other_points():
    """A point's neighbours are those at the smallest distance, nearest first, and never the point itself."""
    points = torch.tensor([[1.0, 0.0], [5.0, 0.5], [0.0, 1.0], [-1.1, 0.0], [1.0, 1.1]])
    places = points.tolist()
    distances = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in places] for p in places]
    for i, row in enumerate(distances):
        expected = sorted((j for j in range(5) if j != i), key=row.__getitem__)
        assert embedding.neighbours(points, 4)[i].tolist() == expected, f"neighbours of point {i}"


def test_groups():
    """Vowels, consonants, capitals and the rest; chance is the share of one's own group among the others."""
    assert [embedding.group(char) for char in "ezQ,\n"] == ["vowels", "consonants", "capitals", "others", "others"]
    nearest = torch.tensor([[1], [0], [3], [0]])  # of a, e, b, A
    rows = embedding.same_group("aebA", nearest)
    assert rows["vowels"] == {"found": 1.0, "by chance": pytest.approx(1 / 3)}
    assert rows["consonants"] == {"found": 0.0, "by chance": 0.0}
    other_case = rows["the letter's other case"]
    assert other_case == {"found": 0.5, "by chance": pytest.approx(1 / 3)}, "A is next to a, but a to e"


def test_the_demo_draws_a_run(trained, out, capsys):
    """The demo reads a run and draws every character."""
    embedding.main(["--run", "tiny", "--chars", "at "])
    assert "vowels" in json.loads((out / "embedding" / "summary.json").read_text("utf-8"))["same_group"]
    assert (out / "embedding" / "embedding.png").stat().st_size > 5000
    assert "␣" in capsys.readouterr().out, "the space has a visible name"
    with pytest.raises(BadInput, match="'Z' is not among"):
        embedding.main(["--run", "tiny", "--chars", "Z"])


def test_the_demo_trains_a_small_model(text, out, capsys):
    """Without a run the demo trains a model of its own, with as many numbers per character as asked for."""
    embedding.main(["--corpus", str(text), "--steps", "5", "--chars", "at"])
    assert "with 2 numbers for each character" in capsys.readouterr().out
    with pytest.raises(BadInput, match="at least 2"):
        embedding.main(["--corpus", str(text), "--n-embd", "1"])
    (out / "line").mkdir(parents=True)
    save(out / "line" / "model.pt", MLP(ModelConfig(3, n_embd=1)), CharTokenizer("abc"))
    with pytest.raises(BadInput, match="line has n_embd 1"):
        embedding.main(["--run", "line", "--chars", "a"])


def test_labels_make_room_for_each_other():
    """Two close points move by half of what is missing each, one far away stays; of many no two stay too close."""
    places = embedding.apart(torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]]), gap=2.0)
    assert places.tolist() == [[-0.5, 0.0], [1.5, 0.0], [9.0, 0.0]], "labels move apart by what is missing, no further"
    torch.manual_seed(0)
    crowd = embedding.apart(0.1 * torch.randn(65, 2), gap=0.04)
    closest = torch.cdist(crowd, crowd).fill_diagonal_(torch.inf).min().item()
    assert closest > 0.03, f"two labels are {closest:.3f} apart and cover each other"
