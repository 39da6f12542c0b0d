"""The same runs under five budgets: who has the lowest loss when something runs out, and where curves cross."""

import numpy as np
import pytest

from research.analysis import budgets
from research.analysis.study import Arm, Key, Run


def arm_of(strategy: str, losses: list, *, seeds=(0, 1, 2), step=1.0, flops=100.0, tokens=1000, memory=100):
    """Runs that are evaluated after each of their steps; a run a list of losses."""
    runs = []
    for i, (seed, run) in enumerate(zip(seeds, losses, strict=False)):
        curve = [
            {"step": i, "tokens": i * tokens, "flops": i * flops, "train_seconds": 7.0 * i, "eval/loss@96": loss}
            for i, loss in enumerate(run, 1)
        ]
        result = dict(seq_len=128, steps=len(run), memory_bytes=dict(compiled_step=memory))
        result |= dict(step_seconds=dict(median=step * (1 + i)))
        runs.append(Run(Key(strategy, "independent", seed), "finished", result, {}, tuple(curve)))
    return Arm(strategy, "independent", tuple(runs))


def equal(found: dict) -> dict[str, dict]:
    return {entry["budget"]: entry for entry in found["equal"]}


def test_each_budget_has_its_own_winner():
    """`fast` takes half the time and half the FLOPs a step; `good` is better after every step."""
    fast = arm_of("fast", [[5, 4, 3, 2.5]], step=0.5, flops=50)
    good = arm_of("good", [[4.5, 3.5, 2.9, 2.4]])
    found = equal(budgets.analyse([fast, good], [24, 96]))
    winner = {budget: next(iter(entry["losses"])) for budget, entry in found.items()}
    assert winner == dict(tokens="good", step="good", flops="fast", seconds="fast", memory="good")
    assert found["flops"]["at"] == 200 and found["seconds"]["at"] == 2
    assert found["flops"]["losses"]["good"]["mean"] == 3.5 and found["seconds"]["losses"]["fast"]["mean"] == 2.5


def test_a_budget_that_was_not_held_equal_is_no_winner():
    a, b = arm_of("a", [[5, 3, 2]]), arm_of("b", [[6, 4, 3]], memory=200)
    found = budgets.analyse([a, b], [96])
    assert equal(found)["memory"]["losses"] == {} and not found["crossings"]
    assert "the winner is the same" in budgets.section(dict(budgets=found)).text


def test_losses_are_interpolated_and_ranges_are_over_seeds():
    a = arm_of("a", [[5, 3], [6, 4]], tokens=1000)
    b = arm_of("b", [[5, 4, 3.5]], tokens=500)
    at = equal(budgets.analyse([a, b], [96]))["tokens"]
    assert at["at"] == 1500 and at["losses"]["a"] == dict(mean=4.5, low=4.0, high=5.0)
    assert at["losses"]["b"]["mean"] == 3.5


def test_before_the_first_evaluation_there_is_no_loss():
    """`slow` is first evaluated after all that `fast` ran for: at as many seconds its loss is not known."""
    fast, slow = arm_of("fast", [[5, 4, 3]], step=0.1), arm_of("slow", [[2, 1.5]])
    found = budgets.analyse([fast, slow], [96])
    assert equal(found)["seconds"]["losses"] == {} and list(equal(found)["tokens"]["losses"]) == ["slow", "fast"]
    row = next(row for row in budgets.section(dict(budgets=found)).tables[0].rows if "seconds" in row[0])
    assert row[2:] == ("–", "–", "not measured")


def test_a_disturbed_run_does_not_slow_its_strategy():
    assert budgets.step_seconds(arm_of("a", [[5, 4], [5, 4]], step=0.7)) == 0.7


@pytest.mark.parametrize(("memory", "held"), [(100, True), (96, True), (94, False), (None, False)])
def test_memory_is_equal_to_within_five_per_cent(memory, held):
    found = budgets.analyse([arm_of("a", [[5, 4]]), arm_of("b", [[5, 3]], memory=memory)], [96])
    entry = equal(found)["memory"]
    assert entry["held_equal"] == held and list(entry["losses"]) == (["b", "a"] if held else [])
    assert "not held equal" in budgets.section(dict(budgets=found)).tables[0].rows[-1] or held


def test_crossings_are_where_lines_cross():
    a, b = arm_of("a", [[5, 3], [5, 3]]), arm_of("b", [[4, 3.5], [4, 3.8]])
    found = [c for c in budgets.analyse([a, b], [96])["crossings"] if c["axis"] == "tokens"]
    (crossing,) = found  # 5 - 2x meets 4 - 0.35 x; the seeds' own at 1000 (1 + 1 / 1.5) and 1000 (1 + 1 / 1.8)
    assert crossing["at"] == pytest.approx(1000 * (1 + 1 / 1.65), rel=1e-3)
    assert crossing["low"] == pytest.approx(1000 * (1 + 1 / 1.8), rel=1e-3)
    assert crossing["high"] == pytest.approx(1000 * (1 + 1 / 1.5), rel=1e-3)
    assert (crossing["seeds_that_cross"], crossing["seeds"]) == (2, 2)


def test_only_curves_of_one_seed_are_laid_over_each_other():
    """A seed moves both strategies alike: of unlike seeds, curves would cross that never do in one."""
    levels = {1: 0.0, 2: 1.0, 3: 2.0}
    a = arm_of("a", [[5 + u, 3 + u] for u in (levels[2], levels[3])], seeds=(2, 3))
    b = arm_of("b", [[5.5 + u, 4 + u] for u in levels.values()], seeds=(1, 2, 3))
    assert budgets.analyse([a, b], [96])["crossings"] == []
    a = arm_of("a", [[5 + levels[2], 4.2 + levels[2]]], seeds=(2,))
    (crossing,) = [c for c in budgets.analyse([a, b], [96])["crossings"] if c["axis"] == "tokens"]
    assert crossing["seeds"] == crossing["seeds_that_cross"] == 1
    assert budgets.analyse([a, arm_of("b", [[4, 6]], seeds=(1,))], [96])["crossings"] == []  # none in common


def test_curves_that_do_not_cross_have_no_crossing():
    found = budgets.analyse([arm_of("a", [[5, 4, 3]]), arm_of("b", [[4.5, 3.9, 2]])], [96])
    assert found["crossings"] == [] and len(budgets.section(dict(budgets=found)).tables) == 1


def test_nothing_shared_is_no_budget():
    assert budgets.analyse([arm_of("a", [[5, 4]])], [96]) == {}
    assert budgets.analyse([arm_of("a", [[5, 4]]), arm_of("b", [[5, 4]])], []) == {}
    assert budgets.analyse([arm_of("a", [[5, 4]]), arm_of("b", [[5]])], [96]) == {}  # one evaluation is no curve
    assert budgets.section({"budgets": {}}) is None


def test_the_place_of_a_crossing_is_inside_what_both_have_seen(rng):
    """Random curves: every crossing lies between evaluations where the mean difference changes sign."""
    for _ in range(20):
        a, b = (arm_of(name, rng.normal(4, 1, (3, 6)).tolist()) for name in "ab")
        found = budgets.analyse([a, b], [96])
        gap = np.mean(found["curves"]["step"][0]["y"], axis=0) - np.mean(found["curves"]["step"][1]["y"], axis=0)
        wanted = int((np.sign(gap[1:]) != np.sign(gap[:-1])).sum())
        places = [c["at"] for c in found["crossings"] if c["axis"] == "step"]
        assert len(places) == wanted and all(1 <= place <= 6 for place in places)
