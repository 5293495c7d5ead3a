"""`shared.console`: a live line on a terminal, few plain lines elsewhere, and next to no cost."""

import io
import math
import os
import re
import sys
import time

from shared import console
from shared.console import Progress, clock, number, progress, say, table

import pytest
from rich.console import Console

from course import on_terminal, run


def test_numbers_as_a_person_reads_them():
    shown = {1.23456: "1.235", 0.05: "0.050", 3e-4: "3.0e-04", 52100.7: "52,101", -2.5: "-2.500", 0.0: "0.000"}
    assert {value: number(value) for value in shown} == shown
    assert [number(v) for v in (1115394, True, None, "a", float("nan"))] == ["1,115,394", "True", "-", "a", "nan"]
    assert number(float("inf")) == "inf"
    assert [clock(s) for s in (0, 7.9, 754, 3723)] == ["0:00", "0:07", "12:34", "1:02:03"]


def test_say_prints_text_as_it_is(capsys):
    line = "[aside] To be :smile: [/b] " + "x" * 200
    say(line)
    assert capsys.readouterr().out == line + "\n", "markup, emoji or wrapping changed a sample of text"


def test_a_table_keeps_every_cell(capsys):
    wide = "w" * 150
    table("Runs [x]", [{"run": "a", "loss": 1.5, "steps": 1000}, {"run": "[red]", "loss": None, "note": wide}])
    out = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["a", "1.500", "1,000", "-"],
        ["[red]", "-", "-", wide],
    ]
    assert rows[0][2].endswith("1,000 ") and out.splitlines()[0].strip() == "Runs [x]"
    table("Nothing", [])


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(console, "perf_counter", lambda: self.now)


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_plain_lines_come_each_ten_seconds_or_ten_percent_whichever_is_rarer(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with progress(1000, "train") as bar:
        for step in range(1, 501):  # fast: 50 steps a second, 10 % in 2 s
            clock.now += 0.02
            bar.update(step, loss=2.0, tokens=step * 100)
        assert len(lines(capsys)) <= 1, "10 % have passed five times, but only 10 s"
        clock.now += 100
        for step in range(501, 901):
            bar.update(step, loss=2.0)  # 40 % at once
        assert len(lines(capsys)) == 1, "10 % have passed four times, but no 10 s since the last line"
        for step in range(901, 1001):  # slow: 10 s a step
            clock.now += 10
            bar.update(step, loss=1.5)
        assert len(lines(capsys)) <= 1, "10 s have passed a hundred times, but 10 % only once"
        clock.now += 1
        bar.update(1000, loss=1.25, text="two\nlines")
        capsys.readouterr()
    (last,) = lines(capsys)
    assert re.fullmatch(r"train  1,000/1,000  loss 1\.250  \d+ tokens/s  18:3[01]  two lines", last), last


def test_rate_and_time_left_count_from_the_first_update(monkeypatch):
    clock = Clock(monkeypatch)
    bar = Progress(1000, "train")
    clock.now += 60  # loading the data is no training
    bar.update(500, tokens=5_000_000)  # a resumed run
    clock.now += 10
    bar.update(600, tokens=6_000_000, lr=3e-4)
    assert bar.line(clock.now) == "train  600/1,000  lr 3.0e-04  100,000 tokens/s  1:10  0:40 left"


def drawn(monkeypatch, width: int, title: str = "training", **fields) -> str:
    """The live line of a run of 3,000 steps in its second minute, with `fields`, on a terminal of `width` columns."""
    clock, screen = Clock(monkeypatch), Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(console, "console", screen)
    bar = Progress(3000, title)
    bar.next = math.inf  # no plain lines
    bar.update(0, tokens=0)
    clock.now += 75
    bar.update(1000, loss=1.586, tokens=4_000_000, **fields)
    screen.print(bar.draw(clock.now))
    return screen.file.getvalue()


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (100, "training <20> 1,000/3,000  loss 1.586  53,333 tokens/s  1:15  2:30 left"),
        (80, "training <20> 1,000/3,000  loss 1.586  1:15  2:30 left"),
        (60, "training <10> 1,000/3,000  loss 1.586  1:15  2:30 left"),
        (50, "training 1,000/3,000  loss 1.586  1:15  2:30 left"),
        (44, "training 1,000/3,000  loss 1.586  2:30 left"),
        (40, "training 1,000/3,000  2:30 left"),
        (30, "traini… 1,000/3,000  2:30 left"),
    ],
)
def test_a_narrow_terminal_keeps_the_time_left(monkeypatch, width, line):
    """Tokens per second go first, then the bar, then the time so far and the loss; the time left never does."""
    shown = drawn(monkeypatch, width)
    assert shown.count("\n") == 1, f"the line wraps at {width} columns: {shown!r}"
    shown = re.sub("[━╸╺]+ *", lambda bar: f"<{len(bar[0]) - 1}> ", shown)  # the bar by its width
    assert shown.rstrip() == line, f"at {width} columns the time left, or something before its turn, is gone"


