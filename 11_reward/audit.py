"""Can a reward model be trusted? The checks that should stand before any training on its scores.

    uv run python reward.py && uv run python audit.py
    uv run python audit.py --name shortcut

1. How many held-out pairs does it rank right, and how many could it? Labels of which a tenth is wrong cannot be met in
   more than nine tenths of the pairs, however good the model is.
2. Is it better than a ruler? Whoever prefers the longer answer, or the shorter one, knows nothing of answers.
3. Does the method find something where there is nothing? On labels drawn by coin it must be right in half of the pairs.
4. Do its probabilities mean what they say? Of the pairs that it ranks with 80 %, it should be right in 80 %.
5. What moves the score that should not: padding, case, a suffix that says nothing?
6. What may be added to a reward without a change of what is best, and what may not?
"""

import argparse

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import torch

import checkpoint
import reward
from chat import prompt
from evaluate import interval
from hf import Opened
from preferences import both, flip, make_pairs, open_policy
from sample import evaluation

CHANGES = {"upper case": str.upper, "a full stop": lambda text: text + ".", "'indeed'": lambda text: text + " indeed",
            "said twice": lambda text: f"{text} {text}"}


def length_rule(training: list[dict], test: list[dict]) -> tuple[str, float]:
    """Which answer a ruler prefers after it has seen the training pairs, and the share of test pairs it ranks right.

    Answers of equal length are half right.
    """

    def longer(pairs):
        sizes = [[len(talk[-1]["content"]) for talk in both(each)] for each in pairs]
        return sum((a > b) + 0.5 * (a == b) for a, b in sizes) / len(sizes)

    prefers_longer = longer(training) >= 0.5
    share = longer(test)
    return ("longer", share) if prefers_longer else ("shorter", 1 - share)


def calibration(chosen, rejected, bins: int = 8) -> list[dict]:
    """How often the model is right where it is this sure: rows of equally many pairs, the least sure first.

    Sure is P = sigmoid(|difference|), from 0.5 on. A calibrated model has `right` near `sure` in each row.
    """
    sure = torch.sigmoid((chosen - rejected).abs())
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    order = sure.argsort()
    rows = []
    for part in order.chunk(bins):
        low, high = interval(right[part].sum().item(), len(part))
        row = {"sure": sure[part].mean().item(), "right": right[part].mean().item(), "low": low, "high": high}
        rows.append(row | {"pairs": len(part)})
    return rows


def calibration_error(rows: list[dict]) -> float:
    """The mean distance between how sure and how right, weighted by pairs. Naeini et al. (2015); Guo et al. (2017)."""
    return sum(row["pairs"] * abs(row["sure"] - row["right"]) for row in rows) / sum(row["pairs"] for row in rows)


def changed(pairs: list[dict], change, sides=("chosen", "rejected")) -> list[dict]:
    """The pairs with `change` done to the text of the answers on the named sides."""
    def done(side):
        return [{"role": "assistant", "content": change(side[0]["content"])}]

    return [{**each, **{side: done(each[side]) for side in sides}} for each in pairs]


def sensitivity(opened: Opened, pairs: list[dict]) -> list[dict]:
    """What changes of both answers, or of the worse one alone, do to the order of the pairs.

    `moved`: by how much scores move, as a multiple of their spread. `right`: pairs still ranked right with both
    changed. `bought`: pairs in which the change lifts the worse answer above the better one, of those ranked right.
    """
    chosen, rejected = reward.score_pairs(opened, pairs)
    spread = torch.cat([chosen, rejected]).std()
    rows = [{"change": "none", "moved": 0.0, "right": reward.accuracy(chosen, rejected), "bought": 0.0}]
    won = chosen > rejected
    for name, change in CHANGES.items():
        a, b = reward.score_pairs(opened, changed(pairs, change))
        moved = (torch.cat([a - chosen, b - rejected]).abs().mean() / spread).item()
        bought = ((b > chosen) & won).sum().item() / max(1, won.sum().item())
        rows.append({"change": name, "moved": moved, "right": reward.accuracy(a, b), "bought": bought})
    return rows


def padding_error(opened: Opened, pairs: list[dict]) -> float:
    """The largest change of a score when its conversation stands alone, or in a batch with one that is much longer."""
    talks = [talk for each in pairs[:32] for talk in both(each)]
    alone = torch.cat([reward.scores(opened, [talk]) for talk in talks])
    rows = reward.encode(opened, talks)
    ids, lengths = reward.pad_right([*rows, [1] * opened.model.config.block_size], opened.model.tok_emb.weight.device)
    with torch.no_grad(), evaluation(opened.model):
        wide = opened.model(ids, lengths)[:-1].cpu()
    return (alone - wide).abs().max().item()


def coin(policy: Opened, pairs: list[dict], test: list[dict], config: reward.RewardConfig) -> float:
    """The share of test pairs that a model ranks right which was trained on labels drawn by coin."""
    opened = reward.judge(policy, config.both_ways)
    # A seed of its own: where pairs were flipped with config.seed before, the same ones would be flipped back.
    tossed = flip(pairs, 0.5, f"{config.seed} coin")
    rows = reward.encode(opened, [talk for each in tossed for talk in both(each)])
    with progress(config.steps, "learning from coins") as bar:
        for step, loss in reward.fit(opened.model, list(zip(rows[0::2], rows[1::2], strict=True)), config):
            bar.update(step, loss=loss)
    return reward.accuracy(*reward.score_pairs(opened, test))


