"""The array engine against torch: the same expression, written once, computed by both."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tensor import Tensor, cross_entropy, unbroadcast

POSITIVE = ("log", "sqrt", "x ** 0.5", "x ** y", "x / y", "1 / y", "x ** -2")

# name, expression in names that both engines know, shapes of x and y
CASES = [
    ("x + y", lambda x, y: x + y, (3, 4), (3, 4)),
    ("x + row", lambda x, y: x + y, (3, 4), (4,)),
    ("x + column", lambda x, y: x + y, (3, 4), (3, 1)),
    ("row + column", lambda x, y: x + y, (1, 4), (3, 1)),
    ("row * batch", lambda x, y: x * y, (4,), (5, 3, 4)),
    ("middle axis", lambda x, y: x * y, (5, 3, 4), (5, 1, 4)),
    ("number * x", lambda x, y: x * y, (), (2, 3)),
    ("one entry * x", lambda x, y: x * y, (1, 1), (2, 3)),
    ("x - y", lambda x, y: x - y, (2, 3, 4), (3, 1)),
    ("x / y", lambda x, y: x / y, (3, 4), (3, 1)),
    ("2 - x", lambda x, y: 2.0 - x * y, (3, 4), (4,)),
    ("1 / y", lambda x, y: x * (1.0 / y), (3, 4), (4,)),
    ("-x", lambda x, y: -x * y, (3, 4), (4,)),
    ("x ** 3", lambda x, y: x**3 * y, (3, 4), (4,)),
    ("x ** -2", lambda x, y: x**-2 * y, (3, 4), (4,)),
    ("x ** 0.5", lambda x, y: x**0.5 * y, (3, 4), (4,)),
    ("x ** y", lambda x, y: x**y, (3, 4), (4,)),
    ("2 ** x", lambda x, y: 2.0**x * y, (3, 4), (4,)),
    ("exp", lambda x, y: x.exp() * y, (3, 4), (4,)),
    ("log", lambda x, y: x.log() * y, (3, 4), (4,)),
    ("sqrt", lambda x, y: x.sqrt() * y, (3, 4), (4,)),
    ("tanh", lambda x, y: x.tanh() * y, (3, 4), (4,)),
    ("relu", lambda x, y: x.relu() * y, (3, 4), (4,)),
    ("sigmoid", lambda x, y: x.sigmoid() * y, (3, 4), (4,)),
    ("sum", lambda x, y: x.sum() * y, (3, 4), (4,)),
    ("sum 0", lambda x, y: x.sum(0) * y, (3, 4), (4,)),
    ("sum 1", lambda x, y: x.sum(1) * y, (3, 4), (3,)),
    ("sum -1 keepdim", lambda x, y: x.sum(-1, keepdim=True) * y, (3, 3), (3, 3)),
    ("sum of two axes", lambda x, y: x.sum((0, 2)) * y, (2, 3, 4), (3,)),
    ("sum beside a 1", lambda x, y: x.sum(1) * y, (1, 3), ()),
    ("sum of the 1", lambda x, y: x.sum(0) * y, (1, 3, 1), (3, 2)),
    ("sum of square axis", lambda x, y: x.sum(dim=1) * y, (3, 3), (3,)),
    ("mean", lambda x, y: x.mean() * y, (3, 4), (4,)),
    ("mean 0", lambda x, y: x.mean(0) * y, (3, 4), (4,)),
    ("mean keepdim", lambda x, y: (x - x.mean(dim=1, keepdim=True)) ** 2 * y, (3, 4), (4,)),
    ("mean of two axes", lambda x, y: x.mean((0, -1)) * y, (2, 3, 4), (3,)),
    ("amax", lambda x, y: x.amax() * y, (3, 4), (4,)),
    ("amax 0", lambda x, y: x.amax(0) * y, (3, 4), (4,)),
    ("amax keepdim", lambda x, y: (x - x.amax(1, keepdim=True)) * y, (3, 3), (3,)),
    ("amax beside a 1", lambda x, y: x.amax(1) * y, (1, 3), ()),
    ("amax of two axes", lambda x, y: x.amax((0, 2)) * y, (2, 3, 4), (3,)),
    ("matmul", lambda x, y: x @ y, (3, 4), (4, 5)),
    ("matmul square", lambda x, y: x @ y, (3, 3), (3, 3)),
    ("matmul batch", lambda x, y: x @ y, (2, 3, 4), (2, 4, 5)),
    ("matmul shared right", lambda x, y: x @ y, (2, 6, 3, 4), (4, 5)),
    ("matmul shared left", lambda x, y: x @ y, (3, 4), (2, 4, 5)),
    ("matmul broadcast batches", lambda x, y: x @ y, (2, 1, 3, 4), (1, 6, 4, 5)),
    ("vector @ matrix", lambda x, y: x @ y, (4,), (4, 5)),
    ("matrix @ vector", lambda x, y: x @ y, (3, 4), (4,)),
    ("vector @ vector", lambda x, y: x @ y, (4,), (4,)),
    ("vector @ batch", lambda x, y: x @ y, (4,), (2, 4, 5)),
    ("batch @ vector", lambda x, y: x @ y, (2, 3, 4), (4,)),
    ("x @ x", lambda x, y: x @ x.transpose(0, 1) * y, (3, 4), (3,)),
    ("reshape", lambda x, y: x.reshape(2, 6) * y, (3, 4), (6,)),
    ("reshape -1", lambda x, y: x.reshape(-1) * y, (3, 4), (12,)),
    ("transpose", lambda x, y: x.transpose(0, 1) * y, (3, 4), (4, 3)),
    ("transpose of two", lambda x, y: x.transpose(1, 2) * y, (2, 3, 4), (3,)),
    ("transpose batch", lambda x, y: x.transpose(-1, -3) * y, (2, 3, 4), (2,)),
    ("row", lambda x, y: x[1] * y, (3, 4), (4,)),
    ("column", lambda x, y: x[:, 2] * y, (3, 4), (3,)),
    ("slice", lambda x, y: x[1:, :3] * y, (3, 4), (3,)),
    ("every second", lambda x, y: x[::2] * y, (4, 3), (3,)),
    ("new axis", lambda x, y: x[:, None] * y, (3, 4), (2, 1)),
    ("ellipsis", lambda x, y: x[..., -1] * y, (2, 3, 4), (3,)),
    ("rows by number", lambda x, y: x[[0, 2, 0, 0]] * y, (3, 4), (4, 4)),
    ("entries by number", lambda x, y: x[[0, 1, 1, 0], [2, 3, 3, 2]] * y, (3, 4), (4,)),
    ("table look-up", lambda x, y: x[np.array([[0, 2], [2, 2]])] * y, (3, 4), (2, 2, 4)),
    ("mask", lambda x, y: x[[True, False, True]] * y, (3, 4), (2, 4)),
    ("softmax", lambda x, y: x.softmax(1) * y, (3, 4), (4,)),
    ("softmax 0", lambda x, y: x.softmax(dim=0) * y, (3, 4), (4,)),
    ("log_softmax", lambda x, y: x.log_softmax(-1) * y, (2, 3, 4), (4,)),
    ("the same leaf twice", lambda x, y: x * x.tanh() + x @ y, (3, 3), (3, 3)),
]


def both(shape: tuple[int, ...], rng: np.random.Generator, positive: bool) -> tuple[Tensor, torch.Tensor]:
    data = rng.uniform(0.3, 2.0, shape) if positive else rng.normal(size=shape)
    return Tensor(data), torch.tensor(data, requires_grad=True)


def same(ours: Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal gradients; a leaf that the result does not depend on has zeros here and None there."""
    expected = np.zeros(ours.shape) if theirs.grad is None else theirs.grad.numpy()
    assert ours.grad.shape == expected.shape, f"{what}: a gradient has its tensor's shape"
    np.testing.assert_allclose(ours.grad, expected, rtol=1e-10, atol=1e-12, err_msg=f"{what}: wrong gradient")


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_only_the_axis_that_is_reduced_goes_away(reduce):
    """sum, mean and amax along one axis remove that axis: another axis of length 1 is a batch of one, and stays."""
    for shape, dim in (((1, 3), 1), ((1, 3), 0), ((3, 1, 4), 0), ((1, 3, 1), 1), ((1, 1), 1), ((2, 1, 3, 1), (0, 2))):
        data = np.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape)
        ours, expected = getattr(Tensor(data), reduce)(dim), getattr(torch.tensor(data), reduce)(dim)
        assert ours.shape == tuple(expected.shape), (
            f"{reduce} of {shape} along {dim} has shape {tuple(expected.shape)}, not {ours.shape}: `squeeze()` without "
            "an axis removes every axis of length 1"
        )


