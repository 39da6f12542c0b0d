"""The benchmark times what it says, from arguments that it has checked."""

import argparse
import importlib.util
import json
import os
import subprocess

import numpy as np
import pytest

from experiments import apart, benchmark, contestants, parts, rounds, trace
from experiments.benchmark_table import show
from experiments.flags import load_config
from research import cores, flops, heaps
from research.config import ConfigError
from tests.small import small_config

TINY = [
    "--config.mesh.data=1", "--config.batch_size=2", "--config.seq_len=16",
    "--config.model.num_layers=1", "--config.model.d_model=32", "--config.model.d_ff=32",
    "--config.model.vocab_size=64",
]  # fmt: skip
IMPLEMENTATIONS = ["ours"] + ["original"] * (importlib.util.find_spec("torch") is not None)


def configs_of(**lengths):
    configs = {}
    for name, (rows, length) in lengths.items():
        configs[name] = small_config()
        configs[name].update(dict(batch_size=rows, seq_len=length))
    return configs


def test_rows_hold_speed_share_of_the_fastest_matmul_and_cost_over_the_shortest():
    configs = configs_of(long=(1, 512), short=(8, 64))
    seconds = {("long", "ours"): [2.0, 4.0, 3.0], ("short", "ours"): [1.0, 1.0, 9.0]}
    seconds |= {("long", "original"): [4.0, 4.0, 9.0], ("short", "original"): [2.0, 2.0, 2.0]}
    speeds = {"matmul_jax": [1e9, 2e9], "matmul_torch": [3e9, 1e9], "copy_jax": [9e9, 9e9]}
    rows = rounds.compare(seconds, {key: {} for key in seconds}, configs, speeds)
    found = {(row["strategy"], row["implementation"]): row for row in rows}
    long = found["long", "ours"]
    per_token = {n: flops.train_flops_per_token(c.model, c.seq_len) for n, c in configs.items()}
    assert long["seconds"]["median"] == 3.0
    assert long["tokens_per_second"] == pytest.approx(512 / 3)
    assert long["flops_per_second"] == pytest.approx(512 / 3 * per_token["long"])
    assert long["matmul_share"] == pytest.approx(512 / 3 * per_token["long"] / 3e9)
    assert long["cost_per_token"] == pytest.approx(3.0)
    assert long["flops_per_token_ratio"] == pytest.approx(per_token["long"] / per_token["short"])
    assert "over_ours" not in long and found["long", "original"]["over_ours"]["median"] == 2.0  # of 2, 1 and 3
    assert found["short", "original"]["cost_per_token"] == 1.0


def test_a_row_of_what_failed_has_the_reason_and_others_go_without_it():
    configs = configs_of(long=(1, 512), short=(8, 64))
    seconds = {("long", "ours"): [2.0], ("short", "ours"): [1.0], ("long", "original"): [4.0]}
    failed = {("short", "original"): "OutOfMemoryError: 9 GiB", ("short", "ours"): "RuntimeError: in round 2"}
    speeds = {"matmul_jax": [1e9], "copy_jax": [1e9]}
    rows = rounds.compare(seconds, {key: {"devices": 2} for key in seconds}, configs, speeds, failed, peak=1e12)
    found = {(row["strategy"], row["implementation"]): row for row in rows}
    assert found["short", "original"]["failed"] == "OutOfMemoryError: 9 GiB"
    assert "seconds" not in found["short", "ours"] and found["short", "ours"]["seq_len"] == 64
    long = found["long", "ours"]
    assert long["cost_per_token"] is None and long["mfu"] == pytest.approx(long["flops_per_second"] / 2e12)
    assert found["long", "original"]["over_ours"]["median"] == 2.0


