"""The report of a study of shapes, from results.json alone: what was found, the losses, the differences, the costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.analysis import protocol, shapes_figure
from research.analysis.decomposition import sampled, signed
from research.analysis.findings import listed
from research.analysis.page import Table
from research.analysis.render import Page, Part
from research.analysis.render import write as write_page
from research.analysis.shapes_claims import of_kind, verdicts
from research.analysis.tables import verdict
from research.analysis.tuning_report import losses_table

QUESTION = (
    "How many tokens should a step hold, and should more of them be spent on more rows or on longer ones? Every shape "
    "is scored on the same held-out tokens, each predicted from the same number of tokens before it."
)
KINDS = {  # of a pair: what differs, and what does not
    "rows": "more rows, as long",
    "length": "longer rows, as many",
    "cut": "more and shorter rows, as many tokens per step",
}
BUDGETS = {"tokens": "equal tokens", "steps": "equal steps"}

Found = Mapping[str, Any]


def write(results: Found, folder: Path) -> None:
    """Draws figures/ and writes report.md and report.html into `folder` from results.json's content."""
    study, found = results["study"], results["analysis"]
    pictures = tuple(shapes_figure.draw(results, folder / "figures"))
    parts = [
        Part(
            "What was found", "\n".join(f"- {said}" for said in findings(results)), pictures=pictures, kind="findings"
        ),
        Part("Each shape", "", (_losses(study, found),)),
        Part("More rows, or longer ones?", _choice_text(study), (_choices(found),) if found["choices"] else ()),
        Part("Differences", "", (_differences(found),)),
        Part("Learning rates", _rates_text(study), _rates_tables(study)),
        Part("What a step costs", "", (_costs(found),)),
        Part("What the original claims of the batch", _claims_text(), verdicts=tuple(verdicts(found))),
    ]
    if found["unfinished"]:
        missing = "\n".join(f"- {name} is not finished: it is in no mean." for name in found["unfinished"])
        parts.append(Part("Warnings", missing, kind="warnings"))
    page = Page(
        title="How large a step, and in which shape?",
        kicker=protocol.kicker({"runs": [run | {"setting": "independent"} for run in results["runs"]]}),
        question=QUESTION,
        facts=_facts(results),
        parts=parts,
        footer=(
            "Made from `results.json` in this folder, which holds every number above, and from the losses in "
            "`heldout_losses.npz`: `python -m experiments.shapes --report_only --workdir=<this folder>` makes it again."
        ),
    )
    write_page(page, folder)


def _facts(results: Found) -> list[tuple[str, str]]:
    study, found = results["study"], results["analysis"]
    runs = [run for run in results["runs"] if run["result"]]
    seeds = sorted({about["seed"] for about in study["compared"].values()})
    facts = [
        ("shapes (rows x tokens)", ", ".join(study["shapes"])),
        ("fields given", ", ".join(f"{name} {value}" for name, value in study["overrides"].items()) or "none"),
        ("runs", f"{len(runs)} of {len(results['runs'])} finished, seeds {listed(list(map(str, seeds)))}"),
    ]
    if runs:
        first = runs[0]["result"]
        parameters = first["parameters"]
        facts += [
            ("text", f"{protocol.corpus(runs[0])}; {_targets(found)}"),
            ("model", f"{parameters['total']:,} parameters, {parameters['active']:,} active per token"),
            ("device", ", ".join(dict.fromkeys(run["result"]["device"] for run in runs))),
            ("code", ", ".join(dict.fromkeys(map(protocol.code, runs)))),
        ]
    return facts


def _targets(found: Found) -> str:
    return f"{found['targets']:,} held-out targets in {found['documents']:,} documents"


def findings(results: Found) -> list[str]:
    """What the numbers say, each sentence chosen by them."""
    found = results["analysis"]
    said = [sentence for budget in BUDGETS for sentence in (*_lowest(found, budget), *_chosen(found, budget))]
    said += _price(found) + _rates(found)
    return said or ["No run is finished: nothing is compared."]


