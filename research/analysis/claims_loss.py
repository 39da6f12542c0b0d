"""Rules for what is claimed of losses: who wins, who is last, who falls fastest, and what a loss is worth.

Strategies are ranked on the same held-out targets at the longest context that all were trained at, by differences
that Holm's correction leaves; by paired order too, where every strategy sees the same tokens each step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.analysis import evidence
from research.analysis.context import TOLERANCE, interval
from research.analysis.evidence import CONDITIONS, FAILS, HOLDS, UNTESTED, Analysis, Judged, arms, listed
from research.analysis.original import ORIGINAL
from research.analysis.statistics import t_interval

SHANNON = 0.6  # bits a character: the lowest estimate for English (Shannon 1951, Bell Syst. Tech. J. 30:50)
_SETTINGS = ("independent", "paired")


def balanced_wins(analysis: Analysis) -> Judged:
    return _placed(analysis, "balanced", -1, "lowest")


def large_batch_last(analysis: Analysis) -> Judged:
    return _placed(analysis, "large_batch", +1, "highest")


def _placed(analysis: Analysis, strategy: str, sign: int, word: str) -> Judged:
    """Whether a strategy's final loss is shown to be the lowest (-1) or highest (+1), in each order and budget."""
    context = evidence.shared_context(analysis)
    if missing := evidence.blocked(analysis, strategy):
        return UNTESTED, f"{missing} {own_lengths(analysis)}".strip()
    found = {setting: _gaps(analysis, strategy, context, setting) for setting in _SETTINGS}
    answers = {f"{name} order": evidence.extreme(gaps, sign) for name, gaps in found.items() if gaps}
    answers["equal train seconds"] = _by_budget(analysis, strategy, sign, "seconds")
    verdict, main = evidence.judge(list(answers.values())), answers["independent order"]
    if main is None and verdict != CONDITIONS:  # decided elsewhere alone
        verdict = CONDITIONS if verdict == HOLDS else UNTESTED
    text = f"At context {context}, in nats per token: {evidence.against(found['independent'])}."
    for answer, said in ((True, f"It is {word}"), (False, f"It is not {word}"), (None, "Undecided")):
        if places := [name for name, given in answers.items() if given is answer]:
            text += f" {said}: {listed(places)}."
    if answers["equal train seconds"] is not None:
        text += f" At equal train seconds by seeds alone: {_fewest(analysis)}."
    return verdict, f"{text} {own_lengths(analysis)}"


def _fewest(analysis: Analysis) -> str:
    """How often the ranges of the two strategies of the fewest seeds would be apart by chance."""
    return evidence.by_chance(*sorted(len(arm["seeds"]) for arm in arms(analysis).values())[:2])


def _gaps(analysis: Analysis, strategy: str, context: int, setting: str) -> list[dict[str, Any] | None]:
    known = arms(analysis, setting)
    others = [name for name in known if name != strategy]
    return [evidence.gap(analysis, strategy, other, context, setting) for other in others] if strategy in known else []


def _by_budget(analysis: Analysis, strategy: str, sign: int, budget: str) -> bool | None:
    """By every seed's loss at an equal budget; None with fewer than MIN_SEEDS seeds."""
    entry = next((e for e in (analysis.get("budgets") or {}).get("equal", ()) if e["budget"] == budget), None)
    known = arms(analysis)
    if entry is None or strategy not in entry["losses"] or len(entry["losses"]) < 2:
        return None
    if any(len(known[name]["seeds"]) < evidence.MIN_SEEDS for name in entry["losses"] if name in known):
        return None
    losses = entry["losses"]
    sides = [_side(losses[strategy], other) for name, other in losses.items() if name != strategy]
    if any(side == -sign for side in sides):
        return False
    return True if all(side == sign for side in sides) else None


def _side(a: Mapping[str, float], b: Mapping[str, float]) -> int:
    """-1: every seed of a below every seed of b; +1: above; 0: neither."""
    return -1 if a["high"] < b["low"] else 1 if a["low"] > b["high"] else 0


def own_lengths(analysis: Analysis) -> str:
    """The losses as the original measured them, each strategy at its own length."""
    found = arms(analysis).values()
    if not found:
        return ""
    each = (
        f"{a['strategy']} {a['own']['mean']:.3f}"
        + (f" (LEAKING, floor {a['own']['floor']:.4f})" if a["own"]["leaking"] else "")
        for a in sorted(found, key=lambda arm: arm["own"]["mean"])
    )
    return f"At own lengths, as the original measured: {', '.join(each)}."


