"""A script as a program: one clear line for a user's mistake, a full traceback for ours."""

import os
import sys

from shared.errors import BadInput

# What torch says, in a plain RuntimeError, of a tensor that no memory holds.
TOO_LARGE = ("can't allocate memory", "out of memory", "size calculation overflowed")


def run_program(main) -> None:
    """Run `main()` as a program: `BadInput` becomes one line on stderr and exit code 2.

    Ctrl-C exits with 130, a full disk, an unreadable file (`OSError`) or sizes that fit into no memory with 1. Every
    other exception is a bug and keeps its traceback, as does everything when STAGES_TRACEBACK is set.
    """
    try:
        code = main()
    except (BadInput, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if os.environ.get("STAGES_TRACEBACK"):
            raise
        if isinstance(error, KeyboardInterrupt):
            print(error.args[0] if error.args else "stopped", file=sys.stderr)
            raise SystemExit(130) from None
        if isinstance(error, (MemoryError, RuntimeError)):
            if isinstance(error, RuntimeError) and not any(text in str(error) for text in TOO_LARGE):
                raise
            error = "this does not fit into memory: choose smaller sizes"
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, BadInput) else 1) from None
    raise SystemExit(code)


def command(stage: str, script: str, *words: str) -> str:
    """How to start a script of the stage (a folder's name), from the root and from inside any stage alike.

    command("06_gpt", "train.py", "--resume") -> "uv run stages run 06 train.py --resume"
    """
    return " ".join(["uv run stages run", stage[:2], script, *words])
