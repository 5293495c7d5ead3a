"""The corpus that needs no network: the documentation inside every CPython, as plain ASCII."""

import ast
import hashlib
import re
import sys
import sysconfig
import unicodedata
from pathlib import Path

from shared.errors import BadInput

CHARACTERS = 1_200_000  # the text is cut here: about the size of Tiny Shakespeare
UNDOCUMENTED = {"this", "antigravity", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter"}  # no prose, or left out


def text() -> str:
    """pydoc's topics and the standard library's docstrings, cut to CHARACTERS.

    Sources are parsed, not imported, so the text depends on the Python that is installed and on nothing else.
    Documents come in the order of their names' checksums, which mixes topics and modules: the last tenth, on which
    a model is validated, resembles the rest. Raises BadInput where Python came without its sources.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    library = Path(sysconfig.get_path("stdlib"))
    documents = {f"topic {name}": topic for name, topic in topics.items()}
    for name in sys.stdlib_module_names - UNDOCUMENTED:
        for file in (library / f"{name}.py", *(library / name).rglob("*.py")):
            place = file.relative_to(library)
            if file.is_file() and not {"test", "tests"} & set(place.parts):
                documents[place.as_posix()] = file
    parts, length = [], 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        document = documents[name]
        parts.append(plain(docstrings(document) if isinstance(document, Path) else document))
        length += len(parts[-1])
        if length >= CHARACTERS:  # parsing is what takes time
            break
    if not length:
        raise BadInput(f"no documentation under {library}: choose another corpus")
    return "".join(parts)[:CHARACTERS]


def docstrings(file: Path) -> str:
    """The docstrings of a module and of its classes and functions, in the order of the source."""

    def visit(node):
        yield ast.get_docstring(node) or ""
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from visit(child)

    return "\n\n".join(found.strip() for found in visit(ast.parse(file.read_bytes())) if found)


def plain(text: str) -> str:
    """`text` in printable ASCII and newlines: quotes and dashes replaced, accents dropped, the rest left out."""
    text = text.expandtabs().translate(str.maketrans("‘’“”–—•", "''\"\"--*"))
    text = re.sub(r"[^\n -~]", "", unicodedata.normalize("NFKD", text))
    text = re.sub(r" +\n", "\n", text).strip()
    return f"{text}\n\n" if text else ""
