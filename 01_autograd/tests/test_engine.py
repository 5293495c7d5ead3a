"""The scalar engine against torch, finite differences, and numbers worked out by hand."""

import doctest
import gc
import math
import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine
from engine import Value, cross_entropy, dot, topological_order

# One operation at a time: its name, the operation on Values, the same in plain floats, points to try it at.
OPERATIONS = [
    ("x + 3", lambda x: x + 3, lambda x: x + 3, (-2.0, 0.5)),
    ("3 + x", lambda x: 3 + x, lambda x: 3 + x, (-2.0, 0.5)),
    ("x - 3", lambda x: x - 3, lambda x: x - 3, (-2.0, 0.5)),
    ("3 - x", lambda x: 3 - x, lambda x: 3 - x, (-2.0, 0.5)),
    ("-x", lambda x: -x, lambda x: -x, (-2.0, 0.5)),
    ("x * 3", lambda x: x * 3, lambda x: x * 3, (-2.0, 0.5)),
    ("3 * x", lambda x: 3 * x, lambda x: 3 * x, (-2.0, 0.5)),
    ("x / 3", lambda x: x / 3, lambda x: x / 3, (-2.0, 0.5)),
    ("3 / x", lambda x: 3 / x, lambda x: 3 / x, (-2.0, 0.5)),
    ("x ** 3", lambda x: x**3, lambda x: x**3, (-2.0, 0.5)),
    ("x ** -2", lambda x: x**-2, lambda x: x**-2, (-2.0, 0.5)),
    ("x ** 0.5", lambda x: x**0.5, lambda x: x**0.5, (0.3, 4.0)),
    ("3 ** x", lambda x: 3**x, lambda x: 3**x, (-2.0, 0.5)),
    ("x ** x", lambda x: x**x, lambda x: x**x, (0.3, 2.0)),
    ("sqrt", Value.sqrt, math.sqrt, (0.3, 4.0)),
    ("exp", Value.exp, math.exp, (-2.0, 0.5)),
    ("log", Value.log, math.log, (0.3, 4.0)),
    ("tanh", Value.tanh, math.tanh, (-2.0, 0.5)),
    ("relu", Value.relu, lambda x: max(0.0, x), (-2.0, 0.5)),
    ("sigmoid", Value.sigmoid, lambda x: 1 / (1 + math.exp(-x)), (-2.0, 0.5)),
]


@pytest.mark.parametrize("name, ours, plain, points", OPERATIONS, ids=[row[0] for row in OPERATIONS])
def test_each_operation_has_the_slope_that_nudging_its_input_shows(name, ours, plain, points):
    """Each operation's value is Python's own, and its slope is what a small nudge of its input shows."""
    for point in points:
        x = Value(point)
        result = ours(x)
        result.backward()
        assert result.data == pytest.approx(plain(point), rel=1e-12), f"{name} at {point}: wrong value"
        nudged = (plain(point + 1e-6) - plain(point - 1e-6)) / 2e-6
        assert x.grad == pytest.approx(nudged, rel=1e-7, abs=1e-8), f"{name} at {point}: wrong slope"


def random_graph(rng: random.Random) -> tuple[list, list, Value, torch.Tensor]:
    """The same random expression in both engines: nodes used once, many times or as both operands of one operation."""
    numbers = [rng.uniform(-2, 2) for _ in range(rng.randint(1, 4))]
    ours = [Value(number) for number in numbers]
    theirs = [torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in numbers]
    steps = [
        lambda a, b: a + b,
        lambda a, b: a - b * 0.5,
        lambda a, b: a * b.tanh(),
        lambda a, b: a / (b * b + 1.0),
        lambda a, b: (a.tanh() + 1.5) ** b.tanh(),
        lambda a, b: a.relu() - b,
        lambda a, b: (a * a + 0.5).log() + b,
        lambda a, b: a.sigmoid() * 2.0 - 1.0 / (b.tanh() + 2.0),
        lambda a, b: (1.0 - a.tanh()).exp(),
        lambda a, b: (b * b + 0.1).sqrt() + a**3 * 0.1,
        lambda a, b: 2.0 ** a.tanh() - b,
    ]
    for _ in range(rng.randint(3, 30)):
        step = rng.choice(steps)
        i, j = (rng.randrange(max(0, len(ours) - 6), len(ours)) for _ in "ab")
        # Squashed now and then, or thirty products in a row leave the range of floats.
        ours.append((step(ours[i], ours[j]) * 0.3).tanh() if len(ours) % 3 == 0 else step(ours[i], ours[j]))
        theirs.append((step(theirs[i], theirs[j]) * 0.3).tanh() if len(theirs) % 3 == 0 else step(theirs[i], theirs[j]))
    ends = rng.sample(range(len(ours)), k=min(3, len(ours))) + [len(ours) - 1]
    return ours, theirs, sum(ours[i] for i in ends), sum(theirs[i] for i in ends)


