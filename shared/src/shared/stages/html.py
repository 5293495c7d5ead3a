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

GROUPS = [
    (Token.Comment, "c"), (Token.String, "s"), (Token.Number, "m"), (Token.Keyword, "k"), (Token.Operator.Word, "k"),
    (Token.Name.Function, "f"), (Token.Name.Class, "f"), (Token.Name.Decorator, "f"), (Token.Name.Builtin, "m"),
]  # fmt: skip

PAGE = Template(Path(__file__).with_name("page.html").read_text("utf-8"))


def highlight(text: str, lexer: type = PythonLexer) -> list[list[tuple[str, str]]]:
    """The lines of a program (by default Python), each as words with CSS classes: ("k", "def"), ("", " "), ..."""
    lines = [[]]
    for kind, value in lexer(stripnl=False, ensurenl=False).get_tokens(text):
        css = next((css for group, css in GROUPS if kind in group), "")
        for word in re.findall(r"\w+|[^\S\n]+|\W", value):
            if word == "\n":
                lines.append([])
            else:
                lines[-1].append((css, word))
    return lines


def differences(old: list, new: list) -> tuple[set[int], set[int]]:
    """Which words of an old and of a new version of a line the other does not have."""
    marked = set(range(len(old))), set(range(len(new)))
    for i, j, size in SequenceMatcher(None, old, new, False).get_matching_blocks():
        marked[0].difference_update(range(i, i + size))
        marked[1].difference_update(range(j, j + size))
    return marked


def align(old: list[str], new: list[str]) -> list[tuple[range, range]]:
    """Both sides cut into blocks: equal lines, two versions of one line, or lines that only one side has.

    ["a = 1", "b"], ["a = 2", "b", "c"] -> lines 0:1 and 0:1, 1:2 and 1:2, 2:2 and 2:3
    """
    blocks = []
    for tag, i, i_end, j, j_end in SequenceMatcher(None, old, new, False).get_opcodes():
        a, b = range(i, i_end), range(j, j_end)
        blocks += pair(old, new, a, b) if tag == "replace" else [(a, b)]
    return blocks


def pair(old: list[str], new: list[str], a: range, b: range) -> list[tuple[range, range]]:
    """Unequal lines, cut above and below the two that are most alike, then again, until no two are."""
    pairs = [(i, j) for i in a if old[i].strip() for j in b]
    alike = [SequenceMatcher(None, old[i].strip(), new[j].strip(), False).ratio() for i, j in pairs]
    if max(alike, default=0) < SIMILAR:
        return [(a, b)] if a or b else []
    i, j = pairs[alike.index(max(alike))]
    above = pair(old, new, range(a.start, i), range(b.start, j))
    below = pair(old, new, range(i + 1, a.stop), range(j + 1, b.stop))
    return [*above, (range(i, i + 1), range(j, j + 1)), *below]


def block(lines: list[list[tuple[str, str]]], css: str = "", marked: set[int] = frozenset(), tag: str = "") -> str:
    """Highlighted lines as HTML, the words at the positions `marked` inside <tag>.

    A line that wraps goes on two columns right of where it begins.
    """
    out = []
    for words in lines:
        text = "".join(word for _, word in words)
        out.append(f'<span style="--in:{len(text) - len(text.lstrip()) + 2}ch">')
        for (group, mark), run in groupby(enumerate(words), lambda entry: (entry[1][0], entry[0] in marked)):
            part = escape("".join(word for _, (_, word) in run), quote=False)
            part = f'<span class="{group}">{part}</span>' if group else part
            out.append(f"<{tag}>{part}</{tag}>" if mark else part)
        out.append("\n</span>")
    return f'<pre class="{css}">{"".join(out)}</pre>'


def side_by_side(change: Change) -> str:
    """The rows of a changed definition."""
    old, new = change.old.rstrip().split("\n"), change.new.rstrip().split("\n")
    before, after = highlight("\n".join(old)), highlight("\n".join(new))
    rows = []
    for a, b in align(old, new):
        left, right = before[a.start : a.stop], after[b.start : b.stop]
        if old[a.start : a.stop] == new[b.start : b.stop]:
            sides = block(right, "twin") + block(right)
        else:
            marks = differences(left[0], right[0]) if len(a) == len(b) == 1 else (set(), set())
            sides = block(left, "old" if a else "none", marks[0], "del")
            sides += block(right, "add" if b else "none", marks[1], "ins")
        rows.append(f'<div class="row">{sides}</div>\n')
    return "".join(rows)


def section(change: Change) -> str:
    """One definition: both sides if it changed, one if it is new, and folded away if it was removed."""
    added, removed = change.counts
    if change.status == "changed":
        body = side_by_side(change)
    else:
        body = block(highlight((change.new or change.old).rstrip()))
    if change.status == "removed":
        body = f"<details><summary>what it was</summary>{body}</details>"
    head = f'<code>{escape(change.name)}</code> <span class="note">{mark(change)} +{added} &minus;{removed}</span>'
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
