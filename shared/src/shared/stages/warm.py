"""The warm process: it has torch and pytest imported and becomes a check by a fork, not by seconds of `import torch`.

    stages check --practice                      the warm process
    run() ---- request, terminal, signals ---->  serve()   waits for connections, forks for each
          <--- exit code ----------------------    attend()  starts the check, passes signals on, sees it end
                                                     work()    the check: pytest in the place of the one who asked

The first check starts it, and it stays behind for the next ones. It listens on a unix socket in a folder that only this
user may read. It ends after 15 idle minutes, and when the course is gone or something that it has imported may have
changed. Where it cannot be had (Windows has no fork), or with STAGES_WARM=0, checks run without it.
"""

import gc
import hashlib
import importlib
import json
import mmap
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

import shared
from shared.stages import repo

# Nothing of `shared` that a check needs too: `shared.console` looks at the terminal when it is imported.
PRELOAD = ("torch", "torch.testing", "numpy.testing", "pytest", "rich.live", "rich.table")
# Seconds each, and not every check needs them: imported once a check has done so, for the next one.
LATER = (
    "torch.distributed.tensor",  # at the first assert_close
    "torch._dynamo",  # at the first optimiser
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
)
# What Python, torch and the rest read from the environment when they are imported, by the beginnings of the names.
AT_IMPORT = ("CUDA", "DYLD_", "HF_", "KMP_", "LANG", "LC_", "LD_", "MKL_", "MPL", "OMP_", "OPENBLAS", "PYTHON")
AT_IMPORT += ("PYTORCH", "TORCH", "TRANSFORMERS")
IDLE = 15 * 60.0  # seconds
TICK = 1.0  # seconds between two looks at whether it is still of use
PATIENCE = 60.0  # seconds until it has to have answered; the machine may be busy
HELLO, CODE = b"+", 2  # what it says to a connection; bytes of an exit code


def run(words: list[str], folder: Path, env: Mapping[str, str], stderr: BinaryIO | None, patience: float) -> int | None:
    """The exit code of pytest with the arguments `words` in `folder`, run by the warm process of its course.

    None where it did not come to an end there, whatever the reason: then it has to be run without. Ctrl-C reaches the
    check, which has `patience` seconds to end.
    """
    request = json.dumps({"words": words, "folder": str(folder), "env": dict(env)}).encode()
    link = reach(repo.root(folder))
    if link is None:
        return None
    with link:
        try:
            files = [sys.__stdin__, sys.__stdout__, stderr or sys.__stderr__]
            socket.send_fds(link, [len(request).to_bytes(4, "big")], [file.fileno() for file in files])
            link.sendall(request)
            return answer(link, patience)
        except (OSError, AttributeError, ValueError):  # the latter two: a standard stream is closed
            return None


def reach(top: Path) -> socket.socket | None:
    """A connection to the warm process of a course, which is started where there is none; None where it cannot be.

    As long as it is open the process does not end for being idle.
    """
    if os.environ.get("STAGES_WARM") == "0" or not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
        return None
    from shared.console import console  # not above: see PRELOAD

    try:
        with nullcontext() if address(top).exists() else console.status(shared.LOADING):
            return connect(top)
    except OSError:
        return None


def answer(link: socket.socket, patience: float) -> int | None:
    """What a check ends with; None when something killed it, which may be the fault of the fork."""
    try:
        code = link.recv(CODE)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGKILL):
            link.sendall(bytes([number]))
            link.settimeout(patience)
            with suppress(TimeoutError):
                link.recv(CODE)
                break
        raise
    found = int.from_bytes(code, "big", signed=True)
    return found if code and found >= 0 else None


def connect(top: Path) -> socket.socket:
    """As `reach`. Raises OSError."""
    place, started, deadline = str(address(top)), None, time.monotonic() + PATIENCE
    while True:
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(PATIENCE)
        try:
            link.connect(place)
            if link.recv(1) != HELLO:
                raise ConnectionResetError("the warm process has just ended")
            link.settimeout(None)
            return link
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
            started = started or start(top)
            if started.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        except BaseException:
            link.close()
            raise


def start(top: Path) -> subprocess.Popen:
    """Start the warm process of a course, in a session of its own: Ctrl-C and a closed terminal do not reach it."""
    words = [sys.executable, "-m", "shared.stages.warm", str(top)]
    nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(words, cwd=private_folder(), start_new_session=True, **nothing)


