"""What the runs of a study show against each other on the same held-out targets: JSON values, for the report."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.analysis import budgets, context, decomposition, original, recall
from research.analysis.bootstrap import MIN_DOCUMENTS, bootstrap_statistic, hierarchical_bootstrap
from research.analysis.context import corrected, difference, interval, rounded
from research.analysis.statistics import seeds_needed
from research.analysis.study import Arm, Run, arms

RESOLUTIONS = (0.1, 0.03, 0.01)  # nats per token, of the power lines
_SEED = 0  # of the resampling: the same documents are drawn for every pair


def analyse(runs: Sequence[Run]) -> dict[str, Any]:
    """All that a report says beyond the runs' own results.

    Contexts are compared where both strategies were trained at them. `shared` are those at which all were.
    """
    text = {setting: arms(runs, setting) for setting in ("independent", "paired")}
    everyone = [arm for setting in text.values() for arm in setting]
    shared = [c for c in contexts_of(everyone) if all(arm.within(c) for arm in everyone)]
    found = [entry for setting in text.values() for entry in differences(setting, shared)]
    corrected(found, {arm.strategy for arm in everyone if arm.grows})
    return dict(
        arms=[describe(arm) for arm in everyone],
        contexts=contexts_of(everyone),
        shared_contexts=shared,
        differences=found,
        power=[entry for setting in text.values() for entry in power(setting, shared)],
        rankings=[entry for setting in text.values() for entry in rankings(of_one_length(setting), shared, found)],
        context=context.analyse(everyone),
        budgets=budgets.analyse(text["independent"], shared),
        decomposition=decomposition.analyse(text["independent"], text["paired"], shared),
        recall=recall.analyse(arms(runs, "recall")),
        warnings=warnings(runs, everyone),
    )


def of_one_length(found: Sequence[Arm]) -> list[Arm]:
    """The arms that can be told apart by the length of their rows."""
    return [arm for arm in found if not arm.grows]


def contexts_of(found: Sequence[Arm]) -> list[int]:
    """Contexts (tokens) that every run was scored at, rising."""
    scored = [set(arm.contexts) for arm in found]
    return sorted(set.intersection(*scored)) if scored else []


def describe(arm: Arm) -> dict[str, Any]:
    """An arm's losses by context with intervals, its own-length loss as the original measured, and its costs."""
    first, documents = arm.first, arm.runs[0].arrays["document"]
    results = [run.result for run in arm.runs]
    losses = {c: np.stack([run.losses[c] for run in arm.runs]) for c in arm.contexts}
    by_context = {
        str(c): interval(bootstrap_statistic({"x": loss}, documents, lambda means: means["x"], _SEED))
        | dict(sd=_sd(loss.mean(axis=1, dtype=np.float64)), beyond=not arm.within(c))
        for c, loss in losses.items()
    }
    own = [result["eval"]["own"]["loss"] for result in results]
    leaking = first["protocol"] == "published"
    return dict(
        strategy=arm.strategy,
        setting=arm.setting,
        seeds=arm.seeds,
        **{name: first[name] for name in ("protocol", "batch_size", "seq_len", "tokens_per_step", "steps", "tokens")},
        stages=first["stages"] if arm.grows else None,
        contexts=by_context,
        **{
            name: {c: _mean([r["eval"]["contexts"][c].get(name) for r in results]) for c in by_context}
            for name in ("bits_per_byte", "accuracy")
        },
        own=dict(
            mean=_mean(own),
            sd=_sd(own),
            accuracy=_mean([result["eval"]["own"]["accuracy"] for result in results]),
            leaking=leaking,
            floor=rounded(floor(first)) if leaking else None,
        ),
        targets=int(documents.size),
        documents=len(set(documents.tolist())),
        unigram_entropy=rounded(first["unigram_entropy"]),
        step_seconds=budgets.step_seconds(arm),
        step_spread=[rounded(q) for q in _least_disturbed(results)],
        tokens_per_second=rounded(first["tokens_per_step"] / budgets.step_seconds(arm)),
        memory_bytes=first["memory_bytes"],
        flops=first["flops"],
    )


def _least_disturbed(results: Sequence[dict]) -> tuple[float, float]:
    """p10 and p90 of the step seconds of the run whose median is the lowest."""
    quiet = min((r["step_seconds"] for r in results), key=lambda step: step["median"])
    return quiet["p10"], quiet["p90"]


def floor(result: dict[str, Any]) -> float:
    """The floor under an own-length loss that leaks; a window starts at every token."""
    windows = result["train_tokens"] - result["seq_len"]
    first = result.get("first_token_entropy") or result["unigram_entropy"]
    return original.leak_floor(windows, first, result["seq_len"])


