"""The ablation: one process a strategy, nothing started on a mistake, nothing lost on a signal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.ablation import STRATEGIES, load_strategy, main
from experiments.flags import load_config
from research import checkpoint

TRAIN = (sys.executable, "-m", "tests.fake_runs")
PASS = (sys.executable, "-c", "pass")
ROOT = Path(__file__).resolve().parents[1]


def ablation(workdir: Path, *arguments: str, check=PASS) -> int:
    return main([f"--workdir={workdir}", *arguments], train=TRAIN, check=check)


def call_of(workdir: Path, name: str) -> dict:
    return json.loads((workdir / name / "call.json").read_text())


def report_of(workdir: Path) -> str:
    return (workdir / "report" / "report.md").read_text()


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # children import tests.fake_runs


def test_each_run_has_a_process_of_its_own_with_every_override(tmp_path, capfd):
    code = ablation(tmp_path, "--config.seed=7", "--", "--config.train.eval_every=4")
    assert code == 0
    calls = [call_of(tmp_path, f"{strategy}-independent-7") for strategy in STRATEGIES]
    assert len({call["pid"] for call in calls}) == len(STRATEGIES)
    assert all(call["parent"] == os.getpid() for call in calls)
    assert all(call["group"] != os.getpgrp() for call in calls)  # Ctrl-C comes through us
    for call, strategy in zip(calls, STRATEGIES, strict=True):
        assert call["overrides"] == ["--config.seed=7", "--config.train.eval_every=4"]
        assert call["config"] == f"configs/{strategy}.py:cpu"
    said = capfd.readouterr().out
    assert "fake run of balanced" in said and "left" in said  # the child's output is ours
    made = {path.name for path in (tmp_path / "report").iterdir()}
    assert made == {"report.md", "report.html", "results.json", "heldout_losses.npz", "figures"}


def test_a_study_is_planned_seed_by_seed_and_pairs_share_the_longest_rows(tmp_path, capsys):
    arguments = [
        "--seeds=1,2",
        "--settings=independent,paired,recall",
        "--config.mesh.data=1",
        "--config.train.steps=5",
    ]
    assert ablation(tmp_path, *arguments, "--recall.train.steps=3", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("--workdir=")[1].split()[0].removeprefix(f"{tmp_path}/") for line in lines]
    one = ["large_batch-independent-1", "large_batch-paired-1", "large_batch-recall-1"]
    one += ["balanced-independent-1", "balanced-paired-1", "balanced-recall-1"]
    one += ["long_seq-independent-1", "long_seq-recall-1"]  # its rows are the blocks of the paired order
    assert names == one + [name.replace("-1", "-2") for name in one]
    for line, name in zip(lines, names, strict=True):
        text = "-recall-" not in name
        assert ("--config.train.steps=5" in line) == text and ("--config.train.steps=3" in line) != text
        assert ("--config.data.shuffle_block=2048" in line) == ("-paired-" in name)
        assert "--config.mesh.data=1" in line and f"--config.seed={name[-1]}" in line
        assert (".py:cpu" in line) == text and (".py:recall" in line) != text


def test_a_field_of_one_strategy_is_given_to_its_runs_on_text_alone(tmp_path, capsys):
    own = ["--long_seq.optimizer.learning_rate=0.02", "--balanced.optimizer.learning_rate=0.08"]
    shared = ["--config.optimizer.learning_rate=0.01", "--settings=independent,paired,recall"]
    assert ablation(tmp_path, *own, *shared, "--dry_run") == 0
    for line in capsys.readouterr().out.splitlines():
        words = line.split()
        file = next(word for word in words if word.startswith("--config=")).removeprefix("--config=")
        config = load_config(file, [word for word in words if word.startswith("--config.")])
        expected = {"large_batch": 0.01, "balanced": 0.08, "long_seq": 0.02}[config.strategy]
        if config.scale == "recall":
            expected = load_config(file).optimizer.learning_rate
        assert config.optimizer.learning_rate == expected, line


def test_the_longest_strategy_is_trained_in_paired_order_where_it_is_in_no_other(tmp_path, capsys):
    assert ablation(tmp_path, "--settings=paired", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("--config.data.shuffle_block=2048" in line for line in lines)


def test_a_budget_plans_the_batches_of_runs_on_text(tmp_path, capsys):
    arguments = ["--settings=independent,recall", "--memory=2GiB", "--dry_run"]
    assert ablation(tmp_path, *arguments) == 0
    for line in capsys.readouterr().out.splitlines():
        given = [word for word in line.split() if word.startswith(("--config.batch_size", "--config.memory_budget"))]
        assert given == ([] if "-recall-" in line else ["--config.batch_size=-1", "--config.memory_budget=2GiB"])


def test_a_failed_run_is_in_the_report_and_in_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_EXITS", '{"balanced-independent-42": 3}')
    assert ablation(tmp_path) == 3
    assert "balanced-independent-42 failed: exit code 3" in report_of(tmp_path)
    assert "large_batch - long_seq" in report_of(tmp_path)
    monkeypatch.delenv("FAKE_EXITS")
    assert ablation(tmp_path, "--strategies=balanced") == 0  # the report keeps the others
    assert "failed" not in report_of(tmp_path) and "large_batch - balanced" in report_of(tmp_path)


def test_an_older_result_does_not_hide_a_failure(tmp_path, monkeypatch):
    assert ablation(tmp_path, "--strategies=balanced,long_seq") == 0
    monkeypatch.setenv("FAKE_EXITS", '{"balanced-independent-42": 2}')
    assert ablation(tmp_path, "--strategies=balanced") == 2
    assert "failed: exit code 2" in report_of(tmp_path)


def test_a_missing_seed_is_in_the_report_and_in_the_exit_code(tmp_path):
    assert ablation(tmp_path, "--seeds=42,43", "--strategies=balanced,long_seq") == 0
    shutil.rmtree(tmp_path / "balanced-independent-43")
    assert ablation(tmp_path, "--report_only") == 1
    assert "balanced-independent-43 missing" in report_of(tmp_path)


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
        (["--seeds=1,x"], "--seeds='x'"),
        (["--seeds=1,٣"], "--seeds='٣'"),
        (["--seeds=1,2", "--config.seed=3"], "--seeds='1,2'"),
        (["--settings=paired,odd"], "--settings='odd'"),
        (["--settings=paired", "--config.data.shuffle_block=2048"], "config.data.shuffle_block=2048"),
        (["--config.data.shuffle_block=2048"], "config.data.shuffle_block=2048"),  # would not be independent
        (["--settings=paired", "--config.data.protocol=published"], "--settings='paired'"),
        (["--config.=1"], "config."),
        (["--config.eval.contexts[9]=4"], "config.eval.contexts[9]"),
        (["--settings=recall", "--recall.model.depth=4"], "config.model.depth='4'"),
        (["--strategies=,"], "--strategies=''"),
        (["--memory=24 bananas"], "--memory='24 bananas'"),
        (["--memory=2GiB", "--config.batch_size=8"], "--config.batch_size is given too"),
        (["--memory=2GiB", "--balanced.batch_size=8"], "--config.batch_size is given too"),
        (["--long_sq.optimizer.learning_rate=0.02"], "'--long_sq.optimizer.learning_rate=0.02'"),
        (["--strategies=balanced", "--long_seq.train.steps=2"], "'--long_seq.train.steps=2'"),
        (["--balanced.model.depth=4"], "config.model.depth='4'"),
        (["--balanced.seed=1"], "--balanced.seed"),
        (["--balanced.data.split_seed=1"], "--balanced.data.split_seed"),
        (["--balanced.eval.num_targets=64"], "--balanced.eval.num_targets"),
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


def test_a_study_of_another_config_is_refused_and_stays(tmp_path, capsys):
    """The child that checks reads the folders that are there."""
    run, text = tmp_path / "balanced-independent-42", tmp_path / "text"
    with checkpoint.claim_workdir(str(run), load_strategy("balanced", "cpu", []).to_dict(), "of another text"):
        pass
    before = (run / "config.json").read_bytes()
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"text number {i} " * 2000)
    fields = dict(source="text", path=text, cache_dir=tmp_path / "cache", tokenizer="bytes", max_epochs=0)
    overrides = [f"--config.data.{name}={value}" for name, value in fields.items()]
    assert ablation(tmp_path, "--check_only", "--strategies=balanced", *overrides) == 2
    error = capsys.readouterr().err  # the field is named, rather than the corpus that follows from it
    assert error.startswith("error: config.data.max_epochs=0") and "choose another --workdir" in error
    assert (run / "config.json").read_bytes() == before


def test_a_home_is_the_home_of_every_child(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--workdir=~/study", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert f"--workdir={tmp_path}/study/balanced-independent-42" in said and "~" not in said


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert ablation(tmp_path / "file" / "runs") == 2
    assert "cannot be made" in capsys.readouterr().err


def test_all_are_checked_before_the_first_starts(tmp_path):
    """The check is a child, given this command's own arguments; its exit code ends the ablation."""
    script = "import sys; sys.exit(2 if '--config.seed=5' in sys.argv else 9)"
    check = (sys.executable, "-c", script)
    assert ablation(tmp_path / "runs", "--config.seed=5", check=check) == 2
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
    process = start(tmp_path, "balanced-independent-42", stopped)
    os.killpg(process.pid, number)
    assert process.wait(30) == code  # the child's; 128 + signal where the child says 0
    assert json.loads((tmp_path / "balanced-independent-42" / "saved.json").read_text()) == [number]
    assert (tmp_path / "large_batch-independent-42" / "result.json").exists()  # ran before
    assert not (tmp_path / "long_seq-independent-42").exists()  # would have run after
    assert ablation(tmp_path, "--report_only") != 0
    assert f"failed: exit code {code}" in report_of(tmp_path)
    assert ablation(tmp_path) == 0  # the same command goes on
    assert "failed" not in report_of(tmp_path)