def test_random_graphs_have_torchs_values_and_gradients():
    """On 200 random expressions with shared nodes, every value and every gradient, inside too, is torch's."""
    rng, shared = random.Random(0), 0
    for index in range(200):
        ours, theirs, our_loss, their_loss = random_graph(rng)
        for node in theirs:
            node.retain_grad()
        our_loss.backward()
        their_loss.backward()
        assert our_loss.data == pytest.approx(their_loss.item(), rel=1e-9, abs=1e-9), f"graph {index}: wrong value"
        for i, (mine, torchs) in enumerate(zip(ours, theirs, strict=True)):
            expected = 0.0 if torchs.grad is None else torchs.grad.item()
            assert mine.grad == pytest.approx(expected, rel=1e-7, abs=1e-9), (
                f"graph {index}, node {i}: {mine.grad} is not d loss / d node = {expected}"
            )
        uses = [id(source) for node in topological_order(our_loss) for source in node.inputs]
        shared += len(uses) > len(set(uses))
    assert shared == 200, "every graph should have shared nodes, or the test is too easy"


def test_a_node_used_twice_adds_the_slopes_of_both_paths():
    """A node that is used twice gets the sum of what both uses send back."""
    x = Value(3.0)
    (x * x + x).backward()
    assert x.grad == 7.0, f"d(x^2 + x)/dx at 3 is 2x + 1 = 7, not {x.grad}: `=` for `+=` keeps only the last path"
    x = Value(3.0)
    (x + x).backward()
    assert x.grad == 2.0, f"d(x + x)/dx is 2, not {x.grad}: both operands are the same node, and both count"
    a, b = Value(-2.0), Value(3.0)
    d = a * b  # -6
    e = a + b  # 1
    (d * e).backward()
    # by hand: f = ab(a + b) = a^2 b + a b^2, so df/da = 2ab + b^2 = -12 + 9 and df/db = a^2 + 2ab = 4 - 12
    assert (a.grad, b.grad) == (-3.0, -8.0), f"two nodes, each used in d and in e: got {a.grad} and {b.grad}"


def test_a_node_waits_for_its_longest_path():
    """A node passes its gradient on only when all paths to it, short and long, have arrived."""
    x = Value(2.0)
    shared = x * 3.0
    long_way = ((shared * 5.0 + 1.0) * 1.0 + 1.0) * 1.0
    (shared + long_way).backward()
    assert shared.grad == 6.0, f"1 by the short way + 5 by the long way, not {shared.grad}"
    assert x.grad == 18.0, (
        f"d loss / d x is 3 * (1 + 5) = 18, not {x.grad}: `shared` was visited before its long path came back, "
        "so the order is not topological"
    )
    x = Value(2.0)
    shared = x * 3.0
    long_way = ((shared * 5.0 + 1.0) * 1.0 + 1.0) * 1.0
    (long_way + shared).backward()
    assert x.grad == 18.0, f"the order of the operands changed the gradient to {x.grad}"


def test_the_order_lists_each_node_once_and_inputs_first():
    """The topological order has each node once, after all of its inputs."""
    nodes = [Value(1.0)]
    rng = random.Random(1)
    for _ in range(300):
        nodes.append(rng.choice(nodes) + rng.choice(nodes[-3:]))
    order = topological_order(nodes[-1])
    place = {id(node): i for i, node in enumerate(order)}
    assert len(place) == len(order), "a node stands in the order twice: its gradient would be passed on twice"
    for node in order:
        for source in node.inputs:
            assert place[id(source)] < place[id(node)], "a node stands before one of its inputs"


