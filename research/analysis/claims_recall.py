"""Rules over the recall task: accuracy at distances (tokens since the key was last said) beyond the shortest rows."""

from collections.abc import Mapping
from typing import Any

from research.analysis import evidence
from research.analysis.evidence import CONDITIONS, FAILS, HOLDS, UNTESTED, Analysis, Judged, arms
from research.analysis.recall import SAME, above, least, no_more, share

NOT_RUN = "The recall task was not run: it would show accuracy against distance."
Entry = Mapping[str, Any]


def entries(analysis: Analysis) -> list[Entry]:
    """Strategies of the recall task, shortest rows first."""
    return sorted(analysis.get("recall") or [], key=lambda entry: entry["seq_len"])


def learnt(entry: Entry, length: int) -> bool:
    """Whether a strategy has learnt the task: above chance at more than half of the distances below `length` tokens.

    Less is no more than knowing what was said last, and says nothing of longer distances.
    """
    near = [b["low"] > entry["chance"] for b in entry["raw"] if b["from"] < length]
    return sum(near) > len(near) / 2


def not_learnt(entry: Entry) -> str:
    return (
        f"{entry['strategy']} recalls at few of the short distances: it has not learnt the recall task, and "
        "more training would tell."
    )


def further(analysis: Analysis) -> tuple[bool | None, str]:
    """Whether the longest rows recall at distances beyond the shortest rows, where those do less.

    True where at one of these distances the longer is shown to be above the shorter (recall.above) and chance; False
    where at each it is shown to be no more than one of them (recall.no_more).
    """
    found = entries(analysis)
    if len(found) < 2:
        return None, NOT_RUN
    short, long = found[0], found[-1]
    if short["seq_len"] == long["seq_len"]:
        return None, "The recall task was run with rows of one length alone."
    theirs = {b["from"]: b for b in short["raw"]}
    far = [(theirs[b["from"]], b) for b in long["raw"] if b["from"] in theirs and b["from"] >= short["seq_len"]]
    if not far:
        return None, f"The recall task has no distance beyond the {short['seq_len']:,} tokens of {short['strategy']}."
    if not learnt(long, short["seq_len"]):
        return None, not_learnt(long)
    better = [above(b, a) and b["low"] > long["chance"] for a, b in far]
    no_better = [no_more(b, max(least(a), long["chance"])) for a, b in far]
    each = (f"{distances(b)}: {long['strategy']} {share(b)}, {short['strategy']} {share(a)}" for a, b in far)
    text = f"Recall beyond {short['seq_len']:,} tokens (chance {long['chance']:.1%}): {'; '.join(each)}."
    return (True if any(better) else False if all(no_better) else None), text


def distances(b: Entry) -> str:
    return f"{b['from']:,} to {b['to']:,}"


def short_cannot(analysis: Analysis) -> Judged:
    """The shortest rows are shown to be at chance at every distance beyond them, though they recall within."""
    if missing := evidence.blocked_by_length(analysis):
        return UNTESTED, missing
    text = _beyond_on_text(analysis)
    found = entries(analysis)
    if not found:
        return UNTESTED, f"{NOT_RUN} {text}"
    short = found[0]
    near = [b for b in short["raw"] if b["from"] < short["seq_len"]]
    far = [b for b in short["raw"] if b["from"] >= short["seq_len"]]
    if not far:
        return UNTESTED, f"The recall task has no distance beyond the rows of {short['strategy']}. {text}"
    if not learnt(short, short["seq_len"]):
        return UNTESTED, f"{not_learnt(short)} {text}"
    above = [b["low"] > short["chance"] for b in far]
    best = max(near, key=lambda b: b["mean"])
    beyond = "; ".join(f"{distances(b)}: {share(b)}" for b in far)
    said = (
        f"{short['strategy']} recalls {share(best)} at distances of {distances(best)} tokens, and beyond the "
        f"{short['seq_len']:,} of its rows {beyond} (chance {short['chance']:.1%}). {text}"
    )
    if any(above):
        return (FAILS if all(above) else CONDITIONS), said
    if all(no_more(b, short["chance"]) for b in far):
        return HOLDS, said
    return UNTESTED, f"{said} More answers or seeds would tell whether that is within {SAME:.0%} of chance."


def _beyond_on_text(analysis: Analysis) -> str:
    """What the raw model of the shortest rows loses at contexts that it was not trained at."""
    name, arm = next(iter(arms(analysis).items()))
    curve = {int(c): entry for c, entry in arm["contexts"].items()}
    within, beyond = ([c for c, entry in curve.items() if entry["beyond"] is side] for side in (False, True))
    if not within or not beyond:
        return ""
    last, far = max(within), max(beyond)
    return (
        f"On text the loss of {name} is {curve[last]['mean']:.3f} nats per token at context {last:,}, the longest it "
        f"was trained at, and {curve[far]['mean']:.3f} at {far:,} (raw model; a window that slides keeps the first)."
    )
