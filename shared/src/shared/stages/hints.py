"""`stages check N --practice NAME --hint`: three hints for a definition, one more each time it is asked for.

1. a question: that of a mistake which people make there, else what its first checkpoint claims
2. what the README says of it: why it is there, the paragraph with its formula, and the paper
3. two lines of the course's text

How many were given stands in `.stages/hints.json`, {"05_transformer": {"model.py attention": 2}}. What failed in the
last check stands in `.stages/failed.json`, {"05_transformer": ["tests/test_model.py::test_mask"]}: the question is
about that.
"""

import ast
import json
import math
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

from shared.atomic import write
from shared.console import console, say
from shared.errors import BadInput
from shared.stages import practice, repo
from shared.stages.blank import choose
from shared.stages.definitions import WHOLE, load
from shared.stages.repo import Stage
from shared.stages.uses import Key, uses_of

from rich.markup import escape

LONGEST = 30  # lines of the README that are shown
RARE = 4  # a rare word is one that at most one block in so many has; more than so many make a block certain
SOURCE = re.compile(r"[A-Z](?:[^.]|al\.|\.\d)*\((?:19|20)\d\d\)[^.]*")  # Vaswani et al. (2017), equation 1


def hint(stage: Stage, word: str) -> None:
    """Show one more hint for the definition `word`, below those given before; "" means the next one to write.

    Raises BadInput where there is no copy, for an unknown name, and where it is open which definition is meant.
    """
    file, name = key = meant(stage, word)
    top, label = stage.path.parent, practice.label(key, practice.exercises(stage))
    record = given(top)
    mine = record.setdefault(stage.name, {})
    mine[f"{file} {name}"] = step = min(3, mine.get(f"{file} {name}", 0) + 1)
    for i, (title, lines) in enumerate((question(stage, key), idea(stage, key), code(stage, key))[:step], 1):
        console.print(f"[bold]{escape(label)}, hint {i} of 3: {title}[/bold]", soft_wrap=True)
        for line in lines:
            say(f"  {line}".rstrip())
        say()
    number = stage.name[:2]
    more = f"--practice {label} --hint" if step < 3 else f"--solution {label}"
    say(f"{'one more' if step < 3 else 'all of it'}: uv run stages check {number} {more}")
    (top / ".stages").mkdir(exist_ok=True)
    write(top / ".stages" / "hints.json", json.dumps(record, indent=1) + "\n")


