"""Thinking without writing: one block that is applied again and again, and each time knows of one more letter.

    uv run stages run 12 demos/looped.py
    uv run stages run 12 demos/looped.py --loops 6 --seed 2 --name two

A text is a row of bits, and the task is to tell at each bit: is the number of ones up to here odd?

    bits   1 0 1 1 0 1
    odd    1 1 0 1 1 0

The answer depends on all bits so far, and a guess is right half of the time. In the block, each place sees itself and
the one before it, no more. So after r loops a place knows of the r places before it and of none further back: bit
r + 1 can be told with r loops, and bit r + 2 cannot, however the block was trained. More loops provably help.

Nothing is written down on the way. What is thought stands in the vectors, and the same weights think for as long as
they are told to, also longer than in training. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning: A
Recurrent Depth Approach" (2025).
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from demos.small import fit
from model import GPT, ModelConfig

START = 2  # the token before the first bit


@dataclass
class Scale:
    """How large everything is. Raises BadInput for a size that cannot be."""

    steps: int = 600  # of training
    batch_size: int = 64  # texts of a step
    loops: int = 8  # most loops of training, and the bits of its texts
    n_embd: int = 64  # channels
    test: int = 1000  # texts to test with, of three times as many bits

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise BadInput(f"--{name.replace('_', '-')} {value}: it must be at least 1")


class Looped(GPT):
    """One block, applied `loops` times. Each time it gets its own output, and the text once more.

    In training, noise is added in between. A state that is to survive it must be one that the block leads back to, and
    such a state survives more loops than were ever trained.
    """

    loops, noise = 1, 0.5

    def features(self, idx, cache=None, pad=None, last=None, look=None):
        text = self.tok_emb(idx)  # [B, T, C]
        look, h = self.look(idx.shape[1], device=idx.device), torch.zeros_like(text)
        for _ in range(self.loops):
            if self.training:
                h = h + self.noise * torch.randn_like(h)
            h = self.norm(self.blocks[0](h + text, look))  # of the same size after each loop, however many there are
        return h


def looped(scale: Scale, device) -> Looped:
    """A new model, in whose block each place sees itself and the one before."""
    config = ModelConfig(3, 4 * scale.loops, scale.n_embd, n_head=4, n_kv_head=4, n_layer=1, window=2)
    model = Looped(config).to(device)
    torch.nn.init.ones_(model.norm.weight)  # GPT's 0.1 is for scores; here the state would all but vanish in each loop
    return model


def parity(count: int, length: int, generator, device):
    """Texts of a start and T bits [B, 1 + T], and at each bit whether the ones so far are odd in number, [B, T]."""
    bits = torch.randint(2, (count, length), generator=generator).to(device)
    return F.pad(bits, (1, 0), value=START), bits.cumsum(1) % 2


def train(model: Looped, scale: Scale, generator, device):
    """Learn from texts of `scale.loops` bits, with a drawn number of loops at each step."""

    def loss_of(step):
        ids, odd = parity(scale.batch_size, scale.loops, generator, device)
        model.loops = int(torch.randint(1, scale.loops + 1, (1,), generator=generator))
        known = model.loops + 1  # of the bits behind these, nothing can be known
        return F.cross_entropy(model(ids)[:, 1:known + 1].flatten(0, 1), odd[:, :known].flatten())

    fit(model, scale.steps, loss_of, "loops", lr=0.3)
    model.eval()


@torch.no_grad()
def by_place(model: Looped, tried: list[int], ids, odd):
    """The share of right answers at each bit, for each number of loops: [numbers, T]."""
    found = []
    for model.loops in tried:
        found.append((model(ids)[:, 1:].argmax(-1) == odd).float().mean(0).cpu())
    return torch.stack(found)


def in_pieces(tried: list[int], found) -> list[dict]:
    """The rows of the table: a number of loops each, and the share of right answers at neighbouring bits."""
    rows, first = [{"loops": r} for r in tried], 1
    for piece in found.split(math.ceil(found.shape[1] / 6), dim=1):
        for row, values in zip(rows, piece, strict=True):
            row[f"bits {first}-{first + len(values) - 1}"] = values.mean().item()
        first += piece.shape[1]
    return rows


def figure(tried: list[int], found, trained: int) -> Figure:
    """Right answers by bit, a line for each number of loops; a mark where the texts of training end."""
    fig = Figure(figsize=(7, 3), layout="constrained")
    axes = fig.subplots()
    for r, row in zip(tried, found.tolist(), strict=True):
        axes.plot(range(1, len(row) + 1), row, marker=".", label=f"{r} loops")
    axes.axvline(trained, color="gray", linestyle=":", label="trained up to here")
    axes.set(xlabel="bit of the text", ylabel="share of right answers", ylim=(0.4, 1.03))
    axes.legend(fontsize=7)
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--name", default="looped", help="the run's folder under out/ (default: looped)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, Scale)
    args = parser.parse_args(argv)
    scale, device = options.build(Scale, args), setup(args.device, args.seed)
    model, generator = looped(scale, device), torch.Generator().manual_seed(args.seed)
    with RunLog(__file__, args.name, vars(args)) as log:
        train(model, scale, generator, device)
        tried = sorted({1, 2, *(max(1, scale.loops * quarters // 4) for quarters in (2, 4, 6, 8, 12))})
        found = by_place(model, tried, *parity(scale.test, 3 * scale.loops, generator, device))
        rows = in_pieces(tried, found)
        table(f"Right answers by bit; trained with 1 to {scale.loops} loops, on {scale.loops} bits", rows)
        file = log.figure(figure(tried, found, scale.loops), "looped")
        log.finish(rows=rows, by_place=found)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
