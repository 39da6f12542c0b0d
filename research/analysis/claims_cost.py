"""Rules for what is claimed of memory and of time. Costs within 5 % of each other are the same."""

import itertools
import math
from collections.abc import Sequence

from research.analysis import evidence
from research.analysis.evidence import CONDITIONS, FAILS, HOLDS, SAME, UNTESTED, Analysis, Arm, Judged, arms, listed

MEASURES = {"device_peak": "device's peak", "compiled_step": "compiled step"}  # the first that every strategy has


def memory_of_batch(analysis: Analysis) -> Judged:
    """Two strategies with rows of one length: the factor of memory a doubling of the rows."""
    same, measure = evidence.rows_alone(analysis), _measure(analysis)
    if not same:
        return UNTESTED, _batch_not_varied(
            analysis
        ) + " experiments.shapes would tell: steps of more rows of one length."
    if measure is None:
        return UNTESTED, "No measure of memory is known of every strategy: that of the compiled step would tell."
    few, many = sorted(same[0], key=lambda arm: arm["batch_size"])
    factor = _a_doubling(few, many, measure, many["batch_size"] / few["batch_size"])
    text = (
        f"From {few['batch_size']} to {many['batch_size']} rows of {few['seq_len']} tokens the {MEASURES[measure]} "
        f"grows {factor:.2f} times a doubling ({_sizes([few, many], measure)}); parameters and their state do not grow."
    )
    return doubles([factor]), text


def doubles(factors: Sequence[float]) -> str:
    """The verdict on "twice as much for each doubling of the rows", from what each doubling takes."""
    if all(abs(factor - 2) <= 2 * SAME for factor in factors):
        return HOLDS
    return CONDITIONS if max(factors) > 1 + SAME else FAILS


def memory_of_length(analysis: Analysis) -> Judged:
    """Memory m(B, T) = fixed + linear B T + quadratic B T^2. With f its growth a doubling of T at equal B T, its growth
    a doubling of T at equal B lies between f (more rows cost no less) and 2 f (the fixed part does not double).
    """
    measure = _measure(analysis)
    found = list(arms(analysis).values())
    if missing := evidence.unfinished(analysis) or evidence.one_length(analysis):
        return UNTESTED, missing
    if measure is None:
        return UNTESTED, "No measure of memory is known of every strategy."
    if not _equal_tokens(found):
        return UNTESTED, "Tokens a step differ between the strategies, so memory differs for two reasons at once."
    short, long = found[0], found[-1]
    factor = _a_doubling(short, long, measure, long["seq_len"] / short["seq_len"])
    text = (
        f"At equal tokens per step, rows {long['seq_len'] / short['seq_len']:g} times as long take "
        f"{_ratio(short, long, measure):.3f} times the memory ({MEASURES[measure]}: {_sizes(found, measure)}): "
        f"{factor:.2f} times a doubling. With the same number of rows a doubling would take {factor:.2f} to "
        f"{2 * factor:.2f} times, where 4 is claimed."
    )
    if 2 * factor <= 2.5:
        return FAILS, text + " Attention that keeps no T x T scores has no quadratic part to grow."
    if factor >= 1.75:
        return HOLDS, text + " The quadratic part is nearly all of it."
    return CONDITIONS, text + " There is a quadratic part, beside one that grows with the tokens."


def memory_of_short(analysis: Analysis) -> Judged:
    found, measure = list(arms(analysis).values()), _measure(analysis)
    if missing := evidence.unfinished(analysis) or evidence.one_length(analysis):
        return UNTESTED, missing
    if measure is None or not _equal_tokens(found):
        return UNTESTED, "Memory at equal tokens per step is not known of every strategy."
    ratio = _ratio(found[0], found[-1], measure)
    text = f"At equal tokens per step the {MEASURES[measure]} takes {_sizes(found, measure)}"
    if ratio > 1 + SAME:
        return HOLDS, f"{text}: the longest rows take {ratio:.2f} times that of the shortest."
    if ratio < 1 - SAME:
        return FAILS, f"{text}: the longest rows take {ratio:.2f} times that of the shortest."
    return (
        CONDITIONS,
        f"{text}: {_apart(ratio)} between the longest rows and the shortest. Shorter rows need less where there are as "
        "many of them, not where a step has as many tokens.",
    )


def equal_memory(analysis: Analysis) -> Judged:
    """The original's own table: 20.27 to 21.91 GB, 8 % apart."""
    found, measure = list(arms(analysis).values()), _measure(analysis)
    if missing := evidence.unfinished(analysis):
        return UNTESTED, missing
    if measure is None:
        return UNTESTED, "No measure of memory is known of every strategy."
    sizes = [arm["memory_bytes"][measure] for arm in found]
    ratio = max(sizes) / min(sizes)
    text = f"The {MEASURES[measure]} takes {_sizes(found, measure)}, {_apart(ratio)}; the original's differed by 8 %."
    text += "" if measure == "device_peak" else " Compiled for the device of this study, which another's is not."
    return (HOLDS if ratio <= 1 + SAME else CONDITIONS if ratio <= 1 + 2 * SAME else FAILS), text


