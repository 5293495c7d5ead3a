"""What a README promises, held against what is there: sections, commands, options, test names, links, images."""

import re
import runpy
import shlex
import sys
from pathlib import Path

from shared.errors import BadInput
from shared.stages import cli, repo, run

import isolated
from changes import section

SECTIONS = ["Run it", "Checkpoints", "Measured", "Traps", "Exercises", "References"]  # after the idea and what changed
MORE = "More measurements"  # may stand before the references: tables that only a few readers want
PROGRAMS = {"git", "curl", "sh", "export", "powershell"}  # of the system: named, not checked
VALUED = {"--with", "--python", "-p", "--package", "--group", "--extra", "--env-file"}  # flags of `uv run` and a value
IMAGE_BYTES = 100_000


def prose(text: str) -> str:
    """The README without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def headings(text: str) -> list[str]:
    return re.findall(r"^## +(.+?) *$", prose(text), re.M)


def missing_sections(text: str, number: int) -> list[str]:
    """How the headings of stage `number` differ from the form that all stages share."""
    since = f"What changed since {number - 1:02}"
    expected = ["The idea", *([since] if number > 1 else []), *SECTIONS]
    found = [re.sub(rf"^({since})_[a-z]+$", r"\1", title) for title in headings(text)]
    if found[-2:-1] == [MORE]:
        found.pop(-2)
    problems = [] if found == expected else [f"sections are {found}, not {expected}"]
    if not re.match(r"# \S.*\n\n[A-Z*`](.|\n(?!\n))*?[.!:]", text):
        problems.append("it does not begin with a title and a sentence")
    return problems


def commands(text: str) -> list[list[list[str]]]:
    """The commands of each ```sh block as words, `&&` taken apart: [[["cd", "06_gpt"], ["uv", "run", "pytest"]]]."""
    blocks = []
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S):
        words = []
        for line in block.replace("\\\n", " ").splitlines():
            words.append([])
            for word in shlex.split(line, comments=True):
                if word in ("&&", "|", ";", "||"):
                    words.append([])
                else:
                    words[-1].append(word)
        blocks.append([command for command in words if command])
    return blocks


def run_script(script: str, words: list[str]) -> None:
    """A script in this process, as `python script words...` does it."""
    sys.argv = [script, *words]
    sys.path[0:0] = [str(Path(script).resolve().parent)]
    runpy.run_path(script, run_name="__main__")


class Reader:
    """Follows the commands of one README from folder to folder and collects what is wrong with them."""

    def __init__(self, readme: Path, top: Path):
        self.readme, self.top = readme, top
        self.problems: list[str] = []
        self.flags: dict[tuple[Path, str], set[str]] = {}  # (folder, script): the options it is said to take

    def follow(self) -> None:
        for block in commands(self.readme.read_text("utf-8")):
            self.here, cloned = self.readme.parent, False
            for words in block:
                while re.fullmatch(r"[A-Z_]+=.*", words[0]) and len(words) > 1:
                    words = words[1:]
                if words[0] == "cd":
                    self.change(words[1]) if not cloned else None
                elif words[:2] == ["uv", "run"]:
                    self.uv_run(words[2:])
                elif words[0] not in PROGRAMS | {"uv"}:
                    self.problems.append(f"`{shlex.join(words)}` is no command that a newcomer has")
                cloned = words[:2] == ["git", "clone"]

    def change(self, folder: str) -> None:
        """`cd`: from where the block stands, or from the root."""
        for start in (self.here, self.top):
            if (start / folder).is_dir():
                self.here = start / folder
                return
        self.problems.append(f"`cd {folder}`: no such folder")

    def uv_run(self, words: list[str]) -> None:
        while words and words[0].startswith("-"):
            words = words[2:] if words[0] in VALUED else words[1:]
        program, rest = (words[0], words[1:]) if words else ("", [])
        if program == "stages":
            self.stages(rest)
        elif program == "pytest":
            for word in rest:
                if "/" in word or word.endswith(".py"):
                    self.test(word)
        elif program in ("python", "torchrun"):
            at = next((i for i, word in enumerate(rest) if word.endswith(".py")), None)
            if at is None:
                self.problems.append(f"`uv run {shlex.join(words)}` names no script")
            else:
                self.script(self.here, rest[at], rest[at + 1 :])
        elif program != "tensorboard":
            self.problems.append(f"`uv run {program}`: no such program")

    def stages(self, words: list[str]) -> None:
        """A command of the learner's tool must parse, and the stages and scripts it names must be there."""
        if words[-1:] == ["--help"]:
            return
        try:
            args = cli.parser().parse_args(words)
            if args.func is run.command:
                stage = repo.find(args.stage, self.top)
                self.script(stage.path, *run.choose(stage, args.words))
            elif args.func is not cli.overview.show:
                for name in filter(lambda word: re.match(r"\d", word), words[1:]):
                    repo.find(name, self.top)
        except BadInput as error:
            self.problems.append(f"`uv run stages {shlex.join(words)}`: {error}")

    def script(self, folder: Path, script: str, words: list[str]) -> None:
        if not (folder / script).is_file():
            self.problems.append(f"{folder.name} has no script {script}")
            return
        flags = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        self.flags.setdefault((folder, script), set()).update(flags)

    def test(self, name: str) -> None:
        """A test's id, or the path of tests."""
        path, *names = name.split("[")[0].split("::")
        if not (self.here / path).exists():
            self.problems.append(f"there is no {path}")
        elif names and not re.search(rf"^ *def {names[-1]}\(", (self.here / path).read_text("utf-8"), re.M):
            self.problems.append(f"{path} has no test {names[-1]}")

    def ask_scripts(self, scratch: Path) -> None:
        """Each script's `--help` must name every option that the README gives it."""
        for (folder, script), flags in self.flags.items():
            if not flags:
                continue
            output = scratch / "help.txt"
            code = isolated.call(run_script, folder, output, script, ["--help"])
            told = output.read_text("utf-8", errors="replace")
            if code != 0:
                self.problems.append(f"{folder.name}/{script} --help ends with {code}: {told[-300:]}")
                continue
            known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", told))
            self.problems += [f"{folder.name}/{script} has no option {flag}" for flag in sorted(flags - known)]

    def tests_named(self) -> None:
        """The table of checkpoints names tests that exist."""
        self.here = self.readme.parent
        text = section(self.readme.read_text("utf-8"), "Checkpoints")
        ids = re.findall(r"tests/[\w/]+\.py(?:::\w+)+", text)
        bare = re.findall(r"`(test_\w+)`", text)
        for name in ids:
            self.test(name)
        written = "\n".join(file.read_text("utf-8") for file in self.here.glob("tests/**/test_*.py"))
        self.problems += [f"no test is called {name}" for name in bare if f"def {name}(" not in written]
        if not ids and not bare:
            self.problems.append("its Checkpoints name no test")

    def links(self) -> None:
        """Relative links and images lead somewhere that is committed; images are small."""
        text = re.sub(r"`[^`\n]+`|\$[^$\n]+\$", "x", prose(self.readme.read_text("utf-8")))  # x[i](t) is no link
        titles = re.findall(r"^#+ (.*)$", text, re.M)
        slugs = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
        for image, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)[^)]*\)", text):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            file = (self.readme.parent / path).resolve()
            if not path and anchor not in slugs:
                self.problems.append(f"no heading #{anchor}")
            elif not file.exists() or not file.is_relative_to(self.top) or "out" in file.relative_to(self.top).parts:
                self.problems.append(f"the link {target} leads nowhere that is committed")
            elif image and file.stat().st_size >= IMAGE_BYTES:
                self.problems.append(f"{path} has {file.stat().st_size:,} bytes: keep images under {IMAGE_BYTES:,}")
