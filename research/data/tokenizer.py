"""Byte-level BPE: trained here, read from a file or the Hugging Face hub, or plain bytes.

Byte-level BPE spells every byte with one character of a fixed alphabet of 256, so that any text can
be encoded and the bytes that a token stands for can be counted: losses in bits per byte compare
across tokenizers.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from research.config import ConfigError
from research.data import hub

EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "<|eot|>", "<eos>", "</s>")  # as published tokenizers call it
PROBE = "".join(map(chr, (*range(0x1000), *range(0x1000, 0x110000, 0x1000))))  # every byte that UTF-8 has
LONGEST = 1000  # characters of a word that a tokenizer is trained on
BATCH_DOCUMENTS = 256
BATCH_CHARS = 4_000_000  # an encoding takes about a hundred times its text in memory


def load_tokenizer(config: Any, train_texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config.data.tokenizer` names; only `bpe` reads `train_texts`.

    Special tokens written out in a text are encoded as the plain text that they are there.
    Raises: ConfigError where it cannot be had, is not byte-level, does not keep every byte of a text, or has more
    tokens than `config.model.vocab_size`.
    """
    name, vocab_size = config.data.tokenizer, config.model.vocab_size
    if name == "bpe":
        _require_room(257, vocab_size)
        tokenizer = _train(train_texts, vocab_size)
    elif name == "bytes":
        tokenizer = _plain_bytes()
    else:
        path = named_file(name)
        text = _file_text(name, path) if path else _hub_text(name)
        _require_room(_highest_id(text) + 1, vocab_size)
        tokenizer = _parse(name, text)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()  # a file can ask for both
    tokenizer.no_padding()
    _require_byte_level(tokenizer, name)
    eot_id(tokenizer, name)
    _require_exact(tokenizer, name)
    _require_room(tokenizer_size(tokenizer), vocab_size)
    return tokenizer


def named_file(name: str) -> Path | None:
    """The tokenizer.json that `config.data.tokenizer` names, itself or by its folder; None for other tokenizers.

    Raises: ConfigError where it cannot be read.
    """
    if name in ("bpe", "bytes"):
        return None
    path = Path(os.path.expanduser(name))
    try:
        if not path.exists() and not name.endswith(".json"):
            return None
        path = path / "tokenizer.json" if path.is_dir() else path
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(name, error) from error
    return path


def tokenizer_size(tokenizer: Tokenizer) -> int:
    """Number of ids: the largest one plus one, as a vocabulary may have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def eot_id(tokenizer: Tokenizer, name: str = "") -> int:
    """Id of the end-of-text token. Raises: ConfigError where there is none of a known name."""
    for token in EOT_NAMES:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    known = ", ".join(EOT_NAMES)
    raise ConfigError("config.data.tokenizer", name, f"it has no end-of-text token ({known})")


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [V]: UTF-8 bytes that each token stands for; 0 for end-of-text.

    Exact for byte-level BPE: over a text's tokens they sum to the text's bytes.
    """
    sizes_V = np.zeros(tokenizer_size(tokenizer), np.int32)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        sizes_V[index] = len(token)  # one character of the alphabet a byte
    for index, added in tokenizer.get_added_tokens_decoder().items():
        sizes_V[index] = len(added.content.encode())
    sizes_V[eot_id(tokenizer)] = 0
    return sizes_V


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Ids int32 [n] of each text, in order, without special tokens; many texts at once on all
    cores."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if len(batch) == BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield from _encode_batch(tokenizer, batch)
            batch, chars = [], 0
    yield from _encode_batch(tokenizer, batch)


def _encode_batch(tokenizer: Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        yield np.array(encoding.ids, np.int32)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_bounded(texts), trainer)
    return tokenizer


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut after each LONGEST characters without white space, or of it.

    The trainer's time grows with the square of a word: minutes for a megabyte of letters.
    """
    for text in texts:
        runs = re.finditer(rf"\S{{1,{LONGEST}}}|\s{{1,{LONGEST}}}", text)
        cuts = [0, *(run.end() for run in runs if run.end() - run.start() == LONGEST), len(text)]
        yield from (text[start:end] for start, end in itertools.pairwise(cuts))


def _plain_bytes() -> Tokenizer:
    """Id 0 is end-of-text, then the 256 bytes in the order of the alphabet's characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {EOT: 0} | {character: 1 + index for index, character in enumerate(alphabet)}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([EOT])
    return tokenizer