def _lowest(found: Found, budget: str) -> list[str]:
    there = [shape for shape in found["shapes"] if shape["at"][budget]]
    if len(there) < 2:
        return []
    best, second = sorted(there, key=lambda shape: shape["at"][budget]["mean"])[:2]
    loss = best["at"][budget]
    count = f"{loss['tokens']:,} tokens" if budget == "tokens" else f"{loss['steps']:,} steps"
    text = f"After {count} {best['shape']} has the lowest loss, {loss['mean']:.3f} nats per token at context"
    return [f"{text} {found['context']}; next is {second['shape']} with {second['at'][budget]['mean']:.3f}."]


def _chosen(found: Found, budget: str) -> list[str]:
    """More tokens per step, in rows or in length: how both change the loss, and which is lower."""
    choices = [choice for choice in found["choices"] if choice["budget"] == budget]
    if not choices:
        return []
    parts = [[_change(choice[name]) for name in ("rows", "length", "cut")] for choice in choices]
    each = (
        f"from {choice['from']} by {rows} in rows, {length} in length (the one minus the other {cut})"
        for choice, (rows, length, cut) in zip(choices, parts, strict=True)
    )
    times = listed([f"{times:g}" for times in dict.fromkeys(choice["times"] for choice in choices)])
    return [f"At {BUDGETS[budget]}, {times} times as many tokens per step change the loss {'; '.join(each)}."]


def _change(pair: Found) -> str:
    return f"{pair['mean']:+.3f}" + ("" if pair["shown"] else " (not shown)")


def _price(found: Found) -> list[str]:
    """Rows instead of length at as many tokens per step, over all sizes of steps."""
    said = []
    for budget, words in BUDGETS.items():
        cuts = of_kind(found, budget, "cut")
        shown = [pair for pair in cuts if pair["shown"]]
        below = sum(pair["mean"] < 0 for pair in shown)
        text = (
            f"Of as many tokens per step, at {words}, more and shorter rows are lower in {below} of {len(cuts)} pairs"
        )
        text += f", higher in {len(shown) - below}" * (below < len(shown))
        text += f"; of {len(cuts) - len(shown)} no difference is shown" * (len(shown) < len(cuts))
        said += [f"{text}."] if cuts else []
    return said


def _rates(found: Found) -> list[str]:
    said = []
    for budget, words in BUDGETS.items():
        by_size: dict[int, list[str]] = {}
        for shape in found["shapes"]:
            rate = shape["rates"][budget]
            if rate["best"] is not None:
                edge = "" if rate["inside"] else " (on the edge)"
                by_size.setdefault(shape["tokens_per_step"], []).append(f"{shape['shape']} {rate['best']:g}{edge}")
        each = "; ".join(f"of {size:,} tokens per step {', '.join(rates)}" for size, rates in sorted(by_size.items()))
        said += [f"Best learning rates at {words}: {each}."] if each else []
    return said


def _losses(study: Found, found: Found) -> Table:
    rows = []
    for shape in found["shapes"]:
        cells = [shape["shape"], f"{shape['tokens_per_step']:,}"]
        for budget, other in (("tokens", "steps"), ("steps", "tokens")):
            at, rate = shape["at"][budget], shape["rates"][budget]["best"]
            cells += ["–" if rate is None else f"{rate:g}"]
            cells += ["–"] * 3 if at is None else [f"{at[other]:,}", _spread(at), _reach(at)]
        rows.append(tuple(cells))
    context = found["context"]
    losses = (f"loss at {context}", "at all its context")
    columns = ("shape", "tokens per step", f"at {study['tokens']:,} tokens: learning rate", "steps", *losses)
    columns += (f"at {study['steps']:,} steps: learning rate", "tokens", *losses)
    note = (
        f"Nats per token, mean ± standard deviation over seeds, of {_targets(found)}: with {context} tokens before "
        "each, the longest context that fits in every length, and with the longest that fits in the shape's own (in "
        "brackets). The largest steps are the same runs at both."
    )
    return Table(columns, tuple(rows), note)


