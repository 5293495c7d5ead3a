"""A README as HTML: formulas as MathML, links between READMEs as links between pages, and what the search finds."""

import posixpath
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from shared.errors import BadInput
from shared.stages import html
from shared.stages.repo import Stage

from latex2mathml import exceptions
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments.lexers.python import PythonLexer
from pygments.lexers.shell import BashLexer

LEXERS = {"python": PythonLexer, "sh": BashLexer}
BLOCK = {"display_mode": True}
NAMED, THIN = "<mi>(?:ln|log|sin|cos)</mi>", '<mspace width="0.167em"/>'  # TeX sets them apart, MathML does not
PRIME = r'<mrow>\1<mi mathvariant="normal">&#x02032;</mi></mrow>'  # the character itself stands high
CHANGED, TRAPS = "What changed", "Traps"  # chapters
UNREADABLE = tuple(each for each in vars(exceptions).values() if isinstance(each, type) and issubclass(each, Exception))


class BadFormula(ValueError):
    """TeX that cannot be drawn."""


@dataclass
class Page:
    """One page while it is made."""

    readme: Path
    name: str  # "05_transformer.html"
    title: str
    stage: Stage | None = None  # None: the front page
    anchors: dict[str, str] = field(default_factory=dict)  # how a README writes a test -> its id on the page
    contents: list[tuple[str, str]] = field(default_factory=list)  # (id, title) of the headings of the second level
    found: list[list[str]] = field(default_factory=list)  # for the search: [page, id, heading, text]
    images: dict[str, Path] = field(default_factory=dict)  # path in the site -> file

    def remember(self, anchor: str, heading: str, text: str) -> None:
        self.found.append([self.name, anchor, heading, text])


def formula(tex: str, options: dict) -> str:
    """TeX as MathML, which browsers draw without a script. Raises BadFormula."""
    try:
        drawn = convert(tex, display="block" if options["display_mode"] else "inline")
    except UNREADABLE as error:
        raise BadFormula(f"${' '.join(tex.split())}$ cannot be drawn ({type(error).__name__})") from None
    if unknown := re.search(r"<m[io]>(\\\w+)", drawn):  # it would stand there as it was written
        raise BadFormula(f"${' '.join(tex.split())}$ cannot be drawn ({unknown[1]} is unknown)")
    drawn = re.sub(r"<mo>(&#x0221E;|&#x022A4;)</mo>", r"<mi>\1</mi>", drawn)  # infinity, transposed: no operators
    drawn = re.sub(r"<msup>(<(m\w+)>[^<]*</\2>)<mi>&#x02032;</mi></msup>", PRIME, drawn)
    drawn = re.sub(rf"(</m(?:i|n|sub|sup|frac)>)(?={NAMED})", rf"\1{THIN}", drawn)
    return re.sub(rf"(?<!<msub>)({NAMED})(?!<mo|</)", rf"\1{THIN}", drawn)


def fence(text: str, language: str, attributes: str) -> str:
    """A block of code. What is no program (a drawing, an output) keeps its lines and scrolls."""
    if language in LEXERS:
        return html.block(html.highlight(text, LEXERS[language])[:-1], "code")  # without the line after the last
    return f'<pre class="text" tabindex="0"><code>{escape(text, quote=False)}</code></pre>'


def markdown() -> MarkdownIt:
    """The renderer. In what it makes, wide things scroll by themselves, and with the keyboard too."""
    md = MarkdownIt("commonmark", {"html": False, "highlight": fence}).enable("table")
    md.use(dollarmath_plugin, renderer=formula, allow_labels=False, allow_space=False, double_inline=True)
    group = '<div class="{}" tabindex="0" role="group" aria-label="{}">\n'
    md.add_render_rule("table_open", lambda *_: group.format("scroll", "Table") + "<table>\n")
    md.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    block = group.format("math block", "Formula")
    md.add_render_rule("math_block", lambda _, tokens, i, *__: f"{block}{formula(tokens[i].content, BLOCK)}\n</div>\n")
    return md


MD = markdown()


