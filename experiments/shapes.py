"""How many tokens should a step hold, and in which shape? Few rows and many, short and long, at equal tokens and steps.

    python -m experiments.shapes --workdir=runs/shapes
    python -m experiments.shapes --workdir=runs/shapes --lengths=256,1024 --tokens_per_step=4096,16384
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
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments import ledger, tune
from experiments.child import checked, exit_code, run_child
from experiments.flags import OVERRIDES, Parser, as_folder, make_folder
from experiments.shapes_plan import (
    Plan,
    Run,
    command,
    describe,
    fields_of,
    identity,
    make_plan,
    planned,
    tokens_per_step,
)
from research.analysis import runs, shapes, shapes_findings
from research.analysis.tables import duration
from research.analysis.tuning import grid as tuning_grid
from research.config import ConfigError

TRAIN = (sys.executable, "-m", "experiments.train")
CHECK = (sys.executable, "-m", "experiments.shapes", "--check_only")
STATE = "shapes.json"  # what the study is, and how each of its comparing runs ended
LENGTHS, TOKENS_PER_STEP, SEEDS = "128,512,2048", "2048,8192,32768", "43,44,45"
DEFAULTS = {"optimizer.schedule": "cosine"}  # of all runs, unless they are given


def main(argv: Sequence[str] | None = None, train: Sequence[str] = TRAIN, check: Sequence[str] = CHECK) -> int:
    """The exit code. `train` and `check` are the commands of the child processes; tests give others."""
    return exit_code(lambda: _study(sys.argv[1:] if argv is None else list(argv), train, check))


def _study(argv: list[str], train: Sequence[str], check: Sequence[str]) -> int:
    arguments, given = parse(argv)
    if arguments.report_only:
        return report_only(arguments.workdir)
    plan = make_plan(arguments, DEFAULTS | given)
    state = refuse_another(plan)
    plan = replace(plan, seeds=tuple(dict.fromkeys([*state.get("seeds", ()), *plan.seeds])))
    if arguments.dry_run:
        print("\n".join(describe(plan, train)))
        return 0
    if arguments.check_only:
        return checked(lambda: check_all(plan))
    tuned = {budget: tune.refuse_another(plan.tunes[budget]) for budget in plan.tunes}
    # In a child, so that this process holds no accelerator while the runs need it.
    if code := run_child([*check, *argv]):
        return code
    begin(plan, state, tuned)
    for budget, tuning in plan.tunes.items():
        print(f"learning rates at equal {budget}", flush=True)
        tune.run_all(tuning, train)
    compare(plan, train)
    return report_only(plan.workdir)


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


def refuse_another(plan: Plan) -> dict[str, Any]:
    """The folder's state. Raises: ConfigError where it holds a study of other runs."""
    state = ledger.read(plan.workdir / STATE)
    if any(state.get(key, value) != value for key, value in identity(plan).items()):
        raise ConfigError("--workdir", str(plan.workdir), "holds a study of other shapes or config; choose another")
    return state


def begin(plan: Plan, state: Mapping[str, Any], tuned: Mapping[str, Mapping[str, Any]]) -> None:
    """Keeps what the study is, so that it can be reported on from its first run on."""
    make_folder(plan.workdir)
    ledger.write(plan.workdir / STATE, state | identity(plan) | {"seeds": list(plan.seeds)})
    for budget, tuning in plan.tunes.items():
        tune.begin(tuning, tuned[budget])


def compare(plan: Plan, train: Sequence[str]) -> None:
    """Makes the runs that are not there. Raises: Interrupted when a signal stopped one."""
    todo = planned(plan)
    for number, run in enumerate(todo, 1):
        title = f"{run.name} ({number} of {len(todo)}{_left(plan, todo[number - 1 :])})"
        ledger.ensure(plan.workdir / STATE, run.name, command(plan, run, train), title)


