"""Fewer bits for each weight of a real model: what it costs in perplexity, and what it brings in bytes and in speed.

    uv run stages run 08 demos/quantisation.py
    uv run stages run 08 demos/quantisation.py --tokens 1024 --rounds 1
    uv run stages run 08 demos/quantisation.py --train          # ternary and binary layers, in small models

SmolLM2's file holds its matrices in four bits. "float32" is what they stand for, the base of the comparison, and the
other kinds are that model with its weights rounded: to bfloat16; to int8 with a scale for each output channel; to int4
with a scale and a zero point for each 32 weights; and last the file's own four bits, moved into int4 layers and not
rounded again, with a head in int8. The matrices stood in four bits before, in groups at the same places. So rounding
them to int4 once more finds nearly the old steps again, and the row tells less of int4 than one would think: most of
what it loses, it loses in the head. Rounding weights that were never rounded costs more.

- `perplexity` of two texts, in windows of `--window` tokens; "rise" is how much higher it is than in float32.
- `MB`: bytes of all weights, scales included. The embedding is tied to the head, and kept in 16 bits beside a rounded
  head, for looking up. `MB read` leaves it out then: it is what one token makes the processor read.
- `tokens/s` of writing, one text, after a prompt: by `sample.py`, and by `extras/decoder.py`, which spends hardly
  any time on other things than weights, so that their size shows. The kinds take turns, `--rounds` times, so that
  whatever else the machine does hits all of them; the fastest round of each counts.

With `--train`, small models of the text are trained with layers that know three weights or two (BitNet), beside one
with usual layers, and the usual one is also rounded to three weights after its training. `MB` is as they would be
stored: five ternary weights in a byte, or eight binary ones.
"""

import argparse
import itertools
import math
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

import hf
from data import batches, load_data, split, windows
from extras import bitnet, quant
from extras.decoder import Decoder
from model import GPT, ModelConfig
from sample import SampleConfig, evaluation, generate
from train import TrainConfig, evaluate, log_probs, make_optimizer, train

GREEDY = SampleConfig(temperature=0)

KINDS = ("float32", "bfloat16", "int8", "int4", "int4 of the file")
TRAINED = ("float32", "ternary", "binary", "rounded afterwards")


def make(kind: str, model: str) -> GPT:
    """The model of this kind, read from its file."""
    if kind == "int4 of the file":
        return quant.from_gguf(model).model
    opened = hf.load(model, torch.float32)
    if kind == "float32":
        return opened.model
    bits = {"bfloat16": 16, "int8": 8, "int4": 4}[kind]
    return quant.quantise(opened.model.bfloat16(), bits)


def ids_of(name: str, opened, count: int) -> torch.Tensor:
    """The first `count` + 1 tokens of a corpus' validation text. Raises BadInput for a text with fewer."""
    text = split(corpus.load(name).text)[1]
    ids = opened.tokenizer.encode(text[:20 * count])[:count + 1]  # few tokens are longer than 20 characters
    if len(ids) <= count:
        raise BadInput(f"--tokens {count}: the validation text of {name} has {len(ids)} tokens")
    return torch.tensor(ids)


@torch.no_grad()
def perplexity(model, ids, window: int) -> float:
    """e to the mean loss on `ids` [N + 1], in windows of `window` tokens, each seeing only its own."""
    x, y = windows(ids, window)
    with evaluation(model):
        total = sum(-log_probs(model, a[None], b[None]).sum().item() for a, b in zip(x, y, strict=True))
    return math.exp(total / y.numel())


def bytes_read(model) -> int:
    """Bytes of the weights that every token is multiplied by: all but an embedding that is only looked up."""
    tied = getattr(model.head, "weight", None) is model.tok_emb.weight
    return quant.nbytes(model) - (0 if tied else quant.nbytes(model.tok_emb))


def decode_speed(model, prompt, length: int) -> float:
    """Tokens a second of writing `length` tokens, the prefill and the first token not counted."""
    steps = (model.generate if isinstance(model, Decoder) else partial(generate, model))(prompt, GREEDY)
    next(steps)
    begin = time.perf_counter()
    for _ in itertools.islice(steps, length):
        pass
    return length / (time.perf_counter() - begin)


def compare(args) -> list[dict]:
    """A row for each kind."""
    opened = hf.load(args.model, torch.float32)
    texts = {name: ids_of(name, opened, args.tokens) for name in args.corpora}
    prompt = next(iter(texts.values()))[None, :args.prompt]
    del opened
    models, decoders, rows = {}, {}, []
    with progress(len(KINDS) * (len(texts) + args.rounds), "reading and writing") as bar:
        done = itertools.count(1)
        for kind in KINDS:
            models[kind] = make(kind, args.model)
            row = {"weights": kind, "MB": quant.nbytes(models[kind]) / 1e6, "MB read": bytes_read(models[kind]) / 1e6}
            for name, ids in texts.items():
                row[name] = perplexity(models[kind], ids, args.window)
                row[f"{name}, rise"] = row[name] / (rows[0][name] if rows else row[name]) - 1
                bar.update(next(done), text=kind)
            rows.append(row | {"sample.py, tokens/s": 0.0, "decoder.py, tokens/s": 0.0})
            decoders[kind] = Decoder(models[kind])
        for _ in range(args.rounds):
            for row in rows:
                kind = row["weights"]
                for by, writer in (("sample.py", models[kind]), ("decoder.py", decoders[kind])):
                    found = decode_speed(writer, prompt, args.length)
                    row[f"{by}, tokens/s"] = max(row[f"{by}, tokens/s"], found)
                bar.update(next(done), text=kind)
    for row in rows:
        for by in ("sample.py", "decoder.py"):
            row[f"{by}, times bfloat16"] = row[f"{by}, tokens/s"] / rows[1][f"{by}, tokens/s"]
    return rows


