"""Balanced: rows of a middle length.

Hypothesis of the original experiment: wins on held-out loss at equal memory.
    python -m experiments.train --config=configs/balanced.py:cpu --workdir=runs/balanced
"""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str = "cpu") -> ConfigDict:
    config = base.get_config(scale)
    config.strategy = "balanced"
    shapes = dict(cpu=(16, 512), published=(26, 1024), recall=(128, 64))
    config.batch_size, config.seq_len = shapes[scale]
    return config
