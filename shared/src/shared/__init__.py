"""Plumbing for the stages and the learner's tool: what no README explains.

Whatever is imported from here comes first in a script, so that while torch is imported, which takes seconds, a
terminal says so, and a Ctrl-C ends in one line as well.
"""

import os
import sys
from importlib.machinery import PathFinder

LOADING = "loading torch…"


def one_line(kind, error, trace) -> None:
    """An `excepthook` that says "stopped" for Ctrl-C, and keeps the traceback of everything else."""
    if issubclass(kind, KeyboardInterrupt) and not os.environ.get("STAGES_TRACEBACK"):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


class Loading:
    """The first of the finders that `import` asks for a module. It answers for torch alone, and announces it."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        """Where torch is, as the usual finder says; None, which is "ask the next finder", for any other module."""
        spec = PathFinder.find_spec(name, path) if name == "torch" else None
        if spec and spec.loader and sys.stderr is sys.__stderr__:  # else a live display or a test has taken it over
            load = spec.loader.exec_module

            def announced(module):
                print(LOADING, end="", file=sys.stderr, flush=True)
                try:
                    load(module)
                finally:
                    print(f"\r{' ' * len(LOADING)}\r", end="", file=sys.stderr, flush=True)

            spec.loader.exec_module = announced
        return spec


sys.excepthook = one_line
if sys.stderr and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
    sys.meta_path.insert(0, Loading)
