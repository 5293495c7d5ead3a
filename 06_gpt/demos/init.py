"""How large the first weights should be: GPT-2's 0.02 against what the width asks for.

    uv run stages run 06 demos/init.py
    uv run stages run 06 demos/init.py --steps 1500 --stds 0.02 0.06 0.125 0.25

Adam moves every weight by about the learning rate per step, whatever the weight's size. A vector that starts small is
turned by the first few batches, one that starts large is refined. `kept` says how much of it is left: the cosine
between a character's vector at the start and after the warm-up, averaged over characters; 1 is all, 0 nothing. The last
row tells where the spread matters: large matrices with small vectors for tokens and positions.
"""

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

from data import load_data
from model import GPT, ModelConfig
from train import TrainConfig, evaluate, make_optimizer, train


def build(std: float, embedding: float, args, vocab_size: int) -> GPT:
    """A model whose matrices start with spread `std`, the vectors of tokens and positions with spread `embedding`."""
    torch.manual_seed(args.seed)
    model = GPT(options.build(ModelConfig, args, vocab_size=vocab_size, init_std=std))
    with torch.no_grad():
        model.tok_emb.weight *= embedding / std
        model.pos_emb *= embedding / std  # both, or the larger would drown the smaller
    return model


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--stds", type=float, nargs="+", default=[0.02, 0.125], help="default: 0.02 0.125")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model (default: 300)")
    parser.add_argument("--lr", type=float, default=5e-3, help="default: 5e-3")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, ModelConfig, skip=("init_std",))
    args = parser.parse_args(argv)
    if min(args.stds) <= 0:
        raise BadInput(f"--stds {args.stds}: a spread must be above 0, or every unit learns the same")
    config = TrainConfig(steps=args.steps, warmup=max(1, args.steps // 10), lr=args.lr, seed=args.seed)
    setup("cpu")
    log = RunLog(__file__, "init", vars(args))
    data = load_data(args.corpus, log.folder)
    small, large = min(args.stds), max(args.stds)
    cells = [(std, std) for std in args.stds] + [(large, small)] * (small < large)

    rows = []
    with progress(len(cells) * args.steps, "training") as bar:
        for i, (std, embedding) in enumerate(cells):
            model = build(std, embedding, args, len(data.tokenizer))
            start = model.tok_emb.weight.detach().clone()
            optimizer = make_optimizer(model, config)
            for step, loss in train(model, data.train, config, optimizer, model.config.block_size):
                bar.update(i * args.steps + step, loss=loss, text=f"std {std:g}")
                if step == config.warmup:
                    kept = F.cosine_similarity(model.tok_emb.weight, start, dim=1).mean().item()
            val_loss = evaluate(model, data.val, precision=config.precision)
            rows.append({"matrices": std, "embedding": embedding, "kept": kept, "val loss": val_loss})
            log.metrics(i, **rows[-1])
    table(f"{data.name}, {args.steps} steps", rows)
    say(f"1 / sqrt(C) = {args.n_embd**-0.5:.3f} at {args.n_embd} channels")
    log.finish(corpus=data.name, rows=rows)


if __name__ == "__main__":
    run_program(main)
