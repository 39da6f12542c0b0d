"""The recall task (MQAR): is a value still known that was said `distance` tokens ago?

A document holds pairs (key value) whose keys are unique in it. Each key comes once more, `distance` tokens later, and
its value is to follow; filler is everywhere else:

    . . k1 v1 . . k2 v2 . . . k1 [v1] . . . . . k2 [v2] . . <eot>

The vocabularies of filler, keys and values are disjoint; values are drawn independently, so chance is 1 / values. The
octave of a distance is drawn evenly from [shortest, 2 shortest) to [longest / 2, longest), the distance evenly within
it, and the place of the pair whatever the distance is. Only answers are scored.

After Arora et al. 2023 (Zoology, arXiv:2312.04927), whose documents begin with all pairs, so that distance and place
go together.
"""

import hashlib
import json
from typing import Any

import numpy as np

from research.config import ConfigError
from research.data import stream
from research.data.tokens import Corpus

FORMAT = 1  # raise it when the same fields make other documents
EOT = 0  # then fillers, keys, values
ATTEMPTS = 1000  # to find room for a pair and its query


def open_recall(config: Any) -> Corpus:
    """The corpus of config.data.recall: a pure function of its fields and of config.data.split_seed.

    Each split is whole documents and one token more, so that blocks whose length divides a document's begin where
    documents begin, and a row holds one document only.
    Raises: ConfigError where the task is more than the model's vocabulary, or more than a document holds.
    """
    task, seed = config.data.recall, config.data.split_seed
    check(config)
    splits = {
        split: make_documents(task, count, f"{seed} recall {split}")
        for split, count in (("train", task.documents), ("heldout", task.heldout_documents))
    }
    fields = dict(task.to_dict(), format=FORMAT, split_seed=seed)
    contents = {
        f"{split}_{name}": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        for split, arrays in splits.items()
        for name, array in zip(("tokens", "scored"), arrays, strict=True)
    }
    fingerprint = hashlib.sha256(json.dumps([fields, contents], sort_keys=True).encode()).hexdigest()
    (train, train_scored), (heldout, heldout_scored) = splits["train"], splits["heldout"]
    return Corpus(
        train=train,
        heldout=heldout,
        train_starts=np.arange(task.documents) * task.document_length,
        heldout_starts=np.arange(task.heldout_documents) * task.document_length,
        token_bytes=np.zeros(config.model.vocab_size, np.int32),
        eot=EOT,
        manifest=dict(source="recall", protocol="clean", recall=fields, files=contents, fingerprint=fingerprint),
        fingerprint=fingerprint,
        protocol="clean",
        train_scored=train_scored,
        heldout_scored=heldout_scored,
    )


def check(config: Any) -> None:
    """Whether the fields of config.data.recall make a task. Raises: ConfigError for the first that does not."""
    task, length = config.data.recall, config.data.recall.document_length

    def refuse(name: str, message: str) -> None:
        raise ConfigError(f"config.data.recall.{name}", task[name], message)

    for name in task:
        if task[name] < 1:
            refuse(name, "must be 1 or more")
    octaves = np.log2(task.longest / task.shortest)
    if task.shortest < 2 or octaves < 1 or octaves % 1:
        refuse("longest", f"must be config.data.recall.shortest={task.shortest} (2 or more) doubled once or more")
    if task.longest + 4 > length:
        refuse("document_length", f"too short for distances of up to config.data.recall.longest={task.longest}")
    if 8 * task.pairs > length:
        refuse("pairs", f"pairs and queries would fill more than half of {length} tokens; give {length // 8} or fewer")
    if task.pairs > task.num_keys:
        refuse("pairs", f"keys are unique in a document, and there are config.data.recall.num_keys={task.num_keys}")
    if max(length, config.seq_len) % min(length, config.seq_len) or config.seq_len > length or config.seq_len % 4:
        refuse("document_length", f"must be a multiple of config.seq_len={config.seq_len}, itself a multiple of 4")
    size = 1 + task.num_fillers + task.num_keys + task.num_values
    if size > config.model.vocab_size:
        message = f"the recall task has {size} tokens (end of text, fillers, keys, values); give as many or more"
        raise ConfigError("config.model.vocab_size", config.model.vocab_size, message)


