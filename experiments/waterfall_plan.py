"""Which runs the waterfall study is made of: its stages, each run's config, and the grids of learning rates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.waterfall import SCALES, STRATEGIES, Scale
from experiments import grid
from experiments.flags import load_config
from research.analysis.runs import lowest
from research.config import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SET_BY_STAGES = {
    "strategy": "the study trains all three",
    "batch_size": "configs/waterfall.py holds the shapes",
    "seq_len": "configs/waterfall.py holds the shapes",
    "train.tokens": "give config.train.steps, which every strategy shares",
    "data.protocol": "the stages go from published to clean",
    "data.max_epochs": "the stages go from many to one",
    "data.shuffle_block": "every stage draws independent rows",
}


@dataclass(frozen=True)
class Stage:
    """One table of the study: the runs of a condition, and what was changed since the stage before.

    measure: 'own' (windows of the strategy's length) or 'shared' (the same targets and context).
    rates: 'one' (the config's) or 'best' (of each strategy's grid). seeds: 'tuning' or 'evaluation'.
    """

    name: str
    condition: str
    measure: str
    changed: str
    rates: str = "one"
    seeds: str = "tuning"


STAGES = (
    Stage("published", "leaking", "own", "nothing yet: the original's protocol, with its ratios of shapes and passes"),
    Stage("document split", "documents", "own", "windows split at random -> documents split; as many passes as before"),
    Stage(
        "same targets", "documents", "shared", "windows of its own length -> the same targets and context; same runs"
    ),
    Stage("one epoch", "one_epoch", "shared", "many passes over a small text -> as many steps, at most one of a large"),
    Stage("equal tokens", "equal", "shared", "unequal -> equal tokens per step"),
    Stage("best rates", "equal", "shared", "one learning rate -> each strategy's best of a grid", "best"),
    Stage("seeds", "equal", "shared", "the one seed, which chose the rates -> several others", "best", "evaluation"),
)
BEST = next(number for number, stage in enumerate(STAGES) if stage.rates == "best")


@dataclass(frozen=True)
class Run:
    """One training run; its name is its folder's."""

    strategy: str
    condition: str
    rate: float  # config.optimizer.learning_rate
    seed: int

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.condition}-lr{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study as its arguments describe it. `overrides`: of all runs, field -> value as on a command line."""

    scale: str
    workdir: Path
    overrides: Mapping[str, str]
    rate: float  # of the stages that share one, and the middle of every grid
    tuning_seed: int
    seeds: tuple[int, ...]
    until: int  # the last stage that is run

    @property
    def shapes(self) -> Scale:
        return SCALES[self.scale]

    @property
    def stages(self) -> tuple[Stage, ...]:
        return STAGES[: self.until + 1]


Losses = Callable[[Run], float | None]  # at the shared context; inf: it diverged, None: failed, or has not run


def make_plan(workdir: Path, scale: str, given: Mapping[str, str], seeds: str | None, until: int) -> Plan:
    """The plan of a scale with overrides {field: value}; `seeds` as on the command line.

    Raises: ConfigError for whatever is wrong with one of them.
    """
    if scale not in SCALES:
        raise ConfigError("--scale", scale, f"choose one of {', '.join(SCALES)}")
    if not 0 <= until < len(STAGES):
        raise ConfigError("--until", until, f"stages go from 0 to {len(STAGES) - 1}")
    for name, why in SET_BY_STAGES.items():
        if name in given:
            raise ConfigError(f"config.{name}", given[name], f"not for this study to be given: {why}")
    overrides = {name: str(value) for name, value in SCALES[scale].overrides.items()} | dict(given)
    file = f"{CONFIGS / STRATEGIES[0]}.py:{SCALES[scale].config}"
    config = load_config(file, _flags(overrides))
    shortest = min(length for _, length in SCALES[scale].shapes)
    if not any(5 * context // 4 <= shortest for context in config.eval.contexts):
        message = f"none fits in the shortest length, {shortest}: give one of {shortest * 4 // 5} or less"
        raise ConfigError("config.eval.contexts", tuple(config.eval.contexts), message)
    if config.data.source == "recall":
        raise ConfigError("config.data.source", "recall", "has no text to split; name a source of documents")
    if not config.data.max_tokens:
        raise ConfigError("config.data.max_tokens", 0, "the text of the first stages is small: give it a limit")
    chosen = _numbers(seeds) if seeds else SCALES[scale].seeds
    if config.seed in chosen:
        raise ConfigError("--seeds", seeds, f"config.seed={config.seed} chooses the learning rates; leave it out")
    return Plan(scale, workdir, overrides, config.optimizer.learning_rate, config.seed, chosen, until)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError("--seeds", text, "give whole numbers divided by commas, such as 43,44,45") from None


def _flags(fields: Mapping[str, Any]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in fields.items()]


def make_run(plan: Plan, strategy: str, condition: str, rate: float, seed: int) -> Run:
    """A run of a condition; where its shape is that of equal tokens already, the run that has it."""
    place = STRATEGIES.index(strategy)
    if condition == "one_epoch" and plan.shapes.shapes[place] == plan.shapes.equal_shapes[place]:
        condition = "equal"
    return Run(strategy, condition, rate, seed)


def config_flags(plan: Plan, run: Run) -> list[str]:
    """The overrides of a run as flags: the scale's, the user's, and last what its condition is."""
    shapes = plan.shapes.equal_shapes if run.condition == "equal" else plan.shapes.shapes
    rows, length = shapes[STRATEGIES.index(run.strategy)]
    small = run.condition in ("leaking", "documents")
    fields = {
        "seed": run.seed,
        "batch_size": rows,
        "seq_len": length,
        "optimizer.learning_rate": repr(run.rate),
        "data.protocol": "published" if run.condition == "leaking" else "clean",
        "data.max_epochs": 0 if small else 1,
    }
    return _flags(dict(plan.overrides) | fields | ({} if small else {"data.max_tokens": 0}))


def config_name(plan: Plan, run: Run) -> str:
    """The file and scale of a run's strategy, as --config takes them."""
    path = CONFIGS / f"{run.strategy}.py"
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{path}:{plan.shapes.config}"


def command(plan: Plan, run: Run, train: Sequence[str]) -> list[str]:
    workdir = plan.workdir / run.name
    return [*train, f"--config={config_name(plan, run)}", f"--workdir={workdir}", *config_flags(plan, run)]


def stage_runs(plan: Plan, stage: Stage, strategy: str, losses: Losses) -> list[Run]:
    """The runs that a strategy's row of a stage is made of; at its best rate so far, where each has its own."""
    rate = plan.rate
    if stage.rates == "best":
        rate = best_rate(plan, strategy, losses)
    seeds = plan.seeds if stage.seeds == "evaluation" else (plan.tuning_seed,)
    return [make_run(plan, strategy, stage.condition, rate, seed) for seed in seeds]


def rates(plan: Plan, strategy: str, losses: Losses) -> Iterator[Run]:
    """The runs of a strategy's learning rates, one after another (grid.py)."""
    for rate in grid.grow(_loss_at(plan, strategy, losses), plan.rate, plan.shapes.max_rates):
        yield _tried(plan, strategy, rate)


def best_rate(plan: Plan, strategy: str, losses: Losses) -> float:
    """Of those tried so far; the config's where none has a loss."""
    return lowest(grid.known(_loss_at(plan, strategy, losses), plan.rate), plan.rate) or plan.rate


def _loss_at(plan: Plan, strategy: str, losses: Losses) -> grid.Loss:
    return lambda rate: losses(_tried(plan, strategy, rate))


def _tried(plan: Plan, strategy: str, rate: float) -> Run:
    return make_run(plan, strategy, STAGES[BEST].condition, rate, plan.tuning_seed)


def study(plan: Plan, losses: Losses) -> dict[str, Any]:
    """What the analysis has to know: the stages with the names of their runs, and the grids {strategy: {run: rate}}."""
    stages = []
    for number, stage in enumerate(plan.stages):
        runs = {s: [run.name for run in stage_runs(plan, stage, s, losses)] for s in STRATEGIES}
        entry = {"number": number, "name": stage.name, "changed": stage.changed, "measure": stage.measure}
        stages.append(entry | {"leaking": stage.condition == "leaking", "runs": runs})
    tuned = STRATEGIES if plan.until >= BEST else ()
    grids = {s: {run.name: run.rate for run in rates(plan, s, losses)} for s in tuned}
    about = {"scale": plan.scale, "tuning_seed": plan.tuning_seed, "rate": plan.rate, "shortest": shortest(plan)}
    return about | {"stages": stages, "grids": grids}


def shortest(plan: Plan) -> int:
    """The rows' length (tokens) that the shared context of every stage fits."""
    return min(length for _, length in plan.shapes.equal_shapes)


def describe(plan: Plan, train: Sequence[str]) -> list[str]:
    """Lines that name every stage, and the commands of its runs, as far as no loss decides on them."""
    lines, seen = [], set()
    for number, stage in enumerate(plan.stages):
        lines.append(f"# stage {number}, {stage.name}: {stage.changed}")
        if stage.seeds == "evaluation":
            seeds = ", ".join(map(str, plan.seeds))
            lines.append(f"# {len(STRATEGIES) * len(plan.seeds)} runs: each strategy at its best rate, seeds {seeds}")
            continue
        values = grid.first(plan.rate) if stage.rates == "best" else [plan.rate]
        for strategy in STRATEGIES:
            for rate in values:
                run = make_run(plan, strategy, stage.condition, rate, plan.tuning_seed)
                if run not in seen:
                    lines.append(" ".join(command(plan, run, train)))
                seen.add(run)
        if stage.rates == "best":
            lines.append(f"# and outwards while the best lies on the edge, to {plan.shapes.max_rates} rates at most")
    return lines
