"""`stages diff`: the table, the coloured difference and the page."""

import argparse
import io
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

from shared.errors import BadInput
from shared.stages import diff, html
from shared.stages.definitions import Change, compare_stages, fold
from shared.stages.repo import find, root, stages

import pytest
from rich.console import Console

LONG = "x" * 150
FILES = {
    "01_one": {
        "gone.py": "def a():\n    return 1\n\n\ndef b():\n    return 2\n",
        "model.py": '''"""The model."""

import math


class Old:
    def f(self):
        return 1


class Kept:
    """Stays."""

    width: int = 1

    def f(self, x):
        a = 1
        b = 2
        c = 3
        d = 4
        e = 5
        return a < x & b

    def g(self):
        return 1


def gone():
    return 1
''',
    },
    "02_two": {
        "born.py": f'def born(x):\n    """Says <b>&amp;</b>."""\n    return "{LONG}"\n',
        "model.py": '''"""The model."""

import math


class Kept:
    """Stays."""

    width: int = 2

    def f(self, x):
        a = 1
        b = 2
        c = 3
        d = 4
        e = 5
        f = """<script>

        </script>"""
        return a < x & c

    def g(self):
        return 1
''',
    },
    "03_three": {},
}
FILES["03_three"] = FILES["02_two"]


@pytest.fixture
def course(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[tool.uv.workspace]\n", "utf-8")
    for name, files in FILES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text(f'[tool.stages]\ntitle = "On {name}"\nmain = ""\n', "utf-8")
        for file, text in files.items():
            (tmp_path / name / file).write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    diff.add(parser.add_subparsers())
    args = parser.parse_args(["diff", *words])
    return args.func(args)


def table_rows(out: str) -> list[list[str]]:
    lines = [re.split("[│|]", line)[1:-1] for line in out.splitlines() if line.startswith(("│", "|"))]
    return [[cell.strip() for cell in cells] for cells in lines if len(cells) == 5]


TABLE = [
    ["born.py", "born", "new", "3", "0"],
    ["gone.py", "(whole file)", "removed", "0", "5"],
    ["model.py", "Kept", "changed", "1", "1"],
    ["model.py", "Kept.f", "changed", "4", "1"],
    ["model.py", "Old", "removed", "0", "4"],
    ["model.py", "gone", "removed", "0", "2"],
]


@pytest.mark.parametrize("words", [["2"], ["1", "2"], ["01_one", "02"]])
def test_table_of_definitions(course, capsys, words):
    assert run(*words, "--stat") == 0
    out = capsys.readouterr().out
    assert table_rows(out) == TABLE
    assert "01_one -> 02_two" in out and "return" not in out, "--stat shows the table only"


def test_the_other_way_round_swaps_new_and_removed(course, capsys):
    run("2", "1", "--stat")
    found = {(row[1], row[2]) for row in table_rows(capsys.readouterr().out)}
    assert {("Old", "new"), ("a", "new"), ("(whole file)", "removed"), ("Kept.f", "changed")} <= found
    assert ("Old.f", "new") not in found, "a new class is one row"
    run("2", "1")
    out = capsys.readouterr().out
    assert "--- Old new ---\nclass Old:\n\n    def f(self):\n        return 1\n\n--- " in out, (
        "a new class stands whole"
    )


def test_difference_shows_new_whole_changed_in_context_and_removed_by_name(course, capsys):
    run("2")
    out = capsys.readouterr().out.split("=== born.py ===")[1]
    born, model = out.split("=== gone.py ===\n\nremoved: (whole file)\n\n=== model.py ===")
    assert born.strip() == f"--- born new ---\n{FILES['02_two']['born.py']}".strip(), "a new definition stands whole"
    assert model.strip().split("\n\n") == [
        '--- Kept changed ---\n class Kept:\n     """Stays."""\n \n-    width: int = 1\n+    width: int = 2',
        "--- Kept.f changed ---\n         c = 3\n         d = 4\n         e = 5\n-        return a < x & b\n"
        '+        f = """<script>\n+\n+        </script>"""\n+        return a < x & c',
        "removed: Old, gone",
    ]


def test_an_ellipsis_stands_between_hunks():
    old = "def f():\n" + "".join(f"    x = {i}\n" for i in range(20))
    text = diff.lines(
        Change("m.py", "f", "function", old, old.replace("= 1\n", "= 100\n").replace("= 18", "= 180"))
    ).plain
    assert text.count("  ...\n") == 1 and "@@" not in text and not text.startswith("  ...")


def test_only_one_file(course, capsys):
    run("2", "--file", "model.py")
    out = capsys.readouterr().out
    assert table_rows(out) == TABLE[2:] and "born" not in out
    run("2", "--file", "model", "--stat")
    assert table_rows(capsys.readouterr().out) == TABLE[2:]


def test_equal_stages_are_said_to_be_equal(course, capsys):
    assert run("3") == 0
    assert capsys.readouterr().out == "no definition differs between 02_two and 03_three\n"
    run("3", "--file", "model.py")
    assert capsys.readouterr().out == "no definition of model.py differs between 02_two and 03_three\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["1"], "no stage before 01_one"),
        (["9"], "choose from 01_one, 02_two, 03_three"),
        (["1", "x"], "choose from 01_one, 02_two, 03_three"),
        (["2", "--file", "z.py"], "choose from born.py, gone.py, model.py"),
        (["2", "--html", "nowhere/page.html"], "cannot write nowhere.page.html"),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_allowed(course, words, message):
    with pytest.raises(BadInput, match=message) as error:
        run(*words)
    assert "\n" not in str(error.value)


def test_plain_without_a_terminal_coloured_on_one(course, capsys, monkeypatch):
    run("2")
    plain = capsys.readouterr().out
    assert "\x1b" not in plain and f'    return "{LONG}"\n' in plain, "no colours and no wrapped lines in a pipe"
    screen = io.StringIO()
    monkeypatch.setattr(diff, "console", Console(file=screen, force_terminal=True, color_system="standard", width=80))
    diff.show(compare_stages(find("1"), find("2")))
    shown = screen.getvalue()
    assert "\x1b[31m-    width: int = 1" in shown and "\x1b[32m+    width: int = 2" in shown
    assert re.search(r"\x1b\[[\d;]*m\s*def\x1b", shown), "new definitions are highlighted as Python"


class Page(HTMLParser):
    """Reads a page back: tags balanced, and for every section the text of both sides."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.sections, self.links, self.marked = [], {}, [], {"del": [], "ins": []}
        self.feed(text)
        assert not self.stack, f"{self.stack} are not closed"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("href", "src") if key in attrs]
        if tag == "section":
            self.section = self.sections.setdefault(attrs["id"], {"old": "", "new": ""})
        if tag not in ("meta", "!doctype"):
            self.stack.append((tag, attrs.get("class", "")))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        classes = [css for tag, css in self.stack if tag == "pre"]
        if classes:
            side = "old" if classes[0] in ("twin", "old") else "new"
            self.section[side] += data
        for mark in set(self.marked) & {tag for tag, _ in self.stack}:
            self.marked[mark].append(data)


def test_the_page_holds_both_sides_letter_by_letter(course, capsys):
    assert run("2", "--html", "./page.html") == 0
    assert capsys.readouterr().out == "wrote page.html\n"
    page = Page((course / "page.html").read_text("utf-8"))
    for change in compare_stages(find("1"), find("2")):
        if change.status == "removed":
            continue
        shown = page.sections[f"{change.file}-{change.name}"]
        assert shown == {"old": change.old, "new": change.new}, f"{change.name} is not what the page shows"
    gone = page.sections["gone.py--whole-file-"]["new"]
    assert gone == "def a():\n    return 1\n\ndef b():\n    return 2\n"
    assert page.marked["del"] == ["1", "b"], "only the words that differ are marked"
    assert page.marked["ins"] == ["2", "c"]


def test_the_page_needs_nothing_else_and_every_link_leads_to_a_section(course):
    run("2", "--html", "./page.html")
    text = (course / "page.html").read_text("utf-8")
    page = Page(text)
    assert page.links == [f"#{name}" for name in page.sections] and len(page.links) == len(TABLE)
    assert not re.search(r"<script|<link|<img|url\(|@import|https?:", text), (
        "the page asks for something outside itself"
    )
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "pre-wrap" in text


def test_a_bare_name_goes_where_git_ignores_it(course, capsys, monkeypatch):
    """`--html diff.html`, from the root or from a stage, writes the course's out/diff.html and says so."""
    (course / ".gitignore").write_text("out/\n", "utf-8")
    monkeypatch.chdir(course / "02_two")
    assert run("2", "--html", "diff.html") == 0
    assert capsys.readouterr().out == f"wrote {course / 'out' / 'diff.html'}\n", "where it went is not said"
    assert not (course / "02_two" / "diff.html").exists(), "git sees a page that nobody wants to commit"
    assert Page((course / "out" / "diff.html").read_text("utf-8")).sections


def test_a_page_that_cannot_be_written_leaves_the_old_one(course, monkeypatch):
    (course / "page.html").write_text("before", "utf-8")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(BadInput, match="No space left"):
        run("2", "--html", "./page.html")
    assert (course / "page.html").read_text("utf-8") == "before"
    assert sorted(path.name for path in course.iterdir() if path.is_file()) == ["page.html", "pyproject.toml"]


def test_alignment_covers_both_sides_in_order_and_pairs_versions_of_a_line():
    first, second = (range(0, 1), range(0, 1)), (range(1, 2), range(1, 2))
    assert html.align(["a = 1", "b"], ["a = 2", "b", "c"]) == [first, second, (range(2, 2), range(2, 3))]
    assert html.align(["a = 1", "b = 2"], ["x()", "b = 3"]) == [first, second]
    assert html.align(["", "return x"], ["if y:", "    return x"])[-1] == second, "indented anew"
    rng = random.Random(0)
    vocabulary = ["", "x = 1", "x = 2", "return x", "return y", "def f():"]
    for _ in range(300):
        old, new = (rng.choices(vocabulary, k=rng.randrange(8)) for _ in range(2))
        blocks = html.align(old, new)
        assert [i for a, _ in blocks for i in a] == list(range(len(old))), f"{old} -> {new}: an old line is lost"
        assert [j for _, b in blocks for j in b] == list(range(len(new))), f"{old} -> {new}: a new line is lost"
        for a, b in blocks:
            assert len(a) or len(b), "an empty block"
            apart = not {old[i] for i in a} & {new[j] for j in b}
            assert apart or [old[i] for i in a] == [new[j] for j in b], "equal lines stand beside other lines"


COURSE = stages(root(Path(__file__).parent))


@pytest.mark.parametrize("old, new", list(pairwise(COURSE)), ids=lambda stage: stage.name)
def test_every_pair_of_the_course_is_shown_letter_by_letter(old, new):
    changes = fold(compare_stages(old, new), new)
    page = Page(html.page(old, new, changes))
    for change in changes:
        shown = page.sections[html.anchor(change)]
        if change.status == "changed":
            assert shown == {"old": change.old, "new": change.new}, f"{change.name} is not what the page shows"
            assert {line[1:] for line in diff.lines(change).plain.splitlines() if line.startswith("+")} <= {
                *change.new.splitlines()
            }
        elif change.status == "new":
            assert shown == {"old": "", "new": change.new}, f"{change.name} is not what the page shows"
