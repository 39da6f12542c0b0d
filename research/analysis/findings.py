"""The paragraph of findings: each sentence is selected by the numbers."""

from collections.abc import Sequence
from typing import Any

from research.analysis import comparison
from research.analysis.original import RANKING
from research.analysis.study import Run


def paragraph(finished: Sequence[Run], compared: dict[str, Any]) -> str:
    """What the numbers of `comparison.compare` say, in the order in which a reader asks."""
    leaking = [run.strategy for run in finished if run.result["protocol"] == "published"]
    sentences = []
    if leaking:
        sentences.append(
            f"**LEAKING: the losses of {_listed(leaking)} measure memorisation, and so does what follows from them.**"
        )
    for a, b in compared["not_compared"]:
        sentences.append(f"{a} and {b} were not scored on the same targets: nothing is ranked.")
    ranked = len(finished) > 1 and not compared["not_compared"]
    if ranked:
        sentences += equal_tokens(compared) + equal_seconds(compared)
    sentences += longer_context(compared)
    if ranked:
        sentences += ranking(compared)
    sentences.append(unigram(finished, compared))
    return " ".join(sentences)


def verdict(difference: dict[str, Any]) -> str:
    """The strategy with the lower loss, or that no difference is shown."""
    if not difference["shown"]:
        return "no difference shown"
    return difference["a"] if difference["mean"] < 0 else difference["b"]


def equal_tokens(compared: dict[str, Any]) -> list[str]:
    """Who has the lowest loss at each context, and against whom the interval shows it."""
    equal, sentences = compared["equal_tokens"], []
    for context, losses in equal["losses"].items():
        known = _known(losses)
        if len(known) < 2:
            continue
        best, *others = sorted(known, key=known.__getitem__)
        among = "" if len(known) == len(losses) else f", of {_listed(list(known))},"
        text = f"{best}{among} is lowest at {context} tokens of context ({known[best]:.3f} nats/token"
        found = compared["differences"]
        doubtful = [o for o in others if not comparison.difference_shown(found, context, best, o)]
        if equal["interpolated"]:
            text += ")"
        elif doubtful:
            text += f"; no difference shown from {_listed(doubtful)})"
        else:
            text += f", {known[others[0]] - known[best]:.3f} below {others[0]})"
        sentences.append(text)
    if not sentences:
        return ["No two strategies have a loss at one context and the same number of tokens, so none wins there."]
    place = f"At equal tokens ({equal['at']:,.0f}"
    place += ", interpolated, no interval)" if equal["interpolated"] else ")"
    return [f"{place}, " + "; ".join(sentences) + "."]


def equal_seconds(compared: dict[str, Any]) -> list[str]:
    """Who has the lowest loss when the fastest run ends."""
    equal = compared["equal_seconds"]
    lowest: dict[str, list[str]] = {}
    for context, losses in equal["losses"].items():
        known = _known(losses)
        if len(known) > 1:
            lowest.setdefault(min(known, key=known.__getitem__), []).append(context)
    if not lowest:
        return []
    won = [f"{name} is lowest at {_listed(contexts)}" for name, contexts in lowest.items()]
    place = f"At equal train seconds ({duration(equal['at'])}, interpolated, no interval)"
    return [f"{place}, {'; '.join(won)} tokens of context."]


def longer_context(compared: dict[str, Any]) -> list[str]:
    """Whether each strategy predicts better with its longest context than with the shortest."""
    helps = {"helps": [], "is not shown to help": [], "hurts": []}
    for change in compared["longer_context"]:
        said = "is not shown to help"
        if change["shown"]:
            said = "helps" if change["mean"] < 0 else "hurts"
        amount = f"{change['strategy']} ({change['mean']:+.3f} from {change['from']} to {change['to']})"
        helps[said].append(amount)
    said = [f"{verb} {_listed(names)}" for verb, names in helps.items() if names]
    return [f"A longer context {', '.join(said)}."] if said else []


def ranking(compared: dict[str, Any]) -> list[str]:
    """Whether the original's ranking is seen at own length, as it measured, or on the targets."""
    known = [r for r in compared["rankings"] if r["original"] is not None]
    if not known:
        return []
    seen = {True: [], False: []}
    for entry in known:
        where = "own length" if entry["measure"] == "own" else f"context {entry['measure']}"
        surely = " (each step shown)" if entry["original"] and entry["shown"] else ""
        seen[entry["original"]].append(where + surely)
    name = f"The original's ranking ({' < '.join(RANKING)})"
    if not seen[True]:
        return [f"{name} is not seen, neither at own length nor at a shared context."]
    text = f"{name} is seen at {_listed(seen[True])}"
    return [text + (f", not at {_listed(seen[False])}." if seen[False] else ".")]


def unigram(finished: Sequence[Run], compared: dict[str, Any]) -> str:
    """Whether each run has learnt more than how often each token occurs."""
    above = []
    for run in finished:
        losses = [comparison.loss_at(run, context) for context in compared["shared_contexts"]]
        losses.append(run.result["eval"]["own"]["loss"])
        if max(losses) >= run.result["unigram_entropy"]:
            above.append(run.strategy)
    if above:
        return (
            f"The loss of {_listed(above)} is not below the unigram entropy everywhere: "
            "too little was learnt to compare by."
        )
    return "Every loss, at shared contexts and at own length, is below the unigram entropy."


def _known(losses: dict[str, float | None]) -> dict[str, float]:
    return {name: loss for name, loss in losses.items() if loss is not None}


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
