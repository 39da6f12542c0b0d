"""Shapes: each at its best learning rate, at equal tokens and at equal steps; what is said of them was measured."""

import json
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from experiments import ledger, tune
from experiments import shapes as script
from experiments.child import Interrupted
from experiments.flags import load_config
from experiments.strategies import load_strategy
from research.analysis import evidence, shapes, shapes_claims, shapes_report
from research.analysis.runs import DIVERGED_CODE
from research.analysis.statistics import holm
from research.analysis.study import Key
from research.config import ConfigError, num_steps
from tests.fake_runs import write_run

GRID = ("--lengths=128,512", "--tokens_per_step=1024,4096,16384", "--config.train.tokens=65536")
SHAPES = ("8x128", "32x128", "128x128", "2x512", "8x512", "32x512")
ROWS, LENGTH, FEW_STEPS = 0.3, 0.5, 0.2  # nats a factor of 4: of rows, of length at as many rows, of the steps
STEPS = 4  # of 16,384 tokens in 65,536


def merit(shape: str, tokens: int) -> float:
    """More rows help by ROWS, longer ones harm by LENGTH, fewer steps harm by FEW_STEPS, each a factor of four."""
    rows, length = shapes.sizes(shape)
    steps = tokens / rows / length
    return 0.5 * (-ROWS * math.log2(rows) + LENGTH * math.log2(length) - FEW_STEPS * math.log2(steps)) - 1.0


def best_rate(shape: str, budget: str = "tokens") -> float:
    rows, length = shapes.sizes(shape)
    return {1024: 0.02, 4096: 0.04, 16384: 0.16}[rows * length] * (2 if budget == "steps" else 1)


commands: dict[str, dict[str, str]] = {}


def study(
    workdir: Path, *arguments: str, exits: dict[str, int] | None = None, stops: str = "", checked: int = 0
) -> int:
    """A study whose children are fakes in this process, their commands kept in `commands`."""

    def run_child(command: Sequence[str]) -> int:
        if command[0] == "check":
            return checked
        fields = dict(part.removeprefix("--config.").split("=", 1) for part in command[2:])
        folder = Path(fields["--workdir"])
        commands[str(folder.relative_to(workdir))] = fields
        with open(workdir / "calls", "a") as file:
            file.write(f"{folder.relative_to(workdir)}\n")
        if folder.name == stops:
            raise Interrupted(130)
        if code := (exits or {}).get(folder.name):
            return code
        shape, rate = fields["strategy"], float(fields["optimizer.learning_rate"])
        rows, length = shapes.sizes(shape)
        budget = "steps" if "train.steps" in fields else "tokens"
        assert ("train.steps" in fields) != ("train.tokens" in fields)
        tokens = STEPS * rows * length if budget == "steps" else int(fields["train.tokens"])
        key = Key(shape, folder.name, int(fields.get("seed", 42)))
        loss = merit(shape, tokens) + 0.02 * math.log2(rate / best_rate(shape, budget)) ** 2
        result = write_run(folder, key, offset=loss, noise=0.02, spread=0.01)
        result |= {"tokens": tokens, "steps": tokens // (rows * length)}
        result["memory_bytes"]["compiled_step"] = 1e8 + 2e4 * rows * length
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "data_manifest.json").write_text(json.dumps({"files": {"heldout.npy": {"sha256": "the same"}}}))
        (folder / "checkpoints").mkdir()
        return 0

    with pytest.MonkeyPatch.context() as patch:
        for module in (script, ledger):
            patch.setattr(module, "run_child", run_child)
        return script.main([f"--workdir={workdir}", *GRID, *arguments], train=("train",), check=("check",))


def calls(workdir: Path) -> list[str]:
    path = workdir / "calls"
    return path.read_text().split() if path.exists() else []


