"""`stages carry` on real git repositories in temporary folders."""

import argparse
import subprocess

from shared.errors import BadInput
from shared.stages import carry
from shared.stages.definitions import definitions

import pytest

from course import edit, forget_git

MODEL = '''\
"""The model."""

import math

SCALE = 1


def attention(q, k):
    scores = q @ k
    scores = scores * SCALE
    return scores


class GPT:
    """A model."""

    width: int = 1

    def embed(self, x):
        return x

    def forward(self, x):
        x = self.embed(x)
        return x


def build():
    return GPT()
'''
TEST = """\
from model import attention


def test_attention():
    assert attention(1, 1) == 1
"""
DATA = "def load():\n    return 1\n"


DEEPER = ("        x = self.embed(x)\n", "        x = self.embed(x)\n        x = self.block(x)\n")
BLOCK = ("    def forward", "    def block(self, x):\n        return x\n\n    def forward")
COURSE = {
    "01_a": {"model.py": "def attention():\n    return 0\n"},
    "02_b": {"model.py": MODEL, "tests/test_model.py": TEST, "data.py": DATA, "extras/more.py": "A = 1\n"},
    "03_c": {"model.py": edit(MODEL, DEEPER, BLOCK), "tests/test_model.py": TEST, "data.py": DATA},
    "04_d": {
        "model.py": edit(MODEL, DEEPER, BLOCK, ('"""A model."""', '"""A deep model."""'), ("SCALE = 1", "SCALE = 2")),
        "tests/test_model.py": TEST + "\n\ndef test_more():\n    assert attention(2, 2) == 4\n",
        "data.py": DATA,
        "optim.py": "def step(): pass\n",
    },
    "05_e": {
        "model.py": edit(MODEL, DEEPER, BLOCK, ("import math\n", "import math\nimport os\n")),
        "tests/test_model.py": TEST,
    },
}


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Five small stages, committed; the course lies in a subfolder of the repository."""
    top = tmp_path / "course"
    files = {"pyproject.toml": "[tool.uv.workspace]\n", ".gitignore": ".stages/\n"}
    for stage, texts in COURSE.items():
        files[f"{stage}/pyproject.toml"] = '[tool.stages]\ntitle = ""\nmain = ""\n'
        files |= {f"{stage}/{file}": text for file, text in texts.items()}
    for path, text in files.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_bytes(text.encode("utf-8"))
    forget_git(monkeypatch)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "none"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.chdir(top)
    git("init", "-q", "..")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    return top


def git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, encoding="utf-8", timeout=60).stdout


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    carry.add(parser.add_subparsers())
    args = parser.parse_args(["carry", *words])
    return args.func(args)


def change(path, *changes: tuple[str, str]) -> None:
    path.write_bytes(edit(path.read_bytes().decode("utf-8"), *changes).encode("utf-8"))


def touched() -> list[str]:
    return sorted(line[3:].removeprefix("course/") for line in git("status", "--porcelain", "-uall").splitlines())


def table_rows(out: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


@pytest.fixture
def hook(tmp_path, monkeypatch):
    """What git sets where it runs a hook."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "callers"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "callers_index"))


def test_the_callers_repository_is_left_alone(hook, course, tmp_path):
    assert (tmp_path / ".git").is_dir()
    assert not list(tmp_path.glob("callers*")), "these tests, run in a git hook, write into the caller's repository"


FIX = ("    scores = scores * SCALE\n", "    scores = scores / SCALE\n")


def test_a_fix_goes_through_all_later_stages_and_touches_nothing_else(course, capsys):
    change(course / "02_b/model.py", FIX)
    assert run("2") == 0
    for stage, files in COURSE.items():
        for file, text in files.items():
            wanted = edit(text, FIX) if file == "model.py" and stage != "01_a" else text
            assert (course / stage / file).read_bytes().decode("utf-8") == wanted, f"{stage}/{file}"
    assert touched() == [f"{stage}/model.py" for stage in list(COURSE)[1:]]
    out = capsys.readouterr().out
    assert table_rows(out) == [[stage, "model.py", "attention", "carried"] for stage in list(COURSE)[2:]]
    assert out.endswith("uv run stages check 02 03 04 05\n")
    assert not (course / ".stages").exists()