@pytest.mark.parametrize("name, expression, x_shape, y_shape", CASES, ids=[case[0] for case in CASES])
def test_operations_have_torchs_values_and_gradients(name, expression, x_shape, y_shape):
    """Each operation has torch's value and gradients, for shapes that broadcast as for shapes that match."""
    rng = np.random.default_rng(0)
    (x, tx), (y, ty) = (both(shape, rng, name in POSITIVE) for shape in (x_shape, y_shape))
    ours, theirs = expression(x, y), expression(tx, ty)
    assert ours.shape == tuple(theirs.shape), f"{name}: shape {ours.shape}, torch has {tuple(theirs.shape)}"
    np.testing.assert_allclose(ours.data, theirs.detach().numpy(), rtol=1e-12, atol=1e-14, err_msg=f"{name}: value")
    weight = rng.normal(size=ours.shape)  # so that no two entries of the result send back the same gradient
    (ours * weight).sum().backward()
    (theirs * torch.tensor(weight)).sum().backward()
    same(x, tx, f"{name}, x {x_shape} beside y {y_shape}")
    same(y, ty, f"{name}, y {y_shape} beside x {x_shape}")


def test_random_graphs_of_arrays_have_torchs_gradients():
    """On 100 random expressions of broadcast arrays with shared nodes, every gradient is torch's."""
    rng = np.random.default_rng(1)
    shapes = [(), (1,), (4,), (3, 1), (1, 4), (3, 4), (2, 1, 4), (2, 3, 1)]
    steps = [
        lambda a, b: a + b,
        lambda a, b: a.tanh() * b,
        lambda a, b: a - b.relu(),
        lambda a, b: a / (b * b + 1.0),
        lambda a, b: a.tanh().exp() + b.mean(),
        lambda a, b: (a * a + 0.5).log() - b.sigmoid(),
        lambda a, b: a * b.sum() * 0.1,
        lambda a, b: a - a.reshape(-1).amax() * b.tanh(),
    ]
    for index in range(100):
        leaves = [both(shapes[i], rng, False) for i in rng.integers(len(shapes), size=4)]
        nodes = list(leaves)
        for _ in range(rng.integers(3, 15)):
            step = steps[rng.integers(len(steps))]
            (a, ta), (b, tb) = (nodes[i] for i in rng.integers(len(nodes), size=2))
            nodes.append((step(a, b), step(ta, tb)))
        sum(ours.tanh().mean() for ours, _ in nodes).backward()
        sum(theirs.tanh().mean() for _, theirs in nodes).backward()
        for ours, theirs in leaves:
            same(ours, theirs, f"graph {index}, leaf of shape {ours.shape}")


