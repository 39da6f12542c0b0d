"""The corpus as two memory-mapped token arrays, cached: documents split first, tokenised after.

Protocol `clean`: a hash of (split_seed, document id) puts each document into the train or the held-out
split, then each split's documents are concatenated, each followed by end-of-text. Protocol
`published` (of the experiment that this project answers; it leaks on purpose): all documents
concatenated without separators; `stream` splits its windows instead.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research.config import ConfigError
from research.data.build import FORMAT, build, checksum, sha256, token_counts
from research.data.corpora import source_files
from research.data.tokenizer import named_file

PROTOCOLS = ("clean", "published")
ATTEMPTS = 4  # each process that replaces a damaged cache meanwhile may cost one
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading it ends in
YOUNG = 60  # seconds: a folder whose process may not hold its lock yet
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of both splits [N] (uint16 or uint32, on disk), and where documents start (int64).

    `token_bytes` int32 [V]: UTF-8 bytes of each token. `train_scored`, `heldout_scored` bool [N]: which tokens are
    targets, where not all are (the recall task). `fingerprint`: a hash of the contents alone, the same on every
    machine. `tokenizer`: its JSON; the recall task has none. Under the published protocol both splits are the same
    array, one document long.
    """

    train: np.ndarray
    heldout: np.ndarray
    train_starts: np.ndarray
    heldout_starts: np.ndarray
    token_bytes: np.ndarray
    eot: int
    manifest: dict[str, Any]
    fingerprint: str
    protocol: str
    train_scored: np.ndarray | None = None
    heldout_scored: np.ndarray | None = None
    tokenizer: str | None = None


def open_corpus(config: Any) -> Corpus:
    """The corpus of a config: its cache folder, built where it is missing.

    Several processes may build at once. A cache whose contents are not what its manifest says is
    rebuilt, with a warning.
    Raises: ConfigError for whatever is wrong with the source, the tokenizer, the split or the cache
    folder.
    """
    data = config.data
    if data.protocol not in PROTOCOLS:
        raise ConfigError("config.data.protocol", data.protocol, f"choose one of {', '.join(PROTOCOLS)}")
    if not 0 < data.heldout_fraction < 1:
        raise ConfigError("config.data.heldout_fraction", data.heldout_fraction, "give more than 0, less than 1")
    if data.max_tokens < 0:
        raise ConfigError("config.data.max_tokens", data.max_tokens, "give 0 (no limit) or more")
    if data.source == "recall":
        from research.data.synthetic import open_recall  # made of this module's Corpus

        return open_recall(config)
    folder = cache_root(config) / _cache_key(config)
    for _ in range(ATTEMPTS):
        if folder.exists():
            try:
                return _load(folder)
            except DAMAGE as error:
                log.warning("cached corpus %s is damaged and rebuilt: %s", folder, error)
                _discard(folder, config)
        _build_into(folder, config)
    raise _bad_cache(config, f"{folder} is damaged as soon as it is built")


def unigram_entropy(corpus: Corpus, vocab_size: int) -> float:
    """Mean -log p, in nats, of the held-out tokens under the train split's counts plus one."""
    counts_V = token_counts(corpus.train, vocab_size) + 1
    log_p_V = np.log(counts_V / counts_V.sum())
    return float(-(token_counts(corpus.heldout, vocab_size) @ log_p_V) / len(corpus.heldout))


def first_token_entropy(corpus: Corpus, seq_len: int, vocab_size: int) -> float:
    """Entropy in nats of the first tokens of all train windows at stride 1: what a window's own losses leave out."""
    counts_V = token_counts(corpus.train[: max(1, len(corpus.train) - seq_len)], vocab_size)
    p_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(p_V @ np.log(p_V)))


def cache_root(config: Any) -> Path:
    """The folder that corpora, and what is compiled, are kept in; made where it is missing.

    Raises: ConfigError where it cannot be made.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    root = Path(os.path.expanduser(config.data.cache_dir or home / "batch-or-length"))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _bad_cache(config, f"{root} cannot be made: {error}") from error
    return root


def _cache_key(config: Any) -> str:
    """Hash of all that the arrays follow from; of files their contents, as times can mislead."""
    data = config.data
    names = (
        "source", "path", "text_field", "protocol", "tokenizer", "max_documents",
        "max_document_chars", "max_tokens", "heldout_fraction", "split_seed",
    )  # fmt: skip
    described = {name: data[name] for name in names}
    described |= {"format": FORMAT, "vocab_size": config.model.vocab_size}
    try:
        described["files"] = [(name, sha256(path)) for name, path in source_files(data)]
    except OSError as error:
        raise ConfigError("config.data.path", data.path, f"cannot be read: {error}") from error
    tokenizer = named_file(data.tokenizer)
    if tokenizer:
        described["tokenizer_file"] = sha256(tokenizer)
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()


def _load(folder: Path) -> Corpus:
    """The corpus in a folder. Raises: one of DAMAGE where a file is not what the manifest says."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, file in manifest["files"].items():
        path = folder / name
        if path.stat().st_size != file["bytes"] or sha256(path) != file["sha256"]:
            raise ValueError(f"{name} is not what the manifest says")
    if manifest["sha256"] != checksum(manifest):
        raise ValueError("manifest.json is not what was written")

    def array(name: str) -> np.ndarray:
        # a plain view of the mapped file: indexing the memmap class itself is slow
        return np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)

    heldout = "heldout" if manifest["protocol"] == "clean" else "train"
    return Corpus(
        train=array("train"),
        heldout=array(heldout),
        train_starts=array("train_starts"),
        heldout_starts=array(f"{heldout}_starts"),
        token_bytes=array("token_bytes"),
        eot=manifest["eot"],
        manifest=manifest,
        fingerprint=manifest["fingerprint"],
        protocol=manifest["protocol"],
        tokenizer=(folder / "tokenizer.json").read_text(encoding="utf-8"),
    )


def _build_into(folder: Path, config: Any) -> None:
    """Build beside `folder`, then rename; where another process was first, its is the same."""
    try:
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside, _lock(Path(beside)):
            build(Path(beside, "new"), config)
            if _cache_key(config) != folder.name:
                message = "its files, or the tokenizer's, changed while they were read; run again"
                raise ConfigError("config.data.path", config.data.path, message)
            try:
                os.replace(Path(beside, "new"), folder)
            except OSError:  # a folder that is not empty is not replaced
                if not folder.exists():
                    raise
    except OSError as error:  # reading errors are ConfigErrors by now: it is writing that failed
        raise _bad_cache(config, f"cannot be written: {error}") from error


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed have left of this corpus."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < YOUNG:
                continue
            with _lock(left):  # whoever holds it is at work
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _lock(beside: Path) -> Iterator[None]:
    """Holds a folder for this process. Raises: OSError where another holds it."""
    with open(beside / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _discard(folder: Path, config: Any) -> None:
    """Remove a folder so that no one sees it half removed."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            os.replace(folder, Path(beside, "damaged"))
    except FileNotFoundError:
        pass  # another process has discarded it
    except OSError as error:
        raise _bad_cache(config, f"the damaged {folder} cannot be removed: {error}") from error


def _bad_cache(config: Any, message: str) -> ConfigError:
    return ConfigError("config.data.cache_dir", config.data.cache_dir, message)
