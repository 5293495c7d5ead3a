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


def settings(file: Path) -> dict:
    """What a pyproject.toml says. Raises BadInput where it is not TOML."""
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except ValueError as error:  # a typing error, or bytes that are not UTF-8
        raise BadInput(f"{file} is not valid TOML ({error}): mend it first") from None


def root(start: Path | None = None) -> Path:
    """The course's folder: the nearest one above `start` (default: here) that holds a uv workspace.

    Raises BadInput when there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        file = folder / "pyproject.toml"
        if file.is_file() and "workspace" in settings(file).get("tool", {}).get("uv", {}):
            return folder
    raise BadInput(f"{start} is not inside the course: change to its folder first")


def stages(top: Path | None = None) -> list[Stage]:
    """All stages, in order. Raises BadInput for a numbered folder that does not say what it is."""
    found = []
    for folder in sorted((top or root()).iterdir()):
        file = folder / "pyproject.toml"
        if re.fullmatch(r"\d\d_[a-z]+", folder.name) and file.is_file():
            about = settings(file).get("tool", {}).get("stages", {})
            if "title" not in about or "main" not in about:
                raise BadInput(f"{file} has no [tool.stages] with title and main: add them, or rename the folder")
            found.append(Stage(folder, about["title"], about["main"]))
    return found


def before(stage: Stage) -> Stage | None:
    """The stage before this one; None for the first."""
    earlier = [other for other in stages(stage.path.parent) if other.number < stage.number]
    return earlier[-1] if earlier else None


def find(name: str, top: Path | None = None) -> Stage:
    """The stage called `name`: its number ("6", "06") or its folder ("06_gpt"). Raises BadInput."""
    everything = stages(top)
    for stage in everything:
        if name.rstrip("/") == stage.name or (name.isdecimal() and int(name) == stage.number):
            return stage
    raise BadInput(f"no stage {name!r}: choose from {', '.join(s.name for s in everything)}")
