"""Trains each strategy, each in a process of its own, and writes the comparison report.

    python -m experiments.ablation --scale=cpu --workdir=runs/ablation
    python -m experiments.ablation --workdir=runs/texts --strategies=balanced,long_seq \
        --config.seed=1 --config.data.source=text --config.data.path=texts/
    python -m experiments.ablation --report_only --workdir=experiments/results/ablation/cpu

Every --config.field=value goes to every strategy. The same command goes on where it was stopped.
Exit codes: 0, all finished; 2, a mistake in the config, nothing run; else that of the first
strategy that failed (its row says so), or 1.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.flags import load_config
from research.analysis import findings, report, study
from research.config import ConfigError

STRATEGIES = ("large_batch", "balanced", "long_seq")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TRAIN = (sys.executable, "-m", "experiments.train")
CHECK = (sys.executable, "-m", "experiments.ablation", "--check_only")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal stopped a run, which has saved its state. `code` is the exit code to leave with."""

    def __init__(self, code: int):
        super().__init__(f"stopped, exit code {code}; the same command goes on from there")
        self.code = code


def main(
    argv: Sequence[str] | None = None,
    train: Sequence[str] = TRAIN,
    check: Sequence[str] = CHECK,
) -> int:
    """The exit code. `train` and `check` are the commands of the child processes; tests give
    others.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments, overrides = parse(argv)
        if arguments.report_only:
            return report_only(arguments.workdir, arguments.strategies)
        strategies = arguments.strategies or list(STRATEGIES)
        configs = [load_strategy(strategy, arguments.scale, overrides) for strategy in strategies]
        if arguments.check_only:
            from research import train  # in this child alone JAX starts

            for config in configs:
                train.prepare(config)
            return 0
        commands = {
            strategy: train_command(train, strategy, arguments.scale, arguments.workdir, overrides)
            for strategy in strategies
        }
        if arguments.dry_run:
            print("\n".join(shlex.join(command) for command in commands.values()))
            return 0
        # In a child, so that this process holds no accelerator while the strategies need it.
        if code := run_child([*check, *argv]):
            return code
        run_all(commands, arguments.workdir)
        return write_report(arguments.workdir, None)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the overrides of the config as `--config.field=value`.

    Raises: ConfigError on an argument that is neither.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablation",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", default="cpu", help="of the configs: cpu (default) or published")
    parser.add_argument("--workdir", type=Path, required=True, help="each strategy gets a folder in it")
    parser.add_argument("--strategies", type=_names, help="names of configs/*.py, divided by commas")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    mode.add_argument("--check_only", action="store_true", help="check the configs, run nothing")
    mode.add_argument("--report_only", action="store_true", help="make the report again, run nothing")
    arguments, rest = parser.parse_known_args(argv)
    overrides = [argument for argument in rest if argument != "--"]
    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            raise ConfigError("argument", override, "unknown; write overrides as --config.field=value")
    return arguments, overrides


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def load_strategy(strategy: str, scale: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a strategy as `experiments.train` will read it.

    Raises: ConfigError for a strategy, scale, field or value that is not there.
    """
    path = CONFIGS / f"{strategy}.py"
    if not path.exists():
        raise ConfigError("--strategies", strategy, f"no such file {path.name} in {CONFIGS}")
    return load_config(f"{path}:{scale}", overrides)


def train_command(
    train: Sequence[str], strategy: str, scale: str, workdir: Path, overrides: Sequence[str]
) -> list[str]:
    path = CONFIGS / f"{strategy}.py"
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return [*train, f"--config={path}:{scale}", f"--workdir={workdir / strategy}", *overrides]


def run_all(commands: dict[str, list[str]], workdir: Path) -> None:
    """Runs each command to its end, one after another; one that fails does not stop the next.

    How each ended is kept in ablation.json. Raises: Interrupted when a signal stopped one.
    """
    for number, (strategy, command) in enumerate(commands.items(), 1):
        print(f"{strategy} ({number} of {len(commands)}): {shlex.join(command)}", flush=True)
        try:
            code = run_child(command)
        except Interrupted as stopped:
            _record(workdir, list(commands), {strategy: stopped.code})
            raise
        _record(workdir, list(commands), {strategy: code})
        if code:
            print(f"{strategy} failed: exit code {code}", file=sys.stderr, flush=True)


def run_child(command: Sequence[str]) -> int:
    """Exit code of a command that writes to this process's output; signals that come are handed on
    to it.

    The child has a session of its own: Ctrl-C reaches it once, through us. Raises: Interrupted
    after such a signal.
    """
    received: list[int] = []
    child: list[subprocess.Popen] = []

    def hand_on(number: int, _: Any) -> None:
        received.append(number)
        if child:
            child[0].send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        child.append(subprocess.Popen(command, start_new_session=True))
        if received:  # while it was starting
            child[0].send_signal(received[-1])
        code = child[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = 128 - code if code < 0 else code  # killed by a signal: as shells say it
    if received:
        raise Interrupted(code or 128 + received[0])
    return code


def _record(workdir: Path, strategies: Sequence[str], exit_codes: dict[str, int]) -> None:
    """Remembers how each run ended, for the report; strategies of earlier commands are kept."""
    workdir.mkdir(parents=True, exist_ok=True)
    known = _recorded(workdir)
    merged = list(dict.fromkeys([*known["strategies"], *strategies]))
    codes = known["exit_codes"] | exit_codes
    content = json.dumps({"strategies": merged, "exit_codes": codes}, indent=1)
    study.write_text(workdir / "ablation.json", content + "\n")


def _recorded(workdir: Path) -> dict[str, Any]:
    path = workdir / "ablation.json"
    return json.loads(path.read_text()) if path.exists() else {"strategies": [], "exit_codes": {}}


def write_report(workdir: Path, strategies: Sequence[str] | None) -> int:
    """Gathers the runs into `<workdir>/report/` and writes the report there; returns the exit code.

    `strategies`: None for all that were ever run in `workdir`.
    """
    recorded = _recorded(workdir)
    strategies = strategies or recorded["strategies"] or list(STRATEGIES)
    if not any((workdir / strategy).is_dir() for strategy in strategies):
        message = "holds no run of a strategy and no results.json"
        raise ConfigError("--workdir", str(workdir), message)
    runs = study.collect(workdir, strategies, recorded["exit_codes"])
    study.save(runs, workdir / "report")
    return _conclude(workdir / "report", recorded["exit_codes"])


def report_only(workdir: Path, strategies: Sequence[str] | None) -> int:
    """Makes the report again from a study's folder, or from the data files of a report's folder."""
    if (workdir / "results.json").exists():
        return _conclude(workdir, {})
    return write_report(workdir, strategies)


def _conclude(folder: Path, exit_codes: dict[str, int]) -> int:
    """Writes and prints the report of a folder; returns the exit code that its runs call for."""
    results = report.write(folder)
    runs = study.load(folder)
    finished = [run for run in runs if run.finished]
    if finished:
        print("\n" + findings.paragraph(finished, results["comparison"]))
    print(f"\n{folder / 'report.md'}")
    for run in runs:
        if not run.finished:
            print(f"{run.strategy} {run.status}", file=sys.stderr)
    failed = [exit_codes[run.strategy] for run in runs if exit_codes.get(run.strategy)]
    return failed[0] if failed else int(len(finished) < len(runs))


if __name__ == "__main__":
    sys.exit(main())
