"""What a report says of how a study was made."""

import dataclasses
import json
from pathlib import Path

import pytest

from research.analysis import archive, protocol
from research.config import ConfigError
from tests.fake_runs import write_study

EVERY_OTHER = "every other field of the config that changes what is computed"


def said(workdir: Path, keys: list) -> str:
    runs = archive.collect(workdir, keys, {})
    return protocol.text({"runs": [dataclasses.asdict(run.key) | vars(run) for run in runs]})


def edit(path: Path, *fields: str, value: object) -> None:
    content = json.loads(path.read_text())
    at = content
    for name in fields[:-1]:
        at = at[name]
    at[fields[-1]] = value
    path.write_text(json.dumps(content))


def test_what_strategies_do_not_share_is_named(tmp_path):
    keys = write_study(tmp_path, seeds=(1,), settings=("independent", "paired"))
    assert EVERY_OTHER in said(tmp_path, keys) and "**Not equal:**" in said(tmp_path, keys)  # FLOPs
    for setting in ("independent", "paired"):
        edit(tmp_path / f"balanced-{setting}-1" / "config.json", "optimizer", "weight_decay", value=0.3)
    found = said(tmp_path, keys)
    assert EVERY_OTHER not in found
    assert (
        "config.optimizer.weight_decay (large_batch None, balanced 0.3, long_seq None)" in found.split("Not equal")[1]
    )


def test_orders_and_shapes_are_not_called_unlike_fields(tmp_path):
    """Between settings the blocks differ, between strategies the rows, between machines the mesh."""
    keys = write_study(tmp_path, seeds=(1, 2), settings=("independent", "paired"))
    edit(tmp_path / "balanced-independent-2" / "config.json", "mesh", value={"data": 2})
    assert "config." not in said(tmp_path, keys)


def test_paired_steps_of_unlike_size_are_not_said_to_see_the_same_tokens(tmp_path):
    keys = write_study(tmp_path, seeds=(1,), settings=("independent", "paired"))
    assert "the same tokens each step for every strategy" in said(tmp_path, keys)
    edit(tmp_path / "balanced-paired-1" / "result.json", "tokens_per_step", value=4096)
    assert "the same tokens one after another for every strategy, in steps of unlike size" in said(tmp_path, keys)


def test_the_code_that_made_the_runs_is_named(tmp_path):
    keys = write_study(tmp_path, seeds=(1,))
    assert "code" not in said(tmp_path, keys)  # results of earlier versions hold none
    for key in keys:
        environment = {
            "commit": "0123456789abcdef",
            "changed": False,
            "python": "3.11.7",
            "packages": {"jax": "0.10.2"},
        }
        (tmp_path / key.name / "environment.json").write_text(json.dumps(environment))
    assert "code commit 0123456789ab (Python 3.11.7, jax 0.10.2)" in said(tmp_path, keys).split("**Not equal")[0]
    edit(tmp_path / "balanced-independent-1" / "environment.json", "changed", value=True)
    assert "balanced commit 0123456789ab, changed since (" in said(tmp_path, keys).split("**Not equal")[1]
    archive.save(archive.collect(tmp_path, keys, {}), tmp_path / "report")
    runs = json.loads((tmp_path / "report" / "results.json").read_text())["runs"]
    found = dict(protocol.facts({"runs": runs}))["code"]
    assert found.startswith("commit 0123456789ab (Python 3.11.7, jax 0.10.2), commit 0123456789ab, changed since")
    archive.save(archive.load(tmp_path / "report"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "results.json").read_text())["runs"] == runs


def test_recall_runs_of_unlike_tasks_are_refused(tmp_path):
    keys = write_study(tmp_path, seeds=(1,), settings=("independent", "recall"))
    assert archive.collect(tmp_path, keys, {})  # the text and the task are not compared with each other
    edit(tmp_path / "balanced-recall-1" / "result.json", "fingerprint", value="another")
    with pytest.raises(ConfigError, match="balanced-recall-1 is of another corpus"):
        archive.collect(tmp_path, keys, {})
