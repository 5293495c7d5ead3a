"""The front page of the site: the root README, a map of the files, and the ladder as a figure that answers."""

import re
from html import escape
from pathlib import Path
from string import Template

from shared.stages import ladder
from shared.stages.definitions import compare_stages
from shared.stages.readme import CHANGED, Page, chapters, render, rewrite, slug
from shared.stages.repo import Stage, before, stages

from markdown_it.token import Token

SIGNS = {"new": "●", "changed": "◐", "carried": "·", "": ""}
MAP = Template("""<h2 id="map">The map</h2>
<p>Every file of the stages' trunks: ● new, ◐ changed, · carried along as it was. A sign leads to what changed.</p>
<div class="scroll map" tabindex="0" role="group" aria-label="Map of the course">
<table>
<thead><tr><th scope="col">file</th>$head</tr></thead>
<tbody>
$lines</tbody>
</table>
</div>
""")

# The columns of the ladder's table behind the model, by their names in the figure and in the script.
UNITS = {
    "parameters": "params",
    "training tokens": "tokens",
    "seconds": "seconds",
    "nats per character": "loss",
    "bits per byte": "bits",
}
POINT = Template("""<li $data><details>
<summary><span class="who">$name</span>
<span class="track" aria-hidden="true"><span class="$css" style="left:$place%"></span></span>
<span class="value">$loss</span></summary>
<p>$where: $told</p>
</details></li>
""")
FIGURE = Template("""<div class="ladder" role="group" aria-label="The ladder as a figure">
<div class="controls" hidden>
<label>Show <select class="quantity">
<option value="loss">validation loss</option>
<option value="params">parameters</option>
<option value="tokens">training tokens</option>
<option value="seconds">seconds of training</option>
</select></label>
<label>Order <select class="order">
<option value="course">as in the course</option>
<option value="value">smallest first</option>
</select></label>
</div>
<ol>
$points</ol>
</div>
""")


def front(tokens: list[Token], page: Page, top: Path) -> str:
    """The root README, with the map before its first chapter, and the ladder's figure as one that answers."""
    readme = page.readme.read_text("utf-8")
    at = next((i for i, token in enumerate(tokens) if ladder.FIGURE in token.content and token.type == "inline"), None)
    if at is not None:
        del tokens[at - 1 : at + 2]
        table = max((i for i in range(at - 1) if tokens[i].type == "table_open"), default=at - 1)
        tokens.insert(table, Token("html_block", "", 0, content=figure_of(readme)))
    rewrite(tokens, page)
    (_, first), *rest = chapters(tokens)
    page.contents.insert(0, ("map", "The map"))
    return "".join([render(first), course_map(top), *(render(chapter) for _, chapter in rest)])


def course_map(top: Path) -> str:
    """Which file is born in which stage, where it changes, and where it is carried along as it was."""
    course = stages(top)
    names = [[stage.main, *(path.name for path in stage.trunk() if path.name != stage.main)] for stage in course]
    head = "".join(f'<th scope="col"><a href="{s.name}.html">{s.number:02}</a></th>' for s in course)
    files = dict.fromkeys(name for mine in names for name in mine)
    lines = {name: f'<tr><th scope="row"><code>{name}</code></th>' for name in files}
    for old, mine, stage in zip([[], *names], names, course, strict=False):
        last = before(stage)
        changed = {change.file for change in compare_stages(last, stage)} if last else set()
        for name in files:
            word = "" if name not in mine else "new" if name not in old else "changed" if name in changed else "carried"
            link = f'<a href="{stage.name}.html{changes_of(stage)}">{SIGNS[word]}</a>'
            sign = link if word in ("new", "changed") else SIGNS[word]
            lines[name] += f'<td class="{word}">{sign}<span class="hide"> {word}</span></td>'
    return MAP.substitute(head=head, lines="".join(f"{line}</tr>\n" for line in lines.values()))


def changes_of(stage: Stage) -> str:
    """Where on a stage's page the chapter is that says what changed; in the first stage nothing did."""
    old = before(stage)
    return "#" + slug(f"{CHANGED} since {old.name}") if old else ""


def figure_of(readme: str) -> str:
    """The README's ladder as rows of dots. A row opens; the script beside the page can show and sort other numbers."""
    text = readme.partition(ladder.START)[2].partition(ladder.END)[0]
    lines = [line.strip()[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    losses = [float(row[5]) for row in rows]
    low, span = min(losses), max(losses) - min(losses) or 1
    points = []
    for (stage, name, *numbers), loss in zip(rows, losses, strict=True):
        known = [(unit, number) for unit, number in zip(UNITS, numbers, strict=True) if number]
        own = re.match(r"\[(\w+)\]", stage)
        points.append(
            POINT.substitute(
                data=" ".join(f'data-{UNITS[unit]}="{number.replace(",", "")}"' for unit, number in known),
                name=escape(name if own else f"{stage}, {name}"),
                css="dot" if own else "dot other",
                place=f"{100 * (loss - low) / span:.1f}",
                loss=numbers[3],
                where=f'<a href="{own[1]}.html">{own[1]}</a>' if own else escape(stage),
                told=", ".join(f"{number} {unit}" for unit, number in known),
            )
        )
    return FIGURE.substitute(points="".join(points))
