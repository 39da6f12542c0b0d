"""At which learning rate does each strategy do best? Tries values of one field outwards until the best lies inside.

    python -m experiments.tune --workdir=runs/tune
    python -m experiments.tune --workdir=runs/tune --strategies=balanced,long_seq --field=optimizer.adamw_learning_rate
    python -m experiments.tune --report_only --workdir=runs/tune

Each strategy begins with the value of its config, its half and its double, and goes on beyond an edge that the lowest
loss lies on. Losses are those at the end of a run, on the held-out targets that all strategies share, with the longest
context that fits in the shortest rows. It ends with the command that compares the strategies at the values found.
Every --config.field=value goes to every run. The same command goes on where it was stopped.
Exit codes: 0, all finished or diverged; 2, a mistake in the config, nothing run; else that of the first run that
failed, or 1.
"""

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import grid, ledger
from experiments.child import checked, exit_code, run_child
from experiments.flags import OVERRIDES, Parser, as_folder, make_folder
from experiments.strategies import HELP, STRATEGIES, flags, load_strategy, names, train_command
from research.analysis import runs, tuning, tuning_report
from research.config import ConfigError

TRAIN = (sys.executable, "-m", "experiments.train")
CHECK = (sys.executable, "-m", "experiments.tune", "--check_only")
STATE = "tune.json"  # what the study is, and how each run ended
# Losses are read off at the end of a run, which is not gone on with.
SHORT = {"train.eval_every": "0", "train.keep_last": "1", "train.keep_best": "False"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study as its arguments describe it. `overrides`: of all runs, field -> value as on a command line."""

    workdir: Path
    scale: str
    field: str
    limit: int  # values tried for one strategy, at most
    overrides: Mapping[str, str]
    given: Mapping[str, float]  # strategy -> the value of its config, the middle of its grid
    seed: int
    shortest: int  # rows of all strategies, in tokens: the context that ranks fits in them

    @property
    def identity(self) -> dict[str, Any]:
        """What a folder holds one of: with other strategies, losses may be at another context."""
        about = {name: getattr(self, name) for name in ("scale", "field", "seed", "shortest")}
        return about | {"overrides": dict(sorted(self.overrides.items())), "given": dict(self.given)}


def main(argv: Sequence[str] | None = None, train: Sequence[str] = TRAIN, check: Sequence[str] = CHECK) -> int:
    """The exit code. `train` and `check` are the commands of the child processes; tests give others."""
    return exit_code(lambda: _study(sys.argv[1:] if argv is None else list(argv), train, check))


def _study(argv: list[str], train: Sequence[str], check: Sequence[str]) -> int:
    arguments, given = parse(argv)
    if arguments.report_only:
        return report_only(arguments.workdir)
    about = (getattr(arguments, name) for name in ("workdir", "scale", "strategies", "field", "limit"))
    plan = make_plan(*about, given)
    if arguments.dry_run:
        for strategy, middle in plan.given.items():
            print("\n".join(shlex.join(command(plan, strategy, value, train)) for value in grid.first(middle)))
        print(f"# and outwards while the best lies on the edge, to {plan.limit} values of a strategy at most")
        return 0
    if arguments.check_only:
        return checked(lambda: check_all(plan))
    state = refuse_another(plan)
    # In a child, so that this process holds no accelerator while the runs need it.
    if code := run_child([*check, *argv]):
        return code
    begin(plan, state)
    run_all(plan, train)
    return report_only(plan.workdir)


def run_all(plan: Plan, train: Sequence[str]) -> None:
    """Makes the runs of every strategy's grid that are not there. Raises: Interrupted when a signal stopped one."""
    for place, strategy in enumerate(plan.given, 1):
        for number, value in enumerate(values(plan, strategy), 1):
            where = f"{strategy} ({place} of {len(plan.given)}), value {number}, of {plan.limit} at most"
            line, title = command(plan, strategy, value, train), f"{where}: {plan.field}={value:g}"
            ledger.ensure(plan.workdir / STATE, run_name(plan, strategy, value), line, title)


def begin(plan: Plan, state: Mapping[str, Any]) -> None:
    """Keeps what the study is, for the commands that go on with it. Raises: ConfigError where it cannot be written."""
    make_folder(plan.workdir)
    ledger.write(plan.workdir / STATE, state | plan.identity | {"limit": plan.limit})


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The arguments, and the overrides {field: value} of `--config.field=value`. Raises: ConfigError on another."""
    parser = Parser("tune", __doc__, OVERRIDES)
    parser.add_argument("--scale", default="cpu", help="of the configs: cpu (default) or published")
    parser.add_argument("--workdir", type=as_folder, required=True, help="each run gets a folder in it")
    parser.add_argument("--strategies", type=names, default=list(STRATEGIES), help=HELP)
    parser.add_argument("--field", default="optimizer.learning_rate", help="of the config, a number above 0")
    parser.add_argument("--limit", type=int, default=6, help="a strategy's values: none is added beyond; default 6")
    parser.add_modes()
    return parser.parse_overrides(argv)


def make_plan(
    workdir: Path, scale: str, strategies: Sequence[str], field: str, limit: int, overrides: Mapping[str, str]
) -> Plan:
    """Raises: ConfigError for whatever is wrong with an argument."""
    if not strategies:
        raise ConfigError("--strategies", "", "name at least one")
    if limit < 3:
        raise ConfigError("--limit", limit, "a grid begins with three values")
    configs = {name: load_strategy(name, scale, flags(overrides)) for name in strategies}
    first = next(iter(configs.values()))
    if first.data.source == "recall":
        raise ConfigError("config.data.source", "recall", "has no losses on text to choose by; give another --scale")
    if first.data.protocol != "clean":
        message = "its losses choose nothing, they are of memorised text; add --config.data.protocol=clean"
        raise ConfigError("config.data.protocol", first.data.protocol, message)
    shortest = min(config.seq_len for config in configs.values())
    if not any(5 * context // 4 <= shortest for context in first.eval.contexts):
        message = f"none fits in the shortest length, {shortest}: give one of {shortest * 4 // 5} or less"
        raise ConfigError("config.eval.contexts", tuple(first.eval.contexts), message)
    if first.data.shuffle_block:
        message = "every run draws its rows independently; leave it out"
        raise ConfigError("config.data.shuffle_block", first.data.shuffle_block, message)
    given = {name: _value(config, field) for name, config in configs.items()}
    return Plan(workdir, scale, field, limit, dict(overrides), given, first.seed, shortest)


def _value(config: ConfigDict, field: str) -> float:
    found: Any = config
    for part in field.split("."):
        found = found.get(part) if isinstance(found, ConfigDict) else None
    known = isinstance(found, float) and math.isfinite(found) and found > 0
    if not known or field.partition(".")[0] not in ("optimizer", "model"):
        message = "name a fraction above 0 of the optimizer or the model, such as optimizer.learning_rate"
        raise ConfigError("--field", field, message)
    return found


def run_name(plan: Plan, strategy: str, value: float) -> str:
    """Of a run's folder."""
    return f"{strategy}-{plan.field.rpartition('.')[2]}-{value:g}-seed{plan.seed}"


def fields_of(plan: Plan, value: float) -> dict[str, str]:
    """Of a run's config: what is given, and the value that is tried."""
    return SHORT | dict(plan.overrides) | {plan.field: repr(value)}


def command(plan: Plan, strategy: str, value: float, train: Sequence[str]) -> list[str]:
    folder = plan.workdir / run_name(plan, strategy, value)
    return train_command(train, strategy, plan.scale, folder, fields_of(plan, value))


def values(plan: Plan, strategy: str) -> Iterator[float]:
    """The values of a strategy's grid, one after another (grid.py)."""
    return grid.grow(lambda value: loss(plan, strategy, value), plan.given[strategy], plan.limit)


def loss(plan: Plan, strategy: str, value: float) -> float | None:
    """The run's loss (nats/token) at its own longest context that every strategy shares; inf: diverged, None: none."""
    run = run_name(plan, strategy, value)
    if ledger.read(plan.workdir / STATE)["exit_codes"].get(run) == runs.DIVERGED_CODE:
        return math.inf
    result = runs.read_result(plan.workdir / run)
    return None if result is None else runs.shared_loss(result, plan.shortest)


def check_all(plan: Plan) -> int:
    """Checks the config of each first value, and that the runs there are have no other.

    Raises: ConfigError for the first mistake.
    """
    for strategy, middle in plan.given.items():
        for value in dict.fromkeys([*grid.first(middle), *grid.known(lambda v, s=strategy: loss(plan, s, v), middle)]):
            check_run(plan.workdir / run_name(plan, strategy, value), strategy, plan.scale, fields_of(plan, value))
    return 0


def check_run(folder: Path, strategy: str, scale: str, fields: Mapping[str, Any]) -> None:
    """Raises: ConfigError for a config that cannot run, or a folder that holds a run of another."""
    from research import checkpoint, planner, train  # in a child of the study alone JAX starts

    config = planner.planned(load_strategy(strategy, scale, flags(fields)), str(folder))
    fingerprint = train.prepare(config)[0].fingerprint
    if (folder / "config.json").exists():
        checkpoint.refuse_another(folder, config.to_dict(), fingerprint)


def refuse_another(plan: Plan) -> dict[str, Any]:
    """The folder's state. Raises: ConfigError where it holds a study of other runs."""
    state = ledger.read(plan.workdir / STATE)
    if any(state.get(key, value) != value for key, value in plan.identity.items()):
        message = "holds a tuning of another scale, field, config or other strategies; choose another folder"
        raise ConfigError("--workdir", str(plan.workdir), message)
    return state


def report_only(workdir: Path) -> int:
    """Makes the report from a study's folder, or from results.json and heldout_losses.npz of its report."""
    if (workdir / "results.json").exists():
        return _conclude(workdir)
    plan, state = read_plan(workdir)
    grids = {s: {run_name(plan, s, value): value for value in values(plan, s)} for s in plan.given}
    study = plan.identity | {"overrides": public(plan.identity["overrides"]), "grids": grids}
    runs.gather(workdir, study, [run for grid in grids.values() for run in grid], state, workdir / "report")
    return _conclude(workdir / "report")


def read_plan(workdir: Path) -> tuple[Plan, dict[str, Any]]:
    """The study that a folder holds, and its ledger. Raises: ConfigError where it holds none, or it is damaged."""
    state = ledger.read(workdir / STATE)
    if "given" not in state:
        raise ConfigError("--workdir", str(workdir), f"holds no tuning: neither {STATE} nor results.json")
    try:
        return Plan(workdir, *(state[field.name] for field in dataclasses.fields(Plan)[1:])), state
    except KeyError as error:
        message = f"{STATE} is damaged (no {error}); remove it and give the study's command again: no run is lost"
        raise ConfigError("--workdir", str(workdir), message) from None


def public(overrides: Mapping[str, str]) -> dict[str, str]:
    """Without folders, which say nothing to another machine."""
    kept = {name: value for name, value in overrides.items() if name != "data.cache_dir"}
    return {name: Path(value).name if Path(value).is_absolute() else value for name, value in kept.items()}


def _conclude(folder: Path) -> int:
    results = tuning.write(folder)
    study, found = results["study"], results["analysis"]["tuning"]
    print("\n" + "\n".join(f"- {said}" for said in tuning_report.findings(study, found)))
    if go_on := tuning_report.command(study, found):
        print(f"\n{go_on}")
    return ledger.conclude(results["runs"], folder)


if __name__ == "__main__":
    sys.exit(main())
