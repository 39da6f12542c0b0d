"""Rows of a data set of the Hugging Face hub, streamed by a process of its own.

Arrow's threads may still be reading a file when its reader stops early, and abort an interpreter that ends meanwhile
(apache/arrow#45214). The process that reads can be killed; the one that trains cannot.
"""

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

TIMEOUT = 10  # seconds until the hub counts as unreachable
LISTED = 10  # columns that an error names
ROOT = Path(__file__).parents[2]


class HubError(Exception):
    """Why rows cannot be had, in one line."""


def rows(repository: str, config: str, text_field: str) -> Iterator[dict]:
    """The rows of a data set's train split in order: {"text": ...}, or {"instead": what one has} where it is no text.

    An empty `config` is the only one there is.
    Raises: HubError where the hub or its clients refuse, or the reader dies.
    """
    # Its stdin is never written to: it ends with this process, however that ends, and so does the reader.
    command = [sys.executable, "-m", "research.data.hub", repository, config, text_field]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    reader = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is for the caller alone
    )
    try:
        for line in reader.stdout:
            if not line.endswith(b"\n"):  # killed while it wrote
                break
            message = json.loads(line)
            if "error" in message:
                raise HubError(message["error"])
            if "end" in message:
                return
            yield message
        raise HubError(f"its reader ended with exit code {reader.wait()}")
    finally:
        reader.kill()
        reader.communicate()


def one_line(error: Exception) -> str:
    """What went wrong, in 200 characters of whole words: the hub's clients write paragraphs."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


def instead(row: dict, field: str) -> str:
    """What a row has that has no text in a field."""
    if field in row:
        kind = "null" if row[field] is None else type(row[field]).__name__
        return f"holds {kind}, not text; make a copy without such rows"
    names = [str(name) for name in row]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"has no such text; it has {', '.join(names[:LISTED])}{more}"


def main(repository: str, config: str, text_field: str) -> None:
    """Writes each row, or what went wrong, as a line of JSON to stdout."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    out, sys.stdout = sys.stdout, sys.stderr  # what others print is no row
    try:
        for row in _stream(repository, config or None):
            text = row.get(text_field)
            message = {"text": text} if isinstance(text, str) else {"instead": instead(row, text_field)}
            print(json.dumps(message), file=out)
        last = {"end": True}
    except ImportError as error:
        last = {"error": f"{one_line(error)}; pip install datasets"}
    except Exception as error:  # the hub's clients share no base class for what goes wrong
        last = {"error": one_line(error)}
    print(json.dumps(last), file=out, flush=True)
    os._exit(0)  # at once: Arrow's threads, again


def _stream(repository: str, config: str | None) -> Iterator[dict]:
    import datasets
    from huggingface_hub import HfApi

    # `datasets` retries for minutes where the hub is out of reach: ask once, first.
    HfApi().dataset_info(repository, timeout=TIMEOUT)
    return iter(datasets.load_dataset(repository, name=config, split="train", streaming=True))


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
