"""The report of a tuning, from results.json alone: what was found, the grids, the strategies at their best."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.analysis import protocol, tuning_figure
from research.analysis.evidence import turned
from research.analysis.page import Section, Table
from research.analysis.render import Page, Part
from research.analysis.render import write as write_page
from research.analysis.runs import DIVERGED, FINISHED
from research.analysis.tables import verdict


def words(field: str) -> str:
    """A field of the config as a reader says it: optimizer.learning_rate is a learning rate."""
    known = {"optimizer.learning_rate": "learning rate", "optimizer.adamw_learning_rate": "AdamW learning rate"}
    return known.get(field, f"`{field}`")


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Draws figures/ and writes report.md and report.html into `folder` from results.json's content."""
    study, found = results["study"], results["analysis"]["tuning"]
    pictures = tuple(tuning_figure.draw(study, found, folder / "figures"))
    name = words(study["field"])
    sections = [
        Section("What was found", "\n".join(f"- {said}" for said in findings(study, found)), (), pictures),
        Section("Each value", "", (losses_table(found["grids"]), _above_table(found))),
        Section("The strategies beside each other", "", (_compared(found), _differences(found))),
        *([Section("Go on", _next(study, found))] if command(study, found) else []),
    ]
    page = Page(
        title=f"Which {name}?",
        kicker=protocol.kicker({"runs": [run | {"setting": "independent"} for run in results["runs"]]}),
        question=f"At which {name} does each strategy have its lowest loss, and does the choice change who is first?",
        facts=_facts(results),
        parts=[Part(s.title, s.text, s.tables, s.pictures) for s in sections],
        footer=(
            "Made from `results.json` in this folder, which holds every number above, and from the losses in "
            "`heldout_losses.npz`: `python -m experiments.tune --report_only --workdir=<this folder>` makes it again."
        ),
        strategies=list(found["grids"]),
    )
    write_page(page, folder)


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    study, found = results["study"], results["analysis"]["tuning"]
    runs = [run for run in results["runs"] if run["result"]]
    facts = [
        ("field", f"`config.{study['field']}`"),
        ("other fields given", ", ".join(f"{name} {value}" for name, value in study["overrides"].items()) or "none"),
        (
            "runs",
            f"{len(runs)} of {len(results['runs'])} finished, seed {study['seed']}, {found['seconds'] / 60:.0f} min",
        ),
    ]
    if runs:
        first = runs[0]["result"]
        targets = f"{found['targets']:,} held-out targets in {found['documents']:,} documents"
        facts += [
            ("text", f"{protocol.corpus(runs[0])}; {targets}"),
            (
                "model",
                f"{first['parameters']['total']:,} parameters, {first['parameters']['active']:,} active per token",
            ),
            ("tokens a run", ", ".join(f"{n:,}" for n in sorted({run["result"]["tokens"] for run in runs}))),
            ("device", ", ".join(dict.fromkeys(run["result"]["device"] for run in runs))),
            ("code", ", ".join(dict.fromkeys(map(protocol.code, runs)))),
        ]
    return facts


