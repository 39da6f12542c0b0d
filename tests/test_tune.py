"""Tuning: the grid of each strategy grows until its optimum lies inside, and what is said of it was measured."""

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from experiments import ablation, ledger
from experiments import tune as script
from experiments.child import Interrupted
from experiments.flags import load_config
from research.analysis import bootstrap, tuning_report
from research.analysis.runs import DIVERGED_CODE
from research.analysis.study import Key
from tests.fake_runs import MERITS, write_run

BEST = {"large_batch": 0.04, "balanced": 0.16, "long_seq": 0.01}  # of the fake runs
SEED = 42


def tune(workdir: Path, *arguments: str, exits: dict[str, int] | None = None, stops: str = "") -> int:
    """A tuning whose children are fakes in this process. `exits`: run -> exit code; `stops`: a signal comes."""

    def run_child(command: Sequence[str]) -> int:
        if command[0] == "check":
            return 0
        fields = dict(part.removeprefix("--config.").split("=", 1) for part in command[2:])
        folder = Path(fields["--workdir"])
        with open(workdir / "calls", "a") as file:
            file.write(f"{folder.name}\n")
        if folder.name == stops:
            raise Interrupted(130)
        if code := (exits or {}).get(folder.name):
            return code
        strategy, value = Path(command[1].partition(":")[0]).stem, float(fields["optimizer.learning_rate"])
        offset = MERITS[strategy]["offset"] + 0.05 * math.log2(value / BEST[strategy]) ** 2
        write_run(folder, Key(strategy, f"{value}", SEED), offset=offset, noise=0.02, spread=0.0)
        (folder / "data_manifest.json").write_text(json.dumps({"files": {"heldout.npy": {"sha256": "the same"}}}))
        (folder / "checkpoints").mkdir()
        return 0

    with pytest.MonkeyPatch.context() as patch:
        for module in (script, ledger):
            patch.setattr(module, "run_child", run_child)
        return script.main([f"--workdir={workdir}", *arguments], train=("train",), check=("check",))


def calls(workdir: Path) -> list[str]:
    path = workdir / "calls"
    return path.read_text().split() if path.exists() else []


