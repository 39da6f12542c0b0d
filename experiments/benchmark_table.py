"""What the benchmark measured, as tables on the screen."""

import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

TIMED = ("tokens/s", "GFLOP/s", "of matmul", "over ours", "a token's cost", "its FLOPs", "compile")
MEMORY = ("peak memory", "compiled step")
PLANNED, PROCESS = "planned", "process peak"  # of ours, by the compiler; of a peer, as measured


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 190)


def show(content: dict[str, Any]) -> None:
    """The rows as a table on the screen, and what else was measured."""
    out = console()
    out.print(rows_table(content))
    for row in content["rows"]:
        if "failed" in row:
            out.print(f"{row['strategy']} {row['implementation']} failed: {row['failed']}", markup=False)
    for name, speed in content.get("machine", {}).items():
        out.print(f"{name}: {speed['median'] / 1e9:,.1f} G/s, best {speed['best'] / 1e9:,.1f}")
    for name, parts in content.get("parts", {}).items():
        out.print(parts_table(name, parts, content))
    for name, found in content.get("trace", {}).items():
        for table in trace_tables(name, found):
            out.print(table)


def rows_table(content: dict[str, Any]) -> Table:
    """A line for each row; model FLOPs utilisation and memory of the device, or of peers' processes, if there are any.

    compile: seconds of ours; of `compiled`, of its first step. planned: what the compiler says that ours needs.
    """
    timed, rows = "machine" in content, content["rows"]
    about = [content["scale"], content.get("dtype"), content["environment"]["device"], content["date"]]
    table = Table(title=", ".join(filter(None, about)))
    numbers = list(TIMED if timed else MEMORY)
    if timed and any(row.get("mfu") for row in rows):
        numbers.insert(3, "MFU")
    if content["environment"].get("platform") == "gpu":
        numbers.append("device memory")
    elif timed and any("process_peak_bytes" in row for row in rows):
        numbers += [PLANNED, PROCESS]
    for name in ("strategy", "B x T", "implementation"):
        table.add_column(name)
    for name in ("s a step", *numbers):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = {"s a step": "failed"} if "failed" in row else timed_cells(row) if timed else memory_cells(row)
        cells["device memory"] = device_memory(row)
        shape = f"{row['batch_size']} x {row['seq_len']}"
        found = (cells.get(name, "") for name in ("s a step", *numbers))
        table.add_row(row["strategy"], shape, row["implementation"], *found)
    return table


def trace_tables(name: str, found: dict[str, Any] | None) -> list[Table | str]:
    """Where the time of a traced step went, by part of the model and by kernel: `trace.read` of it."""
    if found is None:
        return [f"{name}: the trace holds nothing that a device ran"]
    of = "on the device" if found["device"] == "gpu" else "of all cores together"
    parts = Table(title=f"{name}: where the time goes, ms a step {of}")
    parts.add_column("part")
    for title in ("forward", "backward", "both", "share", "kernels"):
        parts.add_column(title, justify="right")
    total = sum(p["forward_ms"] + p["backward_ms"] for p in found["parts"])
    for p in found["parts"]:
        both = p["forward_ms"] + p["backward_ms"]
        numbers = f"{p['forward_ms']:.2f}", f"{p['backward_ms']:.2f}", f"{both:.2f}", f"{both / total:.0%}"
        parts.add_row(p["part"], *numbers, f"{p['kernels']:,.0f}")
    parts.add_row("sum", "", "", f"{total:.2f}", "", f"{found['kernels']:,.0f}")
    if found["idle_ms"] is not None:
        parts.add_row("the device waits", "", "", f"{found['idle_ms']:.2f}", "", "")
    longest = Table(title=f"{name}: the longest kernels, ms a step")
    for title in ("kernel", "part"):
        longest.add_column(title, no_wrap=True, max_width=50)
    for title in ("ms", "times"):
        longest.add_column(title, justify="right")
    longest.add_column("what it is of", no_wrap=True)
    for kernel in found["longest"]:
        numbers = f"{kernel['ms']:.2f}", f"{kernel['kernels']:,.0f}"
        longest.add_row(kernel["name"], kernel["part"], *numbers, kernel["scope"][-70:])
    return [parts, longest]


