"""Which definition uses which, read from a stage's text: the order to write them in, the checkpoints that concern one.

    def softmax(z): ...                       softmax          uses nothing
    class Bigram(Model):                      Bigram           its methods, and Model
        def probs(self, x):                   Bigram.probs     softmax, Bigram.logits, Bigram.__init__
            return softmax(self.logits(x))

A name is looked up as Python does it: in the same file, through imports, through `self`. What `model` is in
`model.probs(x)` the text does not say: there every method called `probs` counts.
"""

import ast
import functools
import io
import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shared.stages.definitions import FUNCTIONS, binds, parse, walk

Key = tuple[str, str]  # ("model.py", "GPT.forward"), ("tests/test_model.py", "test_mask")


@dataclass
class Module:
    """A file: its definitions, and what it imports from other files of the stage."""

    statements: dict[str, list[ast.AST]] = field(default_factory=lambda: defaultdict(list))  # by qualified name
    imports: dict[str, Key] = field(default_factory=dict)  # {"G": ("model.py", "GPT")}; a whole module: (file, "")


def read(text: str, files: dict[str, str]) -> Module:
    """The module with the source `text`; `files` are the stage's by what an import calls them. Raises SyntaxError."""
    module, tree = Module(), parse(text)
    for node, name, kind in walk(tree.body):
        for bound in [name] if kind in ("function", "method", "class") else binds(node):
            module.statements[bound].append(node)
    lines = list(io.StringIO(text, newline=""))  # most statements import nothing, and to walk through them takes time
    importing = (node for node in tree.body if "import" in "".join(lines[node.lineno - 1 : node.end_lineno]))
    for node in itertools.chain.from_iterable(map(ast.walk, importing)):
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            source, name = (alias.name, "") if isinstance(node, ast.Import) else (node.module, alias.name)
            if source in files:
                module.imports[alias.asname or alias.name] = files[source], name
    return module


def uses_of(folder: Path) -> "Uses":
    """`Uses` of a folder, made once for as long as no text in it changes."""
    return known(folder, tuple(path.read_text("utf-8-sig") for path in sources(folder)))


@functools.lru_cache(maxsize=2)
def known(folder: Path, texts: tuple[str, ...]) -> "Uses":
    """What `uses_of` has made of these texts."""
    return Uses(folder)


def sources(folder: Path) -> list[Path]:
    """The trunk and the tests."""
    return [*sorted(folder.glob("*.py")), *sorted(folder.glob("tests/*.py"))]


