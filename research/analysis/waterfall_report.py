"""The report of a waterfall study, from results.json alone: its sections, report.md and report.html."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.analysis import protocol, waterfall_figure
from research.analysis.page import Picture, Section, Table
from research.analysis.render import Page, Part
from research.analysis.render import write as write_page
from research.analysis.tables import verdict
from research.analysis.tuning_report import losses_table

LEAKING = "**LEAKING**"
QUESTION = (
    "What is a published ranking of three shapes of a training step made of? The study begins with the protocol that "
    "it was measured by and removes one confound at a time: each stage differs from the one before in one thing."
)


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Draws figures/ and writes report.md and report.html into `folder` from results.json's content."""
    found, pictures = results["analysis"]["waterfall"], waterfall_figure.draw(results["analysis"], folder / "figures")
    stages, codes = found["stages"], dict.fromkeys(protocol.code(run) for run in results["runs"] if run["result"])
    page = Page(
        title="What a ranking was made of",
        kicker=f"Waterfall of {len(stages)} stages · scale {found['scale']} · {found['runs']} runs",
        question=QUESTION,
        facts=[*_facts_of(found), ("code", ", ".join(codes))],
        parts=[Part(s.title, s.text, s.tables, s.pictures) for s in sections(results["analysis"], pictures)],
        footer=(
            "Made from `results.json` in this folder, which holds every number above, and from the losses in "
            "`heldout_losses.npz`: `python -m experiments.waterfall --report_only --workdir=<this folder>` makes it "
            "again."
        ),
        strategies=list(dict.fromkeys(row["strategy"] for stage in stages for row in stage["rows"])),
    )
    write_page(page, folder)


