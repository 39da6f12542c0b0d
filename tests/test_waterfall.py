"""The waterfall: each stage changes one thing, runs are made once, the grid finds an optimum, the figures say so."""

import ast
import functools
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from configs.waterfall import SCALES, STRATEGIES
from experiments import grid, ledger
from experiments import waterfall as script
from experiments import waterfall_plan as plans
from experiments.ablation import STRATEGIES as ABLATION_STRATEGIES
from experiments.child import Interrupted
from experiments.flags import load_config
from research.analysis import markup, runs, waterfall, waterfall_report
from research.analysis.statistics import holm
from research.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS, EACH = 12, 8
# What each stage may change of a strategy's config, beside its seed and learning rate at the last two.
CHANGES = {1: {"data.protocol"}, 2: set(), 3: {"data.max_tokens", "data.max_epochs"}, 4: {"batch_size"}}
# Losses that the fake runs have: (leaking own, documents own, documents shared, one epoch, equal).
LOSSES = {
    "large_batch": dict(leaking=0.30, documents=4.0, shared=4.1, one_epoch=3.0, equal=2.9, best=0.04),
    "balanced": dict(leaking=0.10, documents=4.2, shared=4.2, one_epoch=3.1, equal=3.0, best=0.08),
    "long_seq": dict(leaking=0.20, documents=4.4, shared=4.3, one_epoch=3.2, equal=3.2, best=0.02),
}


def plan_of(scale: str = "cpu", workdir: Path = Path("runs/x"), until: int = 6, **given: str) -> plans.Plan:
    return plans.make_plan(workdir, scale, given, None, until)


def study(workdir: Path, *arguments: str, exits: dict[str, int] | None = None, stops: str = "") -> int:
    """A smoke study whose children are fakes in this process. `exits`: run -> exit code; `stops`: a signal comes."""

    def run_child(command: Sequence[str]) -> int:
        if command[0] == "check":
            return 0
        fields = dict(part.removeprefix("--config.").split("=", 1) for part in command[2:])
        folder = Path(fields.pop("--workdir"))
        folder.mkdir(parents=True, exist_ok=True)
        with open(workdir / "calls", "a") as file:
            file.write(f"{folder.name}\n")
        if folder.name == stops:
            raise Interrupted(130)
        if code := (exits or {}).get(folder.name):
            return code
        (folder / "checkpoints").mkdir()
        write_run(folder, Path(command[1].partition(":")[0]).stem, fields)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        for module in (script, ledger):
            patch.setattr(module, "run_child", run_child)
        return script.main([f"--workdir={workdir}", "--smoke", *arguments], train=("train",), check=("check",))


def flat(config, prefix: str = "") -> dict:
    found = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return found


@functools.cache
def config_of(scale: str, run: plans.Run) -> dict:
    plan = plan_of(scale)
    return flat(load_config(f"{ROOT / plans.config_name(plan, run)}", plans.config_flags(plan, run)))


def curve(strategy: str):
    """Loss of a learning rate: lowest at the strategy's best; known for five rates."""

    def loss(run: plans.Run) -> float | None:
        return math.log2(run.rate / LOSSES[strategy]["best"]) ** 2 if 0.01 <= run.rate <= 0.16 else None

    return loss


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_stage_changes_one_thing(scale, strategy):
    plan = plan_of(scale)
    configs = [config_of(scale, plans.stage_runs(plan, s, strategy, curve(strategy))[0]) for s in plan.stages]
    for number in range(1, len(plan.stages)):
        before, now = configs[number - 1], configs[number]
        changed = {name for name in now if now[name] != before[name]}
        allowed = CHANGES.get(number, {"optimizer.learning_rate"} if number == 5 else {"seed"})
        assert changed <= allowed, (number, changed)
    shared = [stage.measure == "shared" for stage in plan.stages]
    assert shared == sorted(shared) and shared.index(True) == 2
    assert configs[0]["data.protocol"] == "published" and configs[0]["data.max_epochs"] == 0
    assert configs[1]["data.max_tokens"] == configs[0]["data.max_tokens"] and configs[1]["data.max_epochs"] == 0
    assert configs[3]["data.max_epochs"] == 1 and configs[3]["data.max_tokens"] == 0


@pytest.mark.parametrize("scale", SCALES)
def test_only_the_named_fields_tell_the_strategies_apart(scale):
    plan = plan_of(scale)
    for number, stage in enumerate(plan.stages):
        configs = [config_of(scale, plans.stage_runs(plan, stage, s, curve(s))[0]) for s in STRATEGIES]
        differ = {name for config in configs for name in config if config[name] != configs[0][name]}
        assert differ <= {"strategy", "batch_size", "seq_len"} | ({"optimizer.learning_rate"} if number > 4 else set())
        tokens = {config["batch_size"] * config["seq_len"] for config in configs}
        assert (len(tokens) == 1) == (number >= 4)


