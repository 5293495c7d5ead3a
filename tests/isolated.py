"""Processes of their own that start with torch imported: each costs a fork, not the seconds of `import torch`.

Where there is no fork (Windows) they are ordinary new processes.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

PRELOAD = ["torch", "pytest", "numpy", "matplotlib.pyplot", "rich.console", "shared.device", "shared.runlog"]


def context():
    """One server process for this process: it imports PRELOAD once and forks itself for each call."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOAD)
    return forks


def call(function: Callable, folder: Path, output: Path, *args, timeout: float = 60) -> int | None:
    """Call `function(*args)` in `folder`, what it prints going to the file `output`: its exit code, None if it hangs.

    The function must be one of a module in this folder.
    """
    process = context().Process(target=enter, args=(function, folder, output, args))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def enter(function: Callable, folder: Path, output: Path, args: tuple) -> None:
    """The first thing that the new process does."""
    import torch

    os.chdir(folder)
    sys.stdout.flush()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(function(*args))


def run_pytest(words: list[str], report: Path) -> int:
    """pytest in this process, its events written to `report` by shared.stages.report."""
    import pytest

    # A stage's tests need no plugin, and importing what happens to be installed costs more than the fork. The user's
    # own options may be those of a plugin that is then missing.
    os.environ |= {"STAGES_REPORT": str(report), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    return pytest.main(["-q", "-p", "shared.stages.report", "-p", "no:cacheprovider", *words])


def run_script(script: str, words: list[str]) -> None:
    """A script in this process, as `python script words...` does it."""
    sys.argv = [script, *words]
    sys.path[0:0] = [str(Path(script).resolve().parent)]
    runpy.run_path(script, run_name="__main__")
