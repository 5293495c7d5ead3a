"""Where the stages are and what each says of itself in its pyproject.toml."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from shared.errors import BadInput


@dataclass(frozen=True)
class Stage:
    """One numbered folder."""

    path: Path
    title: str  # what the overview table shows
    main: str  # the script that `stages run N` starts

    @property
    def name(self) -> str:
        return self.path.name  # "06_gpt"

    @property
    def number(self) -> int:
        return int(self.path.name[:2])

    def trunk(self) -> list[Path]:
        """The top-level modules: what is carried forward, diffed and practised."""
        return sorted(self.path.glob("*.py"))


def root(start: Path | None = None) -> Path:
    """The course's folder: the nearest one above `start` (default: here) that holds a uv workspace.

    Raises BadInput when there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        file = folder / "pyproject.toml"
        if file.is_file() and "workspace" in tomllib.loads(file.read_text("utf-8")).get("tool", {}).get("uv", {}):
            return folder
    raise BadInput(f"{start} is not inside the course: change to its folder first")


def stages(top: Path | None = None) -> list[Stage]:
    """All stages, in order."""
    found = []
    for folder in sorted((top or root()).iterdir()):
        if re.fullmatch(r"\d\d_[a-z]+", folder.name) and (folder / "pyproject.toml").is_file():
            about = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["tool"]["stages"]
            found.append(Stage(folder, about["title"], about["main"]))
    return found


def find(name: str, top: Path | None = None) -> Stage:
    """The stage called `name`: its number ("6", "06") or its folder ("06_gpt"). Raises BadInput."""
    everything = stages(top)
    for stage in everything:
        if name.rstrip("/") == stage.name or (name.isdigit() and int(name) == stage.number):
            return stage
    raise BadInput(f"no stage {name!r}: choose from {', '.join(s.name for s in everything)}")
