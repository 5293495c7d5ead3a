"""Conversations: how turns are written for a model, which tokens are an answer, and a chat in the terminal.

    uv run python chat.py                          # with the model that sft.py tuned
    uv run python chat.py --model smollm2          # with a real one
    uv run python chat.py --export my/folder       # for other programs: a folder that transformers opens

A base model continues texts. For it to answer, each turn is written in one fixed form, with tags that no text contains:

    <|user|>Reverse the word 'love'.<|end|><|assistant|>evol<|end|>

The form is a program in Jinja, the chat template, that travels with the weights: whoever talks to the model writes
turns exactly as it was trained on. A text that ends in <|assistant|> (the generation prompt) asks for an answer, and
<|end|> is how the model says that its answer is over.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from shared import options
from shared.console import console, say
from shared.device import setup
from shared.errors import BadInput
from shared.program import command, run_program
from shared.runlog import run_folder

import torch

import checkpoint
import hf
from data import ROLES, Example
from model import GPT
from sample import SampleConfig
from tokenizer import extend

END_OF_TURN = "<|end|>"
TAGS = (*(f"<|{role}|>" for role in ROLES), END_OF_TURN)
# "generation" marks what is to be learned, for trainers that read it. It changes no text.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_tags(model: GPT, tokenizer, text: str = ""):
    """A base model and its tokenizer -> both with the tags, and with the characters of `text` -> (model, tokenizer).

    A new token's vector is drawn with the mean and the spread that the old vectors have in each channel, so that its
    score is neither much higher nor much lower than theirs. The old ones keep theirs, at the places that they now have.
    """
    new, places = extend(tokenizer, text, TAGS)
    if len(new) == len(tokenizer):
        return model, tokenizer
    bigger = GPT(replace(model.config, vocab_size=len(new))).to(model.tok_emb.weight).train(model.training)
    state = dict(model.state_dict())
    for name in ("tok_emb.weight", "head.weight"):
        table = state[name]  # [V, C]
        rows = table.mean(0) + table.std(0) * torch.randn(len(new), table.shape[1]).to(table)
        rows[places] = table[:len(places)]  # some models have more rows than tokens
        state[name] = rows
    bigger.load_state_dict(state)
    return bigger, new


def ours(model: GPT, tokenizer, saved: dict | None = None) -> hf.Opened:
    """A model of ours as one to talk to, with the form that it was tuned on: `saved` is its checkpoint.

    Raises BadInput for one that does not know the tags.
    """
    if saved and "template" in saved:
        return hf.Opened(model, tokenizer, saved["template"], saved["names"], ends={*saved["ends"]})
    if not {*TAGS} <= tokenizer.special.keys():
        raise BadInput("this model does not know the tags of a conversation: it is a base model, tune it first")
    return hf.Opened(model, tokenizer, TEMPLATE, ends={tokenizer.special[END_OF_TURN]})


def form(opened: hf.Opened) -> dict:
    """What a checkpoint has to keep of a model's form of conversation, as plain data."""
    return {"template": opened.template, "names": opened.names, "ends": sorted(opened.ends)}


def run_file(name: str | Path) -> Path | None:
    """The checkpoint of the run `name` of this stage; None where there is none."""
    file = run_folder(__file__, str(name)) / "model.pt" if Path(name).name == str(name) else None
    return file if file is not None and file.is_file() else None


def run_flags(name: str | Path) -> dict:
    """The flags that the run `name` was made with; {} where there is no such run."""
    file = run_file(name)
    return checkpoint.read(file)["args"] if file else {}


def open_model(name: str | Path, device="cpu") -> hf.Opened:
    """A run of this stage by its name, or what `hf.load` opens.

    Raises BadInput where there is neither, and for a model that has no chat template.
    """
    if file := run_file(name):
        return ours(*checkpoint.load(file, device))
    if name == "default" and not Path(name).exists():
        raise BadInput("there is no tuned model yet: run " + command(Path(__file__).parent.name, "sft.py"))
    found = hf.load(name)
    if found.template is None:
        raise BadInput(f"{name} has no chat template: it is a base model, tune it first")
    found.model.to(device)
    return found


