"""A verdict follows from the numbers by its rule, and turns with them; without numbers nothing is decided."""

import re

import pytest

from research.analysis import claims, comparison, evidence
from research.analysis.page import VERDICTS
from tests.fake_analysis import LOSSES, SHAPES, analysis, evidence_on, verdict_on

HOLDS, CONDITIONS, FAILS, UNTESTED = VERDICTS
RECALLS = {"large_batch": (0.9, 0.07, 0.06), "balanced": (0.9, 0.9, 0.07), "long_seq": (0.9, 0.9, 0.8)}
ALIKE = {name: (0.9, 0.9, 0.06) for name in SHAPES}  # the long rows recall no further than the short ones
NEAR = {name: (0.9, 0.06, 0.06) for name in SHAPES}
GUESSES = {name: (0.07, 0.06, 0.06) for name in SHAPES}
BALANCED = {"large_batch": 4.2, "balanced": 3.9, "long_seq": 4.6}
LONG = {"large_batch": 4.6, "balanced": 4.2, "long_seq": 3.9}
SAME = dict.fromkeys(SHAPES, 4.0)


@pytest.mark.parametrize(
    ("words", "changes", "verdict"),
    [
        ("2x batch", {}, UNTESTED),
        ("2x batch", dict(shapes=SHAPES | {"balanced": (128, 128)}, memory=(4e8, 8e8, 4e8)), HOLDS),
        ("2x batch", dict(shapes=SHAPES | {"balanced": (128, 128)}, memory=(4e8, 6e8, 4e8)), CONDITIONS),
        ("2x batch", dict(shapes=SHAPES | {"balanced": (128, 128)}, memory=(4e8, 4e8, 4e8)), FAILS),
        ("2x length", {}, FAILS),
        ("2x length", dict(memory=(1e8, 4e8, 16e8)), HOLDS),  # doubles with the length at equal tokens
        ("2x length", dict(memory=(1e8, 2e8, 4e8)), CONDITIONS),
        ("2x length", dict(memory=(None, 2e8, 4e8)), UNTESTED),
        ("2x length", dict(device=(1e8, 4e8, 16e8)), HOLDS),  # the device's own count goes before
        ("2x length", dict(shapes=SHAPES | {"balanced": (20, 512)}), UNTESTED),
        ("need less memory", {}, CONDITIONS),  # at equal tokens no, with as many rows yes
        ("need less memory", dict(memory=(4e8, 3e8, 2e8)), FAILS),
        ("need less memory", dict(memory=(1e8, 2e8, 4e8)), HOLDS),
        ("equal GPU memory", {}, HOLDS),
        ("equal GPU memory", dict(memory=(4.0e8, 4.2e8, 4.3e8)), CONDITIONS),
        ("equal GPU memory", dict(memory=(4.0e8, 4.2e8, 5.0e8)), FAILS),
        ("slower per step", {}, HOLDS),
        ("slower per step", dict(seconds=(0.7, 0.7, 1.0)), CONDITIONS),
        ("slower per step", dict(seconds=(0.7, 0.7, 0.7)), FAILS),
        ("fastest per step", {}, HOLDS),
        ("fastest per step", dict(seconds=(0.7, 0.71, 1.0)), CONDITIONS),
        ("fastest per step", dict(seconds=(0.9, 0.7, 1.0)), FAILS),
        ("same time", {}, FAILS),
        ("same time", dict(seconds=(0.7, 0.71, 0.72)), HOLDS),
        ("are reached", {}, FAILS),
        ("are reached", dict(own=dict.fromkeys(SHAPES, (0.09, 0.981))), HOLDS),
        ("are reached", dict(own=dict(balanced=(0.09, 0.981))), CONDITIONS),  # by one alone
        ("are reached", dict(own=dict.fromkeys(SHAPES, (0.09, 0.97))), FAILS),
        ("are reached", dict(own=dict.fromkeys(SHAPES, (0.11, 0.99))), FAILS),
        ("are reached", dict(leaking=True), FAILS),
        ("are reached", dict(leaking=True, own=dict.fromkeys(SHAPES, (0.09, 0.981))), CONDITIONS),
        ("balanced strategy wins", {}, FAILS),
        ("balanced strategy wins", dict(losses=BALANCED), HOLDS),
        ("balanced strategy wins", dict(losses=BALANCED, paired=LOSSES), CONDITIONS),
        ("balanced strategy wins", dict(losses=SAME, shown=False), UNTESTED),
        ("balanced strategy wins", dict(losses=SAME, shown=False, paired=LOSSES, seeds=1), UNTESTED),
        ("higher final loss", {}, FAILS),
        ("higher final loss", dict(losses=LONG), HOLDS),
        ("converges faster", {}, HOLDS),
        ("converges faster", dict(losses=BALANCED), FAILS),
        ("converges faster", dict(losses=SAME), UNTESTED),
        ("converges faster", dict(seeds=1), UNTESTED),
        ("patterns over time", {}, UNTESTED),  # the differences stay
        ("patterns over time", dict(early=0.5), FAILS),
        ("patterns over time", dict(early=0.5, gain=0.01), UNTESTED),  # none has learnt to use context
        ("patterns over time", dict(early=2.0), CONDITIONS),  # the gap closes, and is left
        ("patterns over time", dict(early=0.5, losses=LONG), HOLDS),  # a lead that grows
        ("patterns over time", dict(early=0.5, losses=LONG, gain=0.01), HOLDS),
        ("patterns over time", dict(early=2.0, losses=LONG), FAILS),  # a lead that melts
        ("patterns over time", dict(early=2.0, losses=LONG, seeds=1), UNTESTED),
        ("information per training example", {}, CONDITIONS),
        ("information per training example", dict(diversity=0.0), CONDITIONS),
        ("information per training example", dict(diversity=0.4), HOLDS),
        ("information per training example", dict(diversity=None), UNTESTED),
        ("learn long-range dependencies", {}, CONDITIONS),  # text alone
        ("learn long-range dependencies", dict(recall=RECALLS), HOLDS),
        ("learn long-range dependencies", dict(recall=RECALLS, beyond=-0.1), CONDITIONS),
        ("learn long-range dependencies", dict(recall=ALIKE, beyond=-0.1), FAILS),
        (
            "learn long-range dependencies",
            dict(recall=ALIKE, beyond=0.0, spread=0.1),
            UNTESTED,
        ),  # not shown to be alike
        ("learn long-range dependencies", dict(recall=ALIKE, beyond=0.0, sure=0.1), UNTESTED),
        ("learn long-range dependencies", dict(recall=GUESSES, beyond=0.0), UNTESTED),
        ("learn long-range dependencies", dict(recall=NEAR, beyond=0.0), FAILS),  # near alone
        ("learn long-range dependencies", dict(beyond=-0.1, gain=0.01), UNTESTED),
        ("cannot learn long-range", {}, UNTESTED),
        ("cannot learn long-range", dict(recall=RECALLS | {"large_batch": (0.9, 0.06, 0.06)}), HOLDS),
        ("cannot learn long-range", dict(recall=RECALLS | {"large_batch": (0.9, 0.5, 0.06)}), CONDITIONS),
        ("cannot learn long-range", dict(recall=RECALLS | {"large_batch": (0.9, 0.5, 0.4)}), FAILS),
        ("cannot learn long-range", dict(recall=NEAR, sure=0.1), UNTESTED),  # too few answers to call it chance
        ("cannot learn long-range", dict(recall=GUESSES), UNTESTED),  # not learnt at all
        ("understanding of extended", {}, FAILS),
        ("understanding of extended", dict(full=LONG), HOLDS),
        ("understanding of extended", dict(shown=False), UNTESTED),
        ("understanding of extended", dict(gain=0.01), UNTESTED),
        ("context against speed", {}, HOLDS),
        ("context against speed", dict(recall=ALIKE, beyond=-0.1), CONDITIONS),
        ("context against speed", dict(recall=RECALLS, beyond=-0.1), CONDITIONS),
        ("context against speed", dict(seconds=(0.7, 0.7, 0.7)), FAILS),
        ("context against speed", dict(beyond=0.0, width=0.1), UNTESTED),
        ("shows promise", {}, HOLDS),
        ("shows promise", dict(losses=LONG), FAILS),
        ("shows promise", dict(recall=ALIKE, beyond=-0.1), FAILS),
        ("shows promise", dict(recall=RECALLS, beyond=-0.1), CONDITIONS),  # on another task alone
        ("shows promise", dict(recall=ALIKE, beyond=0.0, width=0.1), UNTESTED),  # on text it is undecided
        ("shows promise", dict(losses=SAME, shown=False), UNTESTED),
        ("whole story", {}, UNTESTED),
        ("whole story", dict(recall=RECALLS), UNTESTED),  # those are other models, with losses of another task
        ("whole story", dict(losses=LONG, recall=RECALLS), FAILS),
        ("whole story", dict(recall=RECALLS, spread=0.9), UNTESTED),  # seeds differ by more than strategies
        ("learn long-range dependencies", dict(recall=RECALLS, spread=0.9), CONDITIONS),
        ("worth a higher validation loss", {}, UNTESTED),
        ("worth a higher validation loss", dict(recall=RECALLS, full=LONG), HOLDS),
        ("worth a higher validation loss", dict(recall=RECALLS), UNTESTED),  # what it buys, and the price, of one model
        ("worth a higher validation loss", dict(recall=ALIKE), FAILS),
        ("worth a higher validation loss", dict(recall=RECALLS, full=LONG, losses=LONG), UNTESTED),  # it is not higher
        ("less noise", {}, UNTESTED),
        ("slower progress", {}, UNTESTED),
        ("escape poor minima", {}, UNTESTED),
        ("In practice", {}, UNTESTED),
    ],
)
def test_a_verdict_turns_with_the_numbers(words, changes, verdict):
    assert verdict_on(words, analysis(**changes)) == verdict


