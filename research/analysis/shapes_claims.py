"""Verdicts on what the original claims of the batch by itself, from shapes that differ in their rows alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from research.analysis import claims, claims_batch, claims_cost, evidence
from research.analysis.evidence import CONDITIONS, FAILS, HOLDS, UNTESTED, Judged
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
    pairs = of_kind(found, "steps", "rows")
    if not pairs:
        return UNTESTED, "No two shapes of one length were trained for as many steps."
    text = f"After as many steps, in nats per token: {evidence.against(pairs)}."
    return _judged(pairs, text)


def explores(found: Found) -> Judged:
    """As many steps: do fewer rows, whose gradients are noisier, end below more? At equal tokens they also have more
    steps, so what they win there does not tell; what they lose does."""
    steps, tokens = (of_kind(found, budget, "rows") for budget in ("steps", "tokens"))
    if not steps:
        return UNTESTED, "No two shapes of one length were trained for as many steps."
    text = f"After as many steps, in nats per token: {evidence.against(steps)}."
    if tokens:
        text += f" After as many tokens, where fewer rows take more steps: {evidence.against(tokens)}."
    verdict, text = _judged(steps, text)
    if verdict == FAILS:
        text += " Noise by itself helps nowhere: what fewer rows are ahead by, at equal tokens, is their more steps."
    return verdict, text


def _judged(pairs: Sequence[Mapping[str, Any]], text: str) -> Judged:
    """`pairs`: more rows minus fewer. Holds where more are shown to be behind, everywhere."""
    answers = [pair["mean"] > 0 if pair["shown"] else None for pair in pairs]
    verdict = evidence.judge(answers)
    if verdict in (HOLDS, FAILS) and None in answers:
        return CONDITIONS if verdict == HOLDS else UNTESTED, f"{text} Not all are shown: more seeds would tell."
    return verdict, text


def memory_of_batch(found: Found) -> Judged:
    """The factor of the compiled step's memory a doubling of the rows, for each length."""
    by_length: dict[int, list[Mapping[str, Any]]] = {}
    for shape in found["shapes"]:
        if shape["memory_bytes"]:
            by_length.setdefault(shape["seq_len"], []).append(shape)
    ends = [
        sorted(same, key=lambda s: s["batch_size"])[:: len(same) - 1] for same in by_length.values() if len(same) > 1
    ]
    if not ends:
        return UNTESTED, "The memory of no two shapes of one length is known."
    parts, factors = [], []
    for few, many in ends:
        times = many["batch_size"] / few["batch_size"]
        factors.append((many["memory_bytes"] / few["memory_bytes"]) ** (1 / math.log2(times)))
        sizes = f"{few['memory_bytes'] / 1e9:.3f} to {many['memory_bytes'] / 1e9:.3f} GB"
        parts.append(f"{few['shape']} to {many['shape']} {factors[-1]:.2f} times a doubling ({sizes})")
    text = f"The compiled step: {'; '.join(parts)}. Parameters and their state do not grow."
    if min(factors) >= 1.9:
        return HOLDS, text
    return (CONDITIONS if max(factors) > 1 + evidence.SAME else FAILS), text


def of_kind(found: Found, budget: str, kind: str) -> list[Mapping[str, Any]]:
    """The pairs of shapes.py of one kind at one budget."""
    return [pair for pair in found["pairs"] if pair["budget"] == budget and pair["kind"] == kind]
