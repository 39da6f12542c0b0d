"""A frontier as one JSON value: its cells, and on request their parts and the law of memory, from compiled programs."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from research import metrics, sizes
from research.analysis import compute, frontier, memory, memory_law
from research.analysis.frontier import with_fields
from research.analysis.parts import parts as parts_of
from research.analysis.programs import Programs
from research.config import ConfigError
from research.stages import refuse_stages
from research.target import Target

LAW_BATCHES = (2, 4, 8)
COUNTED = ("xla", "chunked", "flash")  # backends whose work is in the traced program; cuDNN's kernel is one call


def make(
    config: Any, target: Target, budget: str, lengths: Sequence[int], choices: Sequence[dict[str, Any]],
    *, law: bool = False, parts: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """{'target', 'cells', 'law', ...}: see `frontier.frontier`, `parts.parts`, `memory_law.fit`.

    Says on stderr what is being compiled. Raises: ConfigError for what cannot run there, or where nothing fits.
    """
    size = sizes.parse(budget, "--budget")
    refuse_stages(config)
    backends = law_backends(config, target) if law else []
    grid = law_lengths(lengths) if law else []
    total = len(lengths) * len(choices) + len(backends) * len(grid) * len(LAW_BATCHES)
    for choice in choices:  # a mistake is said before anything compiles
        for length in lengths:
            frontier.checked(with_fields(config, choice | dict(seq_len=length)), Programs(target))
    with _progress(total) as progress:
        programs = Programs(target, progress.saying)

        def plan(choice: dict[str, Any]) -> list[tuple[frontier.Cell, dict[str, Any]]]:
            return [
                (cell, _entry(cell, config, parts, programs, progress))
                for cell in frontier.frontier(config, size, lengths, [choice], programs)
            ]

        def law_of(backend: str) -> dict[str, Any]:
            return _law(config, backend, grid, programs, progress)

        planned = [pair for pairs in _at_once(plan, choices, programs) for pair in pairs]
        if not any(cell.batch for cell, _ in planned):
            raise frontier.too_small("--budget", budget, [cell for cell, _ in planned])
        laws = _at_once(law_of, backends, programs)
    return dict(
        target=target.name,
        absent=target.absent,
        platform=target.platform,
        versions=target.versions,
        environment=metrics.environment(),
        budget=budget,
        budget_bytes=size,
        scale=config.scale,
        cells=[entry for _, entry in planned],
        law=laws,
    )


def _at_once(run: Callable[[Any], Any], items: Sequence[Any], programs: Programs) -> list[Any]:
    """run(item) of each in their order, on as many threads as there are cores: compilers let go of Python's lock.

    The first that fails stops the others at their next program.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(run, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [f for f in futures if f.done() and f.exception() is not None]
            return [future.result() for future in failed or futures]
        finally:
            programs.stop.set()
            pool.shutdown(cancel_futures=True)
            programs.stop.clear()


def _entry(cell, config, parts, programs, progress) -> dict[str, Any]:
    entry = dataclasses.asdict(cell) | dict(tokens=cell.tokens, total=cell.train.total if cell.train else None)
    entry["devices"] = memory.mesh_of(with_fields(config, cell.choice), programs.target).size
    if parts and cell.batch:
        fields = cell.choice | dict(seq_len=cell.seq_len, batch_size=cell.batch)
        entry["parts"] = parts_of(with_fields(config, fields), programs)
    progress.done()
    return entry


def law_backends(config: Any, target: Target) -> list[str]:
    """Attention backends whose laws can be told apart on a target."""
    best = memory.attention_of(config, target, "auto")
    return list(dict.fromkeys(["xla", "chunked", *(["flash"] if best == "cudnn" else []), best]))


def law_lengths(lengths: Sequence[int]) -> list[int]:
    """The shortest length, doubled up to the longest. Raises: ConfigError where they span less than four times."""
    shortest, longest = min(lengths), max(lengths)
    if longest < 4 * shortest:
        text = ",".join(str(length) for length in lengths)
        raise ConfigError("--lengths", text, "the law of memory needs lengths that span four times or more")
    found = [shortest]
    while 2 * found[-1] <= longest:
        found.append(2 * found[-1])
    return found


def _law(config, backend, lengths, programs, progress) -> dict[str, Any]:
    taken, done, refused = [], [], []
    for length in lengths:
        for batch in (number * frontier.unit_of(config, programs) for number in LAW_BATCHES):
            given = with_fields(config, {"model.attention": backend, "seq_len": length, "batch_size": batch})
            usage = programs.usage(given)
            point = memory_law.Point(batch, length, usage.total)
            (refused if usage.limit else taken).append(point)
            if backend in COUNTED:
                done.append(memory_law.Point(batch, length, compute.train_flops(given, programs.target)))
            progress.done()
    memory = _fitted(taken) if len(taken) > len(refused) else dict(ratios=[])
    if not memory["ratios"]:
        message = f"{len(refused)} of {len(refused) + len(taken)} programs with attention {backend} do not fit"
        message += f" {programs.target.name}: too few are left for its law; give shorter ones"
        raise ConfigError("--lengths", ",".join(map(str, lengths)), message)
    verdict, text = memory_law.verdict(memory["ratios"])
    if refused:
        text += f" {len(refused)} programs are left out, which the compiler refused: they need more than there is."
    found = dict(attention=backend, verdict=verdict, evidence=text, compute=_fitted(done) if done else None)
    return found | memory


def _fitted(points: Sequence[memory_law.Point]) -> dict[str, Any]:
    fitted = memory_law.fit(points)
    ratios = memory_law.ratios(points, fitted["a"]["value"])
    return dict(points=[dataclasses.asdict(p) for p in points], fit=fitted, ratios=ratios)


class _Waiting:
    """Says what is being compiled: on a terminal a bar, else a line for each program."""

    def __init__(self, bar: Progress | None, total: int):
        self._bar, self._done, self._total = bar, 0, total
        self._task = bar.add_task("", total=total) if bar else None

    def saying(self, text: str) -> None:
        if self._bar:
            self._bar.update(self._task, description=f"compiling {text}")
        else:
            print(f"[{self._done}/{self._total}] compiling {text}", file=sys.stderr, flush=True)

    def done(self) -> None:
        self._done += 1
        if self._bar:
            self._bar.advance(self._task)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[_Waiting]:
    if not sys.stderr.isatty():
        yield _Waiting(None, total)
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        yield _Waiting(bar, total)
