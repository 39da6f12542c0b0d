"""A verdict follows from the numbers, and turns with them; without numbers nothing is decided."""

import functools
import tempfile
from pathlib import Path

import pytest

from research.analysis import claims, comparison, report, study
from research.analysis.page import VERDICTS
from tests.fake_runs import MERITS, write_study

HOLDS, CONDITIONS, FAILS, UNTESTED = VERDICTS


@functools.cache
def results() -> dict:
    return judge(("independent", "paired", "recall"))


def judge(settings=("independent",), **changes) -> dict:
    """Claim -> verdict, of fabricated runs."""
    with tempfile.TemporaryDirectory() as folder:
        keys = write_study(Path(folder), settings=settings, **changes)
        analysis = report.analyse(study.collect(Path(folder), keys, {}))
    return {verdict.claim: verdict for verdict in claims.verdicts({"analysis": analysis})}


def verdict_on(words: str, **changes) -> str:
    return next(v for claim, v in judge(**changes).items() if words in claim).verdict


def test_every_claim_has_a_verdict_with_its_evidence():
    found = results()
    assert list(found) == [claim for claim, _ in claims.CLAIMS]
    for verdict in found.values():
        assert verdict.verdict in VERDICTS and len(verdict.evidence) > 30 and "None" not in verdict.evidence
        if verdict.verdict != UNTESTED:
            assert any(c.isdigit() for c in verdict.evidence), verdict.claim


def test_without_numbers_nothing_is_decided():
    nothing = comparison.analyse([])
    for given in ({}, {"analysis": nothing}):
        for verdict in claims.verdicts(given):
            if "0.06 to 0.10" not in verdict.claim:  # of the original's own numbers
                assert verdict.verdict == UNTESTED, verdict.claim


@pytest.mark.parametrize(
    ("words", "changes", "verdict"),
    [
        ("balanced strategy wins", {}, FAILS),
        ("balanced strategy wins", dict(balanced={"offset": -1.0}), HOLDS),
        ("higher final loss", {}, FAILS),
        ("higher final loss", dict(large_batch={"offset": 2.0}), HOLDS),
        ("fastest per step", {}, HOLDS),
        ("fastest per step", dict(large_batch={"step_seconds": 2.0}), FAILS),
        ("slower per step", {}, HOLDS),
        ("slower per step", dict(long_seq={"step_seconds": 0.2}), FAILS),
        ("equal GPU memory", {}, HOLDS),
        ("equal GPU memory", dict(long_seq={"memory": 9e8}), FAILS),
        ("about the same time", {}, FAILS),
        ("about the same time", {name: {"step_seconds": 0.7} for name in MERITS}, HOLDS),
    ],
)
def test_a_verdict_turns_with_the_numbers(words, changes, verdict):
    assert verdict_on(words, **changes) == verdict


def test_what_leaks_decides_nothing_about_losses():
    leaking = {name: {"protocol": "published"} for name in MERITS}
    for words in ("balanced strategy wins", "higher final loss", "learn long-range"):
        assert verdict_on(words, **leaking) == UNTESTED


def test_recall_decides_what_text_leaves_open():
    """The fabricated runs recall as far as half their rows, and no further."""
    found = judge(settings=("independent", "recall"))
    by = {claim: verdict for claim, verdict in found.items() if "long-range" in claim}
    assert any(verdict.verdict in (HOLDS, CONDITIONS) for verdict in by.values()), by
    assert all("recall task was not run" not in verdict.evidence for verdict in found.values())
