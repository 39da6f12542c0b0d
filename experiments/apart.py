"""Contestants in a process of their own each, where they are as quick as they are alone.

On a CPU PyTorch's threads wait for work awake. In one process with ours they hold cores that ours needs, and told to
sleep instead (OMP_WAIT_POLICY=passive) they make PyTorch itself slower, by a fifth or so. So there each peer of each
strategy, and what the machine does by PyTorch, lives in another process, which sleeps between its turns. Its peak
memory is then its own, and torch.compile compiles for one shape, not for any.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

from ml_collections import ConfigDict

from experiments import machine
from experiments.contestants import Facts, Step, build

_here: dict[str, Callable] = {}  # in that process: what it was asked to make


@contextlib.contextmanager
def process() -> Iterator[ProcessPoolExecutor]:
    """One process, started afresh: nothing of this one's is in its memory. It ends with the block."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def build_in(pool: ProcessPoolExecutor, implementation: str, config: ConfigDict, device: str) -> tuple[Step, Facts]:
    """`contestants.build`, in the other process. Raises: what it raises there."""
    name = f"{config.strategy} {implementation}"
    pool.submit(_build, name, implementation, config, device).result()
    return _asking(pool, f"{name} step"), _asking(pool, f"{name} facts")


def speeds_in(pool: ProcessPoolExecutor, library: str, platform: str, dtype: str) -> dict[str, Callable[[], float]]:
    """`machine.speeds`, in the other process."""
    names = pool.submit(_measurements, library, platform, dtype).result()
    return {name: _asking(pool, name) for name in names}


def _asking(pool: ProcessPoolExecutor, name: str) -> Callable:
    return lambda: pool.submit(_call, name).result()


def _build(name: str, implementation: str, config: ConfigDict, device: str) -> None:
    _here[f"{name} step"], _here[f"{name} facts"] = build(implementation, config, device)


def _measurements(library: str, platform: str, dtype: str) -> list[str]:
    work = machine.speeds(library, platform, dtype)
    _here.update(work)
    return list(work)


def _call(name: str) -> object:
    return _here[name]()
