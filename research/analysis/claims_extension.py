"""The rule for what is claimed of practice: long rows, extended from shorter ones late in training."""

from typing import Any

from research.analysis import evidence
from research.analysis.evidence import CONDITIONS, FAILS, UNTESTED, Analysis, Judged, arms, listed


def in_practice(analysis: Analysis) -> Judged:
    """A habit of others. What a study can say of it: whether rows that grow end below long ones from the start, and
    below the short ones that they began as, on the same targets and each with all its context."""
    if (growing := evidence.growing(analysis)) and not evidence.leak(analysis):
        return _extended(analysis, growing)
    lengths = [f"{arm['seq_len']:,}" for arm in arms(analysis).values()]
    text = f"Rows of {listed(lengths)} tokens were trained from scratch, none extended later." if lengths else ""
    effective = {name: e["effective"] for name, e in evidence.curves(analysis).items() if e["effective"]}
    if effective and not evidence.leak(analysis):
        each = ", ".join(f"{name} {'at least ' * bool(e['censored'])}{e['mean']:,.0f}" for name, e in effective.items())
        text += f" Effective contexts on text: {each} tokens."
    return (
        UNTESTED,
        text + " Training checkpoints on at other lengths, against those lengths from the start, would tell.",
    )


def _extended(analysis: Analysis, growing: list[str]) -> Judged:
    known, longer, shorter = arms(analysis), [], []
    for name in (name for name in growing if name in known):
        first, last = known[name]["stages"][0]["seq_len"], known[name]["seq_len"]
        for other, arm in known.items():
            if other not in growing and arm["seq_len"] in (first, last):
                (longer if arm["seq_len"] == last else shorter).append(_with_all_context(analysis, name, other))
    gaps = [gap for gap in longer + shorter if gap]
    text = f"Rows extended later, each strategy with all its context, in nats per token: {evidence.against(gaps)}."
    if not (any(longer) and any(shorter)):
        return UNTESTED, f"{text} Rows as long from the start, and rows never extended, beside them would tell."
    text += " Lengths of others' practice were not compared."
    if any(gap["shown"] and gap["mean"] > 0 for gap in gaps):
        return FAILS, text
    if evidence.extreme(gaps, -1):
        return CONDITIONS, text
    return UNTESTED, f"{text} Undecided: more seeds or tokens would tell."


def _with_all_context(analysis: Analysis, a: str, b: str) -> dict[str, Any] | None:
    """Loss of `a` minus that of `b`, each at its longest context; None where they were not compared."""
    pairs = (analysis.get("reach") or {}).get("pairs", ())
    found = next((p for p in pairs if p["setting"] == "independent" and {p["a"], p["b"]} == {a, b}), None)
    return found and (found if found["a"] == a else evidence.turned_ends(found))
