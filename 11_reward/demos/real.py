"""A real model learns to judge: two reward models on SmolLM2, for pairs of answers that people would prefer.

    uv run stages run 11 demos/real.py                                  # 1,100 pairs, which are downloaded
    uv run stages run 11 demos/real.py --data my/pairs.jsonl --name mine

- Linear heads: the model is frozen and reads each answer once. A head of one row learns from what the model has of it,
  by logistic regression on differences. That has one optimum, which takes a second, so all of `--seeds` splits are
  cheap. "last token" is what the head of reward.py reads: of the last layer, at the token that ends the answer. There a
  model that was never tuned to judge has mostly what comes next. In the middle, at `--layer`, it has more of what was
  said, and the mean over the answer's tokens has most, since impolite words may stand anywhere.
- "LoRA": adapters in all matrices of the blocks and the head of reward.py are trained together on the pairs of the
  first split. They learn to bring to the last token what the head needs.

Beside them stands a ruler, which prefers the longer or the shorter answer, whichever was better in most of the training
pairs. `right` is the share of held-out pairs that are ranked right on the first split, `low` and `high` its interval
of 95 %. `all splits` is the mean, and `spread` the standard deviation. The same prompt is never on both sides.
`seconds` of the linear heads are those of reading, which all three share.

`real.png`: LoRA's loss by step, and the differences of scores of the held-out pairs, of which those below 0 are wrong.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import lora
import reward
import train
from audit import length_rule
from chat import open_model, prompt
from demos.ablation import shown, spread
from evaluate import interval
from hf import Opened
from preferences import both, read_pairs, split_by_prompt
from reward import RewardConfig


@dataclass
class Real:
    """The run. Raises BadInput for one that cannot be."""

    pairs: int = 600  # pairs that are used, at random; the rest is left out to save time
    held_out: float = 0.2  # share of their prompts that is tested on
    seeds: int = 3  # splits into training and test
    layer: int | None = None  # whose output two of the linear heads read; none: the one at two fifths of the depth
    penalty: float = 0.1  # of a linear head: how much the square of its weights counts
    steps: int = 40  # steps of LoRA
    batch_size: int = 8  # pairs per step of LoRA
    lr: float = 2e-3  # highest learning rate of LoRA; it rises for a tenth of the steps, then falls to 0

    def __post_init__(self):
        for name in ("pairs", "seeds"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: it must be at least 1")
        if not 0 < self.held_out < 1:
            raise BadInput(f"--held-out {self.held_out}: it must be above 0 and below 1")
        if not self.penalty > 0:
            raise BadInput(f"--penalty {self.penalty}: it must be above 0, or weights could grow without end")

    def recipe(self) -> RewardConfig:
        """Of LoRA. Raises BadInput."""
        rates = {"lr": self.lr, "warmup": self.steps // 10, "decay": 1.0}
        return RewardConfig(steps=self.steps, batch_size=self.batch_size, **rates)


@torch.no_grad()
def features(opened: Opened, pairs: list[dict], layer: int, size: int = 16) -> dict[str, torch.Tensor]:
    """What heads can read of both answers of each pair, by a name: [N, 2, C] float32 on the CPU.

    "last token" is what a reward model reads. The others are of the output of a layer, counted from 1: its last token,
    and its mean over the tokens of the answer.
    """
    model, device = opened.model, opened.model.tok_emb.weight.device
    rows = reward.encode(opened, [talk for each in pairs for talk in both(each)])
    starts = [len(prompt(opened, each["prompt"])) for each in pairs for _ in range(2)]
    names = ("last token", f"last token of layer {layer}", f"mean of layer {layer}")
    found = {name: torch.empty(len(rows), model.config.n_embd) for name in names}
    middle = []
    hook = model.blocks[layer - 1].register_forward_hook(lambda block, given, output: middle.append(output))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with train.evaluation(model), progress(len(rows), "reading") as bar:
        for part in (order[i:i + size] for i in range(0, len(order), size)):
            ids, lengths = reward.pad_right([rows[i] for i in part], device)
            with torch.autocast(device.type, torch.bfloat16):
                h = model.features(ids, look=model.around(ids.shape[1], lengths))  # [B, T, C]
            inner, last = middle.pop().float(), lengths - 1
            places = torch.arange(ids.shape[1], device=device)  # [T]
            answer = (places >= torch.tensor([[starts[i]] for i in part], device=device)) & (places <= last[:, None])
            mean_of = (inner * answer[..., None]).sum(1) / answer.sum(1, keepdim=True)  # [B, C]
            for name, value in zip(names, (h[range(len(part)), last], inner[range(len(part)), last], mean_of),
                                   strict=True):
                found[name][part] = value.float().cpu()
            bar.update(bar.step + len(part))
    hook.remove()
    return {name: value.view(len(pairs), 2, -1) for name, value in found.items()}


def linear_head(differences, penalty: float):
    """The weights w [C] that make -ln sigmoid(x w) + penalty / 2 * |w|^2 least, the mean over pairs.

    x are the differences [N, C], features of chosen less those of rejected, here divided by their root mean square, so
    that the penalty means the same for all features. The function is convex: there is one such w.
    """
    x = differences.double()
    x = x / x.square().mean().sqrt()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12,
                               line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = -F.logsigmoid(x @ w).mean() + penalty / 2 * w.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return w.detach()


def with_adapters(opened: Opened, adapter: lora.LoRAConfig) -> Opened:
    """A reward model of which adapters and head are trained, and nothing else."""
    lora.add(opened.model, adapter)
    opened.model.head.weight.requires_grad_(True)
    return opened


def tune(opened: Opened, pairs: list[dict], config: RewardConfig, tick) -> list[float]:
    """Train what is not frozen on the pairs, in place; `tick(step, loss)` after each step -> the losses."""
    rows = reward.encode(opened, [talk for each in pairs for talk in both(each)])
    rows, device = list(zip(rows[0::2], rows[1::2], strict=True)), opened.model.tok_emb.weight.device
    if len(rows) < config.batch_size:
        raise BadInput(f"{len(rows)} pairs do not fill a batch of {config.batch_size}: use more, or a smaller batch")
    rng, order, losses = random.Random(config.seed), [], []
    tuned = [p for p in opened.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=config.lr, weight_decay=0.0)
    opened.model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * train.schedule(step, config)
        if len(order) < config.batch_size:
            order = rng.sample(rows, len(rows))
        part, order = order[:config.batch_size], order[config.batch_size:]
        with torch.autocast(device.type, torch.bfloat16):
            scores = opened.model(*reward.pad_right([row for two in part for row in two], device)).float()
        loss = reward.pair_loss(scores[0::2], scores[1::2], config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tick(step + 1, loss.item())
    return losses


def split(pairs: list[dict], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places in `pairs` to train on and to test on, no prompt on both sides. Raises BadInput where one has none."""
    numbered = [each | {"place": i} for i, each in enumerate(pairs)]
    sides = [[each["place"] for each in part] for part in split_by_prompt(numbered, share, seed)]
    if not all(sides):
        raise BadInput("there is only one prompt: some are held out, so there must be more")
    return sides


