"""How low can the loss get in the time of the default run? A record table, one idea more in each row.

    uv run stages run 07 demos/speedrun.py                  # all records, a default run's time each
    uv run stages run 07 demos/speedrun.py --records 1 6    # the first and the last
    uv run stages run 07 demos/speedrun.py --long           # all ideas together, for four minutes

Each record is the one before it with one idea more, on the same text and judged in the same way, over the whole
validation text. An idea that makes a step quicker gets more steps, so that all take about the same time: `turns` says
how long a step of each takes, measured side by side in one run.

The last idea trains nothing. What a network of this size lacks is memory, and a 7-gram has little else. So each
network is judged twice: alone, and mixed with the counts of the same training text (`with counts`).

Nothing here is in the trunk. An idea that pays for two minutes on a small text is not one that open models have kept.
"""

import argparse
import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F
from torch import nn

from data import batches, load_data
from demos.counts import Counts
from model import GPT, CausalSelfAttention, ModelConfig, attention, rotate, variance_scaling_
from sample import evaluation
from train import TrainConfig, log_probs, make_optimizer, train


@dataclass
class Ideas:
    """Which ideas a record uses. Each field is one."""

    zero: bool = False  # branches begin silent: their output matrices start at 0
    plain_norms: bool = False  # norms without learned scales, in one kernel
    relu2: bool = False  # the square of a ReLU and two matrices, in place of SwiGLU and three
    values: bool = False  # each second layer adds to a token's value a vector of its own, looked up by the token
    smear: bool = False  # a share of each token's embedding, learned per channel, goes to the token after it


RECORDS = [  # the idea that each adds, and its steps
    (None, 1350), ("zero", 1350), ("plain_norms", 1450), ("relu2", 1500), ("values", 1500), ("smear", 1500),
]  # fmt: skip
LONG = 1300  # steps of --long, each of twice as many windows
SHARE = 0.3  # of the counts in the mixture; fixed: 0.2 and 0.4 lose less than 0.007


class PlainNorm(nn.Module):
    """LayerNorm without scale and shift: [..., C] -> [..., C]. Unlike RMSNorm it is one kernel of torch."""

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:])


class SquaredReLU(nn.Module):
    """Two layers with relu(z)^2 between them: [..., C] -> [..., 4C] -> [..., C]. So et al., "Primer" (2021)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        variance_scaling_(self.fc)
        variance_scaling_(self.proj, gain=(2 / 3) ** 0.5)  # E[relu(z)^4] is 3 / 2 for a standard normal z

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class ValueAttention(CausalSelfAttention):
    """Attention whose values get a vector more, `extra` [B, T, K D], which the model sets before each pass.

    Zhou et al., "Value Residual Learning" (2024), in the form of modded-nanogpt's value embeddings.
    """

    extra = None

    def forward(self, x, rope=None):
        q, k, v = (self.split_heads(layer(x)) for layer in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        return self.proj(self.merge_heads(attention(q, k, v + self.split_heads(self.extra))))


class Smear(nn.Module):
    """Add to each position a share of the one before it, learned per channel: [B, T, C] -> [B, T, C].

    So the first layer sees pairs of tokens. A form of the "smear" of modded-nanogpt (2025).
    """

    def __init__(self, n_channels: int):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(n_channels))  # a scale: so named, it is not decayed

    def forward(self, x):
        return x + self.norm * F.pad(x[:, :-1], (0, 0, 1, 0))  # the first has none before it


class Racer(GPT):
    """The stage's model with the parts of some ideas put in."""

    def __init__(self, config: ModelConfig, ideas: Ideas):
        super().__init__(config)
        self.lookups = nn.ModuleDict()  # outside of the blocks: for the optimiser they are tables, not matrices
        for i, block in enumerate(self.blocks):
            if ideas.values and i % 2 == 1:
                old, block.attn = block.attn, ValueAttention(config)
                block.attn.load_state_dict(old.state_dict())
                self.lookups[str(i)] = nn.Embedding(config.vocab_size, config.n_kv_head * config.head_dim)
                nn.init.normal_(self.lookups[str(i)].weight, std=0.5)
            if ideas.relu2:
                block.ffn = SquaredReLU(config)
                block.ffn.proj.weight.data /= (2 * config.n_layer) ** 0.5
            if ideas.zero:
                nn.init.zeros_(block.attn.proj.weight)
                nn.init.zeros_(block.ffn.proj.weight)
            if ideas.plain_norms:
                block.norm1 = block.norm2 = block.attn.query_norm = block.attn.key_norm = PlainNorm()
        if ideas.smear:
            self.smear = Smear(config.n_embd)
            self.tok_emb.register_forward_hook(lambda layer, args, out: self.smear(out))

    def forward(self, idx):
        for i, lookup in self.lookups.items():
            self.blocks[int(i)].attn.extra = lookup(idx)
        return super().forward(idx)


