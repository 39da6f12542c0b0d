"""The findings of a study: each sentence is selected by the numbers of its analysis."""

from collections.abc import Sequence
from typing import Any

from research.analysis import budgets, noise_report, recall, repeats
from research.analysis.comparison import difference_of
from research.analysis.original import RANKING
from research.analysis.study import lengths_of

LITTLE = 0.05  # nats per token: a gain from context below it is next to none


def as_list(analysis: dict[str, Any]) -> str:
    """What the numbers say, in the order in which a reader asks: a Markdown list, a sentence an item."""
    leaking = any(arm["own"]["leaking"] for arm in analysis["arms"])
    warning = "**LEAKING: these losses measure memorisation, and so does what follows from them.**"
    sentences = (
        [warning] * leaking
        + same_targets(analysis)
        + why(analysis)
        + noise_report.finding(analysis.get("noise", ()))
        + more_context(analysis)
        + repeats.findings(analysis)
        + grown(analysis)
        + scarce(analysis)
        + recalls(analysis)
        + ranking(analysis)
        + unigram(analysis)
    )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def same_targets(analysis: dict[str, Any]) -> list[str]:
    """Who has the lowest loss at the longest context that all share, and against whom it is shown."""
    arms = [arm for arm in analysis["arms"] if arm["setting"] == "independent"]
    if not arms:
        return ["No run is in independent order: nothing is ranked."]
    if len(arms) < 2 or not analysis["shared_contexts"]:
        return ["No two strategies share a context: nothing is ranked."]
    context = str(analysis["shared_contexts"][-1])
    best, *others = sorted(arms, key=lambda arm: arm["contexts"][context]["mean"])
    shown, doubtful, apart = [], [], []
    for other in others:
        found = difference_of(analysis["differences"], "independent", context, best["strategy"], other["strategy"])
        if found is None:
            apart.append(other["strategy"])
        elif not found["shown"]:
            doubtful.append(other["strategy"])
        else:
            low, high = sorted(abs(found[end]) for end in ("low", "high"))
            below = (found["mean"] < 0) == (found["a"] == best["strategy"])  # else: of the seeds that both have
            where = "below" if below else "above, over the seeds that both have,"
            shown.append(f"{abs(found['mean']):.3f} {where} {other['strategy']} [{low:.3f}, {high:.3f}]")
    text = (
        f"On the same held-out targets at context {context}, {best['strategy']} has the lowest loss, "
        f"{best['contexts'][context]['mean']:.3f} nats per token"
    )
    if shown:
        text += ": " + listed(shown)
    if doubtful:
        text += f"; no difference from {listed(doubtful)} is shown"
    if apart:
        text += f"; with {listed(apart)} it is not compared"
    return [text + "."]


def why(analysis: dict[str, Any]) -> list[str]:
    """How much of the largest difference is the rows' length, and how much diversity."""
    grow = {arm["strategy"] for arm in analysis["arms"] if arm.get("stages")}  # of no one row length
    at = analysis["shared_contexts"][-1:]
    entries = [e for e in analysis["decomposition"] if e["at"] in at and not {e["a"], e["b"]} & grow]
    if not entries:
        return []
    largest = max(entries, key=lambda e: abs(e["total"]["mean"]))
    named = {"length": "row length", "diversity": "diversity"}
    parts = [f"{name} {largest[part]['mean']:+.3f} {_interval(largest[part])}" for part, name in named.items()]
    total = f"{largest['total']['mean']:+.3f} {_interval(largest['total'])}"
    pair = f"{largest['a']} and {largest['b']}"
    return [f"Of the difference of {total} between {pair}, {parts[0]} and {parts[1]} (nats per token)."]


def more_context(analysis: dict[str, Any]) -> list[str]:
    """How much each strategy gains from the longest context it was trained at, and from where on nothing."""
    said, independent = [], [entry for entry in analysis["context"] if entry["setting"] == "independent"]
    for entry in independent:
        if entry["effective"] is None:
            continue
        gain = entry["gains"][-1]
        how = "gains" if gain["shown"] and gain["mean"] > 0 else "loses" if gain["shown"] else "is not shown to gain"
        amount = f" {abs(gain['mean']):.3f}" if gain["shown"] else ""
        said.append(
            f"{entry['strategy']} {how}{amount} from {gain['from']} to {gain['to']} tokens (effective context "
            f"{'at least ' if entry['effective']['censored'] else ''}{entry['effective']['mean']:,.0f})"
        )
    if not said:
        return []
    sentences = ["With more context, " + "; ".join(said) + "."]
    most = max(gain["mean"] for entry in independent for gain in entry["gains"][-1:])
    if most < LITTLE:
        first = min(gain["from"] for entry in independent for gain in entry["gains"][-1:])
        sentences.append(
            f"Beyond {first} tokens of context no strategy gains {LITTLE} nats per token: with so little training next "
            "to nothing of what long rows are for has been learnt, and it is not tested."
        )
    return sentences


