"""Text to train on, by name.

    load()               Tiny Shakespeare, or python-docs where it cannot be had
    load("shakespeare")  Tiny Shakespeare, 1,115,394 characters (Karpathy, char-rnn)
    load("names")        32,033 first names, one a line (Karpathy, makemore)
    load("python-docs")  the documentation inside every CPython: needs no network
    load("my/text.txt")  any UTF-8 file

Shakespeare and the names are looked for in $STAGES_DATA, then in the user's cache folder, then downloaded into it. So
are the records that real models are tuned on, whose file `records` finds. Whatever the way, the bytes must have the
checksum below: a number measured on a text is worth nothing if the text differs.
"""

import hashlib
import http.client
import os
import socket
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from shared import python_docs
from shared.atomic import write
from shared.console import console, say
from shared.errors import BadInput

from rich.progress import Progress

TIMEOUT = 15  # seconds without a byte before a download is given up


@dataclass(frozen=True)
class Corpus:
    """A text and what to call it in a run's record."""

    name: str  # of a file the whole path
    text: str


@dataclass(frozen=True)
class Source:
    """A text that others publish: where, how many bytes, and their checksum."""

    file: str
    url: str
    size: int
    sha256: str


SOURCES = {
    "shakespeare": Source(
        file="tinyshakespeare.txt",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        size=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "names": Source(
        file="names.txt",
        url="https://raw.githubusercontent.com/karpathy/makemore/master/names.txt",
        size=228_145,
        sha256="0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
    ),
}
BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch"  # Raschka's examples (Apache-2.0)
RECORDS = {
    "instructions": Source(
        file="instructions.json",
        url=f"{BOOK}/b80e7804b30830a00eb55d2abc7ac25a07f36fdc/ch07/01_main-chapter-code/instruction-data.json",
        size=203_524,
        sha256="7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
    ),
    "preferences": Source(
        file="preferences.json",
        url=f"{BOOK}/2b7bd46a93311c1a77446ab1a83ff013ba3f6a70/ch07/04_preference-tuning-with-dpo"
        "/instruction-data-with-preference.json",
        size=386_968,
        sha256="305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
    ),
}


def load(name: str | None = None) -> Corpus:
    """The corpus called `name`, or read from the file `name`; newlines are left as they are.

    Without a name it is Tiny Shakespeare, and where that cannot be had, python-docs after two lines that say so.
    Raises BadInput for an unknown name, a name that is not UTF-8, a text that cannot be had, and a file that cannot be
    read, is empty or is not UTF-8.
    """
    if name is None:
        try:
            return load("shakespeare")
        except BadInput as error:
            say(f"corpus: python-docs, so no loss compares with those in the READMEs\n{error}")
            return load("python-docs")
    if name == "python-docs":
        return Corpus(name, python_docs.text())
    if name in SOURCES:
        return Corpus(name, published(SOURCES[name]).decode("utf-8"))
    if name.encode("utf-8", "replace").decode("utf-8") != name:
        raise BadInput(f"the corpus name {name!r} is not UTF-8: rename the file")  # no record could be written
    # `stages run` changes to the stage's folder and says where the path was typed. A run may be resumed from elsewhere.
    path = Path(os.path.abspath(os.path.join(os.environ.get("STAGES_FROM", "."), name)))
    return Corpus(str(path), read_text(path))


def records(name: str) -> Path:
    """The file of the published records "instructions" or "preferences", downloaded where need be. Raises BadInput."""
    source = RECORDS[name]
    published(source)
    for folder in (Path(os.environ.get("STAGES_DATA") or cache_folder()), cache_folder()):
        if (folder / source.file).is_file():
            return folder / source.file
    raise BadInput(f"{source.file} cannot be kept in {cache_folder()}: set STAGES_DATA to a folder that has it")


def read_text(path: Path) -> str:
    """The text of a file. Raises BadInput."""
    try:
        if path.is_dir():
            raise BadInput(f"{path} is a folder: name a UTF-8 text file in it")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        names = ", ".join(SOURCES)
        raise BadInput(f"no corpus or file {str(path)!r}: choose {names}, python-docs or a UTF-8 file") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start:,}): save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror}): check its permissions") from None
    if not text.strip():
        raise BadInput(f"{path} holds no text: choose another file")
    return text


def cache_folder() -> Path:
    """Where downloads are kept."""
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "stages"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stages"


def published(source: Source) -> bytes:
    """The bytes of a published text, checked: from $STAGES_DATA, the cache or the network. Raises BadInput."""
    if os.environ.get("STAGES_DATA"):
        file = Path(os.environ["STAGES_DATA"]) / source.file
        data = stored(file)
        if data is not None:
            if not right(data, source):
                raise BadInput(f"{file} is not the published text (wrong checksum): remove it to download it again")
            return data
    file = cache_folder() / source.file
    data = stored(file)
    if data is not None:
        if right(data, source):
            return data
        say(f"corpus: {file} is damaged (wrong checksum), downloading it again")
    data = download(source)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, data)
    except OSError as error:
        say(f"corpus: not kept in {file.parent} ({error.strerror}), the next run downloads it again")
    return data


def lacks(source: Source) -> str:
    """The half of a sentence that blames $STAGES_DATA where it is set: "is not in /data (STAGES_DATA) and "."""
    folder = os.environ.get("STAGES_DATA")
    return f"is not in {folder} (STAGES_DATA) and " if folder else ""


def stored(file: Path) -> bytes | None:
    """What `file` holds, None if there is none. Raises BadInput."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BadInput(f"cannot read {file} ({error.strerror}): check its permissions or remove it") from None


def right(data: bytes, source: Source) -> bool:
    """Are these the published bytes?"""
    return hashlib.sha256(data).hexdigest() == source.sha256


def reason(error: Exception) -> str:
    """Why a download failed, for a person."""
    cause = getattr(error, "reason", None) or error
    return "no network" if isinstance(cause, socket.gaierror) else str(cause)


def offline(source: Source) -> str:
    """Why the text cannot be downloaded now; "" where it can be."""
    try:
        urllib.request.urlopen(source.url, timeout=TIMEOUT / 3).close()
    except (OSError, http.client.HTTPException) as error:
        return reason(error)
    return ""


def download(source: Source) -> bytes:
    """Fetch a text into memory, under a progress bar, and check it. Raises BadInput."""
    remedy = f"try again, or put {source.file} into a folder and set STAGES_DATA to it"
    data = bytearray()
    try:
        with (
            urllib.request.urlopen(source.url, timeout=TIMEOUT) as answer,
            Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task(f"downloading {source.file}", total=source.size)
            while block := answer.read(2**15):
                data += block
                bar.update(task, completed=len(data))
                if len(data) > source.size:
                    break
    except (OSError, http.client.HTTPException) as error:
        cause = f"{source.file} {lacks(source)}cannot be downloaded ({reason(error)})"
        raise BadInput(f"{cause}: see uv run stages doctor") from None
    if len(data) < source.size:
        raise BadInput(f"{source.url} ended after {len(data):,} of {source.size:,} bytes: {remedy}")
    if not right(data, source):
        raise BadInput(f"{source.url} is not the text this course uses (wrong checksum): {remedy}")
    return bytes(data)