def results_of(workdir: Path) -> dict:
    return json.loads((workdir / "report" / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("shapes")
    assert study(workdir) == 0
    return workdir


def test_every_length_has_every_size_of_step_at_its_best_rate(finished):
    found = results_of(finished)["analysis"]["shapes"]
    rates = {shape["shape"]: shape["rates"] for shape in found}
    for shape in SHAPES:
        largest = shape in ("128x128", "32x512")  # the same runs at equal steps
        assert rates[shape]["tokens"] == {"best": best_rate(shape), "inside": True}
        assert rates[shape]["steps"] == {"best": best_rate(shape, "tokens" if largest else "steps"), "inside": True}
    assert [(s["batch_size"], s["seq_len"]) for s in found] == [shapes.sizes(shape) for shape in SHAPES]


def test_runs_that_compare_have_the_best_rate_seeds_of_their_own_and_equal_tokens_or_steps(finished):
    compared = {name: fields for name, fields in commands.items() if "learning_rate" not in name}
    assert len(compared) == 3 * (6 + 4)  # the largest steps are the same runs at equal steps
    for name, fields in compared.items():
        shape, budget, seed = name.split("-")
        rows, length = shapes.sizes(shape)
        assert (int(fields["batch_size"]), int(fields["seq_len"])) == (rows, length)
        assert fields["optimizer.learning_rate"] == repr(best_rate(shape, budget))
        assert f"seed{fields['seed']}" == seed
        assert fields["optimizer.schedule"] == "cosine"
        length_of_run = ("train.tokens", "65536") if budget == "tokens" else ("train.steps", str(STEPS))
        assert [(k, v) for k, v in fields.items() if k in ("train.tokens", "train.steps")] == [length_of_run]
    assert {fields["seed"] for fields in compared.values()} == {"43", "44", "45"}


def test_a_command_makes_the_config_it_says(finished, monkeypatch):
    fields = commands["32x128-steps-seed44"]
    overrides = [f"--config.{name}={value}" for name, value in fields.items() if not name.startswith("--")]
    config = load_config("configs/base.py:cpu", overrides)
    assert (config.strategy, config.batch_size, config.seq_len, num_steps(config)) == ("32x128", 32, 128, STEPS)
    assert (config.seed, config.train.eval_every) == (44, 0)


def differences(found: dict, budget: str, kind: str) -> dict[tuple[str, str], dict]:
    return {(p["a"], p["b"]): p for p in shapes_claims.of_kind(found, budget, kind)}


def test_differences_are_those_of_the_runs(finished):
    """Against the law of the fakes: at equal steps more rows help; at equal tokens the lost steps come off that."""
    found = results_of(finished)["analysis"]
    for pair in differences(found, "steps", "rows").values():
        assert pair["mean"] == pytest.approx(-ROWS, abs=0.05)
        assert pair["low"] < -ROWS + 0.03 < pair["high"] + 0.06
    for pair in differences(found, "tokens", "rows").values():
        assert pair["mean"] == pytest.approx(FEW_STEPS - ROWS, abs=0.05)
    for pair in differences(found, "steps", "length").values():
        assert pair["mean"] == pytest.approx(LENGTH, abs=0.05)
    for budget in shapes.BUDGETS:
        for pair in differences(found, budget, "cut").values():
            assert pair["mean"] == pytest.approx(-ROWS - LENGTH, abs=0.05)


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
    for budget in shapes.BUDGETS:
        for kind in shapes_report.KINDS:
            pairs = list(differences(found, budget, kind).values())
            assert [p["p_holm"] for p in pairs] == pytest.approx(holm([p["p"] for p in pairs]), abs=5e-6)


def test_a_choice_is_between_more_rows_and_longer_ones_from_one_shape(finished):
    found = results_of(finished)["analysis"]
    chosen = [(c["from"], c["more_rows"], c["longer"]) for c in found["choices"] if c["budget"] == "steps"]
    assert chosen == [("8x128", "32x128", "8x512"), ("32x128", "128x128", "32x512")]
    for choice in found["choices"]:
        assert choice["times"] == 4
        assert choice["rows"]["mean"] - choice["length"]["mean"] == pytest.approx(choice["cut"]["mean"], abs=1e-5)


def test_choices_need_as_many_times_more_rows_as_length():
    pairs = [
        {"budget": "steps", "kind": "rows", "a": "32x128", "b": "8x128"},
        {"budget": "steps", "kind": "length", "a": "8x256", "b": "8x128"},
        {"budget": "steps", "kind": "cut", "a": "32x128", "b": "8x512"},
    ]
    assert shapes._choices("steps", pairs) == []


def test_largest_steps_are_the_same_runs_at_both_budgets(finished):
    found = {shape["shape"]: shape["at"] for shape in results_of(finished)["analysis"]["shapes"]}
    for shape, at in found.items():
        assert (at["tokens"] == at["steps"]) == (shape in ("128x128", "32x512"))
        assert at["tokens"]["tokens"] == 65_536
        assert at["steps"]["steps"] == STEPS


def test_losses_are_means_over_seeds_with_their_interval(finished):
    results = results_of(finished)
    with np.load(finished / "report" / "heldout_losses.npz") as file:
        each = [file[f"8x128-tokens-seed{seed}/loss"].astype(np.float64).mean() for seed in (43, 44, 45)]
    at = results["analysis"]["shapes"][0]["at"]["tokens"]
    assert at["mean"] == pytest.approx(np.mean(each), abs=1e-6)
    assert at["sd"] == pytest.approx(np.std(each, ddof=1), abs=1e-6)
    assert at["low"] < at["mean"] < at["high"]
    runs = {run["name"]: run["result"] for run in results["runs"]}
    own = [runs[f"8x128-tokens-seed{seed}"]["eval"]["contexts"]["96"]["loss"] for seed in (43, 44, 45)]
    assert (at["reach"]["context"], at["reach"]["mean"]) == (96, pytest.approx(np.mean(own), abs=1e-6))
    longer = next(s for s in results["analysis"]["shapes"] if s["shape"] == "8x512")
    assert longer["at"]["tokens"]["reach"]["context"] == 384


def test_findings_say_what_the_numbers_say(finished):
    results = results_of(finished)
    said = shapes_report.findings(results)
    assert said[0].startswith("After 65,536 tokens 128x128 has the lowest loss, ")
    assert "At equal steps, 4 times as many tokens per step change the loss from 8x128 by -0.3" in " ".join(said)
    assert "more and shorter rows are lower in 3 of 3 pairs." in " ".join(said)
    assert said[-2].startswith("Best learning rates at equal tokens: of 1,024 tokens per step 8x128 0.02, 2x512 0.02; ")
    assert said[-1].startswith("Best learning rates at equal steps: of 1,024 tokens per step 8x128 0.04, 2x512 0.04; ")


def test_report_has_every_shape_figure_and_verdict(finished):
    text = (finished / "report" / "report.md").read_text()
    for shape in SHAPES:
        assert f"\n| {shape} | " in text
    assert (finished / "report" / "figures" / "shapes.png").stat().st_size > 10_000
    assert "figures/shapes.png" in text
    assert "A large batch makes slower progress a step" in text
    assert (finished / "report" / "report.html").read_text().count("<svg") >= 1


def test_report_is_made_again_of_its_own_files(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished / "report", folder)
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "report.md").unlink()
    assert script.main([f"--workdir={folder}", "--report_only"]) == 0
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_study_is_not_run_again(finished):
    before = calls(finished)
    assert study(finished) == 0
    assert calls(finished) == before


def test_seeds_may_be_added(finished, tmp_path):
    workdir = tmp_path / "more"
    shutil.copytree(finished, workdir)
    before = len(calls(workdir))
    assert study(workdir, "--seeds=46") == 0
    new = calls(workdir)[before:]
    assert len(new) == 10
    assert all(name.endswith("seed46") for name in new)
    assert results_of(workdir)["analysis"]["shapes"][0]["at"]["tokens"]["seeds"] == [43, 44, 45, 46]


def test_goes_on_where_it_was_stopped(tmp_path):
    assert study(tmp_path, stops="8x512-tokens-seed43") == 130
    before = calls(tmp_path)
    assert study(tmp_path) == 0
    after = calls(tmp_path)
    assert after[len(before)] == "8x512-tokens-seed43"
    assert len(set(after)) == len(after) - 1


def test_a_run_that_fails_is_said_and_in_no_mean(tmp_path, capsys):
    assert study(tmp_path, exits={"8x128-steps-seed44": 1}) == 1
    results = results_of(tmp_path)
    assert results["analysis"]["shapes"][0]["at"]["steps"]["seeds"] == [43, 45]
    assert results["analysis"]["unfinished"] == ["8x128-steps-seed44"]
    assert "8x128-steps-seed44 failed: exit code 1" in capsys.readouterr().err
    assert "8x128-steps-seed44 is not finished" in (tmp_path / "report" / "report.md").read_text()


def test_a_shape_that_no_rate_fits_is_not_compared(tmp_path, capsys):
    names = [f"2x512-learning_rate-{rate:g}-seed42" for rate in (0.04 * 2.0**k for k in range(-6, 7))]
    assert study(tmp_path, exits=dict.fromkeys(names, DIVERGED_CODE)) == 1
    results = results_of(tmp_path)
    missing = next(s for s in results["analysis"]["shapes"] if s["shape"] == "2x512")
    assert (missing["rates"]["tokens"]["best"], missing["at"]["tokens"], missing["step_seconds"]) == (None, None, None)
    assert not any("2x512" in (p["a"], p["b"]) for p in results["analysis"]["pairs"])
    assert "no learning rate of 2x512 has a loss; not run" in capsys.readouterr().err
    assert "\n| 2x512 | 1,024 | – | – | – | – | – | – |" in (tmp_path / "report" / "report.md").read_text()


def test_nothing_is_compared_where_nothing_ran():
    empty = {"study": {"grids": {}}, "analysis": {"shapes": [], "pairs": [], "choices": []}}
    assert shapes_report.findings(empty) == ["No run is finished: nothing is compared."]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens_per_step=1000"], "--tokens_per_step=1000: is no whole number of rows of 128 tokens"),
        (["--tokens_per_step=4096"], "--tokens_per_step='4096': name at least two"),
        (["--lengths=128,many"], "--lengths='128,many': give whole numbers"),
        (["--lengths="], "--lengths='': give whole numbers"),
        (["--lengths=0,128"], "--tokens_per_step=1024: is no whole number of rows of 0 tokens"),
        (["--seeds=42,43"], "--seeds='42,43': give seeds other than 42"),
        (["--config.train.tokens=65537"], "config.train.tokens=65537: is no whole number of the largest steps"),
        (["--config.train.steps=5"], "config.train"),
        (["--config.batch_size=4"], "config.batch_size='given': the strategy 8x128 is a shape"),
        (["--config.data.shuffle_block=512"], "config.data.shuffle_block=512"),
        (["--limit=2"], "--limit=2"),
        (["--nothing=1"], "argument='--nothing=1'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, arguments, said):
    assert study(tmp_path / "new", *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "new").exists()


def test_steps_alone_are_refused(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path / 'new'}", *GRID[:2], "--config.train.steps=5"]
    assert script.main(arguments, train=("train",), check=("check",)) == 2
    assert "config.train.steps=5: shapes have steps of unlike size" in capsys.readouterr().err


def test_a_folder_of_another_study_is_refused(finished, capsys):
    before = calls(finished)
    assert study(finished, "--config.model.num_layers=2") == 2
    assert "holds a study of other shapes or config" in capsys.readouterr().err
    assert study(finished, "--lengths=128") == 2
    assert calls(finished) == before


def test_dry_run_says_what_is_known_beforehand(tmp_path, capsys):
    assert study(tmp_path, "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("train ")]) == 3 * (6 + 4)
    assert shlex.split(lines[1])[1].endswith("configs/base.py:cpu")
    assert lines[-1] == "# 30 runs: each shape at its best, seeds 43,44,45"
    assert calls(tmp_path) == []


def test_a_schedule_that_is_given_is_kept(tmp_path, capsys):
    assert study(tmp_path, "--dry_run", "--config.optimizer.schedule=constant") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train ")]
    assert all("--config.optimizer.schedule=constant" in line and "cosine" not in line for line in lines)


def test_every_shape_is_checked_and_runs_of_another_config_are_refused(tmp_path, capsys):
    """By the real check, in this process: each shape's config, at equal tokens and at equal steps."""
    text = Path(script.__file__).parents[1] / "tests"
    small = ["--config.eval.num_targets=480", "--config.eval.own_targets=2048", f"--config.data.cache_dir={tmp_path}"]
    small += ["--config.data.source=text", f"--config.data.path={text}", "--config.model.vocab_size=512", *GRID]
    small += [f"--workdir={tmp_path / 'x'}", "--check_only"]
    assert script.main(small) == 0
    assert script.main([*small, "--config.train.accumulation=4"]) == 2  # more than the rows of 2x512
    assert capsys.readouterr().err.count("\n") == 1
    folder = tmp_path / "x" / "tune_steps" / "2x512-learning_rate-0.04-seed42"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 1}))
    assert script.main(small) == 2
    assert "seed" in capsys.readouterr().err


