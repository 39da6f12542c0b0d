"""Verdicts on what the original claims of the batch by itself, from shapes that differ in their rows alone."""

import math
from collections.abc import Mapping
from typing import Any

from research.analysis import claims, claims_batch, claims_cost, evidence
from research.analysis.evidence import CONDITIONS, FAILS, UNTESTED, Judged
from research.analysis.page import Verdict

Found = Mapping[str, Any]  # the analysis of shapes.py


def verdicts(found: Found) -> list[Verdict]:
    """In the original's order; the words are those of claims.py."""
    rules = {
        claims_batch.progress: progress,
        claims_batch.explores: explores,
        claims_cost.memory_of_batch: memory_of_batch,
    }
    return [Verdict(claim, *rules[rule](found)) for claim, rule in claims.CLAIMS if rule in rules]


def progress(found: Found) -> Judged:
    """As many steps: are more rows behind fewer of the same length?"""
    return _after_steps(found)


def explores(found: Found) -> Judged:
    """As many steps: do fewer rows, whose gradients are noisier, end below more?

    Within one pass every row is a new sample: the mean of a step's gradient is the same for any number of rows, and its
    noise is all that differs. At equal tokens fewer rows take more steps too, so what they win there does not tell.
    """
    verdict, text = _after_steps(found)
    if found["passes"] is not None and found["passes"] <= 1 and of_kind(found, "steps", "rows"):
        text += (
            " Within one pass of the text every row is new: at equal steps more rows change nothing but the noise of "
            "each step's gradient."
        )
    tokens = of_kind(found, "tokens", "rows")
    if tokens:
        text += f" After as many tokens, where fewer rows take more steps: {evidence.against(tokens)}."
    if verdict == FAILS and tokens and all(answers(found, "tokens")):
        text += " So what fewer rows are ahead by, at equal tokens, is what more steps are worth, not noise."
    return verdict, text


def _after_steps(found: Found) -> Judged:
    """Holds where more rows are shown to be behind fewer, in all pairs; fails where they are shown to be ahead."""
    pairs = of_kind(found, "steps", "rows")
    if not pairs:
        return UNTESTED, "No two shapes of one length were trained for as many steps."
    steps = max(shape["at"]["steps"]["steps"] for shape in found["shapes"] if shape["at"]["steps"])
    text = f"After as many steps, {steps:,}, in nats per token: {evidence.against(pairs)}."
    given = answers(found, "steps")
    if None in given:
        text += (
            f" Not all are shown by {evidence.MIN_SEEDS} seeds at learning rates inside their grids: more would tell."
        )
    verdict = evidence.judge(given)
    return (UNTESTED if None in given and verdict != CONDITIONS else verdict), text


def answers(found: Found, budget: str) -> list[bool | None]:
    """Whether more rows are behind fewer, pair by pair at a budget; None where it is not shown, or by too few seeds,
    or where the one behind may have a better learning rate."""
    on_edge = {shape["shape"] for shape in found["shapes"] if not shape["rates"][budget]["inside"]}
    given = []
    for pair in of_kind(found, budget, "rows"):
        behind = pair["a"] if pair["mean"] > 0 else pair["b"]
        shown = pair["shown"] and len(pair["seeds"]) >= evidence.MIN_SEEDS and behind not in on_edge
        given.append(pair["mean"] > 0 if shown else None)
    return given


def memory_of_batch(found: Found) -> Judged:
    """The factor of the compiled step's memory a doubling of the rows, for each length, on as many devices.

    Where rows do not divide, a CPU's step runs on one of its devices, which then holds no second copy of parameters.
    """
    alike: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for shape in found["shapes"]:
        if shape["memory_bytes"]:
            alike.setdefault((shape["seq_len"], shape["devices"]), []).append(shape)
    rising = [sorted(same, key=lambda shape: shape["batch_size"]) for same in alike.values() if len(same) > 1]
    if not rising:
        return UNTESTED, "The memory of no two shapes of one length is known on as many devices."
    parts, factors = [], []
    for few, *_, many in rising:
        times = many["batch_size"] / few["batch_size"]
        factors.append((many["memory_bytes"] / few["memory_bytes"]) ** (1 / math.log2(times)))
        bytes_ = f"{few['memory_bytes'] / 1e9:.3f} to {many['memory_bytes'] / 1e9:.3f} GB"
        parts.append(f"{few['shape']} to {many['shape']} {factors[-1]:.2f} times a doubling ({bytes_})")
    text = f"The compiled step: {'; '.join(parts)}. Parameters and their state do not grow."
    return claims_cost.doubles(factors), text


def of_kind(found: Found, budget: str, kind: str) -> list[Mapping[str, Any]]:
    """The pairs of shapes.py of one kind at one budget."""
    return [pair for pair in found["pairs"] if pair["budget"] == budget and pair["kind"] == kind]