def slug(title: str) -> str:
    """The id of a heading, as GitHub makes it: "What it costs, in time" -> "what-it-costs-in-time"."""
    return re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")


def plain(inline: Token) -> str:
    """The words of a piece of text, without the marks."""
    words = (" " if child.type == "softbreak" else child.content for child in inline.children or [])
    return " ".join("".join(words).split())


def target(href: str, page: Page) -> str | None:
    """Where a link of a README leads in the site; None if that is a file which the site does not show."""
    if re.match(r"[a-z]+:|#", href):
        return href
    path, _, anchor = href.partition("#")
    top = page.readme.parent.parent if page.stage else page.readme.parent
    place = posixpath.normpath(posixpath.join(page.stage.name if page.stage else "", path))
    if place == "README.md":
        name = "index.html"
    elif re.fullmatch(r"\d\d_[a-z]+(/README\.md)?", place) and (top / place).exists():
        name = f"{place.partition('/')[0]}.html"
    else:
        return None
    return f"{name}#{anchor}" if anchor else name


def image(token: Token, page: Page) -> None:
    """Note an image as one to be copied; tell the browser its size, so that nothing jumps while it loads."""
    source = token.attrs["src"]
    name = posixpath.normpath(posixpath.join(page.stage.name if page.stage else "", source))
    file = page.readme.parent / source
    if not file.is_file():
        where = f"{page.readme.parent.name}/README.md"
        raise BadInput(f"{where} shows {source}, which is not there: make it or take it out")
    page.images[name] = file
    token.attrs |= {"src": name, "loading": "lazy"}
    head = file.read_bytes()[:24]
    if head[12:16] == b"IHDR":
        width, height = struct.unpack(">II", head[16:24])
        token.attrs |= {"width": width, "height": height}


def rewrite(tokens: list[Token], page: Page) -> None:
    """Links, images and names of tests, as the site needs them. A link that leads nowhere here becomes its text."""
    for i, token in enumerate(tokens):
        linked = False
        if token.type == "th_open" and not tokens[i + 1].content:
            token.tag = tokens[i + 2].tag = "td"  # nothing stands over this column: no heading
        for child in token.children or []:
            if child.type == "link_open":
                href = target(child.attrs["href"], page)
                linked = href is not None
                child.attrs["href"] = href or ""
            if child.type in ("link_open", "link_close") and not linked:
                child.type, child.tag, child.content = "text", "", ""
            elif child.type == "link_close":
                linked = False
            elif child.type == "image":
                image(child, page)
            elif child.type == "code_inline" and not linked and child.content in page.anchors:
                code = f"<code>{escape(child.content)}</code>"
                child.type, child.content = "html_inline", f'<a href="#{page.anchors[child.content]}">{code}</a>'


def index(tokens: list[Token], page: Page) -> None:
    """Give headings their ids, and remember what the search finds: a paragraph, a row of a table, a point of a list."""
    anchor, heading, cells, secret, seen = "", page.title, [], False, Counter()
    for token, inside in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open":
            heading = plain(inside)
            base = slug(heading)
            anchor = f"{base}-{seen[base]}" if seen[base] else base  # the second of a name gets -1, as on GitHub
            seen[base] += 1
            token.attrs["id"] = anchor
            page.remember(anchor, heading, "")
            if token.tag == "h2":
                page.contents.append((anchor, heading))
                secret = heading == TRAPS
        elif secret:
            continue  # what is hidden until asked for is not asked for by a search
        elif token.type == "td_open":
            cells.append(plain(inside))
        elif token.type == "tr_close" and cells:
            page.remember(anchor, heading, " | ".join(filter(None, cells)))
            cells = []
        elif token.type == "paragraph_open":
            page.remember(anchor, heading, plain(inside))


def chapters(tokens: list[Token]) -> list[tuple[str, list[Token]]]:
    """The tokens cut before each heading of the second level: ("", title and first words), ("The idea", ...), ..."""
    parts = [("", [])]
    for token, inside in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and token.tag == "h2":
            parts.append((plain(inside), []))
        parts[-1][1].append(token)
    return parts


def render(tokens: list[Token]) -> str:
    return MD.renderer.render(tokens, MD.options, {})
