"""Building a corpus folder: documents split, tokenised, written as arrays with a manifest."""

import hashlib
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from research.config import ConfigError
from research.data import tokenizer as bpe
from research.data.corpora import Document, documents, source_files
from research.data.hub import COMMITS
from research.data.overlap import overlap

FORMAT = 4  # of the folder; raise it when the same config builds other files
CHUNK = 1 << 24  # tokens counted at once
LOG_EVERY = 10  # seconds
log = logging.getLogger(__name__)


def build(folder: Path, config: Any) -> None:
    """Write the arrays, the tokenizer and the manifest of a config into the new `folder`."""
    folder.mkdir()
    data = config.data
    train_texts = (document.text for document, split in _split(config) if split == "train")
    tokenizer = bpe.load_tokenizer(config, train_texts)
    sizes_V = bpe.token_bytes(tokenizer)
    counts = _write_tokens(folder, tokenizer, sizes_V, config)
    np.save(folder / "token_bytes.npy", sizes_V)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT,
        "source": data.source,
        "path": data.path,
        "commit": COMMITS.get(f"datasets/{data.path}") if data.source == "hf" else None,
        "source_files": len(source_files(data)),
        "protocol": data.protocol,
        "split_seed": config.data.split_seed,
        "heldout_fraction": data.heldout_fraction,
        "limits": {name: data[name] for name in ("max_documents", "max_document_chars", "max_tokens")},
        **counts,
        "overlap": _overlap(folder) if data.protocol == "clean" else None,  # of one array with itself it is all
        "tokenizer": {
            "name": data.tokenizer,
            "commit": COMMITS.get(f"models/{data.tokenizer}"),
            "size": len(sizes_V),
            "sha256": files["tokenizer.json"]["sha256"],
        },
        "eot": bpe.eot_id(tokenizer),
        "files": files,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    manifest["sha256"] = checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _overlap(folder: Path) -> dict[str, Any]:
    names = ("train", "heldout", "heldout_starts")
    return overlap(*(np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in names))


def token_counts(tokens_N: np.ndarray, vocab_size: int) -> np.ndarray:
    """int64 [V]: how often each token occurs; the array on disk is read a chunk at a time."""
    counts_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens_N), CHUNK):
        counts_V += np.bincount(tokens_N[start : start + CHUNK], minlength=vocab_size)
    return counts_V


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 over the contents: arrays, tokenizer and split; no paths, no times."""
    contents = {name: file["sha256"] for name, file in manifest["files"].items()}
    split = [manifest[name] for name in ("protocol", "split_seed", "heldout_fraction", "eot")]
    return hashlib.sha256(json.dumps([contents, split], sort_keys=True).encode()).hexdigest()


def checksum(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest but for its own `sha256`."""
    fields = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _split(config: Any) -> Iterator[tuple[Document, str]]:
    """Each document with its split, `train` or `heldout`; under `published` all are `train`.

    A copy of an earlier document goes where that one went: else whole documents would leak. One that differs in line
    ends, white space at their ends or a byte order mark is a copy too; its text stays as it is. Where texts are cut
    (`config.data.max_document_chars`) one that is equal before or after the cut is a copy: line ends move it.
    """
    fraction = config.data.heldout_fraction if config.data.protocol == "clean" else 0.0
    seen: dict[bytes, str] = {}
    for document in documents(config.data):
        drawn = int.from_bytes(_blake2b(f"{config.data.split_seed}\0{document.id}")) / 2**64
        split = "heldout" if drawn < fraction else "train"
        keys = [_blake2b(_plain(text), size=16) for text in dict.fromkeys((document.text, document.whole))]
        split = next((seen[key] for key in keys if key in seen), split)
        seen |= dict.fromkeys(keys, split)
        yield document, split


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.removeprefix("\ufeff").splitlines()).rstrip()


