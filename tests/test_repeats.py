"""How far back a target's pair of tokens was last seen, what far context is worth there, and what claims make of it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.analysis import archive, repeats
from research.analysis.study import Arm, Key, Run
from research.data import heldout
from research.data.heldout import Targets
from tests.fake_analysis import analysis, band, evidence_on, verdict_on
from tests.numbered import FEW

DOCUMENTS = np.arange(12, dtype=np.int32).repeat(20)
# of each document's targets: 5 near (a pair 50 back), 5 far (500), 5 never, 5 between what is seen for sure and never
REPEAT = np.tile(np.array([50, 500, 0, 100], np.int32).repeat(5), 12)


@FEW
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 6))
def test_a_pair_is_sought_backwards_in_its_own_document(seed, vocab):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 40, 4)
    starts = np.cumsum([0, *lengths[:-1]])
    heldout_N = rng.integers(0, vocab, lengths.sum()).astype(np.uint16)
    places = [(d, int(s) + i) for d, (s, n) in enumerate(zip(starts, lengths, strict=True)) for i in range(1, n)]
    chosen = sorted(rng.choice(len(places), min(25, len(places)), replace=False).tolist())
    documents, positions = (np.array(x) for x in zip(*(places[i] for i in chosen), strict=True))
    corpus = SimpleNamespace(heldout=heldout_N, heldout_starts=starts)
    found = heldout.repeats(Targets(positions, documents.astype(np.int32), 1), corpus)

    def wanted(document: int, position: int) -> int:
        pair = heldout_N[position - 1 : position + 1].tolist()
        for back in range(1, position - int(starts[document])):
            if heldout_N[position - back - 1 : position - back + 1].tolist() == pair:
                return back
        return 0

    assert found.tolist() == [wanted(d, p) for d, p in zip(documents, positions, strict=True)]
    assert found.dtype == np.int32


def test_targets_between_what_is_surely_seen_and_surely_not_are_in_no_group():
    found = repeats.groups_of(np.array([0, 1, 96, 97, 119, 120, 384, 385, 479, 480, 9999]), 96, 384)
    assert {name: np.flatnonzero(chosen).tolist() for name, chosen in found.items()} == {
        "near": [1, 2], "far": [5, 6], "elsewhere": [0, 9, 10],
    }  # fmt: skip


def arm_of(name: str, reach: int, far_gain: float = 0.0, offset: float = 0.0, seeds=(1, 2, 3), repeat=None) -> Arm:
    """Losses of about 4 nats, `offset` more; from context 96 to longer ones `far_gain` less where the pair is far."""
    runs = []
    for seed in seeds:
        rng = np.random.default_rng(seed + 100 * len(name))
        base = 4 + offset + rng.normal(0, 0.05, REPEAT.size) + rng.normal(0, 0.01)
        arrays = {"loss_96": base.astype(np.float32), "document": DOCUMENTS, "position": np.arange(REPEAT.size)}
        for context in (384, 1536):
            arrays[f"loss_{context}"] = (base - far_gain * (REPEAT == 500)).astype(np.float32)
        if repeat is not None and seed == seeds[-1]:
            arrays["repeat"] = repeat
        contexts = {str(c): dict(beyond=c > reach) for c in (96, 384, 1536)}
        runs.append(Run(Key(name, "independent", seed), "finished", dict(eval=dict(contexts=contexts)), {}, (), arrays))
    return Arm(name, "independent", tuple(runs))


def test_gains_are_told_apart_by_where_the_pair_was_seen():
    arms = [arm_of("short", 96), arm_of("long", 1536, far_gain=0.5, offset=0.2, repeat=REPEAT)]
    (found,) = repeats.analyse(arms, [96])
    assert (found["strategy"], found["from"], found["to"]) == ("long", 96, 1536)
    groups = found["groups"]
    assert groups["far"]["mean"] == pytest.approx(0.5, abs=1e-6) and groups["far"]["shown"]
    assert groups["near"]["mean"] == groups["elsewhere"]["mean"] == 0
    assert [groups[name]["share"] for name in repeats.GROUPS] == [0.25, 0.25, 0.25]
    assert groups["far"]["loss"] == pytest.approx(4.2, abs=0.03)
    (pair,) = found["against"]  # on the far ones alone: 0.2 worse, 0.5 gained
    assert (pair["a"], pair["b"], pair["context_a"], pair["context_b"]) == ("long", "short", 1536, 96)
    assert pair["mean"] == pytest.approx(-0.3, abs=0.04) and pair["shown"] and pair["targets"] == 60


def test_without_the_places_of_pairs_nothing_is_said():
    arms = [arm_of("short", 96), arm_of("long", 1536, far_gain=0.5)]
    assert repeats.analyse(arms, [96]) == [] and repeats.analyse([], []) == []
    assert repeats.tables({}) == [] and repeats.findings({}) == []
    alone = repeats.analyse([arm_of("long", 1536, repeat=np.zeros_like(REPEAT))], [96])
    assert alone[0]["against"] == [] and alone[0]["groups"]["far"] == dict(share=0.0)
    (table,) = repeats.tables({"repeats": alone})
    assert table.rows[0][4] == "no target"


def test_findings_and_tables_say_what_was_gained_where():
    arms = [arm_of("short", 96), arm_of("long", 1536, far_gain=0.5, repeat=REPEAT)]
    found = {"repeats": repeats.analyse(arms, [96])}
    (said,) = repeats.findings(found)
    assert "long gains 0.500 [0.500, 0.500] from 96 to 1,536 on the 25.0% of targets whose pair was last" in said
    gains, pairs = repeats.tables(found)
    assert gains.rows[0][:3] == ("long", "independent", "96 to 1,536") and gains.rows[0][4].startswith("+0.500 [")
    assert pairs.rows[0][1:3] == ("long at 1,536", "short at 96")
    none = {"repeats": repeats.analyse([arms[0], arm_of("long", 1536, repeat=REPEAT)], [96])}
    assert repeats.findings(none) == []


def test_the_places_of_pairs_are_kept_once_a_study(tmp_path):
    """They are of the targets, which all runs on text share; a run of before they were measured takes nothing away."""
    about = dict(fingerprint="f", protocol="clean")
    arms = [arm_of("short", 96), arm_of("long", 1536, repeat=REPEAT), arm_of("other", 384, repeat=REPEAT)]
    runs = [run for arm in arms for run in arm.runs]
    runs = [Run(run.key, run.status, run.result | about, {}, (), run.arrays) for run in runs]
    archive.save(runs, tmp_path)
    with np.load(tmp_path / "heldout_losses.npz") as file:
        assert [name for name in file if name.endswith("/repeat")] == ["long-independent-3/repeat"]
    kept = [run.arrays["repeat"] for run in archive.load(tmp_path) if "repeat" in run.arrays]
    assert len(kept) == 1 and kept[0].tolist() == REPEAT.tolist()


# Claims


def with_repeats(gain=0.3, against=0.2, width=0.05, **changes) -> dict:
    """An analysis of which the long rows gain so much where pairs are far, and are there so much above the others."""
    found = analysis(**changes)
    pairs = [
        dict(a="long_seq", b=b, context_a=1536, context_b=c, shown=abs(against) > width) | band(against, width)
        for b, c in (("large_batch", 96), ("balanced", 384))
    ]
    groups = dict(far=dict(share=0.2) | band(gain, width), near=dict(share=0.3), elsewhere=dict(share=0.4))
    entry = {"strategy": "long_seq", "setting": "independent", "from": 96, "to": 1536, "groups": groups}
    return found | dict(repeats=[entry | dict(against=pairs)])


RECALLS = {"large_batch": (0.9, 0.07, 0.06), "balanced": (0.9, 0.9, 0.07), "long_seq": (0.9, 0.9, 0.8)}


@pytest.mark.parametrize(
    ("words", "changes", "verdict"),
    [
        ("long-range dependencies", dict(beyond=0.0), "holds under conditions"),
        ("long-range dependencies", dict(beyond=0.05), "holds under conditions"),
        ("long-range dependencies", dict(beyond=0.05, recall=RECALLS), "holds"),
        ("long-range dependencies", dict(gain=-0.1, beyond=0.05, recall=RECALLS), "holds under conditions"),
        ("long-range dependencies", dict(gain=0.0, beyond=0.05, recall=RECALLS), "holds under conditions"),  # undecided
        ("whole story", dict(against=-0.2), "holds"),
        ("whole story", dict(against=0.2), "does not hold"),  # recall by other models could not turn it
        ("whole story", dict(against=0.0), "not tested"),
        ("whole story", dict(against=0.2, recall=RECALLS), "does not hold"),
        ("whole story", dict(against=0.0, recall=RECALLS), "not tested"),
        ("deep contextual", dict(against=-0.2), "holds under conditions"),
        ("deep contextual", dict(against=0.2, recall=RECALLS), "does not hold"),
        ("deep contextual", dict(against=0.0, recall=RECALLS), "not tested"),
    ],
)
def test_claims_of_far_context_read_where_pairs_are_far(words, changes, verdict):
    overall = dict(changes)
    far = {name: overall.pop(name) for name in ("gain", "against") if name in overall}
    found = with_repeats(**far, **overall)
    assert verdict_on(words, found) == verdict
    if "long-range" not in words:
        assert "last seen too far back" in evidence_on(words, found)


def test_the_price_of_the_longest_rows_is_not_paid_for_what_others_gain():
    """The middle one alone is ahead where pairs are far: loss does not tell it all, and long rows are not worth it."""
    found = with_repeats(against=0.2, recall=RECALLS)
    middle = dict(a="balanced", b="large_batch", context_a=384, context_b=96, shown=True) | band(-0.2, 0.05)
    found["repeats"].append(found["repeats"][0] | dict(strategy="balanced", to=384, against=[middle]))
    assert verdict_on("whole story", found) == "holds" and verdict_on("deep contextual", found) == "does not hold"


def test_rows_that_grow_are_left_out_of_the_pairs_too():
    found = with_repeats(against=0.2)
    found["repeats"][0]["against"].append(dict(a="long_seq", b="growing", shown=True) | band(-9, 0.1))
    found["repeats"].append(found["repeats"][0] | dict(strategy="growing"))
    arm = next(arm for arm in found["arms"] if arm["strategy"] == "long_seq")
    found["arms"].append(arm | dict(strategy="growing", stages=[dict(seq_len=128, batch_size=64), dict(arm)]))
    for words in ("whole story", "long-range dependencies", "deep contextual"):
        assert "growing" not in evidence_on(words, found)
    assert len(list(itertools.chain(*(e["against"] for e in found["repeats"])))) == 6  # what it was given stays
