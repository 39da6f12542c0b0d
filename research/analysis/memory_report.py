"""A frontier as people read it: report.md, frontier.csv and figures, from frontier.json (and check.json) alone."""

import csv
import io
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from research import sizes
from research.analysis import memory_figures
from research.analysis.original import ORIGINAL
from research.analysis.page import VERDICTS
from research.analysis.parts import PARTS
from research.config import ConfigError
from research.files import write_text

UNTESTED = VERDICTS[-1]
OFF = 0.1  # relative error of a prediction that is named
NEEDED = {"command", "config", "given", "target", "platform", "versions", "absent", "budget", "scale", "cells", "law"}


def save(plan: dict[str, Any], folder: Path) -> None:
    """Writes frontier.json; an older check of the folder that is of another plan is taken away."""
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "frontier.json", json.dumps(plan, indent=1) + "\n"
    if not (path.exists() and _said(path.read_text()) == _said(text)):
        (folder / "check.json").unlink(missing_ok=True)
    write_text(path, text)


def _said(text: str) -> Any:
    """What a frontier.json says but for the commit: where another one plans the same, checks are kept."""
    try:
        return {name: value for name, value in json.loads(text).items() if name != "environment"}
    except (ValueError, AttributeError):
        return None  # damaged


def read(folder: Path) -> dict[str, Any]:
    """frontier.json of a folder. Raises: ConfigError where there is none, or a damaged one."""
    try:
        plan = json.loads((folder / "frontier.json").read_text())
    except FileNotFoundError:
        message = (
            "holds no frontier.json; make one with python -m experiments.memory_frontier --budget=... --workdir=..."
        )
        raise ConfigError("--workdir", str(folder), message) from None
    except ValueError as error:
        raise ConfigError("--workdir", str(folder), f"frontier.json is damaged ({error}); make it again") from None
    if not (isinstance(plan, dict) and plan.keys() >= NEEDED):
        raise ConfigError("--workdir", str(folder), "frontier.json is no plan; make it again")
    return plan


def read_check(folder: Path) -> list[dict[str, Any]]:
    """What experiments/memory_check.py has measured of a folder's cells; nothing where it has not."""
    path = folder / "check.json"
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise ConfigError("--workdir", str(folder), f"check.json is damaged ({error}); remove it") from None


def write(folder: Path) -> str:
    """Writes report.md, frontier.csv and figures; returns the frontier's table and where the report is."""
    plan = read(folder)
    checked = read_check(folder)
    drawn = memory_figures.draw(plan, checked, folder / "figures")
    write_text(folder / "frontier.csv", table_csv(plan))
    sections = [
        heading(plan),
        frontier_text(plan, drawn),
        parts_text(plan),
        law_text(plan, drawn),
        check_text(checked, drawn, on_cpu=plan["platform"] == "cpu"),
    ]
    write_text(folder / "report.md", "\n\n".join(section for section in sections if section) + "\n")
    return f"{markdown(*frontier_table(plan))}\n\n{folder / 'report.md'}"


def overrides(cell: dict[str, Any]) -> str:
    """Arguments that make a run of a cell."""
    fields = dict(batch_size=cell["batch"], seq_len=cell["seq_len"]) | cell["choice"]
    return shlex.join(f"--config.{name}={value}" for name, value in fields.items())


