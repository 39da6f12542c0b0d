"""experiments/on_gpu.sh goes on where it was stopped, and no stage keeps another from running. Python is a stand-in."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from experiments import ablation, benchmark, memory_frontier, waterfall, waterfall_plan
from research.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/usr/bin/env bash
# Writes down what it is asked to run, makes the file that --out names, and fails where FAILS is part of the command.
[ "$1" != -c ] || exit "${NO_TORCH:-0}"
printf '%s|' "$@" >> "$CALLS"; echo "$JAX_PLATFORMS" >> "$CALLS"
for argument; do case $argument in
    --out=*) echo {} > "${argument#--out=}" ;;
    --workdir=*) folder=${argument#--workdir=} ;;
esac; done
sleep "${TAKES:-0}"
[[ -z ${FAILS:-} || $* != *$FAILS* ]] || exit "${CODE:-1}"
[[ $* != *memory_frontier* ]] || { mkdir -p "$folder" && touch "$folder/frontier.json"; }
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script; returns what ended it and the commands that it ran since, each up to its last argument."""
    python, books, calls = tmp_path / "python", tmp_path / "two books.jsonl.gz", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    books.touch()

    def run(stage="all", books=books, folder=tmp_path / "gpu", **environment):
        calls.write_text("")
        done = subprocess.run(
            ["bash", "experiments/on_gpu.sh", str(folder), stage, str(books)],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
            env=os.environ | dict(PYTHON=str(python), CALLS=str(calls)) | environment,
        )  # fmt: skip
        return done, calls.read_text().splitlines()

    return run


def names(calls):
    return [call.split("|")[1].removeprefix("experiments.") for call in calls]


def test_all_stages_run_once_and_their_results_are_packed(run, tmp_path):
    done, calls = run()
    assert done.returncode == 0, done.stderr
    wanted = ["pytest", *["benchmark"] * 5, "ablation", "memory_frontier", "memory_check"]
    assert names(calls) == wanted and all(call.endswith("|cuda,cpu") for call in calls)
    assert all("two books.jsonl.gz|" in call for call in calls if "--config.data.source=jsonl" in call)
    with tarfile.open(tmp_path / "gpu" / "kept.tar.gz") as kept:
        assert {"./checks.txt", "./benchmark-compiled.json"} <= set(kept.getnames())
    done, calls = run()  # again: what leaves a file is not run again, the others know it themselves
    assert done.returncode == 0 and names(calls) == ["ablation", "memory_check"]
    for stage in ("study", "waterfall"):
        assert names(run(stage)[1]) == ["waterfall" if stage == "waterfall" else "ablation"]


def test_a_stage_that_fails_keeps_no_other_from_running(run, tmp_path):
    done, calls = run(FAILS="--config.model.unroll=6")
    assert done.returncode == 1 and "benchmark failed" in done.stderr and names(calls)[-1] == "memory_check"
    made = {path.name for path in (tmp_path / "gpu").glob("benchmark-*")}
    assert "benchmark-unrolled-failed.json" in made and "benchmark-unrolled.json" not in made and len(made) == 5
    done, calls = run(FAILS="memory_frontier", folder=tmp_path / "next")
    assert done.returncode == 1 and "memory_check" not in names(calls) and names(calls)[-1] == "memory_frontier"
    done, calls = run(FAILS="pytest", folder=tmp_path / "wrong")
    assert done.returncode == 1 and names(calls) == ["pytest"]  # but checks: nothing is measured of what is wrong
    done, calls = run("checks", FAILS="pytest")
    assert done.returncode == 1 and (tmp_path / "gpu" / "checks.txt").exists()  # the good one of before


def test_out_of_time_ends_the_script_there(run):
    done, calls = run(FAILS="activation=swiglu", CODE="124", LIMIT="3000")
    assert done.returncode == 124 and names(calls) == ["pytest", "benchmark", "benchmark"]
    done, calls = run(FAILS="activation=swiglu", CODE="124")  # its own ten minutes, not those of the others
    assert done.returncode == 1 and names(calls) == ["benchmark", "ablation", "memory_frontier", "memory_check"]
    done, calls = run(LIMIT="150")
    assert done.returncode == 124 and "too little time is left" in done.stderr and calls == []


def test_every_command_is_one_that_its_script_takes(run, monkeypatch, tmp_path):
    """The stand-in takes anything, so what it was asked is given to the real parsers."""
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name)  # PyTorch may be missing here
    calls = [call for stage in ("all", "study", "waterfall") for call in run(stage)[1]]
    asked = [call.split("|")[1:-1] for call in calls if not call.startswith("-m|pytest")]
    seen = set()
    for module, *argv in asked:
        seen.add(module)
        match module:
            case "experiments.benchmark":
                benchmark.parse(argv)
            case "experiments.ablation":
                ablation.plan(ablation.parse(argv))
            case "experiments.waterfall":
                arguments, given = waterfall.parse(argv)
                waterfall_plan.make_plan(arguments.workdir, arguments.scale, given, arguments.seeds, arguments.until)
            case "experiments.memory_frontier":
                memory_frontier.choices(memory_frontier.parse(argv))
            case "experiments.memory_check":
                assert [argument.partition("=")[0] for argument in argv] == ["--workdir", "--most"]
            case _:
                raise AssertionError(module)
    assert len(seen) == 5 and len(asked) == 10
    with pytest.raises(ConfigError):
        ablation.plan(ablation.parse([*asked[-2][1:], "--config.train.stepz=3"]))


def test_the_card_is_watched_beside_the_published_runs_and_no_longer(run, tmp_path):
    watcher = tmp_path / "bin" / "nvidia-smi"
    watcher.parent.mkdir()
    watcher.write_text('#!/usr/bin/env bash\necho $$ "$@"; exec sleep 300\n')
    watcher.chmod(0o755)
    for code in (0, 3):
        path = f"{watcher.parent}:{os.environ['PATH']}"
        done, calls = run("published", PATH=path, TAKES="0.5", CODE=str(code), FAILS="ablation" if code else "")
        assert done.returncode == code and names(calls) == ["ablation"]
    lines = (tmp_path / "gpu" / "clocks.csv").read_text().splitlines()
    assert len(lines) == 2 and all("--id=0 --loop=1" in line and "clocks.sm,power.draw" in line for line in lines)
    for line in lines:
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[0]), 0)


def test_a_peer_that_is_not_there_is_said_and_leaves_no_file(run, tmp_path):
    done, calls = run("benchmark", NO_TORCH="1")
    assert done.returncode == 0 and done.stderr.count("is not installed") == 3 and len(calls) == 2
    assert not (tmp_path / "gpu" / "benchmark-original.json").exists()


def test_corpora_need_no_gpu(run):
    done, calls = run("corpora")
    assert done.returncode == 0 and names(calls) == ["ablation", "ablation", "waterfall"]
    assert all("|--check_only|" in call and call.endswith("|cpu") for call in calls)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(LIMIT="570s"), "LIMIT=570s: give whole seconds"),
        (dict(LIMIT="08"), "LIMIT=08: give whole seconds"),
        (dict(stage="check"), "STAGE=check: choose"),
        (dict(books="none.jsonl"), "BOOKS=none.jsonl: no file"),
        (dict(books=ROOT), "no file that can be read"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(run, tmp_path, wrong, said):
    done, calls = run(**wrong)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1 and calls == []
    assert not (tmp_path / "gpu").exists()
