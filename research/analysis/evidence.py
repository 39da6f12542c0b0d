"""What the rules over claims read off an analysis: strategies, differences, and the sentences that numbers are said in.

An answer is True, False, or None: the numbers are there and do not decide.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from research.analysis.findings import LITTLE, listed
from research.analysis.page import VERDICTS

HOLDS, CONDITIONS, FAILS, UNTESTED = VERDICTS
MIN_SEEDS = 3  # of each side; with fewer, ranges are apart by chance too often (by_chance)
SAME = 0.05  # costs that differ by less are the same
ONE_LENGTH = "All strategies have rows of one length: longer ones beside them would tell."

Analysis = Mapping[str, Any]
Arm = Mapping[str, Any]
Judged = tuple[str, str]  # the verdict, and the numbers behind it


def arms(analysis: Analysis, setting: str = "independent") -> dict[str, Arm]:
    """The finished strategies of a setting, from the shortest rows to the longest."""
    found = [arm for arm in analysis.get("arms") or [] if arm["setting"] == setting]
    return {arm["strategy"]: arm for arm in sorted(found, key=lambda arm: arm["seq_len"])}


def without(value: Any, names: Collection[str]) -> Any:
    """An analysis without some strategies: what is said of them, alone or against others, is left out."""
    if isinstance(value, Mapping):
        return {key: without(inner, names) for key, inner in value.items() if key not in names}
    if isinstance(value, (list, tuple)):
        return [without(inner, names) for inner in value if not _named(inner) & set(names)]
    return value


def _named(value: Any) -> set[Any]:
    if isinstance(value, Mapping):
        return {value.get(name) for name in ("strategy", "a", "b") if isinstance(value.get(name), str)}
    return {value} if isinstance(value, str) else set()


def growing(analysis: Analysis) -> list[str]:
    """The strategies whose rows grow: they are of no one length."""
    entries = [*(analysis.get("arms") or []), *(analysis.get("recall") or [])]
    return list(dict.fromkeys(entry["strategy"] for entry in entries if entry.get("stages")))


def unfinished(analysis: Analysis, *strategies: str) -> str | None:
    """The sentence that says which of these strategies the study has no run of; None where all are there."""
    known, apart = arms(analysis), ""
    if left_out := analysis.get("left_out"):
        apart = f" besides {listed(left_out)}, whose rows grow"
    if not known:
        return f"This study has no finished run in independent order{apart}."
    missing = [name for name in strategies if name not in known]
    if missing:
        return f"This study has no finished run of {listed(missing)}."
    return None if len(known) > 1 else f"This study has one strategy alone{apart}: it takes two to compare."


def leak(analysis: Analysis) -> str | None:
    """The sentence that says that no loss of this study can decide anything; None where nothing leaks."""
    leaking = [name for name, arm in arms(analysis).items() if arm["own"]["leaking"]]
    if not leaking:
        return None
    return f"LEAKING: the losses of {listed(leaking)} measure memorisation. The clean protocol would tell."


def blocked(analysis: Analysis, *strategies: str) -> str | None:
    """Why the losses of this study cannot decide between strategies; None where they can."""
    if shared_context(analysis) is None and len(arms(analysis)) > 1:
        return "No context is shared by every strategy, so no losses are of the same task."
    return unfinished(analysis, *strategies) or leak(analysis)


def one_length(analysis: Analysis) -> str | None:
    """The sentence that says that nothing here is a test of length; None where lengths differ."""
    lengths = {arm["seq_len"] for arm in arms(analysis).values()}
    return ONE_LENGTH if len(lengths) == 1 else None


def blocked_by_length(analysis: Analysis, *strategies: str) -> str | None:
    """Why the losses of this study cannot decide between lengths of rows; None where they can."""
    return blocked(analysis, *strategies) or one_length(analysis)


def gap(analysis: Analysis, a: str, b: str, context: Any, setting: str = "independent") -> dict[str, Any] | None:
    """Loss of `a` minus that of `b` at a context, whichever way round it was compared; None where it was not."""
    for entry in analysis.get("differences") or []:
        if entry["setting"] == setting and entry["context"] == context and {entry["a"], entry["b"]} == {a, b}:
            return entry if entry["a"] == a else turned(entry)
    return None


def turned(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same difference the other way round."""
    low, high = entry["low"], entry["high"]
    ends = {"low": None, "high": None} if low is None else {"low": -high, "high": -low}
    return {**entry, "a": entry["b"], "b": entry["a"], "mean": -entry["mean"], **ends}


