"""The script of a study of shapes: each at its best learning rate, at equal tokens and at equal steps, and resumed."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from experiments import ledger, shapes_plan, tune
from experiments import shapes as script
from experiments.flags import load_config
from experiments.strategies import load_strategy
from research.analysis import shapes
from research.analysis.runs import DIVERGED_CODE
from research.config import ConfigError, num_steps
from tests.fake_shapes import (
    GRID,
    SHAPES,
    STEPS,
    best_rate,
    calls,
    commands,
    fields_of,
    name_of,
    results_of,
    study,
)

LARGEST = ("128x128", "32x512")  # the same runs at equal tokens and at equal steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("shapes")
    assert study(workdir) == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_every_length_has_every_size_of_step_at_its_best_rate(finished):
    found = results_of(finished)["analysis"]["shapes"]
    assert [(s["shape"], s["batch_size"], s["seq_len"]) for s in found] == [(s, *shapes.sizes(s)) for s in SHAPES]
    for shape in found:
        budget = "tokens" if shape["shape"] in LARGEST else "steps"
        assert shape["rates"]["tokens"] == {"best": best_rate(shape["shape"]), "inside": True}
        assert shape["rates"]["steps"] == {"best": best_rate(shape["shape"], budget), "inside": True}


def test_commands_make_runs_of_equal_tokens_or_steps_at_the_best_rate_by_seeds_of_their_own(finished):
    """The config is loaded as experiments.train loads it."""
    compared = [command for name, command in commands(finished) if not name.startswith("tune")]
    assert len(compared) == 3 * (6 + 4)
    for command in compared:
        fields = fields_of(command)
        overrides = [part for part in command if part.startswith("--config.")]
        config = load_config(command[1].removeprefix("--config="), overrides)
        shape, budget = Path(fields["--workdir"]).name.split("-")[:2]
        assert (config.batch_size, config.seq_len) == shapes.sizes(shape)
        assert config.strategy == shape
        assert config.optimizer.learning_rate == best_rate(shape, budget)
        assert config.optimizer.schedule == "cosine"
        assert config.train.eval_every == 0
        steps = num_steps(config)
        assert steps == STEPS if budget == "steps" else steps * config.batch_size * config.seq_len == 65_536
        assert Path(fields["--workdir"]).name == name_of(shape, budget, config.seed)
        assert config.seed in (43, 44, 45)


def test_rates_are_found_at_each_budget_by_the_configs_seed(finished):
    tuned = {name: fields_of(command) for name, command in commands(finished) if name.startswith("tune")}
    for name, fields in tuned.items():
        budget = name.partition("/")[0].removeprefix("tune_")
        assert "seed" not in fields
        assert fields.get("train.tokens") == ("65536" if budget == "tokens" else None)
        assert fields.get("train.steps") == (str(STEPS) if budget == "steps" else None)
    assert not [name for name in tuned if name.startswith("tune_steps") and name.split("/")[1].startswith(LARGEST)]


def test_a_finished_study_is_not_run_again(copied):
    before = calls(copied)
    assert study(copied) == 0
    assert calls(copied) == before


def test_seeds_may_be_added(copied):
    before = len(calls(copied))
    assert study(copied, "--seeds=46") == 0
    new = calls(copied)[before:]
    assert len(new) == 10
    assert all(name.endswith("seed46") for name in new)
    assert results_of(copied)["analysis"]["shapes"][0]["at"]["tokens"]["seeds"] == [43, 44, 45, 46]


def test_goes_on_where_it_was_stopped(tmp_path):
    stopped = name_of("8x512", "tokens", 43)
    assert study(tmp_path, stops=stopped) == 130
    before = calls(tmp_path)
    assert study(tmp_path) == 0
    after = calls(tmp_path)
    assert after[len(before)] == stopped
    assert len(set(after)) == len(after) - 1


def test_a_study_that_was_stopped_early_has_a_report(tmp_path, capsys):
    """Before the first run that compares, and before rates at equal steps were looked for."""
    assert study(tmp_path, stops="tune_tokens/32x128-learning_rate-0.04-seed42") == 130
    assert script.main([f"--workdir={tmp_path}", "--report_only"]) == 130  # of the run that was stopped
    assert "No run that compares is finished" in capsys.readouterr().out
    text = (tmp_path / "report" / "report.md").read_text()
    assert "At equal steps no learning rate is settled of 8x128, 32x128, 2x512 and 8x512: not compared." in text
    assert "None" not in text


def test_a_run_that_fails_is_said_and_in_no_mean(tmp_path, capsys):
    failing = name_of("8x128", "steps", 44)
    assert study(tmp_path, exits={failing: 1}) == 1
    results = results_of(tmp_path)
    assert results["analysis"]["seeds"] == {"tokens": [43, 44, 45], "steps": [43, 45]}
    assert {tuple(shape["at"]["steps"]["seeds"]) for shape in results["analysis"]["shapes"]} == {(43, 45)}
    assert f"{failing} failed: exit code 1" in capsys.readouterr().err
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"{failing}: failed: exit code 1." in text
    assert "At equal steps, seeds that not every shape has finished are in no mean: 44." in text


def test_a_run_that_diverges_is_said_as_that(tmp_path):
    diverging = name_of("8x128", "steps", 44)
    assert study(tmp_path, exits={diverging: DIVERGED_CODE}) == 0
    assert f"{diverging}: diverged." in (tmp_path / "report" / "report.md").read_text()


def test_a_shape_whose_rates_are_not_all_tried_is_not_compared_until_they_are(tmp_path, capsys):
    failing = "tune_tokens/8x128-learning_rate-0.02-seed42"
    assert study(tmp_path, exits={failing: 1}) == 1
    assert not [name for name in calls(tmp_path) if name.startswith("8x128-tokens")]
    assert [name for name in calls(tmp_path) if name.startswith("8x128-steps")]
    assert f"{failing} failed: exit code 1" in capsys.readouterr().err
    text = (tmp_path / "report" / "report.md").read_text()
    assert "At equal tokens no learning rate is settled of 8x128: not compared." in text
    assert f"{failing}: failed: exit code 1." in text
    assert study(tmp_path) == 0
    assert results_of(tmp_path)["analysis"]["shapes"][0]["at"]["tokens"]["seeds"] == [43, 44, 45]


def test_no_loss_of_one_rate_is_shown_under_another(tmp_path):
    """A wider grid moves the best: runs at the rate of before are left out, and made again."""
    assert study(tmp_path, "--limit=3") == 0
    found = {shape["shape"]: shape for shape in results_of(tmp_path)["analysis"]["shapes"]}
    assert found["128x128"]["rates"]["tokens"] == {"best": 0.08, "inside": False}
    assert study(tmp_path, "--limit=6") == 0
    results = results_of(tmp_path)
    assert {run["name"] for run in results["runs"]} >= {name_of("128x128", "tokens", seed) for seed in (43, 44, 45)}
    for run in results["runs"]:
        about = results["study"]["compared"][run["name"]]
        assert about["rate"] == best_rate(about["shape"], about["budget"])


def test_a_run_that_ended_as_it_was_stopped_is_finished(tmp_path):
    """Its result is there, whatever code was kept."""
    stopped = "tune_tokens/8x128-learning_rate-0.02-seed42"
    assert study(tmp_path, stops=stopped, stopped_after=True) == 130
    assert study(tmp_path) == 0
    assert "## Warnings" not in (tmp_path / "report" / "report.md").read_text()
    assert calls(tmp_path).count(stopped) == 1


def test_a_study_whose_rates_are_not_all_made_is_not_finished(copied, capsys):
    """As where the machine went down while they were looked for."""
    name = "tune_steps/8x128-learning_rate-0.02-seed42"
    shutil.rmtree(copied / name)
    assert script.main([f"--workdir={copied}", "--report_only"]) == 1
    assert f"{name} missing" in capsys.readouterr().err
    assert f"{name}: missing." in (copied / "report" / "report.md").read_text()


def test_a_rate_that_changes_is_that_of_every_seed_there_was(tmp_path):
    assert study(tmp_path, "--limit=3") == 0
    assert study(tmp_path, "--limit=6", "--seeds=46") == 0
    assert results_of(tmp_path)["analysis"]["seeds"] == dict.fromkeys(shapes.BUDGETS, [43, 44, 45, 46])


def test_a_shape_that_no_rate_fits_is_not_compared(tmp_path):
    names = [f"tune_tokens/2x512-learning_rate-{0.04 * 2.0**k:g}-seed42" for k in range(-6, 7)]
    assert study(tmp_path, exits=dict.fromkeys(names, DIVERGED_CODE)) == 0
    results = results_of(tmp_path)
    missing = next(s for s in results["analysis"]["shapes"] if s["shape"] == "2x512")
    assert (missing["rates"]["tokens"]["best"], missing["at"]["tokens"]) == (None, None)
    at_tokens = [pair for pair in results["analysis"]["pairs"] if pair["budget"] == "tokens"]
    assert not any("2x512" in (pair["a"], pair["b"]) for pair in at_tokens)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "At equal tokens no learning rate is settled of 2x512: not compared." in text
    assert "\n| 2x512 | 1,024 | – | – | – | – | 0.04 | 4,096 |" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens_per_step=1000,2000"], "--tokens_per_step=1000: is no whole number of rows of 128 tokens"),
        (["--tokens_per_step=4096"], "--tokens_per_step='4096': name at least two"),
        (["--lengths=128,many"], "--lengths='128,many': give whole numbers"),
        (["--lengths="], "--lengths='': give whole numbers"),
        (["--lengths=0,128"], "--lengths='0,128': give whole numbers, divided by commas above 0"),
        (["--seeds=42,43"], "--seeds='42,43': give seeds other than 42"),
        (["--seeds="], "--seeds='': give whole numbers"),
        (["--config.train.tokens=65537"], "config.train.tokens=65537: is no whole number of steps: give a multiple of"),
        (["--config.train.tokens=0"], "config.train.tokens=0: is no whole number of steps"),
        (["--tokens_per_step=10240,16384"], "config.train.tokens=65536: is no whole number of steps"),
        (["--config.batch_size=4"], "config.batch_size='given': the strategy 8x128 is a shape"),
        (["--config.strategy=other"], "config.strategy='given': the strategy 8x128 is a shape"),
        (["--config.train.stages=((64,0.5),)"], "config.train.stages"),
        (["--config.data.shuffle_block=512"], "config.data.shuffle_block=512"),
        (["--limit=2"], "--limit=2"),
        (["--nothing=1"], "argument='--nothing=1'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, arguments, said):
    assert study(tmp_path / "new", *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "new").exists()


def test_steps_alone_are_refused(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path / 'new'}", *GRID[:2], "--config.train.steps=5"]
    assert script.main(arguments, train=("train",), check=("check",)) == 2
    assert "config.train.steps=5: shapes have steps of unlike size" in capsys.readouterr().err


def test_a_folder_of_another_study_is_refused(copied, capsys):
    before = calls(copied)
    assert study(copied, "--config.model.num_layers=2") == 2
    assert "holds a study of other shapes or config" in capsys.readouterr().err
    assert study(copied, "--lengths=128") == 2
    assert calls(copied) == before


def test_a_check_that_fails_starts_nothing(tmp_path):
    assert study(tmp_path / "x", checked=2) == 2
    assert not (tmp_path / "x").exists()


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


def test_a_dry_run_says_what_is_known_beforehand(tmp_path, capsys):
    assert study(tmp_path, "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("train ")]) == 3 * (6 + 4)
    assert shlex.split(lines[1])[1].endswith("configs/base.py:cpu")
    assert lines[-1] == "# 10 runs of each seed (43,44,45): every shape at its best"
    assert calls(tmp_path) == []


def test_a_schedule_that_is_given_is_kept(tmp_path, capsys):
    assert study(tmp_path, "--dry_run", "--config.optimizer.schedule=constant") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train ")]
    assert all("--config.optimizer.schedule=constant" in line and "cosine" not in line for line in lines)


def test_report_only_wants_a_study(tmp_path, capsys):
    assert script.main([f"--workdir={tmp_path}", "--report_only"]) == 2
    assert "holds no study of shapes" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [{"shapes": None}, {"tokens": "many"}, {"seeds": 43}, {"shapes": ["a"]}])
def test_a_damaged_state_is_one_line(copied, capsys, damage):
    path = copied / script.STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert script.main([f"--workdir={copied}", "--report_only"]) == 2
    err = capsys.readouterr().err
    assert "shapes.json is damaged" in err
    assert err.count("\n") == 1


def test_each_script_refuses_the_others_report(finished, capsys):
    assert tune.main([f"--workdir={finished / 'report'}", "--report_only"]) == 2
    assert "is not a tuning's" in capsys.readouterr().err


def test_time_left_is_that_of_runs_not_made(tmp_path):
    given = {"8x128": 0.04, "32x128": 0.04}
    tunes = {
        budget: tune.Plan(tmp_path / budget, "cpu", "optimizer.learning_rate", 6, {}, given, 42, 128)
        for budget in shapes.BUDGETS
    }
    plan = shapes_plan.Plan(tmp_path, tunes, (43,), 65_536, 4096)
    every = [("8x128", "tokens", 43, 0.04), ("8x128", "steps", 43, 0.02), ("32x128", "tokens", 43, 0.04)]
    todo = [shapes_plan.Run(*run) for run in every]
    assert script._left(plan, todo) == ""
    for budget, rate, seconds in (("tokens", 0.04, 45.0), ("steps", 0.02, 5.0)):
        (tmp_path / budget).mkdir()
        took = {f"{shape}-learning_rate-{rate:g}-seed42": seconds for shape in given} | {"8x128-other": 1.0}
        ledger.write(tmp_path / budget / tune.STATE, {"seconds": took})
    assert script._left(plan, todo) == ", about 95 s left"
    (tmp_path / todo[0].name).mkdir()
    for name in ("result.json", "heldout_losses.npz"):
        (tmp_path / todo[0].name / name).touch()
    assert script._left(plan, todo) == ", about 50 s left"
    ledger.write(tmp_path / script.STATE, {"exit_codes": {todo[1].name: DIVERGED_CODE}})
    assert script._left(plan, todo) == ", about 45 s left"


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
