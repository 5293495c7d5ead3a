"""Indirect indexing: which letter stands so many places to the left or right of another one?

    uv run stages run 07 demos/indexing.py
    uv run stages run 07 demos/indexing.py --letters 20 40 --shift 15 --questions 1 --steps 100000     # as the paper's

The task of the paper on PoPE (see `demos/positions.py`), section 4 and appendix A.1. Given a string of different
letters, one of them and a shift, the answer is the letter that many places further left (-) or right (+):

    QEOHzUDK, z -3  ->  E

To answer, a model has to find one letter by what it is and then another by where it stands. Only answers are trained
on. "accuracy" is the share of right answers on strings that were not trained on. The last two rows of the table are the
best that can be done without the one half of the question or without the other.

The paper reports 95 % with PoPE and 11 % with RoPE for 8 blocks of 512 channels after 100,000 steps, with strings of 20
to 40 letters and shifts up to 15. That is out of reach here. So this demo takes shorter strings and smaller shifts (and
never 0), a shift is one token and not a sign and digits, and in training each string comes with several questions, one
after the other with their answers. The test asks one. A run that finds out how to answer does so suddenly, and some
seeds find it much later than others: read every seed, and not the mean alone.
"""

import string
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

from demos import ablation
from demos.ablation import Scale
from demos.positions import KINDS, build
from model import GPT

LETTERS = string.ascii_letters  # a letter's place here is its token; after them come the comma and the shifts
COMMA = len(LETTERS)


def pairs(n_letters: int, shift: int) -> list[tuple[int, int]]:
    """All (place asked about, place of the answer) in a string that are 1 to `shift` apart."""
    places = range(n_letters)
    return [(i, j) for i in places for j in places if 0 < abs(j - i) <= shift]


def token(moved, shift: int):
    """The token of a shift from -shift to shift, a number or a tensor of them."""
    return COMMA + 1 + shift + moved


def examples(n_letters: int, shift: int, questions: int, count: int, generator):
    """`count` random strings of `n_letters` letters, each with different questions: x [count, T], y [count, questions].

    x is the string, a comma, then letter, shift, answer for each question, but for the last answer: T = n_letters + 3
    questions. All questions that can be asked are equally likely. The answers are y.
    """
    words = torch.rand(count, len(LETTERS), generator=generator).argsort(dim=1)[:, :n_letters]  # no letter twice
    possible = torch.tensor(pairs(n_letters, shift))  # [P, 2]
    choice = torch.rand(count, len(possible), generator=generator).argsort(dim=1)[:, :questions]  # no question twice
    source, target = possible[choice].unbind(-1)  # [count, questions] x 2
    y = words.gather(1, target)
    asked = torch.stack([words.gather(1, source), token(target - source, shift), y], dim=-1).flatten(1)
    return torch.cat([words, torch.full((count, 1), COMMA), asked[:, :-1]], dim=1), y


def stream(letters: tuple[int, int], shift: int, questions: int, batch_size: int, seed: int):
    """Batches without end. All strings of a batch are equally long, so that nothing has to be filled up."""
    generator = torch.Generator().manual_seed(seed)
    low, high = letters
    while True:
        n_letters = torch.randint(low, high + 1, (1,), generator=generator).item()
        yield examples(n_letters, shift, questions, batch_size, generator)


class Answering(GPT):
    """A GPT of which only the scores of the answers are wanted: [B, T] -> [B, questions, V]."""

    questions = 1

    def forward(self, idx):
        return super().forward(idx)[:, -1 - 3 * (self.questions - 1)::3]  # at each shift, the last token included


@torch.no_grad()
def accuracy(model, letters: tuple[int, int], shift: int, count: int = 500) -> float:
    """The share of right answers to `count` strings of each length with one question each."""
    generator, model.questions = torch.Generator().manual_seed(2**40), 1  # no run has this seed
    right = []
    for n_letters in range(letters[0], letters[1] + 1):
        x, y = examples(n_letters, shift, 1, count, generator)
        right.append((model(x).argmax(-1) == y).float().mean().item())
    return mean(right)