def test_carrying_twice_changes_nothing_more(course, capsys):
    change(
        course / "02_b/model.py", FIX, ("        return x\n\n    def forward", "        return +x\n\n    def forward")
    )
    run("2")
    before = git("diff")
    capsys.readouterr()
    assert run("2") == 0
    assert git("diff") == before
    assert {row[3] for row in table_rows(capsys.readouterr().out)} == {"already there"}


def test_changes_apart_in_one_definition_are_merged(course, capsys):
    change(course / "02_b/model.py", ("    def forward(self, x):", "    def forward(self, y, x):"))
    assert run("2") == 0
    for stage in list(COURSE)[2:]:
        found = definitions((course / stage / "model.py").read_text("utf-8"))["GPT.forward"].text
        assert found == edit(definitions(COURSE[stage]["model.py"])["GPT.forward"].text, ("self, x", "self, y, x"))
    assert [row[3] for row in table_rows(capsys.readouterr().out)] == ["merged", "carried", "carried"]


CLASH = ("        x = self.embed(x)\n        return x\n", "        x = self.embed(x)\n        return -x\n")


def stop(course) -> None:
    """Runs into a conflict in 03_c, in GPT.forward, with two more changes on their way."""
    change(course / "02_b/model.py", FIX, CLASH)
    change(course / "02_b/data.py", ("return 1", "return 2"))
    assert run("2") == 1


def resolve(course) -> None:
    file = course / "03_c/model.py"
    text = file.read_text("utf-8")
    head, rest = text.split("<<<<<<< 03_c\n")
    tail = rest.split(">>>>>>> 02_b with the fix\n")[1]
    file.write_text(f"{head}        x = self.block(x)\n        return -x\n{tail}", "utf-8")


def test_a_conflict_stops_with_markers_in_the_definition(course, capsys):
    stop(course)
    out = capsys.readouterr().out
    rows = [["03_c", *row] for row in (
        ["data.py", "load", "carried"], ["model.py", "attention", "carried"], ["model.py", "GPT.forward", "conflict"],
    )]  # fmt: skip
    assert table_rows(out) == rows
    assert "conflict in 03_c/model.py, definition GPT.forward\n" in out and "stages carry --continue" in out
    assert touched() == ["02_b/data.py", "02_b/model.py", "03_c/data.py", "03_c/model.py"], "04_d waits"
    text = (course / "03_c/model.py").read_text("utf-8")
    assert text.count("<<<<<<< 03_c\n") == 1 and "scores / SCALE" in text
    marked = text[text.index("<<<<<<<") : text.index(">>>>>>>")]
    assert marked == "<<<<<<< 03_c\n        x = self.block(x)\n        return x\n=======\n        return -x\n"


def test_what_is_to_be_checked_begins_with_the_fix(course, capsys):
    stop(course)
    resolve(course)
    run("--continue")
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith("stages check 02 03 04 05"), "the stage whose conflict was resolved needs a check most of all"


@pytest.mark.parametrize("words", [["--continue"], ["2"], ["2", "--continue"]])
@pytest.mark.parametrize("commit", [False, True])
def test_the_carry_goes_on_with_the_resolution(course, capsys, words, commit):
    stop(course)
    with pytest.raises(BadInput, match=r"03_c/model\.py line 27 has a conflict marker"):
        run(*words)
    resolve(course)
    if commit:
        git("commit", "-q", "-a", "-m", "so far")
    capsys.readouterr()
    assert run(*words) == 0
    for stage in ("04_d", "05_e"):
        wanted = edit(
            COURSE[stage]["model.py"], FIX, ("self.block(x)\n        return x", "self.block(x)\n        return -x")
        )
        assert (course / stage / "model.py").read_text("utf-8") == wanted, "the resolution is what is carried on"
    assert (course / "04_d/data.py").read_text("utf-8") == "def load():\n    return 2\n"
    assert {row[0] for row in table_rows(capsys.readouterr().out)} == {"04_d", "05_e"}
    assert not (course / ".stages/carry.json").exists()