def falls_fastest(analysis: Analysis) -> Judged:
    """Large batch below every other at a quarter and at half of the tokens, in every seed."""
    if missing := evidence.blocked(analysis, "large_batch"):
        return UNTESTED, missing
    curves = _curves(analysis)
    if "large_batch" not in curves or len(curves) < 2:
        return UNTESTED, "No evaluations along the runs are recorded at a context that all share."
    end = min(x[-1] for curve in curves.values() for x in curve["x"])
    answers, parts = [], []
    for share in (0.25, 0.5):
        losses = {name: _losses_at(curve, share * end) for name, curve in curves.items()}
        means = ", ".join(f"{name} {_mean(by_seed)}" for name, by_seed in losses.items())
        parts.append(f"at {share:.0%} of the tokens {means}")
        ours = losses.pop("large_batch").values()
        sides = [evidence.apart(ours, other.values()) for other in losses.values()]
        answers.append(False if False in sides else None if None in sides else True)
    text = f"Loss at context {analysis['budgets']['context']}, {'; '.join(parts)} nats per token."
    text += "".join(f" {sentence}" for sentence in (_reaches(curves, name) for name in curves) if sentence)
    if evidence.judge(answers) == UNTESTED:
        text += f" Not every seed agrees, or fewer than {evidence.MIN_SEEDS} are measured."
    else:
        text += f" By seeds alone: {_fewest(analysis)}."
    return evidence.judge(answers), text


def _curves(analysis: Analysis) -> dict[str, dict[str, Any]]:
    found = ((analysis.get("budgets") or {}).get("curves") or {}).get("tokens", ())
    return {curve["strategy"]: curve for curve in found}


def _losses_at(curve: Mapping[str, Any], at: float) -> dict[int, float]:
    """Seed -> loss, interpolated between its evaluations; without seeds whose first evaluation is later."""
    runs = zip(curve["seeds"], curve["x"], curve["y"], strict=True)
    return {seed: float(np.interp(at, x, y)) for seed, x, y in runs if x[0] <= at}


def _mean(by_seed: Mapping[int, float]) -> str:
    return f"{np.mean(list(by_seed.values())):.3f}" if by_seed else "not measured"


def _reaches(curves: Mapping[str, Mapping[str, Any]], other: str) -> str:
    """After how many tokens the mean of large batch is at another's final loss."""
    ours, theirs = curves["large_batch"], curves[other]
    target = float(np.mean([y[-1] for y in theirs["y"]]))
    tokens = np.array([at for at in ours["x"][0] if all(x[0] <= at <= x[-1] for x in ours["x"])])
    losses = np.mean([np.interp(tokens, x, y) for x, y in zip(ours["x"], ours["y"], strict=True)], axis=0)
    below = np.nonzero(losses <= target)[0]
    if other == "large_batch" or not below.size or below[0] == 0:
        return ""
    i = below[0]
    at = np.interp(target, losses[[i, i - 1]], tokens[[i, i - 1]])
    return f"It is at the final loss of {other} after {at / theirs['x'][0][-1]:.0%} of the tokens."


def patterns_over_time(analysis: Analysis) -> Judged:
    """The longest rows gain on every other from half of the tokens to the end, and end ahead: by intervals over seeds.

    Gaining alone, still behind, is a condition: that longer training turns it.
    """
    if missing := evidence.blocked_by_length(analysis):
        return UNTESTED, missing
    curves, known = _curves(analysis), list(arms(analysis))
    if len(curves) < 2:
        return UNTESTED, "No evaluations along the runs are recorded at a context that all share."
    long, others = known[-1], [name for name in known[:-1] if name in curves]
    end = min(x[-1] for curve in curves.values() for x in curve["x"])
    answers, ahead, parts = [], [], []
    for other in others:
        half, last = (_gaps_at(curves[long], curves[other], share * end) for share in (0.5, 1.0))
        seeds = [seed for seed in last if seed in half]
        if not seeds:
            return UNTESTED, f"No seed of both {long} and {other} is measured at half of the tokens: one would tell."
        change, final = _over_seeds([last[s] - half[s] for s in seeds]), _over_seeds([last[s] for s in seeds])
        answers.append(_sign(change, TOLERANCE))
        ahead.append(_sign(final, 0.0))
        parts.append(
            f"{long} minus {other} {evidence.said(final)} at the end, changed by {evidence.said(change)} since half"
        )
    below = [e for e in analysis["budgets"]["crossings"] if e["axis"] == "tokens" and long in (e["a"], e["b"])]
    context = analysis["budgets"]["context"]
    text = f"At context {context}, in nats per token [95 %, seeds]: {'; '.join(parts)} of the {end:,.0f} tokens."
    text += f" Its curve crosses another {len(below)} times." if below else " Its curve crosses no other."
    verdict = evidence.judge(answers)
    if verdict == HOLDS and not all(answers + ahead):
        doubt = "end ahead of all" if all(answers) else "gain on all"
        return CONDITIONS, f"{text} It gains, but is not shown to {doubt}: longer training would tell."
    if verdict == UNTESTED:
        text += " It is shown neither to gain nor to lose: longer training or more seeds would tell."
    if verdict != HOLDS and (little := evidence.little_context(analysis)):
        return UNTESTED, f"{text} {little}"
    return verdict, text