def test_report_only_needs_no_more_than_the_data_files(tmp_path):
    assert ablation(tmp_path / "runs", "--seeds=1,2", "--settings=independent,paired,recall") == 0
    made, committed = tmp_path / "runs" / "report", tmp_path / "committed"
    committed.mkdir()
    for name in ("results.json", "heldout_losses.npz"):
        (committed / name).write_bytes((made / name).read_bytes())
    assert ablation(committed, "--report_only") == 0
    for name in ("report.md", "report.html", "results.json"):
        assert (committed / name).read_bytes() == (made / name).read_bytes()
    (committed / "results.json").write_text('{"study": {}, "runs": [{"name": "of a waterfall"}]}')
    assert ablation(committed, "--report_only") == 2


@pytest.mark.parametrize("content", ['{"runs": [', "[]", '{"runs": [{"strategy": "balanced"}]}', '{"runs": 3}', "{}"])
@pytest.mark.parametrize("name", ["results.json", "ablation.json"])
def test_a_damaged_file_is_named_in_one_line_and_stays(tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    (tmp_path / "heldout_losses.npz").write_bytes(b"")
    assert ablation(tmp_path, "--report_only") == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1 and (tmp_path / name).read_text() == content
    if name == "ablation.json":  # nor is anything run before it is seen
        assert ablation(tmp_path) == 2
        assert capsys.readouterr().err == error and len([*tmp_path.iterdir()]) == 2


def test_a_seed_that_is_given_twice_is_one(tmp_path, capsys):
    assert ablation(tmp_path, "--strategies=balanced", "--seeds=42,042,7", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("--config.seed=")[2] for line in lines] == ["42", "7"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child that its parent is gone")
def test_a_run_is_told_to_stop_where_the_study_is_killed():
    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit('told')); print('runs', flush=True)"
    waits += "; time.sleep(60)"
    code = f"import sys; from experiments import child; child.run_child([sys.executable, '-c', {waits!r}])"
    pipe = subprocess.PIPE
    study = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert study.stdout.readline() == "runs\n"
    study.kill()
    assert study.communicate(timeout=30)[1] == "told\n"  # the end of stderr, which the run has too