def test_the_table_has_utilisation_memory_and_reasons_where_there_are_any(capsys):
    configs = configs_of(long=(1, 512), short=(8, 64))
    seconds = {("long", "ours"): [2.0], ("short", "ours"): [1.0]}
    facts = {("long", "ours"): dict(compiled_bytes=2 * 10**9), ("short", "ours"): dict(device_peak_bytes=3 * 10**9)}
    speeds = {"matmul_jax": [1e9], "copy_jax": [1e9]}
    shown = dict(scale="cpu", date="2026-01-01", machine={}, environment=dict(device="GPU", platform="gpu"))
    failed = {("short", "original"): "RuntimeError: no [compiler]"}
    show(shown | dict(rows=rounds.compare(seconds, facts, configs, speeds, failed, peak=1e9)))
    printed = capsys.readouterr().out
    assert "MFU" in printed and "2.00 GB" in printed and "3.00 GB" in printed
    assert "short original failed: RuntimeError: no [compiler]" in printed
    shown["environment"]["platform"] = "cpu"
    show(shown | dict(rows=rounds.compare(seconds, facts, configs, speeds)))
    printed = capsys.readouterr().out
    assert "MFU" not in printed and "device memory" not in printed


def test_an_implementation_that_fails_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    out = tmp_path / "cpu.json"
    built = contestants.build_ours

    def build(implementation, config, device, short):
        if config.strategy == "long_seq":
            raise RuntimeError("out of memory\nand more lines")
        return built(config)

    monkeypatch.setattr(rounds, "build", build)
    strategies = "--strategies=balanced,long_seq"
    assert benchmark.main([f"--out={out}", "--repeats=1", strategies, "--implementations=ours", *TINY]) == 1
    whole, failed = json.loads(out.read_text())["rows"]
    assert failed["failed"] == "RuntimeError: out of memory" and whole["tokens_per_second"] > 0
    assert "long_seq ours failed: RuntimeError: out of memory" in capsys.readouterr().out


def test_a_timed_step_follows_another_of_the_same_contestant():
    """And who goes first in one round goes last in the next."""
    taken, names = [], ["ours", "original"]

    def of(name):
        def step():
            taken.append(name)
            return 1.0

        return step

    arguments = argparse.Namespace(implementations=names, repeats=2)
    results, steps = rounds.Results({}), {("balanced", name): of(name) for name in names}
    for number in range(2):
        rounds.take_turns(arguments, ["balanced"], steps, number, results)
    assert taken == ["ours", "ours", "original", "original", "original", "original", "ours", "ours"]
    assert {name: len(x) for (_, name), x in results.seconds.items()} == {"ours": 2, "original": 2}


def test_one_run_times_every_implementation_in_every_round(tmp_path, capsys):
    out = tmp_path / "new" / "cpu.json"
    argv = [f"--out={out}", "--repeats=3", "--strategies=balanced", *TINY]
    assert benchmark.main(argv) == 0
    content = json.loads(out.read_text())
    assert [row["implementation"] for row in content["rows"]] == IMPLEMENTATIONS
    for row in content["rows"]:
        assert len(row["all_seconds"]) == 3
        assert 0 < row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
        assert row["tokens_per_second"] == pytest.approx(32 / np.median(row["all_seconds"]))
    assert all(speed["best"] >= speed["median"] > 0 for speed in content["machine"].values())
    assert {"command", "date", "environment", "load_average", "scale"} <= content.keys()
    assert "balanced" in capsys.readouterr().out


def test_a_contestant_in_another_process_takes_the_same_steps_and_its_mistakes_come_back():
    config = load_config("configs/balanced.py:cpu", TINY)
    wrong = load_config("configs/balanced.py:cpu", [*TINY, "--config.model.num_heads=3"])
    here, _ = contestants.build("ours", config, "cpu")
    with apart.process() as pool:
        there, facts = apart.build_in(pool, "ours", config, "cpu")
        assert [there() for _ in range(3)] == [here() for _ in range(3)]
        assert facts()["compile_seconds"] > 0
        with pytest.raises(ConfigError, match="config.model.d_model=32: .*num_heads") as caught:
            apart.build_in(pool, "ours", wrong, "cpu")
        assert caught.value.field == "config.model.d_model"
        assert pool.submit(os.getpid).result() != os.getpid()


