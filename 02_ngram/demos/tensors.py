"""The tensor operations that the rest of the course uses, each with the result it prints.

    uv run stages run 02 demos/tensors.py

Each `# %%` starts a cell: VS Code runs one with Shift+Enter and shows what it prints. Change a cell and run it again.
"""

# %%
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say
from shared.program import run_program

import torch
import torch.nn.functional as F

# Python sets `sys.ps1`, its prompt, where somebody types: in a terminal, in a notebook, and where cells are run.
CELLS = __name__ == "__main__" and hasattr(sys, "ps1")
PARTS = []


def part(function):
    """Mark one part of the demo. A cell shows its part at once, the script shows all of them in turn."""
    PARTS.append(function)
    if CELLS:
        function()
    return function


def title(text: str):
    say(f"\n{text}\n{'-' * len(text)}")


def show(code: str, value, note: str = ""):
    """An expression, why it matters, and what it gives, as at Python's prompt."""
    text = str(value.detach()) if isinstance(value, torch.Tensor) else str(value)
    if text.startswith("tensor("):
        text = text.removeprefix("tensor(").removesuffix(")").replace("\n       ", "\n")
    say(f">>> {code}" + (f"  # {note}" if note else "") + f"\n{text}")


# %%
@part
def shapes():
    title("1. A tensor is numbers, a shape and a type")
    x = torch.arange(6).view(2, 3)
    show("x", x)
    show("x.shape", tuple(x.shape), "2 rows of 3")
    show("x.dtype", x.dtype, "token ids and counts: 64-bit integers")
    show("torch.zeros(2).dtype", torch.zeros(2).dtype, "scores and weights: 32-bit floats")
    show("(x / 2).dtype", (x / 2).dtype, "integers divided by a number become 32-bit floats")
    show("x[1, 2].item()", x[1, 2].item(), "a plain Python number again")


# %%
@part
def indexing():
    title("2. Indexing")
    x = torch.arange(6).view(2, 3)
    show("x", x)
    show("x[:, -1]", x[:, -1], "the newest token of every context")
    show("x[x > 2]", x[x > 2], "where the mask is true")
    table = torch.tensor([[0.0, 0.1], [1.0, 1.1], [2.0, 2.1]])
    rows = torch.tensor([2, 0, 2])
    show("table", table)
    show("rows", rows)
    show("table[rows]", table[rows], "a row for each token: all that an embedding does")


# %%
@part
def broadcasting():
    title("3. Broadcasting: shapes are lined up from the right, and an axis of size 1 is repeated")
    x = torch.arange(6).view(2, 3)
    show("x + torch.tensor([10, 20, 30])", x + torch.tensor([10, 20, 30]), "[2, 3] + [3]")
    show("x + torch.tensor([[10], [20]])", x + torch.tensor([[10], [20]]), "[2, 3] + [2, 1]")
    square = torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    show("square", square)
    show("square / square.sum(1, keepdim=True)", square / square.sum(1, keepdim=True), "[2, 2] / [2, 1]: rows sum to 1")
    show("square / square.sum(1)", square / square.sum(1), "[2, 2] / [2]: the trap. No row sums to 1, and no error")


# %%
@part
def memory():
    title("4. One memory, many shapes")
    x = torch.arange(6)
    y = x.view(2, 3)
    y[0, 0] = 100
    show("y", y, "x.view(2, 3), and then y[0, 0] = 100")
    show("x", x, "a view shares memory: writing to one changes the other")
    show("y.stride()", y.stride(), "steps in memory to the next row, and to the next column")
    show("y.T.stride()", y.T.stride(), "transposing moves nothing, it swaps the steps")
    show("y.T.is_contiguous()", y.T.is_contiguous(), "so .view cannot flatten it")
    show("y.T.reshape(6)", y.T.reshape(6), "reshape copies where it must")
    show("y.T.contiguous().view(6)", y.T.contiguous().view(6), "the same, said aloud")


# %%
@part
def windows():
    title("5. Windows of a text")
    text = torch.arange(5)
    rows = text.unfold(0, 3, 1)  # size 3, step 1
    show("text", text)
    show("rows", rows, "text.unfold(0, 3, 1)")
    show("rows.stride()", rows.stride(), "a view again: five numbers in memory, not nine")
    show("rows[:, :-1]", rows[:, :-1], "contexts")
    show("rows[:, -1]", rows[:, -1], "targets")


# %%
@part
def counting():
    title("6. Counting")
    tokens = torch.tensor([3, 1, 3, 3, 1])
    show("tokens", tokens)
    keys, counts = tokens.unique(return_counts=True)
    show("keys", keys, "what occurs, sorted")
    show("counts", counts, "how often")
    queries = torch.tensor([3, 2])
    show("queries", queries)
    show("torch.searchsorted(keys, queries)", torch.searchsorted(keys, queries), "where 3 is, and where 2 would be")
    groups = tokens // 2
    show("groups", groups, "tokens // 2")
    show("torch.zeros(2, dtype=torch.long).index_add(0, groups, tokens)",
         torch.zeros(2, dtype=torch.long).index_add(0, groups, tokens), "1 + 1 and 3 + 3 + 3: sums by group")


# %%
@part
def loss():
    title("7. From scores to a loss")
    logits = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    targets = torch.tensor([1, 0])
    probs = logits.softmax(dim=1)
    show("logits", logits)
    show("targets", targets)
    show("probs", probs, "e^score, divided by the sum of its row")
    show("probs.gather(1, targets[:, None])", probs.gather(1, targets[:, None]), "from each row its target's entry")
    show("-probs.gather(1, targets[:, None]).log().mean()", -probs.gather(1, targets[:, None]).log().mean(), "the loss")
    show("F.cross_entropy(logits, targets)", F.cross_entropy(logits, targets), "the same from the scores, in one step")


# %%
@part
def gradients():
    title("8. Gradients")
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    show("w", w)
    (w**2).sum().backward()
    show("w.grad", w.grad, "after (w**2).sum().backward(): 2 w")
    (w**2).sum().backward()
    show("w.grad", w.grad, "after another: the trap, gradients add up until they are forgotten")
    w.grad = None
    (3 * w).sum().backward()
    show("w.grad", w.grad, "after w.grad = None and (3 * w).sum().backward()")
    with torch.no_grad():  # a step is not part of what is differentiated
        w -= 0.1 * w.grad
    show("w", w, "after w -= 0.1 * w.grad: one step against the gradient")


# %%
@part
def matrices():
    title("9. Matrix products")
    a, b = torch.arange(6).view(2, 3), torch.arange(3).view(3, 1)
    show("a", a)
    show("b", b)
    show("a @ b", a @ b, "[2, 3] @ [3, 1] -> [2, 1]")
    stack = torch.ones(5, 2, 3)
    show("(stack @ stack.transpose(1, 2)).shape", tuple((stack @ stack.transpose(1, 2)).shape), "five products at once")


# %%
def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    for function in PARTS:
        function()


if __name__ == "__main__" and not CELLS:
    run_program(main)
