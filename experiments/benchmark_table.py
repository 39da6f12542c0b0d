"""What the benchmark measured, as tables on the screen."""

import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

TIMED = ("tokens/s", "GFLOP/s", "of the matmul", "over ours", "a token's cost", "its FLOPs")


def show(content: dict[str, Any]) -> None:
    """The rows as a table on the screen."""
    timed = "machine" in content
    table = Table(title=f"{content['scale']}, {content['environment']['device']}, {content['date']}")
    numbers = TIMED if timed else ("peak memory", "compiled step")
    for name in ("strategy", "B x T", "implementation"):
        table.add_column(name)
    for name in ("s a step", *numbers):
        table.add_column(name, justify="right", no_wrap=True)
    for row in content["rows"]:
        shape = f"{row['batch_size']} x {row['seq_len']}"
        cells = timed_cells(row) if timed else memory_cells(row)
        table.add_row(row["strategy"], shape, row["implementation"], *cells)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if timed:
        for name, speed in content["machine"].items():
            console.print(f"{name}: {speed['median'] / 1e9:.1f} G/s, best {speed['best'] / 1e9:.1f}")
    if "parts" in content:
        console.print(parts_table(content))


def parts_table(content: dict[str, Any]) -> Table:
    """Milliseconds of each part a step, and what share of the matmul peak its products reach; then the whole step."""
    peak = max(speed["best"] for name, speed in content["machine"].items() if name.startswith("matmul"))
    whole = {row["strategy"]: row for row in content["rows"] if row["implementation"] == "ours"}
    table = Table(title="parts of a step, each compiled alone: ms, and share of the matmul peak")
    table.add_column("part")
    for name in content["parts"]:
        table.add_column(name, justify="right")
    for lines in zip(*content["parts"].values(), strict=True):
        cells = [
            f"{1e3 * p['seconds']['median']:.1f}  {p['flops'] / p['seconds']['median'] / peak:4.0%}" for p in lines
        ]
        table.add_row(lines[0]["part"], *cells)
    sums = [sum(p["seconds"]["median"] for p in rows) for rows in content["parts"].values()]
    table.add_row("sum", *(f"{1e3 * seconds:.1f}      " for seconds in sums), end_section=False)
    if whole:
        cells = [
            f"{1e3 * whole[n]['seconds']['median']:.1f}  {whole[n]['matmul_share']:4.0%}" for n in content["parts"]
        ]
        table.add_row("the step itself", *cells)
    return table


def timed_cells(row: dict[str, Any]) -> list[str]:
    ratio = row.get("over_ours")
    return [
        with_spread(row["seconds"]),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['flops_per_second'] / 1e9:,.1f}",
        f"{row['matmul_share']:.0%}",
        with_spread(ratio) if ratio else "",
        f"{row['cost_per_token']:.2f}",
        f"{row['flops_per_token_ratio']:.2f}",
    ]


def memory_cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return ["", row["failed"], ""]
    compiled = row.get("compiled_bytes")
    return [
        f"{float(np.median(row['all_seconds'])):.2f}",
        f"{row['peak_bytes'] / 1e9:.2f} GB",
        f"{compiled / 1e9:.2f} GB" if compiled else "",
    ]


def with_spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['p10']:.3g} to {values['p90']:.3g})"
