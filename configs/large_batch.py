"""Large batch: many short rows.

Hypothesis of the original experiment: the least gradient noise and the fastest steps, but the highest final loss.
    python -m experiments.train --config=configs/large_batch.py:cpu --workdir=runs/large_batch
"""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str = "cpu") -> ConfigDict:
    config = base.get_config(scale)
    config.strategy = "large_batch"
    if scale == "published":
        config.batch_size, config.seq_len = 104, 256
    else:
        config.batch_size, config.seq_len = 64, 128
        config.train.tokens = base.TOKENS[scale]
    return config
