"""The benchmark times what it says, from arguments that it has checked."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from experiments import benchmark, parts
from research import flops, sharding, target
from research.analysis import compute
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
    rows = benchmark.compare(seconds, {key: {} for key in seconds}, configs, speeds)
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
    assert "router and dispatch" in capsys.readouterr().out


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