def test_a_small_nudge_of_every_entry_shows_the_gradient():
    """Nudging each weight of a two-layer network, one at a time, moves its loss as the gradient says."""
    rng = np.random.default_rng(2)
    x, targets = rng.normal(size=(5, 3)), rng.integers(0, 4, 5)
    weights = [rng.normal(size=shape) for shape in ((3, 6), (6,), (6, 4), (4,))]

    def loss(arrays):
        w1, b1, w2, b2 = (a if isinstance(a, Tensor) else Tensor(a) for a in arrays)
        return cross_entropy((x @ w1 + b1).tanh() @ w2 + b2, targets)

    tensors = [Tensor(w) for w in weights]
    loss(tensors).backward()
    for tensor, weight in zip(tensors, weights, strict=True):
        for index in np.ndindex(weight.shape):
            value = weight[index]
            weight[index] = value + 1e-6
            up = loss(weights).item()
            weight[index] = value - 1e-6
            down = loss(weights).item()
            weight[index] = value
            assert tensor.grad[index] == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-9), (
                f"the loss does not move with entry {index} as its gradient says"
            )


def test_unbroadcast_adds_up_the_copies():
    """A gradient shrinks to its tensor's shape by adding up the copies that broadcasting made."""
    gradient = np.arange(24.0).reshape(2, 3, 4)
    by_hand = {
        (2, 3, 4): gradient,
        (3, 4): gradient[0] + gradient[1],
        (4,): gradient[0, 0] + gradient[0, 1] + gradient[0, 2] + gradient[1, 0] + gradient[1, 1] + gradient[1, 2],
        (2, 1, 4): (gradient[:, 0] + gradient[:, 1] + gradient[:, 2])[:, None],
        (3, 1): np.array([[0 + 1 + 2 + 3 + 12 + 13 + 14 + 15], [60 + 8 * 4], [60 + 8 * 8]]),
        (1,): np.array([276.0]),
        (): np.array(276.0),  # 0 + 1 + ... + 23
    }
    for shape, expected in by_hand.items():
        result = unbroadcast(gradient, shape)
        assert result.shape == shape, f"{shape}: got shape {result.shape}"
        assert np.array_equal(result, expected), f"{shape}: the copies are not added up"