def guesses(letters: tuple[int, int], shift: int) -> dict[str, float]:
    """The best accuracy without one half of the question, exactly.

    Of all questions on one string, those with one shift have different answers, and so have those about one letter: a
    guess is right for one of each.
    """
    lengths = range(letters[0], letters[1] + 1)
    asked = [pairs(n, shift) for n in lengths]
    return {
        "the shift alone": mean(len({j - i for i, j in found}) / len(found) for found in asked),
        "the letter alone": mean(len({i for i, _ in found}) / len(found) for found in asked),
    }


def main(argv: list[str] | None = None) -> None:
    flags = options.Parser(description=__doc__.split("\n\n")[0])
    flags.add_argument("--letters", type=int, nargs=2, default=[6, 8], metavar=("LOW", "HIGH"),
                       help="letters of a string, at least and at most (default: 6 8)")
    flags.add_argument("--shift", type=int, default=2, help="the largest shift (default: 2)")
    flags.add_argument("--questions", type=int, default=8, help="questions on each string in training (default: 8)")
    options.add(flags, Scale, skip=("block_size",))
    flags.set_defaults(steps=1000, batch_size=64, n_head=4, n_layer=2)
    args = flags.parse_args(argv)
    low, high = letters = tuple(args.letters)
    if not 1 <= args.shift < low <= high <= len(LETTERS):
        allowed = f"choose 1 <= shift < low <= high <= {len(LETTERS)}"
        raise BadInput(f"--letters {low} {high} --shift {args.shift}: {allowed}")
    if not 1 <= args.questions <= len(pairs(low, args.shift)):
        raise BadInput(f"--questions {args.questions}: a string of {low} letters has {len(pairs(low, args.shift))}")
    scale = options.build(Scale, args, block_size=high + 3 * args.questions)
    vocab_size = token(args.shift, args.shift) + 1
    setup("cpu")
    log = RunLog(__file__, "indexing", vars(args))

    def job(kind, seed):
        def run(tick):
            model, config = build(kind, ablation.shape(scale, vocab_size), seed), ablation.recipe(scale, seed)
            model.__class__, model.questions = Answering, args.questions  # the same weights, another forward
            batches = stream(letters, args.shift, args.questions, scale.batch_size, seed)
            losses = ablation.fit(model, batches, config, ablation.make_optimizer(model, config), tick)
            return {"accuracy": accuracy(model, letters, args.shift), "losses": losses}

        return run

    jobs = {(kind, seed): job(kind, seed) for kind in KINDS for seed in range(scale.seeds)}
    results = ablation.run_all(log, jobs, scale.steps, sources=["demos/path.py", "demos/positions.py"])
    found = {kind: [results[kind, seed]["accuracy"] for seed in range(scale.seeds)] for kind in KINDS}
    rows = [
        {"positions": kind, "accuracy": mean(values), "worst": min(values), "best": max(values)}
        for kind, values in found.items()
    ]
    rows += [{"positions": f"({name})", "accuracy": value} for name, value in guesses(letters, args.shift).items()]
    table(f"share of right answers: {low} to {high} letters, shifts up to {args.shift}, {scale.steps} steps, "
          f"seeds: {scale.seeds}", rows)
    fig = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    ablation.dots(left, found, "share of right answers")
    for i, kind in enumerate(KINDS):
        for seed in range(scale.seeds):
            losses = results[kind, seed]["losses"]
            width = max(1, len(losses) // 50)
            means = [mean(losses[at:at + width]) for at in range(0, len(losses), width)]
            label = kind if seed == 0 else None
            right.plot([at * width for at in range(len(means))], means, color=f"C{i}", linewidth=0.9, label=label)
    right.set(xlabel="step", ylabel="loss of the answer, nats")
    right.legend(fontsize=8)
    ablation.done(log, fig, "indexing", rows)


if __name__ == "__main__":
    run_program(main)
