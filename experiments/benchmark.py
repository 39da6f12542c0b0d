"""Times our training step beside its peers', on the strategies' shapes, in one run.

    python -m experiments.benchmark --scale=cpu --repeats=5 \
        --out=experiments/results/benchmark/cpu.json

A step is everything: forward, backward, clipping, Muon and AdamW, on all cores, in float32 unless
--config.model.dtype=bfloat16 is given (ours alone); the machine's matmul is of the same type. Every
round takes one step of each implementation on each strategy and measures the machine, so that what
slows the machine down slows all of them. Both train on the same random tokens, from random weights
of the same distribution. Peers run on the CPU, where PyTorch is installed: `original`
(tests/parity/original.py), written as the original experiment is; `compiled`, the same by
torch.compile; `mixtral`, of Hugging Face transformers, beside our gated experts:

    python -m experiments.benchmark --implementations=ours,original,mixtral --config.model.activation=swiglu --out=...

    python -m experiments.benchmark --scale=published --steps=1 --out=...

takes real steps in a process for each shape and implementation, and reports its peak memory.
    python -m experiments.benchmark --scale=cpu --profile=traces --out=...

times the parts of a step too, each compiled alone, and leaves a trace of two steps of each strategy in
traces/STRATEGY, for TensorBoard's profile plugin or Perfetto.
--strategies, --implementations and any --config.field=value choose what runs.
Exit codes: 0; 1, a step failed (its row says how); 2, a mistake in the arguments, nothing written.
"""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.benchmark_table import show
from experiments.contestants import BUILDERS, Step, machine_speeds, seconds_of
from experiments.flags import load_config
from research import process
from research.config import ConfigError

STRATEGIES = ("large_batch", "balanced", "long_seq")
IMPLEMENTATIONS = ("ours", "original", "compiled", "mixtral")
NEEDS = {"original": "torch", "compiled": "torch", "mixtral": "transformers"}
BUSY = 0.5  # processes that run on average before we begin
ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str]) -> int:
    # Before anything loads OpenMP, for the original's sake: where its threads spin while they wait, other work on the
    # same cores makes a step hundreds of times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        arguments, configs = parse(argv)
        if arguments.child:
            print(json.dumps(measure_memory(arguments, configs)))
            return 0
        if not arguments.steps:
            from research import cores  # not in a child that is PyTorch's: it loads JAX

            cores.as_devices()
        run = run_children if arguments.steps else time_all
        content = describe(argv, arguments) | run(arguments, configs, argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from research.files import write_json

    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, content)
    show(content)
    print(arguments.out)
    return int(any("failed" in row for row in content["rows"]))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, ConfigDict]]:
    """The arguments, and the config of each chosen strategy.

    Raises: ConfigError for a value that is wrong, before anything runs.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--out", required=True)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--implementations", default="")
    parser.add_argument("--profile", default="", metavar="FOLDER")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args(argv)
    for name, least in (("repeats", 1), ("steps", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name}", getattr(arguments, name), f"must be {least} or more")
    if arguments.profile and arguments.steps:
        raise ConfigError("--profile", arguments.profile, "needs steps that are timed; leave out --steps")
    arguments.strategies = choose("--strategies", arguments.strategies, STRATEGIES)
    has_torch = importlib.util.find_spec("torch") is not None
    given = arguments.implementations or ",".join(IMPLEMENTATIONS[: 1 + has_torch])
    arguments.implementations = choose("--implementations", given, IMPLEMENTATIONS)
    for name in arguments.implementations:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            raise ConfigError("--implementations", given, f"{name} needs pip install {NEEDS[name]}")
    overrides = ["--config.model.dtype=float32", *overrides]
    configs = {}
    for name in arguments.strategies:
        configs[name] = load_config(f"{ROOT / 'configs' / name}.py:{arguments.scale}", overrides)
        check(configs[name], arguments.implementations)
    return arguments, configs


def choose(flag: str, given: str, known: Sequence[str]) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(flag, name, f"choose from {','.join(known)}")
    return names


def check(config: ConfigDict, implementations: Sequence[str]) -> None:
    dtype, accumulation = config.model.dtype, config.train.accumulation
    if accumulation != 1:
        raise ConfigError("config.train.accumulation", accumulation, "whole batches only; use 1")
    if peers(implementations) and dtype != "float32":
        message = f"{peers(implementations)[0]} runs in float32; add --implementations=ours"
        raise ConfigError("config.model.dtype", dtype, message)
    if "mixtral" in implementations and config.model.activation != "swiglu":
        message = "Mixtral's experts are gated; add --config.model.activation=swiglu"
        raise ConfigError("config.model.activation", config.model.activation, message)


def peers(implementations: Sequence[str]) -> list[str]:
    return [name for name in implementations if name != "ours"]


def time_all(arguments: argparse.Namespace, configs: dict[str, ConfigDict], _: Sequence[str]) -> dict[str, Any]:
    """One step of every contestant and one measurement of the machine a round, in turn."""
    import jax

    others = peers(arguments.implementations)
    if others and jax.default_backend() != "cpu":
        message = f"runs on the CPU, JAX on {jax.default_backend()}; use ours"
        raise ConfigError("--implementations", others[0], message)
    steps, facts = {}, {}
    for name, config in configs.items():
        for implementation in arguments.implementations:
            progress(f"{name} {implementation}: build, and one step to warm up")
            contestant = (name, implementation)
            steps[contestant], facts[contestant] = BUILDERS[implementation](config)
            steps[contestant]()
    (dtype,) = {config.model.dtype for config in configs.values()}  # an override, or float32, for all of them
    machine = machine_speeds(bool(others), dtype)
    for measure in machine.values():
        measure()
    seconds = {contestant: [] for contestant in steps}
    speeds = {name: [] for name in machine}
    for number in range(arguments.repeats):
        for name, measure in machine.items():
            speeds[name].append(measure())
        for name in configs:
            turn = arguments.implementations[:: -1 if number % 2 else 1]  # each goes first in turn
            for implementation in turn:
                gc.collect()
                taken, loss = seconds_of(steps[name, implementation])
                seconds[name, implementation].append(taken)
                where = f"round {number + 1}/{arguments.repeats} {name} {implementation}"
                progress(f"{where}: {taken:.3f} s, loss {loss:.3f}")
    parts = profile(arguments, configs, steps) if arguments.profile else {}
    return dict(
        machine={name: spread(values) | dict(best=max(values)) for name, values in speeds.items()},
        rows=compare(seconds, {contestant: f() for contestant, f in facts.items()}, configs, speeds),
        **parts,
    )


def profile(
    arguments: argparse.Namespace, configs: dict[str, ConfigDict], steps: dict[tuple[str, str], Step]
) -> dict[str, Any]:
    """{'parts': the rows of each strategy's parts}; leaves traces of two of our steps."""
    import jax

    from experiments import parts

    found = {}
    for name, config in configs.items():
        if (name, "ours") in steps:
            with jax.profiler.trace(str(Path(arguments.profile) / name)):
                for _ in range(2):
                    steps[name, "ours"]()
        progress(f"{name}: parts of a step")
        found[name] = parts.measure(config, arguments.repeats)
    return dict(parts=found)


def spread(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("p10", "median", "p90"), np.percentile(values, (10, 50, 90)).tolist(), strict=True))