def _file_text(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> ConfigError:
    return ConfigError("config.data.tokenizer", name, f"cannot be read: {error}; give a tokenizer.json or its folder")


def _parse(name: str, text: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(text.decode())
    except BaseException as error:  # the library raises bare Exception for bad content, or panics, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError("config.data.tokenizer", name, f"no tokenizer.json: {hub.one_line(error)}") from error


def _highest_id(text: bytes) -> int:
    """Of a tokenizer.json's tokens; -1 where it cannot be read. The library ends the process for want of memory at one
    in the thousands of millions."""
    try:
        described = json.loads(text)
        return max(*described["model"]["vocab"].values(), *(token["id"] for token in described["added_tokens"]), -1)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return -1  # the library, or what is asked of it, says what is wrong


def _hub_text(name: str) -> bytes:
    """Of the clients' cache where it is there. Sets hub.COMMITS."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        repository, revision = hub.pinned(name)
        file = dict(repo_id=repository, filename="tokenizer.json", revision=revision or None)
        path = try_to_load_from_cache(**file)
        if not isinstance(path, str):
            # The client retries for minutes where the hub is out of reach: ask once, first.
            HfApi().model_info(repository, revision=revision or None, timeout=hub.TIMEOUT)
            path = hf_hub_download(**file)
        hub.COMMITS[f"models/{name}"] = Path(path).parent.name  # the cache has a folder for each
        return Path(path).read_bytes()
    except Exception as error:  # the hub's clients share no base class for what goes wrong
        reason = hub.one_line(error)
        raise ConfigError(
            "config.data.tokenizer",
            name,
            f"not readable from the Hugging Face hub ({reason}); "
            "name bpe, bytes, a tokenizer.json, owner/name or owner/name@revision",
        ) from error


def _require_byte_level(tokenizer: Tokenizer, name: str) -> None:
    reason = _not_byte_level(tokenizer)
    if reason:
        raise ConfigError("config.data.tokenizer", name, reason)


def _not_byte_level(tokenizer: Tokenizer) -> str:
    """What in its description keeps a tokenizer from being byte-level BPE; empty where it is."""
    description = json.loads(tokenizer.to_str())
    model, cuts = description["model"], json.dumps(description["pre_tokenizer"])
    spelled = '"ByteLevel"' in cuts + json.dumps(description["normalizer"])
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known = set(tokenizer.get_vocab(with_added_tokens=False))
    if model["type"] != "BPE" or not spelled or any(set(token) - alphabet for token in known - added):
        return "it is no byte-level BPE; choose one that is"
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model[field]:
            return f"its model has {field}={model[field]!r}; choose a byte-level BPE without"
    if '"add_prefix_space": true' in cuts:
        return "it puts a space before a text; set add_prefix_space of its pre_tokenizer to false"
    if '"Removed"' in cuts:
        return "its pre_tokenizer removes what it cuts at; choose a tokenizer that keeps all of a text"
    ((needed, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(PROBE)
    missing = set(needed) - known
    if missing:
        return f"it has no token for {len(missing)} of the bytes that texts are made of; choose one that has all"
    return ""


def _require_exact(tokenizer: Tokenizer, name: str) -> None:
    """Raises: ConfigError where the bytes of a text's tokens do not sum to those that the normaliser keeps of it.

    A text of all bytes, and each added token, are tried.
    """
    sizes_V, added = token_bytes(tokenizer), tokenizer.get_added_tokens_decoder()
    eot, spelled = eot_id(tokenizer), '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["normalizer"])
    if eot not in added or not added[eot].special:
        message = f"a text can spell its end-of-text {tokenizer.id_to_token(eot)}; make that a special token"
        raise ConfigError("config.data.tokenizer", name, message)
    spellings = [token.content for token in added.values()]
    for text in (PROBE, *spellings, *(f"a {spelling} b" for spelling in spellings)):
        kept = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        size = len(kept) if spelled else len(kept.encode())
        counted = int(sizes_V[tokenizer.encode(text, add_special_tokens=False).ids].sum())
        if counted != size:
            what = "a text of every byte" if text is PROBE else f"{text[:40]!r}"
            message = f"its tokens of {what} stand for {counted} bytes, not {size}; choose one that is exact"
            raise ConfigError("config.data.tokenizer", name, message)


def _require_room(size: int, vocab_size: int) -> None:
    if vocab_size < size:
        raise ConfigError(
            "config.model.vocab_size",
            vocab_size,
            f"the tokenizer has {size} tokens; give {size} or more",
        )