@pytest.mark.parametrize("scale", ["cpu", "published"])
def test_shapes_and_passes_are_in_the_ratios_of_the_original(scale):
    original = {"large_batch": (104, 256), "balanced": (26, 1024), "long_seq": (6, 4096)}
    plan = plan_of(scale)
    ratios = set()
    for strategy, (rows, length) in original.items():
        config = config_of(scale, plans.make_run(plan, strategy, "leaking", plan.rate, 42))
        ratios.add((rows / config["batch_size"], length / config["seq_len"]))
        passes = config["train.steps"] * config["batch_size"] * config["seq_len"] / config["data.max_tokens"]
        assert passes == pytest.approx(1000 * rows * length / 500_000, rel=0.01)
    assert len(ratios) == 1
    assert set(STRATEGIES) == set(ABLATION_STRATEGIES)


def test_a_run_that_stages_share_has_one_name():
    plan = plan_of("cpu")
    names = [
        run.name
        for stage in plan.stages
        for strategy in STRATEGIES
        for run in plans.stage_runs(plan, stage, strategy, lambda run: None)
        if stage.seeds == "tuning"
    ]
    assert len(names) == 18 and len(set(names)) == 3 + 3 + 3 + 3 - 1  # long_seq has equal tokens already


@pytest.mark.parametrize("best", [0.0025, 0.01, 0.03, 0.04, 0.1, 0.3, 3.0])
def test_the_grid_grows_until_its_optimum_lies_inside(best):
    """Whatever rate is best: a higher loss lies on both sides of it, or the limit is reached and it says so."""
    plan, made = plan_of("cpu"), {}

    def losses(run: plans.Run) -> float | None:
        return made.get(run.rate)

    for run in plans.rates(plan, "balanced", losses):
        assert run.rate not in made
        made[run.rate] = abs(math.log2(run.rate / best))
    low, high = min(made), max(made)
    lowest = min(made, key=made.__getitem__)
    assert len(made) <= plan.shapes.max_rates
    if plan.rate / 8 < best < plan.rate * 8:
        assert low < lowest < high
    assert grid.known(lambda rate: losses(plans.make_run(plan, "balanced", "equal", rate, 42)), plan.rate) == made
    assert runs.lowest(made, plan.rate) == lowest
    assert {run.rate for run in plans.rates(plan, "balanced", losses)} == set(made)  # as a report reads it later


def test_a_diverged_rate_bounds_the_grid_and_a_failed_one_ends_it():
    plan = plan_of("cpu")
    made = {}
    for run in plans.rates(plan, "balanced", lambda run: made.get(run.rate)):
        made[run.rate] = math.inf if run.rate > plan.rate else run.rate * -1
    assert sorted(made) == [plan.rate / 2, plan.rate, plan.rate * 2] and runs.lowest(made, plan.rate) == plan.rate
    tried = [run.rate for run in plans.rates(plan, "balanced", lambda run: None)]
    assert len(tried) == 3
    made = {}
    for run in plans.rates(plan, "balanced", lambda run: made.get(run.rate)):
        if run.rate <= 2 * plan.rate:  # the fourth fails, and is not asked for again
            made[run.rate] = -run.rate
    assert max(made) == 2 * plan.rate


def calls(workdir: Path) -> list[str]:
    path = workdir / "calls"
    return path.read_text().split() if path.exists() else []


def test_the_study_goes_on_where_it_was_stopped_and_makes_each_run_once(finished, tmp_path):
    made = calls(finished)
    # 3 leaking, 3 documents, 2 + 3 of which one is shared, grids of 3 (the limit) less those, 2 seeds each
    assert len(made) == len(set(made)) == 3 + 3 + 2 + 3 + 3 * 2 + 3 * 2
    assert not list(finished.glob("*/checkpoints"))
    assert study(tmp_path, stops=made[8]) == 130
    assert calls(tmp_path) == made[:9]
    assert study(tmp_path) == 0
    assert calls(tmp_path) == made[:9] + made[8:]  # the one that was stopped is gone on with
    results = [json.loads((folder / "report" / "results.json").read_text()) for folder in (finished, tmp_path)]
    for result in results:
        result["analysis"]["waterfall"].pop("seconds")
        for run in result["runs"]:
            run.pop("seconds")
    assert results[0] == results[1]
    assert study(tmp_path) == 0 and calls(tmp_path) == made[:9] + made[8:]  # nothing is left to make


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("waterfall")
    assert study(workdir) == 0
    return workdir


