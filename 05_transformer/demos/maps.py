"""The attention maps of a trained model: who looks at whom, in every head of every layer, on one line of real text.

    uv run stages run 05 && uv run stages run 05 demos/maps.py
    uv run stages run 05 demos/maps.py --text "What a piece of work is a man" --run default

Row t of a map holds the weights with which position t averages the values of its past. The table puts a number on what
the eye sees: how far back a head looks, over how many positions it spreads its weight (e to the entropy), and how much
of it lies on the position itself, on the one and the two before, on the first letter of the word that is being written
and on the sign before that word. The numbers are averages over many windows of the validation text, without the first
half of each window, where there is little past to choose from.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import matplotlib
import torch
import torch.nn.functional as F

from checkpoint import load
from data import load_data, windows
from model import attention_weights
from sample import evaluation

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@torch.no_grad()
def attention_maps(model, idx):
    """The attention weights of every layer and head: tokens [B, T] -> [L, B, H, T, T]."""
    maps = []

    def look(attn, args, output):
        q, k = (attn.split_heads(layer(args[0])) for layer in (attn.query, attn.key))
        maps.append(attention_weights(q, k))

    hooks = [block.attn.register_forward_hook(look) for block in model.blocks]
    with evaluation(model):
        model(idx)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


def word_starts(breaks):
    """For each position the last break before it, 0 if there is none: breaks [B, T], bool -> [B, T]."""
    last = torch.where(breaks, torch.arange(breaks.shape[1]), 0).cummax(1).values
    return F.pad(last[:, :-1], (1, 0))


def habits(maps, breaks) -> list[dict]:
    """What each head does on average: maps [L, B, H, T, T], breaks (no letters) [B, T] -> a row for each head."""
    L, _, H, T, _ = maps.shape
    late = slice(T // 2, T)  # positions with a past to choose from
    back = (torch.arange(T)[:, None] - torch.arange(T))[late]  # [T / 2, T]: from row back to column
    start = word_starts(breaks)[:, None, late, None].expand(-1, H, -1, 1)  # [B, H, T / 2, 1]
    rows = []
    for layer in range(L):
        weights = maps[layer][:, :, late]  # [B, H, T / 2, T]

        def mean(per_position):
            return per_position.mean(dim=(0, 2)).tolist()  # [B, H, T / 2] -> one number for each head

        columns = {
            "chars back": mean((weights * back).sum(-1)),
            "spread over": mean(torch.special.entr(weights).sum(-1).exp()),
            "itself": mean((weights * (back == 0)).sum(-1)),
            "1 back": mean((weights * (back == 1)).sum(-1)),
            "2 back": mean((weights * (back == 2)).sum(-1)),
            "first letter": mean(weights.gather(-1, start + 1)[..., 0]),
            "before word": mean(weights.gather(-1, start)[..., 0]),
        }
        for h in range(H):
            numbers = {name: round(values[h], 4) for name, values in columns.items()}
            rows.append({"layer.head": f"{layer}.{h}"} | numbers)
    return rows


def draw(maps, text: str):
    """One picture for each head, a column for each layer: maps [L, H, T, T] of a text of T characters."""
    L, H, T, _ = maps.shape
    labels = [{"\n": "¶", " ": "␣"}.get(char, char) for char in text]
    fig, axes = plt.subplots(H, L, figsize=(3.1 * L, 3.2 * H), squeeze=False, layout="constrained")
    for layer in range(L):
        for head in range(H):
            axis = axes[head][layer]
            # The root of the weights, so that small ones show as well.
            axis.imshow(maps[layer, head].sqrt().tolist(), cmap="Greys", vmin=0, vmax=1)
            axis.set_title(f"layer {layer}, head {head}", fontsize=12)
            axis.set_xticks(range(T), labels if head == H - 1 else T * [""], fontsize=8, family="DejaVu Sans Mono")
            axis.set_yticks(range(T), labels if layer == 0 else T * [""], fontsize=8, family="DejaVu Sans Mono")
            axis.tick_params(length=0, pad=1)
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="default", help="the trained run, a folder under out/ (default: default)")
    parser.add_argument("--text", help="the text to draw (default: a line of the validation text)")
    parser.add_argument("--windows", type=int, default=100, help="windows that the table averages (default: 100)")
    args = parser.parse_args(argv)
    if args.windows < 1:
        raise BadInput(f"--windows is {args.windows}: it must be at least 1")
    setup("cpu")
    folder = run_folder(__file__, args.run)
    model, tokenizer = load(folder / "model.pt")
    T = model.config.block_size
    corpus = json.loads((folder / "config.json").read_text("utf-8"))["corpus"]
    val = load_data(corpus).val
    text = args.text
    if text is None:
        unseen = tokenizer.decode(val)
        fitting = (line for line in unseen.split("\n") if min(24, T) <= len(line) <= min(36, T))
        text = next(fitting, unseen[:min(32, T)])
    if not 1 <= len(text) <= T:
        raise BadInput(f"--text has {len(text)} characters: the model looks at 1 to {T}")

    log = RunLog(__file__, "maps", {**vars(args), "corpus": corpus})
    idx = windows(val, T)[0][:args.windows]
    breaks = ~torch.tensor([char.isalpha() for char in tokenizer.chars])
    rows = habits(attention_maps(model, idx), breaks[idx])
    table(f"What the heads of {args.run} look at, over {len(idx)} windows of {corpus}", rows)
    maps = attention_maps(model, torch.tensor([tokenizer.encode(text)]))
    file = log.figure(draw(maps[:, 0], text), "maps")
    log.finish(text=text, heads=rows)
    say(f"{text!r}: maps drawn in {file}")


if __name__ == "__main__":
    run_program(main)
