"""The findings of a study of shapes: each sentence is chosen by the numbers of its analysis."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.analysis.decomposition import signed
from research.analysis.evidence import MIN_SEEDS
from research.analysis.findings import listed
from research.analysis.shapes_claims import of_kind

BUDGETS = {"tokens": "equal tokens", "steps": "equal steps"}

Found = Mapping[str, Any]


def findings(results: Found) -> list[str]:
    """What the numbers say, each sentence chosen by them."""
    found = results["analysis"]
    if not any(found["seeds"].values()):
        return ["No run that compares is finished: nothing is compared.", *_rates(found)]
    said = [sentence for budget in BUDGETS for sentence in (*_lowest(found, budget), *_chosen(found, budget))]
    return _few(found) + said + _cuts(found) + _rates(found)


def not_settled(study: Found) -> dict[str, int]:
    """Runs that look for a learning rate and are neither finished nor diverged: exit code, 0 where not made."""
    return {
        f"tune_{budget}/{name}": code
        for budget, grids in study["grids"].items()
        for grid in grids.values()
        for name, code in grid["exit_codes"].items()
    }


def _few(found: Found) -> list[str]:
    seeds = min(len(seeds) for seeds in found["seeds"].values() if seeds)
    if seeds >= MIN_SEEDS:
        return []
    return [
        f"Of {seeds} seed{'s' * (seeds != 1)}: what is said to be shown here may be chance, and no claim is judged."
    ]


def _lowest(found: Found, budget: str) -> list[str]:
    pair = found["lowest"][budget]
    if not pair:
        return []
    a, b = (next(s for s in found["shapes"] if s["shape"] == pair[name])["at"][budget] for name in ("a", "b"))
    amount = f"a difference of {signed(pair)}" if pair["shown"] else f"no difference is shown ({signed(pair)})"
    seen = f" (runs of {a['tokens']:,} and {b['tokens']:,} tokens)" if a["tokens"] != b["tokens"] else ""
    after = f"{a['tokens']:,} tokens" if budget == "tokens" else f"{a['steps']:,} steps"
    return [
        f"After {after} {pair['a']} has the lowest loss, {a['mean']:.3f} nats per token at context {found['context']}; "
        f"next is {pair['b']} with {b['mean']:.3f}, {amount}{seen}."
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
    text = f"At {BUDGETS[budget]}, {times} times as many tokens per step, in rows or in length, change the loss "
    text += f"by {'; '.join(each)} nats per token. Of these {len(choices)} choices more rows are"
    return [f"{text} lower in {_tally([choice['cut'] for choice in choices])}."]


def _tally(cuts: Sequence[Found]) -> str:
    """In how many differences, of rows minus length, rows are shown to be lower; and higher, or neither."""
    shown = [pair for pair in cuts if pair["shown"]]
    below = sum(pair["mean"] < 0 for pair in shown)
    text = f"{below}" + f", higher in {len(shown) - below}" * (below < len(shown))
    return text + f", not shown to differ in {len(cuts) - len(shown)}" * (len(shown) < len(cuts))


def _change(pair: Found) -> str:
    return f"{pair['mean']:+.3f}" + ("" if pair["shown"] else " (not shown)")


def _cuts(found: Found) -> list[str]:
    """Rows instead of length at as many tokens per step, over all sizes of steps."""
    largest = max(shape["tokens_per_step"] for shape in found["shapes"])
    ends = {shape["shape"] for shape in found["shapes"] if shape["tokens_per_step"] == largest}
    said = []
    for budget, words in BUDGETS.items():
        cuts = of_kind(found, budget, "cut")
        if budget == "steps":  # of the largest they are the same runs, counted at equal tokens
            cuts = [pair for pair in cuts if pair["a"] not in ends]
        apart = ", the largest apart," * (budget == "steps")
        pairs = f"Of the {len(cuts)} pairs of shapes of as many tokens per step{apart} at {words}"
        said += [f"{pairs}, more and shorter rows are lower in {_tally(cuts)}."] if cuts else []
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
