"""`stages ladder`: rungs from the runs' summaries into the README's table and a figure."""

import json
import os
import re
import signal
from pathlib import Path

from shared.stages import repo
from shared.stages.ladder import END, FIGURE, REFERENCES, START, Rung, figure, markdown, recipes

import pytest

from course import make, stages, start, wait_for, write

TRAIN = """\
import json, os, pathlib, sys, time
run = sys.argv[1] if len(sys.argv) > 1 else "default"
pathlib.Path("ran").write_text("yes")
if pathlib.Path("fails").exists():
    sys.exit(3)
if pathlib.Path("waits").exists():
    try:
        pathlib.Path("waiting").write_text("yes")
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)
        pathlib.Path("saved").touch()
        sys.exit(130)
if pathlib.Path("spoils").exists():
    pathlib.Path("../README.md").write_text("no markers")
folder = pathlib.Path(os.environ.get("STAGES_OUT", "out")) / run
folder.mkdir(parents=True, exist_ok=True)
(folder / "summary.json").write_text(pathlib.Path(run + ".json").read_text())
"""
README = "# Course\n\nBefore.\n\n<!-- ladder -->\nold\n<!-- /ladder -->\n\nAfter.\n"
RUNGS = """
[[tool.stages.rungs]]

[[tool.stages.rungs]]
name = "Wide"
args = ["train.py", "wide"]
run = "wide"
"""


def summary(**figures) -> str:
    return json.dumps({"corpus": "shakespeare", **figures})


@pytest.fixture
def course(tmp_path):
    several = [
        {"name": "bigram", "val_loss": 2.4841, "params": 4225, "seconds": 0.04},
        {"name": "7-gram", "val_loss": 1.5166, "val_bpb": 2.188},
    ]
    stages = {
        "01_first": {"train.py": TRAIN, "default.json": summary(accuracy=1.0)},
        "02_second": {"train.py": TRAIN, "default.json": summary(val_loss=1.5166, rungs=several)},
        "03_third": {
            "train.py": TRAIN,
            "pyproject.toml": RUNGS,
            "default.json": summary(val_loss=1.7, val_bpb=2.4526, params=804096, tokens=1536000, seconds=75.4),
            "wide.json": summary(val_loss=1.4987, seconds=300),
        },
        "04_fourth": {"train.py": TRAIN, "pyproject.toml": '[tool.other]\nx = 1\n'},
    }
    make(tmp_path, stages)
    about = tmp_path / "04_fourth" / "pyproject.toml"
    about.write_text(about.read_text("utf-8").replace('main = "train.py"', 'main = "train.py"\nrungs = []'), "utf-8")
    (tmp_path / "shared").mkdir()
    return write(tmp_path, {"README.md": README})


def table(course) -> list[list[str]]:
    """The cells of the README's ladder."""
    text = (course / "README.md").read_text("utf-8")
    rows = text.split("<!-- ladder -->")[1].split("<!-- /ladder -->")[0].splitlines()
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("|")]


def test_every_rung_is_trained_and_stands_in_the_table_in_order(course, monkeypatch):
    monkeypatch.setenv("STAGES_OUT", str(course / "elsewhere"))
    code, out, err = stages(course, "ladder")
    assert (code, err) == (0, "")
    head, _, *rows = table(course)
    assert head[0] == "stage" and head[4] == "seconds" and head[5] == "val loss (nats/char)"
    assert rows[: -len(REFERENCES)] == [
        ["[02_second](02_second/README.md)", "bigram", "4,225", "", "0.04", "2.484", ""],
        ["[02_second](02_second/README.md)", "7-gram", "", "", "", "1.517", "2.188"],
        ["[03_third](03_third/README.md)", "Third", "804,096", "1,536,000", "75", "1.700", "2.453"],
        ["[03_third](03_third/README.md)", "Wide", "", "", "300", "1.499", ""],
    ]
    assert rows[-2] == ["nanoGPT", "CPU recipe, published", "804,096", "1,536,000", "", "1.880", "2.712"]
    assert not (course / "04_fourth" / "ran").exists(), "`rungs = []` keeps a stage out"


def test_the_rest_of_the_readme_stays_and_the_figure_is_small(course):
    stages(course, "ladder")
    text = (course / "README.md").read_text("utf-8")
    assert text.startswith("# Course\n\nBefore.\n\n<!-- ladder -->\n|") and text.endswith(
        f"]({FIGURE})\n<!-- /ladder -->\n\nAfter.\n"
    )
    png = (course / FIGURE).read_bytes()
    assert png.startswith(b"\x89PNG") and 5_000 < len(png) < 100_000
    stages(course, "ladder", "--no-train")
    assert (course / "README.md").read_text("utf-8") == text, "a second rewrite from the same runs changes nothing"


