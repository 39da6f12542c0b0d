"""Growing: short rows first, long ones last; at every step as many tokens.

Hypothesis: short rows teach most of what a token is worth, and long ones, at the end, what far context is for.
    python -m experiments.ablation --workdir=runs/growing --strategies=large_batch,balanced,long_seq,growing
"""

from ml_collections import ConfigDict

from configs import balanced, large_batch, long_seq

SHARES = (0.5, 0.25)  # of the steps: rows as short as large_batch's, then as balanced's, then as long_seq's


def get_config(scale: str = "cpu") -> ConfigDict:
    config = long_seq.get_config(scale)
    config.strategy = "growing"
    lengths = (strategy.get_config(scale).seq_len for strategy in (large_batch, balanced))
    config.train.stages = tuple(zip(lengths, SHARES, strict=True))
    return config