def test_every_claim_is_judged_once_with_its_numbers():
    found = claims.verdicts({"analysis": analysis(recall=RECALLS, paired=LOSSES)})
    assert [verdict.claim for verdict in found] == [claim for claim, _ in claims.CLAIMS]
    assert len({claim for claim, _ in claims.CLAIMS}) == len(claims.CLAIMS) == 24
    for verdict in found:
        assert verdict.evidence.endswith(".") and "None" not in verdict.evidence and "nan" not in verdict.evidence
        if verdict.verdict == UNTESTED:
            assert any(
                f" {word}" in verdict.evidence for word in ("would", "undecided", "Not every seed", "no price")
            ), verdict
        else:
            assert any(c.isdigit() for c in verdict.evidence), verdict


def test_evidence_has_the_difference_its_interval_and_whether_it_is_shown():
    (verdict,) = [v for v in claims.verdicts({"analysis": analysis(shown=False)}) if "balanced strategy" in v.claim]
    assert "balanced minus large_batch +0.300 [+0.280, +0.320] (not shown)" in verdict.evidence
    assert "At own lengths, as the original measured: large_batch 4.100" in verdict.evidence


@pytest.mark.parametrize("results", [{}, {"analysis": {}}, {"analysis": comparison.analyse([])}])
def test_without_numbers_nothing_is_decided(results):
    assert {verdict.verdict for verdict in claims.verdicts(results)} == {UNTESTED}


