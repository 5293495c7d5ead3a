"""A reward model: a tuned language model that says how good an answer is, in one number.

    uv run python reward.py                                   # trains the policy whose answers it judges, where needed
    uv run python reward.py --data my/pairs.jsonl --policy default --name mine
    uv run python reward.py --kinds delete --name shortcut    # learns from deletions alone: see audit.py

Its head has one row instead of one for each token, and is read at the last token, <|end|>: only there the whole answer
is known. No one says how good an answer is, only which of two is better. Scores are such that

    P(chosen is better) = sigmoid(score of chosen - score of rejected)      (Bradley & Terry, 1952)

is likely. A constant added to all scores changes nothing: what they mean lies in differences.
"""

import argparse
import itertools
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from shared import options
from shared.boards import BOARDS
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import command, run_program
from shared.runlog import RunLog, read_metrics

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import hf
import sft
import train
from chat import form, ours, prompt
from evaluate import interval, text_of
from look import Look
from model import GPT, ModelConfig
from preferences import KINDS, both, make_pairs, open_policy, read_pairs
from tokenizer import from_state


class RewardModel(GPT):
    """A language model with a head of one row: conversations -> scores.

    With `both_ways`, each token looks at all others, as in an encoder (BERT). That may help to judge, but such a model
    cannot go on from a cache, and its trunk was trained to look back.
    """

    def __init__(self, config: ModelConfig, both_ways: bool = False):
        super().__init__(replace(config, tied=False))
        self.both_ways = both_ways
        self.head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.zeros_(self.head.weight)  # at first all answers are equally good, and the loss is ln 2

    def forward(self, ids, lengths):
        """Conversations ids [B, T], of which the first lengths [B] tokens of each row are real -> scores [B]."""
        h = self.features(ids, look=self.around(ids.shape[1], lengths))  # [B, T, C]
        rows = torch.arange(len(ids), device=ids.device)
        last = h[rows, lengths - 1]  # [B, C], of the last real token: what stands behind it is padding
        return self.head(last)[:, 0]

    def around(self, T: int, lengths) -> Look:
        """What each token may look at: those up to itself, or with `both_ways` all that are real.

        Padding may reach beyond the model's context, and no expert spends its time on it.
        """
        positions = torch.arange(T, device=lengths.device)[None]  # [1, T]
        real = positions < lengths[:, None]  # [B, T]
        if not self.both_ways:
            return replace(self.look(T, device=lengths.device), real=real)
        unseen = ~real[:, None, None].expand(-1, -1, T, -1)  # [B, 1, T, T]
        return Look(self.rope(positions[:, None]), unseen, real=real)


def judge(opened: hf.Opened, both_ways: bool = False) -> hf.Opened:
    """The same with a reward model, which begins with the weights of the tuned model: it can read answers already."""
    model = RewardModel(opened.model.config, both_ways).to(opened.model.tok_emb.weight.device)
    state = {name: tensor for name, tensor in opened.model.state_dict().items() if name != "head.weight"}
    model.load_state_dict(state, strict=False)
    return replace(opened, model=model)


def bradley_terry(chosen, rejected):
    """-ln P(chosen is better) = -ln sigmoid(chosen - rejected), scores [N] x 2 -> mean, nats.

    Written with `logsigmoid`: the sigmoid of -1,000 is 0, and its logarithm minus infinity.
    """
    return -F.logsigmoid(chosen - rejected).mean()


def margin_ranking(chosen, rejected, margin: float = 1.0):
    """max(0, margin - (chosen - rejected)), the mean: once a pair is apart by the margin it teaches nothing more."""
    return F.relu(margin - (chosen - rejected)).mean()


@dataclass
class RewardConfig(train.TrainConfig):
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 350  # optimiser steps
    batch_size: int = 32  # pairs per step
    lr: float = 2e-3  # highest learning rate of AdamW: embeddings, head, norms
    muon_lr: float = 0.006  # highest learning rate of Muon: the matrices inside the blocks
    warmup: int = 20  # steps over which the learning rates rise
    loss: Literal["bradley-terry", "margin"] = "bradley-terry"  # of a pair
    margin: float = 1.0  # with loss "margin": by how much the better answer's score should be higher
    centre: float = 0.01  # weight of the square of a pair's sum of scores, which keeps scores around 0
    both_ways: bool = False  # tokens look at later ones as well
    eval_every: int = 100  # steps between looks at the held-out pairs