@pytest.mark.parametrize("exponent", [0, 0.5, 1, 2, 3])
def test_powers_of_zero_have_torchs_slope(exponent):
    """At zero a power has the slope that torch gives it: infinite for a root, none for x ** 0."""
    data = np.array([0.0, 2.0])
    ours, theirs = Tensor(data), torch.tensor(data, requires_grad=True)
    (ours**exponent).sum().backward()
    (theirs**exponent).sum().backward()
    same(ours, theirs, f"x ** {exponent} at 0 and 2")


def test_extreme_inputs_stay_finite():
    """tanh and sigmoid of huge inputs neither overflow nor turn into nan, and their slopes there are 0."""
    for name, limits in (("tanh", [-1.0, 1.0]), ("sigmoid", [0.0, 1.0])):
        x = Tensor([-1000.0, 1000.0])
        result = getattr(x, name)()
        result.sum().backward()
        assert result.data.tolist() == limits, f"{name} of -1000 and 1000 is {limits}, not {result.data.tolist()}"
        assert x.grad.tolist() == [0.0, 0.0], f"{name} is saturated there, its slopes 0, not {x.grad.tolist()}"


def test_relu_is_flat_at_its_kink():
    """relu lets a gradient through where its input is positive; at 0 and below nothing comes through, as in torch."""
    data = np.array([-1.0, 0.0, 2.0])
    ours, theirs = Tensor(data), torch.tensor(data, requires_grad=True)
    ours.relu().sum().backward()
    theirs.relu().sum().backward()
    assert ours.grad.tolist() == theirs.grad.tolist(), f"slopes at -1, 0 and 2 are 0, 0 and 1, not {ours.grad.tolist()}"


