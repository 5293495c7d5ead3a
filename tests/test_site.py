"""`stages site`: the pages hold what the course holds, lead where they say, and need nothing else."""

import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

from shared.errors import BadInput
from shared.stages import pages, readme
from shared.stages.definitions import PSEUDO, WHOLE, Change, compare_stages
from shared.stages.repo import Stage, before, root, stages

import pytest

import changes
from course import make
from course import stages as tool

TOP = root(Path(__file__).parent)
STAGES = stages(TOP)
each_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
VOID = {"meta", "link", "img", "input", "br", "hr", "mspace", "!doctype"}
BYTES = 1_000_000  # of a page


class Read(HTMLParser):
    """A page read back: its ids, links, headings, images, and the text of everything with the tags around it."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.ids, self.links, self.loads, self.headings, self.images = [], [], [], [], [], []
        self.texts: list[tuple[list, str]] = []  # (open tags with their attributes, text)
        self.feed(text)
        assert not self.stack, f"{self.stack} are not closed"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.loads += [attrs[key] for key in ("src", "srcset", "data", "poster") if key in attrs]
        self.loads += [attrs["href"]] if tag == "link" else []
        self.images += [attrs] if tag == "img" else []
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        if tag not in VOID:
            self.stack.append((tag, attrs))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append((list(self.stack), data))

    def inside(self, wanted) -> str:
        """The text inside the elements for which `wanted(tag, attributes)` holds."""
        return "".join(text for stack, text in self.texts if any(wanted(*element) for element in stack))


@cache
def timed() -> tuple[dict[str, str | bytes], float]:
    """The site, built once, and the seconds of processor time that it took."""
    start = time.process_time()
    return pages.build(TOP), time.process_time() - start


def built() -> dict[str, str | bytes]:
    return timed()[0]


@cache
def read(name: str) -> Read:
    return Read(built()[name])


def names() -> list[str]:
    return [name for name in built() if name.endswith(".html")]


def test_the_course_becomes_a_site_in_seconds(tmp_path, monkeypatch):
    made, seconds = timed()
    monkeypatch.setattr(pages, "build", lambda top: made)
    code, out, err = tool(TOP, "site", str(tmp_path / "site"))
    assert code == 0 and "13 pages" in out, out + err
    assert seconds < 20, f"building the site took {seconds:.0f} s of processor time"
    for stage in STAGES:
        assert (tmp_path / "site" / f"{stage.name}.html").is_file(), f"{stage.name} has no page"
    for file in (tmp_path / "site").rglob("*"):
        assert not file.is_file() or file.stat().st_size < BYTES, f"{file.name} is too large"
    old = (tmp_path / "site" / "index.html").read_bytes()
    code, out, err = tool(TOP, "site", str(tmp_path / "site"))
    assert code == 0 and (tmp_path / "site" / "index.html").read_bytes() == old, "an earlier site is written again"


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere():
    for name in names():
        page = read(name)
        assert len(page.ids) == len(set(page.ids)), f"{name} uses an id twice"
        for link in page.links:
            if link.startswith("https://"):
                continue  # followed only when it is clicked
            target, _, anchor = link.partition("#")
            target = target or name
            assert target in names(), f"{name} links to {link}: no such page"
            assert not anchor or anchor in read(target).ids, f"{name} links to {link}: no such place"
        for source in page.loads:
            assert source in built() or source == "data:,", f"{name} loads {source}, which is not part of the site"
    for name in ("site.css", "site.js"):
        assert not re.search(r"https?:|//\w+\.|fetch\(|@import|url\(", built()[name].split("\n", 2)[2]), (
            f"{name} asks for something outside the site, or uses what a page opened from a file may not use"
        )


def test_links_of_a_readme_lead_to_pages():
    page = readme.Page(TOP / "05_transformer" / "README.md", "05_transformer.html", "", STAGES[4])
    front = readme.Page(TOP / "README.md", "index.html", "")
    assert readme.target("../06_gpt/README.md#a-b", page) == "06_gpt.html#a-b"
    assert readme.target("../06_gpt", page) == "06_gpt.html" == readme.target("06_gpt/README.md", front)
    assert readme.target("../README.md#the-ladder", page) == "index.html#the-ladder"
    assert readme.target("#measured", page) == "#measured" and readme.target("https://x.y/z", page) == "https://x.y/z"
    for file in ("model.py", "../shared/src", "../../elsewhere"):
        assert readme.target(file, page) is None, f"no page shows {file}"


@each_stage
def test_formulas_are_mathml(stage):
    source = (stage.path / "README.md").read_text("utf-8")
    source = re.sub(r"^```.*?^```$|`[^`\n]+`", "", source, flags=re.M | re.S)
    page, text = read(f"{stage.name}.html"), built()[f"{stage.name}.html"]
    assert text.count('display="block"') == source.count("$$") // 2, "a displayed formula is lost"
    inline = len(re.findall(r"(?<![$\\])\$(?!\$)", source)) // 2
    # In the table of changes and in claims there may be more.
    assert text.count('display="inline"') >= inline, f"{inline} formulas stand in the README's lines, some are lost"
    drawn = page.inside(lambda tag, attrs: tag == "math")
    assert not re.search(r"\\[a-zA-Z]", drawn), "a command of TeX was not understood"
    prose = "".join(text for stack, text in page.texts if not {tag for tag, _ in stack} & {"code", "pre", "math"})
    assert "$" not in prose.replace('"$"', ""), "a formula stands as TeX"


def test_formulas_read_as_tex_sets_them():
    inline = {"display_mode": False}
    spaced = r"<mi>x</mi><mspace [^>]*/><mi>ln</mi><mspace [^>]*/><mn>2</mn>"
    assert re.search(spaced, readme.formula(r"x \ln 2", inline)), "a named function stands apart"
    assert "<mspace" not in readme.formula(r"\ln(x)", inline), "no space before a bracket"
    assert "<msub><mi>log</mi><mn>2</mn></msub>" in readme.formula(r"\log_2 P", inline), "two children, as MathML wants"
    assert "<msup>" not in readme.formula("a'", inline), "a prime stands high by itself"


@each_stage
def test_each_row_of_what_changed_stands_beside_its_difference(stage):
    old = before(stage)
    if old is None:
        return
    page, rows = read(f"{stage.name}.html"), changes.parse((stage.path / "README.md").read_text("utf-8"))
    assert rows
    shown = {}  # id -> (heading, left side, right side)
    for stack, text in page.texts:
        box = next((attrs["id"] for tag, attrs in stack if attrs.get("class") == "change"), None)
        parts = shown.setdefault(box, ["", "", ""])
        css = next((attrs.get("class", "") for tag, attrs in stack if tag == "pre"), None)
        if any(tag == "summary" for tag, _ in stack):
            parts[0] += text
        elif css is not None:
            parts[1 if css in ("twin", "old") else 2] += text
    words = {row.key: re.findall(r"[a-z]{3,}", re.sub(r"`|\$[^$]*\$|\]\([^)]*\)", " ", row.why)) for row in rows}
    for row in rows:
        head = shown[f"{row.file}-{row.name}".replace(" ", "-")][0]
        assert row.file in head and row.name in head and row.status in head, f"{row} has no difference beside it"
        missing = [word for word in words[row.key] if word not in head]
        assert not missing, f"the reason of {row} is not beside it: {head}"
    left = "\n".join(parts[1] for parts in shown.values())
    right = "\n".join(parts[2] for parts in shown.values())
    for change in compare_stages(old, stage):
        assert change.new.rstrip() in right, f"{change.file} {change.name} is not shown as it is now"
        assert change.old.rstrip() in left, f"{change.file} {change.name} is not shown as it was"
        if change.kind in PSEUDO:
            continue
        boxes = [key for key, parts in shown.items() if change.new.rstrip() in parts[2] and key]
        scopes = [change.name[: dot.start()] for dot in re.finditer(r"\.", change.name)]
        own = [name for name in (change.name, *scopes[::-1], WHOLE) if (change.file, name) in words]
        mine = f"{change.file}-{own[0]}".replace(" ", "-")
        assert mine in boxes or not change.new, f"{change.file} {change.name} stands under another row: {boxes}"


def test_a_change_stands_under_the_row_nearest_to_it():
    rows = {("m.py", name): pages.Row("m.py", name, "changed", None) for name in ("GPT", "GPT.forward", WHOLE)}
    wanted = {"GPT.forward": "GPT.forward", "GPT.look": "GPT", "Block": WHOLE, "GPT.forward.inner": "GPT.forward"}
    for name, row in wanted.items():
        found = pages.home(Change("m.py", name, "method", "a", "b"), rows).name
        assert found == row, f"{name} belongs to the row {row}, not to {found}"
    assert pages.home(Change("other.py", "f", "function", "a", "b"), rows).name == "the rest"


@each_stage
def test_checkpoints_and_traps_are_there_and_hidden(stage):
    page = read(f"{stage.name}.html")

    def closed(tag, attrs):
        return tag == "details" and "open" not in attrs

    for file in stage.path.glob("tests/**/test_*.py"):
        for name in re.findall(r"^ *def (test_\w+)\(", file.read_text("utf-8"), re.M):
            anchor = f"{file.relative_to(stage.path).as_posix()}::{name}"
            assert anchor in page.ids, f"the checkpoint {anchor} is not on the page"
    traps = tomllib.loads((stage.path / "traps.toml").read_text("utf-8"))["trap"]
    hidden = page.inside(closed)
    for trap in traps:
        assert trap["name"] in hidden and trap["find"].strip() in hidden, f"{trap['name']!r} is not on the page"
    listed = [stack for stack, _ in page.texts if any("trap" in attrs.get("class", "").split() for _, attrs in stack)]
    assert all(sum(closed(*element) for element in stack) >= 3 for stack in listed), "a trap shows without being asked"
    index = json.loads(built()["search.js"].partition("=")[2].rstrip(";\n"))["entries"]
    told = {entry[3] for entry in index if entry[0] == f"{stage.name}.html"}
    spoilers = readme.MD.parse(changes.section((stage.path / "README.md").read_text("utf-8"), "Traps"))
    lines = {readme.plain(token) for token in spoilers if token.type == "inline"}
    assert lines and not told & lines, "the search shows what is hidden"


def test_the_front_page_has_the_ladder_and_the_map():
    page, text = read("index.html"), (TOP / "README.md").read_text("utf-8")
    rungs = [line for line in text.partition("<!-- ladder -->")[2].partition("<!-- /ladder -->")[0].splitlines()]
    rungs = [[cell.strip() for cell in line.strip("|").split("|")] for line in rungs if line.startswith("|")][2:]
    figure = page.inside(lambda tag, attrs: attrs.get("class") == "ladder")
    for rung in rungs:
        assert re.search(rf"{re.escape(rung[1])}\s+{rung[5]}", figure), f"{rung[1]} is not in the figure with its loss"
        assert rung[2] in figure and rung[6] in figure, f"{rung[1]} opens without its other numbers"
    places = [float(left) for left in re.findall(r'style="left:([\d.]+)%"', built()["index.html"])]
    losses = [float(rung[5]) for rung in rungs]
    in_order = [place for _, place in sorted(zip(losses, places, strict=True))]
    assert in_order == sorted(places), "a smaller loss stands further left"
    chart = page.inside(lambda tag, attrs: "map" in attrs.get("class", "").split())
    trunk = {file.name for stage in STAGES for file in stage.trunk()}
    assert all(name in chart for name in trunk), "a file of a trunk is not on the map"
    trunks = [{file.name for file in stage.trunk()} for stage in STAGES]
    born = sum(len(new - old) for old, new in pairwise([set(), *trunks]))
    assert chart.count("● new") == born, "the map counts births wrongly"


def test_pages_can_be_read_by_all():
    for name in names():
        page, text = read(name), built()[name]
        assert page.headings.count(1) == 1, f"{name} has {page.headings.count(1)} headings of the first level"
        steps = zip(page.headings, page.headings[1:], strict=False)
        assert all(b - a <= 1 for a, b in steps), f"{name} skips a level of headings"
        assert page.images or name == "index.html", f"{name} has lost its figures"
        assert all(image.get("alt") for image in page.images), f"{name} has an image without a description"
        assert all("width" in image for image in page.images), f"{name} jumps while its images load"
        assert '<html lang="en">' in text and 'name="viewport"' in text and text.count("<main") == 1
        assert text.count('aria-current="page"') == 1 and 'href="#main"' in text


def test_letters_stand_out_in_light_and_in_dark():
    pairs = dict(re.findall(r"--(\w+): light-dark\(([^)]*)\)", built()["site.css"]))

    def luminance(colour: str) -> float:
        digits = colour.strip()[1:]
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]  # WCAG 2, relative luminance

    for mode in (0, 1):
        light = {name: luminance(pair.split(",")[mode]) for name, pair in pairs.items()}
        for letters in ("fg", "dim", "bad", "good", "link", "c", "s", "m", "k", "f"):
            code = ["del", "del2", "ins", "ins2"] if letters in ("fg", "c", "s", "m", "k", "f") else []
            for ground in ("bg", "box", *code):
                high, low = max(light[letters], light[ground]), min(light[letters], light[ground])
                ratio = (high + 0.05) / (low + 0.05)
                assert ratio >= 4.5, f"--{letters} on --{ground}: contrast {ratio:.2f} in {('light', 'dark')[mode]}"


def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("<p>my own page", "utf-8")
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setattr(pages, "build", lambda top: {"index.html": "x", "a/b.png": b"y"})
    cases = {("mine",): "not empty", ("file",): "is a file", (): "FOLDER", ("file/in",): "choose another folder"}
    for words, message in cases.items():
        code, out, err = tool(TOP, "site", *(str(tmp_path / word) for word in words))
        assert code == 2 and message in err and err.count("\n") == 1 and not out, (words, err)
    assert (tmp_path / "mine" / "index.html").read_text("utf-8") == "<p>my own page", "someone's page was overwritten"

    def refused(*args, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    code, out, err = tool(TOP, "site", str(tmp_path / "new"))
    assert code == 2 and "Permission denied" in err and err.count("\n") == 1, err


def test_a_lost_figure_and_broken_python_are_told(tmp_path):
    page = readme.Page(tmp_path / "README.md", "05_transformer.html", "", STAGES[4])
    with pytest.raises(BadInput, match="shows lost.png, which is not there"):
        readme.rewrite(readme.MD.parse("![what is lost](lost.png)"), page)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("def test_x(:\n", "utf-8")
    with pytest.raises(BadInput, match="test_x.py is not valid Python"):
        pages.tests_of(Stage(tmp_path, "", "train.py"))


@pytest.mark.parametrize("tex", [r"\begin{matrix} a", r"\left( a", r"x \foo y", r"\frac"])
def test_a_formula_that_cannot_be_drawn_is_named_with_its_file(tex, tmp_path):
    top = make(tmp_path, {"01_first": {"README.md": f"# First\n\nA formula: ${tex}$\n"}})
    (top / "README.md").write_text("# Course\n", "utf-8")
    with pytest.raises(BadInput) as told:
        pages.build(top)
    message = str(told.value)
    assert "01_first/README.md" in message and f"${tex}$ cannot be drawn" in message and "\n" not in message, message


PROBE = """
const errors = [], told = {};
addEventListener("error", (event) => errors.push(event.message || "an element failed"), true);
const key = (name) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
addEventListener("load", async () => {
  const theme = document.getElementById("theme"), box = document.getElementById("search");
  const colour = () => getComputedStyle(document.body).backgroundColor;
  const first = colour();
  theme.click();
  told.theme = colour() !== first && localStorage.getItem("theme") === document.documentElement.dataset.theme;
  const changes = [...document.querySelectorAll("details.change")];
  const button = document.querySelector(".fold");
  button.click();
  told.opened = changes.every((change) => change.open);
  button.click();
  told.closed = changes.every((change) => !change.open);
  key("/");
  told.slash = document.activeElement === box;
  box.value = "softmax";
  box.dispatchEvent(new Event("input"));
  for (let i = 0; i < 100 && !document.querySelector("#results a"); i++) await new Promise((go) => setTimeout(go, 20));
  told.results = document.querySelectorAll("#results a").length;
  told.marked = document.querySelector("#results mark")?.textContent.toLowerCase();
  key("ArrowDown");
  told.arrow = document.activeElement === document.querySelector("#results a");
  key("Escape");
  told.escape = document.getElementById("results").hidden && document.activeElement === box;
  const point = document.querySelector(".claims li"), around = point.closest("details");
  told.folded = !around.open;
  location.hash = "#" + point.id;
  await new Promise((go) => setTimeout(go, 200));
  told.unfolded = around.open;
  told.narrow = document.documentElement.scrollWidth <= innerWidth;
  told.outside = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("file:")).length;
  document.body.innerHTML = `<pre id="told">${JSON.stringify({ ...told, errors })}</pre>`;
});
"""


def test_pages_answer_in_a_browser(tmp_path):
    """Theme, folds, search, keyboard and links, asked by a script beside the page; nothing comes from outside."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    for name, content in built().items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "probe.js").write_text(PROBE, "utf-8")
    text = built()["05_transformer.html"].replace("</head>", '<script src="probe.js"></script></head>')
    (tmp_path / "probe.html").write_text(text, "utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,844", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    env = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run([*words, (tmp_path / "probe.html").as_uri()], capture_output=True, timeout=120, env=env)
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout.decode("utf-8", "replace"))
    assert found, done.stderr.decode("utf-8", "replace")[-500:]
    told = json.loads(found[1])
    assert told.pop("results") >= 5 and told.pop("marked") == "softmax", "the search does not find a word of the page"
    assert told.pop("errors") == [] and told.pop("outside") == 0, "the page makes errors, or asks for something outside"
    assert all(told.values()), f"does not answer: {[name for name, value in told.items() if not value]}"
