"""Files are written whole or not at all: under a temporary name in their folder, then renamed."""

import json
import os
import threading
from pathlib import Path
from typing import Any


def write_json(path: str | Path, content: Any) -> None:
    """Indented by one space. Raises: ValueError for a number that JSON does not have."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:  # a full disk, or Ctrl-C
        temporary.unlink(missing_ok=True)
        raise
