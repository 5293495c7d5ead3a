"""`stages diff --html FILE`: one page that needs nothing else, old and new side by side per definition.

On a narrow screen the two sides stack: what is equal is shown once, a changed line as old above new.
"""

import re
from difflib import SequenceMatcher
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from shared.stages.definitions import Change
from shared.stages.repo import Stage

from pygments.lexers.python import PythonLexer
from pygments.token import Token

SIMILAR = 0.5  # two lines at least this alike (0 to 1) are an old and a new version of one line
FOLD, KEEP = 20, 3  # longer runs of equal lines are folded, but for the lines at their ends

GROUPS = [
    (Token.Comment, "c"), (Token.String, "s"), (Token.Number, "m"), (Token.Keyword, "k"), (Token.Operator.Word, "k"),
    (Token.Name.Function, "f"), (Token.Name.Class, "f"), (Token.Name.Decorator, "f"), (Token.Name.Builtin, "m"),
]  # fmt: skip

PAGE = Template(Path(__file__).with_name("page.html").read_text("utf-8"))


def highlight(text: str) -> list[list[tuple[str, str]]]:
    """The lines of a piece of Python as (CSS class or "", text) runs."""
    lines = [[]]
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        css = next((css for group, css in GROUPS if kind in group), "")
        for i, part in enumerate(value.split("\n")):
            if i:
                lines.append([])
            if part:
                lines[-1].append((css, part))
    return lines


def paint(runs: list[tuple[str, str]], marked: frozenset[int], tag: str) -> str:
    """One highlighted line as HTML; the characters at the positions `marked` stand inside <tag>."""
    out, at = [], 0
    for css, text in runs:
        for mark, places in groupby(range(len(text)), key=lambda i: at + i in marked):
            part = escape("".join(text[i] for i in places), quote=False)
            part = f'<span class="{css}">{part}</span>' if css else part
            out.append(f"<{tag}>{part}</{tag}>" if mark else part)
        at += len(text)
    return "".join(out)


def differences(old: str, new: str) -> tuple[frozenset[int], frozenset[int]]:
    """The positions of the characters that differ between two versions of a line, word by word."""
    sides = [re.findall(r"\w+|\s+|.", line) for line in (old, new)]
    marked = [set(range(len(old))), set(range(len(new)))]
    for block in SequenceMatcher(None, *sides, False).get_matching_blocks():
        for side, start, places in zip(sides, (block.a, block.b), marked, strict=True):
            begin = len("".join(side[:start]))
            places.difference_update(range(begin, begin + len("".join(side[start : start + block.size]))))
    return frozenset(marked[0]), frozenset(marked[1])


def versions(old: list[str], new: list[str]) -> list[tuple[int, int]]:
    """Which old line became which new line: the pairs in order whose likeness is greatest in sum.

    ["a = 1", "b = 2"], ["x()", "b = 3"] -> [(1, 1)]
    """
    best = [[(0.0, ())] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i, before in enumerate(old):
        for j, after in enumerate(new):
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], key=lambda entry: entry[0])
            likeness = SequenceMatcher(None, before.strip(), after.strip(), False).ratio()
            score = best[i][j][0] + likeness
            if before.strip() and likeness >= SIMILAR and score > best[i + 1][j + 1][0]:
                best[i + 1][j + 1] = score, (best[i][j][1], (i, j))
    pairs, chain = [], best[-1][-1][1]
    while chain:
        chain, pair = chain
        pairs.append(pair)
    return pairs[::-1]


def align(old: list[str], new: list[str]) -> list[tuple[str, range, range]]:
    """Both sides cut into blocks: "same" lines, one line in two "versions", or lines that are "other".

    ["a = 1", "b"], ["a = 2", "b", "c"] -> versions 0:1 0:1, same 1:2 1:2, other 2:2 2:3
    """
    blocks = []
    for tag, i, i_end, j, j_end in SequenceMatcher(None, old, new, False).get_opcodes():
        if tag == "equal":
            blocks.append(("same", range(i, i_end), range(j, j_end)))
            continue
        pairs = [(i + a, j + b) for a, b in versions(old[i:i_end], new[j:j_end])]
        for a, b in [*pairs, (i_end, j_end)]:
            if a > i or b > j:
                blocks.append(("other", range(i, a), range(j, b)))
            if (a, b) in pairs:
                blocks.append(("versions", range(a, a + 1), range(b, b + 1)))
            i, j = a + 1, b + 1
    return blocks


