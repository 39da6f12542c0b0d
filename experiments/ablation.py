"""Trains each strategy, each run in a process of its own, and writes the report that compares them.

    python -m experiments.ablation --scale=cpu --workdir=runs/ablation
    python -m experiments.ablation --workdir=runs/study --seeds=42,43,44 --settings=independent,paired,recall
    python -m experiments.ablation --workdir=runs/texts --strategies=balanced,long_seq \
        --config.seed=1 --config.data.source=text --config.data.path=texts/
    python -m experiments.ablation --workdir=runs/equal --memory=2GiB
    python -m experiments.ablation --report_only --workdir=experiments/results/stdlib/cpu

Settings: `independent`, as the config says (each row from a place of its own); `paired`, in an order that gives every
strategy the same tokens at each step; `recall`, the synthetic recall task. A strategy whose rows are as long as the
blocks of the paired order is trained once for both.
--memory gives each strategy on text the largest batch that fits so much of a device, instead of its own.
Every --config.field=value goes to every run on text, every --STRATEGY.field=value, such as
--long_seq.optimizer.learning_rate=0.02 (experiments.tune finds it), to those of that strategy, every
--recall.field=value to every run on the recall task. The same command goes on where it was stopped.
Exit codes: 0, all finished; 2, a mistake in the config, nothing run; else that of the first run that failed (the report
says so), or 1.
"""

import argparse
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.child import Interrupted, checked, exit_code, run_child
from experiments.flags import OVERRIDES, Parser, as_folder, load_config, make_folder
from experiments.strategies import HELP, STRATEGIES, config_file, load_strategy, names, shape_flags
from research import sizes
from research.analysis import archive, findings, noise, report
from research.analysis.study import FINISHED, SETTINGS, Key
from research.analysis.tables import duration
from research.config import ConfigError
from research.files import write_json

TRAIN = (sys.executable, "-m", "experiments.train")
CHECK = (sys.executable, "-m", "experiments.ablation", "--check_only")


@dataclass(frozen=True)
class Planned:
    """A run to be made: where it is kept, and the config file and overrides that it is trained by."""

    key: Key
    file: str
    overrides: tuple[str, ...]

    def command(self, train: Sequence[str], workdir: Path) -> list[str]:
        return [*train, f"--config={self.file}", f"--workdir={workdir / self.key.name}", *self.overrides]


def main(
    argv: Sequence[str] | None = None,
    train: Sequence[str] = TRAIN,
    check: Sequence[str] = CHECK,
) -> int:
    """The exit code. `train` and `check` are the commands of the child processes; tests give others."""
    return exit_code(lambda: _study(sys.argv[1:] if argv is None else list(argv), train, check))