def test_an_entry_picked_twice_gets_both_gradients():
    """Indexing the same row twice sends two gradients back to it: an embedding used twice learns twice."""
    table = Tensor(np.zeros((3, 2)))
    picked = table[[1, 1, 0]]
    (picked * np.array([[1.0, 2.0], [10.0, 20.0], [5.0, 6.0]])).sum().backward()
    assert table.grad.tolist() == [[5.0, 6.0], [11.0, 22.0], [0.0, 0.0]], (
        f"row 1 was used twice and must get 1 + 10 and 2 + 20, got {table.grad.tolist()}"
    )


def test_entries_that_tie_for_the_maximum_share_its_gradient():
    """Where entries tie for the maximum, amax shares the gradient equally among them, as torch.amax does."""
    data = np.array([[2.0, 5.0, 5.0], [1.0, 1.0, 1.0], [3.0, 0.0, -1.0]])
    for dim in (0, 1, (0, 1)):
        ours, theirs = Tensor(data), torch.tensor(data, requires_grad=True)
        (ours.amax(dim) * 6.0).sum().backward()
        (theirs.amax(dim) * 6.0).sum().backward()
        same(ours, theirs, f"amax over {dim} with ties")


@pytest.mark.parametrize("scale", [1.0, 50.0, 5000.0])
def test_cross_entropy_is_torchs_for_small_and_huge_logits(scale):
    """Cross-entropy and its gradient are torch's for logits up to thousands, repeated targets included."""
    rng = np.random.default_rng(3)
    data, targets = rng.normal(size=(6, 4)) * scale, np.array([3, 0, 1, 1, 3, 2])
    ours, theirs = Tensor(data), torch.tensor(data, requires_grad=True)
    loss, expected = cross_entropy(ours, targets), F.cross_entropy(theirs, torch.tensor(targets))
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12), (
        f"logits of size {scale}: not the mean over the rows of -log softmax at the target"
    )
    same(ours, theirs, f"logits of size {scale}")
    np.testing.assert_allclose(ours.grad.sum(axis=1), 0.0, atol=1e-12, err_msg="softmax minus one-hot sums to zero")
    probabilities = Tensor(data).softmax().data
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12, err_msg="each row's probabilities add to 1")


def test_backward_twice_adds_up_on_leaves_only():
    """A second backward adds to the leaves as in torch; inner nodes start afresh; zero_grad forgets."""
    data = np.array([[0.5, -1.0], [2.0, 0.3]])
    ours, theirs = Tensor(data), torch.tensor(data, requires_grad=True)
    shared, torch_shared = ours * ours, theirs * theirs
    loss, torch_loss = shared.exp().mean() + shared.sum(), torch_shared.exp().mean() + torch_shared.sum()
    for _ in range(3):
        loss.backward()
        torch_loss.backward(retain_graph=True)
        same(ours, theirs, "backward again")
    ours.zero_grad()
    assert np.array_equal(ours.grad, np.zeros((2, 2))), "after zero_grad the gradient of before is still there"
    leaf = Tensor([[3.0]])
    leaf.backward()
    leaf.backward()
    assert leaf.grad.tolist() == [[2.0]], f"a leaf is its own result, with slope 1 each time: 2, not {leaf.grad.item()}"


def test_a_leaf_keeps_its_own_copy():
    """A tensor does not change when the array it was made from does, and gradients never share memory."""
    data = np.ones(3)
    x, y = Tensor(data), Tensor(data)
    data[:] = 9.0
    assert x.data.tolist() == [1.0, 1.0, 1.0], "the leaf shares its array with its maker, who changed it"
    total = x + y
    total.sum().backward()
    x.grad += 5.0
    assert y.grad.tolist() == [1.0, 1.0, 1.0] == total.grad.tolist(), "two tensors hold one gradient array between them"
    assert Tensor(np.arange(3)).data.dtype == np.float64, "whole numbers have no small changes: everything is float64"


def test_a_tensor_shows_its_numbers_and_its_shape():
    """A Tensor that is printed shows its numbers and its shape, and does not fill the screen."""
    shown = repr(Tensor([[1.5, 2.5]]))
    assert "1.5" in shown and "(1, 2)" in shown, f"[[1.5, 2.5]], of shape (1, 2), is printed as {shown}"
    assert len(repr(Tensor(np.zeros((100, 100))))) < 1000, "10,000 numbers are too many to print"


