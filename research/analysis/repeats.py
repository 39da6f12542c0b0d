"""What far context is for: gains on targets by how far back the same pair of tokens was last seen in the document.

A pair, the target and the token before it, that was seen in the context can be copied from it: a hit of associative
recall (Arora et al. 2023, arXiv:2312.04927, who leave out pairs that are common in training; here they are kept). Where
it was last seen further back than the context that all strategies share, only those trained on longer rows see it.
Groups are chosen by the target itself: they say where a gain falls, not that it comes of copying.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.analysis.bootstrap import hierarchical_bootstrap
from research.analysis.context import corrected, difference, rounded
from research.analysis.decomposition import sampled, signed
from research.analysis.page import Table
from research.analysis.reach import beside
from research.analysis.study import Arm

GROUPS = ("near", "far", "elsewhere")
_SEED = 0  # of the resampling: the same documents are drawn everywhere


def analyse(arms: Sequence[Arm], shared: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per arm trained at more context than all share: loss at the longest shared context (`from`) less loss
    at the arm's own longest (`to`), in nats per token, on each group of targets.

    near: the pair was last seen within the shared context. far: only within the arm's own. elsewhere: in neither.
    against: on the far ones, loss of the arm less that of each arm of the setting that reaches less far, each with all
    its context. Nothing where the runs do not say how far back pairs were seen.
    """
    known = (run.arrays["repeat"] for arm in arms for run in arm.runs if "repeat" in run.arrays)
    repeat = next(known, None)
    if repeat is None or not shared:
        return []
    short, entries = shared[-1], []
    for arm in arms:
        if (arm.reach or 0) > short:
            chosen = groups_of(repeat, short, arm.reach)
            gains = {name: _gain(arm, short, targets) for name, targets in chosen.items()}
            others = [b for b in arms if b.setting == arm.setting and 0 < (b.reach or 0) < arm.reach]
            against = [_against(arm, other, chosen["far"]) for other in others if chosen["far"].any()]
            about = dict(strategy=arm.strategy, setting=arm.setting, seeds=len(arm.seeds))
            about |= {"from": short, "to": arm.reach, "groups": gains}
            entries.append(about | dict(against=[entry for entry in against if entry]))
    growing = {arm.strategy for arm in arms if arm.grows}
    for setting in {entry["setting"] for entry in entries}:
        corrected([pair for e in entries if e["setting"] == setting for pair in e["against"]], growing)
    return entries


def groups_of(repeat: np.ndarray, short: int, long: int) -> dict[str, np.ndarray]:
    """Which targets are of each group, by how far back (`repeat`, 0: nowhere) their pairs were seen.

    A context of c holds c + 1 to 1.25 c tokens: a pair c tokens back is in it for sure, one 1.25 c back never.
    """
    near = (repeat > 0) & (repeat <= short)
    far = (4 * repeat >= 5 * short) & (repeat <= long)
    elsewhere = (repeat == 0) | (4 * repeat >= 5 * long)
    return dict(zip(GROUPS, (near, far, elsewhere), strict=True))


def _gain(arm: Arm, short: int, chosen: np.ndarray) -> dict[str, Any]:
    found = dict(share=rounded(chosen.mean()))
    if chosen.any():
        losses = [arm.losses(context, arm.seeds)[:, chosen] for context in (short, arm.reach)]
        found["loss"] = rounded(losses[0].mean())
        found |= difference(hierarchical_bootstrap(*losses, arm.runs[0].arrays["document"][chosen], _SEED))
    return found


def _against(a: Arm, b: Arm, chosen: np.ndarray) -> dict[str, Any] | None:
    """None where no seed is in both."""
    seeds = [seed for seed in a.seeds if seed in b.seeds]
    if not seeds:
        return None
    losses = [arm.losses(arm.reach, seeds)[:, chosen] for arm in (a, b)]
    about = dict(a=a.strategy, b=b.strategy, context_a=a.reach, context_b=b.reach)
    return about | difference(hierarchical_bootstrap(*losses, a.runs[0].arrays["document"][chosen], _SEED))


def tables(analysis: Mapping[str, Any]) -> list[Table]:
    """Gains by group, of every arm that has more context than all share."""
    entries = analysis.get("repeats") or ()
    if not entries:
        return []
    rows = tuple(
        (e["strategy"], e["setting"], f"{e['from']:,} to {e['to']:,}", *(_cell(e["groups"][name]) for name in GROUPS))
        for e in entries
    )
    note = (
        "What more context takes off the loss of targets whose pair of tokens (the target and the one before it) was "
        "last seen in the document so far back: within the shorter context; beyond 1.25 times it, and within the "
        f"longer; in neither. Nats per token [{sampled(e['seeds'] for e in entries)}], and the share of all targets "
        "(those between are left out). Groups are chosen by the target itself: they say where a gain falls, not that "
        "it comes of copying; whether context pays, only all targets together say."
    )
    return [
        Table(("strategy", "order", "context", "pair near", "pair far", "pair in neither"), rows, note),
        *_far_table(entries),
    ]


def _far_table(entries: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Strategies against each other where the pair is beyond the reach of one of them."""
    rows = tuple(beside(e["setting"], pair) for e in entries for pair in e["against"])
    note = (
        "On the targets whose pair is far for the first, out of the second's reach or partly so; each with all its "
        f"context. Nats per token [{sampled(e['seeds'] for e in entries)}]; p after Holm's correction within an order, "
        "for rows that grow apart."
    )
    columns = ("order", "first", "second", "first minus second, pair far", "p (Holm)", "lower loss")
    return [Table(columns, rows, note)] if rows else []


def _cell(group: Mapping[str, Any]) -> str:
    return f"{signed(group)}, {group['share']:.1%}" if "mean" in group else "no target"


def findings(analysis: Mapping[str, Any]) -> list[str]:
    """Where the gains from far context fall, of strategies that are shown to gain where the pair is far."""
    said = []
    for entry in analysis.get("repeats") or ():
        far = entry["groups"]["far"]
        if entry["setting"] == "independent" and far.get("shown") and far["mean"] > 0:
            others = (("near", "where it is near"), ("elsewhere", "where it is in neither"))
            known = [(entry["groups"][name], where) for name, where in others]
            rest = "".join(f", {signed(group)} {where}" for group, where in known if "mean" in group)
            gain = f"{entry['strategy']} gains {far['mean']:.3f} [{far['low']:.3f}, {far['high']:.3f}]"
            where = f"on the {far['share']:.1%} of targets whose pair was last seen only there"
            said.append(f"{gain} from {entry['from']} to {entry['to']:,} {where}{rest}")
    return [f"By where a target's pair of tokens was last seen: {'; '.join(said)}."] if said else []
