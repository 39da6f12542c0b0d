"""Which mesh suits which strategy: what a step of many devices computes and sends, on paper, and its least time.

    python -m experiments.scale --workdir=runs/scale
    python -m experiments.scale --tokens=4194304 --devices=64,512 --seq=1,2,4,8 --workdir=runs/scale

Every strategy's rows, in steps of equal tokens, over the meshes (devices / seq, seq). Steps are compiled for simulated
devices and never run. Writes scale.json and report.md. Exit codes: 0; 2, a mistake.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # simulated devices, whatever is here

from experiments.flags import (  # noqa: E402
    OVERRIDES,
    Parser,
    as_folder,
    check_folder,
    load_config,
    make_folder,
    without_folder,
)  # fmt: skip
from research import target  # noqa: E402
from research.analysis import scale, scale_report  # noqa: E402
from research.config import ConfigError  # noqa: E402
from research.stages import refuse_stages

STRATEGIES = ("large_batch", "balanced", "long_seq")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser("scale", __doc__, OVERRIDES)
    parser.add_argument("--workdir", type=as_folder, required=True, help="of scale.json, report and figures")
    parser.add_argument("--scale", default="published", help="of the configs (default published)")
    parser.add_argument("--tokens", type=int, default=2**20, help="a step (default 1,048,576)")
    parser.add_argument("--devices", default="8,64,1024", help="how many (default %(default)s)")
    parser.add_argument("--seq", default="1,4,16", help="sizes of the mesh axis that divides positions")
    parser.add_argument("--report_only", action="store_true", help="from scale.json of the workdir")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        if not arguments.report_only:
            check_folder(arguments.workdir)
            rows = plan(arguments, overrides)
            make_folder(arguments.workdir)
            command = ["python", "-m", "experiments.scale", *without_folder(argv)]
            scale_report.save(arguments.workdir, command, arguments.tokens, rows)
        print(scale_report.write(arguments.workdir))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of all strategies, numbers of devices and meshes that can hold them."""
    counts, seqs = _numbers("--devices", arguments.devices), _numbers("--seq", arguments.seq)
    configs = [load_config(f"{CONFIGS / name}.py:{arguments.scale}", overrides) for name in STRATEGIES]
    for config in configs:
        refuse_stages(config)
    longest = math.lcm(*(config.seq_len for config in configs))
    if arguments.tokens < 1 or arguments.tokens % longest:
        raise ConfigError("--tokens", arguments.tokens, f"give a multiple of {longest}: whole rows of each strategy")
    todo = [
        (config, mesh) for config in configs for n in counts for mesh in scale.meshes(n, config, arguments.tokens, seqs)
    ]
    if not todo:
        raise ConfigError(
            "--devices", arguments.devices, "no mesh of these divides rows and positions; use powers of 2"
        )
    simulated = target.at_hand(max(counts))
    rows, begun = [], time.monotonic()
    for number, (config, mesh) in enumerate(todo, 1):
        rows.append(scale.plan(config, simulated, arguments.tokens, mesh))
        left = (time.monotonic() - begun) / number * (len(todo) - number)
        print(f"{number} of {len(todo)}: {config.strategy} on {mesh[0]} x {mesh[1]}, about {left:.0f} s left",
              file=sys.stderr, flush=True)  # fmt: skip
    return rows


def _numbers(flag: str, given: str) -> list[int]:
    try:
        numbers = [int(item) for item in given.split(",")]
    except ValueError:
        raise ConfigError(flag, given, "write whole numbers, such as 8,64") from None
    if min(numbers) < 1:
        raise ConfigError(flag, given, "must be 1 or more")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
