"""Large batch: many short rows.

Hypothesis of the original experiment: the least gradient noise and the fastest steps, but the highest final loss.
    python -m experiments.train --config=configs/large_batch.py:cpu --workdir=runs/large_batch
"""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str = "cpu") -> ConfigDict:
    config = base.get_config(scale)
    config.strategy = "large_batch"
    shapes = dict(cpu=(64, 128), published=(104, 256), recall=(256, 32))
    config.batch_size, config.seq_len = shapes[scale]
    return config