def _study(argv: list[str], train: Sequence[str], check: Sequence[str]) -> int:
    arguments = parse(argv)
    if arguments.report_only:
        return report_only(arguments.workdir)
    planned = plan(arguments)
    if arguments.check_only:
        return checked(lambda: check_all(planned, arguments.workdir))
    if arguments.dry_run:
        print("\n".join(shlex.join(run.command(train, arguments.workdir)) for run in planned))
        return 0
    recorded(arguments.workdir)  # a damaged one is said before anything runs
    # In a child, so that this process holds no accelerator while the runs need it.
    if code := run_child([*check, *argv]):
        return code
    make_folder(arguments.workdir)
    run_all(planned, arguments.workdir, train)
    return write_report(arguments.workdir)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; `overrides`, `recall` and `own` (by strategy) are those of the configs, `--config.field=value`.

    Raises: ConfigError on an argument that is not known.
    """
    parser = Parser("ablation", __doc__, OVERRIDES)
    parser.add_argument("--scale", default="cpu", help="of the configs: cpu (default) or published")
    parser.add_argument("--workdir", type=as_folder, required=True, help="each run gets a folder in it")
    parser.add_argument("--strategies", type=names, default=list(STRATEGIES), help=HELP)
    parser.add_argument("--memory", default="", help="of a device, such as 24GiB: plans each strategy's batch size")
    parser.add_argument("--seeds", type=names, default=[], help="such as 42,43,44; the config's own if not given")
    parser.add_argument("--settings", type=names, default=["independent"], help=f"of {','.join(SETTINGS)}")
    parser.add_modes()
    arguments, rest = parser.parse_known_args(argv)
    arguments.own = {strategy: [] for strategy in arguments.strategies}
    arguments.overrides, arguments.recall = [], []
    lists = arguments.own | {"recall": arguments.recall, "config": arguments.overrides}
    for given in (argument for argument in rest if argument != "--"):
        who, _, field = given.removeprefix("--").partition(".")
        if not (given.startswith("--") and who in lists and "=" in field):
            message = "unknown; write overrides as --config.field=value, or with a strategy's name for config"
            raise ConfigError("argument", given, message)
        lists[who].append(f"--config.{field}")
    _check_arguments(arguments)
    if arguments.memory:
        arguments.overrides += ["--config.batch_size=-1", f"--config.memory_budget={arguments.memory}"]
    return arguments


def _check_arguments(arguments: argparse.Namespace) -> None:
    given = {override.partition("=")[0] for override in arguments.overrides}
    for strategy, overrides in arguments.own.items():
        own = {override.partition("=")[0] for override in overrides}
        for field in (name.removeprefix("--config.") for name in sorted(own)):
            if field.startswith(("seed", "data.", "eval.")):  # or their losses would be of unlike targets
                message = "is one for all strategies: give it as --config.field=value"
                raise ConfigError(f"--{strategy}.{field}", "given", message)
        given |= own & {"--config.batch_size", "--config.memory_budget"}
    for setting in arguments.settings:
        if setting not in SETTINGS:
            raise ConfigError("--settings", setting, f"choose of {', '.join(SETTINGS)}")
    for seed in arguments.seeds:
        if not (seed.isascii() and seed.isdecimal()):
            raise ConfigError("--seeds", seed, "give whole numbers, 0 or more, divided by commas")
    arguments.seeds = list(dict.fromkeys(str(int(seed)) for seed in arguments.seeds))  # 042 is 42
    if arguments.memory:
        sizes.parse(arguments.memory, "--memory")
        for name in ("batch_size", "memory_budget"):
            if f"--config.{name}" in given:
                raise ConfigError("--memory", arguments.memory, f"--config.{name} is given too; give one of them")
    if arguments.seeds and "--config.seed" in given:
        raise ConfigError("--seeds", ",".join(arguments.seeds), "--config.seed is given too; give one of them")
    if not (arguments.strategies and arguments.settings):
        raise ConfigError("--strategies", "", "name at least one, and at least one of --settings")


def plan(arguments: argparse.Namespace) -> list[Planned]:
    """The runs of a study, seed by seed, so that one that is stopped half-way can be compared already.

    Raises: ConfigError for a strategy, scale, field or value that is not there.
    """
    texts = {name: [*arguments.overrides, *arguments.own[name]] for name in arguments.strategies}
    configs = {name: load_strategy(name, arguments.scale, overrides) for name, overrides in texts.items()}
    longest = max(config.seq_len for config in configs.values())
    for config in configs.values():
        if config.data.shuffle_block:
            message = "--settings chooses the order: independent has no blocks, paired sets its own; leave it out"
            raise ConfigError("config.data.shuffle_block", config.data.shuffle_block, message)
    if "paired" in arguments.settings and any(c.data.protocol == "published" for c in configs.values()):
        message = "the published protocol knows one order alone; add --config.data.protocol=clean, or leave it out"
        raise ConfigError("--settings", "paired", message)
    planned = []
    for seed in arguments.seeds or [None]:
        for name, config in configs.items():
            number = config.seed if seed is None else int(seed)
            given = [f"--config.seed={seed}"] if seed is not None else []
            for setting in arguments.settings:
                if setting == "recall":
                    file, overrides = config_file(name, "recall"), [*_shared(arguments.overrides), *arguments.recall]
                    load_strategy(name, "recall", overrides)
                else:
                    file, overrides = config_file(name, arguments.scale), texts[name]
                overrides = [*shape_flags(name), *overrides, *given]
                if setting == "paired":
                    if config.seq_len == longest and not config.train.stages and "independent" in arguments.settings:
                        continue  # its rows are the blocks: both orders are one
                    overrides.append(f"--config.data.shuffle_block={longest}")
                planned.append(Planned(Key(name, setting, number), file, tuple(overrides)))
    return planned


def _shared(overrides: Sequence[str]) -> list[str]:
    """Those that say where a run is made, not what: the recall task takes these alone."""
    return [o for o in overrides if o.startswith(("--config.mesh.", "--config.data.cache_dir=", "--config.seed="))]


def check_all(planned: Sequence[Planned], workdir: Path) -> int:
    """Checks the config of every run, but of one seed each, and that the folders there are hold no other.

    Raises: ConfigError for the first mistake.
    """
    from research import checkpoint, planner, train

    fingerprints: dict[tuple[str, str], str] = {}
    for run in planned:
        folder, kind = workdir / run.key.name, (run.key.strategy, run.key.setting)
        begun = (folder / "config.json").exists()
        if kind in fingerprints and not begun:
            continue
        config = planner.planned(load_config(run.file, run.overrides), str(folder))
        if kind not in fingerprints:
            fingerprints[kind] = train.prepare(config)[0].fingerprint
        if begun:
            checkpoint.refuse_another(folder, config.to_dict(), fingerprints[kind])
    return 0


def run_all(planned: Sequence[Planned], workdir: Path, train: Sequence[str]) -> None:
    """Makes each run to its end, one after another; one that fails does not stop the next.

    How each ended is kept in ablation.json. Raises: Interrupted when a signal stopped one.
    """
    keys, begun = [run.key for run in planned], time.monotonic()
    for number, run in enumerate(planned, 1):
        left = ""
        if number > 1:
            mean = (time.monotonic() - begun) / (number - 1)
            left = f", about {duration(mean * (len(planned) - number + 1))} left"
        command = run.command(train, workdir)
        print(f"{run.key.name} ({number} of {len(planned)}{left}): {shlex.join(command)}", flush=True)
        try:
            code = run_child(command)
        except Interrupted as stopped:
            _record(workdir, keys, {run.key.name: stopped.code})
            raise
        _record(workdir, keys, {run.key.name: code})
        if code:
            print(f"{run.key.name} failed: exit code {code}", file=sys.stderr, flush=True)


def _record(workdir: Path, keys: Sequence[Key], exit_codes: dict[str, int]) -> None:
    """Remembers how each run ended, for the report; runs of earlier commands are kept."""
    known, codes = recorded(workdir)
    merged = [asdict(key) for key in dict.fromkeys([*known, *keys])]
    write_json(workdir / "ablation.json", {"runs": merged, "exit_codes": codes | exit_codes})


def recorded(workdir: Path) -> tuple[list[Key], dict[str, int]]:
    path = workdir / "ablation.json"
    if not path.exists():
        return [], {}
    known = archive.read_json(path)
    try:
        return [Key(**key) for key in known["runs"]], dict(known["exit_codes"])
    except (KeyError, TypeError, ValueError) as error:
        message = f"{path.name} is damaged ({error!r}); remove it and give the study's command again: no run is lost"
        raise ConfigError("--workdir", str(workdir), message) from None


def write_report(workdir: Path) -> int:
    """Gathers all runs that were ever asked for in `workdir` into `<workdir>/report/`, and writes the report there."""
    keys, exit_codes = recorded(workdir)
    if not keys:
        raise ConfigError("--workdir", str(workdir), "holds no study (no ablation.json) and no results.json")
    archive.save(archive.collect(workdir, keys, exit_codes), workdir / "report")
    noise.copy(workdir, workdir / "report")
    return _conclude(workdir / "report", exit_codes)


def report_only(workdir: Path) -> int:
    """Makes the report again from a study's folder, or from the data files of a report's folder."""
    return _conclude(workdir, {}) if (workdir / "results.json").exists() else write_report(workdir)


def _conclude(folder: Path, exit_codes: dict[str, int]) -> int:
    """Writes and prints the report of a folder; returns the exit code that its runs call for."""
    results = report.write(folder)
    unfinished = [run for run in results["runs"] if run["status"] != FINISHED]
    if results["analysis"]["arms"] or results["analysis"]["recall"]:
        found = findings.as_list(results["analysis"]).splitlines()
        print("\n" + "\n".join(textwrap.fill(line, width=110, subsequent_indent="  ") for line in found))
    print(f"\n{folder / 'report.md'}\n{folder / 'report.html'}")
    for run in unfinished:
        print(f"{run['strategy']}-{run['setting']}-{run['seed']} {run['status']}", file=sys.stderr)
    failed = [code for code in exit_codes.values() if code]
    return failed[0] if failed else int(bool(unfinished))


if __name__ == "__main__":
    sys.exit(main())