def test_many_paths_cost_no_more_than_their_nodes():
    """Eighteen doublings make 262,144 paths through 19 nodes: the gradient counts paths, the work counts nodes."""
    x = total = Value(1.0)
    for _ in range(18):
        total = total + total
    visited = len(topological_order(total))
    assert visited == 19, f"{visited} visits for 19 nodes: nodes already seen are walked again, path by path"
    total.backward()
    assert x.grad == 2.0**18, f"x reaches the sum along 2 ** 18 paths, its gradient says {x.grad}"


def chain(length: int) -> tuple[Value, Value]:
    x = total = Value(0.5)
    for _ in range(length):
        total = total + 1.0
    return x, total


def test_backward_takes_time_in_proportion_to_the_graph():
    """Four times the chain takes about four times as long, not sixteen."""

    def seconds(length: int) -> float:
        _, total = chain(length)
        begin = time.process_time()  # of this process alone: what else runs on the machine does not count
        total.backward()
        return time.process_time() - begin

    gc.collect()
    gc.disable()  # its pauses would be measured along
    try:
        short, long = (min(seconds(length) for _ in range(5)) for length in (1_000, 4_000))
    finally:
        gc.enable()
    assert long < 10 * short, (
        f"{long / short:.1f} times the time for 4 times the nodes: something in backward looks at every node for each "
        "node, as `in` does on a list"
    )