def _blake2b(text: str, size: int = 8) -> bytes:
    data = text.encode(errors="surrogateescape")  # the id is a file's name, which may not be UTF-8
    return hashlib.blake2b(data, digest_size=size).digest()


def _write_tokens(folder: Path, tokenizer: Tokenizer, sizes_V: np.ndarray, config: Any) -> dict[str, Any]:
    """Write the tokens and document starts of each split; returns their counts, by split."""
    published = config.data.protocol == "published"
    dtype = np.dtype("<u2" if len(sizes_V) <= 1 << 16 else "<u4")
    limit = config.data.max_tokens
    eot = np.array([] if published else [bpe.eot_id(tokenizer)], dtype)
    splits = ("train",) if published else ("train", "heldout")
    starts: dict[str, list[int]] = {split: [] for split in splits}
    lengths, inexact = Counter(), 0

    def wanted(split: str) -> bool:
        return split == "heldout" or not limit or lengths["train"] < limit

    raw = {split: open(folder / f"{split}.raw", "wb") for split in splits}  # noqa: SIM115
    try:
        for document, split, ids in _encoded(config, tokenizer, wanted):
            inexact += int(sizes_V[ids].sum()) != len(document.text.encode())
            ids = np.concatenate([ids.astype(dtype), eot])
            if split == "train" and limit:
                ids = ids[: limit - lengths["train"]]
            if len(ids):
                starts[split].append(lengths[split])
                raw[split].write(ids.tobytes())  # tofile hides that the disk is full
                lengths[split] += len(ids)
            if published and limit and lengths["train"] == limit:
                break
    finally:
        for file in raw.values():
            file.close()
    if inexact:
        log.warning(
            "%d documents are changed by the tokenizer's normaliser; bytes are those it keeps",
            inexact,
        )
    _require_both(lengths, starts, config)
    counts = {}
    for split in splits:
        counts[split] = {"documents": len(starts[split])}
        counts[split] |= _write_split(folder, split, dtype, [0] if published else starts[split], sizes_V)
    return counts | {"heldout": counts[splits[-1]]}


def _encoded(
    config: Any, tokenizer: Tokenizer, wanted: Callable[[str], bool]
) -> Iterator[tuple[Document, str, np.ndarray]]:
    """(document, split, ids) of every document whose split is still wanted, encoded in batches."""
    waiting: deque[tuple[Document, str]] = deque()

    def texts() -> Iterator[str]:
        for document, split in _split(config):
            if wanted(split):
                waiting.append((document, split))
                yield document.text

    logged = time.monotonic()
    for number, ids in enumerate(bpe.encode(tokenizer, texts()), 1):
        document, split = waiting.popleft()
        if time.monotonic() - logged > LOG_EVERY:
            logged = time.monotonic()
            log.info("tokenised %d documents, now %s", number, document.id)
        yield document, split, ids


def _write_split(folder: Path, split: str, dtype: np.dtype, starts: list[int], sizes_V: np.ndarray) -> dict[str, int]:
    """Turn the raw tokens of a split into .npy files; returns how many they are, and bytes."""
    raw = folder / f"{split}.raw"
    tokens_N = np.memmap(raw, dtype, mode="r")
    np.save(folder / f"{split}.npy", tokens_N)
    np.save(folder / f"{split}_starts.npy", np.array(starts, "<i8"))
    counts_V = token_counts(tokens_N, len(sizes_V))
    raw.unlink()
    return {"tokens": len(tokens_N), "bytes": int(counts_V @ sizes_V.astype(np.int64))}


def _require_both(lengths: Counter, starts: dict[str, list[int]], config: Any) -> None:
    empty = [split for split in starts if not lengths[split]]
    if not empty:
        return
    number = sum(map(len, starts.values()))
    name, fix = ("train", "lower") if empty == ["train"] else ("held-out", "raise")
    raise ConfigError(
        "config.data.heldout_fraction",
        config.data.heldout_fraction,
        f"of {number} documents none fell into the {name} split; {fix} it, or give more documents",
    )
