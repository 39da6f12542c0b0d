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
COMMITS: dict[str, str] = {}  # by datasets/ or models/ and its name: where this process has read it, and will again


class HubError(Exception):
    """Why rows cannot be had, in one line."""


def pinned(name: str) -> tuple[str, str]:
    """(name, revision) of `name@revision`; without one the revision is empty, and means the newest.

    Raises: HubError for an @ that nothing follows.
    """
    name, at, revision = name.partition("@")
    if at and not revision:
        raise HubError("no revision follows its @")
    return name, revision


def rows(path: str, text_field: str) -> Iterator[dict]:
    """The rows of a data set's train split in order: {"text": ...}, or {"instead": what one has} where it is no text.

    path: owner/name or owner/name/config (without a config: the only one there is), then maybe @revision.
    Sets COMMITS.
    Raises: HubError where the path, the hub or its clients refuse, or the reader dies.
    """
    name, revision = pinned(path)
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise HubError("name a data set as owner/name or owner/name/config, and @revision to pin it")
    repository, config = "/".join(parts[:2]), "".join(parts[2:])
    key = f"datasets/{path}"
    # Its stdin is never written to: it ends with this process, however that ends, and so does the reader.
    command = [sys.executable, "-m", "research.data.hub", repository, COMMITS.get(key, revision), config, text_field]
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
            if "commit" in message:
                COMMITS[key] = message["commit"]
                continue
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


def main(repository: str, revision: str, config: str, text_field: str) -> None:
    """Writes the commit and each row, or what went wrong, as a line of JSON to stdout."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    out, sys.stdout = sys.stdout, sys.stderr  # what others print is no row
    try:
        commit, stream = _stream(repository, revision or None, config or None)
        print(json.dumps({"commit": commit}), file=out)
        for row in stream:
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


def _stream(repository: str, revision: str | None, config: str | None) -> tuple[str, Iterator[dict]]:
    import datasets
    from huggingface_hub import HfApi

    # `datasets` retries for minutes where the hub is out of reach: ask once, first.
    commit = HfApi().dataset_info(repository, revision=revision, timeout=TIMEOUT).sha
    return commit, iter(datasets.load_dataset(repository, name=config, revision=commit, split="train", streaming=True))


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