@pytest.mark.parametrize("absent", ["context", "budgets", "decomposition", "recall", "reach", "differences"])
def test_what_is_absent_decides_nothing_and_breaks_nothing(absent):
    found = analysis(recall=RECALLS, paired=LOSSES)
    whole = {v.claim: v.verdict for v in claims.verdicts({"analysis": found})}
    empty = type(found[absent])()
    for part in (empty, None):
        left = {v.claim: v.verdict for v in claims.verdicts({"analysis": found | {absent: part}})}
        assert left != whole or absent == "context"
        assert sum(v == UNTESTED for v in left.values()) >= sum(v == UNTESTED for v in whole.values())


def test_strategies_of_one_shape_are_no_test_of_a_length():
    """A fork's variant beside what it came from: same rows, same length, whatever its numbers."""
    shapes = dict.fromkeys(SHAPES, (16, 512))
    for numbers in (dict(recall=RECALLS, paired=LOSSES), dict(losses=LONG, full=LONG, early=0.5, diversity=0.4)):
        found = analysis(shapes=shapes, **numbers)
        said = {v.claim: v for v in claims.verdicts({"analysis": found})}
        of_length = [v for v in said.values() if re.search("(?i)longer|shorter|short seq|long seq|length", v.claim)]
        in_practice = [v for v in of_length if "In practice" in v.claim]
        assert len(of_length) == 12 and all(v.verdict == UNTESTED for v in of_length)
        assert all("rows of one length" in v.evidence for v in of_length if v not in in_practice)


