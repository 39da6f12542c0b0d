"""The findings of a study of shapes: each sentence is chosen by the numbers of its analysis."""

from collections.abc import Mapping
from typing import Any

from research.analysis.decomposition import signed
from research.analysis.findings import listed
from research.analysis.shapes_claims import of_kind

BUDGETS = {"tokens": "equal tokens", "steps": "equal steps"}

Found = Mapping[str, Any]


def findings(results: Found) -> list[str]:
    """What the numbers say, each sentence chosen by them."""
    found = results["analysis"]
    if not any(shape["at"][budget] for shape in found["shapes"] for budget in BUDGETS):
        return ["No run that compares is finished: nothing is compared.", *_rates(found)]
    said = [sentence for budget in BUDGETS for sentence in (*_lowest(found, budget), *_chosen(found, budget))]
    return said + _cuts(found) + _rates(found)


def _lowest(found: Found, budget: str) -> list[str]:
    pair = found["lowest"][budget]
    if not pair:
        return []
    a, b = (next(s for s in found["shapes"] if s["shape"] == pair[name])["at"][budget] for name in ("a", "b"))
    after = f"{a['tokens']:,} tokens" if budget == "tokens" else f"{a['steps']:,} steps, of {a['tokens']:,} tokens,"
    amount = f"a difference of {signed(pair)}" if pair["shown"] else f"no difference is shown ({signed(pair)})"
    return [
        f"After {after} {pair['a']} has the lowest loss, {a['mean']:.3f} nats per token at context {found['context']}; "
        f"next is {pair['b']} with {b['mean']:.3f}, {amount}."
    ]


def _chosen(found: Found, budget: str) -> list[str]:
    """More tokens per step, in rows or in length: how both change the loss."""
    choices = [choice for choice in found["choices"] if choice["budget"] == budget]
    if not choices:
        return []
    each = (
        f"{_change(choice['rows'])} from {choice['from']} to {choice['more_rows']} and {_change(choice['length'])} to "
        f"{choice['longer']}"
        for choice in choices
    )
    times = listed([f"{times:g}" for times in dict.fromkeys(choice["times"] for choice in choices)])
    rows = [choice for choice in choices if choice["cut"]["shown"] and choice["cut"]["mean"] < 0]
    text = (
        f"At {BUDGETS[budget]}, {times} times as many tokens per step, in more rows or in longer ones, change the loss "
    )
    text += f"by {'; '.join(each)} nats per token. More rows are the better choice in {len(rows)} of {len(choices)}."
    return [text]


def _change(pair: Found) -> str:
    return f"{pair['mean']:+.3f}" + ("" if pair["shown"] else " (not shown)")


def _cuts(found: Found) -> list[str]:
    """Rows instead of length at as many tokens per step, over all sizes of steps."""
    said = []
    for budget, words in BUDGETS.items():
        cuts = of_kind(found, budget, "cut")
        shown = [pair for pair in cuts if pair["shown"]]
        below = sum(pair["mean"] < 0 for pair in shown)
        smaller = " but the largest" * (budget == "steps")
        text = f"Where steps{smaller} hold as many tokens, at {words}, more and shorter rows are lower in {below} of"
        text += f" {len(cuts)} pairs" + f", higher in {len(shown) - below}" * (below < len(shown))
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
