"""What contexts do, on losses whose answers are known by hand."""

import numpy as np
import pytest

from research.analysis import context, context_section, reach
from research.analysis.statistics import holm
from research.analysis.study import Arm, Key, Run

DOCUMENTS = np.arange(24).repeat(30)
GRID = (24, 48, 96, 192, 384)


def arm_of(curve: dict[int, float], *, seq_len: int = 512, seeds=(1, 2, 3), strategy="a", noise=0.0) -> Arm:
    """Runs whose mean losses are the curve's, shifted by seed, on targets of unlike hardness."""
    rng = np.random.default_rng(len(strategy))
    hard = rng.normal(0, 1, DOCUMENTS.size)
    hard -= hard.mean()
    runs = []
    for seed in seeds:
        arrays = {f"loss_{c}": level + hard + rng.normal(0, noise, hard.size) for c, level in curve.items()}
        runs.append(Run(Key(strategy, "independent", seed), "finished", dict(seq_len=seq_len), {}, (), arrays))
        arrays["document"] = DOCUMENTS
    return Arm(strategy, "independent", tuple(runs))


def entry_of(curve, **changes) -> dict:
    return context.analyse([arm_of(curve, **changes)])[0]


def test_a_curve_falls_by_its_slope_a_doubling():
    entry = entry_of({c: 5 - 0.1 * np.log2(c / 24) for c in GRID})
    assert entry["slope"]["mean"] == pytest.approx(0.1, abs=1e-6)
    assert entry["slope"]["low"] == pytest.approx(0.1, abs=1e-6) == pytest.approx(entry["slope"]["high"], abs=1e-6)
    gains = {(g["from"], g["to"]): g["mean"] for g in entry["gains"]}
    assert gains[24, 48] == pytest.approx(0.1, abs=1e-6) and gains[24, 384] == pytest.approx(0.4, abs=1e-6)
    assert entry["effective"]["mean"] == 384 and entry["effective"]["censored"]


@pytest.mark.parametrize("end", GRID)
def test_effective_context_is_where_the_curve_goes_flat(end):
    """Even where it rises afterwards, and where it gains less than the tolerance."""
    curve = {c: 5 - 0.2 * np.log2(min(c, end) / 24) - 0.001 * np.log2(c / 24) for c in GRID}
    entry = entry_of(curve, noise=0.001)
    assert entry["effective"]["mean"] == entry["effective"]["low"] == end
    assert entry["effective"]["censored"] == (end == GRID[-1])
    curve |= {768: 6.0}
    assert entry_of(curve, noise=0.001, seq_len=2048)["effective"]["mean"] == end


def test_what_claims_are_read_off_is_drawn_as_often_as_differences():
    """A slope between two contexts is half of a difference, to the last draw."""
    arm = arm_of({24: 4.0, 96: 3.8}, noise=0.5)
    (entry,) = context.analyse([arm])
    (gain,) = entry["gains"]
    ends = [entry["slope"][end] for end in ("mean", "low", "high")]
    assert ends == pytest.approx([gain[end] / 2 for end in ("mean", "low", "high")], abs=2e-6)


def test_what_ignores_context_has_a_flat_curve():
    entry = entry_of(dict.fromkeys(GRID, 4.0), noise=0.05)
    assert entry["effective"]["mean"] == 24 and not entry["effective"]["censored"]
    assert entry["slope"]["low"] < 0 < entry["slope"]["high"]
    assert not any(gain["shown"] for gain in entry["gains"])


def test_beyond_the_trained_length_is_in_the_curve_and_nowhere_else():
    curve = dict.fromkeys(GRID, 4.0) | {384: 9.0}
    entry = entry_of(curve, seq_len=256)
    assert {c["context"]: c["beyond"] for c in entry["curve"]} == {
        24: False,
        48: False,
        96: False,
        192: False,
        384: True,
    }
    assert entry["curve"][-1]["mean"] == pytest.approx(9.0)
    assert max(g["to"] for g in entry["gains"]) == 192 == entry["effective"]["longest"]


def test_a_context_is_within_the_trained_length_as_it_was_evaluated():
    """Windows of short runs of targets are shorter than 1.25 times the context: 96 fit in 100 where runs are of 4."""
    arm = arm_of({24: 4.0, 96: 4.0}, seq_len=100)
    assert [arm.within(c) for c in (80, 96)] == [True, False]
    arm.first["eval"] = {"contexts": {"80": {"beyond": True}, "96": {"beyond": False}}}
    assert [arm.within(c) for c in (80, 96)] == [False, True]


