"""`stages start`: five questions that find the stage to begin with.

Each stands for what one stage teaches. Whoever does not know an answer begins there: later stages take it for known.
"""

import argparse
import sys
from dataclasses import dataclass

from shared.console import say
from shared.errors import BadInput
from shared.stages import repo


@dataclass(frozen=True)
class Question:
    text: str
    choices: tuple[str, str, str]  # a, b and c
    answer: str
    reason: str  # one sentence
    topic: str  # "... is taught there"
    stage: int  # the stage that teaches it


QUESTIONS = (
    Question(
        "L = x * y, with x = 3 and y = 4. What is the derivative of L with respect to x?",
        ("3", "4", "12"),
        "b",
        "when x grows by a small d, L grows by d times y, and y is 4",
        "what a derivative is and how a program computes it",
        1,
    ),
    Question(
        "A model gives each of 65 characters a score. What does softmax do with the scores?",
        (
            "it keeps the largest score and sets the others to 0",
            "it divides each score by the sum of all scores",
            "it makes probabilities of them: all above 0, with the sum 1",
        ),
        "c",
        "e to the power of any score is above 0, and each power divided by the sum of all of them is a share",
        "how scores become probabilities",
        2,
    ),
    Question(
        "A transformer learns to predict the next token. What does its mask hide from each position?",
        ("the positions after it", "the positions before it", "the tokens that are rare"),
        "a",
        "the next token is the answer, and a model that sees the answer learns to copy it and nothing else",
        "what attention does and why it has a mask",
        5,
    ),
    Question(
        "A model writes one token after the other. What does its KV cache store?",
        (
            "answers to earlier prompts",
            "keys and values of the tokens so far, in each layer",
            "the probabilities of the next token",
        ),
        "b",
        "a new token attends to all tokens before it, and their keys and values have not changed since",
        "how a cache saves work",
        8,
    ),
    Question(
        "What is a reward model trained on?",
        (
            "pairs of answers of which one was preferred",
            "questions, each with its right answer",
            "text without any labels",
        ),
        "a",
        "it is hard to say how good an answer is, but easy to say which of two is better",
        "how a model learns to judge answers",
        11,
    ),
)
LAST = 12  # for who knows all of it


def read(number: int) -> str:
    """The answer to question `number`: a, b, c, or "" for "I do not know".

    Raises BadInput where the input ends; Ctrl-C passes through.
    """
    while True:
        try:
            word = input("> " if sys.stdin.isatty() else "").strip().lower()
        except (EOFError, KeyboardInterrupt) as end:
            say()  # the message begins on a line of its own
            if isinstance(end, KeyboardInterrupt):
                raise
            raise BadInput(f"no answer to question {number} of {len(QUESTIONS)}: give one a line, a, b or c") from None
        if word in ("", "a", "b", "c"):
            return word
        say("answer with a, b or c; press Enter if you do not know")


def ask(number: int, question: Question) -> bool:
    """Whether the learner knows the answer."""
    say(f"\n{number}. {question.text}")
    for letter, choice in zip("abc", question.choices, strict=True):
        say(f"   {letter}  {choice}")
    known = read(number) == question.answer
    say(f"{'right' if known else f'the answer is {question.answer}'}: {question.reason}")
    return known


def way(stage: repo.Stage) -> list[str]:
    """What to do in a stage, a line each."""
    number, first = stage.name[:2], repo.before(stage) is None
    rows = [
        (f"{stage.name}/README.md", "read it first"),
        *([] if first else [(f"uv run stages diff {number}", "what changed since the stage before")]),
        (f"uv run stages run {number}", "train it and see what it does"),
        (f"uv run stages check {number}", "what its checkpoints claim"),
        (f"uv run stages practice {number}", "write its new parts yourself"),
    ]
    return [f"  {todo:28}{why}" for todo, why in rows]


def command(args: argparse.Namespace) -> int:
    """Ask, and say where to begin."""
    top = repo.root()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text are a wrong answer like others
    say("Five questions find the stage to begin with. Answer a, b or c; press Enter if you do not know.")
    known = [ask(number, question) for number, question in enumerate(QUESTIONS, 1)]
    first = next((question for question, right in zip(QUESTIONS, known, strict=True) if not right), None)
    stage = repo.find(str(first.stage if first else LAST), top)
    why = f"it teaches {first.topic}" if first else "it takes all five answers for known"
    say(f"\nBegin with stage {stage.name[:2]}, {stage.title}: {why}.")
    say("\n".join(way(stage)))
    return 0


def add(subparsers) -> None:
    parser = subparsers.add_parser("start", help="five questions that find the stage to begin with")
    parser.set_defaults(func=command)