def fastest_step(analysis: Analysis) -> Judged:
    if missing := evidence.unfinished(analysis, "large_batch"):
        return UNTESTED, missing
    ours = arms(analysis)["large_batch"]
    others = [arm for arm in arms(analysis).values() if arm is not ours]
    text = f"Median step: {_steps(arms(analysis).values())}." + _tokens_a_step(analysis) + _flops(analysis)
    ratios = [arm["step_seconds"] / ours["step_seconds"] for arm in others]
    if min(ratios) > 1 + SAME:
        return HOLDS, text
    slower = [arm["strategy"] for arm, ratio in zip(others, ratios, strict=True) if ratio > 1 + SAME]
    if min(ratios) >= 1 - SAME and slower:
        return CONDITIONS, f"{text} It is faster than {listed(slower)}; within {SAME:.0%} costs count as the same."
    return FAILS, text


def slower_steps(analysis: Analysis) -> Judged:
    if missing := evidence.unfinished(analysis) or evidence.one_length(analysis):
        return UNTESTED, missing
    found = list(arms(analysis).values())
    by_length = [list(group) for _, group in itertools.groupby(found, lambda arm: arm["seq_len"])]
    ratios = [
        b["step_seconds"] / a["step_seconds"]
        for shorter, longer in itertools.pairwise(by_length)
        for a, b in itertools.product(shorter, longer)
    ]
    text = f"Median step, by row length: {_steps(found)}." + _tokens_a_step(analysis) + _flops(analysis)
    if all(ratio > 1 + SAME for ratio in ratios):
        return HOLDS, text
    whole = found[-1]["step_seconds"] / found[0]["step_seconds"]
    return (CONDITIONS if whole > 1 + SAME else FAILS), text + f" Not every longer row is slower by {SAME:.0%} or more."


def equal_time(analysis: Analysis) -> Judged:
    """The original's clocks, at nearly equal tokens: 6.97 to 7.04 minutes."""
    if missing := evidence.unfinished(analysis):
        return UNTESTED, missing
    found = list(arms(analysis).values())
    seconds = [arm["step_seconds"] * arm["tokens"] / arm["tokens_per_step"] for arm in found]
    each = ", ".join(f"{arm['strategy']} {value:,.0f} s" for arm, value in zip(found, seconds, strict=True))
    ratio = max(seconds) / min(seconds)
    text = (
        f"Training alone takes {each} for {_tokens(found)}: {_apart(ratio)}. "
        "The original's clocks included validation; equal clocks at unequal FLOPs mean a device that was not kept busy."
    )
    return (HOLDS if ratio <= 1 + SAME else FAILS), text


def slowdown(analysis: Analysis) -> float:
    """Time a token of the longest rows over that of the shortest."""
    found = list(arms(analysis).values())
    short, long = (arm["step_seconds"] / arm["tokens_per_step"] for arm in (found[0], found[-1]))
    return long / short


def _batch_not_varied(analysis: Analysis) -> str:
    found = list(arms(analysis).values())
    if not found:
        return "No run is finished."
    if _equal_tokens(found) and len({arm["seq_len"] for arm in found}) > 1:
        return (
            f"The batch is not varied: every strategy takes {found[0]['tokens_per_step']:,} tokens per step, cut into "
            "rows of other lengths (as the original's did, nearly)."
        )
    return "No two strategies differ in their number of rows alone."


def _measure(analysis: Analysis) -> str | None:
    found = arms(analysis).values()
    return next((name for name in MEASURES if found and all(arm["memory_bytes"].get(name) for arm in found)), None)


def _equal_tokens(found: Sequence[Arm]) -> bool:
    return len({arm["tokens_per_step"] for arm in found}) == 1


def _ratio(a: Arm, b: Arm, measure: str) -> float:
    return b["memory_bytes"][measure] / a["memory_bytes"][measure]


def _a_doubling(a: Arm, b: Arm, measure: str, times: float) -> float:
    return _ratio(a, b, measure) ** (1 / math.log2(times))


def _sizes(found: Sequence[Arm], measure: str) -> str:
    return ", ".join(f"{arm['strategy']} {arm['memory_bytes'][measure] / 1e9:.3f} GB" for arm in found)


def _apart(ratio: float) -> str:
    return f"{abs(ratio - 1):.1%} apart"


def _steps(found) -> str:
    return ", ".join(f"{arm['strategy']} {arm['step_seconds']:.3g} s" for arm in found)


def _tokens(found: Sequence[Arm]) -> str:
    tokens = [arm["tokens"] for arm in found]
    return f"{tokens[0]:,} tokens each" if len(set(tokens)) == 1 else f"{min(tokens):,} to {max(tokens):,} tokens"


def _tokens_a_step(analysis: Analysis) -> str:
    found = list(arms(analysis).values())
    return (
        f" All take {found[0]['tokens_per_step']:,} tokens per step."
        if _equal_tokens(found)
        else " Tokens a step differ."
    )


def _flops(analysis: Analysis) -> str:
    """FLOPs a token of the longest rows against the shortest: what of the time is arithmetic."""
    found = list(arms(analysis).values())
    short, long = (arm["flops"] / arm["tokens"] for arm in (found[0], found[-1]))
    return (
        f" A token of {found[-1]['strategy']} takes {slowdown(analysis):.2f} times the time of one of "
        f"{found[0]['strategy']}, and {long / short:.2f} times the FLOPs."
    )
