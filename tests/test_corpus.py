"""`shared.corpus`: the right bytes or one clear line; never half a file. All offline, against a server of our own."""

import contextlib
import hashlib
import http.client
import http.server
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace

from shared import corpus, python_docs
from shared.errors import BadInput

import pytest

TEXT = ("To be, or not to be: that is the question\r\n" * 4000).encode()  # 172 kB: several reads; newlines that matter


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` to everyone after `head` says how long it is; counts the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.length, self.status, self.stall, self.requests = TEXT, None, 200, None, 0

    def handle_error(self, request, client_address):
        pass  # the client hangs up early in some tests; it is the client that is tested

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/input.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests += 1
        self.send_response(server.status)
        self.send_header("Content-Length", str(len(server.body) if server.length is None else server.length))
        self.end_headers()
        self.wfile.write(server.body)
        self.wfile.flush()
        if server.stall:
            server.stall.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    if server.stall:
        server.stall.set()
    server.shutdown()
    thread.join(60)
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch, server):
    """An empty cache, no $STAGES_DATA, and `shakespeare` published by our server as TEXT. Returns the cached file."""
    monkeypatch.delenv("STAGES_DATA", raising=False)
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    source = replace(
        corpus.SOURCES["shakespeare"], url=server.url, size=len(TEXT), sha256=hashlib.sha256(TEXT).hexdigest()
    )
    monkeypatch.setitem(corpus.SOURCES, "shakespeare", source)
    return tmp_path / "cache" / "stages" / "tinyshakespeare.txt"


@pytest.fixture
def received(monkeypatch):
    """The sizes of the blocks that the client has read."""
    read, sizes = http.client.HTTPResponse.read, []

    def counted(self, amount=None):
        data = read(self, amount)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(http.client.HTTPResponse, "read", counted)
    return sizes


def files(folder):
    """Every file below `folder`, by name: nothing half written may be among them."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def refused(name, *words):
    """The message of the BadInput that `load(name)` raises; it is one line and holds `words`."""
    with pytest.raises(BadInput) as error:
        corpus.load(name)
    message = str(error.value)
    assert "\n" not in message and ": " in message, f"not one line 'cause: remedy': {message!r}"
    for word in words:
        assert word in message, f"{message!r} does not say {word!r}"
    return message


def test_a_download_is_kept_byte_for_byte_and_used_again(cache, server):
    text = corpus.load("shakespeare").text
    assert text.encode() == TEXT, "newlines were translated: byte counts and bits per byte no longer hold"
    assert cache.read_bytes() == TEXT and files(cache.parent.parent) == ["tinyshakespeare.txt"]
    assert corpus.load("shakespeare") == corpus.Corpus("shakespeare", text)
    assert server.requests == 1, "the second load downloaded the text again"


def test_stages_data_comes_before_the_cache_and_the_network(cache, server, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tinyshakespeare.txt").write_bytes(TEXT)
    monkeypatch.setenv("STAGES_DATA", str(tmp_path / "data"))
    assert corpus.load().text.encode() == TEXT
    assert server.requests == 0 and not cache.exists()
    (tmp_path / "data" / "tinyshakespeare.txt").unlink()
    assert corpus.load().text.encode() == TEXT
    assert server.requests == 1 and cache.exists(), "a $STAGES_DATA without the file must not end the search"


def test_the_published_texts_are_pinned():
    published = corpus.SOURCES | corpus.RECORDS
    sources = {name: (source.size, source.sha256[:8]) for name, source in published.items()}
    assert sources == {
        "shakespeare": (1_115_394, "86c4e6aa"), "names": (228_145, "0a30b555"),
        "instructions": (203_524, "7e09a9af"), "preferences": (386_968, "305315ab"),
    }  # fmt: skip
    assert all(source.url.startswith("https://") for source in published.values())


def test_wrong_checksum_of_a_download(cache, server):
    server.body = TEXT.replace(b"question", b"quaestio")
    refused("shakespeare", "wrong checksum", server.url, "STAGES_DATA")
    assert files(cache.parent.parent) == []


def test_a_download_that_is_too_long_is_cut_off(cache, server, received):
    server.body = TEXT * 20
    refused("shakespeare", "wrong checksum")
    assert len(TEXT) < sum(received) <= len(TEXT) + 2**15, "a server can send without end"
    assert files(cache.parent.parent) == []


def test_truncated_download(cache, server):
    server.body, server.length = TEXT[:100_000], len(TEXT)
    refused("shakespeare", "100,000 of 172,000 bytes")
    assert files(cache.parent.parent) == []


def test_a_stalled_download_is_given_up(cache, server, monkeypatch):
    monkeypatch.setattr(corpus, "TIMEOUT", 0.2)
    server.body, server.length, server.stall = TEXT[:1000], len(TEXT), threading.Event()
    refused("shakespeare", "timed out")
    assert files(cache.parent.parent) == []


def test_network_refused_and_page_not_found(cache, server, monkeypatch):
    server.status = 404
    refused("shakespeare", "Not Found", "uv run stages doctor")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/input.txt"  # nobody listens there once it is closed
    monkeypatch.setitem(corpus.SOURCES, "shakespeare", replace(corpus.SOURCES["shakespeare"], url=url))
    refused("shakespeare", "refused", "uv run stages doctor")
    assert files(cache.parent.parent) == []


def no_network(monkeypatch):
    """No name is found, as on a machine without a network."""

    def unknown(*args, **how):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)


def test_without_a_name_the_fallback_is_python_docs_and_two_short_lines_say_so(cache, capsys, monkeypatch):
    """Which text it is and what that means, then why and what to do: neither line wraps at 80 columns."""
    monkeypatch.setattr(python_docs, "CHARACTERS", 10_000)
    no_network(monkeypatch)
    fallback = corpus.load()
    assert fallback == corpus.load("python-docs")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "corpus: python-docs, so no loss compares with those in the READMEs", "what it is, what it means"
    assert second == "tinyshakespeare.txt cannot be downloaded (no network): see uv run stages doctor", "and why"


@pytest.mark.parametrize("folder", ["data", "nowhere"])
def test_a_stages_data_that_lacks_the_file_is_blamed_too(cache, server, tmp_path, monkeypatch, folder):
    """It was set for that text: "cannot be downloaded" alone sends the user to look at the network."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("STAGES_DATA", str(tmp_path / folder))
    server.status = 503
    blamed = f"tinyshakespeare.txt is not in {tmp_path / folder} (STAGES_DATA) and cannot be downloaded"
    refused("shakespeare", blamed)


def test_whether_a_text_can_be_downloaded_is_known_without_doing_it(cache, server, monkeypatch):
    """`offline` says why not, keeps nothing, and says nothing where the server answers."""
    assert corpus.offline(corpus.SOURCES["shakespeare"]) == "", "a server that answers is called unreachable"
    server.status = 404
    assert corpus.offline(corpus.SOURCES["shakespeare"]) == "Not Found", "a page that is not there can be downloaded"
    no_network(monkeypatch)
    assert corpus.offline(corpus.SOURCES["shakespeare"]) == "no network"
    assert not cache.exists(), "to ask is not to download"


def test_a_damaged_cached_file_is_replaced(cache, server, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(TEXT[:-1])
    assert corpus.load("shakespeare").text.encode() == TEXT
    assert cache.read_bytes() == TEXT and "damaged" in capsys.readouterr().out
    cache.write_bytes(TEXT[:-1])
    server.status = 500
    refused("shakespeare", "cannot be downloaded")


def test_a_damaged_file_in_stages_data_is_the_users_to_remove(cache, server, tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare.txt").write_bytes(TEXT[:-1])
    monkeypatch.setenv("STAGES_DATA", str(tmp_path))
    refused("shakespeare", "wrong checksum", str(tmp_path / "tinyshakespeare.txt"), "remove it")
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == TEXT[:-1] and server.requests == 0


def test_a_cache_that_cannot_be_written_costs_a_line_not_the_run(cache, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be", encoding="utf-8")
    assert corpus.load("shakespeare").text.encode() == TEXT
    assert "not kept" in capsys.readouterr().out


def test_a_full_disk_leaves_no_half_file(cache, monkeypatch, capsys):
    def full(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert corpus.load("shakespeare").text.encode() == TEXT
    assert files(cache.parent.parent) == [] and "No space left on device" in capsys.readouterr().out


def test_ctrl_c_in_mid_download_leaves_nothing(cache, received, monkeypatch):
    """Two blocks have arrived when the interrupt does."""
    read = http.client.HTTPResponse.read

    def interrupted(self, amount=None):
        if sum(received) >= 2 * 2**15:
            raise KeyboardInterrupt
        return read(self, amount)

    monkeypatch.setattr(http.client.HTTPResponse, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.load()  # by default too: an interrupt is no reason to fall back
    assert sum(received) >= 2 * 2**15 and files(cache.parent.parent) == []


def test_ctrl_c_while_the_text_is_kept_leaves_nothing(cache, monkeypatch):
    def interrupted(half, file):
        assert half.read_bytes() == TEXT, "renamed before it was whole"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.load("shakespeare")
    assert files(cache.parent.parent) == []


def test_unknown_names_and_files_that_cannot_be_used(tmp_path, monkeypatch):
    refused("shakespear", "shakespeare", "names", "python-docs", "UTF-8")
    refused(str(tmp_path / "missing.txt"), "missing.txt")
    refused(str(tmp_path), "is a folder")
    for content, words in [
        (b"", "holds no text"),
        (b" \n\n", "holds no text"),
        ("Ich heiße".encode("latin-1"), "not UTF-8 text (byte 7)"),
        ("text".encode("utf-16"), "not UTF-8 text (byte 0)"),
    ]:
        (tmp_path / "text.txt").write_bytes(content)
        refused(str(tmp_path / "text.txt"), words, "text.txt")


def test_a_name_that_is_not_utf8(tmp_path, monkeypatch):
    """Typed as such a byte, the name arrives as a surrogate, which no record and no terminal takes."""
    monkeypatch.chdir(tmp_path)
    refused("caf\udce9.txt", r"'caf\udce9.txt' is not UTF-8", "rename the file")
    with contextlib.suppress(OSError):  # not every system can have such a file
        (tmp_path / "caf\udce9.txt").write_text("text", encoding="utf-8")
    refused("caf\udce9.txt", r"'caf\udce9.txt' is not UTF-8")
    refused("\ud800", r"'\ud800' is not UTF-8")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("text", encoding="utf-8")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything, and Windows knows no such mode: refuse in their place

        def read_bytes(self):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.read_bytes", read_bytes)
    refused(str(path), "cannot read", "secret.txt", "ermission")


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "eigen.txt"
    path.write_bytes("Grüße,\r\nWelt\n".encode())
    assert corpus.load(str(path)) == corpus.Corpus(str(path), "Grüße,\r\nWelt\n")


def test_the_name_in_a_record_finds_the_file_again_from_any_folder(tmp_path, monkeypatch):
    """A relative path is recorded whole: `--resume` may be typed in another folder, which has a file of that name."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my.txt").write_text(f"text of {folder}", encoding="utf-8")
    monkeypatch.setenv("STAGES_FROM", str(tmp_path / "here"))
    found = [corpus.load("my.txt"), corpus.load("../there/my.txt")]
    monkeypatch.setenv("STAGES_FROM", str(tmp_path / "there"))
    monkeypatch.chdir(tmp_path / "there")
    assert [corpus.load(one.name) for one in found] == found, "a run that is resumed elsewhere reads another text"
    assert [one.text for one in found] == ["text of here", "text of there"]


def test_published_records_are_a_file_that_was_checked(cache, server, tmp_path, monkeypatch):
    """From $STAGES_DATA, else from the cache, where they are downloaded to once; and never another file."""
    source = replace(corpus.SOURCES["shakespeare"], file="preferences.json")
    monkeypatch.setitem(corpus.RECORDS, "preferences", source)
    file = cache.with_name("preferences.json")
    assert corpus.records("preferences") == file and file.read_bytes() == TEXT
    monkeypatch.setenv("STAGES_DATA", str(tmp_path / "data"))
    assert corpus.records("preferences") == file and server.requests == 1, "the second time it is downloaded again"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "preferences.json").write_bytes(TEXT)
    assert corpus.records("preferences") == tmp_path / "data" / "preferences.json"
    (tmp_path / "data" / "preferences.json").write_bytes(TEXT[1:])
    with pytest.raises(BadInput, match="wrong checksum"):
        corpus.records("preferences")


def test_records_that_cannot_be_kept_are_refused(cache, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be", encoding="utf-8")
    source = replace(corpus.SOURCES["shakespeare"], file="instructions.json")
    monkeypatch.setitem(corpus.RECORDS, "instructions", source)
    with pytest.raises(BadInput, match="instructions.json cannot be kept in .*: set STAGES_DATA to a folder"):
        corpus.records("instructions")


def test_python_docs_is_large_plain_and_the_same_whatever_was_imported():
    text = corpus.load("python-docs").text
    assert len(text) == python_docs.CHARACTERS
    assert set(text) <= {"\n", *map(chr, range(32, 127))}, "a character outside printable ASCII"
    from pydoc_data.topics import topics

    held = [name for name, topic in topics.items() if python_docs.plain(topic) in text]
    assert len(held) > len(topics) / 3, "pydoc's topics are missing"
    assert "BadInput" not in text, "only the standard library belongs here"
    code = (
        "import hashlib, json, xml.dom.minidom, asyncio; json.__doc__ = 'changed'; from shared import python_docs;"
        "print(hashlib.sha256(python_docs.text().encode()).hexdigest())"
    )
    found = subprocess.run(
        [sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    ).stdout.strip()
    assert found == hashlib.sha256(text.encode()).hexdigest(), "the text depends on import state or hash order"


def test_python_docs_of_a_small_library(tmp_path, monkeypatch):
    library = tmp_path / "tests" / "lib"  # where Python lies says nothing about its modules
    for file in ("json/decoder.py", "json/tests/test_x.py", "textwrap.py", "mine.py", "this.py"):
        (library / file).parent.mkdir(parents=True, exist_ok=True)
        (library / file).write_text(f'"""Doc of {file}."""\n', encoding="utf-8")
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # left out by some distributions
    assert sorted(python_docs.text().split("\n\n")) == ["", "Doc of json/decoder.py.", "Doc of textwrap.py."]
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    refused("python-docs", "no documentation", "another corpus")


def test_plain_text_and_docstrings_by_hand(tmp_path):
    assert python_docs.plain("“Café” – it’s\t• x  \nnaïve → end\n\n") == '"Cafe" - it\'s   * x\nnaive  end\n\n'
    assert python_docs.plain("→\n") == ""
    module = tmp_path / "module.py"
    module.write_text(
        '"""Module."""\n\ndef f():\n    """F.\n\n      indented\n    back\n    """\n\nclass C:\n    """C."""\n\n'
        '    async def m(self):\n        """M."""\n\ndef g():\n    "no doc" + "string"\n',
        encoding="utf-8",
    )
    assert python_docs.docstrings(module) == "Module.\n\nF.\n\n  indented\nback\n\nC.\n\nM."
