"""How many tokens should a step hold, and in which shape? Few rows and many, short and long, at equal tokens and steps.

    python -m experiments.shapes --workdir=runs/shapes
    python -m experiments.shapes --workdir=runs/shapes --lengths=256,1024 --tokens_per_step=4096,8192,16384
    python -m experiments.shapes --report_only --workdir=runs/shapes

A shape is B rows of T tokens: every length with every number of tokens per step. Shapes are compared after as many
tokens (config.train.tokens), and after as many steps as the largest steps make of these. For both each shape's best
learning rate is looked for, as experiments.tune does, by the config's seed, in <workdir>/tune_tokens and
<workdir>/tune_steps; at its best it is trained by seeds of their own. Learning rates decay to zero (a cosine), or small
steps would end in their own noise; --config.optimizer.schedule=constant keeps them.
Every --config.field=value goes to every run. The same command goes on where it was stopped.
Exit codes: 0, all finished or diverged; 2, a mistake in the config, nothing run; else that of the first run that
failed, or 1.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import grid, ledger, tune
from experiments.child import Interrupted, checked, run_child
from experiments.flags import OVERRIDES, Parser, as_folder, make_folder
from experiments.strategies import config_file, load_strategy, names, shape_flags
from research.analysis import runs, shapes, shapes_report
from research.analysis.tables import duration
from research.analysis.tuning import grid as tried
from research.config import ConfigError

TRAIN = (sys.executable, "-m", "experiments.train")
CHECK = (sys.executable, "-m", "experiments.shapes", "--check_only")
STATE = "shapes.json"  # what the study is, and how each of its comparing runs ended
LENGTHS, TOKENS_PER_STEP, SEEDS = "128,512,2048", "2048,8192,32768", "43,44,45"
FIELDS = {"optimizer.schedule": "cosine"}  # of all runs, unless they are given


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
    """One that compares: at equal `tokens` or at equal `steps` (shapes.BUDGETS)."""

    shape: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.budget}-seed{self.seed}"


def main(argv: Sequence[str] | None = None, train: Sequence[str] = TRAIN, check: Sequence[str] = CHECK) -> int:
    """The exit code. `train` and `check` are the commands of the child processes; tests give others."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments, given = parse(argv)
        if arguments.report_only:
            return report_only(arguments.workdir)
        plan = make_plan(arguments, FIELDS | given)
        if arguments.dry_run:
            print("\n".join(describe(plan, train)))
            return 0
        if arguments.check_only:
            return checked(lambda: check_all(plan))
        state = refuse_another(plan)
        tuned = {budget: tune.refuse_another(plan.tunes[budget]) for budget in plan.tunes}
        # In a child, so that this process holds no accelerator while the runs need it.
        if code := run_child([*check, *argv]):
            return code
        make_folder(plan.workdir)
        known = [*state.get("seeds", ()), *plan.seeds]
        ledger.write(plan.workdir / STATE, state | identity(plan) | {"seeds": list(dict.fromkeys(known))})
        for budget, tuning in plan.tunes.items():
            print(f"learning rates at equal {budget}", flush=True)
            tune.run_all(tuning, tuned[budget], train)
        compare(plan, train)
        return report_only(plan.workdir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The arguments, and the overrides {field: value} of `--config.field=value`. Raises: ConfigError on another."""
    parser = Parser("shapes", __doc__, OVERRIDES)
    parser.add_argument("--scale", default="cpu", help="of the config: cpu (default) or published")
    parser.add_argument("--workdir", type=as_folder, required=True, help="each run gets a folder in it")
    parser.add_argument("--lengths", default=LENGTHS, help=f"tokens of a row; default {LENGTHS}")
    parser.add_argument("--tokens_per_step", default=TOKENS_PER_STEP, help=f"default {TOKENS_PER_STEP}")
    parser.add_argument("--seeds", default=SEEDS, help=f"of the comparison; default {SEEDS}")
    parser.add_argument("--limit", type=int, default=6, help="learning rates of a shape, at most; default 6")
    parser.add_modes()
    return parser.parse_overrides(argv)


def make_plan(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> Plan:
    """Raises: ConfigError for whatever is wrong with an argument."""
    lengths, sizes, seeds = (_numbers(arguments, name) for name in ("lengths", "tokens_per_step", "seeds"))
    for size, length in itertools.product(sizes, lengths):
        if not length or size % length or not size:
            raise ConfigError("--tokens_per_step", size, f"is no whole number of rows of {length} tokens")
    if len(sizes) < 2:
        raise ConfigError("--tokens_per_step", arguments.tokens_per_step, "name at least two: they are compared")
    given = [f"{size // length}x{length}" for length, size in itertools.product(lengths, sizes)]
    everyone = _tune(arguments, "tokens", given, overrides)
    config = load_strategy(given[0], arguments.scale, [f"--config.{k}={v}" for k, v in overrides.items()])
    if config.train.steps is not None:
        message = "shapes have steps of unlike size: give config.train.tokens"
        raise ConfigError("config.train.steps", config.train.steps, message)
    if config.train.tokens % max(sizes):
        message = f"is no whole number of the largest steps: give a multiple of {max(sizes)}"
        raise ConfigError("config.train.tokens", config.train.tokens, message)
    if not seeds or config.seed in seeds:
        message = f"give seeds other than {config.seed} (config.seed), which chooses the learning rates"
        raise ConfigError("--seeds", arguments.seeds, message)
    smaller = [shape for shape in given if _tokens_per_step(shape) < max(sizes)]
    alike = {name: value for name, value in overrides.items() if name != "train.tokens"}
    steps = {"train.steps": str(config.train.tokens // max(sizes))}
    tunes = {"tokens": everyone, "steps": _tune(arguments, "steps", smaller, alike | steps)}
    return Plan(arguments.workdir, tunes, tuple(seeds), config.train.tokens, max(sizes))


def _tune(arguments: argparse.Namespace, budget: str, given: list[str], overrides: Mapping[str, str]) -> tune.Plan:
    about = dict(scale=arguments.scale, strategies=given, field="optimizer.learning_rate", limit=arguments.limit)
    return tune.make_plan(argparse.Namespace(workdir=arguments.workdir / f"tune_{budget}", **about), overrides)


def _numbers(arguments: argparse.Namespace, name: str) -> list[int]:
    """Rising, each once."""
    text = getattr(arguments, name)
    if not all(part.isascii() and part.isdecimal() for part in names(text)) or not names(text):
        raise ConfigError(f"--{name}", text, "give whole numbers, divided by commas")
    return sorted({int(part) for part in names(text)})


def identity(plan: Plan) -> dict[str, Any]:
    """What a folder holds one of; seeds may be added."""
    about = {"shapes": plan.shapes, "tokens": plan.tokens}
    return about | {"overrides": dict(sorted(plan.tunes["tokens"].overrides.items()))}


def refuse_another(plan: Plan) -> dict[str, Any]:
    """The folder's state. Raises: ConfigError where it holds a study of other runs."""
    state = ledger.read(plan.workdir / STATE)
    if any(state.get(key, value) != value for key, value in identity(plan).items()):
        raise ConfigError("--workdir", str(plan.workdir), "holds a study of other shapes or config; choose another")
    return state


def compared(plan: Plan) -> list[Run]:
    """The runs that compare, seed by seed."""
    return [
        Run(shape, budget, seed)
        for seed, (budget, tuning) in itertools.product(plan.seeds, plan.tunes.items())
        for shape in tuning.given
    ]


def _tokens_per_step(shape: str) -> int:
    rows, length = shapes.sizes(shape)
    return rows * length


def command(plan: Plan, run: Run, rate: float, train: Sequence[str]) -> list[str]:
    return [*train, f"--config={config_file(run.shape, plan.tunes[run.budget].scale)}",
            f"--workdir={plan.workdir / run.name}", *shape_flags(run.shape), *_flags(plan, run, rate)]  # fmt: skip


def _flags(plan: Plan, run: Run, rate: float) -> list[str]:
    """The overrides of a run, but those that are its shape."""
    tuning = plan.tunes[run.budget]
    fields = tune.SHORT | dict(tuning.overrides) | {"seed": str(run.seed), tuning.field: repr(rate)}
    return [f"--config.{name}={value}" for name, value in fields.items()]


def best_rate(plan: Plan, run: Run) -> float | None:
    """Of the runs of the tuning that are there; None where none has a loss."""
    tuning = plan.tunes[run.budget]
    middle = tuning.given[run.shape]
    return runs.lowest(grid.known(lambda value: tune.loss(tuning, run.shape, value), middle), middle)


def compare(plan: Plan, train: Sequence[str]) -> None:
    """Makes the runs that are not there. Raises: Interrupted when a signal stopped one."""
    planned = compared(plan)
    for number, run in enumerate(planned, 1):
        rate = best_rate(plan, run)
        if rate is None:
            print(f"{run.name}: no learning rate of {run.shape} has a loss; not run", file=sys.stderr, flush=True)
            continue
        title = f"{run.name} ({number} of {len(planned)}{_left(plan, planned[number - 1 :])}): learning rate {rate:g}"
        ledger.ensure(plan.workdir / STATE, run.name, command(plan, run, rate, train), title)


def _left(plan: Plan, planned: Sequence[Run]) -> str:
    """Time that runs will take, by those of the tuning."""
    seconds = 0.0
    for run in planned:
        took = ledger.read(plan.tunes[run.budget].workdir / tune.STATE)["seconds"]
        seconds += min((value for name, value in took.items() if name.startswith(f"{run.shape}-")), default=0.0)
    return f", about {duration(seconds)} left" if seconds else ""


def describe(plan: Plan, train: Sequence[str]) -> list[str]:
    """The commands that are known beforehand."""
    lines = []
    for budget, tuning in plan.tunes.items():
        known = [(shape, value) for shape, middle in tuning.given.items() for value in grid.first(middle)]
        lines += [f"# learning rates at equal {budget}", *(shlex.join(tune.command(tuning, *k, train)) for k in known)]
        lines += [f"# and outwards while the best lies on the edge, to {tuning.limit} values of a shape at most"]
    return lines + [f"# {len(compared(plan))} runs: each shape at its best, seeds {','.join(map(str, plan.seeds))}"]


def check_all(plan: Plan) -> int:
    """Checks the config of each shape, and that the runs there are have no other. Raises: ConfigError for the first."""
    for tuning in plan.tunes.values():
        tune.check_all(tuning)
    from research import checkpoint, planner, train  # in this child alone JAX starts

    for run in compared(plan):
        folder, rate = plan.workdir / run.name, best_rate(plan, run)
        if rate is not None and (folder / "config.json").exists():
            loaded = load_strategy(run.shape, plan.tunes[run.budget].scale, _flags(plan, run, rate))
            config = planner.planned(loaded, str(folder))
            checkpoint.refuse_another(folder, config.to_dict(), train.prepare(config)[0].fingerprint)
    return 0


def report_only(workdir: Path) -> int:
    """Makes the report from a study's folder, or from results.json and heldout_losses.npz of its report."""
    if (workdir / "results.json").exists():
        return _conclude(workdir)
    state = ledger.read(workdir / STATE)
    if "seeds" not in state:
        raise ConfigError("--workdir", str(workdir), f"holds no study of shapes: neither {STATE} nor results.json")
    read = {budget: tune.read_plan(workdir / f"tune_{budget}") for budget in shapes.BUDGETS}
    tunes = {budget: tuning for budget, (tuning, _) in read.items()}
    largest = max(map(_tokens_per_step, state["shapes"]))
    plan = Plan(workdir, tunes, tuple(state["seeds"]), state["tokens"], largest)
    planned, tuned = {run.name: vars(run) for run in compared(plan)}, tunes["tokens"]
    study = {name: getattr(tuned, name) for name in ("scale", "seed", "shortest", "field")}
    study |= {"tokens": plan.tokens, "steps": plan.steps, "overrides": tune.public(tuned.overrides)}
    grids = {budget: {shape: _grid(*read[budget], shape) for shape in tunes[budget].given} for budget in tunes}
    study |= {"shapes": plan.shapes, "compared": planned, "grids": grids}
    runs.gather(workdir, study, list(planned), state, workdir / "report")
    return _conclude(workdir / "report")


def _grid(tuning: tune.Plan, state: Mapping[str, Any], shape: str) -> dict[str, Any]:
    """What was tried of a shape, the best of it, and whether a higher loss lies on both sides."""
    values, middle = {tune.run_name(tuning, shape, v): v for v in tune.values(tuning, shape)}, tuning.given[shape]
    read = {name: runs.read_run(tuning.workdir / name, state) for name in values}
    return tried(values, read, tuning.shortest, middle) | {"given": middle}


def _conclude(folder: Path) -> int:
    results = shapes.write(folder)
    print("\n" + "\n".join(f"- {said}" for said in shapes_report.findings(results)))
    return ledger.conclude(results["runs"], folder)


if __name__ == "__main__":
    sys.exit(main())