def test_a_stopped_carry_blocks_another_and_can_be_forgotten(course, capsys):
    stop(course)
    with pytest.raises(BadInput, match="carry of 02_b stopped in 03_c: finish with --continue or forget with --abort"):
        run("3")
    before = git("diff")
    assert run("--abort") == 0 and git("diff") == before, "--abort touches no file of a stage"
    with pytest.raises(BadInput, match="no carry has stopped"):
        run("--continue")
    with pytest.raises(BadInput, match=r"03_c/model\.py line 27 has a conflict marker"):
        run("3")
    (course / ".stages/carry.json").write_text("{", "utf-8")
    with pytest.raises(BadInput, match="--abort"):
        run("2")


def test_abort_says_what_it_forgets_and_a_dry_run_forgets_nothing(course, capsys):
    assert run("--abort") == 0
    assert capsys.readouterr().out.startswith("nothing to forget")
    stop(course)
    capsys.readouterr()
    assert run("--abort", "--dry-run") == 0
    assert (course / ".stages/carry.json").exists(), "a dry run writes nothing, and deletes nothing"
    assert capsys.readouterr().out.startswith("would forget")
    assert run("--abort") == 0 and not (course / ".stages/carry.json").exists()


def test_what_git_does_not_know_is_never_written_to(course, capsys):
    """Not even where the fix itself is a new file, or where the course lies in a repository that does not hold it."""
    (course / "02_b/optim.py").write_text("def a():\n    return 1\n", "utf-8")
    (course / "03_c/optim.py").write_text("def a():\n    return 2\n", "utf-8")
    with pytest.raises(BadInput, match=r"03_c/optim\.py is not committed: commit it first"):
        run("2")
    (course / "03_c/optim.py").unlink()
    assert run("2") == 0 and run("2") == 0, "what the carry itself has put there may stay"
    git("rm", "-q", "-r", "--cached", ".")
    git("commit", "-q", "-m", "a copy of the course in another repository")
    change(course / "02_b/data.py", ("return 1", "return 2"))
    with pytest.raises(BadInput, match=r"03_c/data\.py is not committed"):
        run("2")
    assert (course / "03_c/data.py").read_text("utf-8") == DATA, "a file that git does not know cannot be had back"


@pytest.mark.parametrize(
    ("committed", "told"),
    [
        (False, r"model\.py is not UTF-8 text \(byte 10\): save it"),
        (True, r"model\.py as committed .* \(byte 10\): commit it"),
    ],
)
def test_a_file_that_is_not_utf8_is_named(course, committed, told):
    (course / "02_b/model.py").write_bytes(MODEL.replace("model", "modèle").encode("latin-1"))
    if committed:
        git("commit", "-q", "-a", "-m", "latin")
        (course / "02_b/model.py").write_text(MODEL, "utf-8")
    with pytest.raises(BadInput, match="02_b/" + told):
        run("2")


def test_what_a_later_stage_removed_is_dropped_from_there_on(course, capsys):
    gone = edit(COURSE["04_d"]["model.py"], (definitions(MODEL)["attention"].text + "\n\n", ""))
    (course / "04_d/model.py").write_text(gone, "utf-8")
    git("commit", "-q", "-a", "-m", "04 does without")
    change(course / "02_b/model.py", FIX, ("return GPT()", "return GPT(1)"))
    assert run("2") == 0
    assert table_rows(capsys.readouterr().out) == [
        ["03_c", "model.py", "attention", "carried"],
        ["03_c", "model.py", "build", "carried"],
        ["04_d", "model.py", "attention", "dropped"],
        ["04_d", "model.py", "build", "carried"],
        ["05_e", "model.py", "build", "carried"],
    ]
    assert (course / "04_d/model.py").read_text("utf-8") == edit(gone, ("GPT()", "GPT(1)"))
    assert (course / "05_e/model.py").read_text("utf-8") == edit(COURSE["05_e"]["model.py"], ("GPT()", "GPT(1)"))