def findings(study: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What the grids show, each sentence chosen by the numbers."""
    said = [_finding(strategy, grid) for strategy, grid in found["grids"].items()]
    said += _orders(found["compared"])
    said.append(
        f"Chosen on seed {study['seed']} by the losses that are compared here: intervals cover the choice of "
        "documents, neither the seed nor the choosing, and a strategy with more values has had more to choose from."
    )
    if found["unfinished"]:
        said.append(f"Not finished: {', '.join(found['unfinished'])}.")
    return said


def _orders(compared: Mapping[str, Any]) -> list[str]:
    """The order of the strategies that have a loss at both values, at each; and the first minus the last."""
    both = [{row["strategy"] for row in compared[which]["rows"]} for which in ("given", "best")]
    names = both[0] & both[1]
    given, best = ([row for row in compared[w]["rows"] if row["strategy"] in names] for w in ("given", "best"))
    if len(names) < 2:
        return []
    doubts = [_doubt(compared[which], names) for which in ("best", "given")]
    first, last = best[0]["strategy"], best[-1]["strategy"]
    gaps = [_gap(compared[which]["pairs"], first, last) for which in ("best", "given")]
    if given == best:
        said = [f"Each is best at the config's value, and the order is {_order(best)}{doubts[0]}."]
        return said + ([f"{first} minus {last}: {gaps[0]}."] if gaps[0] else [])
    same = [row["strategy"] for row in given] == [row["strategy"] for row in best]
    kept = "it is the same" if same else f"it is {_order(given)}"
    said = [f"Each at its best, the order is {_order(best)}{doubts[0]}; at the config's values {kept}{doubts[1]}."]
    if all(gaps):
        said.append(f"{first} minus {last}: {gaps[1]} at the config's values, {gaps[0]} at their best.")
    return said


def _doubt(compared: Mapping[str, Any], names: Collection[str]) -> str:
    pairs = [p for p in compared["pairs"] if {p["a"], p["b"]} <= set(names) and not p["shown"]]
    listed = "; ".join(f"{pair['a']} and {pair['b']}" for pair in pairs)
    return f" (no difference shown: {listed})" if pairs else ""


def _gap(pairs: Sequence[Mapping[str, Any]], a: str, b: str) -> str:
    """Loss of `a` minus that of `b` with its interval, whichever way round it was compared; empty where it was not."""
    for pair in pairs:
        if {pair["a"], pair["b"]} == {a, b}:
            pair = pair if pair["a"] == a else turned(pair)
            return f"{pair['mean']:+.3f}{_signed(pair)}"
    return ""


def _finding(strategy: str, grid: Mapping[str, Any]) -> str:
    best = next((entry for entry in grid["tried"] if entry["value"] == grid["best"]), None)
    if best is None:
        return f"{strategy}: no value has a loss ({', '.join(dict.fromkeys(e['status'] for e in grid['tried']))})."
    losses = [entry["loss"] for entry in grid["tried"] if entry["loss"] is not None]
    if len(losses) > 1 and min(losses) == max(losses):
        return f"{strategy}: the field changes nothing here, every value has a loss of {losses[0]:.3f} nats per token."
    said = f"{strategy}: lowest at {best['value']:g}, {best['loss']:.3f} nats per token"
    given = next((entry for entry in grid["tried"] if entry["value"] == grid["given"]), None)
    if given is not best and given is not None and given["above"]:
        said += f", {given['above']['mean']:.3f}{_range(given['above'])} below the config's {given['value']:g}"
    if not grid["inside"]:
        unsettled = [f"{e['value']:g} {e['status']}" for e in grid["tried"] if e["status"] not in (FINISHED, DIVERGED)]
        edge = f"the grid is not whole ({', '.join(unsettled)})" if unsettled else "on the edge of what was tried"
        said += f", {edge}: a better one may lie beyond"
    alike = [f"{e['value']:g}" for e in grid["tried"] if e["above"] and not e["above"]["shown"]]
    return said + (f"; not shown to be worse: {', '.join(alike)}." if alike else ".")


def _order(rows: Sequence[Mapping[str, Any]]) -> str:
    return " < ".join(f"{row['strategy']} ({row['loss']:.3f} at {row['value']:g})" for row in rows)


def _range(found: Mapping[str, Any]) -> str:
    return "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"


def losses_table(grids: Mapping[str, Any]) -> Table:
    """Loss by strategy and value, the lowest of each in bold."""
    columns = sorted({entry["value"] for found in grids.values() for entry in found["tried"]})
    rows = []
    for strategy, found in grids.items():
        tried = {entry["value"]: entry for entry in found["tried"]}
        cells = []
        for value in columns:
            entry = tried.get(value)
            cell = "–" if entry is None else entry["status"] if entry["loss"] is None else f"{entry['loss']:.4f}"
            cells.append(f"**{cell}**" if value == found["best"] else cell)
        rows.append((strategy, *cells, "yes" if found["inside"] else "no"))
    note = "Nats per token at the shared context, one run each; the lowest of a row in bold. –: not tried."
    return Table(("strategy", *(f"{value:g}" for value in columns), "optimum inside"), tuple(rows), note)


def _above_table(found: Mapping[str, Any]) -> Table:
    columns = sorted({entry["value"] for grid in found["grids"].values() for entry in grid["tried"]})
    rows = []
    for strategy, grid in found["grids"].items():
        tried = {entry["value"]: entry for entry in grid["tried"]}
        rows.append((strategy, *(_above(tried.get(value), grid["best"]) for value in columns)))
    note = (
        f"Loss minus the lowest of the row, on {found['targets']:,} targets of {found['documents']:,} documents with "
        f"{found['context']} tokens before each [95 %: documents resampled]."
    )
    return Table(("strategy", *(f"{value:g}" for value in columns)), tuple(rows), note)


def _above(entry: Mapping[str, Any] | None, best: float | None) -> str:
    if entry is None:
        return "–"
    if entry["value"] == best:
        return "lowest"
    if entry["above"] is None:
        return entry["status"]
    return f"{entry['above']['mean']:+.3f}{_signed(entry['above'])}"


def _signed(found: Mapping[str, Any]) -> str:
    return " [too few documents]" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"


def _compared(found: Mapping[str, Any]) -> Table:
    given, best = ({row["strategy"]: row for row in found["compared"][which]["rows"]} for which in ("given", "best"))
    rows = tuple(
        (
            strategy,
            grid["shape"] or "–",
            *(
                f"{r[strategy]['loss']:.4f} at {r[strategy]['value']:g}" if strategy in r else "–"
                for r in (given, best)
            ),
        )
        for strategy, grid in found["grids"].items()
    )
    return Table(("strategy", "B x T", "loss at the config's value", "loss at its best"), rows, "Nats per token.")


def _differences(found: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            {"given": "the config's", "best": "each its best"}[which],
            f"{pair['a']} - {pair['b']}",
            f"{pair['mean']:+.4f}{_signed(pair)}",
            "–" if pair["p_holm"] is None else f"{pair['p_holm']:.2g}",
            verdict(pair),
        )
        for which in ("given", "best")
        for pair in found["compared"][which]["pairs"]
    )
    note = (
        "Nats per token [95 %: documents resampled in pairs]; p after Holm's correction over a value's pairs. One "
        "seed: neither covers the choice of it."
    )
    return Table(("values", "difference", "nats per token [95 %]", "p (Holm)", "lower loss"), rows, note)


def _next(study: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    return (
        "A comparison at these values, by seeds that had no part in choosing them (the held-out documents had): "
        f"`{command(study, found)}` (add what else your study needs, such as `--settings=independent,paired`)."
    )


def command(study: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The ablation that trains each strategy at its best value, by three seeds that did not choose it; or nothing."""
    seeds = ",".join(str(study["seed"] + more) for more in (1, 2, 3))
    chosen = [(s, grid["best"]) for s, grid in found["grids"].items() if grid["best"] is not None]
    if not chosen:
        return ""
    parts = ["python", "-m", "experiments.ablation", "--workdir=runs/tuned", f"--scale={study['scale']}"]
    parts += [f"--strategies={','.join(strategy for strategy, _ in chosen)}", f"--seeds={seeds}"]
    parts += [f"--config.{name}={value}" for name, value in study["overrides"].items() if name != "seed"]
    return shlex.join(parts + [f"--{strategy}.{study['field']}={value!r}" for strategy, value in chosen])
