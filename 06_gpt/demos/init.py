"""How large the first weights should be: GPT-2's 0.02 against what the width asks for.

    uv run stages run 06 demos/init.py
    uv run stages run 06 demos/init.py --steps 1500 --stds 0.02 0.06 0.125 0.25

Adam moves every weight by about the learning rate per step, whatever the weight's size. A vector that starts small is
turned by the first few batches, one that starts large is refined. `kept` says how much of it is left: the cosine
between a character's vector at the start and after the warm-up, averaged over characters; 1 is all, 0 nothing. The last
row tells where the spread matters: large matrices with small vectors for tokens and positions.

All models start as GPT-2 does but for the spread, so the scale of the last norm is 1. With vectors of spread
1 / sqrt(C) the first scores are then large, and so is the first loss; the stage itself starts that scale at 0.1.
"""

import math
import sys
from pathlib import Path

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
from model import GPT, ModelConfig
from train import TrainConfig, evaluate, make_optimizer, train


def redraw(model, std: float, embedding: float):
    """GPT-2's start with other spreads: `std` of the matrices, `embedding` of the vectors of tokens and positions.

    Matrices that feed the residual stream are smaller, biases are 0 and the norms' scales 1.
    """
    for name, p in model.named_parameters():
        if name in ("tok_emb.weight", "pos_emb"):  # both, or the larger would drown the smaller
            nn.init.normal_(p, std=embedding)
        elif p.ndim >= 2:
            shrink = math.sqrt(2 * model.config.n_layer) if name.endswith("proj.weight") else 1
            nn.init.normal_(p, std=std / shrink)
        else:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)


def build(std: float, embedding: float, args, vocab_size: int) -> GPT:
    """A model redrawn with these spreads, from the same random numbers each time."""
    torch.manual_seed(args.seed)
    model = GPT(options.build(ModelConfig, args, vocab_size=vocab_size))
    redraw(model, std, embedding)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--stds", type=float, nargs="+", default=[0.02, 0.125], help="default: 0.02 0.125")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model (default: 300)")
    parser.add_argument("--lr", type=float, default=5e-3, help="default: 5e-3")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, ModelConfig)
    args = parser.parse_args(argv)
    if min(args.stds) <= 0:
        raise BadInput(f"--stds {args.stds}: a spread must be above 0, or every unit learns the same")
    config = TrainConfig(steps=args.steps, warmup=max(1, args.steps // 10), lr=args.lr, seed=args.seed)
    setup("cpu")
    log = RunLog(__file__, "init", vars(args))
    data = load_data(args.corpus)
    small, large = min(args.stds), max(args.stds)
    cells = [(std, std) for std in args.stds] + [(large, small)] * (small < large)

    rows = []
    with progress(len(cells) * args.steps, "training") as bar:
        for i, (std, embedding) in enumerate(cells):
            model = build(std, embedding, args, len(data.tokenizer))
            start = model.tok_emb.weight.detach().clone()
            stream = batches(data.train, model.config.block_size, config.batch_size, config.seed)
            for step, loss in train(model, stream, config, make_optimizer(model, config)):
                bar.update(i * args.steps + step, loss=loss, text=f"std {std:g}")
                if step == 1:
                    first = loss
                if step == config.warmup:
                    kept = F.cosine_similarity(model.tok_emb.weight, start, dim=1).mean().item()
            val_loss = evaluate(model, data.val, precision=config.precision)
            row = {"matrices": std, "embedding": embedding, "first loss": first, "kept": kept, "val loss": val_loss}
            rows.append(row)
            log.metrics(i, **row)
    table(f"{data.name}, {args.steps} steps", rows)
    say(f"1 / sqrt(C) = {args.n_embd**-0.5:.3f} at {args.n_embd} channels; a first loss of ln V = "
        f"{math.log(len(data.tokenizer)):.2f} is that of a model without opinion")
    log.finish(corpus=data.name, rows=rows)


if __name__ == "__main__":
    run_program(main)
