"""A scalar that remembers how it was computed, so that derivatives can flow back through it.

Arithmetic on `Value`s builds a graph. Every result keeps its inputs and, for each input, the slope

    d result / d input      at the numbers at hand: how much the result moves when that input alone moves a little

`backward()` then walks the graph once, from the result to the leaves. It multiplies slopes along each path (the chain
rule) and adds where paths meet. That is all of reverse-mode automatic differentiation; the rest of this file is a list
of slopes.

    >>> a, b = Value(2.0), Value(-3.0)
    >>> loss = a * b + a  # `a` is used twice: two paths lead to it
    >>> loss.backward()
    >>> loss.data, a.grad, b.grad  # d loss / d a = b + 1, d loss / d b = a
    (-4.0, -2.0, 2.0)
"""

import math
from collections.abc import Sequence
from numbers import Real


class Value:
    """One number in a graph of numbers.

    data    the number itself
    grad    d result / d this, filled in by `result.backward()`; adds up on leaves until set back to 0
    inputs  the Values this one was computed from; empty for a leaf
    slopes  d this / d input, one float for each input
    op      what computed it ("+", "tanh"); empty for a leaf
    label   a name for drawings; you may set it

    Raises TypeError for data that is no real number: a text, an array, a complex number, another Value.
    `<`, `>`, `<=`, `>=` compare the numbers. `==` stays identity: two nodes that hold the same number are two nodes.
    """

    # Slots make a node a third smaller than a dictionary would, and faster: a step on 100 points makes 14,000 of them.
    __slots__ = ("data", "grad", "inputs", "slopes", "op", "label")

    # numpy would turn `np.float64(2.0) * value` into an array of objects; this hands the operation to __rmul__ below.
    __array_ufunc__ = None

    def __init__(
        self,
        data: float,
        inputs: tuple["Value", ...] = (),
        slopes: tuple[float, ...] = (),
        op: str = "",
        label: str = "",
    ) -> None:
        if type(data) is not float:
            if not isinstance(data, Real):
                raise TypeError(f"a Value holds one real number, not {type(data).__name__}: arrays go into a Tensor")
            data = float(data)
        self.data = data
        self.grad = 0.0
        self.inputs = inputs
        self.slopes = slopes
        self.op = op
        self.label = label

    def __repr__(self) -> str:
        return f"Value({self.data:.6g}, grad={self.grad:.6g})"

    def zero_grad(self) -> None:
        self.grad = 0.0

    # ---- primitives: a result and its slopes ----

    def __add__(self, other: "Value | float") -> "Value":
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0), "+")

    def __mul__(self, other: "Value | float") -> "Value":
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data), "*")

    def __pow__(self, exponent: "Value | float") -> "Value":
        """x ** n, slope n x ** (n - 1). An exponent that is itself a Value needs x > 0 (see `log`).

        For n = 0 the slope is 0. At x = 0 it is infinite for 0 < n < 1, as a square root leaves zero vertically.
        Raises ValueError for a fractional power of a negative number (not a real number), ZeroDivisionError for a
        negative power of zero, OverflowError when the result or its slope exceeds the largest float.
        """
        if isinstance(exponent, Value):
            return (self.log() * exponent).exp()
        x, n = self.data, Value(exponent).data
        if x < 0.0 and n % 1.0:
            raise ValueError(f"({x:g}) ** {n:g} is not a real number: the base must not be negative")
        if x == 0.0 and n < 0.0:
            raise ZeroDivisionError(f"0 ** {n:g}: division by a Value that is zero")
        try:
            if x == 0.0 and 0.0 < n < 1.0:
                slope = math.inf  # n x ** (n - 1) would divide by zero
            else:
                slope = n * x ** (n - 1.0) if n else 0.0  # x ** 0 is 1 for every x
            return Value(x**n, (self,), (slope,), f"**{n:g}")
        except OverflowError:
            raise OverflowError(f"({x:g}) ** {n:g} or its slope exceeds the largest float") from None

    def exp(self) -> "Value":
        """e ** x, its own slope. Raises OverflowError above x = 709.78, where e ** x exceeds the largest float."""
        try:
            result = math.exp(self.data)
        except OverflowError:
            raise OverflowError(f"exp({self.data:g}) exceeds the largest float: subtract the maximum first") from None
        return Value(result, (self,), (result,), "exp")

    def log(self) -> "Value":
        """The natural logarithm, slope 1 / x. Raises ValueError unless x > 0."""
        if not self.data > 0.0:
            raise ValueError(f"log({self.data:g}) is not a real number: the argument must be positive")
        return Value(math.log(self.data), (self,), (1.0 / self.data,), "log")

    def tanh(self) -> "Value":
        """Squashes to (-1, 1); slope 1 - tanh(x) ** 2, which is 0 in floats beyond |x| = 19 (a saturated neuron)."""
        result = math.tanh(self.data)  # not (e^x - e^-x) / (e^x + e^-x), which overflows at x = 710
        return Value(result, (self,), (1.0 - result * result,), "tanh")

    def relu(self) -> "Value":
        """max(0, x), nan for nan; slope 1 where x > 0, else 0 (at the kink itself any slope from 0 to 1 would do)."""
        # subtle: max(0.0, nan) is 0.0, since every comparison with nan is false; max(nan, 0.0) is nan.
        return Value(max(self.data, 0.0), (self,), (1.0 if self.data > 0.0 else 0.0,), "relu")

    # ---- derived: no slopes of their own ----

    def __neg__(self) -> "Value":
        return self * -1.0

    def __sub__(self, other: "Value | float") -> "Value":
        return self + -other

    def __truediv__(self, other: "Value | float") -> "Value":
        return self * as_value(other) ** -1

    def __radd__(self, other: float) -> "Value":
        return self + other

    def __rsub__(self, other: float) -> "Value":
        return -self + other

    def __rmul__(self, other: float) -> "Value":
        return self * other

    def __rtruediv__(self, other: float) -> "Value":
        return self**-1 * other

    def __rpow__(self, base: float) -> "Value":
        return Value(base) ** self

    def sqrt(self) -> "Value":
        return self**0.5

    def sigmoid(self) -> "Value":
        """1 / (1 + e ** -x), by way of tanh: the textbook form overflows at x = -710.

        The price: small results lose digits, and below x = -39 the result is 0.
        """
        return (self * 0.5).tanh() * 0.5 + 0.5

    def __lt__(self, other: "Value | float") -> bool:
        return self.data < as_value(other).data

    def __gt__(self, other: "Value | float") -> bool:
        return self.data > as_value(other).data

    def __le__(self, other: "Value | float") -> bool:
        return self.data <= as_value(other).data

    def __ge__(self, other: "Value | float") -> bool:
        return self.data >= as_value(other).data

    # ---- backpropagation ----

    def backward(self) -> None:
        """Adds d self / d leaf to the `grad` of every leaf, in time linear in the size of the graph.

        On leaves, gradients add up over calls, as in torch: set them to 0 before the next step of training. Every
        other node holds the gradient of the last call alone.
        """
        order = topological_order(self)
        for node in order:
            if node.inputs:
                node.zero_grad()  # else a second call would send what the first one left here down once more
        self.grad += 1.0  # d self / d self
        for node in reversed(order):
            # Everything that uses `node` has been visited, so node.grad is final. subtle: `+=`, for a node that is
            # used twice has two paths to the result, and the result moves by both.
            for source, slope in zip(node.inputs, node.slopes, strict=True):
                source.grad += slope * node.grad


