"""The runs of a study: what is kept of them, what is refused, and what is said to be missing."""

import json
import shutil

import numpy as np
import pytest

from research.analysis import archive, study
from research.analysis.study import Key
from research.config import ConfigError
from tests.fake_runs import A_DOCUMENT, NUM_DOCUMENTS, write_run, write_study


def test_a_report_folder_gives_back_what_was_collected(tmp_path):
    keys = write_study(tmp_path, seeds=(1, 2), settings=("independent", "paired", "recall"))
    collected = archive.collect(tmp_path, keys, {})
    archive.save(collected, tmp_path / "report")
    for before, after in zip(collected, archive.load(tmp_path / "report"), strict=True):
        assert (before.key, before.status, before.result, before.config) == (
            after.key, after.status, after.result, after.config,
        )  # fmt: skip
        assert list(before.curve) == list(after.curve) and before.arrays.keys() == after.arrays.keys()
        for name, array in before.arrays.items():
            np.testing.assert_array_equal(array, after.arrays[name])


def test_targets_are_kept_once(tmp_path):
    keys = write_study(tmp_path, seeds=(1, 2))
    archive.save(archive.collect(tmp_path, keys, {}), tmp_path / "report")
    with np.load(tmp_path / "report" / "heldout_losses.npz") as file:
        assert sum(name.endswith("/position") for name in file) == 1


def test_no_folder_of_the_machine_is_kept(tmp_path):
    keys = write_study(tmp_path, seeds=(1,))
    archive.save(archive.collect(tmp_path, keys, {}), tmp_path / "report")
    assert "/home/" not in (tmp_path / "report" / "results.json").read_text()


def test_many_losses_are_kept_as_float16(tmp_path, monkeypatch):
    keys = write_study(tmp_path, seeds=(1,))
    monkeypatch.setattr(archive, "LOSSES_LIMIT", 1000)
    archive.save(archive.collect(tmp_path, keys, {}), tmp_path / "report")
    run = archive.load(tmp_path / "report")[0]
    assert run.losses[24].dtype == np.float16 and run.arrays["window_sums"].dtype == np.float32


def test_a_missing_and_a_failed_run_are_in_no_arm(tmp_path):
    keys = write_study(tmp_path, seeds=(1, 2))
    shutil.rmtree(tmp_path / "balanced-independent-2")
    runs = archive.collect(tmp_path, keys, {"long_seq-independent-1": 3})
    assert {run.key.name: run.status for run in runs if not run.finished} == {
        "balanced-independent-2": "missing",
        "long_seq-independent-1": "failed: exit code 3",
    }
    seeds = {arm.strategy: arm.seeds for arm in study.arms(runs, "independent")}
    assert seeds == {"large_batch": [1, 2], "balanced": [1], "long_seq": [2]}


def test_the_longest_strategy_serves_both_orders(tmp_path):
    runs = archive.collect(tmp_path, write_study(tmp_path, settings=("independent", "paired")), {})
    paired = {arm.strategy: arm for arm in study.arms(runs, "paired")}
    assert list(paired) == ["large_batch", "balanced", "long_seq"]
    assert {run.key.setting for run in paired["long_seq"].runs} == {"independent"}
    assert {run.key.setting for run in paired["balanced"].runs} == {"paired"}
    assert study.arms([run for run in runs if run.key.setting == "independent"], "paired") == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fingerprint": "another"}, "of another corpus"),
        ({"protocol": "published"}, "of another protocol"),
        ({"targets_from": 2001}, "scored on other held-out targets"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changes, problem):
    keys = write_study(tmp_path, seeds=(1,), balanced=changes)
    with pytest.raises(ConfigError, match=problem) as error:
        archive.collect(tmp_path, keys, {})
    assert "balanced-independent-1" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("setting", study.SETTINGS)
def test_seeds_of_another_config_are_refused(tmp_path, setting):
    keys = write_study(tmp_path, seeds=(1, 2), settings=("independent", "paired", "recall"))
    path = tmp_path / f"balanced-{setting}-2" / "config.json"
    config = json.loads(path.read_text())
    config["mesh"] = {"data": 2}
    path.write_text(json.dumps(config))
    assert archive.collect(tmp_path, keys, {})  # on other devices it is the same run
    config["optimizer"]["learning_rate"] = 0.5
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"balanced-{setting}-2 differs.*config.optimizer.learning_rate"):
        archive.collect(tmp_path, keys, {})


def test_paired_runs_of_another_order_are_refused(tmp_path):
    keys = write_study(tmp_path, seeds=(1,), settings=("independent", "paired"))
    path = tmp_path / "balanced-paired-1" / "config.json"
    path.write_text(path.read_text().replace('"shuffle_block": 2048', '"shuffle_block": 512'))
    with pytest.raises(ConfigError, match="data.shuffle_block"):
        archive.collect(tmp_path, keys, {})


def test_a_seed_in_both_orders_counts_once_in_each(tmp_path):
    """Paired first and independent later: the longest strategy has a run of its own in both."""
    keys = write_study(tmp_path, seeds=(1, 2), settings=("independent", "paired"))
    key = Key("long_seq", "paired", 1)
    write_run(tmp_path / key.name, key)
    runs = archive.collect(tmp_path, [*keys, key], {})
    (arm,) = [arm for arm in study.arms(runs, "paired") if arm.strategy == "long_seq"]
    assert arm.seeds == [1, 2] and [run.key.setting for run in arm.runs] == ["paired", "independent"]


def test_the_recall_task_is_another_corpus_and_that_is_no_mistake(tmp_path):
    keys = write_study(tmp_path, seeds=(1,), settings=("independent", "recall"))
    assert all(run.finished for run in archive.collect(tmp_path, keys, {}))


@pytest.mark.parametrize("name", ["result.json", "config.json", "heldout_losses.npz", "metrics.jsonl"])
def test_a_damaged_file_is_named(tmp_path, name):
    keys = write_study(tmp_path, seeds=(1,))
    (tmp_path / "balanced-independent-1" / name).write_text("{\n\n")
    with pytest.raises(ConfigError, match=name):
        archive.collect(tmp_path, keys, {})


def test_a_line_cut_short_by_a_kill_is_no_damage(tmp_path):
    key = Key("balanced", "independent", 1)
    write_run(tmp_path / key.name, key)
    path = tmp_path / key.name / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 81, "tok')
    (run,) = archive.collect(tmp_path, [key], {})
    assert run.curve[-1]["step"] == 80


@pytest.mark.parametrize("name", ["results.json", "heldout_losses.npz"])
def test_a_report_folder_without_its_data_is_refused(tmp_path, name):
    archive.save(archive.collect(tmp_path, write_study(tmp_path, seeds=(1,)), {}), tmp_path / "report")
    (tmp_path / "report" / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        archive.load(tmp_path / "report")


def test_a_result_of_an_older_version_is_refused(tmp_path):
    key = Key("balanced", "independent", 1)
    result = write_run(tmp_path / key.name, key)
    del result["flops"]
    (tmp_path / key.name / "result.json").write_text(json.dumps(result))
    with pytest.raises(ConfigError, match="has no 'flops'"):
        archive.collect(tmp_path, [key], {})


def test_losses_are_by_context(tmp_path):
    (run, *_) = archive.collect(tmp_path, write_study(tmp_path, seeds=(1,)), {})
    assert list(run.losses) == [24, 48, 96, 192, 384, 768, 1536]
    assert all(loss.shape == (NUM_DOCUMENTS * A_DOCUMENT,) for loss in run.losses.values())