def test_the_ranking_changes_where_it_was_made_to(finished):
    results = json.loads((finished / "report" / "results.json").read_text())
    found = results["analysis"]["waterfall"]
    stages = found["stages"]
    assert stages[0]["order"] == ["balanced", "long_seq", "large_batch"]
    assert found["changes"] == [1]
    assert all(stage["order"] == ["large_batch", "balanced", "long_seq"] for stage in stages[1:6])
    assert stages[1]["measure"] == "own" and stages[1]["context"] is None and not stages[1]["pairs"]
    assert {stage["context"] for stage in stages[2:]} == {24}  # windows of 30 fit in the shortest length, 32
    for stage in stages[2:]:
        assert len(stage["pairs"]) == 3
        for row in stage["rows"][1:]:
            behind = row["behind"]
            assert behind["low"] <= behind["mean"] <= behind["high"]
            assert behind["mean"] == pytest.approx(row["loss"] - stage["rows"][0]["loss"], abs=2e-3)
    assert [pair["seeds"] for pair in stages[5]["pairs"]] == [[42]] * 3
    assert [pair["seeds"] for pair in stages[6]["pairs"]] == [[43, 44]] * 3
    assert all(42 not in row["seeds"] for row in stages[6]["rows"])
    assert [row["sd"] is not None for row in stages[6]["rows"]] == [True] * 3


def test_a_stage_without_a_ranking_is_not_said_to_have_kept_it(finished):
    found = json.loads((finished / "report" / "results.json").read_text())["analysis"]["waterfall"]
    found["stages"] = found["stages"][1:]  # those of one ranking
    assert "It stays so at every later stage." in waterfall_report.summary(found)
    number = found["stages"][2]["number"]
    found["stages"][2]["order"] = []
    said = waterfall_report.summary(found)
    assert "It stays so at every later stage that has a ranking." in said
    assert f"No ranking, for want of a strategy: stage {number}." in said


def test_holm_is_over_the_pairs_of_a_stage(finished):
    found = json.loads((finished / "report" / "results.json").read_text())["analysis"]["waterfall"]
    for stage in found["stages"][2:]:
        adjusted = holm([pair["p"] for pair in stage["pairs"]])
        assert len(adjusted) == 3 and [pair["p_holm"] for pair in stage["pairs"]] == pytest.approx(adjusted, abs=2e-6)
        assert sum(adjusted) > sum(pair["p"] for pair in stage["pairs"])
        assert [pair["shown"] for pair in stage["pairs"]] == [p < 0.05 for p in adjusted]


def test_the_floor_stands_beside_every_leaking_number(finished):
    """(ln N - H(first)) / T of the windows of its own length; nothing else is marked as leaking."""
    found = json.loads((finished / "report" / "results.json").read_text())["analysis"]["waterfall"]
    text = (finished / "report" / "report.md").read_text()
    for stage in found["stages"]:
        for row in stage["rows"]:
            assert ("floor" in row) == stage["leaking"]
    for row in found["stages"][0]["rows"]:
        length = row["seq_len"]
        assert row["floor"] == pytest.approx((math.log(4000 - length) - 5.5) / length, abs=1e-6)
        line = next(
            line for line in text.splitlines() if line.startswith(f"| {row['strategy']} |") and "LEAKING" in line
        )
        cells = [cell.strip() for cell in line.split("|")]
        assert f"{row['floor']:.4f}" == cells[cells.index(f"{row['loss']:.4f} **LEAKING**") + 1]  # read with the loss
    parts = re.split(r"^## ", text, flags=re.M)
    assert [("LEAKING" in part) for part in parts if part.startswith("Stage")] == [True] + [False] * 6


def test_every_difference_stands_in_both_reports_with_its_p(finished):
    found = json.loads((finished / "report" / "results.json").read_text())["analysis"]["waterfall"]
    parts = [part for part in waterfall_report.sections({"waterfall": found}) if part.title == "Differences"]
    rows = parts[0].tables[0].rows
    pairs = [(stage, pair) for stage in found["stages"] for pair in stage["pairs"]]
    assert len(rows) == len(pairs) == 3 * 5
    page = (finished / "report" / "report.html").read_text()
    for row, (stage, pair) in zip(rows, pairs, strict=True):
        assert row[:3] == (str(stage["number"]), stage["name"], f"{pair['a']} - {pair['b']}")
        assert row[3].startswith(f"{pair['mean']:+.4f} [{pair['low']:+.4f}") and row[4] == f"{pair['p_holm']:.2g}"
        lower = min(stage["rows"], key=lambda r: (r["strategy"] not in (pair["a"], pair["b"]), r["loss"]))
        assert (row[5] == lower["strategy"]) == pair["shown"]
        assert str(markup.inline(row[3])) in page and str(markup.inline(row[2])) in page


