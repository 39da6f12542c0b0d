"""The rounds of the benchmark: every contestant takes steps in each, in turn, and the machine is measured.

A contestant is (strategy, implementation). One that fails leaves its reason, and the others go on.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import apart, machine
from experiments.contestants import WITHOUT_GRAPHS, Step, build, build_ours, seconds_of
from experiments.peers import WARM_UP, release
from research import flops
from research.config import ConfigError

Contestant = tuple[str, str]  # strategy, implementation


def time_all(arguments: argparse.Namespace, configs: dict[str, ConfigDict]) -> dict[str, Any]:
    """One timed step of every contestant and one measurement of the machine a round, in turn."""
    import jax

    (dtype,) = {config.model.dtype for config in configs.values()}
    peak = peak_of(jax.devices()[0].device_kind, dtype)
    measures = machine.speeds("jax", arguments.platform, dtype)
    build_peer, torch_speeds = build, machine.speeds
    with contextlib.ExitStack() as stack:

        def alone(make: Callable, *given: Any) -> Any:
            return make(stack.enter_context(apart.process()), *given)

        if arguments.platform == "cpu":
            build_peer, torch_speeds = (functools.partial(alone, f) for f in (apart.build_in, apart.speeds_in))
        if arguments.implementations != ["ours"]:
            measures |= torch_speeds("torch", arguments.platform, dtype)
        results = rounds(arguments, configs, measures, build_peer)
    rows = compare(results.seconds, results.facts, configs, results.speeds, failed=results.failed, peak=peak)
    add_rooflines(rows, results)
    return dict(
        machine={name: spread(values) | dict(best=max(values)) for name, values in results.speeds.items()},
        rows=rows,
        **results.profiles,
    )


def peak_of(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of a device in a type, by its data sheet; None where it is not known: all there are, are of bfloat16."""
    return flops.peak_flops(device_kind) if dtype == "bfloat16" else None


def add_rooflines(rows: list[dict[str, Any]], results: "Results") -> None:
    """To the parts of a profile, and to our rows that have one: `machine.roofline`. The whole step's FLOPs are its
    parts'; its bytes are its own (parameters and state, read and written, and a batch), not what parts hand on."""
    ours = {row["strategy"]: row for row in rows if row["implementation"] == "ours" and "failed" not in row}
    for name, parts in results.profiles.get("parts", {}).items():
        for part in parts:
            part |= machine.roofline(part["flops"], part["compulsory_bytes"], part["seconds"]["median"], results.speeds)
        if name in ours:
            row, total = ours[name], sum(part["flops"] for part in parts)
            found = machine.roofline(total, row["compulsory_bytes"], row["seconds"]["median"], results.speeds)
            row["roofline"] = dict(flops=total) | found


def rounds(
    arguments: argparse.Namespace,
    configs: dict[str, ConfigDict],
    measures: dict[str, Callable[[], float]],
    build_peer: Callable,
) -> "Results":
    """On a CPU of all strategies, on a GPU of one after another. measures: of the machine, by name."""
    import jax

    on_gpu = jax.default_backend() == "gpu"
    for measure in measures.values():
        measure()
    results = Results({name: [] for name in measures})
    for names in [[name] for name in configs] if on_gpu else [list(configs)]:
        steps, facts = build_all(arguments, configs, names, build_peer, results)
        for number in range(arguments.repeats):
            for name, measure in measures.items():
                measure()  # so that what is timed follows no pause, as with the steps
                results.speeds[name].append(measure())
            take_turns(arguments, names, steps, number, results)
        for contestant in steps:
            with results.catching(contestant):
                results.facts[contestant] = facts[contestant]()
        if arguments.profile:
            for name in names:
                profile(arguments, name, configs[name], steps.get((name, "ours")), results)
        del steps, facts  # and with them what they hold of the device
        gc.collect()
        if on_gpu and arguments.implementations != ["ours"]:
            release()
    return results


@dataclasses.dataclass
class Results:
    """What was measured so far, by (strategy, implementation): `failed` is the first line of a reason. `profiles`:
    {'parts', 'trace'} by strategy."""

    speeds: dict[str, list[float]]
    seconds: dict[Contestant, list[float]] = dataclasses.field(default_factory=dict)
    facts: dict[Contestant, dict[str, Any]] = dataclasses.field(default_factory=dict)
    failed: dict[Contestant, str] = dataclasses.field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def catching(self, contestant: Contestant) -> Iterator[None]:
        """An implementation that fails does not end the run: the others go on. (A mistake in a config does.)"""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            self.failed[contestant] = reason(error)
            progress(f"{' '.join(contestant)}: failed: {self.failed[contestant]}")


def build_all(
    arguments: argparse.Namespace,
    configs: dict[str, ConfigDict],
    names: Sequence[str],
    build_peer: Callable,
    results: Results,
) -> tuple[dict[Contestant, Step], dict[Contestant, Callable]]:
    """(steps, facts) of the contestants of some strategies that can be built and have taken their steps to warm up."""
    import jax

    on_gpu = jax.default_backend() == "gpu"
    steps, facts = {}, {}
    for contestant in itertools.product(names, arguments.implementations):
        name, implementation = contestant
        progress(f"{name} {implementation}: build, and steps to warm up")
        with results.catching(contestant):
            given = implementation, configs[name], "cuda" if on_gpu else "cpu"
            ours = implementation == "ours"
            step, facts[contestant] = build(*given, arguments.short) if ours else build_peer(*given)
            for _ in range(WARM_UP.get(implementation, 3 if on_gpu else 1)):
                step()
            steps[contestant] = step
    return steps, facts