def found_in(workdir: Path) -> dict:
    return json.loads((workdir / "report" / "results.json").read_text())["analysis"]["tuning"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("tune")
    assert tune(workdir) == 0
    return workdir


def test_each_grid_goes_on_until_its_best_lies_inside(finished):
    found = found_in(finished)
    assert {s: grid["best"] for s, grid in found["grids"].items()} == BEST
    tried = {s: [entry["value"] for entry in grid["tried"]] for s, grid in found["grids"].items()}
    assert tried["large_batch"] == [0.02, 0.04, 0.08]
    assert tried["balanced"] == [0.02, 0.04, 0.08, 0.16, 0.32]
    assert tried["long_seq"] == [0.005, 0.01, 0.02, 0.04, 0.08]
    assert all(grid["inside"] for grid in found["grids"].values())
    assert len(calls(finished)) == 3 + 5 + 5 and not list(finished.glob("*/checkpoints"))


def test_a_best_on_the_edge_is_said(tmp_path, capsys):
    assert tune(tmp_path, "--strategies=balanced", "--limit=4") == 0
    assert found_in(tmp_path)["grids"]["balanced"]["best"] == 0.16
    said = capsys.readouterr().out
    assert "on the edge of what was tried: a better one may lie beyond" in said
    assert len(calls(tmp_path)) == 4


def test_intervals_are_those_of_the_bootstrap_over_documents(finished):
    found = found_in(finished)
    with np.load(finished / "report" / "heldout_losses.npz") as file:
        losses = {name: file[name].astype(np.float64) for name in file.files}
    grid = found["grids"]["balanced"]
    by_value = {entry["value"]: entry for entry in grid["tried"]}
    assert by_value[0.16]["above"] is None
    one, best = (losses[f"{by_value[value]['run']}/loss"] for value in (0.04, 0.16))
    expected = bootstrap.paired_bootstrap(one, best, losses["document"], 0, bootstrap.RESAMPLES)
    above = by_value[0.04]["above"]
    assert above["mean"] == pytest.approx((one - best).mean(), abs=1e-6) and above["mean"] == pytest.approx(
        0.2, abs=0.02
    )
    assert [above["low"], above["high"]] == pytest.approx([expected.low, expected.high], abs=1e-6)
    assert above["shown"] and above["low"] > 0


def test_strategies_are_compared_at_both_values_in_one_context(finished):
    found = found_in(finished)
    assert found["context"] == 96  # its windows of 120 fit in rows of 128
    result = json.loads((finished / "long_seq-learning_rate-0.01-seed42" / "result.json").read_text())
    given, best = ({row["strategy"]: row for row in found["compared"][which]["rows"]} for which in ("given", "best"))
    assert best["long_seq"]["loss"] == pytest.approx(result["eval"]["contexts"]["96"]["loss"], abs=1e-6)
    assert [row["value"] for row in given.values()] == [0.04] * 3
    assert {s: row["value"] for s, row in best.items()} == BEST
    for which, rows in (("given", given), ("best", best)):
        for pair in found["compared"][which]["pairs"]:
            gap = rows[pair["a"]]["loss"] - rows[pair["b"]]["loss"]
            assert pair["mean"] == pytest.approx(gap, abs=1e-3) and pair["p_holm"] >= pair["p"]


def test_findings_say_what_the_numbers_are(finished):
    results = json.loads((finished / "report" / "results.json").read_text())
    found = results["analysis"]["tuning"]
    said = tuning_report.findings(results["study"], found)
    grid = found["grids"]["long_seq"]
    best, given = (next(e for e in grid["tried"] if e["value"] == value) for value in (0.01, 0.04))
    assert f"long_seq: lowest at 0.01, {best['loss']:.3f} nats per token, {given['above']['mean']:.3f} [" in said[2]
    assert "below the config's 0.04" in said[2] and "edge" not in said[2]
    assert said[0].startswith("large_batch: lowest at 0.04") and "below" not in said[0]
    assert "Each at its best: large_batch (" in said[3] and "the order is the same" in said[3]
    found["compared"]["given"]["rows"].reverse()
    assert "at the config's values it was long_seq (" in tuning_report.findings(results["study"], found)[3]


def test_the_command_that_it_ends_with_is_an_ablation_of_its_best_values(finished, capsys):
    results = json.loads((finished / "report" / "results.json").read_text())
    command = tuning_report.command(results["study"], results["analysis"]["tuning"])
    assert f"`{command}`" in (finished / "report" / "report.md").read_text()
    prefix = "python -m experiments.ablation "
    assert command.startswith(prefix)
    assert ablation.main([*command.removeprefix(prefix).split(), "--dry_run"], train=("train",)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and not any(f"seed={SEED}" in line for line in lines)
    for line in lines:
        words = line.split()
        strategy = Path(words[1].removeprefix("--config=").partition(":")[0]).stem
        config = load_config(words[1].removeprefix("--config="), [w for w in words if w.startswith("--config.")])
        assert config.optimizer.learning_rate == BEST[strategy]


def test_a_value_that_diverges_bounds_the_grid_and_one_that_fails_ends_it(tmp_path, capsys):
    exits = {"balanced-learning_rate-0.16-seed42": DIVERGED_CODE}
    assert tune(tmp_path / "a", "--strategies=balanced", exits=exits) == 0
    grid = found_in(tmp_path / "a")["grids"]["balanced"]
    assert grid["best"] == 0.08 and grid["inside"] and grid["tried"][-1]["status"] == "diverged"
    assert "| diverged |" in (tmp_path / "a" / "report" / "report.md").read_text()
    exits = {"balanced-learning_rate-0.08-seed42": 4}
    assert tune(tmp_path / "b", "--strategies=balanced", exits=exits) == 4
    assert "balanced-learning_rate-0.08-seed42 failed: exit code 4" in capsys.readouterr().err
    assert "Not finished: balanced-learning_rate-0.08-seed42." in (tmp_path / "b" / "report" / "report.md").read_text()
    assert len(calls(tmp_path / "b")) == 3
    assert (
        tune(tmp_path / "b", "--strategies=balanced") == 0 and found_in(tmp_path / "b")["grids"]["balanced"]["inside"]
    )


def test_it_goes_on_where_it_was_stopped_and_makes_each_run_once(finished, tmp_path):
    made = calls(finished)
    assert tune(tmp_path, stops=made[6]) == 130 and calls(tmp_path) == made[:7]
    assert tune(tmp_path) == 0 and calls(tmp_path) == made[:7] + made[6:]
    assert tune(tmp_path) == 0 and calls(tmp_path) == made[:7] + made[6:]  # nothing is left to make
    both = [found_in(folder) for folder in (finished, tmp_path)]
    assert [found.pop("seconds") >= 0 for found in both] == [True, True] and both[0] == both[1]


def test_the_report_is_made_again_from_its_own_files(finished, tmp_path):
    made = finished / "report"
    for name in ("results.json", "heldout_losses.npz"):
        shutil.copy(made / name, tmp_path / name)
    assert script.main([f"--workdir={tmp_path}", "--report_only"]) == 0
    for name in ("report.md", "report.html", "results.json", "figures/tuning.svg"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name
        assert not re.search("/home|/tmp", (made / name).read_text())


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--scale=huge"], "no scale huge"),
        (["--scale=recall"], "config.data.source='recall'"),
        (["--scale=published"], "config.data.protocol='published'"),
        (["--strategies=,"], "--strategies=''"),
        (["--strategies=nosuch"], "'nosuch'"),
        (["--limit=2"], "--limit=2"),
        (["--field=optimizer.rate"], "--field='optimizer.rate'"),
        (["--field=optimizer"], "--field='optimizer'"),
        (["--field=batch_size"], "--field='batch_size'"),
        (["--field=optimizer.muon_weight_decay"], "--field='optimizer.muon_weight_decay'"),  # 0 has no double
        (["--config.model.depth=4"], "config.model.depth='4'"),
        (["--config.eval.contexts=(512,)"], "give one of 102 or less"),
        (["--other"], "'--other'"),
        (["--report_only"], "holds no tuning"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(tmp_path, capsys, arguments, named):
    assert tune(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["--strategies=balanced", "--field=optimizer.beta2", "--config.train.steps=9"])
def test_a_folder_holds_one_tuning(finished, capsys, other):
    before = calls(finished)
    assert tune(finished, other) == 2 and "choose another folder" in capsys.readouterr().err
    assert calls(finished) == before


def test_another_kind_of_results_is_refused(finished, tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"study": {"stages": []}, "runs": []}')
    assert script.main([f"--workdir={tmp_path}", "--report_only"]) == 2
    assert "not a tuning's" in capsys.readouterr().err


def test_a_dry_run_names_the_first_values_and_runs_nothing(tmp_path, capsys):
    assert tune(tmp_path / "x", "--strategies=balanced", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    values = [line.split("--config.optimizer.learning_rate=")[1].split()[0] for line in lines[:3]]
    assert [float(value) for value in values] == [0.04, 0.02, 0.08] and "6 values" in lines[3]
    assert not (tmp_path / "x").exists()
