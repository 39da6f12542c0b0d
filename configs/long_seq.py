"""Long sequences: few rows, each long.

Hypothesis of the original experiment: learns long-range dependencies, and needs more time than it is given.
    python -m experiments.train --config=configs/long_seq.py:cpu --workdir=runs/long_seq
"""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str = "cpu") -> ConfigDict:
    config = base.get_config(scale)
    config.strategy = "long_seq"
    shapes = dict(cpu=(4, 2048), published=(6, 4096), recall=(64, 128))
    config.batch_size, config.seq_len = shapes[scale]
    return config
