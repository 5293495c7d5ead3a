"""Files that are replaced in one step: a reader meets the old content or the new, never half of either."""

import os
from pathlib import Path


def write(file: Path, content: str | bytes) -> None:
    """Replace `file` in one step, whatever happens meanwhile; a write that fails leaves nothing behind."""
    half = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        half.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        os.replace(half, file)
    finally:
        half.unlink(missing_ok=True)