def turned_ends(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The same, of strategies that are each at a context of their own."""
    return turned(pair) | {"context_a": pair["context_b"], "context_b": pair["context_a"]}


def curves(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """What context is worth to each strategy, in independent order."""
    return {e["strategy"]: e for e in analysis.get("context") or [] if e["setting"] == "independent"}


def shared_context(analysis: Analysis) -> int | None:
    """The longest context that every strategy was trained at."""
    return max(analysis.get("shared_contexts") or [], default=None)


def extreme(entries: Sequence[Mapping[str, Any] | None], sign: int) -> bool | None:
    """Whether all differences are shown to have a sign (+1, -1); False where one is shown to have the other."""
    if any(entry is not None and entry["shown"] and entry["mean"] * sign < 0 for entry in entries):
        return False
    return True if entries and all(entry is not None and entry["shown"] for entry in entries) else None


def apart(lower: Collection[float], higher: Collection[float]) -> bool | None:
    """Whether every seed's value of one arm lies below every seed's of another; None with too few seeds to say so."""
    if min(len(lower), len(higher)) < MIN_SEEDS:
        return None
    return True if max(lower) < min(higher) else False if min(lower) > max(higher) else None


def by_chance(*seeds: int) -> str:
    """The words that say how often the ranges of so many seeds of one strategy are apart, either way round.

    2 of all orders: 10 % with 3 seeds each.
    """
    orders = math.comb(sum(seeds), seeds[0])
    return f"ranges of {listed([str(n) for n in seeds])} seeds of one strategy are apart {2 / orders:.1%} of the time"


def judge(answers: Sequence[bool | None]) -> str:
    """One verdict from the answers of several measures: all alike, divided, or none decided."""
    decided = {answer for answer in answers if answer is not None}
    if len(decided) == 1:
        return HOLDS if decided == {True} else FAILS
    return CONDITIONS if decided else UNTESTED


def either(answers: Sequence[bool | None]) -> bool | None:
    """True if one is, False if all are."""
    return True if True in answers else False if answers and None not in answers else None


def said(entry: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    if entry["low"] is None:
        return f"{entry['mean']:+.3f} (no interval)"
    doubt = "" if entry.get("shown", True) else " (not shown)"
    return f"{entry['mean']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]{doubt}"


def against(entries: Sequence[Mapping[str, Any] | None]) -> str:
    """Differences of one strategy from several others."""
    return "; ".join(f"{e['a']} minus {e['b']} {said(e)}" for e in entries if e is not None) or "not compared"


def little_context(analysis: Analysis) -> str | None:
    """The sentence that says that no strategy gains from more context, so that it cannot be seen what it is for."""
    entries = [e for e in analysis.get("context") or [] if e["setting"] == "independent"]
    gains = [entry["gains"][-1]["mean"] for entry in entries if entry["gains"]]
    if not gains or max(gains) >= LITTLE:
        return None
    first = min(entry["gains"][-1]["from"] for entry in entries if entry["gains"])
    return f"Beyond {first} tokens of context no strategy gains {LITTLE} nats per token: longer training would tell."


def rows_alone(analysis: Analysis) -> list[tuple[Arm, Arm]]:
    """Every two strategies that have rows of one length, and unlike numbers of them."""
    return [(a, b) for a, b in pairs(analysis) if a["seq_len"] == b["seq_len"] and a["batch_size"] != b["batch_size"]]


def pairs(analysis: Analysis, setting: str = "independent") -> list[tuple[Arm, Arm]]:
    """Every two strategies, shorter rows first."""
    return list(itertools.combinations(arms(analysis, setting).values(), 2))
