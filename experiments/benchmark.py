"""Times our training step beside its peers', on the strategies' shapes, in one run.

    python -m experiments.benchmark --scale=cpu --repeats=5

A step is everything: forward, backward, clipping, Muon and AdamW, in the config's type; on a CPU, which would emulate
bfloat16, in float32, unless --config.model.dtype is given; the machine's matmul is of the same type. Every round times
one step of each implementation, right after another of its own as in training, and measures the machine, so that what
slows the machine down slows all of them: on a CPU on all strategies, on a GPU on one after another, and what a strategy
held is freed before the next. All train on the same random tokens, from random weights of the same distribution.

Peers run where JAX runs, if PyTorch is installed (experiments/peers.py), on a CPU in a process of its own each
(experiments/apart.py): `original` (tests/parity/original.py), written as the original experiment is; `compiled`, the
same by torch.compile; `mixtral`, of Hugging Face transformers, beside our gated experts. It has dropout in one place of
ours' five, so compare it without:

    python -m experiments.benchmark --implementations=ours,original,mixtral --config.model.activation=swiglu \
        --config.model.dropout=0

    python -m experiments.benchmark --scale=published --steps=1

takes real steps in a process for each shape and implementation, and reports its peak memory.

    python -m experiments.benchmark --scale=cpu --profile=traces

times the parts of a step too, each compiled alone, beside the least that the machine's products and copies could take
for them (experiments/parts.py, experiments/machine.py). It leaves a trace of two steps of each strategy in
traces/STRATEGY, for TensorBoard's profile plugin or Perfetto, and says where their time goes (experiments/trace.py). On
a GPU these two steps are of a program without CUDA graphs, which hide what a kernel is of: its kernels take the time
that they take, and the device waits longer between them.

Ours is the program of a run of 150 steps or more, which keeps its memory (research/heaps.py); with --short, of a
shorter run. --strategies, --implementations and any --config.field=value choose what runs.
Exit codes: 0; 1, an implementation failed (its row says how) or a profile is not whole; 2, a mistake in the arguments,
nothing written.
"""

import argparse
import datetime
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

from ml_collections import ConfigDict

from experiments import peers
from experiments.benchmark_table import show
from experiments.contestants import build, seconds_of
from experiments.flags import OVERRIDES, Parser, load_config
from experiments.rounds import progress, time_all
from research import process
from research.config import ConfigError
from research.stages import refuse_stages

PLATFORMS = ("cpu", "gpu", "tpu")
STRATEGIES = ("large_batch", "balanced", "long_seq")
IMPLEMENTATIONS = ("ours", "original", "compiled", "mixtral")
NEEDS = {"original": "torch", "compiled": "torch", "mixtral": "transformers"}
BUSY = 0.5  # processes that run on average before we begin
ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str]) -> int:
    # Or JAX takes three quarters of a GPU before a peer has begun.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        arguments, configs = parse(argv)
        if arguments.child:
            print(json.dumps(measure_memory(arguments, configs)))
            return 0
        content = describe(argv, arguments, configs)
        content |= run_children(arguments, configs, argv) if arguments.steps else time_all(arguments, configs)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from research.files import write_json

    out = Path(arguments.out or default_out(arguments))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, content)
    show(content)
    print(out)
    return int(any("failed" in row for row in content["rows"]) or not profiled(content, arguments, configs))


def profiled(content: dict[str, Any], arguments: argparse.Namespace, configs: dict[str, ConfigDict]) -> bool:
    """Whether all that --profile asks for is there."""
    if not arguments.profile or arguments.steps:
        return True
    wanted = ["parts", "trace"] if "ours" in arguments.implementations else ["parts"]
    return all(content.get(what, {}).get(name) is not None for what in wanted for name in configs)


def default_out(arguments: argparse.Namespace) -> str:
    return f"runs/benchmark/{arguments.scale}-{arguments.platform}{'-memory' if arguments.steps else ''}.json"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, ConfigDict]]:
    """The arguments, with the platform ('cpu', 'gpu' or 'tpu'), and the config of each chosen strategy.

    Raises: ConfigError for a value that is wrong, before anything runs.
    """
    arguments, overrides = make_parser().parse_known_args(argv)
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
    arguments.platform = arguments.child or platform_at_hand()
    if arguments.platform == "tpu" and arguments.implementations != ["ours"]:
        raise ConfigError("--implementations", given, "peers run on a CPU or GPU, and JAX runs on a TPU; use ours")
    if arguments.platform == "cpu":
        overrides = ["--config.model.dtype=float32", *overrides]
    configs = {}
    for name in arguments.strategies:
        configs[name] = load_config(f"{ROOT / 'configs' / name}.py:{arguments.scale}", overrides)
        refuse_stages(configs[name])
        check(configs[name], arguments.implementations)
    return arguments, configs


