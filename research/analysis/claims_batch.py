"""Claims about the size of the batch by itself, which strategies of equal tokens per step cannot decide: what would."""

import math
from collections.abc import Mapping

from research.analysis import evidence, noise_report
from research.analysis.evidence import CONDITIONS, FAILS, UNTESTED, Analysis, Judged, arms


def noise(analysis: Analysis) -> Judged:
    """By how much longer rows raise the gradient's variance at equal tokens, at weights trained at every length."""
    found = analysis.get("noise") or []
    if not found:
        return UNTESTED, _not_varied(analysis) + (
            " The noise of the gradient was not measured: experiments.noise, at the weights of this study, would tell."
        )
    text = " ".join(noise_report.finding(found))
    totals = [run["ratios"]["total"] for run in found if "total" in run["ratios"]]
    places = [run["ratios"]["place"] for run in found if "place" in run["ratios"]]
    named = [(noise_report.label(run, found), run["ratios"]) for run in found if "place" in run["ratios"]]
    each = ", ".join(f"{name} {_ratio(ratios['place'])}" for name, ratios in named)
    if each:
        text += f" Neighbouring rows over rows of many places, of one length and as many tokens: {each} times."
    text += " How stable training is was not measured."
    if totals and all(ratio["low"] > 1 for ratio in (*totals, *places)):
        shares = [_share(run["ratios"]) for run in found if "diversity" in run["ratios"]]
        most = ", nearly all of it because they come from more places" if shares and min(shares) > 0.9 else ""
        return CONDITIONS, f"{text} At equal tokens more rows are less noise{most}."
    if totals and all(ratio["high"] < 1 for ratio in totals):
        return FAILS, text
    return UNTESTED, text + " This does not decide: more pieces of text (--batches) or longer rows would tell."


def _share(ratios: Mapping[str, Mapping[str, float]]) -> float:
    """Of the total ratio's logarithm, what is diversity's."""
    return math.log(ratios["diversity"]["value"]) / math.log(ratios["total"]["value"])


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def progress(analysis: Analysis) -> Judged:
    return UNTESTED, _not_varied(analysis) + (
        " experiments.shapes would tell: more rows of one length, each number of them at its best learning rate, after "
        "as many steps and as many tokens."
    )


def explores(analysis: Analysis) -> Judged:
    return UNTESTED, _not_varied(analysis) + (
        " experiments.shapes would tell: where fewer rows of one length end after as many steps, each number of them "
        "at its best learning rate."
    )


def _not_varied(analysis: Analysis) -> str:
    found = list(arms(analysis).values())
    if pairs := evidence.rows_alone(analysis):
        a, b = pairs[0]
        return (
            f"{a['strategy']} and {b['strategy']} have rows of one length, {a['seq_len']:,} tokens, and "
            f"{a['batch_size']} and {b['batch_size']} of them, at one learning rate or another."
        )
    sizes = {arm["tokens_per_step"] for arm in found}
    if len(sizes) == 1 and len({arm["seq_len"] for arm in found}) > 1:
        rows = ", ".join(str(arm["batch_size"]) for arm in found)
        each = f"Every step holds {sizes.pop():,} tokens"
        return f"{each}: the number of rows ({rows}) changes with their length, never alone."
    return "No two strategies differ in their number of rows alone."