def test_a_file_that_a_later_stage_removed_is_dropped(course, capsys):
    change(course / "02_b/data.py", ("return 1", "return 2"))
    assert run("2") == 0
    assert [row[0::3] for row in table_rows(capsys.readouterr().out)] == [
        ["03_c", "carried"],
        ["04_d", "carried"],
        ["05_e", "dropped"],
    ]
    assert touched() == ["02_b/data.py", "03_c/data.py", "04_d/data.py"]


def test_tests_of_the_trunk_are_carried_and_nothing_else_is(course, capsys):
    fix = ("attention(1, 1) == 1", "attention(1, 1) == 1.0")
    change(course / "02_b/tests/test_model.py", fix)
    change(course / "02_b/extras/more.py", ("A = 1", "A = 2"))
    (course / "02_b/tests/test_extra.py").write_text("X = 1\n", "utf-8")
    assert run("2") == 0
    for stage in list(COURSE)[2:]:
        wanted = edit(COURSE[stage]["tests/test_model.py"], fix)
        assert (course / stage / "tests/test_model.py").read_text("utf-8") == wanted
    others = ["02_b/extras/more.py", "02_b/tests/test_extra.py"]
    assert touched() == sorted([*others, *(f"{stage}/tests/test_model.py" for stage in list(COURSE)[1:])])


def test_new_definitions_stand_below_the_one_they_follow(course):
    new = (
        ("SCALE = 1\n", "SCALE = 1\nSHIFT = 2  # new\n"),
        (
            "    def embed(self, x):\n        return x\n",
            "    def embed(self, x):\n        return x\n\n    def init(self):\n        pass\n",
        ),
        ("def build():\n    return GPT()\n", "def build():\n    return GPT()\n\n\n# last\ndef end():\n    pass\n"),
        ("def build", "class New:\n    def f(self): pass\n\n\ndef build"),
    )
    change(course / "02_b/model.py", *new)
    assert run("2") == 0
    for stage in ("03_c", "05_e"):
        assert (course / stage / "model.py").read_text("utf-8") == edit(COURSE[stage]["model.py"], *new)
    wanted = edit(COURSE["04_d"]["model.py"], *new[1:], ("SCALE = 2\n", "SCALE = 2\nSHIFT = 2  # new\n"))
    assert (course / "04_d/model.py").read_text("utf-8") == wanted


def test_imports_that_both_added_do_not_clash(course):
    change(course / "02_b/model.py", ("import math\n", "import math\nimport sys\n"))
    assert run("2") == 0
    found = [definitions((course / f"{s}/model.py").read_text("utf-8"))["imports"].text for s in ("04_d", "05_e")]
    assert found == ["import math\nimport sys\n", "import math\nimport os\nimport sys\n"]


def test_imports_changed_on_both_sides_are_a_conflict(course):
    change(course / "02_b/model.py", ("import math\n", "import cmath as math\n"))
    change(course / "04_d/model.py", ("import math\n", "import numpy as math\n"))
    git("commit", "-q", "-m", "numpy", "04_d")
    assert run("2") == 1
    assert "<<<<<<< 04_d\nimport numpy as math\n=======\nimport cmath as math\n>>>>>>>" in (
        course / "04_d/model.py"
    ).read_text("utf-8")


def test_a_dry_run_says_it_all_and_writes_nothing(course, capsys):
    change(course / "02_b/model.py", FIX)
    before = git("diff")
    assert run("2", "--dry-run") == 0
    dry = capsys.readouterr().out
    assert git("diff") == before and "nothing was written" in dry
    run("2")
    assert table_rows(capsys.readouterr().out) == table_rows(dry)
    change(course / "02_b/model.py", CLASH)
    before = git("diff")
    assert run("2", "--dry-run") == 1 and git("diff") == before and not (course / ".stages").exists()


