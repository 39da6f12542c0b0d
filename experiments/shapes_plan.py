"""What a study of shapes is made of: which shapes at which budgets, how their learning rates are found, its runs."""

import argparse
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import grid, tune
from experiments.strategies import flags, load_strategy, names, train_command
from research.analysis import runs, shapes
from research.config import ConfigError


@dataclass(frozen=True)
class Plan:
    """A study as its arguments describe it. `tunes`: budget -> how learning rates are found; `tokens`: of a run.

    `largest`: tokens per step. The largest steps make equal tokens and equal steps of the same runs.
    """

    workdir: Path
    tunes: Mapping[str, tune.Plan]
    seeds: tuple[int, ...]
    tokens: int
    largest: int

    @property
    def steps(self) -> int:
        return self.tokens // self.largest

    @property
    def shapes(self) -> list[str]:
        return list(self.tunes["tokens"].given)


@dataclass(frozen=True)
class Run:
    """One that compares: at equal `tokens` or at equal `steps` (shapes.BUDGETS), at the learning rate found."""

    shape: str
    budget: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.budget}-rate{self.rate:g}-seed{self.seed}"


def make_plan(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> Plan:
    """Raises: ConfigError for whatever is wrong with an argument."""
    lengths, sizes, seeds = (_numbers(arguments, name) for name in ("lengths", "tokens_per_step", "seeds"))
    for size, length in itertools.product(sizes, lengths):
        if size % length:
            raise ConfigError("--tokens_per_step", size, f"is no whole number of rows of {length} tokens")
    if len(sizes) < 2:
        raise ConfigError("--tokens_per_step", arguments.tokens_per_step, "name at least two: they are compared")
    given = [f"{size // length}x{length}" for length, size in itertools.product(lengths, sizes)]
    everyone = _tune(arguments, "tokens", given, overrides)
    config = load_strategy(given[0], arguments.scale, flags(overrides))
    _check(config, sizes)
    if config.seed in seeds:
        message = f"give seeds other than {config.seed} (config.seed), which chooses the learning rates"
        raise ConfigError("--seeds", arguments.seeds, message)
    smaller = [shape for shape in given if tokens_per_step(shape) < max(sizes)]
    alike = {name: value for name, value in overrides.items() if name != "train.tokens"}
    steps = {"train.steps": str(config.train.tokens // max(sizes))}
    tunes = {"tokens": everyone, "steps": _tune(arguments, "steps", smaller, alike | steps)}
    return Plan(arguments.workdir, tunes, tuple(seeds), config.train.tokens, max(sizes))


def _check(config: ConfigDict, sizes: Sequence[int]) -> None:
    if config.train.steps is not None:
        message = "shapes have steps of unlike size: give config.train.tokens"
        raise ConfigError("config.train.steps", config.train.steps, message)
    if config.train.stages:
        message = "a shape has rows of one length: leave it out"
        raise ConfigError("config.train.stages", config.train.stages, message)
    if config.train.tokens <= 0 or any(config.train.tokens % size for size in sizes):
        message = f"is no whole number of steps: give a multiple of {math.lcm(*sizes):,}"
        raise ConfigError("config.train.tokens", config.train.tokens, message)


def _tune(arguments: argparse.Namespace, budget: str, given: list[str], overrides: Mapping[str, str]) -> tune.Plan:
    workdir, field = arguments.workdir / f"tune_{budget}", "optimizer.learning_rate"
    return tune.make_plan(workdir, arguments.scale, given, field, arguments.limit, overrides)


def _numbers(arguments: argparse.Namespace, name: str) -> list[int]:
    """Rising, each once."""
    text = getattr(arguments, name)
    known = all(part.isascii() and part.isdecimal() for part in names(text)) and names(text)
    if not known or (name != "seeds" and 0 in map(int, names(text))):
        raise ConfigError(f"--{name}", text, "give whole numbers, divided by commas" + " above 0" * (name != "seeds"))
    return sorted({int(part) for part in names(text)})


def identity(plan: Plan) -> dict[str, Any]:
    """What a folder holds one of; seeds may be added."""
    about = {"shapes": plan.shapes, "tokens": plan.tokens}
    return about | {"overrides": dict(sorted(plan.tunes["tokens"].overrides.items()))}


def best_rate(tuning: tune.Plan, shape: str) -> float | None:
    """Where the loss is lowest; None where no value has one, or one that was tried has failed or is not made yet."""
    losses = {value: tune.loss(tuning, shape, value) for value in tune.values(tuning, shape)}
    return None if None in losses.values() else runs.lowest(losses, tuning.given[shape])


def planned(plan: Plan) -> list[Run]:
    """The runs that compare, seed by seed, of the shapes whose learning rates are found."""
    rates = {(s, budget): best_rate(tuning, s) for budget, tuning in plan.tunes.items() for s in tuning.given}
    every = itertools.product(plan.seeds, rates.items())
    return [Run(shape, budget, seed, rate) for seed, ((shape, budget), rate) in every if rate is not None]


def tokens_per_step(shape: str) -> int:
    rows, length = shapes.sizes(shape)
    return rows * length


def fields_of(plan: Plan, run: Run) -> dict[str, str]:
    return tune.fields_of(plan.tunes[run.budget], run.rate) | {"seed": str(run.seed)}


def command(plan: Plan, run: Run, train: Sequence[str]) -> list[str]:
    scale = plan.tunes[run.budget].scale
    return train_command(train, run.shape, scale, plan.workdir / run.name, fields_of(plan, run))


def describe(plan: Plan, train: Sequence[str]) -> list[str]:
    """The commands that are known beforehand."""
    lines = []
    for budget, tuning in plan.tunes.items():
        known = [(shape, value) for shape, middle in tuning.given.items() for value in grid.first(middle)]
        lines += [f"# learning rates at equal {budget}", *(shlex.join(tune.command(tuning, *k, train)) for k in known)]
        lines += [f"# and outwards while the best lies on the edge, to {tuning.limit} values of a shape at most"]
    runs_each = sum(len(tuning.given) for tuning in plan.tunes.values())
    return lines + [f"# {runs_each} runs of each seed ({','.join(map(str, plan.seeds))}): every shape at its best"]
