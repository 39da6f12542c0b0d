"""config.batch_size=-1: as many rows as fit config.memory_budget, from compiled programs (analysis/frontier.py).

The budget is of one device; of a CPU, whose devices share one memory, it is of all of them.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from research import cores, sizes, target
from research.analysis import frontier, memory
from research.analysis.programs import Programs
from research.config import ConfigError
from research.stages import alone, stages_of


def planned(config: Any, workdir: str | None = None) -> Any:
    """The config with its batch size filled in and, where a budget is given, seen to fit it.

    A run that goes on in `workdir` keeps the number that it began with, whatever a newer compiler would say.
    Raises: ConfigError where there is no budget, where not even one row fits (saying what would), or where a batch size
    is given that does not fit the budget that is given too.
    """
    if config.batch_size == -1 and not config.memory_budget:
        message = "plans the largest that fits: give config.memory_budget, such as 24GiB"
        raise ConfigError("config.batch_size", -1, message)
    if not config.memory_budget:
        return config
    budget = sizes.parse(config.memory_budget, "config.memory_budget")
    begun = _begun(config, workdir)
    devices = tuple(cores.devices_of(config))
    here = dataclasses.replace(target.at_hand(), devices=devices)
    sharing = cores.sharing_memory(memory.mesh_of(config, here))
    programs = Programs(here, lambda text: print(f"compiling {text}", file=sys.stderr, flush=True))
    if config.batch_size == -1 and begun is not None:
        print(f"batch size {begun}, of the run in {workdir}", file=sys.stderr)
        config = frontier.with_fields(config, dict(batch_size=begun)).lock()
        needed = _largest(frontier.valid(config, programs), programs).total * sharing
        if needed > budget:  # on other devices, or by another compiler: the run is not lost for that
            message = f"warning: a step needs {sizes.show(needed)} here, more than config.memory_budget"
            print(f"{message}={config.memory_budget}", file=sys.stderr)
        return config
    if config.batch_size != -1:
        usage = _largest(frontier.valid(config, programs), programs)
        needed = usage.total * sharing
        if needed > budget or usage.limit:
            has = (
                f"the {sizes.show(usage.limit)} of {here.name}"
                if usage.limit
                else f"config.memory_budget={config.memory_budget}"
            )
            message = f"a step needs {sizes.show(needed)}, more than {has}"
            raise ConfigError("config.batch_size", config.batch_size, f"{message}; lower it, or plan it by -1")
        if problem := frontier.over_in_evaluation(config, budget // sharing, programs):
            raise problem
        return config
    rows = frontier.with_fields(config, {"train.stages": None})  # a budget holds rows of one length
    cell = frontier.plan(rows, budget // sharing, programs, field="config.memory_budget")
    if not cell.batch:
        raise frontier.too_small("config.memory_budget", config.memory_budget, [cell], sharing)
    where = f"on {sharing} cores" if sharing > 1 else "a device"
    print(
        f"batch size {cell.batch}: a step of {cell.batch} x {cell.seq_len} needs"
        f" {sizes.show(cell.train.total * sharing)} of {config.memory_budget} {where};"
        f" {cell.batch + cell.unit} would need {sizes.show(cell.next_bytes * sharing)}",
        file=sys.stderr,
    )
    return _fitting(config, cell, budget // sharing, programs).lock()


def _fitting(config: Any, cell: frontier.Cell, budget: int, programs: Programs) -> ConfigDict:
    """With the batch of a cell, or as many rows less as the steps of shorter rows need to fit `budget` a device."""
    batch = cell.batch
    while batch > 0:
        planned = frontier.with_fields(config, dict(batch_size=batch))
        needed = _largest(frontier.valid(planned, programs), programs).total
        if needed <= budget:
            return planned
        batch = min(batch - cell.unit, batch * budget // needed // cell.unit * cell.unit)
        print(f"shorter rows need {sizes.show(needed)} per device: batch size {batch}", file=sys.stderr)
    message = f"a step of shorter rows needs {sizes.show(needed)} per device; give more"
    raise ConfigError("config.memory_budget", config.memory_budget, message)


def _largest(config: Any, programs: Programs) -> memory.Usage:
    """Of the stage whose step needs most."""
    return max((programs.usage(alone(config, stage)) for stage in stages_of(config)), key=lambda usage: usage.total)


def _begun(config: Any, workdir: str | None) -> int | None:
    """The batch size of the run that is in `workdir`, if it has the same budget."""
    if workdir is None:
        return None
    try:
        known = json.loads((Path(workdir) / "config.json").read_text())
        return known["batch_size"] if known["memory_budget"] == config.memory_budget else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # no run is there, or checkpoint.claim_workdir says what is wrong with it