def shared(choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all of several choices share; a mesh counts as one thing."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in choices[0].items():
        groups.setdefault(name.partition(".")[0] if name.startswith("mesh.") else name, {})[name] = value
    same = [g for g in groups.values() if all(g.items() <= choice.items() for choice in choices)]
    return {name: value for group in same for name, value in group.items()}


def label(choice: dict[str, Any]) -> str:
    """A choice in a few words, such as 'remat block, mesh 8 x 1'."""
    words = [f"{name.rsplit('.', 1)[1]} {value}" for name, value in choice.items() if not name.startswith("mesh.")]
    if "mesh.data" in choice:
        words.append(f"mesh {choice['mesh.data']} x {choice['mesh.seq']}")
    return ", ".join(words) or "as the config says"


def heading(plan: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    here = (
        "It is not here: nothing ran on it." if plan["absent"] else "A program for another device needs other memory."
    )
    scratch = ", and the scratch of CPU kernels" if plan["target"].startswith("CPU") else ""
    return (
        f"# Memory frontier: what fits {plan['budget']} per device\n\n"
        f"`{shlex.join(plan['command'])}`\n\n"
        f"Programs compiled for **{plan['target']}** ({versions}). {here} Bytes are of one device, from the compiled "
        f"programs: arguments + outputs + temporaries - aliased{scratch}; nothing was allocated. A batch fits if its "
        "training step does; one unit more does not. GiB are powers of 1024."
    )


def frontier_table(plan: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows), a row a cell."""
    published = plan["scale"] == "published"
    columns = ["length", "choice", "largest batch", "tokens per step", "step", "one more", "evaluation", "state"]
    rows = []
    for cell in plan["cells"]:
        batch = (
            f"{cell['batch']:,}" if cell["batch"] else f"none: {cell['unit']} needs {sizes.show(cell['next_bytes'])}"
        )
        rows.append([
            f"{cell['seq_len']:,}", label(cell["choice"]), batch, f"{cell['tokens']:,}" if cell["batch"] else "",
            sizes.show(cell["total"]) if cell["batch"] else "", sizes.show(cell["next_bytes"]),
            sizes.show(cell["eval_bytes"]), sizes.show(sum(cell["state"].values())),
        ])  # fmt: skip
        if published:
            rows[-1].append(_original(cell["seq_len"]))
    return columns + (["original"] if published else []), rows


def _original(seq_len: int) -> str:
    """The batch that the original found by trial and error on its 24 GB, and what its allocator saw."""
    found = [o for o in ORIGINAL if o.seq_len == seq_len]
    return f"{found[0].batch_size} ({found[0].peak_gb} GB)" if found else ""


def frontier_text(plan: dict[str, Any], drawn: set[str]) -> str:
    text = f"## The largest batches\n\n{markdown(*frontier_table(plan))}"
    if _alike(plan["cells"], "block", "full"):
        text += "\n\nThe compiler merged what `full` recomputes with what `block` does: the two take the same here."
    train = f"    python -m experiments.train --config={plan['config']} --workdir=runs/planned"
    given = [shlex.quote(argument) for argument in plan["given"]]
    lines = [" ".join([train, *given, overrides(cell)]) for cell in plan["cells"] if cell["batch"]]
    return f"{text}\n\n{picture('frontier', drawn)}\n\nTo run them:\n\n" + "\n".join(lines)


def _alike(cells: Sequence[dict[str, Any]], one: str, other: str) -> bool:
    """Whether two choices of remat take the same memory at every length where both are planned."""
    found = {}
    for cell in cells:
        fields = cell["choice"] | {"seq_len": cell["seq_len"]}
        found.setdefault(fields.pop("model.remat", None), {})[str(fields)] = (cell["batch"], cell["total"])
    return one in found and found.get(one) == found.get(other)


def parts_text(plan: dict[str, Any]) -> str:
    cells = [cell for cell in plan["cells"] if cell.get("parts")]
    if not cells:
        return ""
    columns = ["batch", "choice", *PARTS, "sum"]
    rows = [
        [f"{c['batch']} x {c['seq_len']}", label(c["choice"]), *(sizes.show(c["parts"][name]) for name in PARTS),
         sizes.show(sum(c["parts"].values()))]
        for c in cells
    ]  # fmt: skip
    notes = "; ".join(f"**{name}**: {meaning}" for name, meaning in PARTS.items())
    how = (
        "By differences of compiled variants, at the peak. What is not there then counts as 0, and where memory grows "
        "faster than the batch, gradients count as activations."
    )
    return f"## What it is made of\n\n{markdown(columns, rows)}\n\n{how} {notes}."


def law_text(plan: dict[str, Any], drawn: set[str]) -> str:
    if not plan["law"]:
        return ""
    counted = [law | law["compute"] for law in plan["law"] if law["compute"]]
    uncounted = "".join(
        f" ({law['attention']}: one call, whose work is not counted)" for law in plan["law"] if not law["compute"]
    )
    verdicts = "\n".join(f"- **{law['attention']}: {law['verdict']}.** {law['evidence']}" for law in plan["law"])
    return (
        "## The law of memory, and of compute\n\na + b B T + c B T^2: least squares of relative errors, intervals of "
        f"95 %. Memory in bytes, of compiled programs:\n\n{_law_table(plan['law'], 'B')}\n\n"
        f"{picture('law', drawn)}\n\nCompute in FLOPs of matrix products, of the traced programs (recomputation and "
        f"the optimiser, which is a, with it){uncounted}:\n\n{_law_table(counted, 'FLOP')}\n\nWhat doubling multiplies "
        f"memory by, whole and (in brackets) without a:\n\n{_ratio_table(plan['law'])}\n\nand compute:\n\n"
        f"{_ratio_table(counted)}\n\n"
        f'The original says "2x batch = 2x memory; 2x length = 4x memory":\n\n{verdicts}'
    )


def _law_table(laws: Sequence[dict[str, Any]], unit: str) -> str:
    columns = ["attention", "a (per step)", "b (per token)", "c (per pair of tokens)", "largest misfit"]
    rows = [
        [law["attention"], *(_interval(law["fit"][name], unit) for name in "abc"), f"{law['fit']['misfit']:.1%}"]
        for law in laws
    ]
    return markdown(columns, rows)


def _interval(entry: dict[str, float], unit: str) -> str:
    value, low, high = (_amount(entry[k], unit) for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _amount(value: float, unit: str) -> str:
    """With a prefix from a thousand on."""
    return EngFormatter(unit, places=2)(value) if abs(value) >= 1000 else f"{value:.3g} {unit}"


def _ratio_table(laws: Sequence[dict[str, Any]]) -> str:
    columns = ["attention", "from", "2x batch", "2x length", "2x length, equal tokens"]
    rows = [
        [law["attention"], f"{r['batch']} x {r['seq_len']}",
         *(f"{r['whole'][name]:.2f} ({r['growing'][name]:.2f})" for name in ("batch", "length", "equal_tokens"))]
        for law in laws for r in law["ratios"]
    ]  # fmt: skip
    return markdown(columns, rows)


def check_text(checked: Sequence[dict[str, Any]], drawn: set[str], on_cpu: bool = False) -> str:
    """Predictions beside real steps; a run that failed is shown as such."""
    if not checked:
        return ""
    columns = ["step", "choice", "predicted", "measured", "measured / predicted", "seconds per step"]
    rows, errors = [], []
    for run in checked:
        predicted = "" if run["predicted"] is None else sizes.show(run["predicted"])
        shape = [f"{run['batch']} x {run['seq_len']}", label(run["choice"]), predicted]
        if run["measured"] is None:
            rows.append([*shape, f"failed: {run['error']}", "", ""])
            continue
        errors.append(run["measured"] / run["predicted"] - 1)
        rows.append([*shape, sizes.show(run["measured"]), f"{1 + errors[-1]:.3f}", f"{run['seconds']:.2f}"])
    summary = ""
    if errors:
        ordered = sorted(errors)
        off = sum(abs(e) > OFF for e in errors)
        summary = (
            f"{len(errors)} steps: median error {statistics.median(errors):+.1%}, "
            f"from {ordered[0]:+.1%} to {ordered[-1]:+.1%}; {off} off by more than {OFF:.0%}."
        )
    planned = [run for run in checked if run.get("planned") and run["predicted"] is not None]
    if planned:
        other = sum(run["planned"] != run["predicted"] for run in planned)
        summary += f" Of {len(planned)} planned steps {len(planned) - other} were compiled to the bytes of the plan."
    if errors and on_cpu:
        summary += (
            " On a CPU the C library gave freed blocks of 4 MiB and more back at once; threads shared the rest. That"
            " is slower, and a process that lets it keep freed blocks, those of each thread apart, may hold 14 % more."
        )
    return f"## Is it true?\n\n{markdown(columns, rows)}\n\n{summary}\n\n{picture('check', drawn)}"


def table_csv(plan: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = list(dict.fromkeys(name for cell in plan["cells"] for name in cell["choice"]))
    names = ("seq_len", "batch", "tokens", "total", "next_bytes", "eval_bytes")
    writer.writerow(["target", *names, "parameters", "optimizer", *fields, "overrides"])
    for cell in plan["cells"]:
        state = (cell["state"]["parameters"], cell["state"]["optimizer"])
        chosen = (cell["choice"].get(name, "") for name in fields)
        writer.writerow([plan["target"], *(cell[name] for name in names), *state, *chosen, overrides(cell)])
    return out.getvalue()


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(name: str, drawn: set[str]) -> str:
    return f"![{memory_figures.ALTS[name]}](figures/{name}.svg)" if name in drawn else ""
