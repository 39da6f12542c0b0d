"""Tuning: the grid of each strategy grows until its optimum lies inside, and what is said of it was measured."""

import json
import math
import re
import shlex
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
from research.analysis.runs import DIVERGED_CODE, lowest
from research.analysis.study import Key
from tests.fake_runs import MERITS, write_run

BEST = {"large_batch": 0.04, "balanced": 0.16, "long_seq": 0.01}  # of the fake runs
SEED = 42
commands: dict[str, dict[str, str]] = {}


def tune(
    workdir: Path, *arguments: str, exits: dict[str, int] | None = None, stops: str = "", checked: int = 0,
    loss_of=lambda strategy, value: MERITS[strategy]["offset"] + 0.05 * math.log2(value / BEST[strategy]) ** 2,
) -> int:  # fmt: skip
    """A tuning whose children are fakes in this process, their commands kept in `commands`.

    exits: run -> exit code; stops: the run that a signal stops; checked: the exit code of the check.
    """

    def run_child(command: Sequence[str]) -> int:
        if command[0] == "check":
            return checked
        fields = dict(part.removeprefix("--config.").split("=", 1) for part in command[2:])
        folder = Path(fields["--workdir"])
        commands[folder.name] = fields
        with open(workdir / "calls", "a") as file:
            file.write(f"{folder.name}\n")
        if folder.name == stops:
            raise Interrupted(130)
        if code := (exits or {}).get(folder.name):
            return code
        strategy, value = Path(command[1].partition(":")[0]).stem, float(fields["optimizer.learning_rate"])
        write_run(folder, Key(strategy, f"{value}", SEED), offset=loss_of(strategy, value), noise=0.02, spread=0.0)
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
    assert "Each at its best, the order is large_batch (" in said[3] and "it is the same" in said[3]
    gap = found["compared"]["best"]["pairs"][1]
    assert (gap["a"], gap["b"]) == ("large_batch", "long_seq") and gap["mean"] < 0
    assert f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}] at their best" in said[4]
    found["compared"]["given"]["rows"].reverse()
    found["compared"]["given"]["pairs"][0]["shown"] = False
    turned = tuning_report.findings(results["study"], found)[3]
    assert "at the config's values it is long_seq (" in turned
    assert turned.endswith(" (no difference shown: large_batch and balanced).")


def test_where_all_are_best_at_the_configs_value_it_is_said_once(finished):
    results = json.loads((finished / "report" / "results.json").read_text())
    compared = results["analysis"]["tuning"]["compared"]
    compared["best"] = compared["given"]
    said = tuning_report.findings(results["study"], results["analysis"]["tuning"])
    assert said[3].startswith("Each is best at the config's value, and the order is large_batch (")
    assert said[4].startswith("large_batch minus long_seq: ") and "their best" not in said[4]


def test_the_command_that_it_ends_with_is_an_ablation_of_its_best_values(finished, capsys):
    results = json.loads((finished / "report" / "results.json").read_text())
    command = tuning_report.command(results["study"], results["analysis"]["tuning"])
    assert f"`{command}`" in (finished / "report" / "report.md").read_text()
    prefix = "python -m experiments.ablation "
    assert command.startswith(prefix)
    assert ablation.main([*shlex.split(command.removeprefix(prefix)), "--dry_run"], train=("train",)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and not any(f"seed={SEED}" in line for line in lines)
    for line in lines:
        words = line.split()
        strategy = Path(words[1].removeprefix("--config=").partition(":")[0]).stem
        config = load_config(words[1].removeprefix("--config="), [w for w in words if w.startswith("--config.")])
        assert config.optimizer.learning_rate == BEST[strategy]


def test_what_is_given_reaches_every_run_the_report_and_the_command(tmp_path, capsys):
    own = ["--config.seed=7", "--config.train.steps=9", "--config.optimizer.learning_rate=0.03", "--limit=3"]
    own += ["--config.eval.contexts=(24,96)", f"--config.data.cache_dir={tmp_path}"]
    commands.clear()
    assert tune(tmp_path, *own) == 0
    assert len(commands) == 9
    for name, fields in commands.items():
        strategy, field, value, seed = name.split("-")
        assert (field, seed) == ("learning_rate", "seed7")
        assert float(fields["optimizer.learning_rate"]) == float(value) and float(value) in (0.015, 0.03, 0.06)
        assert (fields["seed"], fields["train.steps"], fields["train.eval_every"]) == ("7", "9", "0")
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("python -m"))
    assert "--seeds=8,9,10" in line and "--config.train.steps=9" in line and "--config.seed" not in line
    assert "'--config.eval.contexts=(24,96)'" in line  # as a shell takes it
    assert str(tmp_path) not in (tmp_path / "report" / "report.md").read_text()
    before = (tmp_path / "report" / "report.md").read_bytes()
    assert tune(tmp_path, "--report_only") == 0 and (tmp_path / "report" / "report.md").read_bytes() == before


def test_a_check_that_fails_starts_nothing(tmp_path):
    assert tune(tmp_path / "x", checked=2) == 2
    assert not (tmp_path / "x").exists()