def block(
    lines: list[list[tuple[str, str]]], css: str = "", marked: frozenset[int] = frozenset(), tag: str = ""
) -> str:
    """Highlighted lines as HTML. A line that wraps goes on two columns right of where it begins."""
    out = []
    for runs in lines:
        text = "".join(text for _, text in runs)
        indent = len(text) - len(text.lstrip()) + 2
        out.append(f'<span style="--in:{indent}ch">{paint(runs, marked, tag)}\n</span>')
    return f'<pre class="{css}">{"".join(out)}</pre>'


def row(left: str, right: str) -> str:
    return f'<div class="row">{left}{right}</div>\n'


def same(lines: list[list[tuple[str, str]]]) -> str:
    """Equal lines, on both sides; the middle of a long run is folded away."""
    if len(lines) <= FOLD:
        return row(block(lines, "twin"), block(lines))
    head, middle, end = lines[:KEEP], lines[KEEP:-KEEP], lines[-KEEP:]
    folded = row(block(middle, "twin"), block(middle))
    return f"{same(head)}<details><summary>{len(middle)} equal lines</summary>{folded}</details>{same(end)}"


def side_by_side(change: Change) -> str:
    """The rows of a changed definition."""
    old, new = change.old.rstrip().split("\n"), change.new.rstrip().split("\n")
    before, after = highlight("\n".join(old)), highlight("\n".join(new))
    rows = []
    for kind, a, b in align(old, new):
        if kind == "same":
            rows.append(same([after[j] for j in b]))
            continue
        marks = differences(old[a[0]], new[b[0]]) if kind == "versions" else (frozenset(), frozenset())
        left = block([before[i] for i in a], "old" if a else "none", marks[0], "del")
        right = block([after[j] for j in b], "add" if b else "none", marks[1], "ins")
        rows.append(row(left, right))
    return "".join(rows)


def section(change: Change) -> str:
    """One definition: both sides if it changed, one if it is new, and folded away if it was removed."""
    added, removed = change.counts
    note = {"new": f"+{added}", "changed": f"+{added} &minus;{removed}", "removed": f"&minus;{removed}"}[change.status]
    if change.status == "changed":
        body = side_by_side(change)
    else:
        body = block(highlight((change.new or change.old).rstrip()))
    if change.status == "removed":
        body = f"<details><summary>what it was</summary>{body}</details>"
    head = f'<code>{escape(change.name)}</code> <span class="note">{mark(change)} {note}</span>'
    return f'<section id="{anchor(change)}">\n<h3>{head}</h3>\n{body}\n</section>'


def mark(change: Change) -> str:
    return f'<span class="{change.status}">{change.status}</span>'


def anchor(change: Change) -> str:
    return re.sub(r"[^\w.-]+", "-", f"{change.file}-{change.name}")


def page(old: Stage, new: Stage, changes: list[Change]) -> str:
    """The whole page."""
    contents, body = [], []
    for file in dict.fromkeys(change.file for change in changes):
        mine = [change for change in changes if change.file == file]
        links = [f'<li><a href="#{anchor(c)}"><code>{escape(c.name)}</code></a> {mark(c)}</li>' for c in mine]
        contents.append(f"<code>{file}</code>\n<ul>\n" + "\n".join(links) + "\n</ul>")
        body.append(f"<h2><code>{file}</code></h2>\n" + "\n".join(map(section, mine)))
    counts = [sum(change.status == status for change in changes) for status in ("new", "changed", "removed")]
    return PAGE.substitute(
        title=f"From {old.name} to {new.name}",
        summary=f"{escape(new.title)}. Definitions: {counts[0]} new, {counts[1]} changed, {counts[2]} removed.",
        contents="\n".join(contents),
        body="\n".join(body),
    )
