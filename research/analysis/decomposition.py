"""Why strategies differ: for the length of their rows, or for the places of the corpus that a step comes from.

Under paired order each step of every strategy sees the same tokens, cut differently: what differs is the effect of
the rows' length alone. Under independent order rows come from places of their own, so short rows also make a
step of more of them: the rest of the difference is the effect of diversity.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from research.analysis.bootstrap import RESAMPLES, bootstrap_statistic
from research.analysis.context import interval
from research.analysis.page import Section, Table
from research.analysis.study import Arm

PARTS = ("total", "length", "diversity")
_NEEDS = {"total": ("independent",), "length": ("paired",), "diversity": ("independent", "paired")}
_SEED = 0


def analyse(independent: Sequence[Arm], paired: Sequence[Arm], shared: Sequence[int]) -> list[dict[str, Any]]:
    """For each pair of strategies and shared context (`at`, tokens): total = length + diversity, with intervals.

    Over the seeds that both strategies have in both orders. Empty where a study has no paired runs; without pairs whose
    steps or runs are not of as many tokens: steps of theirs never see the same ones.
    """
    of = {(arm.strategy, arm.setting): arm for arm in (*independent, *paired)}
    names = [arm.strategy for arm in independent if (arm.strategy, "paired") in of]
    entries = []
    for context, (a, b) in itertools.product(shared, itertools.combinations(names, 2)):
        four = {(s, setting): of[s, setting] for s in (a, b) for setting in ("independent", "paired")}
        seeds = sorted(set.intersection(*(set(arm.seeds) for arm in four.values())))
        equal = len({(arm.first["tokens_per_step"], arm.first["tokens"]) for arm in four.values()}) == 1
        if not seeds or not equal:
            continue
        losses = {key: arm.losses(context, seeds) for key, arm in four.items()}
        documents = of[a, "independent"].runs[0].arrays["document"]
        entry = dict(at=context, a=a, b=b, seeds=seeds)
        for part in PARTS:  # of the orders that it is made of alone: so it has the interval of the same difference
            of_part = {" ".join(key): loss for key, loss in losses.items() if key[1] in _NEEDS[part]}
            found = bootstrap_statistic(of_part, documents, _statistic(part, a, b), _SEED, RESAMPLES)
            entry[part] = interval(found)
        entries.append(entry)
    return entries


def _statistic(part: str, a: str, b: str):
    def total(means):
        return means[f"{a} independent"] - means[f"{b} independent"]

    def length(means):
        return means[f"{a} paired"] - means[f"{b} paired"]

    return dict(total=total, length=length, diversity=lambda means: total(means) - length(means))[part]


def section(analysis: dict[str, Any]) -> Section | None:
    entries = analysis["decomposition"]
    if not entries:
        return None
    rows = tuple((f"{e['at']:,}", f"{e['a']} - {e['b']}", *(signed(e[part]) for part in PARTS)) for e in entries)
    columns = ("context", "difference", "total", "of which: row length", "of which: diversity")
    note = (
        f"Nats per token [{sampled(len(e['seeds']) for e in entries)}]. Total: under independent order. Row length: "
        "under paired order, where each step of both sees the same tokens. Diversity: the rest."
    )
    text = (
        "Short rows differ from long ones in two ways at once: they are shorter, so that a token has less before it, "
        "and a step of them comes from more places of the corpus. Training again in an order that gives every "
        "strategy the very same tokens at each step takes the second away."
    )
    return Section("Row length or diversity?", text, (Table(columns, rows, note),))


def sampled(seeds: Iterable[int]) -> str:
    """What intervals hold, where estimates are over so many seeds each: for a table's note."""
    single = {count < 2 for count in seeds}
    if single == {True}:
        return "95 %, documents; of one seed, so no interval holds the choice of it"
    return "95 %, seeds and documents" + ("; documents alone where there is one seed" if True in single else "")


def signed(entry: dict[str, Any]) -> str:
    """A difference with its interval, as tables show it."""
    if entry["low"] is None:
        return f"{entry['mean']:+.3f} [no interval]"
    return f"{entry['mean']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"