def test_arrays_and_numbers_on_the_left_give_tensors():
    """numpy arrays and numbers work on either side of every operator."""
    x, array = Tensor([[1.0, 2.0], [3.0, 4.0]]), np.array([[2.0, 1.0], [1.0, 2.0]])
    for result, expected in (
        (array + x, array + x.data),
        (array - x, array - x.data),
        (array * x, array * x.data),
        (array / x, array / x.data),
        (array @ x, array @ x.data),
        (array**x, array**x.data),
        (np.float64(2.0) * x, 2.0 * x.data),
        (3 - x, 3 - x.data),
    ):
        assert type(result) is Tensor, f"numpy took the Tensor apart and gave a {type(result).__name__}"
        np.testing.assert_allclose(result.data, expected, rtol=1e-14, err_msg="the operands changed places")
    assert (len(x), x.ndim) == (2, 2), f"2 rows, 2 axes: not {len(x)} and {x.ndim}"
    assert [row.shape for row in x] == [(2,), (2,)], "a loop over a Tensor gives its rows"


# What is asked of x, the error it must raise, the word that its message must have, and what is wrong with an answer.
REFUSED = {
    "backward of a row": (lambda x: x.backward(), ValueError, "one number", "whose sensitivity would that be?"),
    "matmul": (lambda x: x @ Tensor(np.ones((2, 3))), ValueError, "inner", "3 columns have no partner in 2 rows"),
    "matmul by a number": (lambda x: x @ 2.0, ValueError, "inner", "a number has no axis to multiply along"),
    "x + two numbers": (lambda x: x + np.ones(2), ValueError, "broadcast", "3 entries and 2 do not pair"),
    "log": (lambda x: x.log(), ValueError, "positive", "a single nan or -inf spreads to every weight"),
    "root of -2": (lambda x: x**0.5, ValueError, "negative", "a single nan spreads to every weight"),
    "1 / x": (lambda x: 1.0 / x, ZeroDivisionError, "zero", "a single inf spreads to every weight"),
    "exp 1000": (lambda x: (x * 1000.0).exp(), OverflowError, "maximum", "e ** 1000 fits into no float"),
    "1 / 1e-200": (lambda x: Tensor([1e-200, 2.0]) ** -1, OverflowError, "float", "the slope, -1e400, fits nowhere"),
    "1e200 ** 2": (lambda x: Tensor([2.0, 1e200]) ** 2, OverflowError, "float", "1e400 fits into no float"),
    "Tensor of a Tensor": (Tensor, TypeError, "Tensor", "a new graph was started without saying so"),
    "class 3": (lambda x: cross_entropy(x, [3]), ValueError, "3 classes", "the classes are 0, 1 and 2"),
    "class -1": (lambda x: cross_entropy(x, [-1]), ValueError, "3 classes", "-1 was read as the last class"),
    "two targets": (lambda x: cross_entropy(x, [0, 1]), ValueError, "targets", "there is one row, so one target"),
    "target 0.0": (lambda x: cross_entropy(x, [0.0]), ValueError, "targets", "classes are numbered, not measured"),
    "target without axis": (lambda x: cross_entropy(x, 0), ValueError, "targets", "targets are [N], one a row"),
}


@pytest.mark.parametrize("action, error, word, wrong", REFUSED.values(), ids=REFUSED)
def test_what_has_no_answer_is_refused_with_a_reason(action, error, word, wrong):
    """Shapes that do not fit, logarithms of zero, overflow and impossible targets say what is wrong."""
    with pytest.raises(error, match=word):
        answer = action(Tensor([[1.0, -2.0, 0.0]]))
        pytest.fail(f"not refused but answered with {answer}: {wrong}")