def make_documents(task: Any, count: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens uint16, scored bool), both [count * document_length + 1]; `purpose` names what is drawn."""
    drawn = _Draws(purpose)
    made = [_document(task, drawn) for _ in range(count)]
    tokens, scored = (np.concatenate(parts) for parts in zip(*made, strict=True))
    return np.append(tokens, EOT).astype(np.uint16), np.append(scored, False)


class _Draws:
    """Whole numbers that are the same on every machine: numpy keeps a bit generator's stream, not its distributions."""

    def __init__(self, purpose: str):
        digest = hashlib.blake2b(purpose.encode(), digest_size=16).digest()
        self.raw = np.random.PCG64(int.from_bytes(digest))

    def below(self, limit: int, count: int) -> np.ndarray:
        return (self.raw.random_raw(count) % np.uint64(limit)).astype(np.int64)


def _document(task: Any, drawn: _Draws) -> tuple[np.ndarray, np.ndarray]:
    length, octaves = task.document_length, int(np.log2(task.longest / task.shortest))
    tokens = 1 + drawn.below(task.num_fillers, length)
    tokens[-1] = EOT
    scored, free = np.zeros(length, bool), np.ones(length, bool)
    free[-1] = False
    keys = 1 + task.num_fillers + np.argsort(drawn.raw.random_raw(task.num_keys), kind="stable")[: task.pairs]
    values = 1 + task.num_fillers + task.num_keys + drawn.below(task.num_values, task.pairs)
    shortest = task.shortest * 2 ** drawn.below(octaves, task.pairs)
    distances = shortest + drawn.below(1 << 40, task.pairs) % shortest
    for key, value, distance in zip(keys, values, distances, strict=True):
        at = _room(free, int(distance), length - task.longest - 3, drawn)
        for place in (at, at + distance):
            tokens[place : place + 2] = key, value
            free[place : place + 2] = False
        scored[at + distance + 1] = True
    return tokens, scored


def _room(free: np.ndarray, distance: int, limit: int, drawn: _Draws) -> int:
    """A place for a pair, and `distance` later for its query; the distance is kept, whatever place it takes."""
    for at in drawn.below(limit, ATTEMPTS):
        if free[at] and free[at + 1] and free[at + distance] and free[at + distance + 1]:
            return int(at)
    raise ConfigError("config.data.recall.pairs", None, "no room for them in a document; give fewer")


def answers(corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions int64, documents int32, distances int32), each [n], of the held-out answers, rising."""
    positions = np.nonzero(corpus.heldout_scored)[0]
    documents = np.searchsorted(corpus.heldout_starts, positions, side="right") - 1
    distances = []
    for position, document in zip(positions, documents, strict=True):
        start = corpus.heldout_starts[document]
        key = corpus.heldout[position - 1]
        first = start + int(np.argmax(corpus.heldout[start:position] == key))
        distances.append(position - first - 1)
    return positions, documents.astype(np.int32), np.array(distances, np.int32)


def recall_windows(corpus: Corpus, config: Any) -> dict[str, tuple[int, dict[str, np.ndarray]]]:
    """Suite -> (context, windows): whole documents, and windows of the trained length, of the same answers in order.

    The second move on by a quarter: an answer has 0.75 T to T tokens before it, or all there are in its document.
    """
    length, T = config.data.recall.document_length, config.seq_len
    whole = stream.window_rows(corpus.heldout, corpus.heldout_starts, length)
    scored = np.stack([corpus.heldout_scored[s + 1 : s + length + 1] for s in corpus.heldout_starts])
    whole["targets"][~scored] = -1
    begins = np.arange(0, length - T + 1, T // 4)
    starts = (corpus.heldout_starts[:, None] + begins).reshape(-1)
    windows = stream.window_rows(corpus.heldout, starts, T)
    sources = starts[:, None] + np.arange(1, T + 1)
    fresh = (np.arange(T) >= T - T // 4) | (np.tile(begins, len(corpus.heldout_starts)) == 0)[:, None]
    windows["targets"][~(fresh & corpus.heldout_scored[sources])] = -1
    return {str(length): (length, whole), "window": (T, windows)}