def test_the_difference_from_the_longest_strategy_is_paired():
    """Targets differ by a nat, documents too: the interval of a constant difference is nothing all the same."""
    short = arm_of(dict.fromkeys(GRID, 4.0), strategy="bb", seq_len=128)
    long = Arm("b", "independent", tuple(shifted(run, 0.5) for run in short.runs))
    found = context.analyse([short, long])
    assert found[1]["against"] is None and found[0]["against"]["strategy"] == "b"
    for place in found[0]["against"]["curve"]:
        assert place["mean"] == pytest.approx(-0.5, abs=1e-5)
        assert place["high"] - place["low"] < 1e-5


def shifted(run: Run, offset: float) -> Run:
    arrays = {n: a + offset if n.startswith("loss_") else a for n, a in run.arrays.items()}
    return Run(Key("b", "independent", run.key.seed), "finished", dict(seq_len=2048), {}, (), arrays)


def windows_of(length: int = 300, count: int = 9):
    """Losses that say their place: the log2 bin in the window, plus 10 times that in the document."""
    place_WT = (np.arange(count * length).reshape(count, length) * 7) % 513
    document_WT = np.arange(count * length).reshape(count, length) // 450
    seen_T = np.arange(1, length + 1)
    return np.log2(seen_T)[None].repeat(count, 0), document_WT, place_WT


def test_binned_windows_are_sums_over_counts_of_every_position():
    loss, document, place = windows_of()
    binned = context.bin_own(loss, document, place)
    assert binned["window_counts"].sum() == loss.size
    assert binned["window_sums"].sum() == pytest.approx(loss.sum(), rel=1e-5)
    assert binned["place_counts"].sum() == (place > 0).sum()  # the first token of a document has nothing before it
    assert binned["place_sums"].sum() == pytest.approx(loss[place > 0].sum(), rel=1e-5)
    for b in range(8):
        inside = np.floor(np.log2(np.arange(1, 301))) == b
        np.testing.assert_allclose(binned["window_sums"][:, b], loss[:, inside].sum(axis=1), rtol=1e-5)
        chosen = (place >= 2**b) & (place < 2 ** (b + 1))
        assert binned["place_counts"][:, b].sum() == chosen.sum()


def test_the_last_position_is_no_bin_of_its_own():
    loss, document, place = windows_of(length=256)
    assert context.bin_own(loss, document, place)["window_counts"].shape[1] == 8


def test_in_context_learning_is_the_late_loss_less_the_early():
    loss, document, place = windows_of(length=520, count=12)
    arrays = context.bin_own(loss, document, place)
    arm = arm_of(dict.fromkeys(GRID, 4.0))
    for run in arm.runs:
        run.arrays.update(arrays)
    (entry,) = context.analyse([arm])
    assert [(e["late"], e["early"]) for e in entry["icl"]] == [(500, 50), (200, 20), (100, 10)]
    for e in entry["icl"]:
        around = [np.log2(np.arange(p - 8, p + 9)).mean() for p in (e["late"], e["early"])]
        assert e["mean"] == pytest.approx(around[0] - around[1], abs=1e-5)
        assert e["low"] == pytest.approx(e["high"], abs=1e-5)
    assert [b["to"] for b in entry["window"]][:3] == [1, 3, 7]


def test_windows_of_one_text_are_no_sample():
    """As under the published protocol, where they overlap: a thousand of them would say that all is known."""
    loss, document, place = windows_of(length=520, count=12)
    arm = arm_of(dict.fromkeys(GRID, 4.0))
    for run in arm.runs:
        run.arrays.update(context.bin_own(loss, 0 * document, place))
    (entry,) = context.analyse([arm])
    assert {found["low"] for found in entry["icl"]} == {None}
    table = context_section.section({"context": [entry]}, {}).tables[1]
    assert "[no interval]" in table.rows[0][2] and "too few documents" in table.note


def test_a_short_window_has_the_places_that_fit():
    loss, document, place = windows_of(length=128)
    assert context.bin_own(loss, document, place)["icl_means"].shape == (9, 2)
    loss, document, place = windows_of(length=64)
    assert context.bin_own(loss, document, place)["icl_means"].shape == (9, 0)


def test_every_two_are_compared_at_their_longest_contexts_and_corrected_together():
    """Rivals that reach equally far too; all the same where none reaches farther than another."""
    arms = [arm_of(dict.fromkeys(GRID, 4.0 + i), strategy=n, seq_len=t, noise=1.0) for i, (n, t) in enumerate(REACH)]
    found = reach.analyse(arms, [24, 48, 96])["pairs"]
    assert [(p["a"], p["context_a"], p["b"], p["context_b"]) for p in found] == [
        ("short", 96, "long", 384), ("short", 96, "rival", 384), ("long", 384, "rival", 384),
    ]  # fmt: skip
    assert [p["p_holm"] for p in found] == [pytest.approx(p, abs=1e-6) for p in holm([p["p"] for p in found])]
    assert reach.analyse(arms[1:], [384])["pairs"] == []


REACH = [("short", 128), ("long", 512), ("rival", 512)]
