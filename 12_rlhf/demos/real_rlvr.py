"""Reinforcement learning on a real language model, on a laptop's CPU: SmolLM2 learns to add, from right or wrong alone.

    uv run stages run 12 demos/real_rlvr.py
    uv run stages run 12 demos/real_rlvr.py --reward format --name format    # control: any number is good enough
    uv run stages run 12 demos/real_rlvr.py --sft 800 --name sft             # control: as many sums, with their answers

"What is 23 + 58? Answer with the number only." The model draws eight answers to each of eight such questions. A program
checks them: 1 for an answer that ends within `--length` tokens and whose last number is the sum, else 0. Answers that
are better than the others to their question become likelier (GRPO, grpo.py). Nobody shows the model a right answer. The
base is frozen, and each matrix of its blocks has an adapter (lora.py). There is no KL term: nothing holds the model.

`--test` sums are held out: they are never learned from, in neither order, and they are the same for every seed. At the
looks, the likeliest answers to them are checked, and the first few are printed. In the table of errors,

- `before` and `after` are the shares of them that are right;
- `begun` is the same where the answer begins with "23 + 58 = " for it, and the number that comes next counts. Nobody
  fails there by the form of an answer: what rises is adding;
- `ones` and `tens` tell how often these digits of the answer are right afterwards. A carry goes from ones to tens.

A step draws 64 answers and learns from them, in both taking what several texts begin with only once: of 64 texts of 60
tokens, a few hundred tokens are left. The numbers are those of rollout.py, in a fraction of its time.

A run of a few minutes is not resumed. After Ctrl-C, the adapter of the steps so far is kept.
"""

import argparse
import random
import re
import sys
import time
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement, islice, takewhile
from pathlib import Path
from statistics import mean
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.interrupt import Interrupt
from shared.program import run_program
from shared.runlog import RunLog, read_metrics

import torch
from matplotlib.figure import Figure

import lora
import sft
from cache import Cache
from chat import conversation, open_model, prompt, said
from data import read_records
from grpo import GRPOConfig, advantages, grpo_loss
from hf import DTYPES, Opened
from learn import generator, update
from look import Look
from rollout import Rollout, draws, masked_mean
from sample import evaluation, pad_left

HUB = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # where other programs find the base
FIXED = ("temperature", "epochs", "clip_ratio", "kl", "beta", "precision")  # of GRPO's recipe, not to choose here
BEGUN = "{a} + {b} = "  # how the model likes to begin an answer
CONTEXT = 128  # tokens: a cache has room for a whole context, and the model's own, 8,192, would fill the memory


@dataclass
class Recipe(GRPOConfig):
    """The run. Raises BadInput for one that cannot be."""

    steps: int = 100  # times that the model learns
    questions: int = 8  # of a step
    lr: float = 3e-4  # learning rate of the adapters
    length: int = 14  # most tokens of an answer
    eval_every: int = 10  # steps between looks at held-out sums
    reward: Literal["right", "format"] = "right"  # what is rewarded: the right number, or a number and nothing else
    sft: int = 0  # learn from so many sums with their answers instead, by cross-entropy; 0: from rewards
    test: int = 96  # held-out sums
    shown: int = 4  # held-out sums whose answers are printed at each look
    forget: int = 50  # other instructions, published ones, whose loss is measured before and after
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the base; auto: in which this machine multiplies faster

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("test", 1), ("shown", 0), ("sft", 0), ("forget", 0)):
            if not least <= getattr(self, name) <= 2000:
                raise BadInput(f"--{name} {getattr(self, name)}: it must be from {least} to 2000")


# --- the sums, and what an answer is worth


