"""What is said of shapes was measured: differences are those of the runs, verdicts follow from them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import shapes as script
from research.analysis import evidence, shapes, shapes_claims, shapes_figure, shapes_findings, shapes_report
from research.analysis.runs import DIVERGED_CODE
from research.analysis.statistics import holm
from research.analysis.style import by_length, styles_of
from tests.fake_shapes import FEW_STEPS, LENGTH, ROWS, SHAPES, STEPS, name_of, results_of, study


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("shapes")
    assert study(workdir) == 0
    return workdir


def differences(found: dict, budget: str, kind: str) -> dict[tuple[str, str], dict]:
    return {(p["a"], p["b"]): p for p in shapes_claims.of_kind(found, budget, kind)}


def test_differences_are_those_of_the_runs(finished):
    """Against the law of the fakes: at equal steps more rows help; at equal tokens the lost steps come off that."""
    found = results_of(finished)["analysis"]
    laws = {
        ("steps", "rows"): -ROWS, ("tokens", "rows"): FEW_STEPS - ROWS, ("steps", "length"): LENGTH,
        ("tokens", "length"): LENGTH + FEW_STEPS, ("steps", "cut"): -ROWS - LENGTH, ("tokens", "cut"): -ROWS - LENGTH,
    }  # fmt: skip
    for (budget, kind), law in laws.items():
        for pair in differences(found, budget, kind).values():
            assert pair["mean"] == pytest.approx(law, abs=0.05)
            assert pair["low"] < pair["mean"] < pair["high"]
            assert pair["high"] - pair["low"] < 0.2
            assert pair["seeds"] == [43, 44, 45]


def test_only_neighbours_that_differ_in_one_thing_are_compared(finished):
    found = results_of(finished)["analysis"]
    for budget in shapes.BUDGETS:
        assert set(differences(found, budget, "rows")) == {
            ("32x128", "8x128"), ("128x128", "32x128"), ("8x512", "2x512"), ("32x512", "8x512")
        }  # fmt: skip
        assert set(differences(found, budget, "length")) == {("8x512", "8x128"), ("32x512", "32x128")}
        assert set(differences(found, budget, "cut")) == {
            ("8x128", "2x512"),
            ("32x128", "8x512"),
            ("128x128", "32x512"),
        }


def test_holm_is_over_the_pairs_of_one_kind_and_budget(finished):
    found = results_of(finished)["analysis"]
    families = [shapes_claims.of_kind(found, budget, kind) for budget in shapes.BUDGETS for kind in shapes_report.KINDS]
    for pairs in families:
        assert len(pairs) > 1
        assert [p["p_holm"] for p in pairs] == pytest.approx(holm([p["p"] for p in pairs]), abs=5e-6)


def test_a_choice_is_between_more_rows_and_longer_ones_from_one_shape(finished):
    found = results_of(finished)["analysis"]
    for budget in shapes.BUDGETS:
        chosen = [(c["from"], c["more_rows"], c["longer"]) for c in found["choices"] if c["budget"] == budget]
        assert chosen == [("8x128", "32x128", "8x512"), ("32x128", "128x128", "32x512")]
    for choice in found["choices"]:
        assert choice["times"] == 4
        assert choice["rows"]["mean"] - choice["length"]["mean"] == pytest.approx(choice["cut"]["mean"], abs=1e-5)


@pytest.mark.parametrize(
    ("lengths", "sizes", "ways"),
    [
        ((256, 1024), (4096, 8192, 16384), [("16x256", 4, "64x256", "16x1024")]),
        ((128, 256, 512), (2048, 8192), [("16x128", 4, "64x128", "16x512")]),
        ((128, 512), (1024, 4096), [("8x128", 4, "32x128", "8x512")]),
        ((128,), (1024, 4096), []),
        ((128, 512), (1024, 2048), []),
        ((128, 256, 512), (1024, 2048, 4096),
         [("8x128", 2, "16x128", "8x256"), ("16x128", 2, "32x128", "16x256"), ("4x256", 2, "8x256", "4x512"),
          ("8x256", 2, "16x256", "8x512")]),
    ],
)  # fmt: skip
def test_ways_to_a_larger_step_need_no_neighbours(lengths, sizes, ways):
    assert shapes.ways([f"{size // length}x{length}" for length in lengths for size in sizes]) == ways


def test_what_is_compared_is_of_the_seeds_that_all_shapes_have(tmp_path):
    """Else rows minus length would not be their difference, nor means what differences are of."""
    lost = [name_of("8x128", "tokens", 43), name_of("32x128", "tokens", 44)]
    assert study(tmp_path, exits=dict.fromkeys(lost, DIVERGED_CODE)) == 0
    found = results_of(tmp_path)["analysis"]
    assert found["seeds"] == {"tokens": [45], "steps": [43, 44, 45]}
    means = {shape["shape"]: shape["at"]["tokens"]["mean"] for shape in found["shapes"]}
    assert found["lowest"]["tokens"]["a"] == min(means, key=means.__getitem__)
    assert shapes_findings.findings(results_of(tmp_path))[0].startswith("Of 1 seed: ")
    choice = found["choices"][0]
    assert [choice[leg]["seeds"] for leg in ("rows", "length", "cut")] == [[45]] * 3
    assert choice["rows"]["mean"] - choice["length"]["mean"] == pytest.approx(choice["cut"]["mean"], abs=1e-5)


def test_largest_steps_are_the_same_runs_at_both_budgets(finished):
    found = {shape["shape"]: shape["at"] for shape in results_of(finished)["analysis"]["shapes"]}
    for shape, at in found.items():
        rows, length = shapes.sizes(shape)
        assert (at["tokens"] == at["steps"]) == (rows * length == 16_384)
        assert (at["tokens"]["tokens"], at["steps"]["tokens"]) == (65_536, STEPS * rows * length)


def test_ways_that_are_no_neighbours_are_compared_and_corrected_with_them(tmp_path):
    assert study(tmp_path, "--lengths=128,512", "--tokens_per_step=1024,2048,4096") == 0
    found = results_of(tmp_path)["analysis"]
    assert ("32x128", "8x128") in differences(found, "tokens", "rows")
    for choice in found["choices"]:
        for leg in ("rows", "length", "cut"):
            assert choice[leg] in found["pairs"]
    assert [(c["from"], c["more_rows"], c["longer"]) for c in found["choices"]] == 2 * [("8x128", "32x128", "8x512")]


def test_losses_are_means_over_seeds(finished):
    results = results_of(finished)
    names = [name_of("8x128", "tokens", seed) for seed in (43, 44, 45)]
    with np.load(finished / "report" / "heldout_losses.npz") as file:
        each = [file[f"{name}/loss"].astype(np.float64).mean() for name in names]
    at = results["analysis"]["shapes"][0]["at"]["tokens"]
    assert at["by_seed"] == pytest.approx(each, abs=1e-6)
    assert at["mean"] == pytest.approx(np.mean(each), abs=1e-6)
    assert at["sd"] == pytest.approx(np.std(each, ddof=1), abs=1e-6)
    runs = {run["name"]: run["result"] for run in results["runs"]}
    own = [runs[name]["eval"]["contexts"]["96"]["loss"] for name in names]
    assert (at["reach"]["context"], at["reach"]["mean"]) == (96, pytest.approx(np.mean(own), abs=1e-6))
    longer = next(s for s in results["analysis"]["shapes"] if s["shape"] == "8x512")
    assert longer["at"]["tokens"]["reach"]["context"] == 384


def test_findings_say_what_the_numbers_say(finished):
    said = shapes_findings.findings(results_of(finished))
    assert said[0].startswith("After 65,536 tokens 128x128 has the lowest loss, ")
    assert "; next is 32x128 with " in said[0]
    assert said[1].startswith(
        "At equal tokens, 4 times as many tokens per step, in rows or in length, change the loss by "
    )
    assert said[1].endswith("Of these 2 choices more rows are lower in 2.")
    assert said[2].startswith("After 4 steps 128x128 has the lowest loss, ")
    assert said[2].endswith(" (runs of 65,536 and 16,384 tokens).")
    assert " by -0.3" in said[3]
    assert said[4].endswith("more and shorter rows are lower in 3.")
    assert said[5] == (
        "Of the 2 pairs of shapes of as many tokens per step, the largest apart, at equal steps, more and shorter rows "
        "are lower in 2."
    )
    assert said[6].startswith("Best learning rates at equal tokens: of 1,024 tokens per step 8x128 0.02, 2x512 0.02; ")
    assert said[7].startswith("Best learning rates at equal steps: of 1,024 tokens per step 8x128 0.04, 2x512 0.04; ")


def test_a_tally_tells_lower_higher_and_neither_apart():
    pairs = [entry(-0.1), entry(-0.2), entry(0.1), entry(0.1, shown=False)]
    assert shapes_findings._tally(pairs) == "2, higher in 1, not shown to differ in 1"
    assert shapes_findings._tally(pairs[:2]) == "2"


def test_the_lowest_is_said_to_be_so_only_where_it_is_shown(finished):
    results = results_of(finished)
    pair = results["analysis"]["lowest"]["tokens"]
    assert (pair["a"], pair["b"], pair["shown"]) == ("128x128", "32x128", True)
    pair["shown"] = False
    assert "no difference is shown" in shapes_findings.findings(results)[0]


def test_report_has_every_shape_figure_and_verdict(finished):
    text = (finished / "report" / "report.md").read_text()
    for shape in SHAPES:
        assert f"\n| {shape} | " in text
    assert "figures/shapes.png" in text
    assert "A large batch makes slower progress a step" in text
    assert "## Warnings" not in text
    assert "None" not in text


def test_one_length_has_no_choice_and_says_none(tmp_path):
    assert study(tmp_path, "--lengths=128") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "More rows, or longer ones?" not in text
    assert "longer" not in shapes_findings.findings(results_of(tmp_path))[0]


def test_one_seed_judges_nothing(tmp_path):
    assert study(tmp_path, "--seeds=43") == 0
    found = results_of(tmp_path)["analysis"]
    for rule in (shapes_claims.progress, shapes_claims.explores):
        verdict, text = rule(found)
        assert verdict == evidence.UNTESTED
        assert "Not all are shown by 3 seeds" in text


def test_report_is_made_again_of_its_own_files(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished / "report", folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "report.md").unlink()
    assert script.main([f"--workdir={folder}", "--report_only"]) == 0
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_length_has_one_colour_in_both_panels_and_the_legend(finished, tmp_path, monkeypatch):
    """Where a panel lacks the first length too."""
    results = results_of(finished)
    for shape in results["analysis"]["shapes"]:
        if shape["seq_len"] == 128:
            shape["at"]["tokens"] = None
    kept: list[Figure] = []
    monkeypatch.setattr(shapes_figure, "save", lambda figure, folder, name: kept.append(figure))
    shapes_figure.draw(results, tmp_path)
    colors = by_length([128, 512])
    for axes in kept[0].axes:
        for line in axes.get_lines():
            if line.get_label().startswith("rows of"):
                length = int(line.get_label().split()[2])
                assert line.get_color() == colors[length]["color"]
    assert [text.get_text() for text in kept[0].legends[0].get_texts()] == ["rows of 128 tokens", "rows of 512 tokens"]


def test_three_lengths_look_as_the_strategies_that_have_such_rows():
    known = styles_of(["large_batch", "balanced", "long_seq"])
    assert list(by_length([512, 2048, 128]).values()) == list(known.values())
    assert len({json.dumps(style) for style in by_length(range(1, 7)).values()}) == 6


def entry(mean: float = -0.2, shown: bool = True, seeds: int = 3, **fields) -> dict:
    about = dict(budget="steps", kind="rows", a="4x8", b="1x8", mean=mean, low=mean - 0.1, high=mean + 0.1, shown=shown)
    return about | {"seeds": list(range(seeds))} | fields


def found_of(pairs: list[dict], inside: bool = True, passes: float | None = 0.4) -> dict:
    at = {"steps": {"steps": 40}}
    shapes_ = [
        {"shape": name, "at": at, "rates": {budget: {"inside": inside or name == "4x8"} for budget in shapes.BUDGETS}}
        for name in ("1x8", "4x8")
    ]
    return {"pairs": pairs, "shapes": shapes_, "passes": passes}


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ([entry(), entry()], evidence.FAILS),
        ([entry(0.2), entry(0.2)], evidence.HOLDS),
        ([entry(), entry(0.2)], evidence.CONDITIONS),
        ([entry(), entry(0.2), entry(shown=False)], evidence.CONDITIONS),
        ([entry(), entry(shown=False)], evidence.UNTESTED),
        ([entry(0.2), entry(shown=False)], evidence.UNTESTED),
        ([entry(shown=False)], evidence.UNTESTED),
        ([entry(seeds=2)], evidence.UNTESTED),
        ([entry(budget="tokens")], evidence.UNTESTED),
        ([entry(kind="cut")], evidence.UNTESTED),
    ],
)
def test_progress_and_noise_are_judged_at_equal_steps_by_rows_alone(pairs, verdict):
    assert shapes_claims.progress(found_of(pairs))[0] == verdict
    assert shapes_claims.explores(found_of(pairs))[0] == verdict


def test_who_is_behind_at_a_rate_on_the_edge_is_not_judged():
    assert shapes_claims.progress(found_of([entry()], inside=False))[0] == evidence.UNTESTED  # fewer rows are behind
    assert shapes_claims.progress(found_of([entry(0.2)], inside=False))[0] == evidence.HOLDS  # more rows are


def test_what_more_steps_are_worth_is_said_only_where_fewer_rows_are_ahead_at_equal_tokens():
    said = "is what more steps are worth, not noise"
    assert said in shapes_claims.explores(found_of([entry(), entry(0.1, budget="tokens")]))[1]
    assert said not in shapes_claims.explores(found_of([entry(), entry(-0.1, budget="tokens")]))[1]
    assert said not in shapes_claims.explores(found_of([entry(), entry(0.1, shown=False, budget="tokens")]))[1]
    assert said not in shapes_claims.explores(found_of([entry(), entry(0.1, seeds=2, budget="tokens")]))[1]
    assert said not in shapes_claims.explores(found_of([entry()]))[1]
    assert "After as many steps, 40, in nats" in shapes_claims.progress(found_of([entry()]))[1]


@pytest.mark.parametrize(("passes", "said"), [(0.4, True), (1.0, True), (1.1, False), (None, False)])
def test_that_rows_differ_in_noise_alone_is_said_within_one_pass(passes, said):
    text = shapes_claims.explores(found_of([entry()], passes=passes))[1]
    assert ("change nothing but the noise" in text) is said
    text = shapes_claims.explores(found_of([entry(budget="tokens")], passes=passes))[1]
    assert "change nothing but the noise" not in text  # none was trained for as many steps


def memories(*bytes_: float, devices: tuple[int, ...] = (2, 2, 2)) -> dict:
    every = zip((1, 2, 4), bytes_, devices, strict=True)
    return {
        "shapes": [
            {"shape": f"{rows}x8", "seq_len": 8, "batch_size": rows, "memory_bytes": size, "devices": count}
            for rows, size, count in every
        ]
    }


@pytest.mark.parametrize(
    ("bytes_", "verdict"),
    [
        ((1e8, 2e8, 4e8), evidence.HOLDS), ((1e8, 1.5e8, 2e8), evidence.CONDITIONS),
        ((1e8, 1e8, 1e8), evidence.FAILS), ((1e8, 1e9, 1e10), evidence.CONDITIONS),
    ],
)  # fmt: skip
def test_memory_is_judged_by_the_growth_a_doubling(bytes_, verdict):
    judged = shapes_claims.memory_of_batch(memories(*bytes_))
    assert judged[0] == verdict
    assert f"1x8 to 4x8 {(bytes_[-1] / bytes_[0]) ** 0.5:.2f} times a doubling" in judged[1]


def test_memory_is_compared_on_as_many_devices():
    """A CPU's step of one row runs on one of its devices, without a second copy of parameters."""
    judged = shapes_claims.memory_of_batch(memories(1e8, 3e8, 6e8, devices=(1, 2, 2)))
    assert judged[0] == evidence.HOLDS
    assert "2x8 to 4x8 2.00 times" in judged[1]
    assert "1x8" not in judged[1]
    assert shapes_claims.memory_of_batch(memories(1e8, 3e8, 6e8, devices=(1, 2, 4)))[0] == evidence.UNTESTED


def test_verdicts_are_of_the_three_claims_of_the_batch(finished):
    found = shapes_claims.verdicts(results_of(finished)["analysis"])
    assert [v.verdict for v in found] == [evidence.FAILS, evidence.FAILS, evidence.CONDITIONS]
