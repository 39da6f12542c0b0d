"""What the context beyond that which all strategies share is worth: to each strategy, and between them.

A strategy is as good at long text as its loss on the same targets with all the context that it was trained at; with a
window that slides it needs no more.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.analysis.bootstrap import hierarchical_bootstrap
from research.analysis.context import corrected, difference
from research.analysis.decomposition import sampled, signed
from research.analysis.page import Table
from research.analysis.study import Arm

_SEED = 0  # of the resampling: the same documents are drawn everywhere


def analyse(arms: Sequence[Arm], shared: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """{'pairs', 'gains'} of the arms of one setting.

    pairs: loss of `a` at its longest context minus that of `b` at its own, on the same targets; Holm's correction over
    them. None where all reach equally far: that is what differences are. gains: loss at the longest shared context
    minus that at the strategy's own longest.
    """
    reaching = {arm.strategy: arm.reach for arm in arms}
    known = [arm for arm in arms if reaching[arm.strategy] is not None]
    unlike = len({reaching[arm.strategy] for arm in known}) > 1
    pairs = []
    for a, b in itertools.combinations(known, 2):
        ends = reaching[a.strategy], reaching[b.strategy]
        seeds = [seed for seed in a.seeds if seed in b.seeds]
        if seeds and unlike:
            entry = dict(setting=a.setting, a=a.strategy, b=b.strategy, context_a=ends[0], context_b=ends[1])
            pairs.append(entry | _compared(a.losses(ends[0], seeds), b.losses(ends[1], seeds), a))
    corrected(pairs, {arm.strategy for arm in arms if arm.grows})
    gains = [
        dict(setting=arm.setting, strategy=arm.strategy)
        | {"from": shared[-1], "to": reaching[arm.strategy]}
        | _compared(arm.losses(shared[-1], arm.seeds), arm.losses(reaching[arm.strategy], arm.seeds), arm)
        for arm in known
        if shared and reaching[arm.strategy] > shared[-1]
    ]
    return dict(pairs=pairs, gains=gains)


def _compared(losses_a: np.ndarray, losses_b: np.ndarray, arm: Arm) -> dict[str, Any]:
    return difference(hierarchical_bootstrap(losses_a, losses_b, arm.runs[0].arrays["document"], _SEED))


def tables(analysis: dict[str, Any]) -> list[Table]:
    """Strategies against each other, each at its own longest context."""
    pairs = (analysis.get("reach") or {}).get("pairs", ())
    if not pairs:
        return []
    rows = tuple(beside(e["setting"], e) for e in pairs)
    note = (
        "The same targets, each strategy with all the context that it was trained at: what a reader of long documents "
        f"would choose by. Nats per token [{sampled(e['seeds'] for e in pairs)}]; p after Holm's correction within "
        "an order, for rows that grow apart."
    )
    return [Table(("order", "first", "second", "first minus second [95 %]", "p (Holm)", "lower loss"), rows, note)]


def beside(setting: str, pair: dict[str, Any]) -> tuple[str, ...]:
    """The row of a table: a strategy and another, each at a context of its own, and their difference."""
    return (
        setting,
        f"{pair['a']} at {pair['context_a']:,}",
        f"{pair['b']} at {pair['context_b']:,}",
        signed(pair),
        "–" if pair["p_holm"] is None else f"{pair['p_holm']:.2g}",
        (pair["a"] if pair["mean"] < 0 else pair["b"]) if pair["shown"] else "no difference shown",
    )