def pair_loss(chosen, rejected, config: RewardConfig):
    """The loss of pairs by their scores [N] x 2. Centring: Eisenstein et al., "Helping or Herding?" (2023)."""
    if config.loss == "margin":
        loss = margin_ranking(chosen, rejected, config.margin)
    else:
        loss = bradley_terry(chosen, rejected)
    return loss + config.centre * (chosen + rejected).square().mean()


def encode(opened: hf.Opened, talks: list[list[dict]]) -> list[list[int]]:
    """Conversations as tokens, up to the one that ends the last answer.

    Raises BadInput for one that is too long, and for a chat template in which answers have no end.
    """
    encoded = [prompt(opened, talk, add_generation_prompt=False) for talk in talks]
    for i, ids in enumerate(encoded):
        while ids and ids[-1] not in opened.ends:  # some templates write a line break behind it
            ids.pop()
        if not ids:
            raise BadInput("with this chat template, an answer has no end: its score is read there")
        if len(ids) > opened.model.config.block_size:
            raise BadInput(f"conversation {i + 1} has {len(ids)} tokens, and the model's context "
                           f"{opened.model.config.block_size}: leave it out")
    return encoded


def pad_right(rows: list[list[int]], device=None):
    """Rows of tokens as one batch: ids [B, T], and how many of each row are real [B].

    T is a multiple of 16: for every new shape of a product, a CPU's library makes a new program.
    """
    T = math.ceil(max(map(len, rows)) / 16) * 16
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    return ids, torch.tensor([len(row) for row in rows], device=device)


@torch.no_grad()
def scores(opened: hf.Opened, talks: list[list[dict]], size: int = 128):
    """The score of each conversation, [N] on the CPU. In evaluation mode: a score does not depend on chance."""
    rows = encode(opened, talks)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = torch.empty(len(rows))
    with train.evaluation(opened.model):
        for start in range(0, len(order), size):
            part = order[start:start + size]
            batch = pad_right([rows[i] for i in part], opened.model.tok_emb.weight.device)
            found[part] = opened.model(*batch).float().cpu()
    return found


def score_pairs(opened: hf.Opened, pairs: list[dict]):
    """The scores of the chosen and of the rejected answers: [N] x 2."""
    found = scores(opened, [talk for each in pairs for talk in both(each)])
    return found[0::2], found[1::2]