def address(top: Path, env: Mapping[str, str] = os.environ) -> Path:
    """The socket of a course's warm process: another one as soon as what it has imported may have changed.

    Raises OSError, also where the course is gone.
    """
    sources = sorted(Path(shared.__file__).parent.rglob("*.py"))
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})  # installing changes the folder
    known = [sys.executable, str(top), str((top / "pyproject.toml").stat().st_ino)]
    known += [f"{path} {os.stat(path).st_mtime_ns}" for path in (*sources, *packages)]
    known += sorted(f"{name}={value}" for name, value in env.items() if name.startswith(AT_IMPORT))
    return private_folder() / hashlib.sha256("\n".join(known).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def private_folder() -> Path:
    """A folder for sockets that only this user may enter. Raises OSError where it cannot be had."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base, f"stages-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise PermissionError(f"{folder} is open to others")
    return folder


def serve(top: Path, idle: float = IDLE, tick: float = TICK) -> None:
    """The warm process of the course in `top`, until it is no longer of use."""
    started_with = dict(os.environ)  # what is imported may add to it
    place = address(top)
    half = place.with_suffix(f".{os.getpid()}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(half))
        listener.listen()
        half.rename(place)  # whoever finds it can connect to it; the one that was here before finds itself replaced
        mine = place.stat().st_ino
        for name in PRELOAD:
            importlib.import_module(name)

        def useful() -> bool:
            try:
                return place.stat().st_ino == mine and address(top, started_with) == place
            except OSError:  # the course, the packages or the socket are gone
                return False

        listen(listener, useful, idle, tick)
        with suppress(OSError):
            if place.stat().st_ino == mine:
                place.unlink()


def listen(listener: socket.socket, useful: Callable[[], bool], idle: float, tick: float) -> None:
    """Fork for each connection, while `useful()` and not idle: an open connection is not idle."""
    used = mmap.mmap(-1, len(LATER))  # shared with the forks, which write 1 for what a check has imported
    forks, busy = set(), time.monotonic()
    while useful() and time.monotonic() < busy + idle:
        if select.select([listener], [], [], tick)[0]:
            link, _ = listener.accept()
            fork = os.fork()
            if not fork:
                listener.close()
                attend(link, used)
            link.close()
            forks.add(fork)
        forks = {fork for fork in forks if os.waitpid(fork, os.WNOHANG) == (0, 0)}
        busy = time.monotonic() if forks else busy
        for i, name in enumerate(LATER):
            if used[i] == 1:
                used[i] = 2
                importlib.import_module(name)


def attend(link: socket.socket, used: mmap.mmap) -> NoReturn:
    """One connection, in a fork of its own: start the check that it asks for, and answer with its exit code.

    What the client sends meanwhile are numbers of signals for the check; when the client is gone the check is ended.
    """
    code = 1
    try:
        link.sendall(HELLO)
        size, files, *_ = socket.recv_fds(link, 4, 3)
        if size:
            request = json.loads(link.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
            check = os.fork()
            if not check:
                work(request, files, used)
            os.setpgid(check, check)
            end = watched(check, link)
            link.sendall(os.waitstatus_to_exitcode(end).to_bytes(CODE, "big", signed=True))
        code = 0
    except OSError:  # the client is gone
        pass
    finally:
        os._exit(code)


def watched(check: int, link: socket.socket) -> int:
    """The wait status of the process `check`. Nothing that it started outlives it. Raises OSError without a client."""
    try:
        while True:
            ended, status = os.waitpid(check, os.WNOHANG)
            if ended:
                return status
            if select.select([link], [], [], 0.01)[0]:
                numbers = link.recv(16)
                if not numbers:
                    raise ConnectionResetError("the client is gone")
                for number in numbers:
                    os.killpg(check, number)
    finally:
        with suppress(ProcessLookupError, PermissionError):  # none of them is left
            os.killpg(check, signal.SIGKILL)


def work(request: dict, files: list[int], used: mmap.mmap) -> NoReturn:
    """The check: pytest where the client is, with its environment and its terminal."""
    code = 1
    try:
        with suppress(PermissionError):  # done already by `attend`
            os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(files[number], number)
            os.close(files[number])
            own = getattr(sys, name)  # its encoding is right, its buffering that of the file it was opened on
            new = open(number, own.mode, 1 if name == "stderr" else -1, own.encoding, own.errors, closefd=False)
            setattr(sys, name, new)
            setattr(sys, f"__{name}__", new)
        for name in os.environ.keys() - request["env"].keys():
            del os.environ[name]
        os.environ.update(request["env"])
        os.chdir(request["folder"])
        sys.path[0] = request["folder"]
        sys.argv = ["pytest", *request["words"]]
        gc.freeze()  # what is imported stays: a collection that walks through it would copy its memory
        import pytest

        code = int(pytest.main(request["words"]))
        for i, name in enumerate(LATER):
            used[i] = used[i] or name in sys.modules
    except BaseException:  # what would end a process of its own with this traceback
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
