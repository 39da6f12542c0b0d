"""Strategies by name: a file of configs/ such as balanced, or a shape such as 64x128, 64 rows of 128 tokens.

A shape is configs/base.py with that batch size and length, so that a study can ask for any of them without a file.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.flags import load_config
from research.config import ConfigError

STRATEGIES = ("large_batch", "balanced", "long_seq")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HELP = "names of configs/*.py, or shapes such as 64x128, rows x tokens"
_SHAPE = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")
_FIELDS = ("strategy", "batch_size", "seq_len")


def names(text: str) -> list[str]:
    """Of a list such as a,b; each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def load_strategy(strategy: str, scale: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a strategy as `experiments.train` will read it.

    Raises: ConfigError for a strategy, scale, field or value that is not there, or a shape that is given twice.
    """
    own = shape_flags(strategy)
    if not (own or _path(strategy).exists()):
        message = f"no such file {strategy}.py in {CONFIGS}, and no shape such as 64x128, rows x tokens"
        raise ConfigError("--strategies", strategy, message)
    for field in _FIELDS:
        if own and any(override.partition("=")[0] == f"--config.{field}" for override in overrides):
            message = f"the strategy {strategy} is a shape, and says it already; leave one of them out"
            raise ConfigError(f"config.{field}", "given", message)
    return load_config(f"{_path(strategy)}:{scale}", [*own, *overrides])


def config_file(strategy: str, scale: str) -> str:
    """What --config is given, from the folder that the process is in."""
    path = _path(strategy)
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{scale}"


def train_command(
    train: Sequence[str], strategy: str, scale: str, workdir: Path, fields: Mapping[str, Any]
) -> list[str]:
    """That trains a strategy in `workdir` with these fields of its config."""
    about = [f"--config={config_file(strategy, scale)}", f"--workdir={workdir}"]
    return [*train, *about, *shape_flags(strategy), *flags(fields)]


def flags(fields: Mapping[str, Any]) -> list[str]:
    """--config.field=value of each."""
    return [f"--config.{field}={value}" for field, value in fields.items()]


def shape_flags(strategy: str) -> list[str]:
    """The overrides that make base.py that shape; none for the name of a file."""
    found = _SHAPE.fullmatch(strategy)
    if not found:
        return []
    values = (strategy, *found.groups())
    return flags(dict(zip(_FIELDS, values, strict=True)))


def _path(strategy: str) -> Path:
    return CONFIGS / f"{'base' if shape_flags(strategy) else strategy}.py"
