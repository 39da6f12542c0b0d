"""From the original's protocol to a fair comparison, one confound at a time: where does the ranking change?

    python -m experiments.waterfall --scale=cpu --workdir=runs/waterfall
    python -m experiments.waterfall --smoke --workdir=runs/waterfall-smoke
    python -m experiments.waterfall --scale=published --workdir=runs/waterfall-gpu \
        --config.data.source=jsonl --config.data.path=books.jsonl.gz --config.data.tokenizer=bpe
    python -m experiments.waterfall --report_only --workdir=runs/waterfall

Every --config.field=value goes to every run, but for the fields that the stages set. config.seed is the seed of the
stages that have one, and chooses the learning rates; --seeds are those of the last. A run that two stages share is
made once. The same command goes on where it was stopped.
Exit codes: 0, all finished; 2, a mistake in the config, nothing run; else that of the first run that failed, or 1.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.waterfall import SCALES, STRATEGIES
from experiments import ledger
from experiments import waterfall_plan as plans
from experiments.child import checked, exit_code, run_child
from experiments.flags import OVERRIDES, Parser, as_folder, load_config, make_folder
from experiments.waterfall_plan import STAGES, Losses, Plan, Run
from research.analysis import runs, waterfall, waterfall_report
from research.config import ConfigError

TRAIN = (sys.executable, "-m", "experiments.train")
CHECK = (sys.executable, "-m", "experiments.waterfall", "--check_only")
STATE = "waterfall.json"  # what the study is, and how each run ended


def main(argv: Sequence[str] | None = None, train: Sequence[str] = TRAIN, check: Sequence[str] = CHECK) -> int:
    """The exit code. `train` and `check` are the commands of the child processes; tests give others."""
    return exit_code(lambda: _study(sys.argv[1:] if argv is None else list(argv), train, check))


def _study(argv: list[str], train: Sequence[str], check: Sequence[str]) -> int:
    arguments, given = parse(argv)
    if arguments.report_only:
        return report_only(arguments.workdir)
    scale = "smoke" if arguments.smoke else arguments.scale
    plan = plans.make_plan(arguments.workdir, scale, given, arguments.seeds, arguments.until)
    if arguments.dry_run:
        print("\n".join(plans.describe(plan, train)))
        return 0
    if arguments.check_only:
        return checked(lambda: check_all(plan))
    refuse_another(plan)
    # In a child, so that this process holds no accelerator while the runs need it.
    if code := run_child([*check, *argv]):
        return code
    make_folder(plan.workdir)
    claim(plan)
    for number in range(len(plan.stages)):
        run_stage(plan, number, train)
    return write_report(plan)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The arguments, and the overrides {field: value} of `--config.field=value`. Raises: ConfigError on another."""
    parser = Parser("waterfall", __doc__, OVERRIDES)
    parser.add_argument("--scale", default="cpu", help=f"one of {', '.join(SCALES)}; default cpu")
    parser.add_argument("--smoke", action="store_true", help="the same as --scale=smoke")
    parser.add_argument("--workdir", type=as_folder, required=True, help="each run gets a folder in it")
    parser.add_argument("--seeds", help="of the last stage, divided by commas")
    parser.add_argument("--until", type=int, default=len(STAGES) - 1, help="the last stage to run")
    parser.add_modes()
    return parser.parse_overrides(argv)


def check_all(plan: Plan) -> int:
    """What a run of each condition would stop at, before the first one starts. Raises: ConfigError."""
    from research import train  # in this child alone JAX starts

    for condition in dict.fromkeys(stage.condition for stage in plan.stages):
        for strategy in STRATEGIES:
            run = plans.make_run(plan, strategy, condition, plan.rate, plan.tuning_seed)
            train.prepare(load_config(plans.config_name(plan, run), plans.config_flags(plan, run)))
    return 0


def refuse_another(plan: Plan) -> None:
    """Raises: ConfigError where the folder holds a study of other runs."""
    known = ledger.read(plan.workdir / STATE)
    if any(known.get(name, value) != value for name, value in _identity(plan).items()):
        message = "holds a waterfall of another scale or config; choose another folder"
        raise ConfigError("--workdir", str(plan.workdir), message)


def claim(plan: Plan) -> None:
    """Keeps what the study is, for the commands that go on with it."""
    more = {"rate": plan.rate, "tuning_seed": plan.tuning_seed, "seeds": list(plan.seeds), "until": plan.until}
    ledger.write(plan.workdir / STATE, ledger.read(plan.workdir / STATE) | _identity(plan) | more)


def _identity(plan: Plan) -> dict[str, Any]:
    return {"scale": plan.scale, "overrides": dict(sorted(plan.overrides.items()))}


def losses_of(plan: Plan) -> Losses:
    """The loss that a run is ranked by, read from its folder."""

    def loss(run: Run) -> float | None:
        if ledger.read(plan.workdir / STATE)["exit_codes"].get(run.name) == runs.DIVERGED_CODE:
            return math.inf
        result = runs.read_result(plan.workdir / run.name)
        return None if result is None else runs.shared_loss(result, plans.shortest(plan))

    return loss


def run_stage(plan: Plan, number: int, train: Sequence[str]) -> None:
    """Makes the runs of a stage that are not there. Raises: Interrupted when a signal stopped one."""
    stage, losses = plan.stages[number], losses_of(plan)
    for strategy in STRATEGIES:
        if number == plans.BEST:
            planned = plans.rates(plan, strategy, losses)
        else:
            planned = plans.stage_runs(plan, stage, strategy, losses)
        for run in planned:
            title = f"stage {number}, {STAGES[number].name}: {run.name}"
            ledger.ensure(plan.workdir / STATE, run.name, plans.command(plan, run, train), title)


def write_report(plan: Plan) -> int:
    """Gathers the runs into `<workdir>/report/` and writes the report there; the exit code that they call for."""
    described = plans.study(plan, losses_of(plan))
    names = waterfall.runs_of(described)
    runs.gather(plan.workdir, described, names, ledger.read(plan.workdir / STATE), plan.workdir / "report")
    return _conclude(plan.workdir / "report")


def report_only(workdir: Path) -> int:
    """Makes the report again from a study's folder, or from results.json and heldout_losses.npz of its report."""
    if (workdir / "results.json").exists():
        return _conclude(workdir)
    state = ledger.read(workdir / STATE)
    if "scale" not in state:
        raise ConfigError("--workdir", str(workdir), f"holds no waterfall: neither {STATE} nor results.json")
    names = ("overrides", "rate", "tuning_seed", "seeds", "until")
    return write_report(Plan(state["scale"], workdir, *(state[name] for name in names)))


def _conclude(folder: Path) -> int:
    results = waterfall.write(folder)
    print(f"\n{waterfall_report.summary(results['analysis']['waterfall'])}")
    return ledger.conclude(results["runs"], folder)


if __name__ == "__main__":
    sys.exit(main())
