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
from research.analysis.shapes_claims import verdicts
from research.analysis.shapes_findings import BUDGETS, findings, not_settled
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

Found = Mapping[str, Any]


def write(results: Found, folder: Path) -> None:
    """Draws figures/ and writes report.md and report.html into `folder` from results.json's content."""
    study, found = results["study"], results["analysis"]
    pictures = tuple(shapes_figure.draw(results, folder / "figures"))
    said, compared = "\n".join(f"- {sentence}" for sentence in findings(results)), any(found["seeds"].values())
    parts = [Part("What was found", said, pictures=pictures, kind="findings")]
    if compared:
        parts.append(Part("Each shape", "", (_losses(study, found),)))
    if found["choices"]:
        parts.append(Part("More rows, or longer ones?", _choice_text(study), (_choices(found),)))
    if found["pairs"]:
        parts.append(Part("Differences", "", (_differences(found),)))
    parts.append(Part("Learning rates", _rates_text(study), _rates_tables(study)))
    if compared:
        parts.append(Part("What a step costs", "", (_costs(found),)))
    parts.append(Part("What the original claims of the batch", _claims_text(), verdicts=tuple(verdicts(found))))
    if warnings := _warnings(study, found):
        parts.append(Part("Warnings", "\n".join(f"- {warning}" for warning in warnings), kind="warnings"))
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


def _warnings(study: Found, found: Found) -> list[str]:
    """What is missing from the means."""
    said = []
    for budget, grids in study["grids"].items():
        if names := [shape for shape, grid in grids.items() if grid["best"] is None]:
            said.append(f"At {BUDGETS[budget]} no learning rate is settled of {listed(names)}: not compared.")
    for name, code in not_settled(study).items():
        said.append(f"{name}: " + (f"failed: exit code {code}." if code else "missing."))
    by_status: dict[str, list[str]] = {}
    for name, status in found["unfinished"].items():
        by_status.setdefault(status, []).append(name)
    said += [f"{listed(names)}: {status}." for status, names in by_status.items()]
    planned = sorted({about["seed"] for about in study["compared"].values()})
    for budget, seeds in found["seeds"].items():
        if left := [str(seed) for seed in planned if seed not in seeds]:
            said.append(
                f"At {BUDGETS[budget]}, seeds that not every shape has finished are in no mean: {listed(left)}."
            )
    return said


def _facts(results: Found) -> list[tuple[str, str]]:
    study, found = results["study"], results["analysis"]
    runs = [run for run in results["runs"] if run["result"]]
    seeds = sorted({seed for seeds in found["seeds"].values() for seed in seeds})
    fields = {name: value for name, value in study["overrides"].items() if name != "train.tokens"}
    facts = [
        ("shapes (rows x tokens)", ", ".join(study["shapes"])),
        ("a run", f"{study['tokens']:,} tokens, or {study['steps']:,} steps"),
        ("fields of all runs", ", ".join(f"{name} {value}" for name, value in fields.items()) or "none"),
        (
            "runs",
            f"{len(runs)} of {len(results['runs'])} finished; seeds compared: {', '.join(map(str, seeds)) or 'none'}",
        ),
    ]
    if runs:
        first = runs[0]["result"]
        parameters = first["parameters"]
        facts += [
            ("text", f"{protocol.corpus(runs[0])}; {_targets(found)}"),
            ("passes over the text", f"{max(run['result']['epochs'] for run in runs):.2f}"),
            ("model", f"{parameters['total']:,} parameters, {parameters['active']:,} active per token"),
            ("device", ", ".join(dict.fromkeys(run["result"]["device"] for run in runs))),
            ("code", ", ".join(dict.fromkeys(map(protocol.code, runs)))),
        ]
    return facts


def _targets(found: Found) -> str:
    return f"{found['targets']:,} held-out targets in {found['documents']:,} documents"


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
        "From one shape to as many times more tokens per step there are two ways: more rows of the same length, which "
        "also come from more places of the text, or as many rows, longer. At equal steps "
        f"({study['steps']:,}) the larger step is trained on more tokens; at equal tokens ({study['tokens']:,}) it "
        "takes fewer steps."
    )


def _choices(found: Found) -> Table:
    rows = tuple(
        (
            BUDGETS[choice["budget"]],
            f"{choice['from']}, {choice['times']:g} times",
            f"{choice['more_rows']}: {_marked(choice['rows'])}",
            f"{choice['longer']}: {_marked(choice['length'])}",
            _marked(choice["cut"]),
        )
        for choice in found["choices"]
    )
    note = (
        f"Change of the loss at context {found['context']}, nats per token [{_sampled(found)}], from each shape by "
        "the least times that there are both; corrected as in the table below."
    )
    return Table(("at", "from", "in rows", "in length", "rows minus length"), rows, note)


def _marked(pair: Found) -> str:
    return signed(pair) + ("" if pair["shown"] else " (not shown)")


def _differences(found: Found) -> Table:
    rows = tuple(
        (
            BUDGETS[pair["budget"]], KINDS[pair["kind"]], f"{pair['a']} - {pair['b']}", signed(pair),
            "–" if pair["p_holm"] is None else f"{pair['p_holm']:.2g}", verdict(pair),
        )
        for pair in found["pairs"]
    )  # fmt: skip
    note = (
        f"Nats per token at context {found['context']} [{_sampled(found)}]; neighbours, and the ways to larger steps. "
        "p after Holm's correction over the pairs of one kind at one budget. The largest steps are the same runs at "
        "both budgets."
    )
    return Table(("at", "what differs", "difference", "nats per token [95 %]", "p (Holm)", "lower loss"), rows, note)


def _sampled(found: Found) -> str:
    return sampled(len(pair["seeds"]) for pair in found["pairs"])


def _rates_text(study: Found) -> str:
    return (
        f"Chosen on seed {study['seed']}, which compares nothing here, by the loss at the context that is compared "
        f"(with all its own context a shape may do better at another), after {study['tokens']:,} tokens and after "
        f"{study['steps']:,} steps; intervals do not hold this choice. One field, `{study['field']}`, was searched. "
        "What else depends on the size of a step is as the config says: the other learning rate, where there is one, "
        "weight decay, clipping, the share of the steps that warm-up takes, and how many steps averages remember."
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
        "devices",
    )
    note = (
        "Median step of the least disturbed run, without compilation, evaluation and checkpoints; memory of the "
        "compiled step, on all its devices (a CPU's cores are devices, as many as divide the rows)."
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
        f"{seconds * at['steps']:,.0f}" if (at := shape["at"]["tokens"]) else "–",
        f"{shape['flops_per_token'] / 1e6:.2f}",
        "–" if memory is None else f"{memory / 1e9:.3f}",
        f"{shape['devices']}",
    )


def _claims_text() -> str:
    return (
        "Three of the original's claims about the batch by itself, which its own strategies never varied, are judged "
        "here, by a rule over the differences of shapes of one length. What holds here holds for this text, these "
        "shapes and so many steps."
    )
