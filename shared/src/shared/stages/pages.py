"""The pages of the site: each stage's README with its difference, its checkpoints and its traps added to it."""

import ast
import json
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from shared.errors import BadInput
from shared.stages import html
from shared.stages.definitions import WHOLE, Change, compare_stages, fold
from shared.stages.front import front
from shared.stages.readme import CHANGED, MD, TRAPS, BadFormula, Page, chapters, index, plain, render, rewrite
from shared.stages.repo import Stage, before, settings, stages

from markdown_it.token import Token

HERE = Path(__file__).parent
PAGE = Template((HERE / "site.html").read_text("utf-8"))
CHECKPOINTS = "Checkpoints"
TRAP = Template("""<details class="trap"><summary>$name</summary>
<p>$hint</p>
<p>In <code>$file</code> this is</p>
$old
<p>and becomes</p>
$new
<p>Caught by $caught.</p></details>
""")


@dataclass(frozen=True)
class Row:
    """A row of the table "What changed"."""

    file: str
    name: str
    status: str
    why: Token | None = field(compare=False)  # None: what no row explains


def rows_of(table: list[Token]) -> list[Row]:
    """The rows; none if this is another table."""
    lines, cells = [], []
    for token in table:
        if token.type == "inline":
            cells.append(token)
        elif token.type == "tr_close":
            lines.append(cells)
            cells = []
    if [cell.content for cell in lines[0][:2]] != ["file", "definition"]:
        return []
    return [Row(*(cell.content.strip("`") for cell in line[:3]), line[3]) for line in lines[1:]]


def home(change: Change, rows: dict[tuple[str, str], Row]) -> Row:
    """The row that speaks of a change: its own, that of a class around it, or that of its file."""
    parts = change.name.split(".")
    scopes = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    keys = [(change.file, name) for name in (*scopes, WHOLE)]
    return next((rows[key] for key in keys if key in rows), Row(change.file, "the rest", "changed", None))


def sides(change: Change) -> str:
    """A definition, old and new side by side; one side if the other does not exist."""
    if change.status == "changed":
        return html.side_by_side(change)
    css = "old" if change.status == "removed" else "add"
    return html.block(html.highlight((change.new or change.old).rstrip()), css)


def hunk(row: Row, changes: list[Change], page: Page) -> str:
    """One row and the definitions that it explains. What is changed stands open, what is new or gone is folded."""
    why = MD.renderer.render([row.why], MD.options, {}) if row.why else "docstring, imports and the like"
    anchor = f"{row.file}-{row.name}".replace(" ", "-")
    page.remember(anchor, f"{row.file} {row.name} ({row.status})", plain(row.why) if row.why else "")
    body = []
    for change in changes:
        if len(changes) > 1:
            note = f'<code>{escape(change.name)}</code> <span class="note">{html.mark(change)}</span>'
            body.append(f'<p class="name" id="{html.anchor(change)}_">{note}</p>')
        body.append(sides(change))
    added, removed = (sum(change.counts[i] for change in changes) for i in (0, 1))
    count = f'<span class="note">+{added} &minus;{removed}</span>'
    head = f'<code>{escape(row.file)}</code> <code class="name">{escape(row.name)}</code> '
    head += f'<span class="{row.status}">{row.status}</span> {count} <span class="why">{why}</span>'
    opened = " open" if row.status == "changed" and row.why else ""
    return f'<details class="change" id="{anchor}"{opened}>\n<summary>{head}</summary>\n{"".join(body)}</details>\n'


def what_changed(tokens: list[Token], page: Page) -> str:
    """The chapter with its table turned into the difference itself."""
    starts = [i for i, token in enumerate(tokens) if token.type == "table_open"]
    ends = [i for i, token in enumerate(tokens) if token.type == "table_close"]
    tables = [(i, j, rows_of(tokens[i:j])) for i, j in zip(starts, ends, strict=True)]
    rows = {(row.file, row.name): row for _, _, table in tables for row in table}
    explained: dict[Row, list[Change]] = {}
    for change in compare_stages(before(page.stage), page.stage):
        explained.setdefault(home(change, rows), []).append(change)
    out, last = [], 0
    for i, j, table in tables:
        if table:
            hunks = [hunk(row, fold(explained.pop(row), page.stage), page) for row in table if row in explained]
            button = '<button type="button" class="fold" hidden>Open all</button>'
            out += [render(tokens[last:i]), f'<p class="note">{button}</p>\n', *hunks]
            last = j + 1
    rest = [hunk(row, changes, page) for row, changes in explained.items()]
    return "".join([*out, *rest, render(tokens[last:])])


def tests_of(stage: Stage) -> dict[str, dict[str, str]]:
    """The claims of a stage's tests: {"tests/test_model.py": {"test_mask": "no position sees the future"}}."""
    found = {}
    for file in sorted(stage.path.glob("tests/**/test_*.py")):
        try:
            tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, ValueError) as error:  # ValueError: not UTF-8, or a NUL byte
            raise BadInput(f"{file} is not valid Python ({error}): mend it first") from None
        claims = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                told = (ast.get_docstring(node) or node.name[5:].replace("_", " ")).split("\n\n")[0]
                claims[node.name] = " ".join(told.split())
        found[file.relative_to(stage.path).as_posix()] = claims
    return found


