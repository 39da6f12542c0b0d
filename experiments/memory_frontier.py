"""The memory frontier: for each length the largest batch that fits a budget, from compiled programs, nothing allocated.

    python -m experiments.memory_frontier --config=configs/balanced.py:published --budget=24GiB --lengths=256,1024,4096
    python -m experiments.memory_frontier --config=configs/balanced.py:cpu --budget=1GiB --lengths=128,512,2048 --law
    python -m experiments.memory_frontier --config=configs/balanced.py:published --budget=24GiB --topology=h200
    python -m experiments.memory_frontier --report_only --workdir=experiments/results/memory/published_h200

A budget is of one device; 24G and 24GiB are powers of 1024, 24GB of 1000. --remat, --attention, --dtype, --accumulation
and --mesh (data x seq, such as 1x1,8x1,2x4; simulated on CPU) take lists: every combination is planned. --topology
compiles for an accelerator that is not here (h200, h100, a100, h200:8, v5e:2x4). Without --law and --parts nothing but
the frontier is compiled. Writes frontier.json, frontier.csv, report.md and figures to --workdir.
Exit codes: 0; 2, a mistake, nothing written; 130, stopped by Ctrl-C.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.flags import OVERRIDES, Parser, as_folder, check_folder, load_config, make_folder, without_folder
from research import sizes
from research.config import CHOICES, ConfigError

FIELDS = {
    "remat": "model.remat",
    "attention": "model.attention",
    "dtype": "model.dtype",
    "accumulation": "train.accumulation",
}


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parse(sys.argv[1:] if argv is None else list(argv))
        if arguments.report_only:
            from research.analysis import memory_report

            print(memory_report.write(arguments.workdir))
            return 0
        check_folder(arguments.workdir)
        plan = make(arguments)
        make_folder(arguments.workdir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was compiled is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    from research.analysis import memory_report

    memory_report.save(plan, arguments.workdir)
    print(memory_report.write(arguments.workdir))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, lists parsed; `overrides` are those of the config. Raises: ConfigError for one that is wrong."""
    parser = Parser("memory_frontier", __doc__, OVERRIDES)
    parser.add_argument("--config", default="configs/balanced.py:cpu", help="FILE:SCALE (default %(default)s)")
    parser.add_argument("--budget", default="", help="of one device, such as 24GiB")
    parser.add_argument(
        "--lengths", default="", help="tokens per row, such as 256,1024,4096; the config's own if not given"
    )
    parser.add_argument("--remat", default="none,block,full", help="a list (default %(default)s)")
    parser.add_argument(
        "--attention", default="", help="of auto,xla,chunked,flash,cudnn; the config's own if not given"
    )
    parser.add_argument("--dtype", default="", help="of float32,bfloat16; the config's own if not given")
    parser.add_argument("--accumulation", default="", help="microbatches a step, a list; the config's own if not given")
    parser.add_argument("--mesh", default="", help="data x seq, such as 1x1,8x1,2x4; the config's own if not given")
    parser.add_argument("--topology", default="", help="an accelerator that is not here, such as h200 or v5e:2x4")
    parser.add_argument("--law", action="store_true", help="fit a + b B T + c B T^2 for each attention backend")
    parser.add_argument("--parts", action="store_true", help="what the memory of each cell is made of")
    parser.add_argument("--workdir", type=as_folder, default=Path("runs/frontier"), help="default %(default)s")
    parser.add_argument("--report_only", action="store_true", help="make the report again, compile nothing")
    arguments, rest = parser.parse_known_args(argv)
    for given in rest:
        if not (given.startswith("--config.") and "=" in given):
            raise ConfigError("argument", given, "unknown; write overrides as --config.field=value")
    arguments.overrides = rest
    if not arguments.report_only:
        sizes.parse(arguments.budget, "--budget")
        arguments.lengths = numbers("--lengths", arguments.lengths)
    return arguments


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers from 1, divided by commas, without repeats."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in found):
        raise ConfigError(name, text, "give whole numbers from 1, divided by commas")
    return list(dict.fromkeys(int(part) for part in found))


def choices(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Fields of the config for every combination of the lists that are given."""
    lists = {}
    for name, field in FIELDS.items():
        values = [part.strip() for part in getattr(arguments, name).split(",") if part.strip()]
        if name == "accumulation":
            values = numbers("--accumulation", getattr(arguments, name))
        for value in values:
            if field in CHOICES and value not in CHOICES[field]:
                raise ConfigError(f"--{name}", value, f"choose of {', '.join(CHOICES[field])}")
        if values:
            lists[field] = values
    if arguments.mesh:
        lists["mesh"] = [_mesh(part) for part in arguments.mesh.split(",")]
    found = []
    for values in itertools.product(*lists.values()):
        fields = dict(zip(lists, values, strict=True))
        data, seq = fields.pop("mesh", (None, None))
        found.append(fields | ({} if data is None else {"mesh.data": data, "mesh.seq": seq}))
    return found


def _mesh(text: str) -> tuple[int, int]:
    data, _, seq = text.partition("x")
    if not (data.isdecimal() and seq.isdecimal() and int(data) and int(seq)):
        raise ConfigError("--mesh", text, "write data x seq, such as 8x1 or 2x4")
    return int(data), int(seq)


def make(arguments: argparse.Namespace) -> dict[str, Any]:
    """What frontier.json holds. Raises: ConfigError for a mistake, and where nothing fits the budget."""
    config = load_config(arguments.config, arguments.overrides)
    lengths = arguments.lengths or [config.seq_len]
    planned = choices(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's remarks on programs that never run
    from research import target as targets  # after the mistakes that need no JAX
    from research.analysis import memory_plan

    devices = max(choice.get("mesh.data", 1) * choice.get("mesh.seq", 1) for choice in planned)
    target = targets.absent(arguments.topology) if arguments.topology else targets.at_hand(devices)
    if devices > len(target.devices):
        message = (
            f"wants {devices} devices, and --topology={arguments.topology} has {len(target.devices)}; name one of more"
        )
        raise ConfigError("--mesh", arguments.mesh, f"{message}, such as h200:{devices}")
    if target.platform == "cpu" and devices == 1 and config.mesh.data == -1:
        arguments.overrides.append("--config.mesh.data=1")  # a run would make devices of the cores
        config = load_config(arguments.config, arguments.overrides)
    plan = memory_plan.make(
        config, target, arguments.budget, lengths, planned, law=arguments.law, parts=arguments.parts
    )
    command = [
        "python",
        "-m",
        "experiments.memory_frontier",
        *without_folder(sys.argv[1:]),
    ]
    return dict(command=command, config=arguments.config, given=arguments.overrides) | plan


if __name__ == "__main__":
    sys.exit(main())