def test_gaps_along_the_runs_are_of_one_seed():
    """Seeds move all strategies alike; where long_seq lacks the first, the second is not set beside another's first."""
    found = analysis(early=0.5)
    for curve in found["budgets"]["curves"]["tokens"]:
        curve["y"] = [
            [loss + 3.0 * seed * seed for loss in y] for seed, y in zip(curve["seeds"], curve["y"], strict=True)
        ]
    long = found["budgets"]["curves"]["tokens"][-1]
    whole = verdict_on("patterns over time", found)
    for name in ("x", "y", "seeds"):
        long[name] = long[name][1:]
    assert "long_seq minus large_batch +0.700 [+0.700, +0.700] at the end" in evidence_on("patterns over time", found)
    long["seeds"] = [7, 8]
    assert whole == FAILS and verdict_on("patterns over time", found) == UNTESTED


def test_a_change_that_seeds_do_not_agree_on_is_none():
    """It closes by 0.35 on average, and its interval over three seeds reaches beyond zero."""
    found = analysis(early=2.0)
    long = found["budgets"]["curves"]["tokens"][-1]
    assert verdict_on("patterns over time", found) == CONDITIONS
    spread(long["y"], at=-1)
    assert verdict_on("patterns over time", found) == UNTESTED
    found = analysis(early=0.5, losses=LONG)
    assert verdict_on("patterns over time", found) == HOLDS
    spread(found["budgets"]["curves"]["tokens"][0]["y"], at=1)  # of the gap to one alone
    assert verdict_on("patterns over time", found) == CONDITIONS
    assert "not shown to gain on all" in evidence_on("patterns over time", found)


def spread(curves: list[list[float]], at: int) -> None:
    for y, more in zip(curves, (-0.4, 0.0, 0.4), strict=True):
        y[at] += more


def test_before_its_first_evaluation_a_run_has_no_loss():
    found = analysis()
    for curve in found["budgets"]["curves"]["tokens"]:
        if curve["strategy"] == "balanced":
            curve["x"] = [[60.0, 70.0, 80.0, 100.0]] * 3
    assert verdict_on("converges faster", found) == verdict_on("patterns over time", found) == UNTESTED
    assert "at 25% of the tokens large_batch 4.901, balanced not measured" in evidence_on("converges faster", found)


@pytest.mark.parametrize("words", ["less noise", "slower progress", "escape poor minima", "2x batch"])
def test_that_no_two_differ_in_their_rows_alone_is_said_only_where_none_do(words):
    alone = "their number of rows alone"
    two = analysis(shapes=SHAPES | {"balanced": (128, 128)}, memory=(None, 4e8, 4e8))
    assert alone not in evidence_on(words, two) and verdict_on(words, two) == UNTESTED
    assert alone in evidence_on(words, analysis(shapes=SHAPES | {"balanced": (20, 512)}))
    assert alone in evidence_on(words, analysis(shapes=dict.fromkeys(SHAPES, (16, 512))))
    assert "length" in evidence_on(words, analysis()) and alone not in evidence_on(words, analysis())