def accuracy(chosen, rejected) -> float:
    """The share of pairs whose better answer has the higher score; equal scores are half right."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


def fit(model: RewardModel, rows: list[tuple[list[int], list[int]]], config: RewardConfig):
    """Train on encoded pairs. Yields (step, loss) after each step.

    Both answers of a pair go through the model in one batch. Raises BadInput for fewer pairs than a batch, and at the
    first loss that is infinite or nan.
    """
    optimizer = train.make_optimizer(model, config)
    if len(rows) < config.batch_size:
        raise BadInput(f"{len(rows)} pairs do not fill a batch of {config.batch_size}: use more, or a smaller batch")
    rng, device = random.Random(config.seed), model.tok_emb.weight.device
    stream = (order[i:i + config.batch_size] for order in (rng.sample(rows, len(rows)) for _ in itertools.count())
              for i in range(0, len(rows) - config.batch_size + 1, config.batch_size))
    peaks = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in range(config.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * train.schedule(step, config)
        ids, lengths = pad_right([row for two in next(stream) for row in two], device)  # chosen, rejected, chosen, ...
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            found = model(ids, lengths)
        loss = pair_loss(found[0::2].float(), found[1::2].float(), config) + train.routing_loss(model, config)
        if not math.isfinite(loss.item()):
            raise BadInput(f"the loss is {loss.item()} at step {step + 1}: lower --lr, {config.lr:g}, and --muon-lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1, loss.item()


def save(file: Path, opened: hf.Opened, **more):
    """Write what `load` needs. The file appears whole or not at all."""
    run = {"optimizer": {}, "step": 0, "seconds": 0.0, "args": {}} | form(opened) | more
    checkpoint.save(file, opened.model, opened.tokenizer, both_ways=opened.model.both_ways, **run)


def load(file: Path, device="cpu") -> hf.Opened:
    """A reward model that `save` wrote, and what is needed to encode conversations for it. Raises BadInput."""
    state = checkpoint.read(file, device)
    if "both_ways" not in state:
        raise BadInput(f"{file} holds a language model and no reward model")
    try:
        model = RewardModel(ModelConfig(**state["config"]), state["both_ways"]).to(device)
        model.load_state_dict(state["model"])
        return ours(model, from_state(state["tokenizer"]), state)
    except (TypeError, ValueError, RuntimeError) as error:
        raise checkpoint.damaged(file, " ".join(str(error).split())) from None


def arguments(argv):
    """The command line as flags."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="lazy", help="a tuned model (default: lazy, which is tuned where needed)")
    parser.add_argument("--data", help="a file of pairs (default: the pairs of preferences.py)")
    parser.add_argument("--corpus", help="where the tasks' words are from (default: shakespeare)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="of corruptions to learn from (default: all)")
    parser.add_argument("--pairs", type=int, default=8000, help="corrupted pairs to train on (default: 8000)")
    parser.add_argument("--noise", type=float, default=0.0, help="share of pairs the wrong way round (default: 0)")
    parser.add_argument("--name", default="reward", help="the run's folder under out/ (default: reward)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--board", choices=BOARDS, help="show the metrics there too (default: none)")
    options.add(parser, RewardConfig, (*sft.SKIP, "micro_batch"))
    return parser.parse_args(argv)


def report(opened: hf.Opened, held_out: dict[str, list[dict]]) -> list[dict]:
    """A row for each kind of pairs: the share that is ranked right, its interval, and the mean difference of scores."""
    rows = []
    for kind, pairs in held_out.items():
        chosen, rejected = score_pairs(opened, pairs)
        right = accuracy(chosen, rejected)
        low, high = interval(right * len(pairs), len(pairs))
        difference = (chosen - rejected).mean().item()
        rows.append({"pairs": kind, "right": right, "low": low, "high": high, "difference": difference})
    return rows


def main(argv=None):
    args = arguments(argv)
    config = options.build(RewardConfig, args)
    if unknown := {*args.kinds} - {*KINDS}:
        raise BadInput(f"--kinds {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    if args.pairs < 1:
        raise BadInput(f"--pairs {args.pairs}: make at least 1")
    if args.name == args.policy:
        raise BadInput(f"--name {args.name} is the policy's own name: choose another")
    if args.data is not None:
        read_pairs(args.data)  # a bad record is said before a policy is tuned
    else:
        args.corpus = text_of(args.policy, args.corpus)
    device = setup(args.device, config.seed)
    policy = open_policy(args, device)
    pairs, held_out = make_pairs(args, policy)
    opened = judge(policy, config.both_ways)
    encoded = encode(opened, [talk for each in pairs for talk in both(each)])
    rows = list(zip(encoded[0::2], encoded[1::2], strict=True))
    say(f"{len(rows):,} pairs to learn from, {sum(map(len, held_out.values())):,} held out")
    begin = time.perf_counter()
    with RunLog(__file__, args.name, vars(args), board=args.board) as log:  # stopped, it leaves an earlier run as it is
        with progress(config.steps, "learning to judge") as bar:
            for step, loss in fit(opened.model, rows, config):
                bar.update(step, loss=loss)
                if step % 10 == 0:
                    log.metrics(step, train_loss=loss)
                if step % config.eval_every == 0 and step < config.steps:
                    log.metrics(step, **{row["pairs"]: row["right"] for row in report(opened, held_out)})
        found = report(opened, held_out)
        log.metrics(step, **{row["pairs"]: row["right"] for row in found})
        table("held-out pairs ranked right", found)
        save(log.folder / "model.pt", opened, args=vars(args))
        log.finish(corpus=args.corpus, steps=step, seconds=time.perf_counter() - begin,
                   **{f"right_{row['pairs']}": row["right"] for row in found})
        draw(read_metrics(log.folder), log)
    say(f"saved in {log.folder}; look at it with " + command(log.stage, "audit.py", "--name", args.name))


def draw(rows: list[dict], log):
    """The figure of a run: the loss, and the share ranked right of each kind, by step."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    seen = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    left.plot(*zip(*seen, strict=True))
    left.axhline(math.log(2), color="grey", lw=0.8, ls=":")
    left.set(xlabel="step", ylabel="loss of a pair, nats", ylim=(0, None))
    for kind in dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds", "train_loss")):
        seen = [(row["step"], row[kind]) for row in rows if kind in row]
        right.plot(*zip(*seen, strict=True), marker="o", ms=3, label=kind)
    right.axhline(0.5, color="grey", lw=0.8, ls=":")
    right.set(xlabel="step", ylabel="held-out pairs ranked right", ylim=(0.45, 1.02))
    right.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    log.figure(figure, "learning")


if __name__ == "__main__":
    run_program(main)