def test_a_chain_of_100000_nodes_flows_back_and_is_freed():
    """A chain of 100,000 nodes works: backward without recursion, freed at once without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is Value for thing in gc.get_objects())
        x, total = chain(100_000)
        assert total.data == 100_000.5, f"0.5 and 100,000 times 1 is 100,000.5, not {total.data}"
        total.backward()
        assert x.grad == 1.0, f"each link has slope 1, and so has the chain: got {x.grad}"
        del x, total
        left = sum(type(thing) is Value for thing in gc.get_objects()) - before
        assert left == 0, f"{left} nodes outlive the graph: something in them refers back to what uses them"
    finally:
        gc.enable()


def test_backward_twice_adds_up_on_leaves_as_in_torch():
    """Calling backward again adds to the leaves, exactly as torch does, on one loss or on two that share nodes."""

    def losses(a, b):
        shared = a * b + a
        return (shared.tanh() * 2.0), (shared * shared)

    a, b = Value(0.4), Value(-0.7)
    ta, tb = (torch.tensor(v.data, dtype=torch.float64, requires_grad=True) for v in (a, b))
    first, second = losses(a, b)
    torch_first, torch_second = losses(ta, tb)
    for ours, theirs in ((first, torch_first), (first, torch_first), (second, torch_second)):
        ours.backward()
        theirs.backward(retain_graph=True)
        assert a.grad == pytest.approx(ta.grad.item(), rel=1e-12), (
            f"{a.grad} is not {ta.grad.item()}: what an earlier call left on inner nodes was sent down again"
        )
        assert b.grad == pytest.approx(tb.grad.item(), rel=1e-12), f"{b.grad} is not {tb.grad.item()}, the other leaf's"
    a.zero_grad()
    first.backward()
    assert a.grad == pytest.approx((1 - math.tanh(-0.28 + 0.4) ** 2) * 2 * 0.3), "after zero_grad a fresh gradient"
    leaf = Value(5.0)
    leaf.backward()
    leaf.backward()
    assert leaf.grad == 2.0, "a leaf is its own result, with slope 1 each time"


# What is asked, the error it must raise, the word that its message must have, and what is wrong with an answer.
REFUSED = {
    "log 0": (lambda: Value(0.0).log(), ValueError, "positive", "log 0 is -inf, and the loss inf or nan"),
    "log -1": (lambda: Value(-1.0).log(), ValueError, "positive", "no power of e is negative"),
    "log nan": (lambda: Value(math.nan).log(), ValueError, "positive", "nan is not positive, and not `<= 0` either"),
    "root of -8": (lambda: Value(-8.0) ** (1 / 3), ValueError, "real", "what Python gives is a complex number"),
    "-8 ** Value": (lambda: Value(-8.0) ** Value(2.0), ValueError, "positive", "x ** y needs log x, and x is -8"),
    "Value / 0": (lambda: Value(1.0) / Value(0.0), ZeroDivisionError, "zero", "1 / 0 has no answer"),
    "number / 0": (lambda: 1 / Value(0.0), ZeroDivisionError, "zero", "1 / 0 has no answer"),
    "Value / plain 0": (lambda: Value(1.0) / 0, ZeroDivisionError, "zero", "1 / 0 has no answer"),
    "0 ** -2": (lambda: Value(0.0) ** -2, ZeroDivisionError, "zero", "0 ** -2 is 1 / 0"),
    "exp 1000": (lambda: Value(1000.0).exp(), OverflowError, "maximum", "e ** 1000 fits into no float"),
    "1 / 1e-200": (lambda: Value(1e-200) ** -1, OverflowError, "float", "the slope, -1e400, fits into no float"),
    "dot, lengths": (lambda: dot([Value(1.0)], [1.0, 2.0]), ValueError, "length", "the second input was dropped"),
    "dot, nothing": (lambda: dot([], []), ValueError, "length", "a sum of nothing has no weights to learn"),
    "class -1": (lambda: cross_entropy([0.0, Value(1.0)], -1), ValueError, "index", "-1 was read as the last class"),
    "class 2 of 2": (lambda: cross_entropy([0.0, Value(1.0)], 2), ValueError, "index", "the classes are 0 and 1"),
}


@pytest.mark.parametrize("action, error, word, wrong", REFUSED.values(), ids=REFUSED)
def test_what_has_no_answer_is_refused_with_a_reason(action, error, word, wrong):
    """Logarithms of zero, roots of negatives, division by zero, overflow and impossible classes say what is wrong."""
    with pytest.raises(error, match=word):
        answer = action()
        pytest.fail(f"not refused but answered with {answer}: {wrong}")


def test_a_value_holds_one_real_number():
    """Texts, lists, arrays and complex numbers are refused, by Value and by its operators."""
    x = Value(1.0)
    for wrong in ("3", [1.0], None, np.ones(2), 1j):
        actions = (Value, x.__add__, x.__mul__, x.__pow__, x.__lt__)
        for action in actions:
            with pytest.raises(TypeError):
                answer = action(wrong)
                pytest.fail(f"{action.__name__} of {wrong!r} is not refused but gives {answer!r}")
    with pytest.raises(TypeError):
        pytest.fail(f"a Value inside a Value is not refused: {Value(x)!r} starts a new graph without saying so")
    with pytest.raises(TypeError):
        pytest.fail(f"array * Value is not refused: numpy made {np.ones(3) * x!r}, an array of nodes")


def test_extreme_inputs_stay_finite():
    """tanh, sigmoid and cross-entropy of huge inputs neither overflow nor turn into nan; slopes at 0 are torch's."""
    for x in (-1000.0, 1000.0):
        for ours, limit in ((Value.tanh, math.copysign(1, x)), (Value.sigmoid, float(x > 0))):
            leaf = Value(x)
            result = ours(leaf)
            result.backward()
            assert (result.data, leaf.grad) == (limit, 0.0), f"{ours.__name__}({x}) is saturated: {limit}, slope 0"
    for exponent in (0, 0.5, 1, 2, 3):
        ours, theirs = Value(0.0), torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        (ours**exponent).backward()
        (theirs**exponent).backward()
        assert ours.grad == theirs.grad.item(), f"slope of x ** {exponent} at 0: {ours.grad}, torch {theirs.grad}"
    tiny = Value(1e-320)
    (tiny**0).backward()
    assert tiny.grad == 0.0, "x ** 0 is 1 for every x, however small: its slope is 0"
    assert math.isnan(Value(math.nan).relu().data), "relu must not hide a nan"


