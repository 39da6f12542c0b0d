"""The recall task (MQAR): is a value still known that was last said `distance` tokens ago?

A document is records (key value) with filler between them. A record binds a new key to a value, or asks for a bound key
again, `distance` tokens after it was last said; what follows is its value, to be known:

    . k1 v1 . . k2 v2 k1 [v1] . k3 v3 . k2 [v2] . . k3 [v3] k1 [v1] . <eot>

The vocabularies of filler, keys and values are disjoint; values are drawn independently, so chance is 1 / values. The
octave of a distance is drawn evenly from [shortest, 2 shortest) to [longest / 2, longest), then the key evenly from
those that are as long ago. Only answers are scored; held-out ones after the first `longest` tokens of a document, where
every distance is possible, so that distance and place in the document are independent.

Each document to train on has a longest distance of its own, an octave drawn evenly: with all distances in every
document the task is not learnt in 3 M tokens; documents of near distances teach how to look up, the far ones follow.
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

FORMAT = 2  # raise it when the same fields make other documents
EOT = 0  # then fillers, keys, values
NEVER = -(1 << 30)  # a key that was not said yet


def open_recall(config: Any) -> Corpus:
    """The corpus of config.data.recall: a pure function of its fields and of config.data.split_seed.

    Each split is whole documents and one token more, so that blocks whose length divides a document's begin where
    documents begin, and a row holds one document only.
    Raises: ConfigError where the task is more than the model's vocabulary, or more than a document holds.
    """
    task, seed = config.data.recall, config.data.split_seed
    check(config)
    splits = {
        split: make_documents(task, count, f"{seed} recall {split}", training=split == "train")
        for split, count in (("train", task.documents), ("heldout", task.heldout_documents))
    }
    for name, split in (("documents", "train"), ("heldout_documents", "heldout")):
        if not splits[split][1].any():
            message = "none of them asks for a key again; give more, or a smaller config.data.recall.new_share"
            raise ConfigError(f"config.data.recall.{name}", task[name], message)
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
        if task[name] < (0 if name in ("new_share", "max_gap") else 1):
            refuse(name, "must be 1 or more" if name not in ("new_share", "max_gap") else "must be 0 or more")
    if not 0 < task.new_share < 1:
        refuse("new_share", "must lie between 0 and 1, both excluded")
    octaves = np.log2(task.longest / task.shortest)
    if task.shortest < 2 or octaves < 1 or octaves % 1:
        refuse("longest", f"must be config.data.recall.shortest={task.shortest} (2 or more) doubled once or more")
    if 2 * task.longest > length:
        refuse("document_length", f"must be twice config.data.recall.longest={task.longest} or more: half is scored")
    if max(length, config.seq_len) % min(length, config.seq_len) or config.seq_len > length or config.seq_len % 4:
        refuse("document_length", f"must be a multiple of config.seq_len={config.seq_len}, itself a multiple of 4")
    size = 1 + task.num_fillers + task.num_keys + task.num_values
    if size > config.model.vocab_size:
        message = f"the recall task has {size} tokens (end of text, fillers, keys, values); give as many or more"
        raise ConfigError("config.model.vocab_size", config.model.vocab_size, message)
    if size > 1 << 16:
        refuse("num_fillers", f"with keys and values the task has {size} tokens, and 65536 is the most")


def make_documents(task: Any, count: int, purpose: str, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """(tokens uint16, scored bool), both [count * document_length + 1]; `purpose` names what is drawn.

    `training`: each document has a longest distance of its own, and all its answers are scored.
    """
    drawn, length = _Draws(purpose), task.document_length
    first_key, first_value = 1 + task.num_fillers, 1 + task.num_fillers + task.num_keys
    tokens = 1 + drawn.below(task.num_fillers, (count, length))
    scored = np.zeros((count, length), bool)
    names = first_key + np.argsort(drawn.raw((count, task.num_keys)), axis=1, kind="stable")
    values = first_value + drawn.below(task.num_values, (count, task.num_keys))
    octaves = np.full(count, int(np.log2(task.longest / task.shortest)))
    if training:
        octaves = 1 + drawn.below(octaves, (count,))
    last, used = np.full((count, task.num_keys), NEVER), np.zeros(count, np.int64)
    at = drawn.below(task.max_gap + 1, (count,))
    while (at < length - 2).any():
        key, asked = _next_keys(task, drawn, octaves, at[:, None] - last, used)
        rows = np.nonzero((key >= 0) & (at < length - 2))[0]
        place, key, asked = at[rows], key[rows], asked[rows]
        tokens[rows, place], tokens[rows, place + 1] = names[rows, key], values[rows, key]
        scored[rows, place + 1] = asked & (training | (place >= task.longest))
        last[rows, key] = place
        used[rows] += ~asked
        at += 2 + drawn.below(task.max_gap + 1, (count,))
    tokens[:, -1] = EOT
    return np.append(tokens, EOT).astype(np.uint16), np.append(scored, False)


def _next_keys(task, drawn, octaves, age_DK, used) -> tuple[np.ndarray, np.ndarray]:
    """(key, asked) [documents] of the next record of each: a bound key of a drawn octave of ages, else a new one.

    Keys are bound in order 0, 1, ...; -1 where none of that age is bound and no new one is left.
    """
    documents = len(used)
    new = drawn.raw((documents,)) < np.uint64(int(task.new_share * 2**64))
    shortest = task.shortest * 2 ** drawn.below(octaves, (documents,))[:, None]
    fits_DK = (age_DK >= shortest) & (age_DK < 2 * shortest) & ~new[:, None]
    number = drawn.below(np.maximum(fits_DK.sum(1), 1), (documents,))[:, None]
    asked = fits_DK.any(1)
    key = np.argmax(fits_DK & (np.cumsum(fits_DK, axis=1) == number + 1), axis=1)
    left = used < task.num_keys
    return np.where(asked, key, np.where(left, used, -1)), asked


class _Draws:
    """Whole numbers that are the same on every machine: numpy keeps a bit generator's stream, not its distributions."""

    def __init__(self, purpose: str):
        digest = hashlib.blake2b(purpose.encode(), digest_size=16).digest()
        self.generator = np.random.PCG64(int.from_bytes(digest))

    def raw(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.generator.random_raw(int(np.prod(shape))).reshape(shape)

    def below(self, limit: Any, shape: tuple[int, ...]) -> np.ndarray:
        return (self.raw(shape) % np.asarray(limit, np.uint64)).astype(np.int64)


def answers(corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions int64, documents int32, distances int32), each [n], of the held-out answers, rising."""
    positions = np.nonzero(corpus.heldout_scored)[0]
    documents = np.searchsorted(corpus.heldout_starts, positions, side="right") - 1
    distances = []
    for position, document in zip(positions, documents, strict=True):
        before = corpus.heldout[corpus.heldout_starts[document] : position - 1]
        distances.append(len(before) - np.nonzero(before == corpus.heldout[position - 1])[0][-1])
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
