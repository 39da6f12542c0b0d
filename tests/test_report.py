"""The report says what the numbers say, marks what leaks, and is made again from small files."""

import itertools
import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from research.analysis import comparison, figures, findings, report, study
from research.analysis.original import ORIGINAL, leak_floor
from research.analysis.style import LOOK, styles_of
from research.config import ConfigError
from tests.fake_runs import CONTEXTS, losses_at, write_run, write_study

STRATEGIES = ("balanced", "long_seq", "large_batch")
DATA_FILES = ("results.json", "curves.csv", "heldout_losses.npz")


def report_of(workdir: Path, strategies=STRATEGIES, exit_codes=()) -> tuple[str, dict]:
    """Gathers the runs of `workdir`, writes the report; its text and its comparison."""
    folder = workdir / "report"
    study.save(study.collect(workdir, strategies, dict(exit_codes)), folder)
    results = report.write(folder)
    return (folder / "report.md").read_text(), results["comparison"]


def found_in(text: str) -> str:
    """The paragraph of findings."""
    return text.split("## Findings\n\n")[1].split("\n\n")[0]


def test_a_report_is_made_again_from_its_data_files_byte_for_byte(tmp_path):
    write_study(tmp_path)
    report_of(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    for name in DATA_FILES:
        (again / name).write_bytes((tmp_path / "report" / name).read_bytes())
    report.write(again)
    made = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert {p.stem for p in made} == {"loss", "context", "cost", "report"} | {Path(name).stem for name in DATA_FILES}
    for path in made:
        assert (again / path).read_bytes() == (tmp_path / "report" / path).read_bytes(), path


def test_what_is_read_back_is_what_was_gathered(tmp_path):
    write_study(tmp_path)
    runs = study.collect(tmp_path, STRATEGIES, {})
    study.save(runs, tmp_path / "report")
    for before, after in zip(runs, study.load(tmp_path / "report"), strict=True):
        assert (after.strategy, after.status) == (before.strategy, "finished")
        assert after.result == before.result and after.config == before.config
        np.testing.assert_array_equal(after.positions, before.positions)
        np.testing.assert_array_equal(after.documents, before.documents)
        assert after.losses.keys() == before.losses.keys()
        for context, losses in before.losses.items():
            np.testing.assert_array_equal(after.losses[context], losses)
        for old, new in zip(before.curve, after.curve, strict=True):
            assert new == pytest.approx(old, rel=1e-6)


def test_differences_are_those_of_the_losses_on_the_same_targets(tmp_path):
    write_study(tmp_path)
    _, compared = report_of(tmp_path)
    pairs = {(d["a"], d["b"], d["context"]): d for d in compared["differences"]}
    assert set(pairs) == {
        *((a, b, c) for a, b in itertools.combinations(STRATEGIES, 2) for c in (24, 96)),
        ("balanced", "long_seq", 384),  # beyond the length of large_batch
    }
    balanced, long_seq = losses_at(0.06, 0.07, 1), losses_at(0.13, 0.11, 2)
    for context in (24, 96, 384):
        difference = pairs["balanced", "long_seq", context]
        expected = balanced[context].mean(dtype=float) - long_seq[context].mean(dtype=float)
        assert difference["mean"] == pytest.approx(expected, abs=1e-6)
        assert difference["low"] < expected < difference["high"]
        assert difference["targets"] == balanced[context].size


@pytest.mark.parametrize("best", STRATEGIES)
def test_the_winner_is_selected_by_the_numbers(tmp_path, best):
    changes = {s: {"offset": 0.0 if s == best else 0.2, "gain": 0.05} for s in STRATEGIES}
    write_study(tmp_path, **changes)
    text, _ = report_of(tmp_path)
    clauses = found_in(text).split("At equal train seconds")[0].split(";")
    for context in (24, 96):
        said = f"{best} is lowest at {context} tokens of context ("
        (clause,) = [clause for clause in clauses if said in clause]
        assert " below " in clause  # the next one, shown
        verdicts = re.findall(rf"^\| {context} \|.*\| (\w+) \| 24 \|$", text, re.M)
        assert verdicts.count(best) == 2  # against each other strategy


def test_no_difference_is_claimed_where_none_is_shown(tmp_path):
    write_study(tmp_path, **{s: {"offset": 0.0, "gain": 0.05} for s in STRATEGIES})
    text, compared = report_of(tmp_path)
    table = text.split("## Differences")[1].split("## Does")[0]
    shown = [d["shown"] for d in compared["differences"]]
    assert table.count("no difference shown") == shown.count(False) >= 5
    assert "no difference shown from" in found_in(text)
    assert "covers the choice of held-out documents, not the seed" in table


@pytest.mark.parametrize(
    "gain, says, table",
    [
        (0.1, "helps balanced", "| yes |"),
        (-0.1, "hurts balanced", "| no, it hurts |"),
        (0.0, "is not shown to help balanced", "| no difference shown |"),
    ],
)
def test_a_longer_context_is_judged_within_each_strategy(tmp_path, gain, says, table):
    write_run(tmp_path / "balanced", "balanced", gain=gain, seed=11)
    text, compared = report_of(tmp_path, ["balanced"])
    (change,) = compared["longer_context"]
    assert (change["from"], change["to"]) == (24, 384)  # 1536 does not fit in 512
    assert change["mean"] == pytest.approx(-gain * 4, abs=0.05)
    assert f"A longer context {says}" in found_in(text)
    assert table in text.split("Does a longer context help?")[1]


def test_equal_seconds_are_read_where_the_fastest_run_ends(tmp_path):
    """Evaluations every 8 of 64 steps: at 60 s a run of 80 s is at step 48, one of 75 s at 51.2."""
    write_run(tmp_path / "large_batch", "large_batch", seconds=60.0)
    write_run(tmp_path / "balanced", "balanced", seconds=80.0)
    write_run(tmp_path / "long_seq", "long_seq", seconds=75.0)
    _, compared = report_of(tmp_path)
    equal = compared["equal_seconds"]
    assert equal["at"] == 60.0 and equal["interpolated"]
    final = losses_at(0.0, 0.05, 0)[96].mean(dtype=float)

    def fallen(step):
        return final + 3.3 * (math.exp(-4.5 * step / 64) - math.exp(-4.5))

    at_51 = fallen(48) + (51.2 - 48) / 8 * (fallen(56) - fallen(48))
    expected = {"large_batch": final, "balanced": fallen(48), "long_seq": at_51}
    assert equal["losses"]["96"] == pytest.approx(expected, abs=1e-5)
    assert compared["equal_tokens"]["interpolated"] is False


def test_a_run_without_an_evaluation_before_that_has_no_loss_there(tmp_path):
    """Nothing is extrapolated: a run ends at 5 s, another is first evaluated at 10 s."""
    write_study(tmp_path, balanced={"seconds": 80.0}, large_batch={"seconds": 5.0})
    path = tmp_path / "balanced" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    text, compared = report_of(tmp_path)
    losses = compared["equal_seconds"]["losses"]["24"]
    assert losses["balanced"] is None and losses["long_seq"] is not None
    assert "| 24 | – |" in text.split("## At equal train seconds")[1]


def test_unequal_tokens_are_said_and_compared_at_the_fewest(tmp_path):
    write_study(tmp_path, long_seq={"tokens": 393_216})
    text, compared = report_of(tmp_path)
    assert "tokens (balanced 524,288, long_seq 393,216, large_batch 524,288)" in text
    held_equal, unequal = text.split("**Held equal:**")[1].split("**Not equal:**")
    assert "tokens a step 8,192" in held_equal and "tokens a step" not in unequal.split("\n")[0]
    equal = compared["equal_tokens"]
    assert equal["at"] == 393_216 and equal["interpolated"]
    assert "interpolated, no interval" in found_in(text).split("At equal train seconds")[0]
    final = losses_at(0.06, 0.07, 1)[24].mean(dtype=float)
    expected = final + 3.3 * (math.exp(-4.5 * 0.75) - math.exp(-4.5))
    assert equal["losses"]["24"]["balanced"] == pytest.approx(expected, abs=1e-5)


def test_the_originals_ranking_is_looked_for(tmp_path):
    own = {"balanced": 4.0, "long_seq": 4.1, "large_batch": 4.2}
    write_study(tmp_path / "a", **{s: {"own_loss": loss} for s, loss in own.items()})
    text, compared = report_of(tmp_path / "a")
    assert compared["rankings"][0]["measure"] == "own" and compared["rankings"][0]["original"]
    assert "is seen at own length, not at context 24" in found_in(text)
    write_study(tmp_path / "b")
    text, _ = report_of(tmp_path / "b")
    assert "is not seen, neither at own length nor at a shared context" in found_in(text)
    text, _ = report_of(tmp_path / "b", ["balanced", "long_seq"])
    assert "ranking" not in found_in(text)


def test_a_loss_above_the_unigram_entropy_is_said(tmp_path):
    write_study(tmp_path, balanced={"unigram": 5.3})
    assert "The loss of balanced is not below the unigram entropy" in found_in(report_of(tmp_path)[0])


def test_what_leaks_is_marked_wherever_it_is_shown(tmp_path):
    write_study(tmp_path, **{s: {"protocol": "published"} for s in STRATEGIES})
    text, _ = report_of(tmp_path)
    assert found_in(text).startswith("**LEAKING:")
    losses = text.split("## On the same held-out targets")[1].split("\n\n")[1].splitlines()
    for row in losses[2:]:
        assert all("LEAKING" in cell for cell in row.split("|")[3:8] if "–" not in cell)
    floor = (math.log(2_900_000 - 512) - 6.8) / 512
    assert f"**LEAKING**, floor {floor:.4f}" in text
    svg = (tmp_path / "report" / "figures" / "loss.svg").read_text()
    assert "LEAKING" in svg  # matplotlib keeps the text as a comment beside its outlines
    clean = tmp_path / "clean"
    write_study(clean)
    text, _ = report_of(clean)
    rows = [line for line in text.splitlines() if "LEAKING" in line]
    assert len(rows) == 3 and all("| original |" in row for row in rows)


def test_the_originals_losses_stand_with_their_floors(tmp_path):
    write_study(tmp_path)
    text, _ = report_of(tmp_path)
    assert [round(row.floor, 4) for row in ORIGINAL] == [0.0060, 0.0015, 0.0239]
    for row in ORIGINAL:
        assert f"{row.loss:.4f} **LEAKING**, floor {row.floor:.4f}" in text


def test_no_model_of_a_memorised_corpus_is_below_the_floor():
    """Windows of a random corpus, all distinct: the best model knows them and their frequencies."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, 4000)
    length, count = 12, 4000 - 12
    windows = [tuple(tokens[i : i + length + 1]) for i in range(count)]
    seen: dict[tuple, int] = {}
    for window in windows:
        for end in range(1, length + 2):
            seen[window[:end]] = seen.get(window[:end], 0) + 1
    nats = [-math.log(seen[w] / seen[w[:1]]) / length for w in windows]
    share = np.array([seen[key] for key in seen if len(key) == 1]) / count
    first_entropy = float(-(share * np.log(share)).sum())
    assert np.mean(nats) == pytest.approx(leak_floor(count, first_entropy, length), rel=1e-9)


def test_runs_that_did_not_finish_are_shown_as_such(tmp_path):
    write_study(tmp_path)
    (tmp_path / "long_seq" / "result.json").unlink()
    text, compared = report_of(tmp_path, exit_codes={"balanced": 3})
    assert text.count("failed: exit code 3") == 3 and text.count("missing") == 3
    assert compared["differences"] == []
    text, _ = report_of(tmp_path, ["long_seq"])
    assert text.startswith("# Batch or length: no run finished") and "**long_seq** missing" in text


def test_one_document_gives_no_interval(tmp_path):
    """The published protocol has no documents: means are shown, and nothing is claimed of them."""
    write_study(tmp_path, **{s: {"protocol": "published", "num_documents": 1} for s in STRATEGIES})
    text, compared = report_of(tmp_path)
    assert all(d["low"] is None and not d["shown"] for d in compared["differences"])
    assert text.count("[too few documents]") == len(compared["differences"]) + 3
    assert "no difference shown from" in found_in(text) and " below " not in found_in(
        text.replace("not below", "").replace("is below", "")
    )


def test_memory_that_was_not_measured_is_not_drawn_as_zero(tmp_path):
    write_study(tmp_path)
    path = tmp_path / "balanced" / "result.json"
    result = json.loads(path.read_text())
    result["memory_bytes"]["compiled_step"] = None
    path.write_text(json.dumps(result))
    text, _ = report_of(tmp_path)
    assert "| – | 1.90 GB |" in text and "0.00 GB" not in text
    svg = (tmp_path / "report" / "figures" / "cost.svg").read_text()
    assert "0.00 step" not in svg and "1.90 process" in svg


def test_other_targets_are_not_compared(tmp_path):
    write_study(tmp_path, long_seq={"targets_from": 2001})
    text, compared = report_of(tmp_path)
    assert {(d["a"], d["b"]) for d in compared["differences"]} == {("balanced", "large_batch")}
    assert compared["not_compared"] == [["balanced", "long_seq"], ["long_seq", "large_batch"]]
    assert "nothing is ranked" in found_in(text) and "is lowest" not in found_in(text)
    assert compared["rankings"] == [] and compared["equal_seconds"]["losses"] == {}


def test_folders_of_a_machine_are_not_published(tmp_path):
    write_study(tmp_path)
    report_of(tmp_path)
    for path in (tmp_path / "report").rglob("*"):
        if path.is_file():
            assert b"/home/someone" not in path.read_bytes(), path
    assert '"path": "texts"' in (tmp_path / "report" / "results.json").read_text()


def test_many_losses_are_kept_in_half_the_bytes(tmp_path, monkeypatch):
    write_study(tmp_path)
    _, exact = report_of(tmp_path)
    monkeypatch.setattr(study, "LOSSES_LIMIT", 60_000)
    _, halved = report_of(tmp_path)
    losses = study.load(tmp_path / "report")[0].losses
    assert all(array.dtype == np.float16 for array in losses.values())
    for a, b in zip(exact["differences"], halved["differences"], strict=True):
        assert a["mean"] == pytest.approx(b["mean"], abs=2e-4)


def test_a_long_curve_is_thinned_but_every_evaluation_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_TRAIN_ROWS", 10)
    write_run(tmp_path / "balanced", "balanced")
    (run,) = study.collect(tmp_path, ["balanced"], {})
    assert sum("train/loss" in row for row in run.curve) <= 10
    assert [row["step"] for row in run.curve if "eval/loss@24" in row] == list(range(0, 65, 8))


def test_a_half_written_last_row_is_left_out(tmp_path):
    write_run(tmp_path / "balanced", "balanced")
    (whole,) = study.collect(tmp_path, ["balanced"], {})
    with open(tmp_path / "balanced" / "metrics.jsonl", "a") as file:
        file.write('{"step": 65, "tok')
    (cut,) = study.collect(tmp_path, ["balanced"], {})
    assert cut.curve == whole.curve


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("result.json", "{", "result.json cannot be read"),
        ("result.json", '{"status": "finished"}', "result.json has no 'batch_size'"),
        ("metrics.jsonl", '{"step"\n{}\n', "metrics.jsonl line 1 is not JSON"),
        ("heldout_losses.npz", "PK", "heldout_losses.npz cannot be read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, says):
    write_run(tmp_path / "balanced", "balanced")
    (tmp_path / "balanced" / name).write_text(content)
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        study.collect(tmp_path, ["balanced"], {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DATA_FILES)
def test_a_report_without_its_data_is_refused(tmp_path, name):
    write_run(tmp_path / "balanced", "balanced")
    report_of(tmp_path, ["balanced"])
    (tmp_path / "report" / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        report.write(tmp_path / "report")


@pytest.mark.parametrize("seconds, text", [(1.26, "1.3 s"), (68, "68 s"), (422.4, "7.0 min"), (9000, "2.5 h")])
def test_durations_are_read_easily(seconds, text):
    assert findings.duration(seconds) == text


def texts(figure) -> dict[str, matplotlib.transforms.Bbox]:
    """Every text that is seen, by its words and place."""
    seen = list(figure.texts) + [t for legend in figure.legends for t in legend.get_texts()]
    for axes in figure.axes:
        seen += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            low, high = sorted((low, high))
            seen += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    if figure._supxlabel is not None:
        seen.append(figure._supxlabel)
    seen = [text for text in dict.fromkeys(seen) if text.get_visible() and text.get_text()]
    return {f"{text.get_text()} #{i}": text.get_window_extent() for i, text in enumerate(seen)}


@pytest.mark.parametrize("strategies", [STRATEGIES, STRATEGIES[:1], (*STRATEGIES, "another_name")])
def test_no_text_of_a_figure_lies_on_another_or_outside(tmp_path, strategies):
    for number, strategy in enumerate(strategies):
        peak = 3e9 if len(strategies) > 3 else None
        write_run(tmp_path / strategy, strategy, offset=0.02 * number, seed=number, device_peak=peak)
    finished = study.collect(tmp_path, strategies, {})
    styles = styles_of(strategies)
    with matplotlib.rc_context(LOOK):
        for figure in (
            figures.loss_figure(finished, styles, 96),
            figures.context_figure(finished, styles),
            figures.cost_figure(finished, styles),
        ):
            figure.draw_without_rendering()
            boxes = texts(figure)
            assert len(boxes) > 8
            for (name, box), (other, its) in itertools.combinations(boxes.items(), 2):
                assert not box.overlaps(its), (name, other)
            for name, box in boxes.items():
                assert figure.bbox.padded(2).containsx(box.x0), name
                assert figure.bbox.padded(2).containsx(box.x1), name
                assert figure.bbox.padded(2).containsy(box.y0), name
                assert figure.bbox.padded(2).containsy(box.y1), name


def test_strategies_look_unlike_and_keep_their_looks():
    styles = styles_of([*STRATEGIES, "one", "two", "three"])
    for part in ("color", "marker", "linestyle"):
        assert len({str(style[part]) for style in styles.values()}) == 6
    assert styles_of(["large_batch"])["large_batch"] == styles["large_batch"]


def test_contexts_fit_as_the_evaluation_says(tmp_path):
    """A window of a context is up to 1.25 times as long."""
    write_study(tmp_path)
    runs = {run.strategy: run for run in study.collect(tmp_path, STRATEGIES, {})}
    fits = {s: [c for c in CONTEXTS if comparison.within_length(c, run)] for s, run in runs.items()}
    assert fits == {
        "large_batch": [24, 96], "balanced": [24, 96, 384], "long_seq": [24, 96, 384, 1536],
    }  # fmt: skip
    assert json.loads((tmp_path / "balanced" / "result.json").read_text())["seq_len"] == 512