def make_parser() -> Parser:
    parser = Parser("benchmark", __doc__, OVERRIDES)
    parser.add_argument("--scale", default="cpu", help="of the configs: cpu (default) or published")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each of one timed step (default 5)")
    parser.add_argument("--steps", type=int, default=0, help="so many of each in a process of its own, for its memory")
    parser.add_argument(
        "--out", default="", metavar="FILE",
        help="of JSON, written at the end (default runs/benchmark/SCALE-DEVICE.json, DEVICE being cpu, gpu or tpu; with"
        " --steps SCALE-DEVICE-memory.json)",
    )  # fmt: skip
    parser.add_argument(
        "--strategies", default=",".join(STRATEGIES), help=f"of {','.join(STRATEGIES)}; all if not given"
    )
    parser.add_argument("--implementations", default="", help=f"of {','.join(IMPLEMENTATIONS)}")
    parser.add_argument("--short", action="store_true", help="ours as it is compiled for a run of less than 150 steps")
    parser.add_argument(
        "--profile", default="", metavar="FOLDER", help="also trace steps of ours; see experiments.trace"
    )
    parser.add_argument("--child", default="", choices=PLATFORMS, help=argparse.SUPPRESS)
    return parser


def platform_at_hand() -> str:
    """JAX begins, so it is told of a CPU's cores before. A child is told instead: PyTorch's does without JAX."""
    from research import cores

    cores.as_devices()
    import jax

    return jax.default_backend()


def choose(flag: str, given: str, known: Sequence[str]) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(flag, name, f"choose from {','.join(known)}")
    return names


def check(config: ConfigDict, implementations: Sequence[str]) -> None:
    accumulation = config.train.accumulation
    if accumulation != 1:
        raise ConfigError("config.train.accumulation", accumulation, "whole batches only; use 1")
    if "mixtral" in implementations and config.model.activation != "swiglu":
        message = "Mixtral's experts are gated; add --config.model.activation=swiglu"
        raise ConfigError("config.model.activation", config.model.activation, message)


def run_children(arguments: argparse.Namespace, configs: dict[str, ConfigDict], argv: Sequence[str]) -> dict[str, Any]:
    """A row for each strategy and implementation, of a process of its own."""
    rows = []
    for name, implementation in itertools.product(configs, arguments.implementations):
        progress(f"{name} {implementation}: {arguments.steps} step(s)")
        choice = [f"--child={arguments.platform}", f"--strategies={name}", f"--implementations={implementation}"]
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
    """In a child: its steps, the most memory it ever held, compilation included, and what its environment was."""
    (config,), (implementation,) = configs.values(), arguments.implementations
    step, facts = build(implementation, config, "cuda" if arguments.platform == "gpu" else "cpu", arguments.short)
    taken, losses = zip(*(seconds_of(step) for _ in range(arguments.steps)), strict=True)
    peak_bytes = process.peak_bytes()
    loaded = [name for name in ("jax", "torch") if name in sys.modules]
    row = dict(all_seconds=taken, losses=losses, peak_bytes=peak_bytes, loaded=loaded, device_peak_bytes=None) | facts()
    if implementation != "ours":
        return row | dict(environment=peers.environment())
    from research import metrics  # not before: it loads JAX and PyTorch

    return row | dict(environment=metrics.environment(), device_peak_bytes=metrics.device_peak_bytes())


def describe(argv: Sequence[str], arguments: argparse.Namespace, configs: dict[str, ConfigDict]) -> dict[str, Any]:
    """Where and how the numbers were made: `environment` is of this process, with --steps each row has its own."""
    from research import heaps, metrics

    others = [name for name in arguments.implementations if name != "ours"]
    versions = {NEEDS[name] for name in others} | ({"torch"} if others else set())
    load = os.getloadavg()[0]
    if load > BUSY:
        progress(f"warning: load average {load:.1f}: other work shares this machine, and so these timings")
    return dict(
        command=f"python -m experiments.benchmark {shlex.join(argv)}",
        date=datetime.date.today().isoformat(),
        scale=arguments.scale,
        repeats=arguments.steps or arguments.repeats,
        dtype=next(iter(configs.values())).model.dtype,
        run="short" if arguments.short else "long",
        load_average=load,
        environment=metrics.environment(),
        malloc=heaps.variables() or None,
        peers={name: importlib.metadata.version(name) for name in sorted(versions)},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
