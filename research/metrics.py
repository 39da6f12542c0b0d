"""What a run says of itself: rows on disk, clocks, a progress line, its environment."""

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tensorboardX import SummaryWriter

from research import cores

log = logging.getLogger(__name__)
POSITION = ("step", "tokens", "flops", "train_seconds")  # in every row
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def of_step(got: dict[str, Any]) -> dict[str, float]:
    """The row of a step's metrics (step.train_step), as arrays on the host."""
    row = {
        "train/loss": float(got["loss"]),
        "train/balance_loss": float(got["balance_loss"]),
        "train/accuracy": float(got["accuracy"]),
        "optim/grad_norm": float(got["grad_norm"]),
        "optim/learning_rate": float(got["learning_rate"]),
    }
    for name in ("max_violation", "entropy"):
        for layer, value in enumerate(got["router"][name]):
            row[f"moe/load_{name}/layer_{layer:02d}"] = float(value)
    for name in ("load", "probability"):
        for (layer, expert), value in np.ndenumerate(got["router"][name]):
            row[f"moe/{name}/layer_{layer:02d}/expert_{expert:02d}"] = float(value)
    return row


class MetricsWriter:
    """Rows to metrics.jsonl and to TensorBoard, as a context manager.

    On a resume the rows after `resume_step`, of steps that are run again, are cut away first.
    """

    def __init__(self, workdir: str, resume_step: int):
        path = os.path.join(workdir, "metrics.jsonl")
        _cut(path, resume_step)
        self._file = open(path, "a")  # noqa: SIM115 (closed by __exit__)
        # from step 0 too: a run killed before its first checkpoint has left rows
        self._board = SummaryWriter(os.path.join(workdir, "tb"), purge_step=resume_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """A row with step, tokens, flops and train_seconds, of finite numbers (or None where there is no number).

        Raises: ValueError for a row that lacks one of them or holds a number that is not finite.
        """
        missing = [name for name in POSITION if name not in row]
        broken = [k for k, v in row.items() if v is not None and not math.isfinite(v)]
        if missing or broken:
            raise ValueError(f"row of step {row.get('step')}: missing {missing}, not finite {broken}")
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name not in POSITION and value is not None:
                self._board.add_scalar(name, value, row["step"])

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._board.close()


def _cut(path: str, resume_step: int) -> None:
    """Keep the whole rows up to a step; the file is replaced at once or not at all."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break  # a row that was being written when the run was killed
            try:
                before = json.loads(line)["step"] <= resume_step
            except (ValueError, KeyError, TypeError):
                log.warning("%s is damaged: rows after %d are dropped", path, len(kept))
                break
            if before:
                kept.append(line)
    with open(f"{path}.new", "wb") as file:
        file.writelines(kept)
    os.replace(f"{path}.new", path)


class Clocks:
    """Named sums of seconds, which go on over a resume."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._laps: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time inside the block to the clock `name`."""
        self._since[name] = time.monotonic()
        try:
            yield
        finally:
            self._sums[name] = self.total(name)
            del self._since[name]

    def total(self, name: str) -> float:
        """Seconds on the clock, those of a block that is still running too."""
        running = time.monotonic() - self._since[name] if name in self._since else 0.0
        return self._sums.get(name, 0.0) + running

    def lap(self, name: str, at: float) -> float:
        """Seconds from the lap before (or from where this process took the clock over) to the reading `at`."""
        before = self._laps.get(name, 0.0)
        self._laps[name] = at
        return at - before

    def add(self, seconds: dict[str, float]) -> None:
        """Adds what an earlier process measured; laps begin anew."""
        for name, value in seconds.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._laps[name] = self._sums[name]

    def to_dict(self) -> dict[str, float]:
        return {name: self.total(name) for name in {*self._sums, *self._since}}


class Progress:
    """Loss, tokens/s and time left: a bar on a terminal, else a plain line each tenth of the run and each minute."""

    def __init__(self, num_steps: int, first: int, label: str):
        self._num_steps, self._first, self._label = num_steps, first, label
        self._began = self._said = time.monotonic()
        self._bar = self._task = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
                TextColumn("{task.fields[status]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Bar(*columns)
            self._task = self._bar.add_task(label, total=num_steps, completed=first, status="compiled")

    def update(self, row: dict[str, Any]) -> None:
        """A finished step's row."""
        step, loss, speed = row["step"], row["train/loss"], row["perf/tokens_per_s"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=f"loss {loss:.3f}  {speed:,.0f} tokens/s")
            return
        now = time.monotonic()
        tenth = max(1, self._num_steps // 10)
        if step % tenth and step < self._num_steps and now - self._said < 60:
            return
        self._said = now
        left = (now - self._began) / max(1, step - self._first) * (self._num_steps - step)
        print(
            f"{self._label}: step {step}/{self._num_steps}  tokens {row['tokens']:,}  loss {loss:.3f}"
            f"  {speed:,.0f} tokens/s  {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


def environment() -> dict[str, Any]:
    """The device and the versions that a result came from; no name of a machine or a person."""
    return dict(
        device=device_name(),
        devices=jax.device_count(),
        platform=jax.default_backend(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: metadata.version(name) for name in PACKAGES},
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        **_commit(),
    )


def device_name() -> str:
    """Such as 'AMD EPYC (2 cores)' or 'NVIDIA H200'."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    return f"{_processor()} ({cores.count()} cores)"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> dict[str, Any]:
    """The commit of the code, and whether it was changed since; empty outside a git checkout."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return dict(commit=git("rev-parse", "HEAD"), changed=bool(git("status", "--porcelain", "-uno")))
    except (OSError, subprocess.CalledProcessError):
        return {}


def device_peak_bytes() -> int | None:
    """The most that the accelerator's allocator has held; None where it does not say (CPU)."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if not statistics else statistics.get("peak_bytes_in_use")
