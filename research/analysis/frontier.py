"""The memory frontier: for each length the largest batch whose step fits a budget, from compiled programs alone.

Memory is close to affine in the batch, so a line through two compiled programs finds the largest batch, and two more
prove it: that batch fits, and one row (a device, a microbatch) more does not.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from research import sharding, sizes
from research.analysis import memory
from research.analysis.programs import Programs
from research.config import ConfigError, validate
from research.data import heldout

GROWTH = 64  # times the largest batch that is known to fit: no guess goes further
SECANTS = 10  # measurements; memory that is so far from affine is halved instead
GUESS = 1 << 15  # tokens per step, where nothing is known
LIMIT = 1 << 20  # units of a batch: no one trains with more
COUNTED = 2**31 - 1  # tokens of a step, which 32 bits count (validate)


@dataclasses.dataclass(frozen=True)
class Found:
    """The largest number of units that fits (0: none), its bytes, and the bytes of one unit more."""

    units: int
    bytes: int
    next_bytes: int


class TooMuch(Exception):
    """More units fit than anyone trains with."""


def largest(measure: Callable[[int], int], budget: int, guess: int = 2, empty: int = 0, limit: int = LIMIT) -> Found:
    """The largest u with measure(u) <= budget, where measure(u) grows with u.

    `guess`, and `empty`, about what no unit at all would take, save calls if they are near.
    Raises: TooMuch where `limit` units fit.
    """
    known = {0: empty}
    fits, fails, trial = 0, math.inf, min(max(1, guess), limit)
    while fails - fits > 1:
        known[trial] = measure(trial)
        if known[trial] <= budget:
            fits = trial
        else:
            fails = trial
        if fits >= limit:
            raise TooMuch
        trial = min(_next_trial(known, fits, fails, budget), limit)
    return Found(fits, known[fits] if fits else 0, known[fits + 1])


def _next_trial(known: dict[int, int], fits: int, fails: float, budget: int) -> int:
    """Where a line crosses the budget: between the bounds, or beyond the two largest while nothing has failed.

    The crossing should fit and the next one up should not: each is tried in its turn.
    """
    least, most = fits + 1, GROWTH * max(fits, 1) if fails == math.inf else int(fails) - 1
    if len(known) > SECANTS:
        return most if fails == math.inf else (least + most) // 2
    u, v = sorted(known)[-2:] if fails == math.inf else (fits, int(fails))
    if known[v] <= known[u]:  # a dip, as where rows divide into larger groups: no line to follow
        return min(2 * v, most)
    crossing = math.floor(u + (budget - known[u]) * (v - u) / (known[v] - known[u]))
    return min(max(crossing, least), most)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of a frontier: `batch` rows of `seq_len` tokens fit (0: not even `unit`, the least that a mesh takes).

    `choice`: fields of the config that it was planned with. Bytes are of one device, of the training step at `batch`
    rows, at `unit` rows more, and of the evaluation step.
    """

    seq_len: int
    choice: dict[str, Any]
    batch: int
    unit: int
    train: memory.Usage | None
    next_bytes: int
    eval_bytes: int
    state: dict[str, int]

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


def frontier(
    config: Any, budget: int, lengths: Sequence[int], choices: Sequence[dict[str, Any]], programs: Programs
) -> Iterator[Cell]:
    """A cell for each choice and length. Raises: ConfigError for a length or choice that cannot run on the mesh."""
    for choice in choices:
        tokens = max(1, config.batch_size) * config.seq_len  # a guess; then what fits at the length before
        for length in sorted(lengths):
            given = with_fields(config, choice | dict(seq_len=length))
            cell = plan(given, budget, programs, tokens, choice)
            tokens = cell.tokens or tokens
            yield cell