def compare(
    seconds: dict[tuple[str, str], list[float]],
    facts: dict[tuple[str, str], dict[str, Any]],
    configs: dict[str, ConfigDict],
    speeds: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """A row for each (strategy, implementation).

    matmul_share: model FLOP/s over the fastest matmul seen. over_ours: a peer's seconds over ours, of the steps of one
    round. cost_per_token and flops_per_token_ratio: over those of the shortest strategy.
    """
    from research import flops

    peak = max(max(values) for name, values in speeds.items() if name.startswith("matmul"))
    shortest = min(configs, key=lambda name: configs[name].seq_len)
    cost = {n: flops.train_flops_per_token(c.model, c.seq_len) for n, c in configs.items()}

    def tokens_per_second(name: str, implementation: str) -> float:
        taken = float(np.median(seconds[name, implementation]))
        return configs[name].batch_size * configs[name].seq_len / taken

    rows = []
    for (name, implementation), taken in seconds.items():
        config, rate = configs[name], tokens_per_second(name, implementation)
        row = dict(
            strategy=name,
            implementation=implementation,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seconds=spread(taken),
            all_seconds=taken,
            tokens_per_second=rate,
            flops_per_second=rate * cost[name],
            matmul_share=rate * cost[name] / peak,
            cost_per_token=tokens_per_second(shortest, implementation) / rate,
            flops_per_token_ratio=cost[name] / cost[shortest],
            **facts[name, implementation],
        )
        ours = seconds.get((name, "ours"))
        if implementation != "ours" and ours:
            row["over_ours"] = spread(np.divide(taken, ours))
        rows.append(row)
    return rows


def run_children(arguments: argparse.Namespace, configs: dict[str, ConfigDict], argv: Sequence[str]) -> dict[str, Any]:
    """A row for each strategy and implementation, of a process of its own."""
    rows = []
    for name, implementation in itertools.product(configs, arguments.implementations):
        progress(f"{name} {implementation}: {arguments.steps} step(s)")
        choice = ["--child", f"--strategies={name}", f"--implementations={implementation}"]
        command = [sys.executable, "-m", "experiments.benchmark", *argv, *choice]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        if child.returncode == 2:
            sys.exit(2)  # the child has said which field is wrong
        failed = dict(failed=f"exit code {child.returncode}")
        measured = failed if child.returncode else json.loads(child.stdout)
        shape = dict(batch_size=configs[name].batch_size, seq_len=configs[name].seq_len)
        rows.append(dict(strategy=name, implementation=implementation) | shape | measured)
    return dict(rows=rows)


def measure_memory(arguments: argparse.Namespace, configs: dict[str, ConfigDict]) -> dict[str, Any]:
    """In a child: its steps, and the most memory it ever held, compilation included."""
    (config,), (implementation,) = configs.values(), arguments.implementations
    step, facts = BUILDERS[implementation](config)
    taken, losses = zip(*(seconds_of(step) for _ in range(arguments.steps)), strict=True)
    peak_bytes = process.peak_bytes()
    loaded = [name for name in ("jax", "torch") if name in sys.modules]
    from research import metrics  # not before: it loads JAX and PyTorch

    return dict(
        all_seconds=taken,
        losses=losses,
        peak_bytes=peak_bytes,
        loaded=loaded,
        device_peak_bytes=metrics.device_peak_bytes() if implementation == "ours" else None,
        **facts(),
    )


def describe(argv: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Where and how the numbers were made."""
    from research import metrics

    others = peers(arguments.implementations)
    versions = {NEEDS[name] for name in others} | ({"torch"} if others else set())
    load = os.getloadavg()[0]
    if load > BUSY:
        progress(f"warning: load average {load:.1f}: other work shares this machine, and so these timings")
    return dict(
        command=f"python -m experiments.benchmark {shlex.join(argv)}",
        date=datetime.date.today().isoformat(),
        scale=arguments.scale,
        repeats=arguments.steps or arguments.repeats,
        load_average=load,
        environment=metrics.environment(),
        malloc=os.environ.get("GLIBC_TUNABLES"),
        peers={name: importlib.metadata.version(name) for name in sorted(versions)},
    )


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
