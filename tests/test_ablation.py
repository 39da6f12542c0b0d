"""The ablation: one process a strategy, nothing started on a mistake, nothing lost on a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.ablation import STRATEGIES, load_strategy, main

TRAIN = (sys.executable, "-m", "tests.fake_runs")
PASS = (sys.executable, "-c", "pass")
ROOT = Path(__file__).resolve().parents[1]


def ablation(workdir: Path, *arguments: str, check=PASS) -> int:
    return main([f"--workdir={workdir}", *arguments], train=TRAIN, check=check)


def call_of(workdir: Path, strategy: str) -> dict:
    return json.loads((workdir / strategy / "call.json").read_text())


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # children import tests.fake_runs


def test_each_strategy_runs_in_its_own_process_with_every_override(tmp_path, capfd):
    code = ablation(tmp_path, "--config.seed=7", "--", "--config.train.eval_every=4")
    assert code == 0
    calls = [call_of(tmp_path, strategy) for strategy in STRATEGIES]
    assert len({call["pid"] for call in calls}) == len(STRATEGIES)
    assert all(call["parent"] == os.getpid() for call in calls)
    assert all(call["group"] != os.getpgrp() for call in calls)  # Ctrl-C comes through us
    for call in calls:
        assert call["overrides"] == ["--config.seed=7", "--config.train.eval_every=4"]
        assert call["scale"] == "cpu"
    assert "fake run of balanced" in capfd.readouterr().out  # the child's output is ours
    report = tmp_path / "report"
    assert {"report.md", "results.json", "curves.csv", "heldout_losses.npz", "figures"} == {
        path.name for path in report.iterdir()
    }


def test_a_failed_run_is_in_the_report_and_in_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_EXITS", '{"balanced": 3}')
    assert ablation(tmp_path) == 3
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| balanced | failed: exit code 3 |" in text
    assert "long_seq - large_batch" in text or "large_batch - long_seq" in text
    monkeypatch.delenv("FAKE_EXITS")
    assert ablation(tmp_path, "--strategies=balanced") == 0  # the report keeps the others
    text = (tmp_path / "report" / "report.md").read_text()
    assert "failed" not in text and "large_batch - balanced" in text


def test_an_older_result_does_not_hide_a_failure(tmp_path, monkeypatch):
    assert ablation(tmp_path, "--strategies=balanced") == 0
    monkeypatch.setenv("FAKE_EXITS", '{"balanced": 2}')
    assert ablation(tmp_path, "--strategies=balanced") == 2
    assert "failed: exit code 2" in (tmp_path / "report" / "report.md").read_text()


def test_a_missing_run_is_in_the_report_and_in_the_exit_code(tmp_path):
    assert ablation(tmp_path, "--strategies=balanced,long_seq") == 0
    assert ablation(tmp_path, "--report_only", "--strategies=balanced,large_batch") == 1
    assert "| large_batch | missing |" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--config.seed=abc"], "config.seed='abc'"),
        (["--config.model.depth=4"], "config.model.depth='4'"),
        (["--strategies=balanced,nosuch"], "'nosuch'"),
        (["--scale=huge"], "no scale huge"),
        (["--seed=3"], "'--seed=3'"),
        (["--config.seed"], "'--config.seed'"),
        (["--report_only"], "--workdir="),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(tmp_path, capsys, arguments, named):
    assert ablation(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "override, named",
    [
        ("--config.model.num_heads=3", "config.model.d_model"),
        ("--config.data.path=/no/such/place", "config.data.path"),
    ],
)
def test_check_only_refuses_what_a_run_would_refuse(tmp_path, capsys, override, named):
    arguments = ["--check_only", "--strategies=balanced", "--config.data.source=text", override]
    assert ablation(tmp_path / "runs", *arguments) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_all_are_checked_before_the_first_starts(tmp_path):
    """The check is a child, given this command's own arguments; its exit code ends the ablation."""
    script = "import sys; sys.exit(2 if '--config.seed=5' in sys.argv else 9)"
    check = (sys.executable, "-c", script)
    assert ablation(tmp_path / "runs", "--config.seed=5", check=check) == 2
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_commands_and_runs_nothing(tmp_path, capsys):
    assert ablation(tmp_path / "runs", "--dry_run", "--config.seed=7", "--scale=published") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for strategy, line in zip(STRATEGIES, lines, strict=True):
        assert f"--config=configs/{strategy}.py:published" in line
        assert f"--workdir={tmp_path}/runs/{strategy} --config.seed=7" in line
    assert not (tmp_path / "runs").exists()


def test_the_config_is_read_as_training_reads_it():
    config = load_strategy("long_seq", "cpu", ["--config.seed=9", "--config.eval.contexts=(24,96)"])
    assert (config.strategy, config.seed, config.eval.contexts) == ("long_seq", 9, (24, 96))
    with pytest.raises(AttributeError):
        config.unknown = 1


def start(workdir: Path, hangs: str, stopped: int) -> subprocess.Popen:
    """An ablation in a process group of its own, with `hangs` training until a signal comes."""
    script = (
        "import sys; from experiments.ablation import main;"
        f"sys.exit(main(['--workdir={workdir}'], train={TRAIN!r}, check={PASS!r}))"
    )
    environment = os.environ | {"FAKE_HANGS": hangs, "FAKE_STOPPED": str(stopped)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (workdir / hangs / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number, stopped, code", [(signal.SIGTERM, 75, 75), (signal.SIGINT, 0, 130)])
def test_a_signal_reaches_the_child_once_and_ends_the_ablation(tmp_path, number, stopped, code):
    """As Ctrl-C does, the signal goes to the whole process group."""
    process = start(tmp_path, "balanced", stopped)
    os.killpg(process.pid, number)
    assert process.wait(30) == code  # the child's; 128 + signal where the child says 0
    assert json.loads((tmp_path / "balanced" / "saved.json").read_text()) == [number]
    assert (tmp_path / "large_batch" / "result.json").exists()  # ran before
    assert not (tmp_path / "long_seq").exists()  # would have run after
    assert ablation(tmp_path, "--report_only") != 0
    assert f"failed: exit code {code}" in (tmp_path / "report" / "report.md").read_text()
    assert ablation(tmp_path) == 0  # the same command goes on
    assert "failed" not in (tmp_path / "report" / "report.md").read_text()


def test_report_only_needs_no_more_than_the_data_files(tmp_path):
    assert ablation(tmp_path / "runs") == 0
    made, committed = tmp_path / "runs" / "report", tmp_path / "committed"
    committed.mkdir()
    for name in ("results.json", "curves.csv", "heldout_losses.npz"):
        (committed / name).write_bytes((made / name).read_bytes())
    assert ablation(committed, "--report_only") == 0
    assert (committed / "report.md").read_bytes() == (made / "report.md").read_bytes()
