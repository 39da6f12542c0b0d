"""Rules for what is claimed of long rows: what they teach, what that is worth, and what a loss does not say.

On text, long rows have to lower the loss of the same targets by the context that short ones do not have; on the recall
task (claims_recall.py), to find what lies further back than short rows reach.
"""

from research.analysis import claims_cost, claims_recall, evidence
from research.analysis import recall as recall_task
from research.analysis.context import TOLERANCE
from research.analysis.evidence import CONDITIONS, FAILS, HOLDS, UNTESTED, Analysis, Judged, arms, listed

OTHERS = "The models of the recall task are others, trained on it alone: their price is not this one."


def long_range(analysis: Analysis) -> Judged:
    """The longest rows recall beyond the shortest ones' length, and predict text better with more context than that."""
    if missing := evidence.blocked_by_length(analysis):
        return UNTESTED, missing
    recalled, recall_text = claims_recall.further(analysis)
    gained, gain_text = _gains_beyond(analysis)
    copied, copied_text = _copies(analysis)
    answers = [recalled, gained] + ([copied] if copied_text else [])  # studies of before do not have it
    text = f"{recall_text} {gain_text} {copied_text}"
    verdict = evidence.judge(answers)
    if verdict == HOLDS and None in answers:
        return CONDITIONS, f"{text} {answers.count(True)} of {len(answers)} measures show it; none speaks against it."
    return verdict, text


def _copies(analysis: Analysis) -> tuple[bool | None, str]:
    """Whether the longest rows gain from far context where the target's pair of tokens was last seen there.

    False only where the interval says that it cannot be as much as the tolerance of the effective context.
    """
    name = list(arms(analysis))[-1]
    entries = analysis.get("repeats") or ()
    entry = next((e for e in entries if e["strategy"] == name and e["setting"] == "independent"), None)
    far = entry and entry["groups"]["far"]
    if not far or "mean" not in far:
        return None, ""
    change = evidence.turned(far | {"a": "", "b": ""})
    text = (
        f"On the {far['share']:.1%} of targets whose pair of tokens was last seen {5 * entry['from'] // 4:,} to "
        f"{entry['to']:,} tokens back the change is {evidence.said(change)}."
    )
    if far["low"] is not None and far["low"] > 0:
        return True, text
    if evidence.little_context(analysis):
        return None, text
    return (False if far["high"] is not None and far["high"] < TOLERANCE else None), text


def _gains_beyond(analysis: Analysis) -> tuple[bool | None, str]:
    """Whether the longest rows gain on text from more context than every strategy has.

    False only where the interval says that it cannot be as much as the tolerance of the effective context.
    """
    name = list(arms(analysis))[-1]
    gains = (analysis.get("reach") or {}).get("gains", ())
    gain = next((g for g in gains if g["strategy"] == name and g["setting"] == "independent"), None)
    if gain is None:
        return None, f"{name} was scored at no context longer than those that all share."
    change = evidence.turned(gain | {"a": "", "b": ""})
    text = (
        f"On text, {gain['to']:,} tokens of context instead of {gain['from']:,} change the loss of {name} by "
        f"{evidence.said(change)} nats per token{_effective(analysis, name)}."
    )
    if gain["low"] is None:
        return None, text
    if gain["low"] > 0:
        return True, text
    if little := evidence.little_context(analysis):
        return None, f"{text} {little}"
    if gain["high"] < TOLERANCE:
        return False, f"{text} That is no gain of {TOLERANCE}."
    return None, f"{text} That is undecided."


def _effective(analysis: Analysis, name: str) -> str:
    effective = (evidence.curves(analysis).get(name) or {}).get("effective")
    if not effective or effective["mean"] is None:
        return ""
    around = "" if effective["low"] is None else f" [{effective['low']:,.0f}, {effective['high']:,.0f}]"
    return f" (effective context {'at least ' * bool(effective['censored'])}{effective['mean']:,.0f}{around})"


def understands_context(analysis: Analysis) -> Judged:
    """Each strategy at the longest context that it was trained at: the longest rows below every other."""
    if missing := evidence.blocked_by_length(analysis):
        return UNTESTED, missing
    answers = {setting: _at_full_reach(analysis, setting) for setting in ("independent", "paired")}
    texts = [f"In {setting} order, {text}." for setting, (_, text) in answers.items() if text]
    if not texts:
        return UNTESTED, "No strategy was compared at a context beyond the shared ones."
    main = answers["independent"][0]
    verdict = evidence.judge([answer for answer, _ in answers.values()])
    if main is None and verdict != CONDITIONS:
        verdict = CONDITIONS if verdict == HOLDS else UNTESTED
    text = f"Each with all the context it was trained at, in nats per token. {' '.join(texts)}"
    if verdict != HOLDS and (little := evidence.little_context(analysis)):
        return UNTESTED, f"{text} {little}"
    return verdict, text + (" Undecided: more seeds or tokens would tell." if verdict == UNTESTED else "")


