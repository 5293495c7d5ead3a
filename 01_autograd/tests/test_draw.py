"""What stands in the drawing, read back from the DOT text; the picture itself where `dot` is installed."""

import re
import shutil

from shared.errors import BadInput

import numpy as np
import pytest

from draw import draw, to_dot
from engine import Value
from tensor import Tensor


def boxes_and_arrows(dot: str) -> tuple[dict[str, list[str]], list[tuple[str, str, str]]]:
    """{node: lines in its box} and [(from, to, label)], by reading the DOT text."""
    labels = re.findall(r'^\t(n\d+) \[label="?(.*?)"? fillcolor', dot, re.M)
    boxes = {name: label.split("\\n") for name, label in labels}
    arrows = re.findall(r'^\t(n\d+) -> (n\d+)(?: \[label="?(.*?)"?\])?$', dot, re.M)
    return boxes, arrows


@pytest.fixture
def loss() -> Value:
    """a b + a at a = 2, b = -3, after backward: a has gradient -2, b has 2."""
    a, b = Value(2.0, label="a"), Value(-3.0, label="b")
    loss = a * b + a
    loss.label = "loss"
    loss.backward()
    return loss


def test_every_box_shows_its_number_and_its_gradient(loss):
    """Each node is one box with its name, operation, number and gradient."""
    boxes, _ = boxes_and_arrows(to_dot(loss))
    assert sorted(boxes.values()) == sorted(
        [
            ["a", "data 2", "grad -2"],
            ["b", "data -3", "grad 2"],
            ["*", "data -6", "grad 1"],
            ["loss (+)", "data -4", "grad 1"],
        ]
    ), "a box is missing, drawn twice, or shows other numbers"


def test_a_shared_node_is_one_box_with_two_arrows(loss):
    """A node used twice is drawn once, with an arrow for each use and the slope on each arrow."""
    boxes, arrows = boxes_and_arrows(to_dot(loss))
    name = {lines[0]: node for node, lines in boxes.items()}
    assert sorted(arrows) == sorted(
        [
            (name["a"], name["*"], "-3"),
            (name["b"], name["*"], "2"),
            (name["*"], name["loss (+)"], "1"),
            (name["a"], name["loss (+)"], "1"),
        ]
    ), "arrows lead from inputs to results and carry d result / d input"
    x = Value(3.0)
    _, arrows = boxes_and_arrows(to_dot(x * x))
    assert [label for _, _, label in arrows] == ["3", "3"], "x * x uses x twice: two arrows"


def test_tensors_show_their_shapes():
    """A graph of arrays shows shapes: numbers would not fit."""
    x, weight = Tensor(np.ones((5, 3)), label="x"), Tensor(np.ones((3, 2)), label="weight")
    boxes, arrows = boxes_and_arrows(to_dot((x @ weight).sum()))
    assert sorted(boxes.values()) == sorted(
        [["x", "shape (5, 3)"], ["weight", "shape (3, 2)"], ["@", "shape (5, 2)"], ["sum", "shape ()"]]
    ), "each array is one box with its name, operation and shape"
    assert len(arrows) == 3, f"{len(arrows)} arrows: two lead to the product, one to the sum"


def test_leaves_have_a_colour_of_their_own(loss):
    """What was given and what was computed are told apart by colour: two leaves, two results."""
    colours = re.findall(r"fillcolor=\"?(#\w+)", to_dot(loss))
    count = sorted(colours.count(colour) for colour in set(colours))
    assert count == [2, 2], f"a and b are leaves, a * b and the loss are results, drawn in {sorted(set(colours))}"


def test_labels_cannot_break_the_file():
    """A label with quotes, backslashes or braces is shown as it is."""
    value = Value(1.0, label='say "x\\n" {|}')
    assert 'say \\"x\\\\n\\" {|}' in to_dot(value), "quotes and backslashes must be escaped"


def test_without_dot_the_source_is_written_and_said(loss, tmp_path, monkeypatch, capsys):
    """Without graphviz's program the DOT file is there all the same, and one line says why there is no picture."""
    monkeypatch.setenv("PATH", str(tmp_path))
    file = draw(loss, tmp_path / "graph.png")
    assert file == tmp_path / "graph.dot", "the file that was written is the one returned"
    assert file.read_text("utf-8") == to_dot(loss), "the DOT file does not hold the graph"
    assert not (tmp_path / "graph.png").exists(), "there is a file that looks like a picture and is none"
    screen = capsys.readouterr().out
    assert "not installed" in screen and "graph.dot" in screen, f"say why there is no picture: {screen!r}"


@pytest.mark.skipif(not shutil.which("dot"), reason="graphviz's program `dot` is not installed")
def test_with_dot_there_is_a_picture(loss, tmp_path):
    """With graphviz's program there is a picture beside the DOT file."""
    png = draw(loss, tmp_path / "graph.png")
    assert png.read_bytes().startswith(b"\x89PNG"), "graph.png is no PNG"
    assert (tmp_path / "graph.dot").is_file(), "the DOT file belongs beside the picture"
    svg = draw(loss, str(tmp_path / "graph.svg")).read_text("utf-8")
    assert "<svg" in svg and "loss (+)" in svg and "grad &#45;2" in svg, "a's gradient is missing"


def test_a_huge_graph_is_refused(tmp_path):
    """A graph too large to read is refused before anything is written, and max_nodes moves the limit."""
    total = Value(0.0)
    for _ in range(60_000):
        total = total + 1.0
    with pytest.raises(BadInput, match="120,001"):
        draw(total, tmp_path / "graph.png")
        pytest.fail("a drawing of 120,001 nodes is not refused")
    assert not list(tmp_path.iterdir()), "something was written before the graph was refused"
    x = Value(1.0)
    boxes, _ = boxes_and_arrows(to_dot(x + x, max_nodes=2))
    assert len(boxes) == 2, f"2 nodes are allowed and there are 2, drawn are {len(boxes)}"
    with pytest.raises(BadInput, match="2"):
        to_dot(x + x, max_nodes=1)
        pytest.fail("2 nodes are drawn where 1 is allowed")


@pytest.mark.parametrize("name", ["graph", "graph.bmp", "graph.dot"])
def test_an_unknown_kind_of_picture_is_refused(loss, tmp_path, name):
    """A file name without a known picture's ending is refused, and the message lists those that are known."""
    with pytest.raises(BadInput, match=".png, .svg or .pdf"):
        draw(loss, tmp_path / name)
        pytest.fail(f"{name} is not refused")
