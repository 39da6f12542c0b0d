"""The report of a study: its data files are analysed into results.json; report.md and report.html are made of that."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from research.analysis import (
    archive,
    budgets,
    claims,
    comparison,
    context_section,
    decomposition,
    figures,
    findings,
    noise,
    noise_report,
    protocol,
    reach,
    recall,
    repeats,
    study,
    tables,
)
from research.analysis.glossary import TERMS
from research.analysis.page import Picture, Section
from research.analysis.render import Page, Part
from research.analysis.render import write as write_page
from research.files import write_json

TITLE = "Batch or length?"
QUESTION = (
    "At the same number of tokens per step, should a training step hold more sequences or longer ones? Every strategy "
    "is scored on the same held-out tokens, each predicted from the same number of tokens before it."
)


def write(folder: Path) -> dict[str, Any]:
    """Analyses the data files in `folder` into its results.json, then makes the report of it.

    Returns: results.json's content. The same data files give the same report. Raises: ConfigError when a data file is
    missing or damaged.
    """
    runs = archive.load(folder)
    finished = {run.key.name for run in runs if run.finished}
    analysis = analyse(runs) | {"noise": noise.analyse(noise.read(folder), finished)}
    results = archive.read_json(folder / "results.json") | {"analysis": analysis}
    write_json(folder / "results.json", results)
    render(results, folder)
    return results


def analyse(runs: Sequence[study.Run]) -> dict[str, Any]:
    """All that the report says beyond the runs' own results: that of comparison.py, reach.py and repeats.py."""
    analysis = comparison.analyse(runs)
    shared = analysis["shared_contexts"]
    everyone = [arm for setting in ("independent", "paired") for arm in study.arms(runs, setting)]
    return analysis | {"reach": _reach(runs, shared), "repeats": repeats.analyse(everyone, shared)}


def _reach(runs: Sequence[study.Run], shared: Sequence[int]) -> dict[str, list]:
    found = [reach.analyse(study.arms(runs, setting), shared) for setting in ("independent", "paired")]
    return {name: [entry for each in found for entry in each[name]] for name in ("pairs", "gains")}


def render(results: Mapping[str, Any], folder: Path) -> None:
    """Writes figures/, report.md and report.html into `folder`, from results.json's content alone."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, analysis = figures.draw(results["analysis"], folder / "figures"), results["analysis"]
    page = Page(
        title=TITLE,
        kicker=protocol.kicker(results),
        question=QUESTION,
        facts=protocol.facts(results),
        parts=parts(results, drawn),
        footer=_remake(),
        strategies=list(dict.fromkeys(entry["strategy"] for entry in (*analysis["arms"], *analysis["recall"]))),
    )
    write_page(page, folder)


def parts(results: Mapping[str, Any], drawn: Mapping[str, Picture]) -> list[Part]:
    """The report's sections in their order; what the results have no numbers for is left out."""
    analysis = results["analysis"]
    scored = bool(analysis["arms"])
    found = [Part("What was run", protocol.text(results), protocol.tables(results))]
    if scored or analysis["recall"]:
        found.append(Part("Findings", findings.as_list(analysis), kind="findings"))
    if scored:
        shown = tables.main_table(analysis), tables.units_table(analysis)
        found.append(Part("On the same held-out tokens", _main_text(analysis), shown))
        found.append(_part(tables.differences(analysis)))
    verdicts = tuple(claims.verdicts(results))
    found.append(Part("The original's claims, one by one", _claims_text(), verdicts=verdicts))
    sections: list[Section | None] = [
        context_section.section(analysis, drawn),
        _with(budgets.section(analysis), drawn, "budgets"),
        _with(decomposition.section(analysis), drawn, "decomposition"),
        _with(noise_report.section(analysis.get("noise", ()), noise.tokens_per_step(analysis)), drawn, "noise"),
        _with(recall.section(analysis), drawn, "recall"),
        _with(tables.costs(analysis), drawn, "costs") if scored else None,
        tables.original_section(analysis),
    ]
    found += [_part(section) for section in sections if section is not None]
    if analysis["warnings"]:
        found.append(Part("Warnings", "\n".join(f"- {said}" for said in analysis["warnings"]), kind="warnings"))
    found.append(Part("What the words mean", terms=TERMS))
    return found


def _part(section: Section) -> Part:
    return Part(section.title, section.text, section.tables, section.pictures)


def _with(section: Section | None, drawn: Mapping[str, Picture], name: str) -> Section | None:
    """The section with the picture of its name, where it was drawn."""
    if section is None or name not in drawn or any(picture.name == name for picture in section.pictures):
        return section
    return replace(section, pictures=(*section.pictures, drawn[name]))


def _main_text(analysis: Mapping[str, Any]) -> str:
    if not analysis["shared_contexts"]:
        return "No context is shared by every strategy: only losses of one column are comparable."
    return (
        "Losses of one column are of the same targets with the same context: they compare strategies. All were trained "
        f"at contexts up to {analysis['shared_contexts'][-1]:,} tokens."
    )


def _claims_text() -> str:
    return (
        "Each claim of the original that this project answers, in its order. The verdict is chosen by a rule over the "
        "numbers that stand beside it. `not tested` says that the numbers are absent or do not decide, and what would; "
        "it is not a no. What holds here holds at this scale, for this text, this many tokens and these "
        "learning rates."
    )


def _remake() -> str:
    return (
        "Made from `results.json` alone, which is made from the runs and `heldout_losses.npz` in this folder: "
        "`python -m experiments.ablation --report_only --workdir=<this folder>` makes both again. `results.json` holds "
        "every number that a table or a figure shows, `heldout_losses.npz` the loss of each held-out token in each run."
    )