def given(top: Path) -> dict[str, dict[str, int]]:
    """How many hints were given, by stage and definition; a missing or damaged record counts as none."""
    try:
        record = json.loads((top / ".stages" / "hints.json").read_text("utf-8"))
        return {stage: {name: int(n) for name, n in names.items()} for stage, names in record.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def meant(stage: Stage, word: str) -> Key:
    """The one definition that is asked about: of several the first that is not written yet. Raises BadInput."""
    practice.began(stage)
    chosen = choose(practice.exercises(stage), [word] if word else [])
    left = [key for key in practice.in_order(stage, practice.unwritten(stage)) if key in chosen]
    if not left and len(chosen) > 1:
        names = ", ".join(name for _, name in chosen) if word else "NAME"
        command = f"uv run stages check {stage.name[:2]} --practice NAME --hint"
        raise BadInput(f"all is written, so name one definition: {command}" + (f", one of {names}" if word else ""))
    return (left or chosen)[0]


def remember(stage: Stage, failed: list[str]) -> None:
    """Write down which checkpoints of the copy failed just now."""
    file = stage.path.parent / ".stages" / "failed.json"
    known = failures(file)
    if failed != known.get(stage.name, []):
        with suppress(OSError):  # a folder that cannot be written costs the better question, not the check
            file.parent.mkdir(exist_ok=True)
            write(file, json.dumps({**known, stage.name: failed}, indent=1) + "\n")


def failures(file: Path) -> dict[str, list[str]]:
    """What is written down; a missing or damaged record counts as none."""
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def question(stage: Stage, key: Key) -> tuple[str, list[str]]:
    """The question of a trap in the definition, of one that fails the same checkpoint if any failed.

    Without such a trap, what the first checkpoint claims that failed, else the first that concerns the definition.
    """
    file, name = key
    text, traps = load(stage.path / file)[name].text, stage.path / "traps.toml"
    uses = uses_of(stage.path)
    tests = [f"{test}::{name}" for test, name in uses.concern([key])]
    last = failures(stage.path.parent / ".stages" / "failed.json").get(stage.name, [])
    failed = [test for test in last if test in tests]
    for trap in repo.settings(traps).get("trap", []) if traps.is_file() else []:
        inside = trap["file"] == file and trap["find"].strip() in text
        if inside and (not failed or trap["caught_by"] in failed):
            return "a question", [trap["hint"]]
    first = [test.split("::") for test in (failed or tests)[:1]]
    claims = [uses.modules[test].statements[name][0] for test, name in first]
    claim = [(ast.get_docstring(node) or node.name).splitlines()[0] for node in claims]
    return "a question", [f"Is this so with yours? {(claim or ['what its docstring says'])[0]}"]


def idea(stage: Stage, key: Key) -> tuple[str, list[str]]:
    """What the README says of the definition, and where it comes from."""
    file, name = key
    here = load(stage.path / file)
    around = [".".join(name.split(".")[:n]) for n in range(name.count(".") + 1, 0, -1)]  # itself, then its class
    told = " ".join(docstring(here[scope].text) for scope in around if scope in here)
    why, blocks = readme(stage, file, around)
    parts = [[f"why: {why}"] if why else [], nearest(blocks, name, f"{why} {told}")]
    parts += [[f"source: {' '.join(found.split())}"] for found in SOURCE.findall(told)]
    lines = [line for part in parts if part for line in ("", *part)][1:]
    return "the idea", lines or [f"{stage.name}/README.md says nothing of it: read its docstring again"]


def docstring(text: str) -> str:
    """That of a definition's first statement; "" of a piece that is no whole definition."""
    try:
        return ast.get_docstring(ast.parse(text).body[0]) or ""
    except (SyntaxError, TypeError, IndexError):  # a method is indented; a constant has none
        return docstring(f"if 1:\n{text}") if text[:1] == " " else ""


def readme(stage: Stage, file: str, around: list[str]) -> tuple[str, list[str]]:
    """Why the definition changed, and "The idea" in blocks: a paragraph with the formula, drawing or table below it."""
    from shared.stages.pages import rows_of  # only here: a renderer costs the start of every other command
    from shared.stages.readme import CHANGED, MD, chapters

    path = stage.path / "README.md"
    text = path.read_text("utf-8") if path.is_file() else ""
    parts, lines = dict(chapters(MD.parse(text))), text.splitlines()
    rows = {}
    for title, tokens in parts.items():
        if title.startswith(CHANGED):
            starts = [i for i, token in enumerate(tokens) if token.type == "table_open"]
            rows |= {(row.file, row.name): row.why.content for i in starts for row in rows_of(table(tokens[i:]))}
    blocks = []
    for token in parts.get("The idea", []):
        if token.level == 0 and token.map and token.type != "heading_open":
            block = re.sub(r"!\[.*", "", "\n".join(lines[slice(*token.map)])).strip()  # no image
            if token.type == "paragraph_open" or not blocks:
                blocks.append(block)
            else:
                blocks[-1] += f"\n\n{block}"
    blocks = [block for block in blocks if block]
    return next((rows[file, scope] for scope in (*around, WHOLE) if (file, scope) in rows), ""), blocks


def table(tokens: list) -> list:
    """The tokens up to the end of the first table."""
    return tokens[: next(i for i, token in enumerate(tokens) if token.type == "table_close")]


def nearest(blocks: list[str], name: str, told: str) -> list[str]:
    """The block that is about the definition, by its rarest words; none where that is not certain."""
    *scope, last = name.split(".")
    own, words = stems(scope[-1] if scope and last in ("__init__", "forward") else last), stems(told)
    common = Counter(stem for block in blocks for stem in stems(block))

    def worth(block: str) -> float:
        found = stems(block)
        weights = ((3 if stem in own else 1) * math.log(len(blocks) / common[stem]) for stem in found & (own | words))
        rare = {stem for stem in found & (own | words) if common[stem] <= max(1, len(blocks) / RARE)}
        called = re.search(rf"\b{re.escape(last)}\b\W?\(", block)  # attention(q, k), \text{attention}(q, k)
        certain = called or (own and own <= found and rare & own) or len(rare) > RARE
        return (sum(weights) + bool(called)) / math.sqrt(len(found)) if certain else 0

    best = max(blocks, key=worth, default="")
    return best.splitlines()[:LONGEST] if best and worth(best) > 0 else []


def stems(text: str) -> set[str]:
    """The words of a text, without their endings: "split_heads", "SplitHeads" and "splitting heads" are alike."""
    words = re.findall(r"[A-Z]?[a-z]{2,}|[A-Z]{2,}", text)
    return {word.lower()[:5] for word in words if len(word) > 2}


def code(stage: Stage, key: Key) -> tuple[str, list[str]]:
    """The first two lines of the course's text that the learner does not have."""
    file, name = key
    course, mine = practice.text(stage.path / file), practice.text(practice.copy_of(stage) / file)
    node, own = practice.functions(course)[name][-1], practice.functions(mine).get(name, [])
    written = {bare(line) for other in own for line in mine.splitlines()[other.lineno : other.end_lineno]}
    last = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.body[0].lineno - 1
    lines = [line for line in course.splitlines()[last : node.end_lineno] if bare(line) and bare(line) not in written]
    return "two lines of code", [line[node.col_offset + 4 :] for line in lines[:2]] or ["you have every line of it"]


def bare(line: str) -> str:
    """A line of code without its comment."""
    return re.sub(r"(^|  )#.*", "", line.strip())