def _spread(entry: Found) -> str:
    return f"{entry['mean']:.3f}" + (f" ± {entry['sd']:.3f}" if entry["sd"] is not None else "")


def _reach(at: Found) -> str:
    return f"{_spread(at['reach'])} ({at['reach']['context']:,})"


def _choice_text(study: Found) -> str:
    return (
        "From one shape to as many times more tokens per step there are two ways: more rows of the same length, or as "
        f"many rows, longer. At equal steps ({study['steps']:,}) the larger step is trained on more tokens; at equal "
        f"tokens ({study['tokens']:,}) it takes fewer steps."
    )


def _choices(found: Found) -> Table:
    rows = tuple(
        (
            BUDGETS[choice["budget"]], choice["from"], f"{choice['times']:g}",
            f"{choice['more_rows']}: {signed(choice['rows'])}",
            f"{choice['longer']}: {signed(choice['length'])}",
            signed(choice["cut"]),
            verdict(choice["cut"]),
        )
        for choice in found["choices"]
    )  # fmt: skip
    columns = ("at", "from", "times", "in rows", "in length", "rows minus length", "lower loss")
    note = f"Change of the loss at context {found['context']}, nats per token [{_sampled(found)}]."
    return Table(columns, rows, note)


def _differences(found: Found) -> Table:
    rows = tuple(
        (
            BUDGETS[pair["budget"]], KINDS[pair["kind"]], f"{pair['a']} - {pair['b']}", signed(pair),
            "–" if pair["p_holm"] is None else f"{pair['p_holm']:.2g}", verdict(pair),
        )
        for pair in found["pairs"]
    )  # fmt: skip
    note = (
        f"Nats per token at context {found['context']} [{_sampled(found)}]; neighbours alone. p after Holm's "
        "correction over the pairs of one kind at one budget."
    )
    return Table(("at", "what differs", "difference", "nats per token [95 %]", "p (Holm)", "lower loss"), rows, note)


def _sampled(found: Found) -> str:
    return sampled(len(pair["seeds"]) for pair in found["pairs"])


def _rates_text(study: Found) -> str:
    return (
        f"Chosen on seed {study['seed']}, which compares nothing here, by the loss on the targets that are compared, "
        f"after {study['tokens']:,} tokens and after {study['steps']:,} steps. One field, `{study['field']}`, was "
        "searched: what else depends on the size of a step, such as AdamW's learning rate and how long averages "
        "remember, is as the config says."
    )


def _rates_tables(study: Found) -> tuple[Table, ...]:
    tables = [(BUDGETS[budget], losses_table(grids)) for budget, grids in study["grids"].items()]
    return tuple(Table((f"at {w}", *t.columns[1:]), t.rows, t.note) for w, t in tables)


def _costs(found: Found) -> Table:
    columns = (
        "shape",
        "step (s)",
        "tokens per second",
        "training at equal tokens (s)",
        "MFLOPs per token",
        "memory (GB)",
    )
    note = (
        "Median step of the least disturbed run, without compilation, evaluation and checkpoints; memory of the "
        "compiled step."
    )
    return Table(columns, tuple(_cost(shape, len(columns)) for shape in found["shapes"]), note)


def _cost(shape: Found, columns: int) -> tuple[str, ...]:
    seconds, memory = shape["step_seconds"], shape["memory_bytes"]
    if seconds is None:
        return (shape["shape"], *["–"] * (columns - 1))
    return (
        shape["shape"],
        f"{seconds:.3f}",
        f"{shape['tokens_per_step'] / seconds:,.0f}",
        f"{seconds * shape['at']['tokens']['steps']:,.0f}",
        f"{shape['flops_per_token'] / 1e6:.2f}",
        "–" if memory is None else f"{memory / 1e9:.3f}",
    )


def _claims_text() -> str:
    return (
        "Three of the original's claims are of the batch by itself, which its strategies never varied. The verdict is "
        "chosen by a rule over the differences of shapes of one length."
    )
