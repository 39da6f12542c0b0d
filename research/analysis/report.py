"""The comparison report of a study: report.md and figures, made from the data files of its folder
(study.py).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from research.analysis import comparison, figures, findings, tables
from research.analysis.original import ORIGINAL
from research.analysis.study import Run, load, write_text
from research.analysis.tables import LEAKING, leaks

QUESTION = (
    "At the same number of tokens a step, should a training step hold more sequences or longer "
    "ones? Every strategy is scored on the same held-out tokens, each predicted from the same "
    "number of tokens before it."
)


def write(folder: Path) -> dict[str, Any]:
    """Makes report.md and figures/ from the data files in `folder`, and adds the comparison to its
    results.json.

    Returns: results.json's content. The same data files give the same report. Raises: ConfigError
    when a data file is missing or damaged.
    """
    runs = load(folder)
    results = json.loads((folder / "results.json").read_text())
    results["comparison"] = comparison.compare(runs)
    results["original"] = [asdict(row) | {"floor": round(row.floor, 4)} for row in ORIGINAL]
    names = figures.draw(runs, results["comparison"], folder / "figures")
    write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_text(folder / "report.md", markdown(runs, results["comparison"], names))
    return results


def markdown(runs: Sequence[Run], compared: dict[str, Any], figure_names: Sequence[str]) -> str:
    """The report's text, from `comparison.compare(runs)` and the names of the figures drawn."""
    finished = [run for run in runs if run.finished]
    scales = sorted({str(run.config.get("scale", "unnamed")) for run in finished})
    parts = [f"# Batch or length: {', '.join(scales) or 'no run finished'}", QUESTION]
    parts += [f"**{run.strategy}** {run.status}" for run in runs if not run.finished]
    if finished:
        parts += [
            protocol(finished),
            "## Findings\n\n" + findings.paragraph(finished, compared),
            "## The original's table, and ours\n\n" + tables.original_table(runs),
            "## On the same held-out targets\n\n" + tables.context_table(runs, compared),
            *(f"![{alt}](figures/{name}.png)" for name, alt in _figures(finished, figure_names)),
            "## Differences\n\n" + tables.difference_table(compared),
            "## Does a longer context help?\n\n" + tables.longer_context_table(compared),
            "## At equal train seconds\n\n" + tables.equal_seconds_table(compared),
        ]
    parts.append(_remake())
    return "\n\n".join(parts) + "\n"


def protocol(finished: Sequence[Run]) -> str:
    """What was held equal between the finished runs, and what was not."""
    facts: tuple[tuple[str, Callable[[Run], str]], ...] = (
        ("protocol", lambda r: r.result["protocol"]),
        ("tokens", lambda r: f"{r.result['tokens']:,}"),
        ("tokens a step", lambda r: f"{r.result['tokens_per_step']:,}"),
        ("parameters", lambda r: f"{r.result['parameters']['total']:,}"),
        ("optimiser", _optimizer),
        ("corpus", lambda r: f"{r.result['corpus']} `{r.result['fingerprint'][:12]}`"),
        ("seed", lambda r: str(r.result["seed"])),
        ("held-out targets", _targets),
        ("data order", _data_order),
        ("device", lambda r: r.result["device"]),
    )
    equal, unequal = [], []
    for name, show in facts:
        values = [show(run) for run in finished]
        if len(set(values)) == 1:
            equal.append(f"{name} {values[0]}")
        else:
            listed = ", ".join(f"{r.strategy} {v}" for r, v in zip(finished, values, strict=True))
            unequal.append(f"{name} ({listed})")
    lines = ["**Held equal:** " + "; ".join(equal) + "."]
    if unequal:
        lines.append("**Not equal:** " + "; ".join(unequal) + ".")
    if any(leaks(run) for run in finished):
        lines.append(
            f"{LEAKING}: under the published protocol held-out windows overlap training windows, "
            "so its losses measure memorisation. The floor of an own-length loss is "
            "(ln N - H(first)) / T with N windows and H(first) the unigram entropy."
        )
    return "\n\n".join(lines)


def _optimizer(run: Run) -> str:
    chosen = run.config["optimizer"]
    rates = f"learning rate {chosen['learning_rate']:g}"
    if chosen["name"] == "muon":
        rates += f", {chosen['adamw_learning_rate']:g} for its AdamW group"
    return f"{chosen['name']} ({rates}, {chosen['schedule']} schedule)"


def _targets(run: Run) -> str:
    if run.documents is None:
        return "not recorded"
    return f"{len(run.documents):,} in {len(set(run.documents.tolist())):,} documents"


def _data_order(run: Run) -> str:
    if run.result["protocol"] == "published":
        return "stride-1 windows"
    if block := run.config["data"]["shuffle_block"]:
        return f"shuffled by {block:,} tokens, whatever the length"
    return "shuffled by rows, each at a place of its own in the corpus"


def _figures(finished: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str]]:
    mark = " (LEAKING)" if any(leaks(run) for run in finished) else ""
    alts = {
        "loss": "Held-out loss against tokens and against train seconds",
        "context": "Held-out loss by context",
        "cost": "Step time, tokens a second and memory",
    }
    return [(name, alts[name] + (mark if name != "cost" else "")) for name in names]


def _remake() -> str:
    return (
        "---\n\nMade from `results.json`, `curves.csv` and `heldout_losses.npz` in this folder: "
        "`python -m experiments.ablation --report_only --workdir=<this folder>` makes it again."
    )
