"""Distillation: a small model learns what a large one would answer, and how sure it would be.

    uv run stages run 10                                                       # a teacher, the run "default"
    uv run stages run 10 extras/distill.py --into out/texts.jsonl              # its answers, as records
    uv run stages run 10 train.py --n-expert 0 --n-layer 2 --n-embd 64 --steps 600 --name small    # a smaller base
    uv run stages run 10 sft.py --data out/texts.jsonl --base small --name student
    uv run stages run 10 extras/distill.py --teacher smollm2 --data my/questions.jsonl --into out/texts.jsonl

A right answer is one token at each place. A teacher gives a probability to every token, and says with it which mistakes
are small ones. Two ways to pass that on:

- on scores (`distil`): at each token of an answer, the student's probabilities are pulled towards the teacher's.
  Hinton et al., "Distilling the Knowledge in a Neural Network" (2015). Both need the same vocabulary.
- on texts (`teacher_texts`): the teacher answers, and the student is tuned on its answers as on any others. Kim & Rush,
  "Sequence-Level Knowledge Distillation" (2016); they search for the likeliest answer with a beam, here each token is
  the likeliest. The teacher may have any vocabulary, and nothing but its texts is needed.

Shapes: R rows, T tokens, V tokens of the vocabulary, N tokens that are learned.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.atomic import write
from shared.console import say
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program

import torch
import torch.nn.functional as F

import tasks
from chat import open_model
from data import Batch, Example, apart, collate, read_records
from evaluate import answers
from hf import Opened
from sample import SampleConfig, evaluation
from sft import SFTConfig, room
from train import mixtures, routing_loss, schedule


@dataclass
class DistillConfig(SFTConfig):
    """The recipe of sft.py and the teacher's part in it. Raises BadInput for one that cannot run."""

    temperature: float = 2.0  # scores are divided by it: above 1, the less likely tokens count for more
    reverse: bool = False  # KL(student || teacher) in place of KL(teacher || student)
    mix: float = 0.5  # the teacher's share in the loss; the right answers have the rest

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise BadInput(f"temperature is {self.temperature}: it must be above 0, and finite")
        if not 0 <= self.mix <= 1:
            raise BadInput(f"mix is {self.mix}: it must be from 0 to 1")


def divergence(student, teacher, learned, temperature: float = 1.0, reverse: bool = False):
    """T^2 KL between the softmax of both scores / T, summed over the tokens that are `learned`, in nats.

    Scores [R, T, V] x 2, learned [R, T] -> []. Forward: sum_v p (ln p - ln q) with the teacher's p and the student's q;
    the student has to cover all that the teacher finds possible. Reverse: sum_v q (ln q - ln p); it may leave things
    out, and must not claim what the teacher finds impossible (Gu et al., "MiniLLM", 2023).

    With p = (3/4, 1/4) and q = (1/2, 1/2): forward 0.131, reverse 0.144.

    A score's gradient through a softmax at temperature T has a factor 1 / T, and the difference q - p shrinks by
    another 1 / T. The factor T^2 makes up for both, so that another temperature wants no other learning rate.
    """
    wide = torch.promote_types(student.dtype, torch.float32)  # a logarithm needs more than bfloat16's 8 bits
    log_q, log_p = (F.log_softmax(scores[learned].to(wide) / temperature, dim=-1) for scores in (student, teacher))
    p, other = (log_q, log_p) if reverse else (log_p, log_q)  # [N, V] x 2
    return temperature**2 * (p.exp() * (p - other)).sum()


def scores(model, batch: Batch, precision: str = "float32"):
    """What the model gives each candidate for the token behind each token of the batch: [R, T, V]."""
    # As in sft.answer_loss: padding may reach beyond the context.
    plain = batch.part.max() == 0 and batch.x.shape[1] <= model.config.block_size and not mixtures(model)
    with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return model(batch.x, look=None if plain else apart(model, batch))


def taught(teacher, batch: Batch, precision: str = "float32"):
    """The teacher's scores [R, T, V]: no gradient, and in evaluation mode, so that nothing in them is chance."""
    with torch.no_grad(), evaluation(teacher):
        return scores(teacher, batch, precision)