def train_small(kind: str, data, n_embd: int, config: TrainConfig, tick) -> tuple[GPT, float]:
    """A small model trained with layers of this kind, and its loss on the validation text in nats per character."""
    torch.manual_seed(config.seed)
    model = GPT(ModelConfig(vocab_size=len(data.tokenizer), n_embd=n_embd))
    if kind != "float32":
        bitnet.replace(model, kind)
    stream = batches(data.train, model.config.block_size, config.batch_size, config.seed)
    for step, loss in train(model, stream, config, make_optimizer(model, config)):
        tick(step, loss)
    return model, data.nats_per_char(evaluate(model, data.val, precision=config.precision))


def compare_trained(args, log) -> list[dict]:
    """A row for each kind of layer: validation losses of all seeds."""
    data = load_data(args.corpus)
    losses, size = {kind: [] for kind in TRAINED}, {}
    with progress(args.seeds * 3 * args.steps, "training") as bar:
        for i, (seed, kind) in enumerate(itertools.product(range(args.seeds), TRAINED[:3])):
            config = TrainConfig(args.steps, args.batch_size, seed=seed, warmup=min(100, args.steps // 4))
            model, loss = train_small(kind, data, args.n_embd, config, lambda step, loss, i=i, kind=kind: bar.update(
                i * args.steps + step, loss=loss, text=kind))
            losses[kind].append(loss)
            size[kind] = bitnet.nbytes(model)
            if kind == "float32":
                rounded = bitnet.round_weights(deepcopy(model), "ternary")
                after = data.nats_per_char(evaluate(rounded, data.val, precision=config.precision))
                losses["rounded afterwards"].append(after)
            log.metrics(i, kind=kind, seed=seed, val_loss=loss)
    size["rounded afterwards"] = size["ternary"]
    return [{
        "layers": kind, "val loss": mean(found), "spread": stdev(found) if len(found) > 1 else None,
        "MB": size[kind] / 1e6, "losses": found,
    } for kind, found in losses.items()]  # fmt: skip


def draw(rows: list[dict], names: list[str]) -> Figure:
    """Two panels: how much the perplexity rises, and the speed against the bytes that a token makes one read."""
    fig = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    for i, name in enumerate(names):
        places = [place + 0.35 * i - 0.175 for place in range(1, len(rows))]
        left.barh(places, [100 * row[f"{name}, rise"] for row in rows[1:]], height=0.35, label=name)
    left.set_yticks(range(1, len(rows)), [row["weights"] for row in rows[1:]])
    left.invert_yaxis()
    left.set(title="perplexity above that of float32", xlabel="%")
    left.legend(fontsize=8)
    for row in rows:
        right.plot(row["MB read"], row["decoder.py, tokens/s"], "o", label=row["weights"])
    right.set(title="speed of writing", xlabel="MB read for each token", ylabel="tokens/s", xlim=(0, None),
              ylim=(0, None))
    right.legend(fontsize=8)
    return fig


def draw_trained(rows: list[dict]) -> Figure:
    """A dot for each seed and kind of layer."""
    fig = Figure(figsize=(6.4, 2.4), layout="constrained")
    axes = fig.subplots()
    for place, row in enumerate(rows):
        axes.plot(row["losses"], [place] * len(row["losses"]), "o", color="tab:blue", alpha=0.6)
    axes.set_yticks(range(len(rows)), [row["layers"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="validation loss, nats per character")
    axes.grid(axis="x", alpha=0.3)
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2 or a GGUF file in Q4_1 or Q4_0 (default: smollm2)")
    parser.add_argument("--corpora", nargs="+", default=["shakespeare", "python-docs"],
                        help="texts to read (default: shakespeare python-docs)")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text (default: 4096)")
    parser.add_argument("--window", type=int, default=1024, help="tokens read at once (default: 1024)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens before what is written (default: 64)")
    parser.add_argument("--length", type=int, default=32, help="tokens written in each round (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of writing (default: 5)")
    parser.add_argument("--train", action="store_true", help="train ternary and binary layers instead")
    parser.add_argument("--corpus", default="shakespeare", help="with --train: the text (default: shakespeare)")
    parser.add_argument("--steps", type=int, default=300, help="with --train: steps of each model (default: 300)")
    parser.add_argument("--n-embd", type=int, default=128, help="with --train: channels (default: 128)")
    parser.add_argument("--batch-size", type=int, default=16, help="with --train: windows in a batch (default: 16)")
    parser.add_argument("--seeds", type=int, default=3, help="with --train: models of each kind (default: 3)")
    args = parser.parse_args(argv)
    for name in ("tokens", "window", "prompt", "length", "rounds", "steps", "seeds"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: it must be at least 1")
    if max(args.window, args.prompt) > args.tokens:
        raise BadInput(f"--window {args.window} --prompt {args.prompt}: no more than --tokens, {args.tokens}")
    setup("cpu")
    name = "bitnet" if args.train else "quantisation"
    log = RunLog(__file__, name, vars(args))
    if args.train:
        rows = compare_trained(args, log)
        shown = [{key: value for key, value in row.items() if key != "losses"} for row in rows]
        title, fig = f"{args.corpus}: {args.steps} steps, seeds: {args.seeds}", draw_trained(rows)
    else:
        rows = compare(args)
        shown = [{key: f"{value:+.1%}" if key.endswith("rise") else value for key, value in row.items()}
                 for row in rows]
        title, fig = f"{args.model}: perplexity of {args.tokens} tokens", draw(rows, args.corpora)
    table(title, shown)
    say(f"figure: {log.figure(fig, name)}")
    log.finish(rows=rows)


if __name__ == "__main__":
    run_program(main)
