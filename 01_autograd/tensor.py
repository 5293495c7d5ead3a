"""The engine again, with an array in every node instead of one number.

What stays: nodes keep their inputs, `backward()` walks them in reverse topological order and adds where paths meet.
What changes:

- A slope is no longer one number. d result / d input is a matrix with a row for every entry of the result; it would
  be huge and mostly zeros, and is never written down. Each node keeps *pullbacks* instead: functions from the gradient
  of the result to the gradient of one input, which is all that the chain rule ever asks of that matrix.
- Arrays are broadcast: a bias [16] added to a batch [100, 16] is used 100 times, so its gradient is a sum over 100
  paths. `unbroadcast` takes it.

Names and meanings are torch's (`dim`, `keepdim`, `amax`), in float64 throughout.
"""

import math
from collections.abc import Callable
from numbers import Real

import numpy as np

from engine import topological_order

Pullback = Callable[[np.ndarray], np.ndarray]


class Tensor:
    """An array in a graph of arrays.

    data       float64 array; a leaf holds a copy of what it was made from: a number, a list or an array, never a Tensor
    grad       d result / d this, same shape, filled in by `result.backward()`; adds up on leaves until set back to 0
    inputs     the Tensors this one was computed from; empty for a leaf
    pullbacks  for each input, gradient of this -> gradient of that input (before unbroadcasting)
    op, label  for drawings

    Change `data` in place only between a `backward()` and the next forward pass: pullbacks remember arrays, not copies.
    """

    __slots__ = ("data", "grad", "inputs", "pullbacks", "op", "label")
    __array_ufunc__ = None  # `array * tensor` goes to __rmul__ below instead of to numpy

    def __init__(
        self,
        data,
        inputs: tuple["Tensor", ...] = (),
        pullbacks: tuple[Pullback, ...] = (),
        op: str = "",
        label: str = "",
    ) -> None:
        if isinstance(data, Tensor):
            raise TypeError("this is a Tensor already: take its .data to start a new graph")
        # A result may be a view of its input's array (as in torch); only a leaf must not share its maker's array.
        self.data = np.asarray(data, dtype=np.float64) if inputs else np.array(data, dtype=np.float64)
        self.inputs = inputs
        self.pullbacks = pullbacks
        self.op = op
        self.label = label
        self.zero_grad()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Tensor({np.array2string(self.data, precision=4, threshold=20)}, shape={self.shape})"

    def zero_grad(self) -> None:
        self.grad = np.zeros(self.data.shape)

    def item(self) -> float:
        """The number of a tensor of one entry. Raises ValueError when there are more."""
        return self.data.item()

    # ---- elementwise primitives ----

    def __add__(self, other) -> "Tensor":
        other = as_tensor(other)
        return Tensor(self.data + other.data, (self, other), (lambda g: g, lambda g: g), "+")

    def __mul__(self, other) -> "Tensor":
        other = as_tensor(other)
        x, y = self.data, other.data
        return Tensor(x * y, (self, other), (lambda g: g * y, lambda g: g * x), "*")

    def __pow__(self, exponent) -> "Tensor":
        """x ** n for a number n. An exponent that is itself a Tensor needs x > 0 (see `log`).

        Slopes at x = 0 as in `Value.__pow__`: infinite for a root, 0 for n = 0.
        Raises ValueError for a fractional power of a negative entry, ZeroDivisionError for a negative power of zero,
        OverflowError when a result or its slope exceeds the largest float.
        """
        if not isinstance(exponent, Real):
            return (self.log() * exponent).exp()
        x, n = self.data, float(exponent)
        if n % 1.0 and (x < 0.0).any():
            raise ValueError(f"({x.min():g}) ** {n:g} is not a real number: the base must not be negative")
        if n < 0.0 and (x == 0.0).any():
            raise ZeroDivisionError(f"0 ** {n:g}: division by a Tensor with a zero in it")
        try:
            with np.errstate(divide="ignore", over="raise"):  # the slope of a square root at zero is infinite
                result, slope = x**n, n * x ** (n - 1.0) if n else np.zeros_like(x)
        except FloatingPointError:
            raise OverflowError(f"an entry ** {n:g} or its slope exceeds the largest float") from None
        return Tensor(result, (self,), (lambda g: g * slope,), f"**{n:g}")

    def exp(self) -> "Tensor":
        """Raises OverflowError above x = 709.78, where e ** x exceeds the largest float."""
        if self.data.size and self.data.max() > math.log(np.finfo(np.float64).max):
            raise OverflowError(f"exp({self.data.max():g}) exceeds the largest float: subtract the maximum first")
        result = np.exp(self.data)
        return Tensor(result, (self,), (lambda g: g * result,), "exp")

    def log(self) -> "Tensor":
        """The natural logarithm. Raises ValueError unless every entry is positive."""
        x = self.data
        if not (x > 0.0).all():
            raise ValueError(f"log({x.min():g}) is not a real number: every entry must be positive")
        return Tensor(np.log(x), (self,), (lambda g: g / x,), "log")

    def tanh(self) -> "Tensor":
        result = np.tanh(self.data)
        return Tensor(result, (self,), (lambda g: g * (1.0 - result * result),), "tanh")

    def relu(self) -> "Tensor":
        positive = self.data > 0.0
        return Tensor(np.maximum(self.data, 0.0), (self,), (lambda g: g * positive,), "relu")

    # ---- primitives that change the shape ----

    def __matmul__(self, other) -> "Tensor":
        """[..., n, k] @ [..., k, m] -> [..., n, m]; leading axes broadcast, a vector stands for one row or column.

        Raises ValueError when the two k differ.
        """
        other = as_tensor(other)
        x, y = self.data, other.data
        if not x.ndim or not y.ndim or x.shape[-1] != y.shape[-2:][0]:  # [-2:][0]: k of [..., k, m], and of [k]
            raise ValueError(f"matmul of {x.shape} and {y.shape}: the inner lengths must be equal")
        if x.ndim == 1:
            return (self.reshape(1, -1) @ other)[..., 0, :] if y.ndim > 1 else (self * other).sum()
        if y.ndim == 1:
            return (self @ other.reshape(-1, 1))[..., 0]
        # result[i, j] = sum_k x[i, k] y[k, j]: entry x[i, k] acts on row i, with weight y[k, j] in column j
        return Tensor(
            x @ y,
            (self, other),
            (lambda g: g @ y.swapaxes(-1, -2), lambda g: x.swapaxes(-1, -2) @ g),
            "@",
        )

    def sum(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> "Tensor":
        """Adds along `dim`, or everything. Every entry moves the sum by as much as it moves itself: slope 1.

        The axes in `dim` go away, or stay with length 1 if `keepdim`; other axes stay, those of length 1 too.
        """
        shape, total = self.shape, self.data.sum(axis=dim, keepdims=True)
        return Tensor(
            total if keepdim else total.squeeze(dim),
            (self,),
            (lambda g: np.broadcast_to(g.reshape(total.shape), shape),),  # the summed axes come back as 1, then stretch
            "sum",
        )

    def amax(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> "Tensor":
        """The largest entry along `dim`, or of all; axes as in `sum`. Entries that tie share its gradient equally."""
        largest = self.data.max(axis=dim, keepdims=True)
        winners = self.data == largest
        share = winners / winners.sum(axis=dim, keepdims=True)
        return Tensor(
            largest if keepdim else largest.squeeze(dim),
            (self,),
            (lambda g: g.reshape(largest.shape) * share,),
            "amax",
        )

    def reshape(self, *shape: int) -> "Tensor":
        """The same entries in the same order; one length may be -1."""
        before = self.shape
        return Tensor(self.data.reshape(shape), (self,), (lambda g: g.reshape(before),), "reshape")

    def transpose(self, dim0: int, dim1: int) -> "Tensor":
        """Swaps two axes."""
        return Tensor(self.data.swapaxes(dim0, dim1), (self,), (lambda g: g.swapaxes(dim0, dim1),), "transpose")

    def __getitem__(self, index) -> "Tensor":
        """Any numpy index: integers, slices, None, boolean masks, integer arrays.

        An entry that an integer array picks twice is used twice, so both gradients must reach it.
        """
        shape = self.shape

        def scatter(g: np.ndarray) -> np.ndarray:
            gradient = np.zeros(shape)
            np.add.at(gradient, index, g)  # subtle: `gradient[index] += g` keeps only the last of repeated indices
            return gradient

        return Tensor(self.data[index], (self,), (scatter,), "[]")

    # ---- derived ----

    def __neg__(self) -> "Tensor":
        return self * -1.0

    def __sub__(self, other) -> "Tensor":
        return self + -as_tensor(other)

    def __truediv__(self, other) -> "Tensor":
        return self * as_tensor(other) ** -1

    def __radd__(self, other) -> "Tensor":
        return self + other

    def __rsub__(self, other) -> "Tensor":
        return -self + other

    def __rmul__(self, other) -> "Tensor":
        return self * other

    def __rtruediv__(self, other) -> "Tensor":
        return self**-1 * other

    def __rpow__(self, base) -> "Tensor":
        return (as_tensor(base).log() * self).exp()

    def __rmatmul__(self, other) -> "Tensor":
        return as_tensor(other) @ self

    def sqrt(self) -> "Tensor":
        return self**0.5

    def sigmoid(self) -> "Tensor":
        """1 / (1 + e ** -x), by way of tanh: the textbook form overflows at x = -710.

        The price: small results lose digits, and below x = -39 the result is 0.
        """
        return (self * 0.5).tanh() * 0.5 + 0.5

    def mean(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> "Tensor":
        """`sum`, divided by how many entries went into each sum."""
        total = self.sum(dim, keepdim)
        return total / (self.data.size / total.data.size)

    def log_softmax(self, dim: int = -1) -> "Tensor":
        """Logarithms of probabilities that add up to 1 along `dim`.

        The maximum is subtracted as a plain array, outside the graph: it keeps exp from overflowing and cancels in the
        result, so it has no gradient to give.
        """
        shifted = self - self.data.max(axis=dim, keepdims=True)
        return shifted - shifted.exp().sum(dim, keepdim=True).log()

    def softmax(self, dim: int = -1) -> "Tensor":
        """e ** x / sum of e ** x along `dim`, by way of `log_softmax`, so that nothing overflows."""
        return self.log_softmax(dim).exp()

    # ---- backpropagation ----

    def backward(self) -> None:
        """`Value.backward` with pullbacks for slopes. Raises ValueError unless there is one entry to start from."""
        if self.data.size != 1:
            raise ValueError(f"backward starts from one number, not from shape {self.shape}: take a sum or a mean")
        order = topological_order(self)
        for node in order:
            if node.inputs:
                node.zero_grad()
        self.grad += 1.0
        for node in reversed(order):
            for source, pullback in zip(node.inputs, node.pullbacks, strict=True):
                source.grad += unbroadcast(pullback(node.grad), source.shape)


def as_tensor(data) -> Tensor:
    """`data` as a Tensor; a new leaf if it is a number, a list or an array."""
    return data if isinstance(data, Tensor) else Tensor(data)


def unbroadcast(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undoes broadcasting: adds up the gradients of all copies that were made of one entry, down to `shape`.

    numpy puts axes in front, then repeats along axes of length 1; so: sum the axes in front away, then sum along axes
    where `shape` has a 1 and keep them. [5, 4, 3] for [4, 1]: sum axis 0 -> [4, 3], sum axis 1 -> [4, 1].
    """
    if gradient.shape == shape:
        return gradient
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    stretched = tuple(axis for axis, length in enumerate(shape) if length == 1)
    return gradient.sum(axis=stretched, keepdims=True)


def cross_entropy(logits: Tensor, targets: np.ndarray) -> Tensor:
    """Mean of -log softmax(logits)[target] over a batch: logits [N, classes], targets [N] whole numbers.

    Raises ValueError unless there is one target below `classes` for each row.
    """
    targets = np.asarray(targets)
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"cross_entropy takes logits [N, classes] and N whole-number targets: got {logits.shape} and "
            f"{targets.dtype} {targets.shape}"
        )
    if targets.size and not 0 <= targets.min() <= targets.max() < logits.shape[1]:
        raise ValueError(f"targets {targets.min()} to {targets.max()} are no indices into {logits.shape[1]} classes")
    return -logits.log_softmax()[np.arange(len(targets)), targets].mean()