def _at_full_reach(analysis: Analysis, setting: str) -> tuple[bool | None, str]:
    """The longest rows against each other strategy, each at its own longest context, on the same targets."""
    known = list(arms(analysis, setting))
    pairs = [p for p in (analysis.get("reach") or {}).get("pairs", ()) if p["setting"] == setting]
    entries = [p for p in pairs if known and known[-1] in (p["a"], p["b"])]
    if not entries:
        return None, ""
    gaps = [p if p["a"] == known[-1] else evidence.turned_ends(p) for p in entries]
    parts = (f"{p['a']} at {p['context_a']:,} minus {p['b']} at {p['context_b']:,} {evidence.said(p)}" for p in gaps)
    apart = [None] * (len(known) - 1 - len(gaps))  # of no seed in common: not compared
    return evidence.extreme([*gaps, *apart], -1), "; ".join(parts)


def whole_story(analysis: Analysis) -> Judged:
    """The strategy with the lowest validation loss is not the one that uses most context.

    Who recalls most is said beside it, and cannot say yes: those are other models, whose losses are of another task.
    """
    if missing := evidence.blocked(analysis):
        return UNTESTED, missing
    winner = _winner(analysis)
    if winner is None:
        return UNTESTED, "No strategy is shown to have the lowest loss, so there is no ranking to set others beside."
    name, text = winner
    used, (recalled, recall_text) = _most_context(analysis), _most_recall(analysis)
    far, far_text = _where_pairs_are_far(analysis, name)
    text += f" Longest effective context on text: {listed(used)}." if used else ""
    text += f" {recall_text}" if recall_text else ""
    text += f" {far_text}" if far_text else ""
    if (used and name not in used) or far:
        return HOLDS, text
    if far is False:  # recall by other models could not turn it
        return FAILS, f"{text} {name} leads in every measure of the models on text that decides."
    if not claims_recall.entries(analysis):
        return UNTESTED, f"{text} {claims_recall.NOT_RUN}"
    if recalled and name not in recalled:
        return UNTESTED, f"{text} {OTHERS} {_would_tell(far_text)}"
    if not used and not recalled:
        return UNTESTED, f"{text} In recall and in the use of context none is shown to lead: more seeds would tell."
    return FAILS, f"{text} {name} leads in every measure that decides."


def _winner(analysis: Analysis) -> tuple[str, str] | None:
    context = evidence.shared_context(analysis)
    for name in arms(analysis):
        gaps = [evidence.gap(analysis, name, other, context) for other in arms(analysis) if other != name]
        if evidence.extreme(gaps, -1):
            return name, f"Lowest loss at context {context}: {name} ({evidence.against(gaps)})."
    return None


def _would_tell(far_text: str) -> str:
    measured = "Undecided where pairs are far: more seeds or tokens would tell."
    return measured if far_text else "Recall by the models on text would tell."


def _where_pairs_are_far(analysis: Analysis, name: str, of: str | None = None) -> tuple[bool | None, str]:
    """Whether some strategy (or `of`) is shown to predict targets whose pair of tokens was last seen far back better
    than `name` does; False where each that reaches further is shown to be worse."""
    entries = [e for e in analysis.get("repeats") or () if e["setting"] == "independent"]
    pairs = [p for entry in entries for p in entry["against"] if p["b"] == name and of in (None, p["a"])]
    if not pairs:
        return None, ""
    text = f"On targets whose pair of tokens was last seen too far back for {name}: {evidence.against(pairs)}."
    if any(pair["shown"] and pair["mean"] < 0 for pair in pairs):
        return True, text
    return (False if all(pair["shown"] and pair["mean"] > 0 for pair in pairs) else None), text


def _most_recall(analysis: Analysis) -> tuple[list[str], str]:
    """The strategies that recall most at the longest distances, ties together, and the sentence; none where all tie."""
    entries = claims_recall.entries(analysis)
    recall = [entry for entry in entries if claims_recall.learnt(entry, entries[0]["seq_len"])]
    if len(recall) > 1:
        far = max(b["from"] for b in recall[0]["raw"])
        shares = {e["strategy"]: b for e in recall for b in e["raw"] if b["from"] == far}
        best = max(shares.values(), key=lambda b: b["mean"])
        leads = [name for name, b in shares.items() if not recall_task.above(best, b)]
        if len(leads) < len(shares) and best["low"] > recall[0]["chance"]:
            at = f"Most recalled at distances of {claims_recall.distances(best)} ({claims_recall.share(best)})"
            return leads, f"{at}: {listed(leads)}."
    return [], ""


