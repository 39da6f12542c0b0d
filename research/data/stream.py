"""The order of the data as a pure function of (seed, tokens consumed): nothing is iterated.

Protocol `clean`. The train array of N tokens is read in blocks of S = config.data.shuffle_block
tokens (0: the sequence length). An epoch is n = (N - 1) // S blocks that begin at a drawn offset,
in a drawn order; token p of the run lies in epoch p // (n S), at place p % (n S) of it. Its target
is the next token of the array, so a block shows one token more than its length, and every token of
an epoch is a target once, whatever the batch's shape.

Protocol `published`. An epoch is a permutation of the train windows: of all windows of T tokens at
stride 1, the share that is not held out. Neighbouring windows share T - 1 tokens, so the split
leaks, as in the experiment that is reproduced.
"""

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from research.config import ConfigError
from research.data.tokens import Corpus


@dataclass(frozen=True, eq=False)
class Targets:
    """Held-out tokens that every strategy is scored on: runs of `run_length` neighbours.

    `positions` int64 [n] in `corpus.heldout`, rising; `documents` int32 [n], the held-out document
    of each.
    """

    positions: np.ndarray
    documents: np.ndarray
    run_length: int


def batch(corpus: Corpus, config: Any, cursor: int) -> dict[str, np.ndarray]:
    """A step that begins after `cursor` tokens: int32 `inputs` [B, T] and `targets` [B, T] (-1: not scored).

    With config.data.mask_documents also int32 `segments` [B, T], from 1, one for each stretch of a
    document in a row, and `positions` [B, T], counted from the start of the stretch. Under
    `published` the cursor counts whole windows.
    """
    shape = config.batch_size, config.seq_len
    if corpus.protocol == "published":
        windows = np.arange(shape[0]) + cursor // shape[1]
        return window_rows(corpus.train, _train_windows(corpus, config, windows), shape[1])
    size, blocks, slack = _layout(corpus, config)
    places_N = np.arange(cursor, cursor + shape[0] * shape[1])
    first, last = cursor // size, (cursor + shape[0] * shape[1] - 1) // size
    starts = []
    for epoch, group in itertools.groupby(range(first, last + 1), key=lambda block: block // blocks):
        order = _permutation(blocks, config.seed, f"blocks of epoch {epoch}")
        offset = _draw(config.seed, f"offset of epoch {epoch}") % (slack + 1)
        starts += [offset + size * order[block % blocks] for block in group]
    sources_N = np.array(starts)[places_N // size - first] + places_N % size
    rows = {
        "inputs": corpus.train[sources_N].reshape(shape).astype(np.int32),
        "targets": corpus.train[sources_N + 1].reshape(shape).astype(np.int32),
    }
    if corpus.train_scored is not None:
        rows["targets"][~corpus.train_scored[sources_N + 1].reshape(shape)] = -1
    if config.data.mask_documents:
        rows |= _document_rows(corpus.train_starts, sources_N.reshape(shape))
    return rows


def epoch_tokens(corpus: Corpus, config: Any) -> int:
    """Tokens of one epoch: of its blocks, or of all train windows under `published`.

    Raises: ConfigError where the train split is shorter than one block, or than one window.
    """
    if corpus.protocol == "published":
        return _count_windows(corpus, config)[0] * config.seq_len
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


def validation_windows(corpus: Corpus, config: Any, count: int) -> np.ndarray:
    """Starts int64 [count] in `corpus.heldout` of drawn held-out windows of T tokens; all there are
    where fewer.

    Under `published` windows at stride 1 that no epoch holds; under `clean` windows that do not
    overlap.
    Raises: ConfigError where there is none.
    """
    if corpus.protocol == "published":
        train, heldout = _count_windows(corpus, config)
        order = _permutation(train + heldout, config.data.split_seed, "window split")
        starts = [order[train + i] for i in range(min(count, heldout))]
    else:
        heldout = (len(corpus.heldout) - 1) // config.seq_len
        order = _permutation(heldout, config.data.split_seed, "held-out windows") if heldout else []
        starts = [order[i] * config.seq_len for i in range(min(count, heldout))]
    if not starts:
        message = f"the held-out split has {len(corpus.heldout)} tokens, no window of this length"
        raise ConfigError("config.seq_len", config.seq_len, message)
    return np.array(starts, np.int64)


def own_length_windows(corpus: Corpus, config: Any) -> dict[str, np.ndarray]:
    """Held-out windows of the training length, as rows like those of `batch`.

    As many whole windows as make up config.eval.own_targets, and at least one.
    """
    starts = _own_starts(corpus, config)
    rows = window_rows(corpus.heldout, starts, config.seq_len)
    if config.data.mask_documents:
        rows |= _document_rows(corpus.heldout_starts, starts[:, None] + np.arange(config.seq_len))
    return rows


def own_length_places(corpus: Corpus, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """int32 [W, T] of the targets of `own_length_windows`: their held-out documents, and their places in these.

    A place is the number of tokens of the document before the target.
    """
    targets_WT = _own_starts(corpus, config)[:, None] + np.arange(1, config.seq_len + 1)
    documents_WT = np.searchsorted(corpus.heldout_starts, targets_WT, side="right") - 1
    places_WT = targets_WT - corpus.heldout_starts[documents_WT]
    return documents_WT.astype(np.int32), places_WT.astype(np.int32)


def _own_starts(corpus: Corpus, config: Any) -> np.ndarray:
    return validation_windows(corpus, config, max(1, config.eval.own_targets // config.seq_len))


def heldout_targets(corpus: Corpus, config: Any) -> Targets:
    """The held-out targets: a pure function of (corpus, data.split_seed, eval.contexts,
    eval.num_targets).

    With c the longest context, a run is eval.run_length neighbours (c / 4 at most) of one document
    with more than c tokens of it before them. Runs do not overlap, and are drawn from as many documents as possible: a
    second of one only when each has given its first.
    Raises: ConfigError where the contexts are no multiples of 4, or too few targets have so much
    before them.
    """
    contexts, wanted = tuple(config.eval.contexts), config.eval.num_targets
    if not contexts or any(context < 4 or context % 4 for context in contexts):
        raise ConfigError("config.eval.contexts", contexts, "give multiples of 4 tokens, such as (24, 96)")
    longest = max(contexts)
    length = _run_length(longest, config)
    if wanted < length:
        message = f"a run of targets is {length}; give as many or more"
        raise ConfigError("config.eval.num_targets", wanted, message)
    runs_D = _count_runs(corpus, longest, length)
    if runs_D.sum() < wanted // length:
        raise _too_few_targets(corpus, config)
    owners_R = np.repeat(np.arange(len(runs_D)), runs_D)
    nth_R = np.arange(len(owners_R)) - np.repeat(np.cumsum(runs_D) - runs_D, runs_D)
    firsts_R = corpus.heldout_starts[owners_R] + longest + 1 + nth_R * length
    chosen = _spread(owners_R, len(runs_D), wanted // length, config.data.split_seed)
    return Targets(
        positions=(firsts_R[chosen][:, None] + np.arange(length)).reshape(-1),
        documents=np.repeat(owners_R[chosen], length).astype(np.int32),
        run_length=length,
    )


def context_windows(targets: Targets, corpus: Corpus, context: int) -> dict[str, np.ndarray]:
    """Windows int32 `inputs` and `targets` [W, c + n] that score each target once.

    The last n targets of a window are scored, n being a run of targets or c / 4, what is less, with
    c + 1 to c + n tokens before them; the others are -1. Read row by row they come in the order of `targets`.
    Raises: ConfigError where `context` is no multiple of 4, or longer than the longest that the
    targets were drawn for.
    """
    if context < 4 or context % 4:
        raise ConfigError("config.eval.contexts", context, "give multiples of 4 tokens, such as (24, 96)")
    length = window_length(context, targets.run_length)
    stride = length - context
    begins = np.arange(0, targets.run_length, stride)
    ends = np.minimum(begins + stride, targets.run_length)
    runs = targets.positions.reshape(-1, targets.run_length)
    starts_W = (runs[:, ends - 1] - length).reshape(-1)
    owners_W = targets.documents.reshape(runs.shape)[:, begins].reshape(-1)
    if (starts_W < corpus.heldout_starts[owners_W]).any():
        raise ConfigError("config.eval.contexts", context, "longer than the contexts of these targets")
    rows = window_rows(corpus.heldout, starts_W, length)
    scored_W = np.tile(ends - begins, len(runs))  # a run's last window may score fewer
    rows["targets"][np.arange(length) < length - scored_W[:, None]] = -1
    return rows


def window_length(context: int, run_length: int) -> int:
    """Tokens of a window that scores a run of targets, or a part of it, with `context` tokens before each."""
    return context + min(context // 4, run_length)


def longest_window(config: Any) -> int:
    """Tokens of the longest window that a run is scored on, at its end: of its contexts, or whole recall documents."""
    if config.data.source == "recall":
        return max(config.seq_len, config.data.recall.document_length)
    return max(config.seq_len, *(window_length(c, config.eval.run_length) for c in config.eval.contexts))


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


def _count_windows(corpus: Corpus, config: Any) -> tuple[int, int]:
    """(train, held-out) windows of T tokens at stride 1, each with the target of its last token."""
    windows = len(corpus.train) - config.seq_len
    if windows < 2:
        message = f"the corpus has {len(corpus.train)} tokens, too few for windows of this length"
        raise ConfigError("config.seq_len", config.seq_len, message)
    heldout = max(1, int(windows * config.data.heldout_fraction))
    return windows - heldout, heldout


def _train_windows(corpus: Corpus, config: Any, indices: np.ndarray) -> np.ndarray:
    """Starts of the train windows at places `indices` of the run."""
    train, heldout = _count_windows(corpus, config)
    split = _permutation(train + heldout, config.data.split_seed, "window split")
    starts = []
    for epoch, group in itertools.groupby(indices.tolist(), key=lambda index: index // train):
        order = _permutation(train, config.seed, f"windows of epoch {epoch}")
        starts += [split[order[index % train]] for index in group]
    return np.array(starts)


def _document_rows(document_starts: np.ndarray, sources_BT: np.ndarray) -> dict[str, np.ndarray]:
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


def _run_length(context: int, config: Any) -> int:
    """Neighbouring targets of a run, when `context` is the longest."""
    return min(context // 4, config.eval.run_length)


def _count_runs(corpus: Corpus, context: int, length: int) -> np.ndarray:
    """int64 [documents]: runs of `length` targets that each held-out document has room for."""
    lengths_D = np.diff(corpus.heldout_starts, append=len(corpus.heldout))
    return np.maximum((lengths_D - context - 1) // length, 0)


def _spread(owners_R: np.ndarray, documents: int, count: int, seed: int) -> np.ndarray:
    """Rising indices of `count` drawn runs; owners_R (rising) says whose each run is."""
    # random_raw: numpy keeps a bit generator's stream the same over versions, but not its
    # distributions
    keys_R = np.random.PCG64(_draw(seed, "runs of targets")).random_raw(len(owners_R))
    keys_D = np.random.PCG64(_draw(seed, "documents of targets")).random_raw(documents)
    drawn = np.lexsort((keys_R, owners_R))
    rounds_R = np.empty(len(owners_R), np.int64)
    rounds_R[drawn] = np.arange(len(owners_R)) - np.searchsorted(owners_R, owners_R)
    return np.sort(np.lexsort((keys_D[owners_R], rounds_R))[:count])


def _too_few_targets(corpus: Corpus, config: Any) -> ConfigError:
    """The error that says how many targets there are, and which context would do."""
    contexts, wanted = tuple(config.eval.contexts), config.eval.num_targets

    def count(context: int) -> int:
        length = _run_length(context, config)
        return int(_count_runs(corpus, context, length).sum()) * length

    def works(context: int) -> bool:
        return count(context) >= wanted // _run_length(context, config) * _run_length(context, config)

    longest = max(contexts)
    there = count(longest)
    found = f"the held-out documents have {there} targets with {longest} tokens before them"
    if not works(4):
        message = f"{found}; no context has as many: lower it, or give more text"
        return ConfigError("config.eval.num_targets", wanted, message)
    low, high = 1, longest // 4  # in fours: low works, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(4 * middle) else (low, middle)
    advice = f"lower the longest to {4 * low} or config.eval.num_targets={wanted}, or give more text"
    return ConfigError("config.eval.contexts", contexts, f"{found}; {advice}")


def _permutation(size: int, seed: int, purpose: str) -> grain.MapDataset:
    """A permutation of range(size), by random access."""
    # hashed, as grain adds the epoch to its seed: epoch 1 of seed 42 would be epoch 0 of seed 43
    return grain.MapDataset.range(size).shuffle(seed=_draw(seed, purpose) % 2**32)


def _draw(seed: int, purpose: str) -> int:
    """A uniform number of 64 bits for one purpose of a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest())