def test_every_published_result_can_still_be_shown(capsys):
    """Those of before parts had bytes, and rows a peer's memory."""
    files = sorted((benchmark.ROOT / "experiments/results/benchmark").rglob("*.json"))
    for file in files:
        content = json.loads(file.read_text())
        show(content)
        printed = capsys.readouterr().out
        assert all(row["strategy"] in printed for row in content["rows"]), file
        assert ("parts of a step" in printed) == ("parts" in content), file
    assert files


@pytest.mark.parametrize(
    ("platform", "scale", "given", "dtype"),
    [
        ("cpu", "published", [], "float32"),
        ("gpu", "published", [], "bfloat16"),
        ("tpu", "published", [], "bfloat16"),
        ("gpu", "cpu", [], "float32"),
        ("cpu", "published", ["--config.model.dtype=bfloat16"], "bfloat16"),
        ("gpu", "published", ["--config.model.dtype=float32"], "float32"),
    ],
)
def test_a_step_is_computed_in_the_configs_type_but_on_a_cpu(platform, scale, given, dtype, monkeypatch):
    argv = [f"--scale={scale}", "--implementations=ours", "--strategies=balanced", *given]
    monkeypatch.setattr(benchmark, "platform_at_hand", lambda: 1 / 0)  # a child is told
    arguments, configs = benchmark.parse([*argv, f"--child={platform}"])
    assert (configs["balanced"].model.dtype, arguments.platform) == (dtype, platform)
    monkeypatch.setattr(benchmark, "platform_at_hand", lambda: platform)
    assert benchmark.parse(argv)[1]["balanced"].model.dtype == dtype


def test_a_parent_tells_its_children_what_they_run_on(monkeypatch):
    commands = []
    done = subprocess.CompletedProcess([], 0, stdout=json.dumps(dict(all_seconds=[1.0])))
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **_: commands.append(command) or done)
    monkeypatch.setattr(benchmark, "platform_at_hand", lambda: "gpu")
    argv = ["--scale=published", "--steps=1", "--strategies=balanced", "--implementations=ours", "--short"]
    benchmark.run_children(*benchmark.parse(argv), argv)
    (command,) = commands
    arguments, configs = benchmark.parse(command[3:])
    assert configs["balanced"].model.dtype == "bfloat16" and arguments.short


def test_utilisation_is_of_the_peak_of_the_type_that_is_computed_in():
    assert rounds.peak_of("NVIDIA H200", "bfloat16") == 989e12
    assert rounds.peak_of("NVIDIA H200", "float32") is None and rounds.peak_of("cpu", "bfloat16") is None


@pytest.mark.parametrize(("given", "run"), [([], "long"), (["--short"], "short")])
def test_ours_is_the_program_of_a_long_run_or_of_a_short_one(given, run, monkeypatch):
    """On a CPU a long run's keeps its memory in blocks (heaps.py)."""
    arguments, configs = benchmark.parse(["--implementations=ours", "--strategies=balanced", *TINY, *given])
    results, asked = rounds.Results({}), []
    compiled = heaps.compiler_options
    monkeypatch.setattr(heaps, "compiler_options", lambda *a: asked.append(compiled(*a)) or asked[-1])
    steps, facts = rounds.build_all(arguments, configs, ["balanced"], None, results)
    row = facts["balanced", "ours"]()
    assert (row["run"], row["in_blocks"]) == (run, run == "long") and steps and not results.failed
    assert [bool(options) for options in asked] == [run == "long"]


