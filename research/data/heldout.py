"""Held-out tokens that a run is scored on: the same targets for every strategy, and windows of its own length.

The targets are runs of neighbours with as much of their document before them as the longest context; each context then
reads the same targets with less before them. Windows of the training length are what the original scored.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from research.config import ConfigError
from research.data import stream
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


def targets(corpus: Corpus, config: Any) -> Targets:
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


def repeats(targets: Targets, corpus: Corpus) -> np.ndarray:
    """int32 [n]: how many tokens before each target the same pair, of the token before it and itself, was last seen in
    its document; 0 where it was not."""
    found = np.zeros(len(targets.positions), np.int32)
    ends = np.append(corpus.heldout_starts[1:], len(corpus.heldout))
    for document in np.unique(targets.documents):
        begin, mine = corpus.heldout_starts[document], targets.documents == document
        tokens_N = np.asarray(corpus.heldout[begin : ends[document]], np.int64)
        pairs_N = (tokens_N[:-1] << 32) | tokens_N[1:]
        order = np.argsort(pairs_N, kind="stable")  # equal pairs side by side, in the order of the text
        again = np.flatnonzero(pairs_N[order[1:]] == pairs_N[order[:-1]])
        back_N = np.zeros(len(pairs_N), np.int32)
        back_N[order[again + 1]] = order[again + 1] - order[again]
        found[mine] = back_N[targets.positions[mine] - begin - 1]
    return found


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
    rows = stream.window_rows(corpus.heldout, starts_W, length)
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


def validation_windows(corpus: Corpus, config: Any, count: int) -> np.ndarray:
    """Starts int64 [count] in `corpus.heldout` of drawn held-out windows of T tokens; all there are
    where fewer.

    Under `published` windows at stride 1 that no epoch holds; under `clean` windows that do not
    overlap.
    Raises: ConfigError where there is none.
    """
    if corpus.protocol == "published":
        train, heldout = stream.count_windows(corpus, config)
        order = stream.permutation(train + heldout, config.data.split_seed, "window split")
        starts = [order[train + i] for i in range(min(count, heldout))]
    else:
        heldout = (len(corpus.heldout) - 1) // config.seq_len
        order = stream.permutation(heldout, config.data.split_seed, "held-out windows") if heldout else []
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
    rows = stream.window_rows(corpus.heldout, starts, config.seq_len)
    if config.data.mask_documents:
        rows |= stream.document_rows(corpus.heldout_starts, starts[:, None] + np.arange(config.seq_len))
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
    keys_R = np.random.PCG64(stream.draw(seed, "runs of targets")).random_raw(len(owners_R))
    keys_D = np.random.PCG64(stream.draw(seed, "documents of targets")).random_raw(documents)
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