def prompt(opened: hf.Opened, messages: list[dict], **more) -> list[int]:
    """A conversation -> the ids that the model answers to.

    Raises BadInput for a message that holds a tag, which is any special token: it would end there, and go on in someone
    else's name.
    """
    for message in messages:
        for name in opened.tokenizer.special:
            if name in message["content"]:
                raise BadInput(f"a message holds {name}, which is a tag: write it in another way")
    return hf.chat(opened, messages, **more)


def said(opened: hf.Opened, ids: list[int]) -> str:
    """The tokens of an answer as text. A tag in it, which a young model may write, is a "?": it speaks for nobody."""
    tags = {i: name for name, i in opened.tokenizer.special.items()}
    parts = itertools.groupby(ids, lambda i: i in tags)
    return "".join("?" * len(list(part)) if tag else opened.tokenizer.decode(list(part)) for tag, part in parts)


def conversation(opened: hf.Opened, messages: list[dict]) -> Example:
    """A whole conversation as tokens, of which those of the answers are to be learned, and the token that ends each.

    The text is tokenised in one piece, since merges across the edge of a part could give other tokens. Where an answer
    begins is where the prompt for it ends. Raises BadInput for a template in which that is not so, or in which an
    answer has no end.
    """
    ids = prompt(opened, messages, add_generation_prompt=False)
    learned = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = prompt(opened, messages[:i])
            start = len(before)
            end = next((j for j in range(start, len(ids)) if ids[j] in opened.ends), None)
            if ids[:start] != before or end is None:
                raise BadInput("with this chat template, an answer does not begin where its prompt ends, or has no end")
            learned[start:end + 1] = [True] * (end + 1 - start)
    return Example(ids, learned)


def talk(opened: hf.Opened, length: int, config: SampleConfig, system: str | None = None):
    """Ask for a line, answer it, and again, until an empty line or the end of the input.

    Once the conversation fills the model's context, its oldest turns are forgotten, and that is said.
    """
    quiet = replace(opened, ends={*opened.ends, *opened.tokenizer.special.values()})  # any tag ends an answer
    start = [] if system is None else [{"role": "system", "content": system}]
    turns = []
    while True:
        try:
            asked = console.input("[bold]you:[/] ").strip()
        except EOFError:
            return
        if not asked:
            return
        turns.append({"role": "user", "content": asked})
        try:
            ids = prompt(opened, start + turns)
            while len(ids) + length > opened.model.config.block_size and len(turns) > 1:
                turns = turns[2:]
                say("(the conversation is longer than the model's context: its first turns are forgotten)")
                ids = prompt(opened, start + turns)
            pieces = []
            for text in hf.write(quiet, ids, length, config):
                say(text, end="")
                pieces.append(text)
            say()
        except BadInput as error:  # one line that cannot be answered does not end the talk
            say(str(error))
            turns.pop()
            continue
        if answer := "".join(pieces).strip():
            turns.append({"role": "assistant", "content": answer})
        else:
            turns.pop()


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a run of sft.py, or what hf.py opens (default: default)")
    parser.add_argument("--system", help="what the assistant is told before the conversation")
    parser.add_argument("--length", type=int, help="most tokens of an answer (default: half the context, 300 at most)")
    parser.add_argument("--export", metavar="FOLDER", help="write the model there, with its template, and do not talk")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, SampleConfig)
    parser.set_defaults(temperature=0.0)
    args = parser.parse_args(argv)
    config = options.build(SampleConfig, args)
    if args.length is not None and args.length < 1:
        raise BadInput(f"--length {args.length}: write at least 1 token")
    device = setup(args.device, args.seed)
    with console.status(f"opening {args.model}"):
        found = open_model(args.model, device)
    if args.export is not None:
        end = found.names.get("eos_token", END_OF_TURN)
        folder = hf.export(found.model, found.tokenizer, args.export, found.template, end)
        stage = Path(__file__).parent.name
        say(f"written to {folder}, go on with {command(stage, 'chat.py', '--model', args.export)}")
        return
    say("an empty line ends the talk")
    talk(found, args.length or min(300, found.model.config.block_size // 2), config, args.system)


if __name__ == "__main__":
    run_program(main)