def loss(student, teacher, batch: Batch, config: DistillConfig):
    """mix T^2 KL + (1 - mix) (-ln q of the right token), summed over the tokens of answers, in nats."""
    mine = scores(student, batch, config.precision)
    total = torch.zeros((), device=mine.device)
    if config.mix > 0:
        theirs = taught(teacher, batch, config.precision)
        total = config.mix * divergence(mine, theirs, batch.learned, config.temperature, config.reverse)
    if config.mix < 1:
        wide = torch.promote_types(mine.dtype, torch.float32)
        right = F.cross_entropy(mine[batch.learned].to(wide), batch.y[batch.learned], reduction="sum")
        total = total + (1 - config.mix) * right
    return total


def gradient(student, teacher, examples: list[Example], config: DistillConfig):
    """Add the gradient of the mean loss per answer token to the student, a micro-batch at a time -> loss."""
    parts = [examples[i:i + config.micro_batch] for i in range(0, len(examples), config.micro_batch)]
    batches = [collate(part, room(student, part) if config.pack else None) for part in parts]
    batches = [batch.to(next(student.parameters()).device) for batch in batches]
    count, total = sum(batch.learned.sum() for batch in batches), 0.0
    for batch in batches:
        part = loss(student, teacher, batch, config) / count
        (part + routing_loss(student, config) * (batch.learned.sum() / count)).backward()
        total += part.detach()
    return total


def distil(student, teacher, stream, config: DistillConfig, optimizer):
    """Train the student on the batches of examples of `stream`, as `sft.tune` does. Yields (step, loss) after each.

    Raises BadInput for models of different vocabularies, and at the first loss that is infinite or nan.
    """
    if student.config.vocab_size != teacher.config.vocab_size:
        raise BadInput(f"the student has {student.config.vocab_size} tokens, the teacher {teacher.config.vocab_size}: "
                       "scores compare only where both have one vocabulary; learn from the teacher's texts instead")
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    student.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step, config)
        value = gradient(student, teacher, next(stream), config).item()
        if not math.isfinite(value):
            raise BadInput(f"the loss is {value} at step {step + 1}: lower --lr, {config.lr:g}, and --muon-lr")
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1, value


def teacher_texts(teacher: Opened, records: list[dict], length: int, config=None, generator=None) -> list[dict]:
    """The records with the teacher's own last answers, by default the likeliest token at each place.

    Those that have no end within `length` tokens, or are empty, are left out: they would teach answers that stop
    anywhere.
    """
    asked = [record["messages"][:-1] for record in records]
    texts, ended = answers(teacher, asked, length, config, generator=generator)
    return [{**record, "messages": [*messages, {"role": "assistant", "content": text.strip()}]}
            for record, messages, text, over in zip(records, asked, texts, ended, strict=True) if over and text.strip()]


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="default", help="a run of sft.py, or what hf.py opens (default: default)")
    parser.add_argument("--data", type=Path, help="a file of records, of which the questions are used (default: tasks)")
    parser.add_argument("--corpus", help="where the tasks' words are from (default: shakespeare)")
    parser.add_argument("--records", type=int, default=6000, help="tasks to answer (default: 6000)")
    parser.add_argument("--length", type=int, default=40, help="most tokens of an answer (default: 40)")
    parser.add_argument("--into", type=Path, required=True, help="the file that is written, JSON lines")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, SampleConfig)
    parser.set_defaults(temperature=0.0)
    args = parser.parse_args(argv)
    if min(args.records, args.length) < 1:
        raise BadInput("--records and --length must be at least 1")
    place = Path(os.environ.get("STAGES_FROM", "."), args.into)  # where it was typed
    device = setup(args.device, args.seed)
    if args.data is not None:
        records = read_records(args.data)
    else:
        records = tasks.make(tasks.words(corpus.load(args.corpus).text), "train", args.records, seed=args.seed)
    teacher = open_model(args.teacher, device)
    config, generator = options.build(SampleConfig, args), torch.Generator().manual_seed(args.seed)
    written = teacher_texts(teacher, records, args.length, config, generator)
    if not written:
        raise BadInput(f"no answer of {args.teacher} ends within {args.length} tokens: give it a larger --length")
    place.parent.mkdir(parents=True, exist_ok=True)
    write(place, tasks.dumps(written))
    say(f"{len(written):,} answers written to {args.into}; {len(records) - len(written):,} had no end and are left out")


if __name__ == "__main__":
    run_program(main)