@pytest.mark.parametrize("scale", [1.0, 50.0, 2000.0])
def test_cross_entropy_is_torchs_for_small_and_huge_logits(scale):
    """Cross-entropy and its gradient (probability minus one-hot) are torch's, for logits up to thousands."""
    rng = random.Random(2)
    for size in (2, 5):
        numbers = [rng.uniform(-scale, scale) for _ in range(size)]
        for target in range(size):
            ours = [Value(number) for number in numbers]
            theirs = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
            loss = cross_entropy(ours, target)
            loss.backward()
            expected = F.cross_entropy(theirs[None], torch.tensor([target]))
            expected.backward()
            assert loss.data == pytest.approx(expected.item(), rel=1e-12, abs=1e-12), (
                f"logits {numbers}, target {target}: not log(sum of e ** logit) - logits[target]"
            )
            assert [v.grad for v in ours] == pytest.approx(theirs.grad.tolist(), abs=1e-12), (
                f"logits {numbers}, target {target}: the gradient is softmax, less 1 at the target"
            )
    z = Value(0.0)
    cross_entropy([0.0, z], 1).backward()
    assert z.grad == -0.5, f"at logit 0 both classes have probability 1/2, so the slope is 1/2 - 1, not {z.grad}"


def test_dot_is_the_sum_of_products_with_its_slopes():
    """dot(w, x) has the value and the gradients of w1 x1 + ... + wn xn, also when one node stands on both sides."""
    numbers = [0.5, -1.5, 2.0]
    w, x = [Value(n) for n in numbers], [Value(n + 1) for n in numbers]
    result = dot(w, x)
    result.backward()
    tw = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    tx = (tw.detach() + 1).requires_grad_()
    (tw @ tx).backward()
    assert result.data == (tw @ tx).item(), f"0.5 * 1.5 - 1.5 * -0.5 + 2 * 3 is 7.5, not {result.data}"
    assert [v.grad for v in w] == tw.grad.tolist(), "the slope for a weight is its input"
    assert [v.grad for v in x] == tx.grad.tolist(), "the slope for an input is its weight"
    v = Value(3.0)
    dot([v, v], [v, 2.0]).backward()
    assert v.grad == 8.0, f"d(v^2 + 2v)/dv at 3 is 8, not {v.grad}"


def test_values_compare_by_number_and_are_told_apart_by_identity():
    """`<` compares numbers, so max() and sorted() work; two nodes with the same number remain two nodes."""
    a, b = Value(1.0), Value(2.0)
    assert a < b and b > a and not b < a and not a > b, "1 is below 2, and 2 is not below 1"
    assert a <= 1 and a >= 1.0 and not a < 1 and not a > 1, "equal numbers: `<=` and `>=` hold, `<` and `>` do not"
    assert 0 < a and not b <= a, "a plain number may stand on either side"
    assert max([a, b, Value(-1.0)]) is b and sorted([b, a]) == [a, b], "max and sorted go by the numbers"
    assert Value(1.0) != a and len({a, b, Value(1.0)}) == 3, "equal numbers must not merge two nodes into one"


def test_numpy_numbers_mix_with_values():
    """numpy scalars work on either side and give a Value, not an array of objects."""
    x = Value(3.0)
    for result in (np.float64(2.0) * x, x * np.float32(2.0), np.int64(2) * x):
        assert type(result) is Value and result.data == 6.0, f"2 * 3 gave {result!r}: numpy took the Value apart"
    held = type(Value(np.float32(0.5)).data)
    assert held is float, f"a Value holds Python's float, not {held.__name__}: sums of a numpy float32 lose digits"
    assert np.float64(2.0) < x, "numpy's 2.0 is below a Value of 3"


def test_a_value_shows_its_number_and_its_gradient():
    """A Value that is printed shows its number and its gradient."""
    x = Value(1.5)
    (x * 4.0).backward()
    assert "1.5" in repr(x) and "4" in repr(x), f"1.5 with gradient 4 is printed as {x!r}"


def test_the_example_in_the_docstring_is_true():
    """The worked example at the top of engine.py prints what it says."""
    failed, tried = doctest.testmod(engine)
    assert tried >= 3 and failed == 0, "the example in engine.py's docstring is wrong"
