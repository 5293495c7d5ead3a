"""Processes of their own that start with torch imported: each costs a fork, not the seconds of `import torch`.

Where there is no fork (Windows) they are ordinary new processes.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

# An exit code can be read once, and whoever starts a process also reads those of the others that have ended.
READING = threading.Lock()
PRELOAD = ["torch", "pytest", "numpy", "matplotlib.pyplot", "rich.console", "shared.device", "shared.runlog"]
PRELOAD += ["torch.distributed.tensor", "torch._dynamo"]  # half a second each, at the first assert_close and optimiser
PRELOAD += ["transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3"]


def context():
    """One server process for this process: it imports PRELOAD once and forks itself for each call."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOAD)
    return forks


def call(function: Callable, folder: Path, output: Path, *args, timeout: float = 60) -> int | None:
    """Call `function(*args)` in `folder`, what it prints going to the file `output`: its exit code, None if it hangs.

    The function must be one of a module in this folder. Nothing that it started outlives it.
    """
    process = context().Process(target=enter, args=(function, folder, output, args))
    with READING:
        process.start()
    try:
        return ended(process, timeout)
    finally:
        kill(process)
        ended(process)


def ended(process: multiprocessing.Process, timeout: float | None = None) -> int | None:
    """The exit code of a process, which has `timeout` seconds to end; None if it goes on."""
    wait([process.sentinel], timeout)
    with READING:
        return process.exitcode


def kill(process: multiprocessing.Process) -> None:
    """End a process and all that it started."""
    process.kill()
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):  # none of them is left
            os.killpg(process.pid, signal.SIGKILL)


def enter(function: Callable, folder: Path, output: Path, args: tuple) -> None:
    """The first thing that the new process does."""
    import torch

    gc.freeze()  # what was imported before the fork stays: a collection that walks through it would copy its memory

    if os.name == "posix":
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    os.chdir(folder)
    sys.stdout.flush()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(function(*args))