def test_the_learning_rates_say_whether_the_optimum_is_inside(finished):
    rates = json.loads((finished / "report" / "results.json").read_text())["analysis"]["waterfall"]["rates"]
    assert [rates[s]["best"] for s in STRATEGIES] == [LOSSES[s]["best"] for s in STRATEGIES]
    assert [rates[s]["inside"] for s in STRATEGIES] == [True, False, False]  # at most three rates in a smoke
    text = (finished / "report" / "report.md").read_text()
    assert "The best of balanced, long_seq lies on the edge of its grid" in text


def test_the_report_is_made_again_from_its_own_files(finished, tmp_path, capsys):
    made = finished / "report"
    for name in ("results.json", "heldout_losses.npz"):
        shutil.copy(made / name, tmp_path / name)
    assert script.main([f"--workdir={tmp_path}", "--report_only"]) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'report.md'}\n{tmp_path / 'report.html'}\n")
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
        assert not re.search("/home|/tmp", (made / name).read_text())
    assert (tmp_path / "results.json").read_bytes() == (made / "results.json").read_bytes()
    assert (tmp_path / "figures" / "waterfall.svg").read_bytes() == (made / "figures" / "waterfall.svg").read_bytes()
    assert "/home" not in (tmp_path / "results.json").read_text()
    assert waterfall_report.section(json.loads((made / "results.json").read_text())["analysis"]).tables
    assert waterfall_report.section({}) is None


def test_a_failed_run_is_named_and_leaves_its_stage_without_a_ranking(tmp_path, capsys):
    exits = {"balanced-leaking-lr0.04-seed42": 4, "long_seq-equal-lr0.08-seed42": runs.DIVERGED_CODE}
    assert study(tmp_path, "--until=5", exits=exits) == 4
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    found = results["analysis"]["waterfall"]
    assert found["stages"][0]["order"] == [] and found["stages"][1]["order"]
    assert found["unfinished"] == ["balanced-leaking-lr0.04-seed42"]
    assert [entry["status"] for entry in found["rates"]["long_seq"]["tried"]][-1] == "diverged"
    assert "balanced-leaking-lr0.04-seed42 failed: exit code 4" in capsys.readouterr().err
    before = calls(tmp_path)
    assert study(tmp_path, "--until=5") == 0
    assert calls(tmp_path) == [*before, "balanced-leaking-lr0.04-seed42"]  # what diverged is not tried again


def test_every_stage_is_of_one_context_whatever_is_missing_from_it(finished):
    """The losses that are kept are of the context that the whole study's shortest rows reach."""
    results = json.loads((finished / "report" / "results.json").read_text())
    for run in results["runs"]:
        contexts = run["result"]["eval"]["contexts"]
        contexts["48"] = dict(contexts["24"])  # fits rows of 64, the next longer ones
        if run["name"] in results["study"]["stages"][3]["runs"]["large_batch"]:
            run |= dict(status="diverged", result=None)
    with np.load(finished / "report" / "heldout_losses.npz") as losses:
        stages = waterfall.analyse(results["study"], results["runs"], losses)["stages"]
    assert [row["loss"] is None for row in stages[3]["rows"]] == [False, False, True]
    assert {stage["context"] for stage in stages[2:]} == {24}


def test_another_kind_of_results_is_refused(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"runs": []}')
    assert script.main([f"--workdir={tmp_path}", "--report_only"]) == 2
    assert "not a waterfall's" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_one_line(finished, tmp_path, capsys):
    shutil.copy(finished / "report" / "results.json", tmp_path / "results.json")
    with np.load(finished / "report" / "heldout_losses.npz") as file:
        losses = dict(file)
    name = next(name for name in losses if name.endswith("/loss"))
    losses[name][3] = np.nan
    np.savez(tmp_path / "heldout_losses.npz", **losses)
    assert script.main([f"--workdir={tmp_path}", "--report_only"]) == 2
    error = capsys.readouterr().err
    assert f"heldout_losses.npz cannot be read ({name} holds a number that is not finite)" in error
    assert error.count("\n") == 1 and not (tmp_path / "report.md").exists()


