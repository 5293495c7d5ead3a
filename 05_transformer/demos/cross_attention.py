"""An encoder and a decoder: cross-attention on a toy translation, against one vector that has to hold it all.

    uv run stages run 05 demos/cross_attention.py
    uv run stages run 05 demos/cross_attention.py --task sort

The source is a row of letters, the target the same letters in reverse (or sorted). The encoder reads the source; the
decoder writes the target letter by letter, as the language model does, and looks at the source by cross-attention:

- queries come from the decoder, keys and values from the encoder's output, the memory;
- there is no mask: the whole source is known before the first letter is written.

"one vector" is the older design (Sutskever, Vinyals & Le 2014): all that the decoder gets is the encoder's vector of
the last position. "attention" lets it look at every position (Bahdanau, Cho & Bengio 2015). The two models have the
same parameters and the same training; they differ in how much of the memory the decoder may see.
"""

import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn

from model import (
    Block,
    CausalSelfAttention,
    FeedForward,
    LayerNorm,
    ModelConfig,
    sinusoidal_positions,
    variance_scaling_,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LETTERS = string.ascii_lowercase
START = len(LETTERS)  # the decoder's first input: nothing has been written yet
LENGTHS = range(4, 17)  # letters in a training example
TASKS = {"reverse": lambda source: source.flip(1), "sort": lambda source: source.sort(1).values}


class CrossAttention(CausalSelfAttention):
    """Attention whose queries come from one sequence and whose keys and values come from another.

    x [B, T, C], memory [B, S, C] -> [B, T, C]. The weights [B, H, T, S] of the last call stay in `weights`.
    """

    def forward(self, x, memory):
        q = self.split_heads(self.query(x))  # [B, H, T, D]
        k, v = (self.split_heads(layer(memory)) for layer in (self.key, self.value))  # [B, H, S, D]
        self.weights = F.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1)  # [B, H, T, S], no mask
        return self.proj(self.merge_heads(self.weights @ v))


class EncoderBlock(nn.Module):
    """A block whose attention sees the whole sequence, past and future: [B, S, C] -> [B, S, C]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.n_embd)
        self.attn = CrossAttention(config)
        self.norm2 = LayerNorm(config.n_embd)
        self.ffn = FeedForward(config)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y)
        return x + self.ffn(self.norm2(x))


class DecoderBlock(Block):
    """A block that looks at the memory between attending to its own past and thinking: [B, T, C] -> [B, T, C]."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.norm3 = LayerNorm(config.n_embd)
        self.cross = CrossAttention(config)

    def forward(self, x, memory):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm3(x), memory)
        return x + self.ffn(self.norm2(x))


class Seq2Seq(nn.Module):
    """Source [B, S] and the target so far [B, T] -> scores of the next target letter [B, T, V]."""

    def __init__(self, config: ModelConfig, one_vector: bool = False):
        super().__init__()
        self.one_vector = one_vector
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.register_buffer("pos_emb", sinusoidal_positions(config.block_size, config.n_embd))
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layer))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.n_layer))
        self.norm1 = LayerNorm(config.n_embd)
        self.norm2 = LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        variance_scaling_(self.head, gain=0.1)

    def encode(self, source):
        """[B, S] -> the memory, [B, S, C] or [B, 1, C]."""
        x = self.tok_emb(source) + self.pos_emb[:source.shape[1]]
        for block in self.encoder:
            x = block(x)
        return self.norm1(x[:, -1:] if self.one_vector else x)

    def decode(self, memory, target):
        """Memory and the target so far [B, T] -> [B, T, V]."""
        x = self.tok_emb(target) + self.pos_emb[:target.shape[1]]
        for block in self.decoder:
            x = block(x, memory)
        return self.head(self.norm2(x))

    def forward(self, source, target):
        return self.decode(self.encode(source), target)


def shifted(target):
    """What the decoder reads while it writes `target` [B, T]: the start sign, then every letter but the last."""
    return F.pad(target[:, :-1], (1, 0), value=START)


@torch.no_grad()
def translate(model, source):
    """Write the likeliest letter, again and again: source [B, S] -> target [B, S]."""
    memory, written = model.encode(source), torch.full((len(source), 1), START)
    for _ in range(source.shape[1]):
        letter = model.decode(memory, written)[:, -1, :START].argmax(-1, keepdim=True)
        written = torch.cat([written, letter], dim=1)
    return written[:, 1:]


def fit(model, task, steps: int, batch_size: int, lr: float, seed: int):
    """Train on random letters, a new length each step. Yields (step, loss)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        length = LENGTHS[torch.randint(len(LENGTHS), (1,), generator=generator).item()]
        source = torch.randint(START, (batch_size, length), generator=generator)
        target = TASKS[task](source)
        loss = F.cross_entropy(model(source, shifted(target)).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step + 1, loss.item()


def exact(model, task, length: int, count: int, seed: int) -> float:
    """The share of `count` new sources of that length whose translation is right in every letter."""
    source = torch.randint(START, (count, length), generator=torch.Generator().manual_seed(seed))
    return (translate(model, source) == TASKS[task](source)).all(1).float().mean().item()


def draw(source: str, target: str, weights, shares: dict):
    """The cross-attention map [T, S] of one example, and the share of right translations by length."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    left.imshow(weights.tolist(), cmap="Greys", vmin=0, vmax=1)
    left.set_xticks(range(len(source)), source)
    left.set_yticks(range(len(target)), target)
    left.set(title="cross-attention, mean of the heads", xlabel="source, read", ylabel="target, as it is written")
    for name, by_length in shares.items():
        right.plot(list(by_length), list(by_length.values()), marker="o", markersize=3, label=name)
    right.set(title="right in every letter", xlabel="letters", ylabel="share of new sequences", ylim=(-0.03, 1.03))
    right.legend()
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=list(TASKS), default="reverse", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of each model (default: 1200)")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise BadInput(f"--steps is {args.steps}: it must be at least 1")
    setup("cpu", args.seed)
    log = RunLog(__file__, "cross_attention", vars(args))
    config = ModelConfig(vocab_size=START + 1, block_size=max(LENGTHS), n_embd=64, n_head=2, n_layer=1)

    models, shares = {}, {}
    for name in ("attention", "one vector"):
        torch.manual_seed(args.seed)
        model = models[name] = Seq2Seq(config, one_vector=name == "one vector")
        with progress(args.steps, f"{args.task}, {name}") as bar:
            for step, loss in fit(model, args.task, args.steps, 64, 3e-3, args.seed):
                bar.update(step, loss=loss)
        shares[name] = {length: exact(model, args.task, length, 300, args.seed + 1) for length in LENGTHS}
    table(
        f"{args.task}: share of 300 new sequences that are right in every letter",
        [{"letters": n, **{name: by_length[n] for name, by_length in shares.items()}} for n in LENGTHS],
    )

    source = torch.randint(START, (1, 12), generator=torch.Generator().manual_seed(args.seed + 2))
    target = translate(models["attention"], source)
    models["attention"](source, shifted(target))
    weights = models["attention"].decoder[-1].cross.weights[0].mean(0).detach()  # [H, T, S] -> [T, S]
    words = ["".join(LETTERS[i] for i in row[0].tolist()) for row in (source, target)]
    file = log.figure(draw(*words, weights, shares), "cross_attention")
    log.finish(task=args.task, steps=args.steps, shares=shares)
    say(f"{words[0]} -> {words[1]}: where each letter came from is drawn in {file}")


if __name__ == "__main__":
    run_program(main)
