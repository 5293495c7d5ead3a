"""Names, imports and files: what every stage may be called, may use, and may leave in the repository."""

import ast
import os
import random
import re
import runpy
import subprocess
import sys
import threading
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

from shared.stages.repo import Stage, find, root, stages

import pytest

import isolated
from course import forget_git, make, run, write
from traps import copy

TOP = root(Path(__file__).parent)
STAGES = stages(TOP)
TWELVE = (
    "01_autograd 02_ngram 03_mlp 04_norm 05_transformer 06_gpt "
    "07_modern 08_inference 09_moe 10_sft 11_reward 12_rlhf"
).split()
each_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)

CORE = {"torch>=2.11", "numpy", "tiktoken", "rich", "stages-shared"}
FOLDERS = {"extras", "demos", "tests"}
TRACKED_BYTES = 400_000
# Written so that this file does not name them.
HOSTS = ["pypi" + ".org", "python" + "hosted.org", "download." + "pytorch.org"]
MACHINE_PATH = r"(?<![\w.])/(work|home|Users|root)/\w|\b[A-Z]:\\Users"


@cache
def packages() -> dict[str, list[str]]:
    """The distributions behind each importable top-level name."""
    return dict(metadata.packages_distributions())


def tracked() -> list[str]:
    """The files that git keeps, by path from the root."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set in git's hooks
    try:
        code, out, _ = run(["git", "ls-files", "-z"], cwd=TOP, env=env)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if code or not out:  # nothing: a copy of the course inside another repository
        pytest.skip("not a git checkout")
    return [name for name in out.split("\0") if name and (TOP / name).is_file()]


def modules(stage: Stage) -> list[Path]:
    """All Python files that a stage imports or runs, tests left out."""
    return [*stage.trunk(), *sorted(stage.path.glob("extras/**/*.py")), *sorted(stage.path.glob("demos/**/*.py"))]


def imports(file: Path) -> set[str]:
    """Names of the top-level packages that a file imports anywhere; "." for a relative import."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def normal(name: str) -> str:
    """A distribution's name without its bounds: "PyYAML>=6" -> "pyyaml"."""
    return re.match(r"[\w.-]+", name)[0].lower().replace("_", "-")


def declared(stage: Stage, tests: bool) -> set[str]:
    """What the stage's pyproject.toml allows it to import; its tests may use the dev group too."""
    about = tomllib.loads((stage.path / "pyproject.toml").read_text("utf-8"))
    listed = about["project"]["dependencies"] + (about["dependency-groups"]["dev"] if tests else [])
    wanted = {normal(name) for name in listed}
    owners = packages().items()
    return {"shared"} | {name for name, dists in owners if wanted & {normal(dist) for dist in dists}}


def foreign(stage: Stage) -> list[str]:
    """Imports that are neither Python's, nor the stage's own, nor declared."""
    own = {file.stem for file in stage.trunk()} | FOLDERS
    tests = sorted((stage.path / "tests").glob("**/*.py"))
    problems = []
    for file in [*modules(stage), *tests]:
        folders = {file.parent, stage.path / "tests"} if file in tests else {file.parent}
        beside = {other.stem for folder in folders for other in folder.glob("*.py")}
        known = set(sys.stdlib_module_names) | own | beside | declared(stage, file in tests)
        problems += [f"{file.relative_to(stage.path)} imports {name}" for name in sorted(imports(file) - known)]
        others = set(re.findall(r"\b[01]\d_[a-z]+\b", file.read_text("utf-8"))) & set(TWELVE) - {stage.name}
        problems += [f"{file.relative_to(stage.path)} names {other}" for other in sorted(others)]
    return problems


def clashes(stage: Stage) -> set[str]:
    """Modules of the stage that hide one of Python's or of an installed package."""
    taken = set(sys.stdlib_module_names) | set(packages()) | {"shared"}
    return taken & ({file.stem for file in stage.trunk()} | FOLDERS)


@each_stage
def test_module_names_hide_no_library(stage):
    assert not clashes(stage), "a module of this name exists already: one of the two is imported by mistake"


@each_stage
def test_imports_are_declared_and_no_stage_knows_another(stage):
    assert not foreign(stage), "\n".join(foreign(stage))


def import_files(files: list[str]) -> None:
    """Import files one after the other, in a process of its own, and say what that changed in the world."""
    import torch

    def world() -> dict:
        files = {path for path in Path().rglob("*") if "__pycache__" not in path.parts}
        return {
            "the files": files,
            "torch's random state": (torch.initial_seed(), bytes(torch.get_rng_state().tolist())),
            "Python's random state": random.getstate(),
            "torch's defaults": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()),
            "the threads": threading.active_count(),
            "the folder": os.getcwd(),
        }

    sys.path.insert(0, os.getcwd())
    for file in files:
        before = world()
        runpy.run_path(file, run_name="imported")
        after = world()
        for thing in before:
            if before[thing] != after[thing]:
                print(f"importing {file} changes {thing}")


