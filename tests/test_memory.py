"""What compiled programs say of memory: counted by hand, told apart, fitted, and seen when a step really runs."""

import dataclasses
import functools
import json
import math
import time

import numpy as np
import pytest

from experiments import memory_check, memory_frontier
from experiments.flags import load_config
from research import flops, sharding, target
from research.analysis import frontier, memory, memory_law, memory_plan, memory_report, parts, programs, scratch
from research.config import ConfigError
from tests.small import small_config


@pytest.fixture(scope="module")
def here():
    return target.at_hand(8)


def config_of(**fields):
    config = small_config(remat="none")
    config.train.steps = 10
    return frontier.with_fields(config, {"batch_size": 4, "seq_len": 32, "mesh.data": 1} | fields)


@functools.cache
def compiled(fields: tuple):
    return memory.train_usage(config_of(**dict(fields)), target.at_hand(8))


def usage(**fields):
    """Of a step of `config_of(**fields)`; compiled once for all tests."""
    return compiled(tuple(sorted(fields.items())))


def test_arguments_and_aliases_are_those_counted_by_hand(here):
    config = config_of()
    found, state = usage(), memory.state_bytes(config, here)
    model = config.model
    counts = flops.parameter_counts(model)["total"]
    adamw = model.vocab_size * model.d_model + (2 * model.num_layers + 1) * model.d_model  # embedding and norms
    assert state["parameters"] == 4 * counts
    moments = 4 * (counts - adamw + 2 * adamw)  # Muon's momentum; AdamW's two moments
    assert moments <= state["optimizer"] <= moments + 64  # and step counts
    batch = 2 * 4 * 4 * 32  # inputs and targets, int32
    assert found.arguments == sum(state.values()) + batch + 4 + 8  # step, key
    assert found.aliased >= sum(state.values())  # donated: written over
    assert found.total == found.arguments + found.outputs + found.temporaries - found.aliased + found.scratch
    assert found.total >= 2 * state["parameters"] + state["optimizer"]  # gradients at least


def test_more_rows_or_longer_ones_take_more():
    assert usage().total < usage(batch_size=8).total < usage(batch_size=8, seq_len=64).total
    assert usage().total < usage(seq_len=64).total


def test_scores_that_are_kept_are_counted():
    found = {name: usage(seq_len=256, **{"model.attention": name}).total for name in ("xla", "chunked")}
    assert found["xla"] - found["chunked"] > 4 * 4 * 256 * 256 * 4  # B H T T float32


GROUP = """
%fused (a: f32[1,4,8,2], b: f32[1,4,2,8], e: f32[1,4,8,8]) -> f32[1,4,8,8] {
  %a = f32[4,8,2]{2,1,0} parameter(0)
  %b = f32[4,2,8]{2,1,0} parameter(1)
  %e = f32[ROWS,4,8,8]{3,2,1,0} parameter(2)
  %product = f32[4,8,8]{2,1,0} PRODUCT(%a, %b), lhs_contracting_dims={2}, rhs_contracting_dims={1}
  %view = f32[ROWS,4,8,8]{3,2,1,0} bitcast(%product)
  %scaled = f32[ROWS,4,8,8]{3,2,1,0} multiply(%view, %e)
  %sums = f32[ROWS,4,8]{2,1,0} reduce(%scaled, %zero), dimensions={3}, to_apply=%add
  %wide = f32[ROWS,4,8,8]{3,2,1,0} broadcast(%sums), dimensions={0,1,2}
  ROOT %out = f32[ROWS,4,8,8]{3,2,1,0} subtract(%view, %wide)
}

ENTRY %main (a: f32[4,8,2]) -> f32[4,8,8] {
  ROOT %call = f32[4,8,8]{2,1,0} fusion(%p), calls=%fused, backend_config={"fusion_config":{"kind":"KIND"}}
}
"""