def plan(
    config: Any, budget: int, programs: Programs, tokens: int = GUESS, choice: dict[str, Any] | None = None,
    field: str = "--budget",
) -> Cell:  # fmt: skip
    """The largest batch of a config's length in `budget` bytes a device; `tokens`: about as many fit a step.

    Raises: ConfigError for a config that cannot run, one whose evaluation needs more, and a budget (called `field`)
    that holds more than anyone trains with.
    """
    unit = unit_of(config, programs)

    def refuse_more_than(limit: int | None) -> None:
        if limit and budget > limit:
            message = f"{programs.target.name} has {sizes.show(limit)} per device; give no more"
            raise ConfigError(field, sizes.show(budget), message)

    def measure(units: int) -> int:
        usage = programs.usage(with_fields(config, dict(batch_size=units * unit)))
        refuse_more_than(usage.limit)  # else what is refused could fit the budget
        return usage.total

    refuse_more_than(programs.target.memory)

    first = checked(config, programs)
    state = memory.state_bytes(first, programs.target)
    evaluation = programs.usage(first, "eval").total
    problem = over_in_evaluation(first, budget, programs)
    if problem and programs.usage(first).total <= budget:  # else no step fits, which says more
        raise problem
    most = min(LIMIT, COUNTED // (config.seq_len * unit))
    try:
        found = largest(measure, budget, max(2, tokens // config.seq_len // unit), sum(state.values()), most)
    except TooMuch:
        message = f"{most * unit} rows of {config.seq_len} fit, the most that are tried; give less"
        raise ConfigError(field, sizes.show(budget), message) from None
    batch = found.units * unit
    usage = programs.usage(with_fields(config, dict(batch_size=batch))) if batch else None
    return Cell(config.seq_len, choice or {}, batch, unit, usage, found.next_bytes, evaluation, state)


def unit_of(config: Any, programs: Programs) -> int:
    """The least rows that a config's mesh and accumulation take."""
    return max(1, memory.mesh_of(config, programs.target).shape["data"] * config.train.accumulation)


def checked(config: Any, programs: Programs) -> ConfigDict:
    """The config with the least batch. Raises: ConfigError where it cannot run on the target."""
    return valid(with_fields(config, dict(batch_size=unit_of(config, programs))), programs)


def valid(config: Any, programs: Programs) -> Any:
    """The config as it is. Raises: ConfigError where it cannot run on the target."""
    mesh = memory.mesh_of(config, programs.target)
    validate(config, tuple(mesh.shape[axis] for axis in sharding.AXES), programs.target.platform)
    return config


def over_in_evaluation(config: Any, budget: int, programs: Programs) -> ConfigError | None:
    """What is wrong where scoring a config needs more than `budget` bytes a device: at the length that it is trained
    at or, when training is over, at the longest that it is scored at."""
    for length in dict.fromkeys((config.seq_len, heldout.longest_window(config))):
        needed = programs.usage(with_fields(config, dict(seq_len=length)), "eval").total
        if needed > budget:
            message = f"scoring windows of {length} alone needs {sizes.show(needed)} of {sizes.show(budget)} per device"
            message += "; lower it, or the largest of config.eval.contexts"
            return ConfigError("config.eval.batch_tokens", config.eval.batch_tokens, message)
    return None


def with_fields(config: Any, fields: dict[str, Any]) -> ConfigDict:
    """A copy of a config with some fields set, by dotted names."""
    changed = ConfigDict(config.to_dict())
    for name, value in fields.items():
        *groups, last = name.split(".")
        inner = changed
        for group in groups:
            inner = inner[group]
        inner[last] = value
    return changed


def too_small(field: str, budget: str, cells: Iterable[Cell], sharing: int = 1) -> ConfigError:
    """The error of a budget, of `sharing` devices, that holds no step, with the least that would."""
    least = min(cells, key=lambda cell: cell.next_bytes)
    state, needed = sharing * sum(least.state.values()), sharing * least.next_bytes
    return ConfigError(
        field, budget,
        f"too small for a step: {least.unit} x {least.seq_len} needs {sizes.show(needed)}, of which"
        f" {sizes.show(state)} are parameters and optimiser state",
    )  # fmt: skip