def divide(count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Sums of two numbers of two digits -> (those to learn from, `count` held-out ones), the same for every seed.

    23 + 58 and 58 + 23 are on the same side: whoever has learned the one knows the other.
    """
    pick, pairs = random.Random(0), list(combinations_with_replacement(range(10, 100), 2))
    pick.shuffle(pairs)
    held_out = [tuple(pick.sample(pair, 2)) for pair in pairs[:count]]
    return [turned for a, b in pairs[count:] for turned in dict.fromkeys([(a, b), (b, a)])], held_out


def question(a: int, b: int) -> list[dict]:
    """The conversation that the model goes on with."""
    return [{"role": "user", "content": f"What is {a} + {b}? Answer with the number only."}]


def prompts(opened: Opened, sums: list[tuple], start: str = "") -> list[list[int]]:
    """The questions as ids. `start`: what the answer begins with, of {a} and {b}."""
    return [prompt(opened, question(a, b)) + opened.tokenizer.encode(start.format(a=a, b=b)) for a, b in sums]


def last_number(text: str) -> str | None:
    """The last number of a text as it is written: "23 + 58 is 81." -> "81", "1,081" and "0.81" stay whole."""
    found = re.findall(r"[-−]?\d[\d.,]*", text)  # a part of a number must not pass for it
    return found[-1].rstrip(".,") if found else None


def right(a: int, b: int, text: str, ended: bool) -> bool:
    """The verifier: whether an answer has an end, and its last number is the sum."""
    return ended and last_number(text) == str(a + b)


def alone(a: int, b: int, text: str, ended: bool) -> bool:
    """The control's: whether an answer has an end, and is a number and nothing else, whichever."""
    return ended and re.fullmatch(r"\d+", text.strip()) is not None


def begun(a: int, b: int, text: str, ended: bool) -> bool:
    """Whether what follows "a + b = " begins with the sum."""
    return re.match(r"\d*", text)[0] == str(a + b)


REWARDS = {"right": right, "format": alone}


def checked(check, sums: list[tuple], drawn: Rollout) -> torch.Tensor:
    """1 for each answer that passes the check, else 0: [B]"""
    found = [check(*sums[i], text, over) for i, text, over in zip(drawn.which, drawn.texts, drawn.ended, strict=True)]
    return torch.tensor(found, dtype=torch.float32)


# --- answers, each token once


def pick(cache: Cache, which) -> Cache:
    """Keep these texts of a cache, each as often as it is named: [0, 0, 2] is the first one twice, and the third."""
    for name in ("keys", "values"):
        old = getattr(cache, name)  # [layers, B, K, slots, D]
        new = old.new_empty(len(old), len(which), *old.shape[2:])
        new[..., :cache.used, :] = old[:, which, :, :cache.used]
        setattr(cache, name, new)
    cache.places, cache.lengths = cache.places[which], cache.lengths[which]
    cache.rows = torch.arange(len(which), device=which.device)[:, None]
    return cache


def draw(logits, state, temperature: float, generator=None):
    """A token for each text: scores of the states that texts are in [S, V], and the state of each text [B] -> [B].

    As `sample.draw`, with one random number for a text in place of one for each of its V tokens.
    """
    if temperature == 0:
        return logits.argmax(-1)[state]
    below = (logits.double() / temperature).softmax(-1).cumsum(-1)[state]  # [B, V]
    u = torch.rand(len(state), 1, dtype=torch.float64, generator=generator).to(below.device)
    return torch.searchsorted(below, u * below[:, -1:], right=True)[:, 0]  # the first token that u lies below


@torch.no_grad()
def answers(opened: Opened, asked: list[list[int]], length: int, temperature=1.0, n=1, generator=None) -> Rollout:
    """As `rollout.rollout`: `n` answers of at most `length` tokens to each prompt of `asked`, given as ids.

    What all prompts begin with is read once, and so is all that answers to a prompt have in common: as long as some
    have the same tokens, they are one text in the cache, from which several tokens are drawn.
    """
    model, device = opened.model, opened.model.tok_emb.weight.device
    shared = sum(1 for _ in takewhile(lambda column: len({*column}) == 1, zip(*asked, strict=False)))
    shared = min(shared, *(len(ids) - 1 for ids in asked))  # a token of each is left to go on from
    rest, pad = pad_left([ids[shared:] for ids in asked], device)
    P, B = shared + rest.shape[1], len(asked) * n
    if P + length > model.config.block_size:
        raise BadInput(f"a prompt of {P} and an answer of {length} tokens: there is room for {model.config.block_size}")
    drawn, live = torch.full((B, length), -1, device=device), torch.arange(B, device=device)
    state, ends = live // n, torch.tensor(sorted(opened.ends), device=device)
    with evaluation(model):
        cache = Cache(model, 1, P)
        if shared:
            model(torch.tensor([asked[0][:shared]], device=device), cache, last=1)
        cache = pick(cache, torch.zeros(len(asked), dtype=torch.long, device=device))
        logits = model(rest, cache, pad, last=1)[:, -1]  # [S, V], a state for each prompt
        for t in range(length):
            drawn[live, t] = token = draw(logits, state, temperature, generator)
            on = ~torch.isin(token, ends)
            live, state, token = live[on], state[on], token[on]
            if t + 1 == length or not len(live):
                break
            pairs, state = torch.stack([state, token]).unique(dim=1, return_inverse=True)
            logits = model(pairs[1][:, None], cache := pick(cache, pairs[0]))[:, -1]
    return rolled(opened, asked, drawn, [i for i in range(len(asked)) for _ in range(n)])


def rolled(opened: Opened, asked: list[list[int]], drawn, which: list[int]) -> Rollout:
    """Prompts as ids, answers' tokens [B, A] with -1 behind their ends, and the prompt of each -> Rollout."""
    context, pad = pad_left([asked[i] for i in which], drawn.device)
    mask, over = drawn >= 0, torch.isin(drawn, torch.tensor(sorted(opened.ends), device=drawn.device))
    texts = [said(opened, row[keep].tolist()) for row, keep in zip(drawn, mask & ~over, strict=True)]
    return Rollout(torch.cat([context, drawn.clamp(min=0)], 1), pad, mask, texts, over.any(1).tolist(), which)


def given(opened: Opened, sums: list[tuple]) -> Rollout:
    """The right answers, as if the model had drawn them."""
    examples = [conversation(opened, [*question(*s), {"role": "assistant", "content": str(sum(s))}]) for s in sums]
    learned = [[i for i, yes in zip(e.ids, e.learned, strict=True) if yes] for e in examples]
    A = max(map(len, learned))
    drawn = torch.tensor([ids + [-1] * (A - len(ids)) for ids in learned], device=opened.model.tok_emb.weight.device)
    return rolled(opened, prompts(opened, sums), drawn, list(range(len(sums))))


def tree(drawn: Rollout):
    """Texts as a tree, in which those that begin alike share their first tokens.

    -> ids of its N tokens, the place of the one before each (-1: none), and for each drawn token the place of the one
    before it, [B, A]. A text's last token is not in the tree: nothing comes after it. Texts 5 6 7 and 5 6 8 9, of which
    the last two tokens of each were drawn, are 5 6 8 with [-1, 0, 1], and [[0, 1], ...] for the first.
    """
    found, ids, before = {}, [], []
    places = torch.zeros(drawn.mask.shape, dtype=torch.long)
    counts = drawn.mask.sum(1).tolist()
    start = drawn.ids.shape[1] - drawn.mask.shape[1]  # where the answers begin
    for b, (row, pad, count) in enumerate(zip(drawn.ids.tolist(), drawn.pad.tolist(), counts, strict=True)):
        path = [-1]
        for token in row[pad:start + count - 1]:
            key = path[-1], token
            if key not in found:
                found[key] = len(ids)
                ids.append(token)
                before.append(path[-1])
            path.append(found[key])
        places[b, :count] = torch.tensor(path[len(path) - count:])
    return ids, before, places


def log_probs(model, drawn: Rollout):
    """As `rollout.log_probs` at temperature 1: ln P of each drawn token and its law's entropy, [B, A] x 2; and N."""
    device = drawn.ids.device
    ids, before, places = tree(drawn)
    depth, seen = [], torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for i, parent in enumerate(before):  # a token sees itself, and what the one before it sees
        depth.append(0 if parent < 0 else depth[parent] + 1)
        seen[i] = seen[parent] if parent >= 0 else False
        seen[i, i] = True
    look = Look(model.rope(torch.tensor(depth, device=device)[None, None]), ~seen.to(device)[None, None])
    h = model.features(torch.tensor([ids], device=device), look=look)[0]  # [N, C]
    asked, where = places.to(device)[drawn.mask].unique(return_inverse=True)
    law = model.head(h[asked]).float().log_softmax(-1)  # [M, V], a row for each place from which something was drawn
    chosen, entropy = torch.zeros_like(drawn.mask, dtype=law.dtype), torch.zeros_like(drawn.mask, dtype=law.dtype)
    chosen[drawn.mask] = law[where, drawn.answers[drawn.mask]]
    with torch.no_grad():
        entropy[drawn.mask] = -(law.exp() * law).sum(-1)[where]
    return chosen, entropy, len(ids)


# --- a step


def reinforce(opened: Opened, sums: list[tuple], config: Recipe, optimizer, step: int) -> dict:
    """Draw answers to the sums, check them, learn -> numbers by name."""
    begin = time.perf_counter()
    drawn = answers(opened, prompts(opened, sums), config.length, 1.0, config.group, generator(config, step))
    reward = checked(REWARDS[config.reward], sums, drawn)
    advantage = advantages(reward.view(-1, config.group), config.baseline)
    useful = (advantage.abs() > 1e-4).any(1)  # the others, all right or all wrong, teach nothing
    told = {"reward": reward.mean().item(), "right": checked(right, sums, drawn).mean().item(),
            "ended": mean(drawn.ended), "length": drawn.mask.sum(1).float().mean().item(),
            "useful": useful.float().mean().item(), "drawing": time.perf_counter() - begin}
    places = useful.repeat_interleave(config.group).nonzero()[:, 0]
    if len(places):
        part, advantage = drawn.rows(places), advantage.flatten()[places].to(drawn.ids.device)
        new, entropy, count = log_probs(opened.model, part)
        # Learned from once, so the law that drew is the law now: the ratio is 1, and its gradient is that of ln P.
        grpo_loss(new, new.detach(), new.detach(), advantage, part.mask, config)[0].backward()
        told |= {"entropy": masked_mean(entropy, part.mask).item(), "tokens": count,
                 "gradient": update(opened.model, optimizer, config, step)}
    return told | {"learning": time.perf_counter() - begin - told["drawing"]}


def imitate(opened: Opened, sums: list[tuple], config: Recipe, optimizer, step: int) -> dict:
    """Learn the right answers to the sums by cross-entropy -> numbers by name."""
    part = given(opened, sums)
    new, _, count = log_probs(opened.model, part)
    loss = -masked_mean(new, part.mask)
    loss.backward()
    return {"loss": loss.item(), "tokens": count, "gradient": update(opened.model, optimizer, config, step)}


# --- what was learned


def likeliest(opened: Opened, sums: list[tuple], length: int, start: str = "") -> Rollout:
    """The answers with the likeliest token taken at each place, or how they go on where they begin with `start`."""
    return answers(opened, prompts(opened, sums, start), length, 0.0)


def errors(sums: list[tuple], before: tuple[Rollout, Rollout], after: tuple[Rollout, Rollout]) -> list[dict]:
    """The table, from the likeliest answers, free and begun: rows by whether ones carry, and by the sum's digits."""
    marks = {}
    for i, (name, check) in enumerate((("", right), ("begun ", begun))):
        marks[f"{name}before"] = checked(check, sums, before[i]).tolist()
        marks[f"{name}after"] = checked(check, sums, after[i]).tolist()
    numbers = [over * (last_number(text) or "") for text, over in zip(after[0].texts, after[0].ended, strict=True)]
    for place, name in ((1, "ones"), (2, "tens")):  # counted from the end
        marks[name] = [float(number.rjust(3)[-place] == str(a + b)[-place])
                       for number, (a, b) in zip(numbers, sums, strict=True)]
    kinds = [f"{'carry' if a % 10 + b % 10 >= 10 else 'no carry'}, {len(str(a + b))} digits" for a, b in sums]
    rows = []
    for kind in [*sorted({*kinds}), "all"]:
        some = [i for i in range(len(sums)) if kind in (kinds[i], "all")]
        rows.append({"sums": kind, "count": len(some)} | {key: mean(xs[i] for i in some) for key, xs in marks.items()})
    return rows


def others(opened: Opened, count: int) -> list:
    """`count` of the published instructions as examples; none, and a line that says so, where they cannot be had."""
    if not count:
        return []
    try:
        records = read_records(corpus.records("instructions"))
    except BadInput as error:
        say(f"what is forgotten is not measured: {error}")
        return []
    records = random.Random(0).sample(records, min(count, len(records)))
    return sft.fitting(opened, records, "other instructions")


def quicker(device: torch.device) -> str:
    """The type in which a product of this model's size is quicker: some CPUs have no instructions for bfloat16."""
    seconds = {}
    for name in ("float32", "bfloat16"):
        x, w = (torch.ones(n, 1024, dtype=DTYPES[name], device=device) for n in (64, 1024))
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            (x @ w.T)[0, 0].item()
            times.append(time.perf_counter() - begin)
        seconds[name] = min(times)
    return min(seconds, key=seconds.get)


def figure(rows: list[dict], config: Recipe) -> Figure:
    """Shares of right answers by step: of the drawn ones, smoothed over 5 steps, and of the likeliest to new sums."""
    fig = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = fig.subplots()
    for name, label in (("right", "drawn, right: mean of 5 steps"), ("reward", "drawn, reward: mean of 5 steps")):
        seen = [(row["step"], row[name]) for row in rows if name in row]
        if seen and (name == "right" or config.reward != "right"):
            steps, values = zip(*seen, strict=True)
            smooth = [mean(values[max(0, i - 4):i + 1]) for i in range(len(values))]
            (line,) = axes.plot(steps, smooth, label=label)
            axes.plot(steps, values, ".", ms=4, alpha=0.5, color=line.get_color(), label="each step")
    axes.plot(*zip(*[(row["step"], row["held_out"]) for row in rows if "held_out" in row], strict=True), "o-",
              label="likeliest, held-out sums")
    axes.set(xlabel="step", ylabel="share of right answers", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return fig


def main(argv: list[str] | None = None):
    begin = time.perf_counter()
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="what chat.py opens (default: smollm2)")
    parser.add_argument("--name", default="rlvr", help="the run's folder under out/ (default: rlvr)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps (default: cpu)")
    options.add(parser, Recipe, FIXED)
    options.add(parser, lora.LoRAConfig, ("dropout",))
    args = parser.parse_args(argv)
    config, adapter = options.build(Recipe, args), options.build(lora.LoRAConfig, args)
    device = setup(args.device, config.seed)
    learn, held_out = divide(config.test)
    opened = open_model(args.model, device)
    dtype = quicker(device) if config.dtype == "auto" else config.dtype
    model = opened.model.to(DTYPES[dtype])
    model.config = replace(model.config, block_size=min(model.config.block_size, CONTEXT))
    lora.add(model, adapter)  # begins as the base
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    stream = draws(learn, config.questions, config.seed)
    if config.sft:
        labelled = [s for some in islice(stream, -(-config.sft // config.questions)) for s in some][:config.sft]
        stream = ([labelled[(config.questions * step + i) % config.sft] for i in range(config.questions)]
                  for step in range(config.steps))
    one, rest = imitate if config.sft else reinforce, others(opened, config.forget)
    what = f"{config.sft} sums with their answers" if config.sft else f"rewards ({config.reward})"
    say(f"{args.model} in {dtype} learns from {what}: {sum(p.numel() for p in tuned):,} parameters")

    with RunLog(__file__, args.name, vars(args)) as log:

        def look(step) -> tuple[Rollout, float]:
            """The likeliest answers to the held-out sums, and the share of right ones."""
            drawn = likeliest(opened, held_out, config.length)
            marks = checked(right, held_out, drawn).tolist()
            seen = [f"{a} + {b}: {' '.join(text.split())}" + (" (right)" if mark else "" if over else " ...")
                    for (a, b), text, over, mark in zip(held_out, drawn.texts, drawn.ended, marks, strict=True)]
            log.metrics(step, held_out=mean(marks), answers=seen[:config.shown])
            say(f"step {step:3}, right {mean(marks):.2f}   " + "   ".join(seen[:config.shown]))
            return drawn, mean(marks)

        def forgotten() -> float | None:
            return sft.held_out_loss(model, rest, rows=8) if rest else None

        loss_before, (free, first) = forgotten(), look(0)
        last, before = first, (free, likeliest(opened, held_out, config.length, BEGUN))
        model.train()
        done, trained = 0, time.perf_counter()
        with Interrupt() as interrupt, progress(config.steps, "learning") as bar:
            for done in range(1, config.steps + 1):
                log.metrics(done, **(told := one(opened, next(stream), config, optimizer, done - 1)))
                shown = {name: told[name] for name in ("loss", "reward", "right", "length") if name in told}
                bar.update(done, **shown, held_out=last)
                if interrupt.asked:
                    break
                if done % config.eval_every == 0 and done < config.steps:
                    last = look(done)[1]
        trained = time.perf_counter() - trained
        folder = lora.save_adapter(model, log.folder / "adapter", HUB.get(args.model, args.model))
        log.keep()
        how = (f"the adapter is in {folder}: lora.load_adapter(chat.open_model({args.model!r}).model, folder) puts it "
               "beside its base, and so does peft's PeftModel.from_pretrained(model, folder)")
        if done < config.steps:
            say(f"stopped at step {done}; {how}")
            return 130
        loss_after, (free, last) = forgotten(), look(done)
        after = free, likeliest(opened, held_out, config.length, BEGUN)
        rows, metrics = errors(held_out, before, after), read_metrics(log.folder)
        log.figure(figure(metrics, config), "curve")
        table(f"{len(held_out)} held-out sums, shares of right answers", rows)
        seconds = time.perf_counter() - begin
        log.finish(steps=done, seconds=seconds, training=trained, dtype=dtype, first=first, last=last, rows=rows,
                   loss_before=loss_before, loss_after=loss_after)
    shares = [row["right"] for row in metrics if "right" in row]
    if shares:
        say(f"drawn answers that are right: {mean(shares[:5]):.2f} in the first 5 steps, {mean(shares[-5:]):.2f} in "
            "the last 5")
    if rest:
        say(f"loss per answer token on {len(rest)} other instructions: {loss_before:.3f} before, "
            f"{loss_after:.3f} after")
    say(f"likeliest answers to held-out sums that are right: {first:.2f} before, {last:.2f} after {done} steps and "
        f"{seconds:.0f} s, of which {trained:.0f} s were training")
    say(how)


if __name__ == "__main__":
    run_program(main)
