"""A corpus whose token i is i: where a token came from can be read off it."""

import numpy as np
import pytest
from hypothesis import settings

from configs import base
from research.config import ConfigError
from research.data.tokens import Corpus

FEW = settings(max_examples=40, deadline=None)


def make_corpus(train: int = 1000, heldout_lengths=(300, 40, 200), protocol: str = "clean") -> Corpus:
    heldout_starts = np.cumsum([0, *heldout_lengths[:-1]], dtype=np.int64)
    train_starts = np.arange(0, train, 37, dtype=np.int64)
    tokens_N = np.arange(train, dtype=np.uint32)
    heldout_N = np.arange(sum(heldout_lengths), dtype=np.uint32)
    if protocol == "published":
        heldout_N, heldout_starts, train_starts = (
            tokens_N,
            np.zeros(1, np.int64),
            np.zeros(1, np.int64),
        )
    return Corpus(
        train=tokens_N,
        heldout=heldout_N,
        train_starts=train_starts,
        heldout_starts=heldout_starts,
        token_bytes=np.ones(train, np.int32),
        eot=0,
        manifest={},
        fingerprint="",
        protocol=protocol,
    )


def make_config(rows: int = 4, length: int = 16, block: int = 0, seed: int = 42, **data):
    config = base.get_config("cpu")
    config.train.tokens = None  # a test says its steps
    config.seed, config.data.split_seed = seed, seed
    config.batch_size, config.seq_len = rows, length
    config.data.update(shuffle_block=block, **data)
    return config


def with_eval(contexts: tuple[int, ...], num_targets: int, seed: int = 42):
    config = make_config(seed=seed)
    config.eval.contexts, config.eval.num_targets = contexts, num_targets
    return config


def refuse(function, *args) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)