def test_an_effective_context_that_may_be_longer_is_not_said_to_be_shorter():
    """balanced was scored up to 384 of the 512 tokens of its rows."""
    found = analysis()
    for entry, reached, high in zip(found["context"], (48, 384, 480), (60, 384, 490), strict=True):
        entry["effective"] |= dict(mean=reached, low=reached, high=high)
    assert "Longest effective context on text: balanced and long_seq." in evidence_on("whole story", found)
    found["context"][1]["effective"]["high"] = 383
    assert "Longest effective context on text: long_seq." in evidence_on("whole story", found)
    assert verdict_on("whole story", found) == HOLDS  # large_batch has the lowest loss
    found["context"][1]["effective"]["high"] = 384
    found["context"][2]["effective"] |= dict(mean=768, low=600, high=768)  # more than balanced can see
    assert "Longest effective context on text: long_seq." in evidence_on("whole story", found)


@pytest.mark.parametrize(("seeds", "share"), [((2, 3), "20.0%"), ((3, 3), "10.0%"), ((3, 5), "3.6%"), ((5, 5), "0.8%")])
def test_how_often_ranges_are_apart_by_chance_is_counted(seeds, share, rng):
    assert share in evidence.by_chance(*seeds)
    orders = [rng.permutation(sum(seeds)) for _ in range(4000)]
    apart = [evidence.apart(o[: seeds[0]], o[seeds[0] :]) is not None for o in orders]
    if min(seeds) >= evidence.MIN_SEEDS:
        assert abs(sum(apart) / 4000 - float(share[:-1]) / 100) < 0.015
    found = analysis(seeds=5)
    assert "5 and 5 seeds of one strategy are apart 0.8% of the time" in evidence_on("converges faster", found)
    assert "apart 0.8% of the time" in evidence_on("higher final loss", found)


def test_seeds_whose_ranges_meet_are_not_apart_at_equal_seconds():
    found = analysis(losses=LONG)
    (equal,) = found["budgets"]["equal"]
    assert "It is highest: independent order and equal train seconds." in evidence_on("higher final loss", found)
    equal["losses"]["large_batch"]["low"] = equal["losses"]["balanced"]["high"]
    said = evidence_on("higher final loss", found)
    assert "It is highest: independent order." in said and "Undecided: equal train seconds." in said


def test_the_longest_rows_are_ahead_of_all_only_where_all_are_compared():
    found = analysis(full=LONG)
    assert verdict_on("understanding of extended", found) == HOLDS
    found["reach"]["pairs"] = [p for p in found["reach"]["pairs"] if {p["a"], p["b"]} != {"large_batch", "long_seq"}]
    assert verdict_on("understanding of extended", found) == UNTESTED


def test_a_missing_strategy_is_named_where_a_claim_is_about_it():
    found = analysis()
    found["arms"] = [arm for arm in found["arms"] if arm["strategy"] != "balanced"]
    (verdict,) = [v for v in claims.verdicts({"analysis": found}) if "balanced strategy" in v.claim]
    assert verdict.verdict == UNTESTED and "no finished run of balanced" in verdict.evidence
    found["arms"] = found["arms"][:1]
    assert {v.verdict for v in claims.verdicts({"analysis": found})} <= {UNTESTED, FAILS}  # its accuracy alone


def test_no_shared_context_decides_nothing_about_losses():
    found = analysis() | {"shared_contexts": []}
    assert verdict_on("balanced strategy wins", found) == verdict_on("shows promise", found) == UNTESTED
    assert verdict_on("slower per step", found) == HOLDS


def test_what_leaks_decides_nothing_about_losses_and_says_so():
    found = {v.claim: v for v in claims.verdicts({"analysis": analysis(leaking=True, recall=RECALLS)})}
    of_losses = [v for claim, v in found.items() if "wins" in claim or "long-range" in claim or "final loss" in claim]
    assert len(of_losses) == 4
    assert all(v.verdict == UNTESTED and "LEAKING" in v.evidence for v in of_losses)
    assert any("floor 0.01" in v.evidence for v in of_losses)


def test_recall_with_rows_of_one_length_is_no_test_of_a_length():
    found = analysis(recall=RECALLS)
    assert verdict_on("learn long-range dependencies", found) == HOLDS
    for entry in found["recall"]:
        entry["seq_len"] = 128
    assert verdict_on("learn long-range dependencies", found) == CONDITIONS  # by text alone
