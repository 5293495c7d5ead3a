"""Make a mixture of experts of a dense model: each expert begins as a copy of its feed-forward.

    uv run stages run 09 train.py --n-expert 0 --name dense
    uv run stages run 09 extras/upcycle.py --name dense --into mixture --n-expert 8 --n-active 2
    uv run stages run 09 train.py --resume --name mixture --steps 500

At first the mixture computes what the dense model computed, whatever the router says and however many experts a
position uses. All experts say the same, f(x), and their weights sum to 1:

    sum_e w_e f(x) = f(x) sum_e w_e = f(x)

So nothing that was learned is lost, and training goes on from there. The router sends each expert other positions, and
from those the copies learn different things. A token costs more than before: an expert has all of the feed-forward's
units, and a position uses `--n-active` of them. The optimiser and the schedule of the learning rate start anew.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (2022).
"""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say
from shared.device import setup
from shared.errors import BadInput
from shared.program import command, run_program
from shared.runlog import run_folder

import checkpoint
from model import GPT
from moe import MixtureConfig
from train import TrainConfig, make_optimizer, mixtures

MIXTURE = [field.name for field in fields(MixtureConfig)]
OPEN = ("n_expert", "n_active", "first_dense", "moe_every")  # what may be chosen; the rest follows from the dense model


def upcycle(model: GPT, n_expert: int, n_active: int = 2, first_dense: int = 0, moe_every: int = 1) -> GPT:
    """A mixture with the weights of the dense `model`, which stays as it is. Its routers are drawn at random.

    Weights are renormalised: left as they are they would sum to less than 1, and the experts' copies say less than
    the feed-forward did. Raises BadInput for a model that has experts already, and for a mixture that cannot be built.
    """
    if mixtures(model):
        raise BadInput("this model has experts already: start from a dense one, which train.py --n-expert 0 makes")
    shape = {"n_expert": n_expert, "n_active": n_active, "first_dense": first_dense, "moe_every": moe_every}
    shape |= {"n_shared": 0, "expert_hidden": model.config.n_hidden, "renormalise": True, "capacity": None}
    mixture = GPT(replace(model.config, **shape))
    if not mixtures(mixture):
        raise BadInput(f"n_expert {n_expert}, first_dense {first_dense} and moe_every {moe_every} leave no mixture")
    state = mixture.state_dict()
    for name, tensor in model.state_dict().items():
        if name in state:
            state[name] = tensor
        else:  # blocks.3.ffn.gate.weight [F, C] -> blocks.3.ffn.gate [E, F, C]
            state[name.removesuffix(".weight")] = tensor.expand(n_expert, *tensor.shape)
    mixture.to(model.tok_emb.weight).load_state_dict(state)  # which copies: from here on each expert is its own
    return mixture.train(model.training)


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="dense", help="the dense run, a folder under out/ (default: dense)")
    parser.add_argument("--into", default="mixture", help="the run to make of it (default: mixture)")
    parser.add_argument("--seed", type=int, default=1337, help="of the routers' first weights")
    options.add(parser, MixtureConfig, skip=tuple(name for name in MIXTURE if name not in OPEN))
    parser.set_defaults(n_expert=8)
    args = parser.parse_args(argv)
    place = run_folder(__file__, args.into) / "model.pt"
    if place.exists():
        raise BadInput(f"there is a run {args.into} already: choose another name with --into")
    setup("cpu", args.seed)
    model, tokenizer, state = checkpoint.load(run_folder(__file__, args.name) / "model.pt")
    mixture = upcycle(model, **{name: getattr(args, name) for name in OPEN})
    # The run's flags, for --resume: those of the dense run, and the new shape.
    flags = state["args"] | {name: getattr(mixture.config, name) for name in MIXTURE} | {"name": args.into}
    recipe = options.build(TrainConfig, argparse.Namespace(**flags))
    run = {"optimizer": make_optimizer(mixture, recipe).state_dict(), "step": 0, "seconds": 0.0, "args": flags}
    place.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(place, mixture, tokenizer, **run)
    go_on = command(Path(__file__).parent.parent.name, "train.py", "--resume", "--name", args.into)
    say(f"{args.n_expert} experts in {len(mixtures(mixture))} layers, saved in {place.parent}: go on with {go_on}")


if __name__ == "__main__":
    run_program(main)