def effects(stage: Stage, scratch: Path) -> str:
    """What importing the stage's modules prints or changes; "" when it does nothing."""
    output = scratch / "output.txt"
    there = copy(stage.path, scratch)
    names = [file.relative_to(stage.path).as_posix() for file in modules(stage)]
    code = isolated.call(import_files, there, output, names)
    told = output.read_text("utf-8", errors="replace")
    return told if code == 0 else f"exit code {code}\n{told}"


@each_stage
def test_importing_a_module_does_nothing(stage, tmp_path):
    assert effects(stage, tmp_path) == ""


@each_stage
def test_pyproject_is_the_same_in_every_stage(stage):
    def rest(stage: Stage) -> dict:
        about = tomllib.loads((stage.path / "pyproject.toml").read_text("utf-8"))
        listed = set(about["project"].pop("dependencies"))
        assert listed >= CORE, f"the environments stay alike: {CORE - listed} is missing"
        # Groups beside dev are a stage's own: what `uv run` installs only when asked.
        assert "pytest>=8" in about.pop("dependency-groups")["dev"], "`uv run pytest` would fail inside the stage"
        assert about["project"].pop("name") == stage.name.replace("_", "-")
        for key in ("title", "main", "rungs"):
            about["tool"]["stages"].pop(key, None)
        return about

    assert rest(stage) == rest(STAGES[0])
    assert (stage.path / stage.main).is_file()


def test_without_a_checkout_the_files_are_not_taken_for_none(tmp_path, monkeypatch):
    """In a copy inside another repository git lists nothing, and a test of nothing would pass."""
    forget_git(monkeypatch)
    subprocess.run(["git", "init", "-q", tmp_path], check=True, timeout=60)
    monkeypatch.setattr(sys.modules[__name__], "TOP", tmp_path)
    with pytest.raises(pytest.skip.Exception, match="not a git checkout"):
        tracked()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="git is not installed"):
        tracked()


def test_top_level_holds_exactly_what_the_design_names():
    found = {name.split("/")[0] for name in tracked() if not name.startswith(".")}
    fixed = {"pyproject.toml", "README.md", "shared", "tests"}
    assert found == fixed | set(TWELVE)
    assert [stage.name for stage in STAGES] == TWELVE


def test_no_committed_file_names_a_registry_or_a_machine():
    problems = []
    for name in tracked():
        text = (TOP / name).read_text("utf-8", errors="ignore")
        problems += [f"{name} names {host}" for host in HOSTS if host in text]
        problems += [f"{name} names the path {found[0]}" for found in re.finditer(MACHINE_PATH, text)]
    assert not problems, "\n".join(problems)


def test_committed_files_are_small_and_the_lock_is_not_among_them():
    names = tracked()
    large = [name for name in names if (TOP / name).stat().st_size > TRACKED_BYTES]
    assert not large, f"larger than {TRACKED_BYTES:,} bytes: {large}"
    forbidden = [name for name in names if re.search(r"(^|/)(uv\.lock|out|practice|\.stages|__pycache__)(/|$)", name)]
    assert not forbidden, "the torch build is the machine's choice, and what runs leave is not kept"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("model", "import math\nimport torch.nn as nn\nimport data\nfrom shared import corpus\n", []),
        ("model", "def f():\n    import absent\n", ["model.py imports absent"]),
        ("model", "from . import data\n", ["model.py imports ."]),
        ("model", "import matplotlib.pyplot\n", ["model.py imports matplotlib"]),  # installed but not declared
        ("model", "import pytest\n", ["model.py imports pytest"]),  # only for tests
        ("tests/test_model", "import pytest\nimport helper\n", ["tests/test_model.py imports helper"]),
        ("model", 'PATH = "../01_autograd"\n', ["model.py names 01_autograd"]),
        ("random", "", ["random hides"]),
        ("tokenizers", "", ["tokenizers hides"]),
        ("model", 'print("hello")\n', ["hello"]),
        ("model", "import torch\ntorch.manual_seed(3)\n", ["changes torch's random state"]),
        ("model", "import random\nrandom.random()\n", ["changes Python's random state"]),
        ("model", 'open("x", "w").close()\n', ["changes the files"]),
        ("model", "import torch\ntorch.set_default_dtype(torch.float64)\n", ["changes torch's defaults"]),
        ("demos/show", 'print("drawn")\n', ["drawn"]),
        ("demos/show", 'if __name__ == "__main__":\n    print("drawn")\n', []),
    ],
)
def test_what_is_noticed(name, text, expected, tmp_path):
    about = '[dependency-groups]\ndev = ["pytest>=8"]\n'
    make(tmp_path, {"02_ngram": {"data.py": "", f"{name}.py": text, "pyproject.toml": about}})
    file = tmp_path / "02_ngram" / "pyproject.toml"
    write(file.parent, {file.name: file.read_text("utf-8").replace("\n\n", '\ndependencies = ["torch"]\n\n', 1)})
    stage = find("2", tmp_path)
    (tmp_path / "scratch").mkdir()
    told = [*foreign(stage), *(f"{clash} hides" for clash in clashes(stage))]
    told += effects(stage, tmp_path / "scratch").splitlines() if not told else []
    assert len(told) == len(expected) and all(part in line for part, line in zip(expected, told, strict=True)), told