def _gaps_at(a: Mapping[str, Any], b: Mapping[str, Any], at: float) -> dict[int, float]:
    """Seed -> loss of a minus that of b, of the seeds that both have."""
    ours, theirs = _losses_at(a, at), _losses_at(b, at)
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def _over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    return interval(t_interval(values))


def _sign(entry: Mapping[str, float | None], least: float) -> bool | None:
    """Whether an interval, and its mean by as much as `least`, lies below zero; False: above; None: neither."""
    if entry["low"] is None or abs(entry["mean"]) < least:
        return None
    return True if entry["high"] < 0 else False if entry["low"] > 0 else None


def memorised(analysis: Analysis) -> Judged:
    """Losses and accuracies at own length no worse than the original's worst; where windows leak, on that condition."""
    found = list(arms(analysis).values())
    if not found:
        return UNTESTED, "No run is finished."
    worst, least = max(row.loss for row in ORIGINAL), min(row.accuracy for row in ORIGINAL)
    reached = [arm["strategy"] for arm in found if arm["own"]["mean"] <= worst and arm["own"]["accuracy"] >= least]
    accuracies, losses = ([arm["own"][name] for arm in found] for name in ("accuracy", "mean"))
    spread = f"{min(losses):.3f} to {max(losses):.3f} nats and {min(accuracies):.1%} to {max(accuracies):.1%}"
    floors = ", ".join(f"{row.strategy} {row.loss:.4f} (floor {row.floor:.4f})" for row in ORIGINAL)
    text = (
        f"The original's losses, LEAKING: {floors}. At most {worst / np.log(2):.2f} bits per token, they are less than "
        f"the lowest estimate for English, {SHANNON} bits a character (a token is one or more): they measure "
        "memorisation."
    )
    where = "Here, where windows leak too," if evidence.leak(analysis) else "On documents that were never trained on,"
    text += f" {where} this study's models are at {spread} accuracy."
    text += f" At most {worst} nats at {least:.0%} or more: {listed(reached) or 'none'}."
    if not reached:
        return FAILS, text
    return (CONDITIONS if evidence.leak(analysis) or len(reached) < len(found) else HOLDS), text


def more_in_a_row(analysis: Analysis) -> Judged:
    """What the same number of tokens is worth from many places of the corpus instead of few."""
    if missing := evidence.blocked_by_length(analysis):
        return UNTESTED, missing
    known, context = list(arms(analysis)), evidence.shared_context(analysis)
    entry = _decomposed(analysis.get("decomposition") or (), known[0], known[-1], context)
    if entry is None:
        return UNTESTED, "It takes runs in paired order, where only the cut of the same tokens differs."
    short, long = known[0], known[-1]
    text = (
        f"A row of {long} holds more tokens; a step does not. At context {context} and equal tokens, many places of "
        f"the corpus instead of few change the loss of {short} against {long} by {evidence.said(entry)} nats per token."
    )
    if entry["low"] is None or entry["low"] <= 0 <= entry["high"]:
        return CONDITIONS, f"{text} That is not shown to be anything: more a row, the same a token."
    return (CONDITIONS if entry["mean"] < 0 else HOLDS), text + (
        " More a row, less a token." if entry["mean"] < 0 else ""
    )


def _decomposed(found: Sequence[Mapping[str, Any]], a: str, b: str, context: int | None) -> dict[str, Any] | None:
    for entry in found:
        if entry["at"] == context and {entry["a"], entry["b"]} == {a, b}:
            part = {**entry["diversity"], "a": entry["a"], "b": entry["b"]}
            return part if entry["a"] == a else evidence.turned(part)
    return None
