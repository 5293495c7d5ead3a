import os

# These tests start some hundreds of processes: Python compiles what they import once, and not in each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