def test_steps_run_in_a_process_each_and_report_its_peak_memory_and_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # so that a child has devices and options that this process has not
    out = tmp_path / "cpu.json"
    argv = [f"--out={out}", "--steps=2", "--strategies=balanced", *TINY]
    ballast = np.ones(200_000_000)  # 1.6 GB of this process, not of its children
    assert benchmark.main([*argv, "--config.train.steps=2", "--config.model.router_noise=0"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["implementation"] for row in rows] == IMPLEMENTATIONS
    ours, others = rows[0]["environment"], rows[1:]
    assert ours["devices"] == min(cores.count(), cores.MOST)
    assert all(option in ours["xla_flags"] for option in cores.OPTIONS.values())
    assert all(row["environment"]["threads"] > 0 and row["environment"]["torch"] for row in others)
    for row in rows:
        assert len(row["all_seconds"]) == 2
        assert row["losses"][1] < row["losses"][0]  # a real update of the same batch
        assert row["loaded"] == [{"ours": "jax", "original": "torch"}[row["implementation"]]]  # its own memory only
        assert 50e6 < row["peak_bytes"] < ballast.nbytes  # an interpreter with JAX or PyTorch


def test_a_profile_has_every_part_and_a_trace(tmp_path, capsys, monkeypatch):
    """And without --out it is where the help says."""
    monkeypatch.chdir(tmp_path)
    argv = ["--repeats=2", "--strategies=balanced", "--implementations=ours", "--profile=traces", *TINY]
    assert benchmark.main([*argv, "--config.mesh.data=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "runs/benchmark/cpu-cpu.json" and "router and dispatch" in printed
    content = json.loads((tmp_path / "runs/benchmark/cpu-cpu.json").read_text())
    check_rooflines(content)
    assert list((tmp_path / "traces/balanced").rglob("*.xplane.pb"))
    found = content["trace"]["balanced"]
    spent = {row["part"]: row["forward_ms"] + row["backward_ms"] for row in found["parts"]}
    assert found["steps"] == 2 and found["idle_ms"] is None
    assert all(spent[part] > 0 for part in ("attention", "experts", "head and loss", "optimizer", "collectives"))
    assert spent.get("not named", 0) < 0.5 * sum(spent.values())
    assert trace.main(["traces/balanced"]) == 0
    assert "the longest kernels" in capsys.readouterr().out
    assert trace.main(["nowhere"]) == 2


def check_rooflines(content):
    """Of the parts and of the step: time over a floor by the fastest product and copy of this run."""
    parts_of_step, (row,) = content["parts"]["balanced"], content["rows"]
    assert [part["part"] for part in parts_of_step][-2:] == ["head and loss", "optimizer"] and len(parts_of_step) == 7
    matmul, copy = (content["machine"][name]["best"] for name in ("matmul_jax", "copy_jax"))
    total = dict(flops=sum(part["flops"] for part in parts_of_step), seconds=row["seconds"])
    whole = row["roofline"] | total | dict(compulsory_bytes=row["compulsory_bytes"])
    assert row["roofline"]["flops"] == total["flops"]
    for found in (*parts_of_step, whole):
        seconds, moved = found["seconds"]["median"], found["compulsory_bytes"]
        assert found["floor_seconds"] == pytest.approx(max(found["flops"] / matmul, moved / copy)) and moved > 0
        assert found["over_floor"] == pytest.approx(seconds / found["floor_seconds"])
        assert found["matmul_share"] == pytest.approx(found["flops"] / seconds / matmul)
        assert found["copy_share"] == pytest.approx(moved / seconds / copy)


def test_a_profile_that_is_not_whole_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "measure", lambda *_: 1 / 0)
    out = tmp_path / "cpu.json"
    argv = [f"--out={out}", "--repeats=1", "--strategies=balanced", "--implementations=ours", *TINY]
    assert benchmark.main([*argv, f"--profile={tmp_path / 'traces'}"]) == 1
    assert json.loads(out.read_text())["rows"][0]["seconds"]  # what was measured is kept


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("--scale=huge", "huge"),
        ("--strategies=tall", "--strategies"),
        ("--repeats=0", "--repeats"),
        ("--implementations=theirs", "--implementations"),
        ("--config.train.accumulation=2", "config.train.accumulation"),
        ("--implementations=ours,mixtral", "ixtral"),
        ("--config.model.d_modle=3", "config.model.d_modle"),
        ("--steps=1 --config.model.num_heads=3", "config.model"),
        ("--steps=1 --profile=traces", "--profile"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(wrong, named, tmp_path, capfd):
    out = tmp_path / "cpu.json"
    argv = [f"--out={out}", "--strategies=balanced", *TINY, *wrong.split()]
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(benchmark.main(argv))
    assert stopped.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and named in errors[0]
    assert not list(tmp_path.iterdir())
