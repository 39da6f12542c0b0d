"""Rows that change their length during a run: the same tokens per step, cut shorter in the stages before the last.

config.train.stages names what comes before rows of config.seq_len: ((128, 0.5), (512, 0.25)) are rows of 128 tokens for
half of the steps, of 512 for a quarter, and of config.seq_len for the rest. Press et al. 2020 (arXiv:2012.15832) train
so in two stages, Li et al. 2021 (arXiv:2108.06084) in many.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from research.config import ConfigError, ends_of_stages, shorter_stages
from research.flops import train_flops_per_token


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps `first` to `end` (excluded) of a run, each of `batch_size` rows of `seq_len` tokens."""

    first: int
    end: int
    batch_size: int
    seq_len: int

    @property
    def steps(self) -> int:
        return self.end - self.first


def stages_of(config: Any) -> tuple[Stage, ...]:
    """Those of a valid config, in order; one where its rows have one length."""
    lengths = [*(length for length, _ in shorter_stages(config)), config.seq_len]
    ends = ends_of_stages(config)
    tokens = config.batch_size * config.seq_len
    return tuple(
        Stage(first, end, tokens // length, length)
        for first, end, length in zip((0, *ends), ends, lengths, strict=False)
    )


def stage_at(found: tuple[Stage, ...], step: int) -> Stage:
    """The stage of the step that follows `step` finished ones; of the last one, after the last."""
    return next((stage for stage in found if step < stage.end), found[-1])


def flops_until(model: Any, found: tuple[Stage, ...], now: int) -> float:
    """Model FLOPs of the first `now` steps, by a config.model."""
    return sum(
        max(0, min(now, s.end) - s.first) * s.batch_size * s.seq_len * train_flops_per_token(model, s.seq_len)
        for s in found
    )


def alone(config: Any, stage: Stage) -> ConfigDict:
    """The config of a run in rows of this stage throughout: its step is the same program."""
    changed = ConfigDict(config.to_dict())
    changed.update(batch_size=stage.batch_size, seq_len=stage.seq_len)
    changed.train.stages = None
    return changed


def refuse_stages(config: Any) -> None:
    """Raises: ConfigError where rows grow, for what measures rows of one length."""
    if shorter_stages(config):
        message = "here rows have one length; add --config.train.stages=()"
        raise ConfigError("config.train.stages", config.train.stages, message)
