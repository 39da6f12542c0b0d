"""What an analysis says: differences on the same targets, corrected; who is ranked; the paragraph; every figure."""

import copy
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from research.analysis import (
    archive,
    claims,
    comparison,
    context,
    context_figures,
    context_section,
    decomposition,
    evidence,
    figures,
    findings,
    recall,
    tables,
)
from research.analysis.study import Arm, Key, Run
from research.analysis.style import styles_of
from research.config import ConfigError
from tests.fake_runs import MERITS, write_study


@functools.cache
def analysed(*settings: str, seeds: tuple[int, ...] = (42, 43, 44), same: bool = False) -> dict:
    """The analysis of fabricated runs; `same`: three strategies that do not differ."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {name: dict(offset=0.0, gain=0.02) for name in MERITS} if same else {}
        keys = write_study(Path(folder), seeds=seeds, settings=settings or ("independent",), **changes)
        return comparison.analyse(archive.collect(Path(folder), keys, {}))


def test_an_analysis_is_json_without_nan():
    text = json.dumps(analysed("independent", "paired", "recall"), allow_nan=False)
    assert json.loads(text)["shared_contexts"] == [24, 48, 96]


def test_differences_are_those_of_the_offsets():
    found = analysed("independent", "paired")["differences"]
    at = {(d["setting"], d["a"], d["b"]): d for d in found if d["context"] == 96}
    assert len(at) == 6
    for (setting, a, b), entry in at.items():
        share = 1 if setting == "independent" else 0.5
        # the longest rows are the same runs in both orders; 0.35 is added to the others in paired order
        offsets = {n: (0.35 if share == 0.5 and n != "long_seq" else 0) + MERITS[n]["offset"] * share for n in MERITS}
        offsets["long_seq"] = MERITS["long_seq"]["offset"]
        wanted = offsets[a] - 2 * MERITS[a]["gain"] - offsets[b] + 2 * MERITS[b]["gain"]
        assert entry["mean"] == pytest.approx(wanted, abs=0.06)
        assert entry["low"] < entry["mean"] < entry["high"] and entry["seeds"] == 3
        assert entry["shown"] == (entry["p_holm"] < context.LEVEL) and entry["p_holm"] >= entry["p"]


def test_p_values_are_those_of_holm_over_all_comparisons():
    found = analysed("independent", "paired")["differences"]
    smallest = min(d["p"] for d in found)
    assert min(d["p_holm"] for d in found) == pytest.approx(min(1, smallest * len(found)), rel=1e-3)


def test_a_pair_is_compared_where_all_of_both_orders_are(tmp_path):
    """Else, where short rows ran in paired order alone, no pair would be compared at the context that all share."""
    keys = write_study(tmp_path, seeds=(1, 2, 3), settings=("independent", "paired"))
    lost = {key.name: 3 for key in keys if key.strategy == "large_batch" and key.setting == "independent"}
    found = comparison.analyse(archive.collect(tmp_path, keys, lost))
    assert found["shared_contexts"] == [24, 48, 96]
    at = {d["context"] for d in found["differences"] if d["setting"] == "independent"}
    assert at == {96, 384} and "balanced has the lowest loss" in findings.as_list(found)
    assert "no difference" not in findings.same_targets(found)[0]


def test_the_paragraph_says_below_only_of_the_seeds_that_both_have():
    found = copy.deepcopy(analysed())
    arms = {arm["strategy"]: arm for arm in found["arms"]}
    arms["balanced"]["contexts"]["96"]["mean"] = 1.0  # by a seed that the others do not have
    said = findings.same_targets(found)[0]
    assert "balanced has the lowest loss" in said
    assert "above, over the seeds that both have, large_batch" in said and "below long_seq" in said
    found["differences"] = [d for d in found["differences"] if "large_batch" not in (d["a"], d["b"])]
    said = findings.same_targets(found)[0]
    assert "with large_batch it is not compared" in said and "no difference" not in said


def test_pairs_are_compared_at_the_longest_context_of_all_and_of_their_own():
    found = {(d["a"], d["b"]): set() for d in analysed()["differences"]}
    for d in analysed()["differences"]:
        found[d["a"], d["b"]].add(d["context"])
    assert found == {
        ("large_batch", "balanced"): {96},
        ("large_batch", "long_seq"): {96},
        ("balanced", "long_seq"): {96, 384},
    }


def test_equal_strategies_are_not_ranked():
    found = analysed(same=True)
    assert not any(d["shown"] for d in found["differences"])
    assert all(tables.verdict(d) != d["a"] and tables.verdict(d) != d["b"] for d in found["differences"])
    assert not any(r["shown"] for r in found["rankings"])
    assert "no difference from" in findings.as_list(found)


def test_beyond_the_trained_length_nothing_is_compared():
    arms = {arm["strategy"]: arm for arm in analysed()["arms"]}
    beyond = {name: [int(c) for c, e in arm["contexts"].items() if e["beyond"]] for name, arm in arms.items()}
    assert beyond == {"large_batch": [192, 384, 768, 1536], "balanced": [768, 1536], "long_seq": []}


def test_the_same_losses_in_other_units():
    found = analysed()
    arms = {arm["strategy"]: arm for arm in found["arms"]}
    rows = [row for row in tables.units_table(found).rows if row[0].split(",")[0] == "balanced"]
    assert [row[2] for row in rows] == ["96", "384"]  # what all share, and its own longest
    for row in rows:
        loss = arms["balanced"]["contexts"][row[2]]["mean"]
        assert row[3:] == (f"{loss:.3f}", f"{np.exp(loss):.2f}", f"{loss / 2.6:.4f}", "21.00%")


def test_a_unit_that_older_results_do_not_hold_is_a_dash(tmp_path):
    runs = archive.collect(tmp_path, write_study(tmp_path, seeds=(42,)), {})
    for run in runs:
        for scores in run.result["eval"]["contexts"].values():
            del scores["accuracy"]
            scores["bits_per_byte"] = None  # of targets without text
    found = json.loads(json.dumps(comparison.analyse(runs), allow_nan=False))
    older = copy.deepcopy(analysed())
    for arm in older["arms"]:
        del arm["accuracy"]
    assert {row[5:] for row in tables.units_table(found).rows} == {("–", "–")}
    table = tables.units_table(older)
    assert {row[6] for row in table.rows} == {"–"} and all("–" not in row[3:6] for row in table.rows)
    assert "–: not measured" in table.note and "not measured" not in tables.units_table(analysed()).note


def test_one_seed_is_said_to_be_one():
    found = analysed(seeds=(42,))
    assert all(d["seeds"] == 1 and d["sd"] is None for d in found["differences"])
    assert found["power"] == [] and any("One seed of" in warning for warning in found["warnings"])
    assert all(entry["sd"] is None for arm in found["arms"] for entry in arm["contexts"].values())


@pytest.mark.parametrize("seeds", [[42], [42, 43]])
def test_every_table_of_one_seed_says_that_no_interval_holds_it(seeds):
    found = copy.deepcopy(analysed("independent", "paired", "recall"))
    for entry in (*found["context"], *found["decomposition"], *found["recall"]):
        entry["seeds"] = seeds
    pair = dict(setting="independent", a="x", b="y", context_a=96, context_b=384, mean=0.1, low=0.0, high=0.2)
    found["reach"] = dict(pairs=[pair | dict(p_holm=0.5, shown=False, seeds=len(seeds))], gains=[])
    parts = [part.section(found) for part in (decomposition, recall)] + [context_section.section(found, {})]
    notes = [table.note for section in parts for table in section.tables]
    assert len(notes) == 1 + 2 + 3
    for note in notes:
        assert ("no interval holds the choice of it" in note) == (len(seeds) == 1)
        assert "seeds and" not in note or len(seeds) > 1


def test_that_some_have_one_seed_is_said():
    assert decomposition.sampled([1, 3]) == "95 %, seeds and documents; documents alone where there is one seed"


def test_a_missing_seed_is_a_warning_and_in_no_mean(tmp_path):
    keys = write_study(tmp_path, seeds=(1, 2, 3))
    runs = archive.collect(tmp_path, keys, {"balanced-independent-3": 3})
    found = comparison.analyse(runs)
    assert "balanced-independent-3 failed: exit code 3: it is in no mean." in found["warnings"]
    assert {arm["strategy"]: arm["seeds"] for arm in found["arms"]}["balanced"] == [1, 2]
    seeds = {(d["a"], d["b"]): d["seeds"] for d in found["differences"]}
    assert seeds["large_batch", "balanced"] == 2 and seeds["large_batch", "long_seq"] == 3


def test_a_loss_that_is_no_number_is_one_line_that_names_it(tmp_path):
    keys = write_study(tmp_path, seeds=(1,))
    path = tmp_path / keys[0].name / "heldout_losses.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["loss_96"][7] = np.nan
    np.savez(path, **arrays)
    with pytest.raises(ConfigError, match="heldout_losses.npz cannot be read .loss_96 holds a number that") as error:
        archive.collect(tmp_path, keys, {})
    assert keys[0].name in str(error.value) and "\n" not in str(error.value)


def arm_of(strategy: str, losses: dict[int, float]) -> Arm:
    """Runs by seed, of one loss each at context 96 and at own length."""
    runs = []
    for seed, loss in losses.items():
        arrays = {"loss_96": np.full(24, loss) + np.linspace(-1, 1, 24), "document": np.arange(24) // 3}
        result = dict(seq_len=512, eval=dict(own=dict(loss=loss), contexts={}))
        runs.append(Run(Key(strategy, "independent", seed), "finished", result, {}, (), arrays))
    return Arm(strategy, "independent", tuple(runs))


def test_a_difference_is_of_the_seeds_that_both_have():
    """Seeds move all strategies alike: by 10, 20 and 30 nats."""
    arms = [arm_of("a", {1: 10, 2: 20, 3: 30}), arm_of("b", {2: 20.5, 3: 30.7}), arm_of("c", {9: 0.0})]
    (entry,) = comparison.differences(arms, [96])
    assert (entry["a"], entry["b"], entry["seeds"]) == ("a", "b", 2)
    assert entry["mean"] == pytest.approx(-0.6) and entry["sd"] == pytest.approx(np.std([0.5, 0.7], ddof=1), abs=1e-6)


def test_a_ranking_is_shown_where_all_of_its_neighbours_differ():
    arms = [arm_of(name, {1: loss}) for name, loss in (("b", 2.0), ("a", 1.0), ("c", 3.0))]

    def shown(*pairs: bool) -> dict:
        compared = [
            dict(setting="independent", context=96, a=a, b=b, shown=s)
            for (a, b), s in zip(("ab", "cb"), pairs, strict=False)
        ]
        return {r["measure"]: r["shown"] for r in comparison.rankings(arms, [96], compared)}

    assert [r["order"] for r in comparison.rankings(arms, [96], [])] == [["a", "b", "c"]] * 2
    assert shown(True, True) == {"own": False, "96": True}  # lengths of their own are not compared
    assert shown(True, False) == shown(False, True) == shown() == {"own": False, "96": False}


def test_leaking_losses_are_marked_and_have_floors(tmp_path):
    keys = write_study(tmp_path, seeds=(1, 2), **{name: {"protocol": "published"} for name in MERITS})
    found = comparison.analyse(archive.collect(tmp_path, keys, {}))
    for arm in found["arms"]:
        windows = 2_900_000 - arm["seq_len"]
        assert arm["own"]["floor"] == pytest.approx((np.log(windows) - 6.6) / arm["seq_len"], abs=1e-6)
    assert findings.as_list(found).startswith("- **LEAKING")
    ours = [row for row in tables.original_section(found).tables[0].rows if row[1] == "this study"]
    assert all("LEAKING" in row[3] and row[4] != "–" for row in ours)
    assert all("LEAKING" in cell for row in tables.main_table(found).rows for cell in row[3:] if cell != "–")
    assert all("LEAKING" in cell for row in tables.units_table(found).rows for cell in row[3:])


def test_every_figure_of_leaking_losses_says_so(tmp_path):
    changes = {name: dict(protocol="published") for name in MERITS}
    keys = write_study(tmp_path, seeds=(42, 43), **changes)
    found = comparison.analyse(archive.collect(tmp_path, keys, {}))
    made = figures._figures(found, styles_of(list(MERITS)))
    assert {"curves", "places", "matrix", "budgets", "costs"} == set(made)
    for name, figure in made.items():
        below = figure.get_supxlabel()
        assert below.startswith("LEAKING") == (name != "costs"), name


def test_places_are_drawn_without_bands_where_windows_are_of_one_text():
    found = analysed()
    entries = [entry for entry in found["context"] if entry["setting"] == "independent"]
    with_bands = context_figures.places_figure(found, styles_of(list(MERITS)))
    assert [len(axes.collections) for axes in with_bands.axes] == [3, 3]
    known = [
        {**entry, "place": [], "window": [b | dict(low=None, high=None) for b in entry["window"]]} for entry in entries
    ]
    (alone,) = context_figures.places_figure(found | dict(context=known), styles_of(list(MERITS))).axes
    assert len(alone.lines) == 3 and not alone.collections
    nothing = found | dict(context=[entry | dict(place=[], window=[]) for entry in entries])
    assert context_figures.places_figure(nothing, styles_of(list(MERITS))) is None


def test_the_paragraph_says_what_the_numbers_say():
    text = findings.as_list(analysed("independent", "paired", "recall"))
    assert "large_batch has the lowest loss" in text and "below long_seq [" in text
    assert "Of the difference of -0.7" in text and "row length" in text and "diversity" in text
    assert "is not seen, neither" in text
    assert "Recalled at distances of 512 to 1,023 tokens (chance 3.1%" in text
    assert "in windows of the trained length: large_batch 2% (" in text and "long_seq 100% (" in text
    assert "balanced gains 0." in text


def test_who_gains_from_context_is_asked_of_the_order_that_claims_are_judged_in():
    found = copy.deepcopy(analysed("independent", "paired", "recall"))
    for entry in found["context"]:
        for gain in entry["gains"]:
            gain["mean"] = 0.01 if entry["setting"] == "independent" else 0.5
    assert "no strategy gains" in findings.as_list(found) and evidence.little_context(found)
    for entry in found["context"]:
        for gain in entry["gains"]:
            gain["mean"] = 0.5 if entry["setting"] == "independent" else 0.01
    assert "no strategy gains" not in findings.as_list(found) and not evidence.little_context(found)


@pytest.mark.parametrize("first", ["large_batch", "long_seq"])
def test_the_ends_of_a_distance_rise_whoever_is_named_first(first):
    found = copy.deepcopy(analysed("independent", "paired", "recall"))
    (entry,) = [
        d
        for d in found["differences"]
        if d["setting"] == "independent" and {d["a"], d["b"]} == {"large_batch", "long_seq"}
    ]
    if entry["a"] != first:
        entry |= evidence.turned(entry)
    near, far = sorted(abs(entry[end]) for end in ("low", "high"))
    assert near < far
    assert f"{abs(entry['mean']):.3f} below long_seq [{near:.3f}, {far:.3f}]" in findings.same_targets(found)[0]


def test_paired_runs_alone_are_not_said_to_share_nothing():
    found = analysed("paired")
    assert findings.as_list(found).startswith("- No run is in independent order")
    assert all("one strategy alone" not in verdict.evidence for verdict in claims.verdicts({"analysis": found}))


@pytest.mark.parametrize("settings", [("independent",), ("independent", "paired", "recall"), ("recall",)])
def test_every_figure_is_drawn_from_the_analysis_alone(tmp_path, settings):
    drawn = figures.draw(json.loads(json.dumps(analysed(*settings))), tmp_path)
    wanted = {"curves", "places", "matrix", "costs", "budgets"} if "independent" in settings else set()
    wanted |= {"decomposition"} if "paired" in settings else set()
    wanted |= {"recall"} if "recall" in settings else set()
    assert set(drawn) == wanted
    for name in wanted:
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and (tmp_path / f"{name}.svg").exists()


def test_the_same_numbers_give_the_same_files(tmp_path):
    found = analysed("independent", "paired")
    for name in ("one", "two"):
        figures.draw(found, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