def test_report_only_wants_a_study(tmp_path, capsys):
    assert script.main([f"--workdir={tmp_path}", "--report_only"]) == 2
    assert "holds no study of shapes" in capsys.readouterr().err


def entry(**fields):
    given = dict(budget="steps", kind="rows", a="4x8", b="1x8", mean=-0.2, low=-0.3, high=-0.1, shown=True)
    return given | fields


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ([entry(), entry()], evidence.FAILS),
        ([entry(mean=0.2, low=0.1, high=0.3)], evidence.HOLDS),
        ([entry(), entry(mean=0.2, low=0.1, high=0.3)], evidence.CONDITIONS),
        ([entry(), entry(shown=False)], evidence.UNTESTED),
        ([entry(mean=0.2, low=0.1, high=0.3), entry(shown=False)], evidence.CONDITIONS),
        ([entry(shown=False)], evidence.UNTESTED),
        ([entry(budget="tokens")], evidence.UNTESTED),
        ([entry(kind="cut")], evidence.UNTESTED),
    ],
)
def test_progress_and_noise_are_judged_at_equal_steps_by_rows_alone(pairs, verdict):
    found = {"pairs": pairs, "shapes": []}
    assert shapes_claims.progress(found)[0] == verdict
    assert shapes_claims.explores(found)[0] == verdict