def test_every_first_value_is_checked_and_runs_of_another_config_are_refused(tmp_path, capsys):
    small = ["--config.eval.num_targets=480", "--config.eval.own_targets=2048", f"--config.data.cache_dir={tmp_path}"]
    small += ["--config.data.source=text", f"--config.data.path={Path(ablation.__file__).parents[1] / 'tests'}"]
    small += ["--config.model.vocab_size=512", "--config.train.tokens=65536", "--strategies=large_batch"]
    assert script.main([f"--workdir={tmp_path / 'x'}", "--check_only", *small]) == 0
    assert script.main([f"--workdir={tmp_path / 'x'}", "--check_only", "--field=optimizer.beta2", *small]) == 2
    assert "config.optimizer.beta2=1.998" in capsys.readouterr().err
    folder = tmp_path / "x" / "large_batch-learning_rate-0.02-seed42"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 1}))
    assert script.main([f"--workdir={tmp_path / 'x'}", "--check_only", *small]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_field_that_changes_nothing_keeps_the_configs_value(tmp_path, capsys):
    assert tune(tmp_path, "--strategies=balanced", loss_of=lambda strategy, value: 0.0) == 0
    grid = found_in(tmp_path)["grids"]["balanced"]
    losses = [entry["loss"] for entry in grid["tried"]]
    assert grid["best"] == (0.04 if min(losses) == max(losses) else grid["tried"][losses.index(min(losses))]["value"])
    assert lowest({0.02: 1.0, 0.04: 1.0, 0.08: 1.0}, 0.04) == 0.04 and lowest({1.0: None, 2.0: math.inf}, 1.0) is None
    said = tuning_report.findings(dict(seed=1), found_of([3.0, 3.0, 3.0]))[0]
    assert said == "balanced: the field changes nothing here, every value has a loss of 3.000 nats per token."


def found_of(losses: Sequence[float | None], status: Sequence[str] = ("finished",) * 3) -> dict:
    """An analysis of one strategy at 0.02, 0.04 and 0.08."""
    tried = [
        dict(value=value, run=f"r{value}", loss=loss, status=how, above=None)
        for value, loss, how in zip((0.02, 0.04, 0.08), losses, status, strict=True)
    ]
    known = {entry["value"]: entry["loss"] for entry in tried}
    grid = dict(tried=tried, best=lowest(known, 0.04), inside=False, given=0.04)
    compared = {which: dict(rows=[], pairs=[]) for which in ("given", "best")}
    return dict(grids={"balanced": grid}, compared=compared, unfinished=[])


def test_a_value_that_failed_is_no_edge_and_no_loss_is_said_as_what_it_is():
    failed = ("finished", "finished", "failed: exit code 137")
    said = tuning_report.findings(dict(seed=1), found_of([3.1, 3.0, None], failed))[0]
    assert "the grid is not whole (0.08 failed: exit code 137)" in said and "edge" not in said
    said = tuning_report.findings(dict(seed=1), found_of([None] * 3, ("missing",) * 3))[0]
    assert said == "balanced: no value has a loss (missing)."
    assert tuning_report.command(dict(seed=1, scale="cpu", overrides={}, field="f"), found_of([None] * 3)) == ""


def test_the_context_is_that_of_the_shortest_rows_whether_or_not_they_finished(tmp_path):
    exits = {f"large_batch-learning_rate-{value}-seed42": 137 for value in (0.04, 0.02, 0.08)}
    assert tune(tmp_path, "--strategies=large_batch,long_seq", exits=exits) == 137
    found = found_in(tmp_path)
    assert found["context"] == 96 and found["grids"]["long_seq"]["inside"]


def test_where_all_diverge_lower_values_are_tried(tmp_path):
    exits = {f"balanced-learning_rate-{value}-seed42": DIVERGED_CODE for value in (0.04, 0.02, 0.08, 0.01)}
    assert tune(tmp_path, "--strategies=balanced", exits=exits) == 0
    assert [entry["value"] for entry in found_in(tmp_path)["grids"]["balanced"]["tried"]][:2] == [0.0025, 0.005]


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
        (["--field=data.heldout_fraction"], "--field='data.heldout_fraction'"),  # other targets
        (["--config.data.shuffle_block=2048"], "config.data.shuffle_block=2048"),
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


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"status": "fini'])
def test_a_damaged_result_is_one_line_and_made_again_where_it_is_removed(tmp_path, capsys, damage):
    study = tmp_path / "study"
    study.mkdir()
    assert tune(study, "--strategies=balanced") == 0
    run, calls = study / "balanced-learning_rate-0.04-seed42", study / "calls"
    begun = calls.read_text()
    (run / "result.json").write_text(damage)
    capsys.readouterr()
    assert tune(study, "--strategies=balanced") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "result.json" in err and "remove it and run it again" in err
    for name in ("result.json", "heldout_losses.npz"):
        (run / name).unlink()
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        assert tune(study, "--strategies=balanced") == 0
        begun += f"{run.name}\n"
        assert calls.read_text() == begun
