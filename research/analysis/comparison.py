"""What a study's runs show against each other: on the same targets, at equal tokens and time."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.analysis import original
from research.analysis.statistics import Difference, paired_bootstrap
from research.analysis.study import Run, same_targets

_SEED = 0  # of the resampling: the same documents are drawn for every pair


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """All that a report says beyond the runs' own results, as JSON values.

    `contexts` are those that are compared at all; `shared_contexts` those at which every finished
    run was scored within the length it was trained at. Where two runs were not scored on the same
    targets (`not_compared`), nothing is ranked.
    """
    finished = [run for run in runs if run.finished]
    contexts = scored_contexts(finished)
    shared = [c for c in contexts if all(str(c) in run.result["eval"]["contexts"] for run in finished)]
    found = differences(finished, contexts)
    pairs = itertools.combinations(finished, 2)
    apart = [[a.strategy, b.strategy] for a, b in pairs if not same_targets(a, b)]
    ranked = [] if apart else finished
    return {
        "contexts": contexts,
        "shared_contexts": [c for c in shared if all(within_length(c, run) for run in finished)],
        "differences": found,
        "not_compared": apart,
        "longer_context": longer_context(finished, shared),
        "equal_tokens": at_equal(ranked, contexts, "tokens"),
        "equal_seconds": at_equal(ranked, contexts, "train_seconds"),
        "rankings": rankings(ranked, shared, found) if ranked else [],
    }


def scored_contexts(finished: Sequence[Run]) -> list[int]:
    """Contexts (tokens) at which two finished runs (or the only one) were scored, rising."""
    scored = [int(c) for run in finished for c in run.result["eval"]["contexts"]]
    return sorted({c for c in scored if scored.count(c) >= min(2, len(finished))})


def within_length(context: int, run: Run) -> bool:
    """Whether windows of a context, which reach to 1.25 times it, fit in a run's trained length."""
    return 5 * context // 4 - 1 <= run.result["seq_len"]


def loss_at(run: Run, context: int) -> float | None:
    """Held-out loss (nats/token) at a context; None where the run was not scored at it."""
    return run.result["eval"]["contexts"].get(str(context), {}).get("loss")


def differences(finished: Sequence[Run], contexts: Sequence[int]) -> list[dict[str, Any]]:
    """Loss of `a` minus that of `b` on the same targets, by context, for each pair scored at it."""
    return [
        {"context": context, "a": a.strategy, "b": b.strategy}
        | _record(paired_bootstrap(a.losses[context], b.losses[context], a.documents, _SEED))
        for context in contexts
        for a, b in itertools.combinations(finished, 2)
        if same_targets(a, b) and context in a.losses and context in b.losses
    ]


def longer_context(finished: Sequence[Run], shared: Sequence[int]) -> list[dict[str, Any]]:
    """A run's loss at the longest context within its length less that at the shortest shared."""
    found = []
    for run in finished:
        longest = max((c for c in run.losses if within_length(c, run)), default=0)
        if shared and longest > shared[0] and shared[0] in run.losses:
            gain = paired_bootstrap(run.losses[longest], run.losses[shared[0]], run.documents, _SEED)
            found.append({"strategy": run.strategy, "from": shared[0], "to": longest} | _record(gain))
    return found


def at_equal(finished: Sequence[Run], contexts: Sequence[int], axis: str) -> dict[str, Any]:
    """Losses where the run that ends first on `axis` ('tokens' or 'train_seconds') ends.

    Linear interpolation between evaluations. `interpolated` is False where all end at the same
    place: these are the final losses. A run without an evaluation at that context, on both sides of
    that place, has no loss there (null).
    """
    ends = [run.result["tokens"] if axis == "tokens" else _last(run, axis) for run in finished]
    ends = [end for end in ends if end is not None]
    if len(ends) < len(finished) or not ends:
        return {"at": None, "interpolated": False, "losses": {}}
    at, interpolated = min(ends), min(ends) != max(ends)
    losses = {
        str(context): {
            run.strategy: _rounded(_interpolate(run, axis, at, context) if interpolated else loss_at(run, context))
            for run in finished
        }
        for context in contexts
    }
    return {"at": at, "interpolated": interpolated, "losses": losses}


def rankings(finished: Sequence[Run], shared: Sequence[int], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Strategies by final loss, at their own lengths and at each shared context, lowest first.

    `shown`: the interval of every neighbouring pair leaves out zero. `original`: the order is the
    original experiment's (null where one of its strategies did not finish).
    """
    measures = {"own": {run.strategy: run.result["eval"]["own"]["loss"] for run in finished}}
    measures |= {str(c): {run.strategy: loss_at(run, c) for run in finished} for c in shared}
    ranked = []
    for measure, losses in measures.items():
        order = sorted(losses, key=losses.__getitem__)
        theirs = [strategy for strategy in order if strategy in original.RANKING]
        complete = len(theirs) == len(original.RANKING)
        ranked.append(
            {
                "measure": measure,
                "order": order,
                "shown": len(order) > 1
                and all(difference_shown(found, measure, *p) for p in itertools.pairwise(order)),
                "original": tuple(theirs) == original.RANKING if complete else None,
            }
        )
    return ranked


def difference_shown(found: Sequence[dict[str, Any]], measure: str, a: str, b: str) -> bool:
    """Whether the interval between two strategies at a context is there and leaves out zero."""
    return any(
        entry["shown"] for entry in found if str(entry["context"]) == measure and {entry["a"], entry["b"]} == {a, b}
    )


def floor(run: Run) -> float:
    """The floor under an own-length loss that leaks; a window starts at every token."""
    result = run.result
    windows = result["train_tokens"] - result["seq_len"]
    return original.leak_floor(windows, result["unigram_entropy"], result["seq_len"])


def _record(difference: Difference) -> dict[str, Any]:
    return {
        "mean": _rounded(difference.mean),
        "low": _rounded(difference.low),
        "high": _rounded(difference.high),
        "documents": difference.documents,
        "targets": difference.targets,
        "shown": difference.shown,
    }


def _rounded(value: float | None) -> float | None:
    """Six decimals: the same on every machine. JSON has no NaN."""
    return round(value, 6) if value is not None and math.isfinite(value) else None


def _evaluations(run: Run, axis: str, name: str) -> tuple[list[float], list[float]]:
    rows = sorted((row[axis], row[name]) for row in run.curve if name in row)
    return [x for x, _ in rows], [y for _, y in rows]


def _last(run: Run, axis: str) -> float | None:
    return max((r[axis] for r in run.curve if any("eval/" in name for name in r)), default=None)


def _interpolate(run: Run, axis: str, at: float, context: int) -> float:
    x, y = _evaluations(run, axis, f"eval/loss@{context}")
    return float(np.interp(at, x, y, left=np.nan, right=np.nan)) if x else math.nan
