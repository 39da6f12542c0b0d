"""Where documents come from: one iterator over (id, text), whatever the source.

A document is what the train / held-out split keeps whole: a source file, a line of a JSONL file, a
row of a table.
"""

import contextlib
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.config import ConfigError
from research.data import hub

EXTENSIONS = {
    "stdlib": (".py",),
    "text": (".txt", ".md", ".py"),
    "jsonl": (".jsonl", ".jsonl.gz"),
    "parquet": (".parquet",),
}
SOURCES = (*EXTENSIONS, "hf")
# Tests repeat themselves, packages are not the library, what a build writes names its machine.
NOT_STDLIB = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
BUILD_MADE = ("_sysconfigdata", "sitecustomize", "config-")


@dataclass(frozen=True)
class Document:
    """`id` names the document within its corpus, without machine paths; `text` is never empty.

    `whole` is the text before it was cut to `config.data.max_document_chars`.
    """

    id: str
    text: str
    whole: str


def documents(data_config: Any) -> Iterator[Document]:
    """The documents of `config.data.source` in a fixed order, within its limits, no empty ones.

    Raises: ConfigError for a missing or unreadable path, no documents, text that is not UTF-8, a
    bad line or row.
    """
    for field in ("max_documents", "max_document_chars"):
        if data_config[field] < 0:
            raise ConfigError(f"config.data.{field}", data_config[field], "give 0 (no limit) or more")
    count = 0
    with contextlib.closing(_read(data_config)) as found:
        for name, text in found:
            if not text:
                continue
            _require_unicode(name, text, data_config)
            count += 1
            yield Document(name, text[: data_config.max_document_chars or None], text)
            if count == data_config.max_documents:
                return
    if not count:
        raise _bad_path(data_config, "every document in it is empty")


def source_files(data_config: Any) -> list[tuple[str, Path]]:
    """(name, path) of each file that `documents` reads, sorted by name; none for the source `hf`.

    Raises: ConfigError where the source is unknown, or its path is missing or holds no such file.
    """
    source = data_config.source
    if source not in SOURCES:
        raise ConfigError("config.data.source", source, f"choose one of {', '.join(SOURCES)}")
    if source == "hf":
        return []
    if source == "stdlib":
        if data_config.path:
            raise _bad_path(data_config, "the source 'stdlib' takes no path; set config.data.source too")
        root = Path(sysconfig.get_path("stdlib"))
        found = _walk(root, data_config)
        if not found:
            raise ConfigError("config.data.source", source, f"no .py files in {root}; name another source")
        return found
    root = Path(os.path.expanduser(data_config.path))
    if not data_config.path or not root.exists():
        raise _bad_path(
            data_config,
            "no such file or folder; name a text file, a folder, .jsonl(.gz) or .parquet",
        )
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():  # a pipe would be waited for
        raise _bad_path(data_config, "it is neither a file nor a folder; write what it gives into a file")
    found = _walk(root, data_config)
    if not found:
        raise _bad_path(data_config, f"no {', '.join(EXTENSIONS[source])} files in this folder")
    return found


def _read(data_config: Any) -> Iterator[tuple[str, str]]:
    """(id, text) of each document, whole."""
    files = source_files(data_config)
    if data_config.source == "hf":
        yield from _read_hub(data_config)
    for name, path in files:
        try:
            if data_config.source == "jsonl":
                yield from _read_jsonl(name, path, data_config)
            elif data_config.source == "parquet":
                yield from _read_parquet(name, path, data_config)
            else:
                yield name, _decode(path.read_bytes(), 0, name, data_config)
        except (OSError, EOFError, zlib.error) as error:
            raise _bad_path(data_config, f"{name} cannot be read: {' '.join(str(error).split())}") from error


def _read_jsonl(name: str, path: Path, data_config: Any) -> Iterator[tuple[str, str]]:
    field = data_config.text_field
    start = 0  # byte in the file, after decompression
    with gzip.open(path) if name.lower().endswith(".gz") else open(path, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = _decode(raw, start, name, data_config)
            start += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _bad_path(data_config, f"{name} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise _bad_field(data_config, f"{name} line {number} has no such text; it is no object")
            if not isinstance(row.get(field), str):
                raise _bad_field(data_config, f"{name} line {number} {hub.instead(row, field)}")
            yield f"{name}:{number}", row[field]


def _read_parquet(name: str, path: Path, data_config: Any) -> Iterator[tuple[str, str]]:
    import pyarrow
    from pyarrow import parquet

    field = data_config.text_field
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                has = hub.instead(dict.fromkeys(table.schema_arrow.names), field)
                raise _bad_field(data_config, f"{name} {has}")
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    text = value.as_py()
                    if not isinstance(text, str):
                        raise _bad_field(data_config, f"{name} row {number} {hub.instead({field: text}, field)}")
                    yield f"{name}:{number}", text
    except pyarrow.ArrowException as error:
        raise _bad_path(data_config, f"{name} is not Parquet: {hub.one_line(error)}") from error
    except UnicodeDecodeError as error:
        message = f"{name} row {number}: byte {error.start} of the text is not UTF-8"
        raise _bad_path(data_config, message) from error


def _read_hub(data_config: Any) -> Iterator[tuple[str, str]]:
    """Rows of a Hugging Face data set's train split, streamed."""
    name = data_config.path.partition("@")[0]  # pinned or not, documents have the same ids
    try:
        with contextlib.closing(hub.rows(data_config.path, data_config.text_field)) as rows:
            for number, row in enumerate(rows):
                if "text" not in row:
                    raise _bad_field(data_config, f"row {number} {row['instead']}")
                yield f"{name}:{number}", row["text"]
    except hub.HubError as error:
        message = f"not readable from the Hugging Face hub ({error}); use a local copy"
        raise _bad_path(data_config, message) from error


def _walk(root: Path, data_config: Any) -> list[tuple[str, Path]]:
    """Files with the source's extensions under `root`, hidden ones left out, sorted by relative
    path."""

    def stop(error: OSError) -> None:
        raise _bad_path(data_config, f"a folder in it cannot be read: {error}") from error

    stdlib = data_config.source == "stdlib"
    found, seen = [], set()
    for folder, folders, names in os.walk(root, onerror=stop, followlinks=not stdlib):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # by a link, and links may go round
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        if stdlib:
            folders[:] = [name for name in folders if name not in NOT_STDLIB]
            folders[:] = [name for name in folders if not name.startswith(BUILD_MADE)]
            names = [name for name in names if not name.startswith(BUILD_MADE)]
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if not name.startswith(".")]
        found += [Path(folder, n) for n in names if n.lower().endswith(EXTENSIONS[data_config.source])]
    found = [path for path in found if path.is_file() or not path.exists()]  # a pipe would be waited for
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _decode(raw: bytes, start: int, name: str, data_config: Any) -> str:
    """UTF-8 text of `raw`, which begins at byte `start` of the file `name`."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        message = f"{name}: byte {start + error.start} is not UTF-8; convert the file or leave it out"
        raise _bad_path(data_config, message) from error


def _require_unicode(name: str, text: str, data_config: Any) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        message = f"{name}: character {error.start} is half a surrogate pair, not text"
        raise _bad_path(data_config, message) from error


def _bad_path(data_config: Any, message: str) -> ConfigError:
    return ConfigError("config.data.path", data_config.path, _printable(message))


def _bad_field(data_config: Any, message: str) -> ConfigError:
    return ConfigError("config.data.text_field", data_config.text_field, _printable(message))


def _printable(message: str) -> str:
    """One line: a file's or a column's name may hold line ends."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