@pytest.mark.parametrize(
    ("bytes_", "verdict"),
    [((1e8, 2e8, 4e8), evidence.HOLDS), ((1e8, 1.5e8, 2e8), evidence.CONDITIONS), ((1e8, 1e8, 1e8), evidence.FAILS)],
)
def test_memory_is_judged_by_the_growth_a_doubling(bytes_, verdict):
    found = [
        {"shape": f"{rows}x8", "seq_len": 8, "batch_size": rows, "memory_bytes": size}
        for rows, size in zip((1, 2, 4), bytes_, strict=True)
    ]
    judged = shapes_claims.memory_of_batch({"shapes": found})
    assert judged[0] == verdict
    assert f"1x8 to 4x8 {(bytes_[-1] / bytes_[0]) ** 0.5:.2f} times a doubling" in judged[1]
    assert shapes_claims.memory_of_batch({"shapes": found[:1]})[0] == evidence.UNTESTED


def test_verdicts_are_of_claims_that_the_ablation_leaves_untested(finished):
    found = shapes_claims.verdicts(results_of(finished)["analysis"])
    assert [v.verdict for v in found] == [evidence.FAILS, evidence.FAILS, evidence.CONDITIONS]


def test_a_shape_is_base_with_its_rows():
    config = load_strategy("16x128", "cpu", ["--config.train.tokens=4096"])
    assert (config.strategy, config.batch_size, config.seq_len, config.train.tokens) == ("16x128", 16, 128, 4096)
    plain = load_strategy("balanced", "cpu", []).to_dict()
    shaped = load_strategy("16x512", "cpu", []).to_dict()
    assert shaped | {"strategy": "balanced"} == plain


