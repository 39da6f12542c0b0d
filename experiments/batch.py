"""The batch that every contestant of the benchmark trains on."""

import numpy as np
from ml_collections import ConfigDict


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """inputs and targets int32 [B, T]: the same for all implementations."""
    rng = np.random.default_rng(config.seed)
    shape = (config.batch_size, config.seq_len + 1)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    return dict(inputs=tokens[:, :-1], targets=tokens[:, 1:])
