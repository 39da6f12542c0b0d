"""A plan for many devices as people read it: report.md, from scale.json alone."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from research import metrics
from research.analysis.memory_report import markdown
from research.analysis.scale import MACHINES, best
from research.config import ConfigError
from research.files import write_text

_amount = EngFormatter(unit="B", places=0)


def save(folder: Path, command: Sequence[str], tokens: int, rows: Sequence[dict[str, Any]]) -> None:
    """Writes scale.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(command=list(command), environment=metrics.environment(), tokens=tokens, rows=list(rows))
    write_text(folder / "scale.json", json.dumps(content, indent=1) + "\n")


def write(folder: Path) -> str:
    """Writes report.md; returns it and where it is. Raises: ConfigError where there is no scale.json."""
    try:
        found = json.loads((folder / "scale.json").read_text())
    except FileNotFoundError:
        raise ConfigError("--workdir", str(folder), "holds no scale.json; leave out --report_only") from None
    except ValueError as error:
        raise ConfigError("--workdir", str(folder), f"scale.json is damaged ({error}); make it again") from None
    text = "\n\n".join([heading(found), markdown(*table(found["rows"])), *sentences(found["rows"])])
    write_text(folder / "report.md", text + "\n")
    return f"{text}\n\n{folder / 'report.md'}"


def heading(found: dict[str, Any]) -> str:
    machines = "; ".join(
        f"{m.name}: {m.flops / 1e12:,.0f} TFLOP/s in bfloat16, {m.flops32 / 1e12:,.0f} of the optimizer's float32, and"
        f" {_amount(m.near)}/s to" + (f" the node, {_amount(m.far)}/s out of it" if m.far != m.near else " the others")
        for m in MACHINES
    )
    return (
        f"# Steps of {found['tokens']:,} tokens on many devices, on paper\n\n"
        f"`{shlex.join(found['command'])}`\n\n"
        "What a device sends is read from the program compiled for as many simulated devices, by the ring algorithm; "
        "what it computes is counted in the traced step. Floors are at the data sheet's peak and bandwidth "
        f"({machines}): nothing was run. Meshes are data x seq; * is the lowest floor of computing and sending in turn."
    )


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = ["strategy", "devices", "mesh", "each device holds", "TFLOP: model + optimizer",
               "sent: gradients + keys and values + optimizer"]  # fmt: skip
    columns += [f"{machine.name}: compute + send" for machine in MACHINES]
    lines = []
    for row in rows:
        group = [r for r in rows if (r["strategy"], r["devices"]) == (row["strategy"], row["devices"])]
        model, optimizer = (row["flops"][name] / 1e12 for name in ("model", "optimizer"))
        sent = " + ".join(_amount(amount) if amount else "0" for amount in row["sent"].values())
        holds = f"{row['rows'] // row['data']} x {row['seq_len'] // row['seq']}"
        floors = []
        for machine in MACHINES:
            floor = row["floors"][machine.name]
            star = " *" if len(group) > 1 and best(group, machine.name) is row else ""
            floors.append(f"{floor['compute'] * 1e3:.2f} + {floor['send'] * 1e3:.2f} ms{star}")
        mesh = f"{row['data']} x {row['seq']}"
        computed = f"{model:.2f} + {optimizer:.2f}"
        lines.append([f"`{row['strategy']}`", f"{row['devices']:,}", mesh, holds, computed, sent, *floors])
    return columns, lines


def sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What follows, selected by the numbers."""
    said = []
    for machine in MACHINES:
        chosen = []
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            for devices in sorted({row["devices"] for row in rows}):
                group = [r for r in rows if (r["strategy"], r["devices"]) == (strategy, devices)]
                if not group:
                    chosen.append(f"`{strategy}` on {devices:,} fits no mesh")
                    continue
                row = best(group, machine.name)
                floor = row["floors"][machine.name]
                share = floor["compute"] / (floor["compute"] + floor["send"])
                chosen.append(f"`{strategy}` on {devices:,}: {row['data']} x {row['seq']}, computing {share:.0%} of it")
        said.append(f"- **{machine.name}**, lowest floor: {'; '.join(chosen)}.")
    return ["\n".join(said)]