def _most_context(analysis: Analysis) -> list[str]:
    """By effective contexts: the longest, and those whose intervals overlap its own; none where all do.

    An interval that ends at the longest context that was scored may as well end anywhere up to the trained length.
    """
    known = {n: c for n, c in evidence.curves(analysis).items() if c["effective"] and c["effective"]["low"] is not None}
    if len(known) < 2:
        return []
    found = {name: curve["effective"] for name, curve in known.items()}
    ends = {n: known[n]["seq_len"] if e["high"] >= e["longest"] else e["high"] for n, e in found.items()}
    longest = max(found.values(), key=lambda e: e["mean"])
    leads = [name for name, end in ends.items() if end >= longest["low"]]
    return leads if len(leads) < len(known) else []


def worth_it(analysis: Analysis) -> Judged:
    """The longest rows predict better with all their context, though their loss is higher; recall is said beside it."""
    if missing := evidence.blocked_by_length(analysis):
        return UNTESTED, missing
    recalled, recall_text = claims_recall.further(analysis)
    reached, reach_text = _at_full_reach(analysis, "independent")
    known, context = list(arms(analysis)), evidence.shared_context(analysis)
    gaps = [evidence.gap(analysis, known[-1], other, context) for other in known[:-1]]
    far, far_text = _where_pairs_are_far(analysis, known[0], of=known[-1])
    text = f"{recall_text} On text, each with all its context, in nats per token: {reach_text or 'not compared'}. "
    text += f"{far_text} " if far_text else ""
    text += f"The price at context {context}: {evidence.against(gaps)}. No application was tried."
    if evidence.extreme(gaps, 1) is False:
        return UNTESTED, f"{text} The longest rows do not have the highest loss: there is no price to weigh."
    if reached:
        return HOLDS, text
    if far:
        return CONDITIONS, f"{text} On those targets alone."
    if little := evidence.little_context(analysis):
        return UNTESTED, f"{text} {little}"
    if recalled and far is None:
        return UNTESTED, f"{text} {OTHERS} {_would_tell(far_text)}"
    if reached is None or (recalled is None and far is None):
        return UNTESTED, f"{text} That is undecided."
    return FAILS, text


def promise(analysis: Analysis) -> Judged:
    """Not the lowest loss at the contexts that all share, but ahead where there is more context."""
    if missing := evidence.blocked_by_length(analysis, "long_seq"):
        return UNTESTED, missing
    context = evidence.shared_context(analysis)
    gaps = [evidence.gap(analysis, "long_seq", other, context) for other in arms(analysis) if other != "long_seq"]
    won = evidence.extreme(gaps, -1)
    recalled, recall_text = claims_recall.further(analysis)
    gained, gain_text = _gains_beyond(analysis)
    text = f"At context {context}, in nats per token: {evidence.against(gaps)}. {recall_text} {gain_text}"
    if won is None:
        return UNTESTED, text
    if won:
        return FAILS, f"{text} It wins on the short contexts too."
    if gained:
        return HOLDS, text
    if recalled:
        return CONDITIONS, f"{text} It does not win on text; the promise is of another task, by other models."
    if gained is None or recalled is None:
        return UNTESTED, f"{text} It does not win; the promise is undecided."
    return FAILS, f"{text} It does not win, and the promise is not seen."


def context_for_speed(analysis: Analysis) -> Judged:
    """Longer rows cost time, and give something for it on text or in recall."""
    if missing := evidence.blocked_by_length(analysis):
        return UNTESTED, missing
    recalled, recall_text = claims_recall.further(analysis)
    gained, gain_text = _gains_beyond(analysis)
    slower = claims_cost.slowdown(analysis)
    text = f"The longest rows take {slower:.2f} times the time per token of the shortest. {recall_text} {gain_text}"
    if slower <= 1 + evidence.SAME:
        return FAILS, text
    if gained:
        return HOLDS, text
    if recalled:
        return CONDITIONS, f"{text} {OTHERS} On text what it buys is not seen."
    if gained is None or recalled is None:
        return UNTESTED, f"{text} What they give for it is undecided."
    return CONDITIONS, f"{text} The price is paid; what it buys is not seen."