@pytest.mark.parametrize(
    ("product", "kind", "rows", "expected"),
    [
        ("dot", "__ynn_fusion", 1, 4 * (256 + 256 + 32)),  # the product whole, what follows too: there is one row
        ("dot", "__ynn_fusion", 4, 4 * (256 + (4 * 256 + 4 * 32) // 4)),  # in slices of one row
        ("add", "__ynn_fusion", 1, 0),  # no product: in pieces
        ("dot", "other", 1, 0),
    ],
)
def test_what_kernels_keep_for_themselves_is_counted_by_hand(product, kind, rows, expected):
    text = GROUP.replace("PRODUCT", product).replace("KIND", kind).replace("ROWS", str(rows))
    assert scratch.scratch_bytes(text) == expected


def test_a_product_that_is_the_result_in_another_shape_is_no_scratch():
    head = GROUP.partition("  %scaled")[0].replace("%view =", "ROOT %view =")
    rest = GROUP[GROUP.index("}\n\nENTRY") :]
    text = (head + rest).replace("PRODUCT", "dot").replace("KIND", "__ynn_fusion").replace("ROWS", "1")
    assert "ROOT %view = f32[1,4,8,8]{3,2,1,0} bitcast(%product)" in text and scratch.scratch_bytes(text) == 0


def test_scratch_of_kept_scores_is_part_of_the_plan():
    found = usage(batch_size=8, seq_len=512, **{"model.attention": "xla"})
    scores = 4 * 8 * config_of().model.num_heads * 512 * 512
    assert found.scratch == (scores + 2 * scores // 8 if scratch.KEPT else 0)
    assert found.total == dataclasses.replace(found, scratch=0).total + found.scratch


def test_recomputing_and_microbatches_take_less():
    fields = dict(batch_size=8, seq_len=64)
    assert usage(**fields, **{"model.remat": "block"}).total < usage(**fields).total
    assert usage(**fields, **{"train.accumulation": 4}).total < usage(**fields).total


@pytest.mark.parametrize(("data", "seq", "fsdp"), [(8, 1, False), (2, 4, False), (1, 8, False), (8, 1, True)])
def test_each_device_of_a_mesh_holds_its_part(here, data, seq, fsdp):
    fields = dict(batch_size=8, seq_len=64)
    mesh = {"mesh.data": data, "mesh.seq": seq, "mesh.fsdp": fsdp}
    many = usage(**fields, **mesh)
    assert many.temporaries < usage(**fields).temporaries
    state = memory.state_bytes(config_of(**fields, **mesh), here)
    whole = memory.state_bytes(config_of(**fields), here)
    assert many.arguments == sum(state.values()) + 2 * 4 * 8 * 64 // 8 + 4 + 8
    assert sum(state.values()) < 0.3 * sum(whole.values()) if fsdp else state == whole


def test_dividing_positions_holds_what_dividing_rows_cannot():
    """One long row: 8 devices over rows want 8 rows; over positions each holds an eighth of one."""
    rows = usage(batch_size=8, seq_len=512, **{"mesh.data": 8}).total
    positions = usage(batch_size=1, seq_len=512, **{"mesh.seq": 8}).total
    assert positions < rows
    with pytest.raises(ConfigError, match="config.batch_size=1"):
        usage(batch_size=1, seq_len=512, **{"mesh.data": 8})


def test_parts_add_up_to_the_whole(tmp_path, here):
    config = config_of(batch_size=8, seq_len=128, **{"model.attention": "xla", "data.cache_dir": str(tmp_path)})
    kept = programs.Programs(here)
    found = parts.parts(config, kept)
    assert list(found) == list(parts.PARTS)
    assert sum(found.values()) == kept.usage(config).total
    assert found["parameters"] == 4 * flops.parameter_counts(config.model)["total"]
    assert found["attention scores"] > 8 * 4 * 128 * 128 * 4
    assert found["activations"] > 0 and found["logits"] >= 0


def test_no_part_is_less_than_nothing(tmp_path, here, monkeypatch):
    """Where half the rows take less than half, as rows that divide better do."""
    totals = {4: 2**20, 8: 2**22}
    monkeypatch.setitem(programs.KINDS, "train", lambda config, _: memory.Usage(totals[config.batch_size], 0, 0, 0))
    found = parts.parts(config_of(batch_size=8, **{"data.cache_dir": str(tmp_path)}), programs.Programs(here))
    assert min(found.values()) >= 0 and sum(found.values()) == 2**22


def points_of(a, b, c, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length) for length in (256, 512, 1024, 2048) for batch in (2, 4, 8)]
    exact = ((a + b * batch * length + c * batch * length**2) for batch, length in shapes)
    return [
        memory_law.Point(*shape, round(size * (1 + noise * rng.standard_normal())))
        for shape, size in zip(shapes, exact, strict=True)
    ]


def test_the_law_is_found_again():
    law = memory_law.fit(points_of(5e8, 2e4, 12.0))
    for name, value in dict(a=5e8, b=2e4, c=12.0).items():
        assert law[name]["value"] == pytest.approx(value, rel=1e-6)
    assert law["misfit"] < 1e-6


def test_intervals_of_the_law_cover_it_as_often_as_they_say():
    inside = np.zeros(3)
    for seed in range(300):
        law = memory_law.fit(points_of(5e8, 2e4, 12.0, noise=0.02, seed=seed))
        inside += [law[n]["low"] <= v <= law[n]["high"] for n, v in dict(a=5e8, b=2e4, c=12.0).items()]
    assert ((inside / 300 > 0.9) & (inside / 300 < 0.99)).all()


@pytest.mark.parametrize(
    ("b", "c", "verdict", "length"),
    [(0.0, 9.0, "holds", 4), (2e4, 0.0, "does not hold", 2), (2e4, 120.0, "holds under", None)],
)
def test_the_verdict_turns_with_the_numbers(b, c, verdict, length):
    points = points_of(1e8, b, c)
    ratios = memory_law.ratios(points, memory_law.fit(points)["a"]["value"])
    said, text = memory_law.verdict(ratios)
    assert said.startswith(verdict) and "2x batch takes 2.00 times" in text
    for entry in ratios:
        assert entry["growing"]["batch"] == pytest.approx(2, rel=1e-5)
        assert length is None or entry["growing"]["length"] == pytest.approx(length, rel=1e-5)


def cli(*arguments):
    return memory_frontier.main(["--config=configs/balanced.py:cpu", *arguments])


SMALL = [f"--config.model.{name}={value}" for name, value in dict(
    num_layers=1, d_model=32, num_heads=2, d_ff=32, num_experts=2, vocab_size=64, loss_chunk=64, moe_block=32,
).items()] + ["--config.eval.batch_tokens=256", "--config.mesh.data=1"]  # fmt: skip


def affine(config, target):
    """In place of compiling: a + b B T, and scores where they are kept."""
    B, T = config.batch_size, config.seq_len
    scores = 40 * B * T * T if config.model.attention == "xla" else 0
    kept = {"none": 900, "block": 300}[config.model.remat]
    return memory.Usage(100_000, 100_000, 150_000 + kept * B * T + scores + 4 * config.model.loss_chunk, 100_000)


def test_a_frontier_is_a_table_a_csv_and_figures_and_its_overrides_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(programs.KINDS, "train", affine)
    monkeypatch.setitem(programs.KINDS, "eval", lambda config, target: memory.Usage(1000, 10, 5, 0))
    folder = tmp_path / "frontier"
    arguments = ["--budget=3MiB", "--lengths=64,128,256", "--remat=none,block", "--law", "--parts", *SMALL,
                 f"--config.data.cache_dir={tmp_path / 'cache'}", f"--workdir={folder}"]  # fmt: skip
    assert cli(*arguments) == 0
    plan = json.loads((folder / "frontier.json").read_text())
    assert [(c["seq_len"], c["choice"]["model.remat"]) for c in plan["cells"]] == [
        (t, r) for r in ("none", "block") for t in (64, 128, 256)
    ]
    for cell in plan["cells"]:
        assert cell["total"] <= 3 * 2**20 < cell["next_bytes"] and sum(cell["parts"].values()) == cell["total"]
        config = load_config("configs/balanced.py:cpu", memory_report.overrides(cell).split())
        assert (config.batch_size, config.seq_len) == (cell["batch"], cell["seq_len"])
        assert cell["parts"]["activations"] == pytest.approx(
            cell["tokens"] * (900 if "none" in str(cell) else 300), rel=0.01
        )
    assert [law["verdict"] for law in plan["law"]] == ["holds under conditions", "does not hold"]  # xla, chunked
    assert [law["compute"]["fit"]["c"]["value"] > 0 for law in plan["law"]] == [True, True]
    report = (folder / "report.md").read_text()
    assert "**xla: holds under conditions.**" in report and "(figures/law.svg)" in report
    lines = (folder / "frontier.csv").read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith("target,seq_len,batch")
    made = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"frontier.svg", "frontier.png", "law.svg"} <= {path.name for path in made}
    capsys.readouterr()
    assert memory_frontier.main(["--report_only", f"--workdir={folder}"]) == 0
    assert made == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert cli(*arguments) == 0
    assert "compiling" not in capsys.readouterr().err  # all on disk


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--budget='': not a size of memory"),
        (["--budget=24GiBs"], "--budget='24GiBs': not a size of memory"),
        (["--budget=1GiB", "--lengths=64,x"], "--lengths='64,x': give whole numbers"),
        (["--budget=1GiB", "--remat=some"], "--remat='some': choose of none, block, full"),
        (["--budget=1GiB", "--mesh=8"], "--mesh='8': write data x seq"),
        (["--budget=1GiB", "--what"], "argument='--what': unknown"),
        (["--budget=1GiB", "--topology=h300"], "--topology='h300': unknown; choose one of h200"),
        (["--budget=1GiB", "--lengths=64,128", "--law"], "--lengths='64,128': the law of memory needs"),
        (["--budget=1GiB", "--lengths=33", "--mesh=1x2"], "config.seq_len=33"),
        (["--budget=1GiB", "--workdir=/proc/frontier"], "--workdir='/proc/frontier': cannot be made"),
        (["--budget=1GiB", f"--workdir={'x' * 300}"], f"--workdir='{'x' * 300}': cannot be made"),
        (["--budget=200KiB", "--lengths=64"], "--budget='200KiB': too small for a step: 1 x 64 needs"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, arguments, message):
    small = [*SMALL, "--config.eval.batch_tokens=1", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    if "--mesh=1x2" in arguments:
        small.remove("--config.mesh.data=1")
    given = [f"--workdir={tmp_path / 'frontier'}", "--remat=none", *small, *arguments]  # the last of each counts
    assert cli(*given) == 2
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {message}")
    assert len(said) == 1 or "too small" in message  # which alone needs a compiler
    assert not (tmp_path / "frontier").exists()


def test_a_mistake_in_one_thread_stops_the_others(tmp_path, here):
    kept, begun = programs.Programs(here), []

    def run(item):
        begun.append(item)
        if item == 0:
            raise ConfigError("--lengths", 0, "wrong")
        while True:  # until the stop
            kept.usage(config)

    config = config_of(**{"data.cache_dir": str(tmp_path)})
    kept.usage(config)
    with pytest.raises(ConfigError, match="--lengths=0: wrong"):
        memory_plan._at_once(run, range(64), kept)
    assert len(begun) < 64
    assert memory_plan._at_once(lambda item: (kept.usage(config), item)[1], range(5), kept) == [0, 1, 2, 3, 4]


def test_threads_that_want_one_program_compile_it_once(tmp_path, here, monkeypatch):
    def slow(config, target):
        time.sleep(0.2)
        return memory.Usage(1, 2, 3, 4)

    monkeypatch.setitem(programs.KINDS, "train", slow)
    kept, config = programs.Programs(here), config_of(**{"data.cache_dir": str(tmp_path)})
    found = memory_plan._at_once(lambda _: kept.usage(config), range(8), kept)
    assert found == [memory.Usage(1, 2, 3, 4)] * 8 and kept.compiled == 1


def test_a_plan_beside_real_steps(monkeypatch):
    """The step's own process: within 15 % on a step of half a GB; a step that cannot run is shown as failed."""
    monkeypatch.delenv("XLA_FLAGS")  # one device, as users have
    found = memory_check.measure(
        "configs/balanced.py:cpu",
        ["--config.model.remat=block", "--config.batch_size=64", "--config.mesh.data=1"],
        "cpu",
    )
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.15) and found["seconds"] > 0
    failed = memory_check.measure("configs/balanced.py:cpu", ["--config.model.num_heads=3"], "cpu")
    assert failed["measured"] is None and "config.model.d_model" in failed["error"]
    run = dict(batch=16, seq_len=512, choice={"model.remat": "block"}, planned=found["predicted"])
    text = memory_report.check_text([run | failed, run | found], set())
    assert "failed: error: config.model.d_model" in text and "1 steps: median error" in text
    assert "Of 1 planned steps 1 were compiled to the bytes of the plan" in text
    two = memory_report.check_text([run | found | {"predicted": 100, "measured": m} for m in (102, 106)], set())
    assert "median error +4.0%" in two  # between the two, not the larger
    assert "Of 2 planned steps 0 were compiled to the bytes of the plan" in two


PLAN = dict(command=[], config="configs/balanced.py:cpu", given=[], target="CPU", platform="cpu", versions={},
            absent=False, budget="1GiB", scale="cpu", cells=[], law=[])  # fmt: skip


def test_a_check_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    cell = dict(unit=1, seq_len=512, choice={"model.remat": "block"}, devices=1)
    cells, target = [cell | dict(batch=b, total=100 * 2**20 * b) for b in (8, 6)], "CPU"
    plan = PLAN | dict(target=target, cells=cells)
    memory_report.save(plan, tmp_path)
    monkeypatch.setattr(memory_report, "write", lambda folder: "")
    asked, stopped = [], []

    def measure(_, overrides, platform):
        if len(asked) == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        asked.append(overrides[0])
        return dict(measured=None if len(asked) == 1 else 101, seconds=None, target=target)

    monkeypatch.setattr(memory_check, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        memory_check.main([f"--workdir={tmp_path}"])
    memory_report.save(plan | dict(environment=dict(commit="next")), tmp_path)  # the same: what was measured holds
    assert memory_check.main([f"--workdir={tmp_path}"]) == 0
    assert len(asked) == 5 and asked[0] == asked[2]  # the failed one again, the second not
    assert [run["batch"] for run in memory_report.read_check(tmp_path)] == [8, 4, 6, 3]
    assert memory_check.main([f"--workdir={tmp_path}", "--most=700MiB"]) == 0  # of the larger ones nothing is lost
    assert [run["planned"] for run in memory_report.read_check(tmp_path)] == [800 * 2**20, None, 600 * 2**20, None]
    memory_report.save(plan | dict(given=["--config.seed=1"]), tmp_path)
    assert not memory_report.read_check(tmp_path)
    for wrong in ("NVIDIA H200", "CPU x 8, simulated"):
        memory_report.save(plan | dict(target=wrong), tmp_path)
        assert memory_check.main([f"--workdir={tmp_path}"]) == 2 and not memory_report.read_check(tmp_path)
        assert f"is a plan for {wrong}" in capsys.readouterr().err
    (tmp_path / "check.json").write_text("[{")
    with pytest.raises(ConfigError, match="check.json is damaged"):
        memory_report.read_check(tmp_path)


def test_a_plan_for_what_is_not_here_is_not_run(tmp_path, capsys):
    assert memory_check.main([f"--workdir={tmp_path}"]) == 2
    memory_report.save(PLAN | dict(absent=True, target="NVIDIA H200"), tmp_path)
    assert memory_check.main([f"--workdir={tmp_path}"]) == 2
    assert "NVIDIA H200, which is not here" in capsys.readouterr().err
    cell = dict(unit=2, seq_len=512, choice={}, batch=2, total=100, devices=2)
    memory_report.save(PLAN | dict(cells=[cell]), tmp_path)  # two devices in one memory
    assert memory_check.main([f"--workdir={tmp_path}"]) == 2
    assert "what one of several in one memory takes cannot be told" in capsys.readouterr().err
    for damaged in ("{}", "[]", "{"):
        (tmp_path / "frontier.json").write_text(damaged)
        assert memory_check.main([f"--workdir={tmp_path}"]) == 2
        assert "frontier.json is" in capsys.readouterr().err


def test_arguments_to_paste_are_quoted():
    cell = dict(batch=2, seq_len=8, choice={"eval.contexts": (24, 48)}, total=1, unit=1, next_bytes=2, eval_bytes=1,
                tokens=16, state=dict(parameters=1, optimizer=1))  # fmt: skip
    text = memory_report.frontier_text(PLAN | dict(given=["--config.data.path=my folder"], cells=[cell]), set())
    assert (
        "'--config.data.path=my folder' --config.batch_size=2" in text and "'--config.eval.contexts=(24, 48)'" in text
    )


def test_more_devices_than_a_topology_has_are_refused(monkeypatch, capsys):
    absent = target.Target("NVIDIA H200", (target.jax.devices()[0],), absent=True)
    monkeypatch.setattr(target, "absent", lambda topology: absent)
    argv = ["--budget=1GiB", "--topology=h200", "--mesh=8x1"]
    assert memory_frontier.main(argv) == 2
    assert "--mesh='8x1': wants 8 devices, and --topology=h200 has 1" in capsys.readouterr().err


def test_law_lengths_are_doublings():
    assert memory_plan.law_lengths([256, 4096]) == [256, 512, 1024, 2048, 4096]
    assert memory_plan.law_lengths([100, 450]) == [100, 200, 400]


def test_meshes_of_a_list_are_planned_on_the_same_devices(here):
    for data, seq in ((8, 1), (2, 4), (1, 8)):
        mesh = memory.mesh_of(config_of(**{"mesh.data": data, "mesh.seq": seq}), here)
        assert tuple(mesh.shape[a] for a in sharding.AXES) == (data, 1, seq) and math.prod(mesh.shape.values()) == 8


@pytest.mark.parametrize(
    ("topology", "package", "name"),
    [("h200", "jax-cuda13-pjrt", "NVIDIA H200"), ("v5e:2x4", "libtpu", "TPU v5e 2x4")],
)
def test_a_step_is_compiled_for_an_accelerator_that_is_not_here(topology, package, name):
    """Where its compiler is installed; its program is its own."""
    pytest.importorskip("jax_plugins.xla_cuda13" if "cuda" in package else package)
    there = target.absent(topology)
    assert (there.name, there.absent) == (name, True) and package in there.versions
    found = memory.train_usage(config_of(), there)
    state = memory.state_bytes(config_of(), there)
    assert found.arguments >= sum(state.values()) and found.total > 2 * state["parameters"] + state["optimizer"]
    if there.platform == "tpu":
        many = memory.train_usage(config_of(batch_size=8, **{"mesh.data": 2, "mesh.seq": 4}), there)
        assert many.total < memory.train_usage(config_of(batch_size=8), there).total


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h200", r"--topology='h200': cannot be compiled for here \(no compiler\); pip install \"jax\[cuda13\]\""),
        ("v5e:2x4", r"--topology='v5e:2x4': cannot be compiled for here \(no compiler\); pip install \"libtpu\""),
        ("h200:x", "--topology='h200:x': write the number of GPUs, such as h200:8"),
    ],
)
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, topology, message):
    def none(*args, **options):
        raise NotImplementedError("no compiler\nat all")

    monkeypatch.setattr(target.topologies, "get_topology_desc", none)
    with pytest.raises(ConfigError, match=message):
        target.absent(topology)


def test_a_name_says_only_what_choices_differ_in():
    def choice(remat, data):
        return {"model.remat": remat, "mesh.data": data, "mesh.seq": 1}

    assert memory_report.shared([choice("none", 1), choice("none", 8)]) == {"model.remat": "none"}
    assert memory_report.shared([choice("none", 8), choice("block", 8)]) == {"mesh.data": 8, "mesh.seq": 1}
    assert memory_report.shared([choice("none", 8)]) == choice("none", 8)
    assert memory_report.label({"mesh.data": 8, "mesh.seq": 1}) == "mesh 8 x 1"
