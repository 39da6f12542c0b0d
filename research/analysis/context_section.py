"""The section on context of a report: how the loss falls with it, until where, and what that is worth."""

from collections.abc import Mapping
from typing import Any

from research.analysis import reach, repeats
from research.analysis.context import TOLERANCE
from research.analysis.decomposition import sampled, signed
from research.analysis.page import Picture, Section, Table

PICTURES = ("curves", "matrix", "places")


def section(analysis: dict[str, Any], drawn: Mapping[str, Picture]) -> Section | None:
    """From the analysis and the pictures that were drawn of it, by name; None without a curve."""
    found = analysis["context"]
    if not found:
        return None
    text = (
        "The same held-out targets, each predicted from c to 1.25 c tokens. Within its trained length a model's loss "
        "falls by what it has learnt to read from the further tokens; beyond it, the raw model meets rotary positions "
        "that it never saw, while a window that slides keeps the loss of the longest context that fits."
    )
    tables = [_use(found), *repeats.tables(analysis), *_early_and_late(found), *reach.tables(analysis)]
    return Section("What context is worth", text, tuple(tables), tuple(drawn[n] for n in PICTURES if n in drawn))


def _use(found: list[dict[str, Any]]) -> Table:
    """Slope, gain, and where it ends, of each arm."""
    rows = []
    for entry in found:
        whole = max(entry["gains"], key=lambda g: g["to"] - g["from"], default=None)
        effective = entry["effective"]
        rows.append(
            (
                entry["strategy"],
                entry["setting"],
                f"{entry['seq_len']:,}",
                "–" if entry["slope"] is None else signed(entry["slope"]),
                "–" if whole is None else f"{whole['from']:,} to {whole['to']:,}",
                "–" if whole is None else signed(whole),
                "–" if effective is None else _effective(effective),
            )
        )
    note = (
        f"Nats per token [{sampled(len(e['seeds']) for e in found)}]; a gain is loss with the shorter context minus "
        "loss with the longer. "
        f"Effective context: the shortest from which no longer one gains more than {TOLERANCE} nats per token; ≥ where "
        "that is the longest that was scored within the trained length."
    )
    columns = ("strategy", "order", "T", "gain a doubling", "context", "gain", "effective context")
    return Table(columns, tuple(rows), note)


def _effective(entry: Mapping[str, Any]) -> str:
    text = f"{'≥ ' * bool(entry['censored'])}{entry['mean']:,.0f}"
    return text if entry["low"] is None else f"{text} [{entry['low']:,.0f}, {entry['high']:,.0f}]"


def _early_and_late(found: list[dict[str, Any]]) -> list[Table]:
    """In-context learning: loss late in a window less loss early in it."""
    places = sorted({(i["late"], i["early"]) for entry in found for i in entry["icl"]})
    if not places:
        return []
    rows = []
    for entry in found:
        scores = {(i["late"], i["early"]): signed(i) for i in entry["icl"]}
        rows.append((entry["strategy"], entry["setting"], *(scores.get(place, "–") for place in places)))
    windows = sampled(len(entry["seeds"]) for entry in found).replace("documents", "windows")
    note = (
        "In-context-learning score (Olsson et al. 2022, arXiv:2209.11895): loss around one position of a window less "
        f"loss around an earlier one, in nats per token [{windows}]; negative: the model predicts better "
        "later. Of other targets for each place, so with wide intervals. –: longer than the window."
    )
    if any(i["low"] is None for entry in found for i in entry["icl"]):
        note += " No interval: the windows are of too few documents, and may overlap."
    return [Table(("strategy", "order", *(f"position {late} - {early}" for late, early in places)), tuple(rows), note)]