def test_runs_of_other_targets_are_refused(finished, tmp_path):
    """A corpus that has changed between two runs of one study: its losses are not compared."""
    shutil.copytree(finished, tmp_path / "study")
    run = next((tmp_path / "study").glob("balanced-equal-*"))
    manifest = json.loads((run / "data_manifest.json").read_text())
    manifest["files"]["heldout.npy"]["sha256"] = "another"
    (run / "data_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="not scored on the targets of the others"):
        plan = plan_of("smoke", tmp_path / "study")
        described = json.loads((finished / "report" / "results.json").read_text())["study"]
        names = waterfall.runs_of(described)
        runs.gather(plan.workdir, described, names, {"exit_codes": {}, "seconds": {}}, tmp_path / "report")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--scale=huge"], "--scale='huge'"),
        (["--until=7"], "--until=7"),
        (["--seeds=42,43"], "config.seed=42 chooses the learning rates"),
        (["--seeds=a"], "--seeds='a'"),
        (["--config.batch_size=4"], "config.batch_size='4'"),
        (["--config.train.tokens=4"], "config.train.tokens='4'"),
        (["--config.model.depth=4"], "config.model.depth='4'"),
        (["--config.eval.contexts=(512,)"], "give one of 102 or less"),
        (["--config.data.max_tokens=0"], "config.data.max_tokens=0"),
        (["--config.data.source=recall"], "config.data.source='recall'"),
        (["--other"], "'--other'"),
        (["--report_only"], "holds no waterfall"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(tmp_path, capsys, arguments, named):
    assert script.main([f"--workdir={tmp_path}", *arguments], train=("train",), check=("check",)) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_holds_one_study(finished):
    with pytest.raises(ConfigError, match="another scale or config"):
        script.refuse_another(plan_of("smoke", finished, **{"model.d_ff": "64"}))
    script.refuse_another(plan_of("smoke", finished))


def test_a_dry_run_names_every_stage_and_runs_nothing(tmp_path, capsys):
    assert script.main([f"--workdir={tmp_path / 'x'}", "--dry_run"], train=("train",)) == 0
    text = capsys.readouterr().out
    assert text.count("# stage") == len(plans.STAGES)
    assert text.count("--config=configs/") == 3 + 3 + 2 + 3 + 3 * 2
    assert not (tmp_path / "x").exists()


def write_run(folder: Path, strategy: str, fields: dict[str, str]) -> None:
    """What a run leaves, with losses that follow from its strategy, condition and learning rate (LOSSES)."""
    merit, condition = LOSSES[strategy], folder.name.split("-")[1]
    rate, seed, leaking = float(fields["optimizer.learning_rate"]), int(fields["seed"]), condition == "leaking"
    rows, length = int(fields["batch_size"]), int(fields["seq_len"])
    shared = merit["shared" if condition in ("leaking", "documents") else condition]
    if condition == "equal":
        shared += 0.02 * math.log2(rate / merit["best"]) ** 2
    rng = np.random.default_rng([seed, STRATEGIES.index(strategy)])
    hard = np.random.default_rng(0).normal(0, 0.5, DOCUMENTS * EACH)
    losses = {
        context: shared + hard + rng.normal(0, 0.01, hard.size) for context in ast.literal_eval(fields["eval.contexts"])
    }
    own = merit["leaking"] if leaking else merit["documents"]
    result = {
        "protocol": fields["data.protocol"], "seed": seed, "batch_size": rows, "seq_len": length,
        "tokens_per_step": rows * length, "steps": 24, "tokens": 24 * rows * length,
        "train_tokens": int(fields["data.max_tokens"]) or 90_000, "unigram_entropy": 5.9, "train_loss_last": own,
        "parameters": {"total": 4_985_472, "active": 1_839_744}, "corpus": "stdlib", "device": "a processor",
        "strategy": strategy, "flops": 1e12, "fingerprint": "the text", "seconds": {}, "tokens_per_second": 1e4,
        "step_seconds": {}, "memory_bytes": {}, "jax": "0.10.2", "date": "2026-11-28",
        "eval": {
            "own": {"loss": own, "accuracy": 0.9},
            "contexts": {
                str(c): {"loss": float(x.mean()), "accuracy": 0.2, "beyond": 1.25 * c > length}
                for c, x in losses.items()
            },
        },
    }  # fmt: skip
    if leaking:
        result["first_token_entropy"] = 5.5
    documents = np.arange(DOCUMENTS, dtype=np.int32).repeat(EACH)
    config = {"optimizer": {"learning_rate": rate}, "data": {"path": "/home/someone/texts", "cache_dir": "/home"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "data_manifest.json").write_text(json.dumps({"files": {"heldout.npy": {"sha256": "the same"}}}))
    np.savez(
        folder / "heldout_losses.npz", document=documents, position=np.arange(documents.size),
        **{f"loss_{c}": x.astype(np.float32) for c, x in losses.items()},
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
