"""Where the time of a step goes, from a trace that `python -m experiments.benchmark --profile=FOLDER` left.

    python -m experiments.trace traces/balanced

prints milliseconds a step of each part of the model, forward and backward; its kernels; how long the device waited
between kernels; and the longest kernels. What devices send each other, and wait for each other in, is a part of its
own. On a GPU: what the first device ran, of all programs in the trace; the benchmark traces a program without CUDA
graphs, for a graph hides which instruction a kernel is of. On a CPU: milliseconds of all cores together, and waiting is
not known. --steps=N says how many steps the trace holds, where it does not say so itself.
Exit codes: 0; 1, the trace holds nothing that a device ran; 2, no trace there.
"""

import collections
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.flags import Parser
from experiments.scopes import PARTS, part_of, scopes_of_programs

LONGEST = 15
CONTAINERS = re.compile(r"(while|call|conditional)(\.\d+)*$")  # on a CPU: their time is that of what is in them
NOTHING = "the trace holds nothing that a device ran"


class Event(NamedTuple):
    """A kernel that ran, or an operation on a CPU. `start` and `duration`: nanoseconds; instruction: what it is of."""

    scope: str
    name: str
    start: float
    duration: float
    instruction: str = ""

    @property
    def part(self) -> tuple[str, bool]:
        return part_of(self.scope, f"{self.instruction} {self.name}")


def main(argv: Sequence[str]) -> int:
    parser = Parser("trace", __doc__)
    parser.add_argument("folder", help="of the trace, such as traces/balanced")
    parser.add_argument("--steps", type=int, default=0, help="in the trace, where it does not say so itself")
    arguments = parser.parse_args(argv)
    try:
        found = read(arguments.folder, arguments.steps)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if found is None:
        print(f"{arguments.folder}: {NOTHING}")
        return 1
    from experiments.benchmark_table import console, trace_tables

    for table in trace_tables(Path(arguments.folder).name, found):
        console().print(table)
    return 0


def read(folder: str | Path, steps: int = 0) -> dict[str, Any] | None:
    """The summary of the newest trace under a folder (or of a *.xplane.pb); None where no device ran anything.

    steps: in the trace; 0: as it says itself, else 1. Raises: FileNotFoundError.
    """
    files = [Path(folder)] if Path(folder).is_file() else sorted(Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.xplane.pb there")
    from jax.profiler import ProfileData

    path = max(files, key=lambda file: file.stat().st_mtime)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reader's own types
        planes = list(ProfileData.from_file(str(path)).planes)
        programs = scopes_of_programs(path.read_bytes())
        gpu = [plane for plane in planes if plane.name == "/device:GPU:0"]
        events = list(kernels(gpu[0], programs) if gpu else operations(planes, programs))
        steps = steps or steps_of(planes) or 1
    return dict(device="gpu" if gpu else "cpu", **summarize(events, steps, waits=bool(gpu))) if events else None


def kernels(plane: Any, programs: dict[str, dict[str, str]]) -> Iterator[Event]:
    """What a GPU ran, on all streams: copies of memory as well, if they are an instruction's."""
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            said = dict(event.stats)
            if "hlo_op" in said:
                scopes = programs.get(str(said.get("program_id")), {})
                scope = scopes.get(said["hlo_op"]) or scopes.get(event.name) or said.get("name", "")
                yield Event(scope, event.name, event.start_ns, event.duration_ns, said["hlo_op"])


def operations(planes: Iterable[Any], programs: dict[str, dict[str, str]]) -> Iterator[Event]:
    """What XLA's threads ran on a CPU, each less what ran inside it on the same thread."""
    for plane in planes:
        if plane.name != "/host:CPU":
            continue
        for line in plane.lines:
            ran = []
            for event in line.events:
                said = dict(event.stats)
                if "hlo_op" in said and not CONTAINERS.match(event.name):
                    scope = programs.get(str(said.get("program_id")), {}).get(said["hlo_op"], "")
                    ran.append(Event(scope, event.name, event.start_ns, event.duration_ns))
            yield from less_inner(ran)


def less_inner(events: Iterable[Event]) -> list[Event]:
    """Events of one thread, each duration less those of the events inside it."""
    own, open_ = [], []  # [event, duration of what is inside]
    for event in sorted(events, key=lambda e: (e.start, -e.duration)):
        while open_ and open_[-1][0].start + open_[-1][0].duration <= event.start:
            open_.pop()
        if open_:
            open_[-1][1] += event.duration
        open_.append([event, 0.0])
        own.append(open_[-1])
    return [event._replace(duration=max(0.0, event.duration - inner)) for event, inner in own]


def steps_of(planes: Iterable[Any]) -> int:
    """How many steps were annotated (jax.profiler.StepTraceAnnotation)."""
    return len(
        {
            said["step_num"]
            for plane in planes
            if plane.name == "/host:CPU"
            for line in plane.lines
            for event in line.events
            if event.name == "train_step" and "step_num" in (said := dict(event.stats))
        }
    )


def summarize(events: Sequence[Event], steps: int, waits: bool = True) -> dict[str, Any]:
    """Events of `steps` steps as milliseconds and kernels a step.

    parts: rows of part, forward_ms, backward_ms, kernels, those that took time; longest: rows of name, scope, part, ms,
    kernels, one for each name in each scope. busy_ms: at least one ran; idle_ms: none did, between the first and the
    last (with `waits`; else both are None).
    """
    spent, count = collections.Counter(), collections.Counter()
    by_kernel, times = collections.Counter(), collections.Counter()
    for event in events:
        part, backward = event.part
        spent[part, backward] += event.duration
        count[part] += 1
        by_kernel[event.name, event.scope, part] += event.duration
        times[event.name, event.scope, part] += 1
    each = 1e-6 / steps
    busy = busy_time((event.start, event.start + event.duration) for event in events)
    span = max(e.start + e.duration for e in events) - min(e.start for e in events)
    return dict(
        steps=steps,
        kernels=len(events) / steps,
        busy_ms=busy * each if waits else None,
        idle_ms=(span - busy) * each if waits else None,
        parts=[
            dict(
                part=part,
                forward_ms=spent[part, False] * each,
                backward_ms=spent[part, True] * each,
                kernels=count[part] / steps,
            )
            for part in PARTS
            if count[part]
        ],
        longest=[
            dict(name=name, scope=scope, part=part, ms=ns * each, kernels=times[name, scope, part] / steps)
            for (name, scope, part), ns in by_kernel.most_common(LONGEST)
        ],
    )


def busy_time(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total = end = 0.0
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
