"""The order of the data as a pure function of (seed, tokens consumed): nothing is iterated.

Protocol `clean`. The train array of N tokens is read in blocks of S = config.data.shuffle_block
tokens (0: the sequence length). An epoch is n = (N - 1) // S blocks that begin at a drawn offset,
in a drawn order; token p of the run lies in epoch p // (n S), at place p % (n S) of it. Its target
is the next token of the array, so a block shows one token more than its length, and every token of
an epoch is a target once, whatever the batch's shape.

Where rows grow (config.train.stages) blocks are as long as the longest rows. A stage of shorter ones cuts those of its
own blocks and draws the rows' order anew, so that the rows of a step come from places of their own there too; with a
shuffle_block they stay in the order of the blocks.

Protocol `published`. An epoch is a permutation of the train windows: of all windows of T tokens at
stride 1, the share that is not held out. Neighbouring windows share T - 1 tokens, so the split
leaks, as in the experiment that is reproduced.
"""

import hashlib
import itertools
from typing import Any

import grain
import numpy as np

from research.config import ConfigError, shorter_stages
from research.data.tokens import Corpus
from research.stages import Stage, stage_at, stages_of


def batch(corpus: Corpus, config: Any, cursor: int) -> dict[str, np.ndarray]:
    """A step that begins after `cursor` tokens: int32 `inputs` [B, T] and `targets` [B, T] (-1: not scored), B and T
    those of the step's stage.

    With config.data.mask_documents also int32 `segments` [B, T], from 1, one for each stretch of a
    document in a row, and `positions` [B, T], counted from the start of the stretch. Under
    `published` the cursor counts whole windows.
    """
    shape = config.batch_size, config.seq_len
    if corpus.protocol == "published":
        windows = np.arange(shape[0]) + cursor // shape[1]
        return window_rows(corpus.train, _train_windows(corpus, config, windows), shape[1])
    if not shorter_stages(config):
        sources_N = _sources(corpus, config, cursor, shape[0] * shape[1])
    else:
        stage = stage_at(stages_of(config), cursor // (shape[0] * shape[1]))
        shape = stage.batch_size, stage.seq_len
        places = _places_of_rows(config, stage, cursor, epoch_tokens(corpus, config))
        sources_N = np.concatenate([_sources(corpus, config, place, stage.seq_len) for place in places])
    rows = {
        "inputs": corpus.train[sources_N].reshape(shape).astype(np.int32),
        "targets": corpus.train[sources_N + 1].reshape(shape).astype(np.int32),
    }
    if corpus.train_scored is not None:
        rows["targets"][~corpus.train_scored[sources_N + 1].reshape(shape)] = -1
    if config.data.mask_documents:
        rows |= document_rows(corpus.train_starts, sources_N.reshape(shape))
    return rows


def _sources(corpus: Corpus, config: Any, place: int, count: int) -> np.ndarray:
    """Where in the train array `count` tokens from a place of the run on are read."""
    size, blocks, slack = _layout(corpus, config)
    places_N = np.arange(place, place + count)
    first, last = place // size, (place + count - 1) // size
    starts = []
    for epoch, group in itertools.groupby(range(first, last + 1), key=lambda block: block // blocks):
        order = permutation(blocks, config.seed, f"blocks of epoch {epoch}")
        offset = draw(config.seed, f"offset of epoch {epoch}") % (slack + 1)
        starts += [offset + size * order[block % blocks] for block in group]
    return np.array(starts)[places_N // size - first] + places_N % size


def _places_of_rows(config: Any, stage: Stage, cursor: int, epoch: int) -> list[int]:
    """The place of the run at which each row of a step is read: the step's own, or one drawn from all that the stage
    reads in that epoch."""
    tokens, length = stage.batch_size * stage.seq_len, stage.seq_len
    places = range(cursor, cursor + tokens, length)
    if config.data.shuffle_block or length == config.seq_len:
        return list(places)
    drawn = []
    for number, group in itertools.groupby(places, key=lambda place: place // epoch):
        low = max(stage.first * tokens, number * epoch)
        high = min(stage.end * tokens, (number + 1) * epoch)
        order = permutation((high - low) // length, config.seed, f"rows from {low} to {high}")
        drawn += [low + length * order[(place - low) // length] for place in group]
    return drawn


def epoch_tokens(corpus: Corpus, config: Any) -> int:
    """Tokens of one epoch: of its blocks, or of all train windows under `published`.

    Raises: ConfigError where the train split is shorter than one block, or than one window.
    """
    if corpus.protocol == "published":
        return count_windows(corpus, config)[0] * config.seq_len
    size, blocks, _ = _layout(corpus, config)
    return size * blocks


def check(corpus: Corpus, config: Any, total_tokens: int) -> None:
    """Whether a run of `total_tokens` can be read off this corpus.

    Raises: ConfigError where a step is larger than an epoch, a run longer than
    config.data.max_epochs allows, or a row would be cut at the borders of shuffle blocks.
    """
    data, step = config.data, config.batch_size * config.seq_len
    if corpus.protocol == "published" and data.mask_documents:
        message = "the published protocol knows no documents; set it to False"
        raise ConfigError("config.data.mask_documents", True, message)
    if corpus.protocol == "clean" and data.shuffle_block % config.seq_len:
        message = f"not a multiple of config.seq_len={config.seq_len}; rows would be cut at its borders"
        raise ConfigError("config.data.shuffle_block", data.shuffle_block, message)
    epoch = epoch_tokens(corpus, config)
    if epoch < step:
        message = f"a step of {step} tokens is more than the {epoch} of an epoch; lower it"
        raise ConfigError("config.batch_size", config.batch_size, message)
    if data.max_epochs and total_tokens > data.max_epochs * epoch:
        message = (
            f"{total_tokens} tokens are {total_tokens / epoch:.2f} epochs of {epoch} train tokens;"
            " train for fewer, give more text, or raise it (0: no limit)"
        )
        raise ConfigError("config.data.max_epochs", data.max_epochs, message)


def window_rows(tokens_N: np.ndarray, starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """int32 `inputs` [W, length] from each start, and `targets`, the tokens that follow them."""
    sources = starts[:, None] + np.arange(length)
    return {
        "inputs": tokens_N[sources].astype(np.int32),
        "targets": tokens_N[sources + 1].astype(np.int32),
    }


def _layout(corpus: Corpus, config: Any) -> tuple[int, int, int]:
    """(tokens a block, blocks an epoch, tokens that an epoch leaves out) of the clean protocol."""
    size = config.data.shuffle_block or config.seq_len
    blocks, slack = divmod(len(corpus.train) - 1, size)
    if blocks < 1:
        field = "data.shuffle_block" if config.data.shuffle_block else "seq_len"
        message = f"a block and its last target are more than the {len(corpus.train)} train tokens"
        raise ConfigError(f"config.{field}", size, message)
    return size, blocks, slack


def count_windows(corpus: Corpus, config: Any) -> tuple[int, int]:
    """(train, held-out) windows of T tokens at stride 1, each with the target of its last token."""
    windows = len(corpus.train) - config.seq_len
    if windows < 2:
        message = f"the corpus has {len(corpus.train)} tokens, too few for windows of this length"
        raise ConfigError("config.seq_len", config.seq_len, message)
    heldout = max(1, int(windows * config.data.heldout_fraction))
    return windows - heldout, heldout


def _train_windows(corpus: Corpus, config: Any, indices: np.ndarray) -> np.ndarray:
    """Starts of the train windows at places `indices` of the run."""
    train, heldout = count_windows(corpus, config)
    split = permutation(train + heldout, config.data.split_seed, "window split")
    starts = []
    for epoch, group in itertools.groupby(indices.tolist(), key=lambda index: index // train):
        order = permutation(train, config.seed, f"windows of epoch {epoch}")
        starts += [split[order[index % train]] for index in group]
    return np.array(starts)


def document_rows(document_starts: np.ndarray, sources_BT: np.ndarray) -> dict[str, np.ndarray]:
    """Segments and positions of rows that were read at `sources_BT` of an array of documents."""
    documents_BT = np.searchsorted(document_starts, sources_BT, side="right")
    cuts_BT = np.ones(sources_BT.shape, bool)
    cuts_BT[:, 1:] = (np.diff(documents_BT) != 0) | (np.diff(sources_BT) != 1)
    places_T = np.arange(sources_BT.shape[1])
    latest_BT = np.maximum.accumulate(np.where(cuts_BT, places_T, 0), axis=1)
    return {
        "segments": np.cumsum(cuts_BT, axis=1, dtype=np.int32),
        "positions": (places_T - latest_BT).astype(np.int32),
    }


def permutation(size: int, seed: int, purpose: str) -> grain.MapDataset:
    """A permutation of range(size), by random access."""
    # hashed, as grain adds the epoch to its seed: epoch 1 of seed 42 would be epoch 0 of seed 43
    return grain.MapDataset.range(size).shuffle(seed=draw(seed, purpose) % 2**32)


def draw(seed: int, purpose: str) -> int:
    """A uniform number of 64 bits for one purpose of a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest())
