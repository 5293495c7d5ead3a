"""How low can the loss get in the time of the default run? A record table, one idea more in each row.

    uv run stages run 07 demos/speedrun.py                  # all records, a default run's time each
    uv run stages run 07 demos/speedrun.py --records 1 8    # the first and the last
    uv run stages run 07 demos/speedrun.py --long           # all ideas together, for four minutes

Each record is the one before it with one idea more, on the same text and judged in the same way, over the whole
validation text. An idea that makes a step slower gets fewer steps, so that all take about the same time: `turns`
says how long a step of each takes, measured side by side in one run. Ideas that lost stay in the table.

Nothing here is in the trunk. An idea that pays for a minute on a small text is not one that open models have kept.
"""

import argparse
import copy
import itertools
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
from model import GPT, CausalSelfAttention, ModelConfig, attention, rotate, variance_scaling_
from train import TrainConfig, evaluate, make_optimizer, train


@dataclass
class Ideas:
    """Which ideas a record uses. Each field is one."""

    zero: bool = False  # branches begin silent: their output matrices start at 0
    plain_norms: bool = False  # norms without learned scales
    relu2: bool = False  # the square of a ReLU and two matrices, in place of SwiGLU and three
    values: bool = False  # each second layer adds to a token's value a vector of its own, looked up by the token
    short: bool = False  # windows of half the length for the first 40 % of the steps, twice as many of them
    noise: bool = False  # 3 % of the input characters are replaced at random, the targets are not
    average: bool = False  # score a mean of the weights over the last steps


RECORDS = [  # the idea that each adds, and its steps
    (None, 1200), ("zero", 1200), ("plain_norms", 1250), ("relu2", 1300), ("values", 1300), ("short", 1350),
    ("noise", 1350), ("average", 1350),
]  # fmt: skip
LONG = 2400  # steps of --long


class Unscaled(nn.Module):
    """RMSNorm without a scale: [..., C] -> [..., C]."""

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


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
                block.norm1 = block.norm2 = block.attn.query_norm = block.attn.key_norm = Unscaled(config.norm_eps)

    def forward(self, idx):
        for i, lookup in self.lookups.items():
            self.blocks[int(i)].attn.extra = lookup(idx)
        return super().forward(idx)


def corrupt(x, vocab_size: int, generator, share: float = 0.03):
    """Replace a share of the tokens x [B, T] by tokens drawn at random."""
    hit = torch.rand(x.shape, generator=generator) < share
    return torch.where(hit, torch.randint(vocab_size, x.shape, generator=generator), x)


def stream(data, model, config: TrainConfig, ideas: Ideas):
    """The batches of a run: x, y [B, T], or [2B, T / 2] while windows are short."""
    T, B, vocab_size = model.config.block_size, config.batch_size, model.config.vocab_size
    generator = torch.Generator().manual_seed(config.seed)
    first = int(0.4 * config.steps) if ideas.short else 0
    short = itertools.islice(batches(data.train, T // 2, 2 * B, config.seed), first)
    for x, y in itertools.chain(short, batches(data.train, T, B, config.seed, first)):
        yield corrupt(x, vocab_size, generator) if ideas.noise else x, y


def race(data, config: TrainConfig, ideas: Ideas, tick) -> tuple[float, int]:
    """Train one model -> (its loss on the whole validation text in nats per character, its parameters)."""
    torch.manual_seed(config.seed)
    model = Racer(ModelConfig(vocab_size=len(data.tokenizer)), ideas)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    kept = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema) if ideas.average else None
    for step, loss in train(model, stream(data, model, config, ideas), config, make_optimizer(model, config)):
        tick(step, loss)
        if kept and step >= 0.8 * config.steps:  # while the rate falls; earlier weights are too far away
            kept.update_parameters(model)
    judged = kept.module if kept else model
    loss = data.nats_per_char(evaluate(judged, data.val, config.micro_batch, config.precision))
    return loss, sum(p.numel() for p in model.parameters())


def turns(data, plans: list[Ideas], rounds: int) -> list[float]:
    """Median milliseconds of a step of each plan; they take turns, so that all meet the same machine."""
    config = TrainConfig(steps=2 * rounds + 10)
    runs = []
    for ideas in plans:
        model = Racer(ModelConfig(vocab_size=len(data.tokenizer)), ideas)
        runs.append(train(model, stream(data, model, config, ideas), config, make_optimizer(model, config)))
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
    parser.add_argument("--long", action="store_true", help=f"only the last record, for {LONG:,} steps")
    args = parser.parse_args(argv)
    if not set(args.records) <= set(range(1, len(RECORDS) + 1)):
        raise BadInput(f"--records {args.records}: there are records 1 to {len(RECORDS)}")
    if args.rounds < 4 or args.steps is not None and args.steps < 1:
        raise BadInput("--rounds must be at least 4, and --steps at least 1")
    setup("cpu", 1337)
    data = load_data(args.corpus)
    chosen = [len(RECORDS)] if args.long else args.records
    ideas = [plans()[i - 1] for i in chosen]
    log, rows = RunLog(__file__, "speedrun-long" if args.long else "speedrun", vars(args)), []
    times = turns(data, ideas, args.rounds)
    lengths = [args.steps or (LONG if args.long else RECORDS[i - 1][1]) for i in chosen]
    total, done = sum(lengths) * len(args.seeds), 0
    with progress(total, "training") as bar:
        for i, plan, steps, ms in zip(chosen, ideas, lengths, times, strict=True):
            losses, begin = [], time.perf_counter()
            for seed in args.seeds:
                config = TrainConfig(steps=steps, seed=seed, warmup=min(TrainConfig.warmup, steps // 4))

                def tick(step, loss, done=done, text=f"record {i}, seed {seed}"):
                    bar.update(done + step, loss=loss, text=text)

                loss, params = race(data, config, plan, tick)
                losses.append(loss)
                done += steps
            rows.append({
                "record": i, "idea": (RECORDS[i - 1][0] or "the default run").replace("_", " "), "params": params,
                "steps": steps, "ms per step": ms, "seconds": (time.perf_counter() - begin) / len(args.seeds),
                "val loss": mean(losses),
            })
            log.metrics(i, val_loss=mean(losses))
    table(f"{data.name}: nats per character, one idea more in each row", rows)
    best = min(rows, key=lambda row: row["val loss"])
    log.finish(rows=rows, val_loss=best["val loss"], seconds=best["seconds"])
    say(f"lowest: {best['val loss']:.4f}, record {best['record']}")


if __name__ == "__main__":
    run_program(main)
