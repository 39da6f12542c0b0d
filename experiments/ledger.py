"""How each run of a study ended, in a file of the study's folder: for studies that add runs as they go."""

import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.child import Interrupted, run_child
from research import files
from research.analysis import archive
from research.analysis.runs import DIVERGED, DIVERGED_CODE, FINISHED, finished


def read(path: Path) -> dict[str, Any]:
    """`exit_codes` and `seconds` by run, and what the study keeps beside them. Raises: ConfigError if damaged."""
    return {"exit_codes": {}, "seconds": {}} | (archive.read_json(path) if path.exists() else {})


def write(path: Path, state: Mapping[str, Any]) -> None:
    files.write_json(path, state)


def ensure(path: Path, name: str, command: Sequence[str], title: str) -> None:
    """Makes the run `name` beside `path`, or leaves one that has finished or diverged.

    One that fails is said and recorded, and stops nothing. Raises: Interrupted when a signal stopped it.
    """
    folder, state = path.parent / name, read(path)
    if finished(folder) or state["exit_codes"].get(name) == DIVERGED_CODE:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # no one goes on with a finished run
        return
    print(title, flush=True)
    began = time.monotonic()
    try:
        code = run_child(command)
    except Interrupted as stopped:
        _record(path, state, name, stopped.code, time.monotonic() - began)
        raise
    _record(path, state, name, code, time.monotonic() - began)
    if code == DIVERGED_CODE:
        print(f"{name} diverged", file=sys.stderr, flush=True)
    elif code:
        print(f"{name} failed: exit code {code}: {shlex.join(command)}", file=sys.stderr, flush=True)
    else:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _record(path: Path, state: dict[str, Any], name: str, code: int, seconds: float) -> None:
    """Keeps how a run ended, and how long its processes took, starts and compilation included."""
    state["exit_codes"][name] = code
    state["seconds"][name] = round(state["seconds"].get(name, 0) + seconds, 1)
    write(path, state)


def conclude(runs: Sequence[Mapping[str, Any]], folder: Path) -> int:
    """Prints where the report is, and which runs of results.json are not finished; the exit code they call for."""
    print(f"\n{folder / 'report.md'}\n{folder / 'report.html'}")
    left = [run for run in runs if run["status"] not in (FINISHED, DIVERGED)]
    for run in left:
        print(f"{run['name']} {run['status']}", file=sys.stderr)
    return next((run["exit_code"] for run in left if run["exit_code"]), int(bool(left)))