def _left(plan: Plan, todo: Sequence[Run]) -> str:
    """Time that runs which are not made will take: as long as that of the same shape and rate in the tuning."""
    seconds, codes = 0.0, ledger.read(plan.workdir / STATE)["exit_codes"]
    for run in todo:
        tuning = plan.tunes[run.budget]
        took = ledger.read(tuning.workdir / tune.STATE)["seconds"]
        made = runs.finished(plan.workdir / run.name) or codes.get(run.name) == runs.DIVERGED_CODE
        seconds += 0.0 if made else took.get(tune.run_name(tuning, run.shape, run.rate), 0.0)
    return f", about {duration(seconds)} left" if seconds else ""


def check_all(plan: Plan) -> int:
    """Checks the config of each shape, and that the runs there are have no other. Raises: ConfigError for the first."""
    for tuning in plan.tunes.values():
        tune.check_all(tuning)
    for run in planned(plan):
        folder, scale = plan.workdir / run.name, plan.tunes[run.budget].scale
        if (folder / "config.json").exists():
            tune.check_run(folder, run.shape, scale, fields_of(plan, run))
    return 0


def report_only(workdir: Path) -> int:
    """Makes the report from a study's folder, or from results.json and heldout_losses.npz of its report."""
    if (workdir / "results.json").exists():
        return _conclude(workdir)
    plan, state = read_plan(workdir)
    tuned, states = plan.tunes["tokens"], {b: ledger.read(t.workdir / tune.STATE) for b, t in plan.tunes.items()}
    study = {name: getattr(tuned, name) for name in ("scale", "seed", "shortest", "field")}
    study |= {"tokens": plan.tokens, "steps": plan.steps, "overrides": tune.public(tuned.overrides)}
    study |= {"shapes": state["shapes"], "compared": {run.name: asdict(run) for run in planned(plan)}}
    study["grids"] = {b: {s: _tried(tuning, states[b], s) for s in tuning.given} for b, tuning in plan.tunes.items()}
    runs.gather(workdir, study, list(study["compared"]), state, workdir / "report")
    return _conclude(workdir / "report")


def read_plan(workdir: Path) -> tuple[Plan, dict[str, Any]]:
    """The study that a folder holds, and its ledger. Raises: ConfigError where it holds none, or it is damaged."""
    state = ledger.read(workdir / STATE)
    if "seeds" not in state:
        raise ConfigError("--workdir", str(workdir), f"holds no study of shapes: neither {STATE} nor results.json")
    tunes = {budget: tune.read_plan(workdir / f"tune_{budget}")[0] for budget in shapes.BUDGETS}
    try:
        largest = max(map(tokens_per_step, state["shapes"]))
        return Plan(workdir, tunes, tuple(state["seeds"]), int(state["tokens"]), largest), state
    except (KeyError, TypeError, ValueError) as error:
        message = f"{STATE} is damaged ({error!r}); remove it and give the study's command again: no run is lost"
        raise ConfigError("--workdir", str(workdir), message) from None


def _tried(tuning: tune.Plan, state: Mapping[str, Any], shape: str) -> dict[str, Any]:
    """What was tried of a shape, the best of it, and whether a higher loss lies on both sides (tuning.grid).

    `exit_codes`: of what is neither finished nor diverged, 0 of what was not made; the best is not known before.
    """
    values, middle = {tune.run_name(tuning, shape, v): v for v in tune.values(tuning, shape)}, tuning.given[shape]
    read = {name: runs.read_run(tuning.workdir / name, state) for name in values}
    found = tuning_grid(values, read, tuning.shortest, middle) | {"given": middle}
    left = {name: run["exit_code"] for name, run in read.items() if run["status"] not in (runs.FINISHED, runs.DIVERGED)}
    return found | {"exit_codes": left} | ({"best": None, "inside": False} if left else {})


def _conclude(folder: Path) -> int:
    results = shapes.write(folder)
    print("\n" + "\n".join(f"- {said}" for said in shapes_findings.findings(results)))
    code, left = ledger.conclude(results["runs"], folder), shapes_findings.not_settled(results["study"])
    for name, failed in left.items():
        print(f"{name} {f'failed: exit code {failed}' if failed else 'missing'}", file=sys.stderr)
    return next((failed for failed in left.values() if failed), code or int(bool(left)))


if __name__ == "__main__":
    sys.exit(main())
