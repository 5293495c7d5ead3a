"""The loop around the methods of this stage: a policy, a reference that stays as it is, and steps.

The methods differ in what they do in a step. What they share stands here: where the policy comes from, how far it has
come, what is written down, and how a run that was stopped goes on.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

from shared import corpus, options
from shared.boards import BOARDS
from shared.console import progress, say
from shared.device import setup
from shared.errors import BadInput
from shared.interrupt import Interrupt
from shared.program import command
from shared.runlog import RunLog, read_metrics, run_folder

import torch

import checkpoint
import tasks
from chat import form, ours
from evaluate import text_loss, text_of
from hf import Opened
from preferences import open_policy
from rollout import look


@dataclass
class RLConfig:
    """What the recipes have in common. Raises BadInput for one that cannot run."""

    steps: int = 90  # times that the policy learns
    lr: float = 3e-4  # learning rate of AdamW
    warmup: int = 5  # steps over which it rises; then it stays
    clip: float = 1.0  # longest gradient that is let through; a longer one is scaled down to it
    temperature: float = 1.0  # of drawing answers, and of the law that is learned
    length: int = 24  # most tokens of an answer
    precision: Literal["bfloat16", "float32"] = "float32"  # of the matrix products
    eval_every: int = 15  # steps between looks at held-out tasks
    seed: int = 1337

    def __post_init__(self):
        for name in ("steps", "length", "eval_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("lr", "temperature", "clip"):
            if not 0 < getattr(self, name) < math.inf:  # so that nan is refused as well
                raise BadInput(f"{name} is {getattr(self, name)}: it must be above 0, and finite")
        if self.warmup < 0:
            raise BadInput(f"warmup is {self.warmup}: it must be 0 or more")


@dataclass
class Run:
    """A run under way."""

    args: argparse.Namespace
    config: RLConfig
    policy: Opened  # what learns
    reference: torch.nn.Module  # what it was before, frozen
    records: list[dict]  # tasks to learn from
    held_out: list[dict]  # tasks with words that are in none of them
    optimizer: torch.optim.Optimizer
    step: int = 0  # steps done
    seconds: float = 0.0
    saved: dict = field(default_factory=dict)  # the checkpoint that the run goes on from
    begun: float = field(default_factory=time.perf_counter)  # seconds are counted from here
    corpus: str | None = None  # the text that the tasks' words are from, by the name of what could be had


def arguments(argv, Config, doc: str, name: str, add=lambda parser: None) -> tuple[argparse.Namespace, tuple | None]:
    """The command line of a method, and with --resume, which brings the run's own flags, the run's checkpoint."""
    parser = options.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="lazy", help="a tuned model (default: lazy, which is tuned where needed)")
    parser.add_argument("--corpus", help="where the tasks' words are from (default: the policy's, or shakespeare)")
    parser.add_argument("--records", type=int, default=4000, help="tasks to learn from (default: 4000)")
    parser.add_argument("--test", type=int, default=180, help="held-out tasks (default: 180)")
    parser.add_argument("--name", default=name, help=f"the run's folder under out/ (default: {name})")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint, with its flags")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--board", choices=BOARDS, help="show the metrics there too (default: none)")
    add(parser)
    options.add(parser, Config)
    args = parser.parse_args(argv)
    if min(args.records, args.test) < 1:
        raise BadInput("--records and --test must be at least 1")
    for what in ("policy", "judge"):
        if args.name == getattr(args, what, None):
            raise BadInput(f"--name {args.name} is the {what}'s own name: choose another")
    if not args.resume:
        return args, None
    folder = run_folder(__file__, args.name)
    saved = checkpoint.load(folder / "model.pt")
    if not {"policy", *(each.name for each in fields(Config))} <= saved[-1]["args"].keys():
        raise BadInput(f"the run {args.name} is none of this script: --resume goes on with a run of its own")
    args = options.resume(parser, argv, saved[-1]["args"], free=("steps", "eval_every", "device", "board"))
    if saved[-1]["step"] >= args.steps and (folder / "summary.json").is_file():
        raise BadInput(f"the run {args.name} has finished its {args.steps} steps: to go on, give it more --steps")
    return args, saved


def begin(args, config: RLConfig, saved: tuple | None) -> Run:
    """Open or make all that a run needs."""
    device = setup(args.device, config.seed)
    start = open_policy(args, device)
    policy = ours(*saved) if saved else copy.deepcopy(start)
    policy.model.to(device)
    text = text_of(args.policy, args.corpus)
    known = tasks.words(corpus.load(text).text)
    records, held_out = (tasks.make(known, which, n) for which, n in (("train", args.records), ("words", args.test)))
    reference = start.model.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(args, config, policy, reference, records, held_out, optimizer, corpus=text)
    if saved:
        run.saved = saved[-1]
        run.step, run.seconds = run.saved["step"], run.saved["seconds"]
    return run


def update(model, optimizer, config: RLConfig, step: int) -> float:
    """Turn the gradients into a step of the weights, and forget them -> the length of the gradient.

    Raises BadInput for a gradient that is infinite or nan, before it reaches the weights.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * min(1.0, (step + 1) / max(1, config.warmup))
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], config.clip).item()
    if not math.isfinite(norm):
        raise BadInput(f"the gradient is {norm} at step {step + 1}: lower --lr, {config.lr:g}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def generator(config: RLConfig, step: int) -> torch.Generator:
    """The random numbers of a step: its own, so that a run goes on as if it had never stopped."""
    return torch.Generator().manual_seed((config.seed * 1_000_003 + step) % 2**63)


def learn(run: Run, script: str, one: Callable[[int], dict], rewards=None, more: Callable[[], dict] = dict):
    """Take the steps that `one(step)` describes, look at held-out tasks now and then, and write it all down.

    `one` gives numbers to note. `more()` is what a checkpoint has to keep besides the policy.
    """
    config, model, step = run.config, run.policy.model, run.step
    if run.saved:
        run.optimizer.load_state_dict(run.saved["optimizer"])
    begun, flags = run.begun - run.seconds, vars(run.args) | {"resume": False}
    with RunLog(script, run.args.name, flags, step, run.args.board) as log, Interrupt() as interrupt:

        def keep():
            state = {"optimizer": run.optimizer.state_dict(), "step": step, "seconds": time.perf_counter() - begun,
                     "first": first}
            checkpoint.save(log.folder / "model.pt", model, run.policy.tokenizer, **state, **form(run.policy),
                            **more(), args=flags)
            log.keep()

        def seen() -> dict:
            told = look(run.policy, run.reference, run.held_out, config.length, rewards)
            log.metrics(step, **{f"held_out_{name}": value for name, value in told.items()})
            return told

        last = seen()
        first = run.saved.get("first", last)  # before the first step, also of a run that goes on
        with progress(config.steps, log.folder.name) as bar:
            for step in range(run.step + 1, config.steps + 1):
                log.metrics(step, **(told := one(step - 1)))
                shown = {name: told[name] for name in ("reward", "right_pairs") if name in told}  # DPO has no rewards
                bar.update(step, **shown, right=last["greedy"])
                if interrupt.asked:
                    break
                if step % config.eval_every == 0 and step < config.steps:
                    last = seen()
                    keep()
        keep()
        if interrupt.asked and step < config.steps:
            go_on = command(log.stage, log.script, "--resume", "--name", run.args.name)
            say(f"stopped at step {step}, saved in {log.folder}: go on with {go_on}")
            return 130
        last, seconds = seen(), time.perf_counter() - begun
        draw(read_metrics(log.folder), log)
        tax = text_loss(model, run.policy.tokenizer, run.corpus) - text_loss(
            run.reference, run.policy.tokenizer, run.corpus)
        log.finish(corpus=run.corpus, steps=step, seconds=seconds, tax=tax,
                   **{f"first_{name}": value for name, value in first.items()}, **last)
    say(f"right answers to new words: {first['greedy']:.3f} before, {last['greedy']:.3f} after (drawn: "
        f"{first['sampled']:.3f} and {last['sampled']:.3f}); KL {last['kl']:.2f} nats; {seconds:.0f} s; {log.folder}")
    return None


def finish(main, name: str, flags: dict, args) -> dict | None:
    """The summary of the run `name`, which `main` makes with these flags. None: it was stopped.

    A run that was made with them before is kept, unless `args.again`, and one that was stopped goes on.
    """
    folder = run_folder(__file__, name)
    file = folder / "config.json"
    same = not args.again and file.is_file() and flags.items() <= json.loads(file.read_text("utf-8")).items()
    if not (same and (folder / "summary.json").is_file()):
        say(f"\n{name}")
        words = ["--name", name, "--device", args.device]
        if same and (folder / "model.pt").is_file():
            words.append("--resume")
        else:
            given = {"--" + key.replace("_", "-"): str(value) for key, value in flags.items() if value is not None}
            words += [word for pair in given.items() for word in pair]
        if main(words):
            return None
    return json.loads((folder / "summary.json").read_text("utf-8"))


def draw(rows: list[dict], log):
    """The figure of a run: every number that was noted, by step."""
    from matplotlib.figure import Figure  # takes a second

    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("step", "seconds")]
    alone = [name for name in names if not name.startswith("held_out_") or name.removeprefix("held_out_") not in names]
    columns = min(4, len(alone))
    figure = Figure(figsize=(2.6 * columns, 2 * math.ceil(len(alone) / columns)))
    for axes, name in zip(figure.subplots(-(-len(alone) // columns), columns, squeeze=False).flat, alone, strict=False):
        for shown, style in ((name, {"lw": 0.8}), (f"held_out_{name}", {"marker": "o", "ms": 3})):
            found = [(row["step"], row[shown]) for row in rows if shown in row]
            if found:
                axes.plot(*zip(*found, strict=True), **style)
        axes.set_title(name.replace("held_out_", "new words: ").replace("_", " "), fontsize=8)
        axes.tick_params(labelsize=7)
    figure.tight_layout()
    log.figure(figure, "curves")