def test_new_and_deleted_files_are_carried(course, capsys):
    (course / "02_b/optim.py").write_text("def sgd():\n    return 1\n", "utf-8")
    (course / "02_b/tests/test_optim.py").write_text("def test_sgd():\n    assert 1\n", "utf-8")
    (course / "02_b/data.py").unlink()
    change(course / "04_d/data.py", ("return 1", "return 4"))
    git("commit", "-q", "-m", "4", "04_d")
    assert run("2") == 0
    rows = [row for row in table_rows(capsys.readouterr().out) if row[0] in ("03_c", "04_d")]
    assert ["03_c", "data.py", "(whole file)", "carried"] in rows and [
        "03_c",
        "optim.py",
        "(whole file)",
        "carried",
    ] in rows
    assert ["04_d", "data.py", "(whole file)", "kept: differs here"] in rows
    assert not (course / "03_c/data.py").exists() and (course / "04_d/data.py").exists()
    assert (course / "03_c/tests/test_optim.py").read_text("utf-8").startswith("def test_sgd")
    assert definitions((course / "04_d/optim.py").read_text("utf-8")).keys() == {"sgd", "step"}


def test_work_in_progress_in_a_later_stage_stays_there(course):
    change(course / "03_c/model.py", ("    return GPT()", "    return GPT(3)"))
    change(course / "02_b/model.py", FIX)
    assert run("2") == 0
    assert (course / "03_c/model.py").read_text("utf-8") == edit(
        COURSE["03_c"]["model.py"], FIX, ("return GPT()", "return GPT(3)")
    )
    for stage in ("04_d", "05_e"):
        assert (course / stage / "model.py").read_text("utf-8") == edit(COURSE[stage]["model.py"], FIX), stage


def test_line_ends_blank_lines_and_modes_are_kept(course, capsys):
    (course / "05_e/model.py").chmod(0o755)
    mode = (course / "05_e/model.py").stat().st_mode  # Windows has fewer
    for stage in ("04_d", "05_e"):
        text = COURSE[stage]["model.py"].replace("class GPT", "\n\nclass GPT").rstrip("\n")
        (course / stage / "model.py").write_bytes(text.encode())
    git("commit", "-q", "-a", "-m", "other blank lines")
    change(course / "02_b/model.py", FIX, ("return GPT()", "return GPT(1)"))
    run("2")
    for stage in ("04_d", "05_e"):
        wanted = edit(COURSE[stage]["model.py"], FIX, ("return GPT()", "return GPT(1)"))
        wanted = wanted.replace("class GPT", "\n\nclass GPT").rstrip("\n")
        assert (course / stage / "model.py").read_bytes().decode() == wanted
    assert (course / "05_e/model.py").stat().st_mode == mode


def test_windows_line_ends_are_kept(course):
    git("config", "core.autocrlf", "true")
    for path in course.rglob("*.py"):
        path.unlink()
    git("checkout", "-q", ".")
    assert b"\r\n" in (course / "05_e/model.py").read_bytes()
    assert run("2") == 0, "line ends that git itself writes are no change"
    assert touched() == []
    change(course / "02_b/model.py", tuple(text.replace("\n", "\r\n") for text in FIX))
    assert run("2") == 0
    text = (course / "05_e/model.py").read_bytes()
    assert text.decode() == edit(COURSE["05_e"]["model.py"], FIX).replace("\n", "\r\n")


def test_nothing_to_carry_is_said(course, capsys):
    (course / "02_b/extras/more.py").write_text("A = 3\n", "utf-8")
    assert run("2") == 0
    assert capsys.readouterr().out == "nothing to carry: the trunk of 02_b and its tests are as committed\n"


