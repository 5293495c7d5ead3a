"""The command line: the overview, `stages run`, and what bad arguments get."""

import json
import os
import signal

import pytest

from course import finish, gone, make, stages, start, write

TRAIN = """\
import json, os, sys, time

def main():
    try:
        print(json.dumps([sys.argv[1:], os.path.basename(os.getcwd())]), flush=True)
        if "--wait" in sys.argv:
            time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)
        print("checkpoint saved")
        return 130
    return 7 if "--fail" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def course(tmp_path):
    files = {"train.py": TRAIN, "demos/show.py": TRAIN, "model.py": "", "tests/test_a.py": "", "extras/extra.py": TRAIN}
    return make(tmp_path, {"01_first": dict(files), "02_second": dict(files)})


def one_line(err: str) -> bool:
    return err.count("\n") == 1 and err.startswith("error: ")


def progress(course, **entries):
    write(course, {".stages/progress.json": json.dumps(entries)})


def test_overview_of_a_fresh_course(course):
    code, out, _ = stages(course)
    assert code == 0 and "01_first" in out and "Second" in out
    assert out.splitlines()[-1] == "next: read 01_first/README.md, then: uv run stages check 01"


def test_overview_shows_progress_and_the_best_comparable_loss(course):
    passed = {"total": 3, "passed": 2, "skipped": 1, "failed": []}
    progress(course, **{"01_first": passed})
    for run, corpus, loss in (("a", "shakespeare", 1.62), ("b", "shakespeare", 1.587), ("c", "python-docs", 0.9)):
        summary = json.dumps({"corpus": corpus, "val_loss": loss})
        write(course, {f"01_first/out/{run}/summary.json": summary})
    write(course, {"01_first/out/torn/summary.json": "{", "02_second/out/x/summary.json": '{"accuracy": 1}'})
    _, out, _ = stages(course / "02_second")
    row = next(line for line in out.splitlines() if line.startswith("01_first"))
    assert "2/2 + 1 skipped" in row and row.endswith("1.587"), row
    assert out.splitlines()[-1].startswith("next: read 02_second/README.md, see what changed: uv run stages diff 02,")


@pytest.mark.parametrize(
    ("entry", "run", "expected"),
    [
        ({"total": 2, "passed": 1, "skipped": 0, "failed": ["tests/test_a.py::test_mask"]}, True, "mend test_mask in"),
        ({"total": 2, "passed": 2, "skipped": 0, "failed": []}, False, "train: uv run stages run 01"),
        ({"total": 2, "passed": 2, "skipped": 0, "failed": []}, True, "every checkpoint passes"),
    ],
)
def test_advice_is_the_first_thing_not_done(course, entry, run, expected):
    progress(course, **{"01_first": entry, "02_second": {"total": 1, "passed": 1, "skipped": 0, "failed": []}})
    for stage in ("01_first", "02_second") if run else ():
        write(course, {f"{stage}/out/default/summary.json": "{}"})
    assert f"next: {expected}" in stages(course)[1]


def test_damaged_progress_counts_as_none(course):
    write(course, {".stages/progress.json": '{"01_first": {"no": 1}}'})
    code, out, err = stages(course)
    assert (code, err) == (0, "") and "next: read 01_first" in out


def test_overview_shows_the_runs_that_can_go_on_and_their_commands(course):
    """A stopped run of a script with --resume; not one that is finished, under way, or of a script without."""
    stopped = json.dumps({"script": "sft.py", "resume": False, "steps": 9})
    runs = {"half": stopped, "done": stopped, "busy": stopped, "torn": "{", "other": '{"script": "demos/show.py"}'}
    write(course, {f"02_second/out/{run}/config.json": config for run, config in runs.items()})
    write(course, {"02_second/out/done/summary.json": "{}", "02_second/out/busy/lock": str(os.getppid())})
    write(course, {"02_second/out/half/lock": str(gone())})
    code, out, err = stages(course)
    unfinished = [line for line in out.splitlines() if line.startswith("unfinished")]
    assert (code, err) == (0, "")
    assert unfinished == ["unfinished: uv run stages run 02 sft.py --resume --name half"], "not what can be typed"


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["frobnicate"], "'check'"),
        (["run"], "stages run N [script] [args...]"),
        (["run", "9"], "01_first, 02_second"),
        (["run", "²"], "01_first, 02_second"),  # str.isdigit says that it is a digit, int that it is none
        (["run", "first"], "01_first, 02_second"),
        (["run", "1", "dream"], "train.py, extras/extra.py, demos/show.py"),
        (["run", "1", "../02_second/train.py"], "train.py, extras/extra.py, demos/show.py"),
        (["check", "1", "--loud"], "--verbose"),
        (["check", "7"], "01_first, 02_second"),
        (["diff", "7"], "01_first, 02_second"),
        (["carry", "7"], "01_first, 02_second"),
        (["guard", "7"], "01_first, 02_second"),
        (["diff", "2", "--html", "."], "is a folder: name a file in it"),
        (["diff", "2", "--html", ""], "is a folder: name a file in it"),
        (["ladder", "--fast"], "--no-train"),
    ],
)
def test_bad_arguments_get_one_line_that_says_what_is_allowed(course, words, allowed):
    code, out, err = stages(course, *words)
    assert (code, out) == (2, "") and one_line(err) and allowed in err, err


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("[project]\n", "has no [tool.stages] with title and main: add them"),
        ("[tool.stages]\ntitle = 'Mine'\n", "has no [tool.stages] with title and main: add them"),
        ("[tool.stages\n", "is not valid TOML"),
        ("title = '\xff'", "is not valid TOML"),
    ],
)
def test_a_folder_that_does_not_say_what_it_is(course, text, remedy):
    (course / "13_mine").mkdir()
    (course / "13_mine" / "pyproject.toml").write_bytes(text.encode("latin-1"))
    code, _, err = stages(course)
    assert code == 2 and one_line(err) and os.path.join("13_mine", "pyproject.toml") in err and remedy in err, err


def test_a_script_in_another_encoding_does_not_hide_the_others(course):
    (course / "01_first" / "latin.py").write_bytes(b"# caf\xe9\n")
    code, _, err = stages(course, "run", "1", "dream")
    assert code == 2 and "choose from train.py, extras/extra.py, demos/show.py" in err, err


def test_names_in_the_overview_are_no_markup(course):
    run = json.dumps({"corpus": "/far/away/my[b]text", "val_loss": 1.5})
    write(course, {"01_first/out/a/summary.json": run})
    about = (course / "02_second" / "pyproject.toml").read_text("utf-8")
    write(course, {"02_second/pyproject.toml": about.replace('"Second"', '"[b]Second"')})
    code, out, err = stages(course)
    assert code == 0 and "1.500 (my[b]text)" in out and "[b]Second" in out, err


def test_outside_the_course(tmp_path):
    code, _, err = stages(tmp_path)
    assert code == 2 and one_line(err) and "is not inside the course" in err


@pytest.mark.parametrize("words", [[], ["run", "9"], ["diff", "9"], ["check", "9"]], ids=" ".join)
def test_what_needs_no_torch_does_not_wait_for_it(course, words):
    write(course, {"sitecustomize.py": "import atexit, sys\natexit.register(lambda: print(*sys.modules))\n"})
    _, out, _ = finish(course, *words, PYTHONPATH=str(course))
    loaded = set(out.splitlines()[-1].split())
    assert "shared.stages.repo" in loaded, "the modules were not listed"
    assert not loaded & {"torch", "matplotlib", "pytest"}, "seconds of imports before the first word"


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["1"], []),
        (["01", "--preset", "long", "--", "--help"], ["--preset", "long", "--", "--help"]),
        (["01_first", "train", "a b", "-h"], ["a b", "-h"]),
        (["1", "demos/show.py", "--steps=3", "--verbose"], ["--steps=3", "--verbose"]),
        (["1", "demos/show", "run", "--fail"], ["run", "--fail"]),
        (["1", "show", "-h"], ["-h"]),
        (["1", "extra.py"], []),
    ],
)
def test_run_hands_everything_to_the_script(course, words, arguments):
    code, out, err = finish(course / "02_second", "run", *words)
    assert json.loads(out) == [arguments, "01_first"] and err == ""
    assert code == (7 if "--fail" in arguments else 0), "the script's exit code must be ours"


@pytest.mark.skipif(os.name != "posix", reason="signals of a POSIX terminal")
@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
def test_ctrl_c_gives_the_script_time_to_save(course, whole_group):
    with start(course, "run", "1", "--wait") as process:
        process.stdout.readline()
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "checkpoint saved\n", "")


def test_run_reads_paths_where_they_were_typed(course):
    """`stages run 1 --corpus my.txt` means the my.txt of the folder one stands in, not of the stage's."""
    script = "import sys\nfrom shared.corpus import load\n\nif __name__ == '__main__':\n    "
    script += "print(load(sys.argv[1]).text)\n"
    write(course, {"01_first/read.py": script, "texts/my.txt": "my words"})
    code, out, err = finish(course / "texts", "run", "1", "read", "my.txt")
    assert (code, out) == (0, "my words\n"), err


WHERE = """\
import os

def test_where():
    for name, folder in ("STAGES_DATA", "texts"), ("STAGES_OUT", "runs"):
        assert os.environ[name] == os.path.abspath("../" + folder), f"{name} is looked for inside the stage"

if __name__ == "__main__":
    test_where()
"""


@pytest.mark.parametrize("words", [["run", "1", "tests/test_a.py"], ["check", "1"]], ids=" ".join)
def test_relative_folders_are_those_of_where_the_command_was_typed(course, words):
    """STAGES_DATA=../data and STAGES_OUT=../runs, whichever command starts the stage's code."""
    write(course, {"01_first/tests/test_a.py": WHERE})
    code, out, err = finish(course, *words, STAGES_DATA="texts", STAGES_OUT="runs")
    assert code == 0, out + err