def anchors(tests: dict[str, dict[str, str]]) -> dict[str, str]:
    """How a README may name a test, or a file of tests, and the id that stands for it on the page."""
    found = {}
    for file, claims in tests.items():
        found[file] = file
        for name in claims:
            found[f"{file}::{name}"] = f"{file}::{name}"
            found.setdefault(name, f"{file}::{name}")
    return found


def checkpoints(tests: dict[str, dict[str, str]], page: Page) -> str:
    """All tests by what they claim."""
    parts = []
    for file, claims in tests.items():
        parts.append(f'<p class="name" id="{file}"><code>{file}</code></p>\n<ul class="claims">\n')
        for name, claim in claims.items():
            page.remember(f"{file}::{name}", name, claim)
            parts.append(f'<li id="{file}::{name}">{MD.renderInline(claim)} <code>{name}</code></li>\n')
        parts.append("</ul>\n")
    return "".join(parts)


def traps(page: Page) -> str:
    """The mistakes of traps.toml, each behind a fold of its own."""
    file = page.stage.path / "traps.toml"
    listed = settings(file).get("trap", []) if file.is_file() else []
    parts = []
    for trap in listed:
        there = page.anchors.get(trap["caught_by"])
        caught = f"<code>{escape(trap['caught_by'])}</code>"
        caught = f'<a href="#{there}">{caught}</a>' if there else caught
        old, new = (html.highlight(trap[side].rstrip("\n")) for side in ("find", "replace"))
        values = {key: escape(trap[key]) for key in ("name", "file")} | {"hint": MD.renderInline(trap["hint"])}
        sides = {"old": html.block(old, "code"), "new": html.block(new, "code wrong")}
        parts.append(TRAP.substitute(values, **sides, caught=caught))
    return "".join(parts)


def folded(tokens: list[Token], summary: str, more: str) -> str:
    """A chapter whose heading stands, and whose text is hidden until asked for."""
    return render(tokens[:3]) + details(summary, render(tokens[3:]) + more)


def details(summary: str, body: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n{body}</details>\n"


def body_of(page: Page, top: Path) -> str:
    """The main part of a page."""
    tokens = MD.parse(re.sub(r"<!--.*?-->", "", page.readme.read_text("utf-8")))
    index(tokens, page)
    if page.stage is None:
        return front(tokens, page, top)
    tests = tests_of(page.stage)
    page.anchors = anchors(tests)
    rewrite(tokens, page)
    count = sum(map(len, tests.values()))
    parts = []
    for title, chapter in chapters(tokens):
        if title.startswith(CHANGED):
            parts.append(what_changed(chapter, page))
        elif title == CHECKPOINTS:
            everything = details(f"All {count}, file by file", checkpoints(tests, page))
            parts.append(folded(chapter, "Show the checkpoints", everything))
        elif title == TRAPS:
            planted = details("As they are planted", traps(page))
            parts.append(folded(chapter, "Show the traps: better after a bug hunt", planted))
        else:
            parts.append(render(chapter))
    return "".join(parts)


def navigation(pages: list[Page], here: Page) -> str:
    """All pages, and under the open one its chapters."""
    lines = []
    for page in pages:
        current = ' aria-current="page"' if page is here else ""
        inner = ""
        if page is here:
            inner = "".join(f'<li><a href="#{anchor}">{escape(title)}</a></li>' for anchor, title in page.contents)
            inner = f"\n<ul>{inner}</ul>"
        lines.append(f'<li><a href="{page.name}"{current}>{escape(short(page))}</a>{inner}</li>')
    return "\n".join(lines)


def short(page: Page) -> str:
    return f"{page.stage.number:02} {page.stage.title}" if page.stage else "The course"


def turn(pages: list[Page], here: Page) -> str:
    """The links to the page before and to the next."""
    at = pages.index(here)
    links = []
    if at > 0:
        links.append(f'<a rel="prev" href="{pages[at - 1].name}">← {escape(short(pages[at - 1]))}</a>')
    if at + 1 < len(pages):
        links.append(f'<a rel="next" href="{pages[at + 1].name}">{escape(short(pages[at + 1]))} →</a>')
    return "\n".join(links)


def build(top: Path) -> dict[str, str | bytes]:
    """The whole site: {path: content}.

    Raises BadInput for a stage without README, a lost image, a formula that cannot be drawn, broken Python.
    """
    pages = [Page(top / "README.md", "index.html", "The course")]
    pages += [Page(stage.path / "README.md", f"{stage.name}.html", stage.title, stage) for stage in stages(top)]
    for page in pages:
        if not page.readme.is_file():
            raise BadInput(f"{page.readme} is missing: every stage needs one")
    bodies = []
    for page in pages:
        try:
            bodies.append(body_of(page, top))
        except BadFormula as error:
            file = page.readme.relative_to(top).as_posix()
            raise BadInput(f"{file}, or the tests and traps on its page: {error}") from None
    site: dict[str, str | bytes] = {}
    for page, body in zip(pages, bodies, strict=True):
        site |= {name: file.read_bytes() for name, file in page.images.items()}
        site[page.name] = PAGE.substitute(
            title=escape(short(page)), stages=navigation(pages, page), body=body, turn=turn(pages, page)
        )
    found = [entry for page in pages for entry in page.found]
    names = {page.name: short(page) for page in pages}
    site["search.js"] = f"SEARCH = {json.dumps({'pages': names, 'entries': found}, ensure_ascii=False)};\n"
    return site | {name: (HERE / name).read_text("utf-8") for name in ("site.css", "site.js")}