def differences(found: Sequence[Arm], shared: Sequence[int]) -> list[dict[str, Any]]:
    """Loss of `a` minus that of `b`, over the seeds that both have.

    At the longest context that all share, and at the longest of the pair's own: few, so that Holm's correction costs
    little. The curves hold the others.
    """
    entries = []
    for a, b in itertools.combinations(found, 2):
        pair = [c for c in contexts_of(found) if a.within(c) and b.within(c)]
        seeds = [seed for seed in a.seeds if seed in b.seeds]
        entries += [_difference(a, b, c, seeds) for c in sorted({*shared[-1:], *pair[-1:]}) if seeds]
    return entries


def _difference(a: Arm, b: Arm, context_: int, seeds: Sequence[int]) -> dict[str, Any]:
    losses = [arm.losses(context_, seeds) for arm in (a, b)]
    documents = a.runs[0].arrays["document"]
    return (
        dict(setting=a.setting, context=context_, a=a.strategy, b=b.strategy)
        | difference(hierarchical_bootstrap(*losses, documents, _SEED))
        | dict(sd=_sd((losses[0] - losses[1]).mean(axis=1, dtype=np.float64)))
    )


def power(found: Sequence[Arm], shared: Sequence[int]) -> list[dict[str, Any]]:
    """How many seeds would show a difference, from the spread of the seeds' paired differences at the longest shared
    context; nothing where there is one seed."""
    if not shared:
        return []
    return [
        dict(setting=entry["setting"], context=entry["context"], a=entry["a"], b=entry["b"], sd=entry["sd"])
        | dict(seeds={str(delta): seeds_needed(entry["sd"], delta) for delta in RESOLUTIONS})
        for entry in differences(found, shared)
        if entry["context"] == shared[-1] and entry["sd"] is not None
    ]


def rankings(found: Sequence[Arm], shared: Sequence[int], compared: Sequence[dict]) -> list[dict[str, Any]]:
    """Strategies by mean loss, at their own lengths and at each shared context, lowest first.

    `shown`: each neighbouring pair differs by Holm. `original`: the order is the original experiment's (null where one
    of its strategies is missing).
    """
    if len(found) < 2:
        return []
    measures = {"own": {a.strategy: _mean([r.result["eval"]["own"]["loss"] for r in a.runs]) for a in found}}
    for c in shared:
        measures[str(c)] = {arm.strategy: float(arm.losses(c, arm.seeds).mean()) for arm in found}
    ranked = []
    for measure, losses in measures.items():
        order = sorted(losses, key=losses.__getitem__)
        theirs = tuple(strategy for strategy in order if strategy in original.RANKING)
        complete = len(theirs) == len(original.RANKING)
        pairs = [difference_of(compared, found[0].setting, measure, *pair) for pair in itertools.pairwise(order)]
        ranked.append(
            dict(
                setting=found[0].setting,
                measure=measure,
                order=order,
                shown=all(pair is not None and pair["shown"] for pair in pairs),
                original=theirs == original.RANKING if complete else None,
            )
        )
    return ranked


def difference_of(compared: Sequence[dict], setting: str, context_: Any, a: str, b: str) -> dict[str, Any] | None:
    """The entry of a pair, whichever is named first in it; None where they were not compared."""
    for entry in compared:
        place = entry["setting"] == setting and str(entry["context"]) == str(context_)
        if place and {entry["a"], entry["b"]} == {a, b}:
            return entry
    return None


def warnings(runs: Sequence[Run], found: Sequence[Arm]) -> list[str]:
    """What a reader must know before any number: missing runs, single seeds, leaks, overlap."""
    said = [f"{run.key.name} {run.status}: it is in no mean." for run in runs if not run.finished]
    if any(arm.first["protocol"] == "published" for arm in found):
        said.append("LEAKING: under the published protocol held-out windows overlap training windows.")
    single = sorted({arm.strategy for arm in found if len(arm.runs) == 1})
    documents = min((len(np.unique(arm.runs[0].arrays["document"])) for arm in found), default=0)
    if 0 < documents < MIN_DOCUMENTS:
        few = f"{documents} document" + "s" * (documents > 1)
        said.append(f"The held-out targets are of {few}, too few for an interval: nothing is shown.")
    elif single:
        said.append(f"One seed of {', '.join(single)}: intervals hold the choice of documents alone.")
    for overlap in {str(arm.first.get("overlap")): arm.first.get("overlap") for arm in found}.values():
        share = (overlap or {}).get("50")
        if share and share["ngrams"] > 0.01:
            said.append(f"{share['ngrams']:.1%} of the held-out 50-grams occur in the train split.")
    return said


def _mean(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else rounded(np.mean(values))


def _sd(values: Sequence[float]) -> float | None:
    return rounded(np.std(values, ddof=1)) if len(values) > 1 else None
