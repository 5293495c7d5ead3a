"""Plumbing for the stages and the learner's tool: what no README explains.

Whatever is imported from here comes first in a script, so that a Ctrl-C while torch is imported, which takes seconds,
ends in one line as well.
"""

import os
import sys


def one_line(kind, error, trace) -> None:
    """An `excepthook` that says "stopped" for Ctrl-C, and keeps the traceback of everything else."""
    if issubclass(kind, KeyboardInterrupt) and not os.environ.get("STAGES_TRACEBACK"):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = one_line