@pytest.mark.parametrize("name", ["16x", "x128", "16x128x2", "0x128", "16X128", "016x128", "nothing", "16 x 128"])
def test_what_is_no_shape_and_no_file_is_refused(name):
    with pytest.raises(ConfigError, match="no shape such as 64x128"):
        load_strategy(name, "cpu", [])


def test_time_left_is_that_of_the_tuning(tmp_path):
    given = {"8x128": 0.04, "32x128": 0.04}
    tunes = {
        budget: tune.Plan(tmp_path / budget, "cpu", "optimizer.learning_rate", 6, {}, given, 42, 128)
        for budget in shapes.BUDGETS
    }
    plan = script.Plan(tmp_path, tunes, (43,), 65_536, 4096)
    runs = [script.Run("8x128", "tokens", 43), script.Run("8x128", "steps", 43), script.Run("32x128", "tokens", 43)]
    assert script._left(plan, runs) == ""
    for budget, seconds in (
        ("tokens", {"8x128-a": 50.0, "8x128-b": 40.0, "32x128-a": 35.0}),
        ("steps", {"8x128-a": 5}),
    ):
        (tmp_path / budget).mkdir()
        ledger.write(tmp_path / budget / tune.STATE, {"seconds": seconds})
    assert script._left(plan, runs) == ", about 80 s left"
