"""Every README: its sections, and that what it tells a reader to type, open or look at is there."""

from pathlib import Path

from shared.stages.repo import root, stages

import pytest

from course import make, write
from readmes import Reader, missing_sections

TOP = root(Path(__file__).parent)
STAGES = stages(TOP)
READMES = [TOP / "README.md", *(stage.path / "README.md" for stage in STAGES)]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_has_every_section_in_order(stage):
    problems = missing_sections((stage.path / "README.md").read_text("utf-8"), stage.number)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("readme", READMES, ids=lambda file: file.relative_to(TOP).as_posix())
def test_commands_options_tests_links_and_images_are_there(readme, tmp_path):
    reader = Reader(readme, TOP)
    reader.follow()
    reader.ask_scripts(tmp_path)
    reader.links()
    if readme.parent != TOP:
        reader.tests_named()
    assert not reader.problems, "\n".join(reader.problems)


SCRIPT = """\
import argparse
import model
parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
parser.add_argument("-q", "--quiet", action="store_true")
parser.parse_args()
"""
README = """\
# 02 Second

Learns a thing.

## The idea
An image ![of it](figure.png), [a link](../01_first/model.py), [another](https://example.org/x), [one](#run-it).
$h[i](t)$, `a[0](b)`.
## What changed since 01
## Run it
```sh
uv run stages run 02 --steps 3   # a comment
uv run stages run 1 train -q
uv run stages check 2 && uv run stages
cd 02_second && uv run pytest tests/test_a.py::test_a -q
```
```sh
uv run python train.py --steps=3 \\
    --quiet
OMP_NUM_THREADS=1 uv run torchrun --nproc-per-node 2 train.py
```
```
not a command
## not a heading
```
## Checkpoints
| it holds | `tests/test_a.py::test_a` and `test_a` |
## Measured
## Traps
## Exercises
## References
"""


def reader(tmp_path: Path, text: str) -> Reader:
    stage = {"train.py": SCRIPT, "model.py": "", "tests/test_a.py": "def test_a():\n    pass\n"}
    make(tmp_path, {"01_first": dict(stage), "02_second": dict(stage)})
    (tmp_path / "02_second" / "figure.png").write_bytes(b"x" * 1000)
    (tmp_path / "02_second" / "big.png").write_bytes(b"x" * 100_000)
    write(tmp_path / "02_second", {"README.md": text, "out/figure.png": ""})
    return Reader(tmp_path / "02_second" / "README.md", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", ""),
        ("run 02 --steps", "run 02 --stepz", "02_second/train.py has no option --stepz"),
        ("run 1 train -q", "run 1 train -v", "01_first/train.py has no option -v"),
        ("run 1 train", "run 1 trane", "no script 'trane'"),
        ("run 02 --steps", "run 12 --steps", "no stage '12'"),
        ("stages check 2", "stages check 7", "no stage '7'"),
        ("stages check 2", "stages chekc 2", "invalid choice: 'chekc'"),
        ("stages check 2", "stages check 2 --fast", "unrecognized arguments: --fast"),
        ("cd 02_second", "cd 03_third", "no such folder"),
        ("test_a.py::test_a -q", "test_a.py::test_b -q", "tests/test_a.py has no test test_b"),
        ("tests/test_a.py::test_a -q", "tests/test_b.py -q", "there is no tests/test_b.py"),
        ("python train.py", "python demos/train.py", "02_second has no script demos/train.py"),
        ("    --quiet", "    --silent", "has no option --silent"),
        ("2 train.py", "2 train", "names no script"),
        ("uv run stages check", "make check", "`make check 2` is no command that a newcomer has"),
        ("uv run torchrun", "uv run frobnicate", "`uv run frobnicate`: no such program"),
        ("uv run pytest", "uv run --isolated --with rich pytest", ""),
        ("uv run pytest tests/test_a.py", "uv run --isolated pytest tests/test_b.py", "there is no tests/test_b.py"),
        ("uv run torchrun", "uv run --isolated # torchrun", "`uv run `: no such program"),
        ("torchrun --nproc-per-node 2 train.py", "python -m train", "names no script"),
        ("`tests/test_a.py::test_a`", "`tests/test_a.py::test_c`", "tests/test_a.py has no test test_c"),
        ("`test_a`", "`test_c`", "no test is called test_c"),
        ("`tests/test_a.py::test_a` and `test_a`", "it", "its Checkpoints name no test"),
        ("figure.png", "absent.png", "the link absent.png leads nowhere"),
        ("figure.png", "out/figure.png", "leads nowhere that is committed"),
        ("figure.png", "big.png", "big.png has 100,000 bytes"),
        ("../01_first", "../../01_first", "leads nowhere"),
        ("#run-it", "#walk-it", "no heading #walk-it"),
    ],
)
def test_a_wrong_promise_is_noticed(old, new, problem, tmp_path):
    found = reader(tmp_path, README.replace(old, new, 1) if old else README)
    found.follow()
    found.ask_scripts(tmp_path)
    found.tests_named()
    found.links()
    assert len(found.problems) == (1 if problem else 0) and problem in "".join(found.problems), found.problems


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("## Traps\n", ""),
        ("## Traps\n## Exercises\n", "## Exercises\n## Traps\n"),
        ("## Traps\n", "## More measurements\n## Traps\n"),
        ("## References\n", "## References\n## More measurements\n"),
        ("since 01", "since 02"),
        ("since 01", "since then"),
        ("## Measured", "## Results"),
        ("Learns a thing.\n", ""),
        ("# 02", "## 02"),
    ],
)
def test_a_missing_or_misplaced_section_is_noticed(old, new):
    assert not missing_sections(README, 2)
    assert missing_sections(README.replace(old, new, 1), 2)
    assert not missing_sections(README.replace("since 01", "since 01_first"), 2)
    assert not missing_sections(README.replace("## References\n", "## More measurements\n## References\n"), 2)
    first = README.replace("## What changed since 01\n", "")
    assert not missing_sections(first, 1) and missing_sections(first, 2)
