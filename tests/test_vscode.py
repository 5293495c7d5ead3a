"""VS Code's files: they can be read, and every stage is a folder of the workspace, with an environment and tests."""

import json
import re
from pathlib import Path

from shared.stages.repo import root, stages

import pytest

TOP = root(Path(__file__).parent)
FILES = [TOP / ".course.code-workspace", *sorted((TOP / ".vscode").glob("*.json"))]


def read(file: Path) -> dict:
    """JSON with comments, as VS Code reads it; here a comment has a line of its own."""
    return json.loads(re.sub(r"(?m)^\s*//.*$", "", file.read_text("utf-8")))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_json_with_comments(file):
    assert read(file)


def test_every_stage_is_a_folder_of_the_workspace():
    """A stage alone can collect its tests: stages hold modules and tests of the same names."""
    workspace, course = read(TOP / ".course.code-workspace"), read(TOP / ".vscode" / "settings.json")
    assert [folder["path"] for folder in workspace["folders"]] == [*(stage.name for stage in stages(TOP)), "."]
    pytests = workspace["settings"]["python.testing.pytestEnabled"], course["python.testing.pytestEnabled"]
    assert pytests == (True, False), "the whole course as one pytest cannot collect the stages"
    here = "python.defaultInterpreterPath"
    assert (workspace["settings"][here], course[here]) == ("${workspaceFolder}/../.venv", "${workspaceFolder}/.venv")
