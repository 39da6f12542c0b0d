"""Is the plan true? Runs real steps beside their predictions, each in a process of its own.

    python -m experiments.memory_check --workdir=runs/frontier --most=4GiB

Takes the cells of a frontier (experiments/memory_frontier.py) that was compiled for the device at hand and need at most
--most: for each the planned batch and half of it. Writes check.json and the report again, after each; the same command
goes on where it was stopped, and tries again what failed. Exit codes: 0; 1, a step failed; 2, a mistake.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from experiments import child
from experiments.flags import Parser, as_folder
from research import sizes
from research.analysis import memory_report
from research.config import ConfigError
from research.files import write_text

STEP = (sys.executable, "-m", "experiments.memory_step")
# Of the C library: freed blocks of this size and more go back to the system at once, and threads share what else is
# freed. Otherwise it keeps some of up to 32 MiB (one step of half a GiB took 8 % to 14 % more than planned, not always
# the same), and each thread keeps its own: a buffer of 71 MB, taken by one thread and then by another, was there twice.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20), "MALLOC_ARENA_MAX": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("memory_check", __doc__)
    parser.add_argument("--workdir", type=as_folder, required=True, help="of a frontier")
    parser.add_argument("--most", default="4GiB", help="that a step may need (default 4GiB)")
    arguments = parser.parse_args(argv)
    try:
        plan = memory_report.read(arguments.workdir)
        most = sizes.parse(arguments.most, "--most")
        if plan["absent"]:
            raise ConfigError("--workdir", str(arguments.workdir), f"is a plan for {plan['target']}, which is not here")
        several = plan["platform"] == "cpu" and any(cell.get("devices", 1) > 1 for cell in plan["cells"])
        if several or "simulated" in plan["target"]:
            message = f"is a plan for {plan['target']}: what one of several in one memory takes cannot be told"
            raise ConfigError("--workdir", str(arguments.workdir), message)
        every = runs(plan)
        todo = [run for run in every if run["at_most"] <= most]
        if not todo:
            raise ConfigError("--most", arguments.most, "no cell needs so little")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    known = {run["overrides"]: run for run in memory_report.read_check(arguments.workdir)}
    for run in every:
        run |= known.get(run["overrides"], {})
    for number, run in enumerate(todo, 1):
        said = f"{number} of {len(todo)}: {run['overrides']}"
        if run.get("measured"):
            print(f"{said}: measured before", file=sys.stderr, flush=True)
            continue
        print(said, file=sys.stderr, flush=True)
        found = measure(plan["config"], [*plan["given"], *shlex.split(run["overrides"])], plan["platform"])
        if found.pop("target", plan["target"]) != plan["target"]:
            print(f"error: --workdir={str(arguments.workdir)!r}: is a plan for {plan['target']}, which is not here",
                  file=sys.stderr)  # fmt: skip
            return 2
        run |= found
        begun = [run for run in every if "measured" in run]  # those of another --most too
        write_text(arguments.workdir / "check.json", json.dumps(begun, indent=1) + "\n")
        memory_report.write(arguments.workdir)
    print(memory_report.write(arguments.workdir))
    return int(any(run["measured"] is None for run in todo))


def runs(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The planned batch of each cell, and half of it.

    `planned`: bytes, by the plan; of half a batch None. `at_most`: as many. The step that runs says what it was
    compiled to, `predicted`.
    """
    found = []
    for cell in plan["cells"]:
        for batch in dict.fromkeys((cell["batch"], cell["batch"] // 2 // cell["unit"] * cell["unit"])):
            if batch:
                overrides = memory_report.overrides(cell | dict(batch=batch))
                planned = cell["total"] if batch == cell["batch"] else None
                found.append(dict(overrides=overrides, planned=planned, at_most=cell["total"], choice=cell["choice"],
                                  batch=batch, seq_len=cell["seq_len"]))  # fmt: skip
    return found


def measure(config: str, overrides: Sequence[str], platform: str) -> dict[str, Any]:
    """What a step takes: `predicted`, `measured` (bytes) and `seconds`; None in each where it failed, and `error`."""
    command = [*STEP, f"--config={config}", "--workdir=-", *overrides]
    environment = os.environ | (GIVE_BACK if platform == "cpu" else {})  # a GPU's allocator counts for itself
    done = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=child.ended_with_us())
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"failed: {error}", file=sys.stderr)
        return dict(predicted=None, measured=None, seconds=None, error=error)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
