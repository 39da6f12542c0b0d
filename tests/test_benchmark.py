"""The benchmark times what it says, from arguments that it has checked."""

import argparse
import importlib.util
import json
import os

import jax
import numpy as np
import pytest

from experiments import apart, benchmark, contestants, parts, rounds, scopes, trace
from experiments.benchmark_table import show
from experiments.flags import load_config
from research import flops, sharding, target
from research.analysis import compute
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

    def build(implementation, config, device):
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


JVP, BACK = "jit(train_step)/jvp(MoETransformer)", "jit(train_step)/transpose(jvp(MoETransformer))"
LAYER = "while/body/eval_jaxpr/layers/layers"


@pytest.mark.parametrize(
    ("scope", "part", "backward"),
    [
        (f"{JVP}/gather", "embedding", False),
        (f"{BACK}/scatter-add", "embedding", True),
        (f"{JVP}/{LAYER}.mix/layers.attention/btd,dhk->bthk/dot_general", "projections of attention", False),
        (f"{BACK}/{LAYER}.mix/layers.attention/checkpoint/mul", "projections of attention", True),
        (f"{JVP}/{LAYER}.mix/layers.attention/while/body/eval_jaxpr/exp", "attention", False),
        (f"{BACK}/{LAYER}.mix/layers.attention/pallas_call", "attention", True),
        (f"{JVP}/{LAYER}.think/layers.experts/top_k", "router and dispatch", False),
        (f"{BACK}/{LAYER}.think/layers.experts/nrd,nrf->ndf/dot_general", "experts", True),
        (f"{JVP}/{LAYER}.think/mul", "rest", False),
        ("jit(train_step)/jvp()/while/body/eval_jaxpr/cd,vd->cv/dot_general", "head and loss", False),
        ("jit(train_step)/src,sqc->srq/dot_general", "optimizer", False),
        ("", "not named", False),
    ],
)
def test_a_scope_says_which_part_of_the_model_a_kernel_is_of(scope, part, backward):
    assert scopes.part_of(scope) == (part, backward)


def test_a_fused_kernel_is_of_the_part_that_its_operations_name_the_most_surely():
    kept, silu = f"{JVP}/while/body/dynamic_update_slice", f"{JVP}/{LAYER}.think/layers.experts/jit(silu)/mul"
    assert scopes.telling([kept, f"{JVP}/{LAYER}.think/layers.experts/add", silu]) == silu
    assert scopes.telling([kept]) == kept and scopes.telling([]) == ""


def test_a_trace_is_grouped_into_milliseconds_a_step():
    experts, optimizer = f"{JVP}/{LAYER}.think/layers.experts/jit(silu)/mul", "jit(train_step)/add"
    events = [
        trace.Event(experts, "fusion_1", 0.0, 2e6),
        trace.Event(experts.replace(JVP, BACK), "fusion_2", 1e6, 3e6),  # on another stream, beside the first
        trace.Event(optimizer, "fusion_3", 6e6, 1e6),
        trace.Event(optimizer, "fusion_3", 9e6, 1e6),
    ]
    found = trace.summarize(events, steps=2)
    assert found["parts"] == [
        dict(part="experts", forward_ms=1.0, backward_ms=1.5, kernels=1.0),
        dict(part="optimizer", forward_ms=1.0, backward_ms=0.0, kernels=1.0),
    ]
    assert (found["kernels"], found["busy_ms"], found["idle_ms"]) == (2.0, 3.0, 2.0)
    assert [(k["name"], k["ms"], k["kernels"]) for k in found["longest"]][:2] == [
        ("fusion_2", 1.5, 0.5),
        ("fusion_1", 1.0, 0.5),
    ]
    assert trace.summarize(events, 2, waits=False)["idle_ms"] is None


def test_time_inside_an_operation_is_counted_once():
    events = [trace.Event("", "a", 0, 10), trace.Event("", "b", 1, 4), trace.Event("", "c", 2, 1)]
    assert [(e.name, e.duration) for e in trace.less_inner(events)] == [("a", 6), ("b", 3), ("c", 1)]


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


def test_steps_run_in_a_process_each_and_report_its_peak_memory(tmp_path):
    out = tmp_path / "cpu.json"
    argv = [f"--out={out}", "--steps=2", "--strategies=balanced", *TINY]
    ballast = np.ones(200_000_000)  # 1.6 GB of this process, not of its children
    assert benchmark.main([*argv, "--config.train.steps=2", "--config.model.router_noise=0"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["implementation"] for row in rows] == IMPLEMENTATIONS
    for row in rows:
        assert len(row["all_seconds"]) == 2
        assert row["losses"][1] < row["losses"][0]  # a real update of the same batch
        assert row["loaded"] == [{"ours": "jax", "original": "torch"}[row["implementation"]]]  # its own memory only
        assert 50e6 < row["peak_bytes"] < ballast.nbytes  # an interpreter with JAX or PyTorch


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_the_parts_products_are_all_of_the_steps(activation):
    """None is left out, none counted twice: their sum is that of the whole step."""
    config = small_config(activation=activation, attention="chunked")
    config.train.steps = 10
    config.update(dict(batch_size=4, seq_len=32))
    with jax.set_mesh(sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})):
        found = {part.name: part.flops() for part in parts.parts_of(config)}
    assert sum(found.values()) == compute.train_flops(config, target.at_hand())
    assert {name for name, amount in found.items() if amount == 0} == {"embedding"}


def test_a_profile_has_every_part_and_a_trace(tmp_path, capsys):
    out, traces = tmp_path / "cpu.json", tmp_path / "traces"
    argv = [f"--out={out}", "--repeats=2", "--strategies=balanced", "--implementations=ours", f"--profile={traces}"]
    assert benchmark.main([*argv, *TINY]) == 0
    rows = json.loads(out.read_text())["parts"]["balanced"]
    assert [row["part"] for row in rows][-2:] == ["head and loss", "optimizer"] and len(rows) == 7
    assert all(row["seconds"]["median"] > 0 for row in rows)
    assert list((traces / "balanced").rglob("*.xplane.pb"))
    found = json.loads(out.read_text())["trace"]["balanced"]
    spent = {row["part"]: row["forward_ms"] + row["backward_ms"] for row in found["parts"]}
    assert found["steps"] == 2 and found["idle_ms"] is None
    assert all(spent[part] > 0 for part in ("attention", "experts", "head and loss", "optimizer"))
    assert spent.get("not named", 0) < 0.5 * sum(spent.values())
    assert "router and dispatch" in capsys.readouterr().out
    assert trace.main([str(traces / "balanced")]) == 0
    assert "the longest kernels" in capsys.readouterr().out
    assert trace.main([str(tmp_path / "nowhere")]) == 2


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
