"""One process at a time in a run's folder: two at once would mix their metrics.

The file `lock` there holds the id of the process. One that was killed leaves it behind, which does no harm: only a
process that lives counts.
"""

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path

from shared.errors import BadInput


def holder(folder: Path) -> int | None:
    """The id of the process, other than this one, that is at work in `folder`; None where there is none."""
    return owner(folder / "lock")


def owner(file: Path) -> int | None:
    """The id in a lock, if another process that lives has written it."""
    try:
        text = file.read_text("utf-8")
        if not text:  # just made, and the id comes next; or its process went down before that
            time.sleep(0.1)
            text = file.read_text("utf-8")
        pid = int(text)
    except (OSError, ValueError):
        return None
    return pid if pid != os.getpid() and alive(pid) else None


def hold(folder: Path) -> None:
    """Take the folder for this process. Raises BadInput while another one is at work there."""
    file, away, pid = folder / "lock", folder / f"lock.{os.getpid()}", None
    for _ in range(2):
        try:
            with file.open("x", encoding="utf-8") as new:  # of two processes at this line only one gets further
                new.write(str(os.getpid()))
            return
        except FileExistsError:
            pid = holder(folder)
        if pid is not None:
            break
        # The lock of a process that is gone, or our own. Another process may have put its own in that one's place by
        # now: so the lock is moved away first, and back if it has an owner.
        with suppress(FileNotFoundError):
            os.replace(file, away)
            if (pid := owner(away)) is not None:
                os.replace(away, file)
                break
            away.unlink()
    who = pid or "one that began with this one"
    remedy = f"wait for it, choose another name, or remove {file} if that process is no run"
    raise BadInput(f"the run {folder.name!r} is being made by another process ({who}): {remedy}")


def release(folder: Path) -> None:
    """Give up the folder; does nothing where it is not ours."""
    file = folder / "lock"
    if file.is_file() and file.read_text("utf-8") == str(os.getpid()):
        file.unlink()


def alive(pid: int) -> bool:
    """Is there a process of this id?"""
    if os.name == "nt":  # where os.kill(pid, 0) would send a Ctrl-C
        kernel, code = ctypes.windll.kernel32, ctypes.c_ulong()
        handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel.CloseHandle(handle)
        return bool(handle) and code.value == 259  # STILL_ACTIVE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