@torch.no_grad()
def potential_terms(opened: Opened, talk: list[dict]):
    """A term for each token of the last answer: potential(after it) - potential(before it), [N].

    The potential is the score that the model gives to what stands there so far, and 0 once the answer is over.
    """
    [ids], [before] = reward.encode(opened, [talk]), [prompt(opened, talk[:-1])]
    with evaluation(opened.model):
        h = opened.model.features(torch.tensor([ids], device=opened.model.tok_emb.weight.device))  # [1, T, C]
        so_far = opened.model.head(h)[0, :, 0]
    so_far[-1] = 0.0
    return so_far[len(before) - 1:].diff().cpu()


def shaping(opened: Opened, pairs: list[dict]) -> list[dict]:
    """What is added to the reward, and the share of pairs that keep their order.

    Every answer to a prompt gets the same from a term of the prompt alone. So it does from a potential: the terms of
    the tokens sum to potential(end) - potential(prompt), and the potential of the end is 0. A bonus for each letter
    is not the same. Ng, Harada & Russell, "Policy invariance under reward transformations" (1999).
    """
    base = dict(zip(("chosen", "rejected"), reward.score_pairs(opened, pairs), strict=True))
    ask = reward.scores(opened, [each["prompt"] for each in pairs])
    spread, rows = base["chosen"].std(), []
    for name in ("a term of the prompt", "a potential", "a bonus for each letter"):
        told = {}
        for side, scores in base.items():
            if name == "a term of the prompt":
                more = 3 * ask
            elif name == "a potential":
                more = torch.stack([potential_terms(opened, each["prompt"] + each[side]).sum() for each in pairs])
            else:
                more = 3 * spread * torch.tensor([float(len(each[side][0]["content"])) for each in pairs])
            told[side] = scores + more
        kept = (told["chosen"] > told["rejected"]) == (base["chosen"] > base["rejected"])
        rows.append({"added": name, "order kept": kept.float().mean().item()})
    return rows


def draw(found: list[dict], moved: list[dict], log):
    """The figure: how right the model is where it is how sure, and what lifts a worse answer above a better one."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(8, 3.2))
    left, right = figure.subplots(1, 2)
    x, y = ([row[name] for row in found] for name in ("sure", "right"))
    reach = [[abs(row["right"] - row[end]) for row in found] for end in ("low", "high")]
    left.plot([0.5, 1], [0.5, 1], color="grey", lw=0.8, ls=":")
    left.errorbar(x, y, yerr=reach, marker="o", ms=3, capsize=2)
    left.set(xlabel="how sure the model is", ylabel="how often it is right")
    bars = right.barh([row["change"] for row in moved[1:]], [row["bought"] for row in moved[1:]])
    right.bar_label(bars, fmt="%.3f", padding=3)
    far = max(0.05, *(1.3 * row["bought"] for row in moved))
    right.set(xlabel="pairs in which the change\nlifts the worse answer above the better one", xlim=(0, far))
    figure.tight_layout()
    log.figure(figure, "audit")


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="reward", help="a run of reward.py (default: reward)")
    parser.add_argument("--noise", type=float, default=0.1, help="share of wrong labels in check 1 (default: 0.1)")
    parser.add_argument("--steps", type=int, default=100, help="steps of learning from coins (default: 100)")
    parser.add_argument("--count", type=int, default=300, help="pairs for checks 5 and 6 (default: 300)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = parser.parse_args(argv)
    if not 0 <= args.noise <= 0.5:
        raise BadInput(f"--noise {args.noise}: it must be from 0 to 0.5")
    if min(args.steps, args.count) < 1:
        raise BadInput("--steps and --count must be at least 1")
    device = setup(args.device)
    file = run_folder(__file__, args.name) / "model.pt"
    opened, made = reward.load(file, device), argparse.Namespace(**checkpoint.read(file)["args"])
    policy = open_policy(made, device)
    training, held_out = make_pairs(made, policy)
    test = [each for pairs in held_out.values() for each in pairs]

    with RunLog(__file__, f"{args.name}-audit", vars(args)) as log:
        rows = []
        for kind, pairs in held_out.items():
            chosen, rejected = reward.score_pairs(opened, pairs)
            right = reward.accuracy(chosen, rejected)
            low, high = interval(right * len(pairs), len(pairs))
            noisy = reward.accuracy(*reward.score_pairs(opened, flip(pairs, args.noise)))
            rule, ruler = length_rule(training, pairs)
            rows.append({"pairs": kind, "right": right, "low": low, "high": high, "of noisy labels": noisy,
                         "ceiling": 1 - args.noise, f"always the {rule}": ruler})
        table("1, 2: pairs ranked right", rows)
        config = options.build(reward.RewardConfig, made, steps=args.steps, warmup=min(10, args.steps))
        coins = coin(policy, training, test, config)
        say(f"3: trained on labels drawn by coin, it ranks {coins:.3f} of the held-out pairs right (a half is honest)")
        chosen, rejected = reward.score_pairs(opened, test)
        a, b = reward.score_pairs(opened, flip(test, 1.0))
        say(f"   with every pair the wrong way round: {reward.accuracy(a, b):.3f}, "
            f"where it was {reward.accuracy(chosen, rejected):.3f}")
        sure = calibration(chosen, rejected)
        table(f"4: how sure, and how right; they differ by {calibration_error(sure):.3f} on the average", sure)
        some = test[::max(1, len(test) // args.count)]
        moved = sensitivity(opened, some)
        table("5: what is changed of the answers", moved)
        say(f"   padding moves a score by at most {padding_error(opened, some):.1e}")
        shaped = shaping(opened, some)
        table("6: what is added to the reward", shaped)
        draw(sure, moved, log)
        log.finish(coins=coins, calibration_error=calibration_error(sure), pairs=rows, changes=moved, shaping=shaped)
    say(f"saved in {log.folder}")


if __name__ == "__main__":
    run_program(main)
