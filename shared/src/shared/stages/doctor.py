"""`stages doctor`: what this machine has for the course, and the remedy for what it lacks."""

import argparse
import os
import shutil
import subprocess
import sys
import timeit
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared import corpus
from shared.console import console
from shared.errors import BadInput
from shared.stages import repo

from packaging.requirements import Requirement
from rich.text import Text

FREE = 2 * 10**9  # bytes: checkpoints, token files, figures of all stages
TEXTS = corpus.SOURCES | corpus.RECORDS


@dataclass(frozen=True)
class Finding:
    """One line of the report. Something missing has a remedy; `required` says that the course cannot do without."""

    ok: bool
    detail: str
    remedy: str = ""
    required: bool = False


def uv() -> Finding:
    program = os.environ.get("UV") or shutil.which("uv")  # `uv run` sets UV
    if not program:
        return Finding(False, "not on the PATH", "see docs.astral.sh/uv, Installing uv")
    return Finding(True, subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip())


def torch_version() -> Finding:
    """Within the bounds of the root pyproject.toml."""
    import torch

    settings = tomllib.loads((repo.root() / "pyproject.toml").read_text("utf-8"))["tool"]["uv"]
    bounds = next(r for r in map(Requirement, settings["constraint-dependencies"]) if r.name == "torch").specifier
    ok = bounds.contains(torch.__version__, prereleases=True)
    return Finding(ok, torch.__version__, f"the course needs torch {bounds}: uv sync --all-packages", required=True)


def threads() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.get_num_threads()
    detail = f"{count} threads on {cores} cores"
    return Finding(count <= cores, detail, f"more threads than cores slow training down: set OMP_NUM_THREADS={cores}")


def accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding(True, f"CUDA, {torch.cuda.get_device_name(0)}")
    if torch.backends.mps.is_available():
        return Finding(True, "Metal, used when asked for with --device mps")
    if shutil.which("nvidia-smi"):
        return Finding(False, f"torch {torch.__version__} cannot use the NVIDIA GPU", "install a CUDA build of torch")
    return Finding(True, "none: the CPU does everything")


def bfloat16() -> Finding:
    """Whether bfloat16 pays on this CPU is measured, not looked up."""
    import torch

    def seconds(kind: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=kind)
        return min(timeit.repeat(lambda: matrix @ matrix, number=1))

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    verdict = "" if ratio > 1 else ": float32 is the faster choice here"
    return Finding(True, f"a matrix product takes {1 / ratio:.2f} of its time in float32{verdict}")


def disk() -> Finding:
    free = shutil.disk_usage(repo.root()).free
    remedy = f"make room: {FREE / 1e9:.0f} GB are enough"
    # Rounded down: 1.99 GB shown as 2 would be called too little for 2.
    return Finding(free >= FREE, f"{free // 10**8 / 10:.1f} GB free", remedy, required=True)


def dot() -> Finding:
    program = shutil.which("dot")
    remedy = "install graphviz (apt install graphviz, brew install graphviz); without it graphs stay DOT text"
    return Finding(program is not None, program or "not on the PATH", remedy)


def text(name: str) -> Finding:
    """Where a published text is, or whether it can be downloaded, without doing it."""
    source = TEXTS[name]
    given = os.environ.get("STAGES_DATA")
    for where, folder in (("STAGES_DATA", given), ("cache", corpus.cache_folder())):
        if folder and (file := Path(folder) / source.file).exists():
            try:
                whole = corpus.right(corpus.stored(file), source)
            except BadInput as error:
                return Finding(False, where, str(error))
            return Finding(whole, f"in {where}" if whole else f"{file}: wrong checksum", "delete the file")
    if reason := corpus.offline(source):
        remedy = f"get {source.url} elsewhere, call it {source.file}, and set STAGES_DATA to its folder"
        return Finding(False, f"{corpus.lacks(source)}cannot be downloaded ({reason})", remedy)
    return Finding(True, f"{corpus.lacks(source)}will be downloaded when first used ({source.size / 1e6:.1f} MB)")


def backward() -> Finding:
    """loss = (w·x)², so dloss/dw = 2(w·x)x: by hand, w·x = -2 and the gradient is (-4, -8, -12)."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    w = torch.tensor([1.0, 0.0, -1.0], device=device, requires_grad=True)
    loss = (w @ torch.tensor([1.0, 2.0, 3.0], device=device)) ** 2
    loss.backward()
    ok = loss.item() == 4 and w.grad.tolist() == [-4, -8, -12]
    detail = f"loss {loss.item():g}, gradient {w.grad.tolist()} on {device}"
    return Finding(ok, detail, "by hand it is 4 and [-4, -8, -12]: install torch again", required=True)


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": lambda: Finding(True, sys.version.split()[0]),  # an older one than 3.11 could not be here
    "uv": uv,
    "torch": torch_version,
    "threads": threads,
    "GPU": accelerator,
    "bfloat16": bfloat16,
    "disk": disk,
    "graphviz": dot,
    **{f"text: {name}": lambda name=name: text(name) for name in TEXTS},
    "text: python-docs": lambda: Finding(True, "inside Python"),
    "backward": backward,
}


def examine(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding; a check that breaks down is a finding too (a torch that cannot be imported, say)."""
    try:
        return check()
    except BadInput as error:
        cause, _, remedy = str(error).partition(": ")
        return Finding(False, cause, remedy, required=True)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(False, reason, "uv sync --all-packages --reinstall", required=True)


def command(args: argparse.Namespace) -> int:
    """One line for each check; 1 when something required is missing."""
    code = 0
    with console.status("") as status:
        for name, check in CHECKS.items():
            status.update(f"looking at {name}")  # the first `import torch` takes seconds
            found = examine(name, check)
            mark = ("ok     ", "green") if found.ok else ("missing", "red")
            told = found.detail if found.ok else f"{found.detail}: {found.remedy}"
            console.print(Text.assemble(mark, f"  {name:<20}{told}"), soft_wrap=True)
            if found.required and not found.ok:
                code = 1
    return code


def add(subparsers) -> None:
    parser = subparsers.add_parser("doctor", help="check this machine: Python, torch, cores, GPU, disk, texts")
    parser.set_defaults(func=command)
