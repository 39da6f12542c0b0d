"""The order of the data as a pure function of (seed, tokens consumed): nothing is iterated.

Protocol `clean`. The train array of N tokens is read in blocks of S = config.data.shuffle_block
tokens (0: the sequence length). An epoch is n = (N - 1) // S blocks that begin at a drawn offset,
in a drawn order; token p of the run lies in epoch p // (n S), at place p % (n S) of it. Its target
is the next token of the array, so a block shows one token more than its length, and every token of
an epoch is a target once, whatever the batch's shape.

Where rows grow (config.train.stages) blocks are as long as the longest rows. Each stage cuts blocks of its own into
rows and draws their order anew, so that the rows of a step come from places of their own there too, and no token comes
twice in an epoch; with a shuffle_block rows stay in the order of the blocks.

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
from research.stages import stage_at, stages_of


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
    if shorter_stages(config):
        places_N, shape = _places_in_stage(config, cursor, *_layout(corpus, config)[:2])
    else:
        places_N = np.arange(cursor, cursor + shape[0] * shape[1])
    sources_N = _sources(corpus, config, places_N)
    rows = {
        "inputs": corpus.train[sources_N].reshape(shape).astype(np.int32),
        "targets": corpus.train[sources_N + 1].reshape(shape).astype(np.int32),
    }
    if corpus.train_scored is not None:
        rows["targets"][~corpus.train_scored[sources_N + 1].reshape(shape)] = -1
    if config.data.mask_documents:
        rows |= document_rows(corpus.train_starts, sources_N.reshape(shape))
    return rows


def _sources(corpus: Corpus, config: Any, places_N: np.ndarray) -> np.ndarray:
    """Where in the train array the tokens at these places of the run are read."""
    size, blocks, slack = _layout(corpus, config)
    blocks_N = places_N // size
    numbers, starts = np.unique(blocks_N), []
    for epoch, group in itertools.groupby(numbers.tolist(), key=lambda block: block // blocks):
        order = permutation(blocks, config.seed, f"blocks of epoch {epoch}")
        offset = draw(config.seed, f"offset of epoch {epoch}") % (slack + 1)
        starts += [offset + size * order[block % blocks] for block in group]
    return np.array(starts)[np.searchsorted(numbers, blocks_N)] + places_N % size


def _places_in_stage(config: Any, cursor: int, size: int, blocks: int) -> tuple[np.ndarray, tuple[int, int]]:
    """(places of the run at which a step's tokens are read, its [B, T]); a block is `size` tokens, an epoch `blocks`.

    In independent order an epoch's blocks are shared out among the stages that read in it, as they share what the run
    reads of it, and each draws its rows from all of its own: a run shorter than an epoch still comes from all of it.
    """
    tokens, found = config.batch_size * config.seq_len, stages_of(config)
    stage = stage_at(found, cursor // tokens)
    length, places = stage.seq_len, range(cursor, cursor + tokens, stage.seq_len)
    if not config.data.shuffle_block:
        drawn = []
        for epoch, group in itertools.groupby(places, key=lambda place: place // (size * blocks)):
            begin = epoch * blocks * size
            end = min(begin + blocks * size, found[-1].end * tokens)  # of what the run reads of this epoch
            low, high = max(stage.first * tokens, begin), min(stage.end * tokens, end)
            first, last = (begin + (x - begin) // size * blocks * size // (end - begin) * size for x in (low, high))
            order = permutation((last - first) // length, config.seed, f"rows of {length} from {first} on")
            drawn += [first + length * order[(place - low) // length] for place in group]
        places = drawn
    return (np.array(places)[:, None] + np.arange(length)).ravel(), (stage.batch_size, length)


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