def parts_table(name: str, parts: list[dict[str, Any]], content: dict[str, Any]) -> Table:
    """A strategy's parts, their sum, and the step itself: time, shares of the machine's matmul and copy, the least time
    that these two give, and how many times that it took. (A file of before bytes were counted has the first two alone.)
    """
    table = Table(title=f"{name}: parts of a step, each compiled alone")
    table.add_column("part")
    for title in ("ms", "of matmul", "of copy", "floor, ms", "over floor"):
        table.add_column(title, justify="right")
    peak = max(speed["best"] for name, speed in content["machine"].items() if name.startswith("matmul"))
    for p in parts:
        seconds = p["seconds"]["median"]
        table.add_row(p["part"], *roof_cells(seconds, dict(matmul_share=p["flops"] / seconds / peak) | p))
    total = sum(p["seconds"]["median"] for p in parts)
    floor = sum(p["floor_seconds"] for p in parts) if all("floor_seconds" in p for p in parts) else None
    found = dict(floor_seconds=floor, over_floor=total / floor if floor else None)
    table.add_row("sum", *roof_cells(total, found), end_section=True)
    for row in content["rows"]:
        if (row["strategy"], row["implementation"]) == (name, "ours"):
            whole = row.get("roofline", dict(matmul_share=row.get("matmul_share")))
            cells = ["failed"] if "failed" in row else roof_cells(row["seconds"]["median"], whole)
            table.add_row("the step itself", *cells)
    return table


def roof_cells(seconds: float, found: dict[str, Any]) -> list[str]:
    matmul, copy, floor, over = (found.get(k) for k in ("matmul_share", "copy_share", "floor_seconds", "over_floor"))
    return [
        f"{1e3 * seconds:.1f}",
        "" if matmul is None else f"{matmul:.0%}",
        "" if copy is None else f"{copy:.0%}",
        "" if floor is None else f"{1e3 * floor:.1f}",
        "" if over is None else f"{over:.1f}",
    ]


def timed_cells(row: dict[str, Any]) -> dict[str, str]:
    ratio, cost, mfu = row.get("over_ours"), row["cost_per_token"], row.get("mfu")
    first = row.get("first_step_seconds") if row["implementation"] == "compiled" else row.get("compile_seconds")
    return {
        "s a step": with_spread(row["seconds"]),
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "GFLOP/s": f"{row['flops_per_second'] / 1e9:,.1f}",
        "of matmul": f"{row['matmul_share']:.0%}",
        "MFU": f"{mfu:.1%}" if mfu else "",
        "over ours": with_spread(ratio) if ratio else "",
        "a token's cost": f"{cost:.2f}" if cost else "",
        "its FLOPs": f"{row['flops_per_token_ratio']:.2f}",
        "compile": f"{first:.1f} s" if first else "",
        PLANNED: gigabytes(row.get("compiled_bytes")),
        PROCESS: gigabytes(row.get("process_peak_bytes")),
    }


def memory_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "s a step": f"{float(np.median(row['all_seconds'])):.2f}",
        "peak memory": gigabytes(row["peak_bytes"]),
        "compiled step": gigabytes(row.get("compiled_bytes")),
    }


def device_memory(row: dict[str, Any]) -> str:
    """The allocator's peak, or where others used the same allocator, what the compiler planned."""
    return gigabytes(row.get("device_peak_bytes") or row.get("compiled_bytes"))


def gigabytes(held: int | None) -> str:
    return f"{held / 1e9:.2f} GB" if held else ""


def with_spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3g} ({values['p10']:.3g} to {values['p90']:.3g})"