def take_turns(
    arguments: argparse.Namespace,
    names: Sequence[str],
    steps: dict[Contestant, Step],
    number: int,
    results: Results,
) -> None:
    """A step of each contestant after another of its own, as in training; one that fails takes no more.

    The first after a pause takes PyTorch up to half as long again: its threads have slept, and the caches are others'.
    """
    for name in names:
        for implementation in arguments.implementations[:: -1 if number % 2 else 1]:  # each goes first in turn
            contestant = (name, implementation)
            if contestant not in steps:
                continue
            gc.collect()
            with results.catching(contestant):
                steps[contestant]()
                taken, loss = seconds_of(steps[contestant])
                results.seconds.setdefault(contestant, []).append(taken)
                where = f"round {number + 1}/{arguments.repeats} {name} {implementation}"
                progress(f"{where}: {taken:.3f} s, loss {loss:.3f}")
            if contestant in results.failed:
                del steps[contestant]


def profile(arguments: argparse.Namespace, name: str, config: ConfigDict, step: Step | None, results: Results) -> None:
    """Where the time of a strategy's step goes: a trace of two of ours, if they ran, and the parts of one, alone."""
    from experiments import parts

    work = dict(parts=lambda: parts.measure(config, arguments.repeats, arguments.short))
    if step is not None:
        work = dict(trace=lambda: traced(Path(arguments.profile) / name, config, step)) | work
    for what, measure in work.items():
        progress(f"{name}: {what} of a step")
        try:
            results.profiles.setdefault(what, {})[name] = measure()
        except Exception as error:  # the times that were measured are worth more
            progress(f"{name}: no {what}: {reason(error)}")


def traced(folder: Path, config: ConfigDict, step: Step) -> dict[str, Any] | None:
    """What `trace.read` finds in a trace of two steps, which is left in `folder`."""
    import jax

    from experiments import trace

    if jax.default_backend() == "gpu":
        step, _ = build_ours(config, compiler_options=WITHOUT_GRAPHS)
        step()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down
    with jax.profiler.trace(str(folder), profiler_options=options):
        for number in range(2):
            with jax.profiler.StepTraceAnnotation("train_step", step_num=number):
                step()
    return trace.read(folder)


def reason(error: Exception) -> str:
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def spread(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("p10", "median", "p90"), np.percentile(values, (10, 50, 90)).tolist(), strict=True))


def compare(
    seconds: dict[Contestant, list[float]],
    facts: dict[Contestant, dict[str, Any]],
    configs: dict[str, ConfigDict],
    speeds: dict[str, list[float]],
    failed: dict[Contestant, str] | None = None,
    peak: float | None = None,
) -> list[dict[str, Any]]:
    """A row for each (strategy, implementation); of one that failed, its shape and the reason.

    matmul_share: model FLOP/s over the fastest matmul seen. mfu: model FLOP/s of a device over `peak`, the FLOP/s of
    one in the type that is computed in, by its data sheet, or None. over_ours: a peer's seconds over ours, of the steps
    of one round. cost_per_token and flops_per_token_ratio: over those of the shortest strategy (the first is None where
    that one failed).
    """
    failed = failed or {}
    fastest = max(max(values) for name, values in speeds.items() if name.startswith("matmul"))
    shortest = min(configs, key=lambda name: configs[name].seq_len)
    cost = {n: flops.train_flops_per_token(c.model, c.seq_len) for n, c in configs.items()}
    rate = {
        (name, implementation): configs[name].batch_size * configs[name].seq_len / float(np.median(taken))
        for (name, implementation), taken in seconds.items()
        if (name, implementation) not in failed
    }
    order = list(dict.fromkeys([*seconds, *failed]))
    rows = []
    for name, implementation in sorted(order, key=lambda c: list(configs).index(c[0])):
        config, contestant = configs[name], (name, implementation)
        row = dict(strategy=name, implementation=implementation, batch_size=config.batch_size, seq_len=config.seq_len)
        rows.append(row)
        if contestant in failed:
            row["failed"] = failed[contestant]
            continue
        taken, speed, base = seconds[contestant], rate[contestant], rate.get((shortest, implementation))
        devices = facts[contestant].get("devices", 1)
        row |= dict(
            seconds=spread(taken),
            all_seconds=taken,
            tokens_per_second=speed,
            flops_per_second=speed * cost[name],
            matmul_share=speed * cost[name] / fastest,
            mfu=flops.mfu(speed / devices, cost[name], peak) if peak else None,
            cost_per_token=base / speed if base else None,
            flops_per_token_ratio=cost[name] / cost[shortest],
            **facts[contestant],
        )
        if implementation != "ours" and (name, "ours") in rate:
            row["over_ours"] = spread(np.divide(taken, seconds[name, "ours"]))
    return rows


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