def test_bad_input_is_one_line(course, tmp_path, monkeypatch):
    def refused(message: str, *words: str) -> None:
        with pytest.raises(BadInput, match=message) as error:
            run(*words)
        assert "\n" not in str(error.value)

    refused("name the one that was mended, as in `stages carry 3`")
    refused("choose from 01_a, 02_b", "9")
    refused("05_e is the last stage", "5")
    refused("no carry has stopped", "--continue")
    change(course / "02_b/model.py", FIX)
    (course / "03_c/model.py").write_text("def f(:\n", "utf-8")
    refused(r"03_c/model\.py is not valid Python", "2")
    git("rm", "-q", "--cached", "04_d/model.py")
    git("commit", "-q", "-m", "forgotten")
    refused(r"04_d/model\.py is not committed: commit it first", "2")
    (course / "02_b/model.py").write_text("<<<<<<< a\n", "utf-8")
    refused(r"02_b/model\.py line 1 has a conflict marker", "2")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("git is not installed", "2")


def test_without_a_repository_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("01_a", "02_b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").write_text('[tool.stages]\ntitle = ""\nmain = ""\n', "utf-8")
    (tmp_path / "pyproject.toml").write_text("[tool.uv.workspace]\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="needs a git repository"):
        run("1")


HINT = ("def attention(q, k):\n", "def attention(q, k):\n    # under way\n")


def test_work_in_progress_in_the_mended_definition_stays_there_too(course, capsys):
    """What was not committed in 03 before the fix came is not carried on from there, only the fix is."""
    change(course / "03_c/model.py", HINT, ("    return GPT()", "    return GPT(3)"))
    change(course / "02_b/model.py", FIX)
    assert run("2") == 0
    wanted = edit(COURSE["03_c"]["model.py"], FIX, HINT, ("return GPT()", "return GPT(3)"))
    assert (course / "03_c/model.py").read_text("utf-8") == wanted
    for stage in ("04_d", "05_e"):
        assert (course / stage / "model.py").read_text("utf-8") == edit(COURSE[stage]["model.py"], FIX), stage
    before = git("diff")
    assert run("2") == 0 and git("diff") == before, "carried twice, it changes nothing more"


def test_a_fix_that_was_made_by_hand_in_a_later_stage_goes_on_from_there(course, capsys):
    change(course / "03_c/model.py", FIX)
    change(course / "02_b/model.py", FIX)
    assert run("2") == 0
    assert [row[3] for row in table_rows(capsys.readouterr().out)] == ["already there", "carried", "carried"]
    assert (course / "05_e/model.py").read_text("utf-8") == edit(COURSE["05_e"]["model.py"], FIX)


def test_a_conflict_with_the_committed_text_that_was_settled_by_hand_goes_on_from_there(course, capsys):
    """03 has rewritten the lines that the fix changes; uncommitted, it already says what the fix says."""
    rewritten = ("    scores = scores * SCALE\n    return scores\n", "    return scores * SCALE\n")
    for stage in ("03_c", "04_d", "05_e"):
        change(course / stage / "model.py", rewritten)
    git("commit", "-q", "-a", "-m", "rewritten")
    change(course / "02_b/model.py", FIX)
    change(course / "03_c/model.py", (rewritten[1], FIX[1] + "    return scores\n"))
    assert run("2") == 0
    assert [row[3] for row in table_rows(capsys.readouterr().out)] == ["already there", "carried", "carried"]
    assert FIX[1] in (course / "05_e/model.py").read_text("utf-8")


def test_work_in_progress_stays_where_it_is_when_a_conflict_is_resolved(course, capsys):
    forward = "    def forward(self, x):\n"
    change(course / "03_c/model.py", HINT, (forward, forward + "        # under way\n"))
    stop(course)
    resolve(course)
    assert "# under way" in definitions((course / "03_c/model.py").read_text("utf-8"))["GPT.forward"].text
    assert run("--continue") == 0
    for stage in ("04_d", "05_e"):
        wanted = edit(
            COURSE[stage]["model.py"], FIX, ("self.block(x)\n        return x", "self.block(x)\n        return -x")
        )
        assert (course / stage / "model.py").read_text("utf-8") == wanted, stage
        if (course / stage / "data.py").exists():
            assert (course / stage / "data.py").read_text("utf-8") == "def load():\n    return 2\n"