def as_value(number: Value | float) -> Value:
    """`number` as a Value; a new leaf if it is a plain number. Raises TypeError for what is neither."""
    return number if isinstance(number, Value) else Value(number)


def dot(weights: Sequence[Value], xs: Sequence[Value | float]) -> Value:
    """w1 x1 + w2 x2 + ... as one node, slopes x for w and w for x; the neuron's primitive.

    Written with * and + it would take two nodes a term and give the same numbers. Raises ValueError when the lengths
    differ or are zero.
    """
    if len(weights) != len(xs) or not weights:
        raise ValueError(f"dot takes two sequences of one length, at least 1: got {len(weights)} and {len(xs)}")
    xs = [as_value(x) for x in xs]
    w_data, x_data = [w.data for w in weights], [x.data for x in xs]
    return Value(sum(w * x for w, x in zip(w_data, x_data, strict=True)), (*weights, *xs), (*x_data, *w_data), "dot")


def cross_entropy(logits: Sequence[Value | float], target: int) -> Value:
    """-log of the probability that softmax gives to `target`: log(sum of e ** logit) - logits[target].

    A single logit z beside a fixed 0 is the case of two classes: cross_entropy([0.0, z], 1) = -log sigmoid(z). Raises
    ValueError for a target that is no index into the logits.
    """
    if not 0 <= target < len(logits):
        raise ValueError(f"target {target} is no index into {len(logits)} logits")
    logits = [as_value(logit) for logit in logits]
    # e ** 1000 overflows, e ** (1000 - 1000) does not. The largest logit is taken out of the sum as a plain number: the
    # result is the same whatever is taken out, so it has no slope.
    largest = max(logit.data for logit in logits)
    return sum((logit - largest).exp() for logit in logits).log() + largest - logits[target]


def topological_order(result) -> list:
    """`result` and all it was computed from, each node once, inputs always before what uses them.

    Depth first, with a list for a stack: Python's own stack ends after about 1,000 nested calls, and a sum over a
    batch is already a chain that long. Works on any node that has `inputs`.
    """
    order, seen, stack = [], set(), [(result, False)]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))  # comes back after everything pushed now
            stack.extend((source, False) for source in node.inputs)
    return order
