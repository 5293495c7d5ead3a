"""Backpropagation by hand through one neuron, each number beside the engine's and a finite difference.

    uv run stages run 01 demos/by_hand.py
    uv run stages run 01 demos/by_hand.py --w 0.3 --x -1

The neuron t = tanh(w x + b) should say 1; its loss is the squared error plus a penalty on large weights:

    p = w x      z = p + b      t = tanh(z)      e = t - 1      loss = e^2 + 0.1 w^2

Three ways to the same slopes. By hand: the chain rule, one line a variable, from the loss back. The engine: `Value`.
Finite difference: no calculus at all, every variable is nudged by 0.00001 up and down and the loss is computed again.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say, table
from shared.program import run_program

from engine import Value

NUDGE = 1e-5  # smaller is not better: the loss has 16 digits, and the difference keeps only those that changed
STEP = 0.1  # the learning rate of the one step at the end


def expression(w: float, x: float, b: float) -> dict[str, Value]:
    """Every variable of the example as a Value, by name; `loss` is the last."""
    v = {"w": Value(w), "x": Value(x), "b": Value(b)}
    v["p"] = v["w"] * v["x"]
    v["z"] = v["p"] + v["b"]
    v["t"] = v["z"].tanh()
    v["e"] = v["t"] - 1.0
    v["loss"] = v["e"] ** 2 + 0.1 * v["w"] ** 2
    for name, value in v.items():
        value.label = name
    return v


def loss_with(w: float, x: float, b: float, nudged: str = "", nudge: float = 0.0) -> float:
    """The loss in plain floats, with `nudge` added to the one variable called `nudged` where it arises."""

    def arises(name: str, number: float) -> float:
        return number + nudge if name == nudged else number

    w, x, b = arises("w", w), arises("x", x), arises("b", b)
    p = arises("p", w * x)
    z = arises("z", p + b)
    t = arises("t", math.tanh(z))
    e = arises("e", t - 1.0)
    return arises("loss", e**2 + 0.1 * w**2)


def by_hand(w: float, x: float, b: float) -> dict[str, tuple[str, float]]:
    """d loss / d variable for each variable, in the order in which one works them out, with the rule used."""
    t = math.tanh(w * x + b)
    e = t - 1.0
    d_loss = 1.0
    d_e = 2.0 * e * d_loss
    d_t = 1.0 * d_e
    d_z = (1.0 - t**2) * d_t
    d_p = 1.0 * d_z
    d_b = 1.0 * d_z
    d_x = w * d_p
    d_w = x * d_p + 0.2 * w * d_loss  # w has two paths to the loss: through p, and through the penalty
    return {
        "loss": ("1", d_loss),
        "e": ("2 e d_loss", d_e),
        "t": ("1 d_e", d_t),
        "z": ("(1 - t^2) d_t", d_z),
        "p": ("1 d_z", d_p),
        "b": ("1 d_z", d_b),
        "x": ("w d_p", d_x),
        "w": ("x d_p + 0.2 w", d_w),
    }


def central_difference(f: Callable[[float], float]) -> float:
    """(f(h) - f(-h)) / 2h: the slope of f at 0, off by a multiple of h ** 2."""
    return (f(NUDGE) - f(-NUDGE)) / (2.0 * NUDGE)


def finite(text: str) -> float:
    """A number from the command line that tanh and the square can bear."""
    number = float(text)
    if not abs(number) <= 1000.0:
        raise argparse.ArgumentTypeError(f"{text} must lie between -1000 and 1000")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n")[0])
    for name, default, meaning in (("w", -2.0, "weight"), ("x", 0.5, "input"), ("b", 1.5, "bias")):
        parser.add_argument(f"--{name}", type=finite, default=default, help=f"the {meaning} (default: %(default)s)")
    args = options.parse(parser, argv)
    at = (args.w, args.x, args.b)

    values = expression(*at)
    values["loss"].backward()
    rows, worst = [], 0.0
    for name, (rule, hand) in by_hand(*at).items():
        difference = central_difference(lambda h, name=name: loss_with(*at, name, h))
        engine = values[name].grad
        worst = max(worst, abs(hand - engine))
        rows.append(
            {
                "variable": name,
                "value": f"{values[name].data:.6f}",
                "slope": f"d_{name}",
                "rule": rule,
                "by hand": f"{hand:.6f}",
                "engine": f"{engine:.6f}",
                "nudged": f"{difference:.6f}",
            }
        )
    table("From the loss back to the weight", rows)
    say("w has two paths to the loss, through p and through the penalty: it gets the sum of what both bring.")
    say(f"Largest difference between hand and engine: {worst:.1e}.")
    before = loss_with(*at)
    after = loss_with(args.w - STEP * values["w"].grad, args.x, args.b - STEP * values["b"].grad)
    say(f"One step against the slope, w -= {STEP} d_w and b -= {STEP} d_b: the loss goes {before:.6f} -> {after:.6f}.")


if __name__ == "__main__":
    run_program(main)
