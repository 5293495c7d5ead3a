"""One clear line for a user's mistake; a full traceback for ours."""

import os
import sys


class BadInput(ValueError):
    """What the user gave cannot be used. The message names the cause and the remedy in one line."""


def cli(main) -> None:
    """Run `main()` as a program: `BadInput` becomes one line on stderr and exit code 2.

    Ctrl-C exits with 130, a full disk or an unreadable file (`OSError`) with 1. Every other
    exception is a bug and keeps its traceback, as does everything when STAGES_TRACEBACK is set.
    """
    try:
        code = main()
    except (BadInput, OSError, KeyboardInterrupt) as error:
        if os.environ.get("STAGES_TRACEBACK"):
            raise
        if isinstance(error, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, BadInput) else 1) from None
    raise SystemExit(code)