def row(judge: str, found: list[float], n: int, trained: int, seconds: float) -> dict:
    """A row of the table from the shares on each split, the first of which has n test pairs."""
    low, high = interval(found[0] * n, n)
    several = len(found) > 1
    return {"judge": judge, "right": found[0], "low": low, "high": high, "all splits": mean(found) if several else None,
            "spread": spread(found), "trained": trained, "seconds": round(seconds)}


def draw(losses: list[float], gaps: dict) -> Figure:
    """LoRA's loss by step, smoothed; the differences of scores, in spreads, of each judge."""
    fig = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    width = max(1, len(losses) // 20)
    ends = range(width, len(losses) + 1, width)
    left.plot(ends, [mean(losses[end - width:end]) for end in ends])
    left.axhline(0.693, color="grey", lw=0.8, ls=":")
    left.set(xlabel="step of LoRA", ylabel="loss of a pair, nats")
    right.hist([(gap / gap.square().mean().sqrt()).tolist() for gap in gaps.values()], bins=20, label=list(gaps))
    right.axvline(0, color="grey", lw=0.8, ls=":")
    right.set(xlabel="score of chosen less that of rejected", ylabel="held-out pairs")
    right.legend(fontsize="small")
    return fig


def arguments(argv) -> argparse.Namespace:
    """The command line as flags."""
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="a file of pairs (default: the published preferences.json)")
    parser.add_argument("--model", default="smollm2", help="a run of sft.py, or what hf.py opens (default: smollm2)")
    parser.add_argument("--name", default="real", help="the run's folder under out/ (default: real)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    options.add(parser, Real)
    options.add(parser, lora.LoRAConfig)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    real, adapter = options.build(Real, args), options.build(lora.LoRAConfig, args)
    config, device = real.recipe(), setup(args.device, RewardConfig.seed)
    pairs = read_pairs(args.data or corpus.records("preferences"))
    pairs = random.Random(0).sample(pairs, min(len(pairs), real.pairs))
    splits = [split(pairs, real.held_out, seed) for seed in range(real.seeds)]
    training, test = ([pairs[i] for i in part] for part in splits[0])
    opened = reward.judge(open_model(args.model, device))
    rules = [length_rule(*([pairs[i] for i in part] for part in parts)) for parts in splits]
    rows = [row(f"always the {rules[0][0]}", [share for _, share in rules], len(test), 0, 0)]
    depth = opened.model.config.n_layer
    layer = max(1, 2 * depth // 5) if real.layer is None else real.layer
    if not 1 <= layer <= depth:
        raise BadInput(f"--layer {layer}: the model has layers 1 to {depth}")
    with RunLog(__file__, args.name, vars(args)) as log:
        begin, gaps = time.perf_counter(), {}
        for name, found in features(opened, pairs, layer).items():
            x = (found[:, 0] - found[:, 1]).double()  # [N, C]
            mine = [x[held] @ linear_head(x[learn], real.penalty) for learn, held in splits]
            right = [reward.accuracy(gap, torch.zeros_like(gap)) for gap in mine]
            rows.append(row(f"linear head, {name}", right, len(test), x.shape[1], time.perf_counter() - begin))
            gaps[name] = mine[0]
        begin = time.perf_counter()
        with_adapters(opened, adapter)
        with progress(config.steps, "tuning") as bar:

            def tick(step, loss):
                bar.update(step, loss=loss)
                log.metrics(step, train_loss=loss)

            losses = tune(opened, training, config, tick)
        found = features(opened, test, layer)["last token"]
        gaps["LoRA"] = (found[:, 0] - found[:, 1]) @ opened.model.head.weight[0].detach().cpu()
        count = sum(p.numel() for p in opened.model.parameters() if p.requires_grad)
        right = [reward.accuracy(gaps["LoRA"], torch.zeros(len(test)))]
        rows.append(row("LoRA", right, len(test), count, time.perf_counter() - begin))
        table(f"{len(training)} pairs to train on, {len(test)} held out, splits: {real.seeds}", shown(rows))
        file = log.figure(draw(losses, gaps), "real")
        log.finish(rows=rows)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