def grown(analysis: dict[str, Any]) -> list[str]:
    """What rows that grow are against the others, each strategy with all the context that it was trained at."""
    pairs = (analysis.get("reach") or {}).get("pairs", ())
    sentences = []
    for arm in analysis["arms"]:
        name, said = arm["strategy"], []
        for pair in pairs if arm.get("stages") and arm["setting"] == "independent" else ():
            if pair["setting"] == "independent" and name in (pair["a"], pair["b"]):
                other = pair["b"] if pair["a"] == name else pair["a"]
                low, high = sorted(abs(pair[end] or 0) for end in ("low", "high"))
                side = "below" if (pair["mean"] < 0) == (pair["a"] == name) else "above"
                amount = f"{abs(pair['mean']):.3f} {side} {other} [{low:.3f}, {high:.3f}]"
                said.append(amount if pair["shown"] else f"not shown to differ from {other}")
        if said:
            lengths = ", then ".join(f"{length:,}" for length in lengths_of(arm))
            text = f"{name}, in rows of {lengths} tokens, is {listed(said)}"
            sentences.append(f"With all the context that each was trained at, {text}.")
    return sentences


def scarce(analysis: dict[str, Any]) -> list[str]:
    """Who wins at which budget."""
    won: dict[str, list[str]] = {}
    for entry in (analysis["budgets"] or {}).get("equal", ()):
        if entry["losses"]:
            won.setdefault(next(iter(entry["losses"])), []).append(budgets.LABELS[entry["budget"]])
    if not won:
        return []
    return ["Lowest at equal " + "; at equal ".join(f"{listed(axes)}: {name}" for name, axes in won.items()) + "."]


def recalls(analysis: dict[str, Any]) -> list[str]:
    """How much each strategy recalls at the longest distances, reading whole documents or as much as its rows."""
    found = analysis["recall"]
    if not found:
        return []
    farthest = max(b["from"] for entry in found for b in entry["raw"])
    said = []
    for suite, reading in recall.SUITES.items():
        bins = {e["strategy"]: next((b for b in e[suite] if b["from"] == farthest), None) for e in found}
        each = ", ".join(f"{name} {recall.share(b)}" for name, b in bins.items() if b)
        said.append(f"in {reading}: {each}")
    to = 2 * farthest - 1
    seeds = "; in brackets each seed" if len(found[0]["seeds"]) > 1 else ""
    return [
        f"Recalled at distances of {farthest:,} to {to:,} tokens (chance {found[0]['chance']:.1%}{seeds}), "
        f"{'; '.join(said)}."
    ]


def ranking(analysis: dict[str, Any]) -> list[str]:
    """Whether the original's ranking is seen at own length, as it measured, or on the targets."""
    known = [r for r in analysis["rankings"] if r["original"] is not None]
    if not known:
        return []
    where = [
        ("own length" if r["measure"] == "own" else f"context {r['measure']}")
        + f" ({r['setting']} order{'' if r['shown'] else ', not all of its differences shown'})"
        for r in known
        if r["original"]
    ]
    name = f"The original's ranking ({' < '.join(RANKING)})"
    seen = f"at {listed(where)}" if where else "neither at own length nor on the same targets"
    return [f"{name} is {'' if where else 'not '}seen{', ' if not where else ' '}{seen}."]


def unigram(analysis: dict[str, Any]) -> list[str]:
    """Whether each arm has learnt more than how often each token occurs."""
    shared = [str(c) for c in analysis["shared_contexts"]]
    above = [
        f"{arm['strategy']} ({arm['setting']} order)"
        for arm in analysis["arms"]
        if max([arm["own"]["mean"], *(arm["contexts"][c]["mean"] for c in shared)]) >= arm["unigram_entropy"]
    ]
    if above:
        return [f"The loss of {listed(above)} is not below the unigram entropy everywhere: too little was learnt."]
    return []


def _interval(entry: dict[str, Any]) -> str:
    return "[no interval]" if entry["low"] is None else f"[{entry['low']:+.3f}, {entry['high']:+.3f}]"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