def test_no_train_only_reads(course):
    stages(course, "ladder")
    for stage in course.glob("0*"):
        (stage / "ran").unlink(missing_ok=True)
    write(course, {"03_third/out/wide/summary.json": summary(val_loss=1.25)})
    assert stages(course, "ladder", "--no-train")[0] == 0
    assert not list(course.glob("*/ran"))
    assert table(course)[5][5] == "1.250"


@pytest.mark.parametrize(
    ("files", "words", "told"),
    [
        ({"03_third/fails": ""}, [], "03 train.py ended with 3: the ladder is unchanged"),
        ({}, ["--no-train"], "01_first has no out/default/summary.json: uv run stages run 01 train.py"),
        ({"03_third/wide.json": '{"val_loss": 1, "corpus": "python-docs"}'}, [], "trained on python-docs"),
        ({"README.md": "# Course\n<!-- ladder -->\n"}, [], "needs the markers <!-- ladder --> and <!-- /ladder -->"),
        ({"README.md": "<!-- /ladder --> <!-- ladder -->"}, [], "needs the markers"),
        ({"03_third/train.py": "pass\n"}, [], "wrote no out/default/summary.json"),
    ],
)
def test_when_anything_is_wrong_the_readme_stays_as_it_was(course, files, words, told):
    before = (write(course, files) / "README.md").read_text("utf-8")
    code, _, err = stages(course, "ladder", *words)
    assert code == 2 and told in err and err.count("\n") == 1, err
    assert (course / "README.md").read_text("utf-8") == before
    assert not (course / FIGURE).exists()


def test_a_summary_from_last_year_is_no_result_of_this_run(course):
    stages(course, "ladder")
    before = (course / "README.md").read_text("utf-8")
    write(course, {"03_third/train.py": "pass\n", "03_third/out/default/summary.json": summary(val_loss=1.0)})
    os.utime(course / "03_third" / "out" / "default" / "summary.json", (1e9, 1e9))
    code, _, err = stages(course, "ladder")
    assert code == 2 and "03 train.py wrote no out/default/summary.json" in err
    assert (course / "README.md").read_text("utf-8") == before


def test_a_readme_that_lost_its_markers_meanwhile_gets_no_figure_either(course):
    code, _, err = stages(write(course, {"03_third/spoils": ""}), "ladder")
    assert code == 2 and "needs the markers" in err
    assert not (course / FIGURE).exists(), "a figure beside a table that does not say the same"


@pytest.mark.skipif(os.name != "posix", reason="signals of a POSIX terminal")
def test_ctrl_c_gives_the_training_time_to_save(course):
    folder = write(course / "01_first", {"waits": ""})
    with start(course, "ladder") as process:
        wait_for(folder / "waiting")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "stopped\n")
    assert (folder / "saved").exists(), "the training was killed before its checkpoint was written"


def test_the_figure_explains_its_line_and_keeps_its_labels_inside(monkeypatch):
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    names = ("a bigram", "a network")
    rows = [Rung("02_second", name, loss, seconds=99_999) for name, loss in zip(names, (2.484, 1.499), strict=True)]
    rows += [Rung("03_third", "trained elsewhere", 1.104), *REFERENCES]
    figure(rows)
    fig = kept[0]
    (ax,) = fig.axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["nanoGPT's CPU recipe, published"]
    dots = [line.get_color() for line in ax.lines if line.get_marker() == "o"]
    assert dots == ["tab:blue"] * 2 + ["tab:gray"] * 3, "what was not trained here looks as if it was"
    fig.canvas.draw()
    for label in ax.texts:
        assert label.get_window_extent().x1 <= ax.bbox.x1, f"{label.get_text()!r} runs past the axes"


def test_the_readmes_table_has_every_recipe_in_the_order_in_which_the_command_writes_them():
    """A rung that was renamed, moved or forgotten; stage 02 is one recipe, which brings several rungs of its own."""
    top = repo.root(Path(__file__).parent)
    table = (top / "README.md").read_text("utf-8").partition(START)[2].partition(END)[0]
    rows = re.findall(r"^\| \[(\w+)\]\(\1/README\.md\) \| ([^|]+) \|", table, re.M)
    wanted = [(stage.name, recipe.name) for stage in repo.stages(top) for recipe in recipes(stage)]
    own = {stage.name for stage in repo.stages(top) if (stage.name, stage.title) in wanted}
    assert own == {"02_ngram"}, "the other rungs have a short name"
    titles = dict(wanted)
    found = [(stage, titles[stage] if stage in own else name) for stage, name in rows]
    assert list(dict.fromkeys(found)) == wanted, "uv run stages ladder would write another table"
    assert table.strip().startswith("\n".join(markdown([]).splitlines()[:2])), "another head"
    assert "\n".join(markdown(REFERENCES).splitlines()[2:]) in table, "the references, or the figure, are others"