@torch.no_grad()
def judge(model, text, counts: Counts, precision: str) -> list[float]:
    """Losses in nats per token over the text [N]: of the model alone, and of its mixture with the counts.

    As in `evaluate`, in windows one after another, of which the last is shorter. The counts see no more than the model:
    the same window.
    """
    total, T = torch.zeros(2, dtype=torch.double), model.config.block_size
    with evaluation(model):
        for x, y in zip(text[:-1].split(T), text[1:].split(T), strict=True):
            x, y = x[None].long(), y[None].long()
            p = log_probs(model, x, y, precision).double().exp()
            mixed = (1 - SHARE) * p + SHARE * counts.prob(x, y)
            total -= torch.stack([p, mixed]).log().sum(dim=(1, 2))
    return (total / (len(text) - 1)).tolist()


def race(data, config: TrainConfig, ideas: Ideas, counts: Counts, tick) -> tuple[list[float], int]:
    """Train one model -> (its losses as `judge` has them, in nats per character; its parameters)."""
    torch.manual_seed(config.seed)
    model = Racer(ModelConfig(vocab_size=len(data.tokenizer)), ideas)
    stream = batches(data.train, model.config.block_size, config.batch_size, config.seed)
    for step, loss in train(model, stream, config, make_optimizer(model, config)):
        tick(step, loss)
    losses = [data.nats_per_char(loss) for loss in judge(model, data.val, counts, config.precision)]
    return losses, sum(p.numel() for p in model.parameters())


def turns(data, plans: list[Ideas], batch_size: int, rounds: int) -> list[float]:
    """Median milliseconds of a step of each plan; they take turns, so that all meet the same machine."""
    config = TrainConfig(steps=2 * rounds + 10, batch_size=batch_size)
    runs = []
    for ideas in plans:
        model = Racer(ModelConfig(vocab_size=len(data.tokenizer)), ideas)
        stream = batches(data.train, model.config.block_size, batch_size, config.seed)
        runs.append(train(model, stream, config, make_optimizer(model, config)))
    times = [[] for _ in runs]
    with progress(rounds, "timing") as bar:
        for i in range(rounds):
            for run, found in zip(runs, times, strict=True):
                begin = time.perf_counter()
                next(run)
                found.append(1000 * (time.perf_counter() - begin))
            bar.update(i + 1)
    return [median(found[2:]) for found in times]


def plans() -> list[Ideas]:
    """The ideas of each record: those of the one before it, and one more."""
    ideas, found = Ideas(), []
    for name, _ in RECORDS:
        ideas = copy.copy(ideas)
        if name:
            setattr(ideas, name, True)
        found.append(ideas)
    return found


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--records", type=int, nargs="+", default=[*range(1, len(RECORDS) + 1)], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="default: 1337")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each record to time, at least 4 (default: 20)")
    parser.add_argument("--steps", type=int, help="steps of every record, for a quick look (default: of each its own)")
    parser.add_argument("--long", action="store_true", help=f"the last record, {LONG:,} steps of twice the windows")
    args = parser.parse_args(argv)
    if not set(args.records) <= set(range(1, len(RECORDS) + 1)):
        raise BadInput(f"--records {args.records}: there are records 1 to {len(RECORDS)}")
    if args.rounds < 4 or args.steps is not None and args.steps < 1:
        raise BadInput("--rounds must be at least 4, and --steps at least 1")
    setup("cpu", 1337)
    data = load_data(args.corpus)
    chosen = [len(RECORDS)] if args.long else args.records
    batch_size = TrainConfig.batch_size * (2 if args.long else 1)
    ideas = [plans()[i - 1] for i in chosen]
    log, rows = RunLog(__file__, "speedrun-long" if args.long else "speedrun", vars(args)), []
    counts = Counts(data.train, len(data.tokenizer))
    times = turns(data, ideas, batch_size, args.rounds)
    lengths = [args.steps or (LONG if args.long else RECORDS[i - 1][1]) for i in chosen]
    total, done = sum(lengths) * len(args.seeds), 0
    with progress(total, "training") as bar:
        for i, plan, steps, ms in zip(chosen, ideas, lengths, times, strict=True):
            losses, begin = [], time.perf_counter()
            for seed in args.seeds:
                warmup = min(TrainConfig.warmup, steps // 4)
                config = TrainConfig(steps=steps, batch_size=batch_size, seed=seed, warmup=warmup)

                def tick(step, loss, done=done, text=f"record {i}, seed {seed}"):
                    bar.update(done + step, loss=loss, text=text)

                found, params = race(data, config, plan, counts, tick)
                losses.append(found)
                done += steps
            alone, mixed = (mean(column) for column in zip(*losses, strict=True))
            rows.append({
                "record": i, "idea": (RECORDS[i - 1][0] or "the default run").replace("_", " "), "params": params,
                "steps": steps, "ms per step": ms, "seconds": (time.perf_counter() - begin) / len(args.seeds),
                "val loss": alone, "with counts": mixed,
            })
            log.metrics(i, val_loss=alone, mixed=mixed)
    table(f"{data.name}: nats per character, one idea more in each row", rows)
    best = min(rows, key=lambda row: row["with counts"])
    log.finish(rows=rows, val_loss=best["with counts"], seconds=best["seconds"])
    say(f"lowest: {best['with counts']:.4f}, record {best['record']} with counts")


if __name__ == "__main__":
    run_program(main)