class Uses:
    """The trunk and the tests of the stage in `folder`: `uses[key]` are the definitions that `key` names."""

    def __init__(self, folder: Path):
        paths = sources(folder)
        files = {path.stem: path.relative_to(folder).as_posix() for path in paths}
        self.modules = {files[path.stem]: read(path.read_text("utf-8-sig"), files) for path in paths}
        self.methods = defaultdict(list)  # {"forward": [("model.py", "Block.forward"), ...]}
        for file, module in self.modules.items():
            for name in module.statements:
                if "." in name:
                    self.methods[name.rpartition(".")[2]].append((file, name))
        self.uses = {
            (file, name): list(dict.fromkeys(self.named(file, name)))
            for file, module in self.modules.items()
            for name in module.statements
        }

    def find(self, file: str, name: str) -> Key | None:
        """The definition that a bare name means in a file."""
        module = self.modules[file]
        if name in module.statements:
            return file, name
        source, there = module.imports.get(name, ("", ""))
        return (source, there) if there and there in self.modules[source].statements else None

    def method(self, file: str, scope: str, name: str) -> Key | None:
        """The method `name` of the class `scope`, which may be that of a class it is based on."""
        if f"{scope}.{name}" in self.modules[file].statements:
            return file, f"{scope}.{name}"
        for node in self.modules[file].statements[scope]:
            for base in getattr(node, "bases", []):
                known = self.find(file, ast.unparse(base))
                if known and known != (file, scope) and (found := self.method(*known, name)):
                    return found
        return None

    def named(self, file: str, name: str) -> Iterator[Key]:
        """What one definition names, in the order of its text; a class has its methods, a method needs `__init__`."""
        module, scope = self.modules[file], name.rpartition(".")[0]
        if scope and not name.endswith(".__init__") and (start := self.method(file, scope, "__init__")):
            yield start
        for node in list(module.statements[name]):
            if isinstance(node, ast.ClassDef):
                parts = [*node.bases, *node.decorator_list]
                yield from ((file, other) for other in module.statements if other.startswith(f"{name}."))
            else:
                parts = [node]
            for part in itertools.chain.from_iterable(map(ast.walk, parts)):
                if isinstance(part, ast.Name) and (found := self.find(file, part.id)):
                    yield found
                elif isinstance(part, ast.arg) and file.startswith("tests/") and (found := self.find(file, part.arg)):
                    yield found  # a fixture
                elif isinstance(part, ast.Attribute):
                    yield from self.attribute(file, scope, part)

    def attribute(self, file: str, scope: str, node: ast.Attribute) -> Iterable[Key]:
        """What `owner.name` may mean: through `self` a method of the class, through a module what the module has."""
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if owner in ("self", "cls") and scope:
            found = self.method(file, scope, node.attr)
            return [found] if found else []
        source, there = self.modules[file].imports.get(owner, ("", "."))
        if not there:
            return [(source, node.attr)] if node.attr in self.modules[source].statements else []
        return [] if node.attr.startswith("__") else self.methods[node.attr]  # `super().__init__()` is torch's

    def order(self, wanted: list[Key]) -> list[Key]:
        """`wanted` with what a definition uses before the definition itself; ties, and circles, as they stand."""
        done, placed = set(), []
        for first in wanted:
            stack = [(first, False)]
            while stack:
                key, used = stack.pop()
                if used:
                    placed.append(key)
                elif key not in done:
                    done.add(key)
                    stack += [(key, True), *((other, False) for other in reversed(self.uses.get(key, [])))]
        return [key for key in placed if key in set(wanted)]

    def steps(self, start: Key) -> dict[Key, int]:
        """How far it is from a definition to each one that it reaches: 1 for what it names itself.

        A helper in a test file and the way from a class to its methods cost nothing.
        """
        found, queue = {}, deque([(start, 0)])
        while queue:
            key, far = queue.popleft()
            if found.setdefault(key, far) < far or key not in self.uses:
                continue
            for other in self.uses[key]:
                near = other[0].startswith("tests/") or other[1].rpartition(".")[0] == key[1]
                if other not in found:
                    queue.appendleft((other, far)) if near else queue.append((other, far + 1))
        return found

    def tests(self) -> list[Key]:
        """The test functions, in order."""
        return [
            key
            for key in self.uses
            if key[0].startswith("tests/test_")
            and key[1].startswith("test_")
            and isinstance(self.modules[key[0]].statements[key[1]][0], FUNCTIONS)
        ]

    def concern(self, keys: list[Key]) -> list[Key]:
        """The tests that concern one of `keys`, the nearest first, those of one file together.

        They name it, or they stand in the test file of its file and get to it through what they name. Where there is
        no such test, every test that gets to it. Of two that are as near, the one that gets to less comes first: what
        it says when it fails is about little else.
        """
        steps = {test: self.steps(test) for test in self.tests()}
        far = {test: min((n for key, n in steps[test].items() if key in keys), default=None) for test in steps}
        far = {test: n for test, n in far.items() if n is not None}
        own = {f"tests/test_{file}" for file, _ in keys}
        near = {test: n for test, n in far.items() if test[0] in own or n <= 1}
        return together({test: (n, len(steps[test])) for test, n in (near or far).items()})

    def in_order(self, wanted: list[Key]) -> list[Key]:
        """All tests, in the order in which they can pass while `wanted` are written one after the other."""
        place = {key: i for i, key in enumerate(self.order(wanted))}
        need = {test: [place[key] for key in self.steps(test) if key in place] for test in self.tests()}
        return together({test: max(places, default=len(wanted)) for test, places in need.items()})


def together(ranks: dict[Key, int]) -> list[Key]:
    """Tests by rank, but file by file: what a file's tests share is made once."""
    best = {}
    for (file, _), rank in ranks.items():
        best[file] = min(rank, best.get(file, rank))
    return sorted(ranks, key=lambda test: (best[test[0]], test[0], ranks[test]))
