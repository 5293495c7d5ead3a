"""Another program, run to its end."""

import subprocess
import sys

# For a pytest of which only the checkpoints matter: what else is installed into pytest costs time at the start, and the
# user's own options may be those of a plugin that is then missing.
BARE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}


def run_child(words: list[str], patience: float, **options) -> int:
    """The exit code of the program `words`, which is gone whatever happens meanwhile.

    Ctrl-C reaches it too: it has `patience` seconds to save its work and to end. `options` are those of Popen.
    """
    sys.stdout.flush()  # what we have said stands above what it says
    child = subprocess.Popen(words, **options)
    try:
        return child.wait()
    finally:
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