def test_a_long_text_gives_way_to_the_rest_of_the_line(monkeypatch):
    """The field `text` may be longer than the terminal: it is cut, and nothing before it."""
    shown = drawn(monkeypatch, 80, text="abc " * 50)
    assert "1,000/3,000  loss 1.586  1:15  2:30 left  abc abc…\n" in shown, f"the text pushes the line away: {shown!r}"
    shown = drawn(monkeypatch, 40, "a title that is longer than the terminal is wide")
    assert "… 1,000/3,000  2:30 left" in shown, f"the title pushes the line away: {shown!r}"


def test_before_the_first_update_and_past_the_end_there_is_a_line_too(capsys):
    with progress(0, "nothing"):
        pass
    with progress(10, "over") as bar:
        bar.update(12)
    assert [line.split("  ")[:2] for line in lines(capsys)] == [["nothing", "0/0"], ["over", "12/10"]]


def test_an_error_passes_through_after_the_last_line(capsys):
    with pytest.raises(KeyboardInterrupt):
        with progress(10, "train") as bar:
            bar.update(3)
            raise KeyboardInterrupt
    assert lines(capsys)[0].startswith("train  3/10")


def test_an_update_that_draws_nothing_renders_nothing(monkeypatch):
    def render(*args):
        raise AssertionError("each training step pays for a text that nobody sees")

    Clock(monkeypatch)
    monkeypatch.setattr(console, "number", render)
    monkeypatch.setattr(Progress, "parts", render)
    bar = Progress(1000, "train")
    for step in range(1000):
        bar.update(step, loss=1.5, tokens=step)
    assert (bar.step, bar.fields) == (999, {"loss": 1.5, "tokens": 999}), "what is not drawn is still kept for later"


LIVE = """
import time
from shared.console import progress, say
with progress(400, "train") as bar:
    for step in range(1, 401):
        time.sleep(0.002)
        bar.update(step, loss=1 + 1 / step, tokens=step * 100)
        if step == 200:
            print("printed meanwhile"); say("[said] meanwhile")
with progress(10, "broken") as bar:
    bar.update(3)
    raise KeyboardInterrupt
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal_the_line_is_redrawn_seldom_and_leaves_it_sane():
    begin = time.perf_counter()
    out = on_terminal([sys.executable, "-c", LIVE], env={"STAGES_TRACEBACK": "1"})
    seconds = time.perf_counter() - begin
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
    frames = re.findall(r"train \S+ [\d,]+/400", text)
    assert 3 <= len(set(frames)), f"not live: {frames}"
    assert len(frames) <= 10 * seconds + 6, f"{len(frames)} redraws in {seconds:.1f} s"
    assert "400/400  loss 1.002" in text and "printed meanwhile" in text and "[said] meanwhile" in text
    assert text.index("printed meanwhile") < text.index("400/400")
    assert "broken" in text and "3/10" in text
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor stays hidden after Ctrl-C"


def test_in_a_pipe_and_in_other_ranks_nothing_is_redrawn():
    code = "from shared.console import progress\nwith progress(5, 'train') as bar:\n    bar.update(5)\n"
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    outputs = [
        run([sys.executable, "-c", code], env=environment | more)[1]
        for more in ({"RANK": "0"}, {"RANK": "1"})
    ]
    assert outputs[0].split("  ")[:2] == ["train", "5/5"] and outputs[0].count("\n") == 1, outputs[0]
    assert outputs[1] == "", "under torchrun every rank speaks"