def _facts_of(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = found["parameters"] or {"total": 0, "active": 0}
    return [
        ("scale", found["scale"]),
        ("text", f"{found['corpus']}; {found['targets']:,} held-out targets in {found['documents']:,} documents"),
        ("model", f"{counts['total']:,} parameters, {counts['active']:,} active per token"),
        ("runs", f"{found['runs']} in {found['seconds'] / 60:.0f} minutes"),
        ("device", str(found["device"])),
    ]


def section(analysis: Mapping[str, Any]) -> Section | None:
    """The study on one page, for a report that holds other sections; None where there is no waterfall."""
    found = analysis.get("waterfall")
    if not found or not any(stage["order"] for stage in found["stages"]):
        return None
    return Section("Waterfall", summary(found), (_overview(found),), (waterfall_figure.picture(found),))


def sections(analysis: Mapping[str, Any], pictures: Sequence[Picture] = ()) -> list[Section]:
    """The whole report: what was found, the table of each stage, the differences, and the learning rates."""
    found = analysis["waterfall"]
    said = "\n".join(f"- {sentence}" for sentence in re.split(r"(?<=\.) (?=[A-Z])", summary(found)))
    parts = [Section("What was found", said, (_overview(found),), tuple(pictures))]
    for stage in found["stages"]:
        mark = f" {LEAKING}" if stage["leaking"] else ""
        title = f"Stage {stage['number']}: {stage['name']}{mark}"
        parts.append(Section(title, f"Changed: {stage['changed']}.", (_stage_table(stage, found),)))
    if any(stage["pairs"] for stage in found["stages"]):
        parts.append(Section("Differences", "", (_differences(found),)))
    if found["rates"]:
        parts.append(Section("Learning rates", _rates_text(found), (losses_table(found["rates"]),)))
    return parts


def summary(found: Mapping[str, Any]) -> str:
    """What the stages show, each sentence chosen by the numbers."""
    known = [stage for stage in found["stages"] if stage["order"]]
    if not known:
        return "No stage has all three strategies: nothing is ranked."
    said = []
    for before, stage in zip([None, *known], known, strict=False):
        place = f"stage {stage['number']} ({stage['name']}{', LEAKING' if stage['leaking'] else ''})"
        if before is None:
            said.append(f"The ranking of {place} is {_order(stage)}.")
        elif before["order"] != stage["order"]:
            doubt = "; ".join(f"{p['a']} and {p['b']}" for p in stage["pairs"] if not p["shown"])
            said.append(f"It changes at {place}: {_order(stage)}{doubt and f' (no difference shown: {doubt})'}.")
    unranked = [f"stage {s['number']}" for s in found["stages"] if not s["order"]]
    if len(said) == 1 and len(known) > 1:
        said.append(f"It stays so at every later stage{' that has a ranking' if unranked else ''}.")
    if unranked:
        said.append(f"No ranking, for want of a strategy: {', '.join(unranked)}.")
    last = known[-1]
    if last["order_longest"] not in ([], last["order"]):
        longest = sorted(last["rows"], key=lambda row: row["longest_loss"])
        order = " < ".join(f"{r['strategy']} ({r['longest_loss']:.4f} at {r['longest_context']})" for r in longest)
        said.append(f"With the longest context that each was trained at, stage {last['number']} ranks {order}.")
    if last["pairs"]:
        shown = [f"{p['a']} - {p['b']} {_interval(p)}" for p in last["pairs"] if p["shown"]]
        hidden = [f"{p['a']} and {p['b']}" for p in last["pairs"] if not p["shown"]]
        said.append(f"At stage {last['number']} the differences shown (Holm) are: {'; '.join(shown) or 'none'}.")
        if hidden:
            said.append(f"No difference is shown between {'; '.join(hidden)}.")
    if found["unfinished"]:
        said.append(f"Not finished: {', '.join(found['unfinished'])}.")
    return " ".join(said)


def _order(stage: Mapping[str, Any]) -> str:
    return " < ".join(f"{row['strategy']} ({_loss(row)})" for row in stage["rows"])


def _loss(row: Mapping[str, Any]) -> str:
    """A loss; one that leaks with its floor."""
    return _number(row["loss"]) + (f", floor {row['floor']:.4f}" if "floor" in row else "")


def _overview(found: Mapping[str, Any]) -> Table:
    rows = []
    for stage in found["stages"]:
        cells = [f"{row['strategy']} {_loss(row)}" for row in stage["rows"]]
        doubt = [f"{p['a']} ~ {p['b']}" for p in stage["pairs"] if not p["shown"]]
        rows.append(
            (
                str(stage["number"]),
                stage["name"] + (f" {LEAKING}" if stage["leaking"] else ""),
                stage["changed"],
                *cells,
                "yes" if stage["number"] in found["changes"] else "",
                ("; ".join(doubt) or f"all {len(stage['pairs'])} compared are shown")
                if stage["pairs"]
                else "no interval",
            )
        )
    columns = (
        "stage",
        "name",
        "changed",
        "lowest loss",
        "second",
        "third",
        "ranking changes",
        "no difference shown (~)",
    )
    note = (
        f"Nats per token. Intervals: bootstrap over {found['documents']:,} held-out documents, and over seeds where "
        "there are several; Holm over a stage's three pairs."
    )
    return Table(columns, tuple(rows), note)


def _stage_table(stage: Mapping[str, Any], found: Mapping[str, Any]) -> Table:
    if stage["measure"] == "own":
        return _own_table(stage)
    names = [name for row in stage["rows"] if row["loss"] is not None for name in row["contexts"]]
    contexts = sorted(set(names), key=int)
    columns = (*_SHARED, f"loss at {stage['context']}", "minus the lowest [95 %]", "rank")
    columns += ("at its longest context", *(f"at {context}" for context in contexts))
    rows = []
    for row in stage["rows"]:
        if row["loss"] is None:
            rows.append((row["strategy"], *["missing"] * (len(columns) - 1)))
            continue
        loss = f"{row['loss']:.4f}" + (f" ± {row['sd']:.4f}" if row["sd"] is not None else "")
        cells = [_number(row["contexts"][c]["loss"]) + "†" * row["contexts"][c]["beyond"] for c in contexts]
        longest = f"{row['longest_loss']:.4f} ({row['longest_context']})"
        rows.append((*_facts(row), loss, _interval(row["behind"]), str(row["rank"]), longest, *cells))
    seeds = f"{len(stage['pairs'][0]['seeds'])} seeds" if stage["pairs"] else "–"
    note = (
        f"Nats per token on {found['targets']:,} held-out targets in {found['documents']:,} documents, the same for "
        f"all; ranked by the loss with {stage['context']} tokens of context, the longest that fits in every strategy's "
        "training length. "
    )
    if seeds != "1 seeds" and stage["pairs"]:
        note += f"± standard deviation over seeds; intervals over {seeds} and documents."
    else:
        note += "One run of each: the interval covers the choice of documents, not the seed."
    if any("†" in cell for cells in rows for cell in cells):
        note += " † beyond the training length: the raw model."
    return Table(columns, tuple(rows), note + _missing(stage))


_SHARED = ("strategy", "B x T", "tokens per step", "passes", "learning rate", "seeds")


def _facts(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["strategy"],
        f"{row['batch_size']} x {row['seq_len']}",
        f"{row['tokens_per_step']:,}",
        f"{row['passes']:.1f}" if row["passes"] >= 1 else f"{row['passes']:.2f}",
        f"{row['learning_rate']:g}",
        ", ".join(map(str, row["seeds"])),
    )


def _own_table(stage: Mapping[str, Any]) -> Table:
    leaking, mark = stage["leaking"], f" {LEAKING}" if stage["leaking"] else ""
    floor = ("floor", "above the floor") if leaking else ()  # beside the loss: it is not read without them
    columns = (*_SHARED, "loss at own length", *floor, "rank", "accuracy", "unigram entropy")
    columns += ("nats per window",) if leaking else ()
    rows = []
    for row in stage["rows"]:
        if row["loss"] is None:
            rows.append((row["strategy"], *["missing"] * (len(columns) - 1)))
            continue
        cells = [f"{row['loss']:.4f}{mark}"]
        cells += [f"{row['floor']:.4f}", f"{row['above_floor']:.4f}"] if leaking else []
        cells += [str(row["rank"]), f"{row['accuracy']:.2%}{mark}", f"{row['unigram_entropy']:.3f}"]
        cells += [f"{row['nats_per_window']:.1f}"] if leaking else []
        rows.append((*_facts(row), *cells))
    note = (
        "Nats per token in windows of each strategy's own length: not the same task for each, so no interval is given "
        "for their differences. Passes: tokens drawn over tokens of the text."
    )
    if leaking:
        note += (
            " Validation windows overlap training windows: these losses measure memorisation. Floor: (ln N - H(first)) "
            "/ T, for N windows and the entropy H(first) of their first tokens; a model that has memorised the text "
            "whole cannot be below it."
        )
        if any(row["loss"] is not None and not row["first_token_measured"] for row in stage["rows"]):
            note += " H(first) was not measured here; the unigram entropy stands for it."
    return Table(columns, tuple(rows), note + _missing(stage))


def _differences(found: Mapping[str, Any]) -> Table:
    """Every pair of strategies at each stage that scores them on the same targets."""
    rows = tuple(
        (
            str(stage["number"]),
            stage["name"],
            f"{pair['a']} - {pair['b']}",
            _interval(pair),
            "–" if pair["p_holm"] is None else f"{pair['p_holm']:.2g}",
            verdict(pair),
            str(len(pair["seeds"])),
        )
        for stage in found["stages"]
        for pair in stage["pairs"]
    )
    note = (
        "Nats per token on the same targets with the same context [95 %: held-out documents, and seeds where there are "
        "several, resampled in pairs]; p after Holm's correction over the pairs of a stage. With one seed neither "
        "covers the choice of it."
    )
    columns = ("stage", "name", "difference", "nats per token [95 %]", "p (Holm)", "lower loss", "seeds")
    return Table(columns, rows, note)


def _missing(stage: Mapping[str, Any]) -> str:
    missing = [name for row in stage["rows"] for name in row["missing"]]
    return f" Missing: {', '.join(missing)}." if missing else ""


def _rates_text(found: Mapping[str, Any]) -> str:
    inside = [strategy for strategy, rates in found["rates"].items() if rates["inside"]]
    none = [strategy for strategy, rates in found["rates"].items() if rates["best"] is None]
    edge = [strategy for strategy in found["rates"] if strategy not in (*inside, *none)]
    text = f"Chosen on seed {found['tuning_seed']}, which the last stage leaves out, by the loss that ranks."
    if none:
        text += f" No rate of {', '.join(none)} gave a loss."
    if edge:
        text += f" The best of {', '.join(edge)} lies on the edge of its grid: a better one may lie beyond."
    return text + (f" The optimum of {', '.join(inside)} lies inside the grid." if inside else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{found['mean']:+.4f} [too few documents]"
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
