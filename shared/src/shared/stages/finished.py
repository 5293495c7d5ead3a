"""What there is to see once a stage is written: what differs from the course's text, how to train the model."""

import ast

from shared.stages import practice
from shared.stages.repo import Stage


def finished(stage: Stage) -> str:
    """The lines that a learner reads in the end."""
    known, mine, number = practice.exercises(stage), practice.asked(stage), stage.name[:2]
    course = {file: practice.functions(practice.text(stage.path / file)) for file, _ in known}
    other = [key for key in mine if not same(practice.learners(stage, key[0]).get(key[1]), course[key[0]][key[1]])]
    lines = ["all is written, and every definition is the course's own code"]
    if other:
        names = ", ".join(practice.label(key, known) for key in other)
        lines = [f"all is written, and passes; {len(other)} of {len(mine)} read differently from the course's: {names}"]
        lines += [f"to compare one: uv run stages check {number} --solution {practice.label(other[0], known)}"]
    if (stage.path / stage.main).is_file():
        scripts = [stage.main, *["sample.py"] * (stage.main == "train.py" and (stage.path / "sample.py").is_file())]
        runs = ", then: ".join(f"uv run python {script}" for script in scripts)
        lines += [f"train your own model: cd practice/{stage.name}, then: {runs}"]
    return "\n".join(lines)


def same(mine: list[ast.FunctionDef] | None, theirs: list[ast.FunctionDef] | None) -> bool:
    """Whether functions are the same code, whatever their comments and docstrings."""
    return bool(mine and theirs) and [*map(bare, mine)] == [*map(bare, theirs)]


def bare(node: ast.FunctionDef) -> list[str]:
    """Signature and statements, without the docstring."""
    parts = [node.args, *node.decorator_list, *node.body[ast.get_docstring(node) is not None :]]
    return [ast.dump(part) for part in parts]
