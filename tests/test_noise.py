"""The gradient's noise: the estimates are those of their formulas, and the gradients those of the model."""

import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import ablation, train
from experiments import noise as script
from research import load, noise, sharding, step
from research.analysis import claims_batch, noise_report
from research.analysis import noise as analysis
from research.analysis.page import VERDICTS
from research.config import ConfigError
from research.data import stream, tokens
from research.model import MoETransformer
from tests.small import bigger, model_config, random_batch, relative

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:the load_module")
ROOT = Path(__file__).parent.parent
BLOCKS, EACH = noise.BLOCKS, 2


def entry_of(grads: np.ndarray, order="independent", length=128, **more) -> dict:
    """An entry of noise.json from gradients [M, G, D]: D numbers in each group."""
    blocks = grads.reshape(BLOCKS, -1, *grads.shape[1:])
    sums = blocks.sum(1)
    squares = np.square(blocks).sum((1, 3))
    about = dict(run="r", strategy="s", setting="independent", seed=1, seq_len=2048, step=5, consumed=40960)
    return about | dict(order=order, length=length, squares=squares, gram=np.einsum("agd,bgd->abg", sums, sums)) | more


def by_formula(grads: np.ndarray) -> tuple[float, float]:
    """(|G|^2, tr Sigma) of [M, D]."""
    count = len(grads)
    signal = (np.square(grads.sum(0)).sum() - np.square(grads).sum()) / (count * (count - 1))
    return signal, np.square(grads - grads.mean(0)).sum() / (count - 1)


def test_estimates_are_the_formulas_and_those_without_each_block(rng):
    grads = rng.normal(0.3, 1, (BLOCKS * EACH, len(noise.NAMES), 7))
    for groups in (slice(None), [1, 3]):
        found = analysis.estimates(entry_of(grads), BLOCKS * EACH, groups)
        flat = grads[:, groups].reshape(len(grads), -1)
        kept = [flat, *(np.delete(flat, [EACH * j, EACH * j + 1], axis=0) for j in range(BLOCKS))]
        wanted = np.array([by_formula(part) for part in kept])
        np.testing.assert_allclose(found["signal"], wanted[:, 0], rtol=1e-10)
        np.testing.assert_allclose(found["spread"], wanted[:, 1], rtol=1e-10)


def test_estimates_are_unbiased_and_their_intervals_hold_the_truth_as_often_as_they_say(rng):
    """Of a known mean and covariance, over 300 draws: |G|^2 = 0.5, tr Sigma = 12."""
    shape, size = (BLOCKS * 4, len(noise.NAMES), 60), len(noise.NAMES) * 60
    held = {"signal": 0, "spread": 0}
    values = {"signal": [], "spread": []}
    truth = {"signal": 0.5, "spread": 12.0}
    for _ in range(300):
        grads = rng.normal((0.5 / size) ** 0.5, (12 / size) ** 0.5, shape)
        found = analysis.estimates(entry_of(grads), len(grads))
        for name, values_of in values.items():
            interval = analysis.jackknife(found[name], logs=name == "spread")
            values_of.append(interval["value"])
            held[name] += interval["low"] <= truth[name] <= interval["high"]
    for name, wanted in truth.items():
        assert np.mean(values[name]) == pytest.approx(wanted, abs=4 * np.std(values[name]) / 300**0.5)
        assert 0.9 < held[name] / 300 < 0.99, (name, held)


def test_an_interval_is_the_jackknifes_with_students_t(rng):
    values = 1 + 0.1 * rng.random(BLOCKS + 1)
    for logs in (False, True):
        x = np.log(values) if logs else values
        error = ((BLOCKS - 1) / BLOCKS * np.square(x[1:] - x[1:].mean()).sum()) ** 0.5
        reach = stats.t.ppf(0.975, BLOCKS - 1) * error
        wanted = [x[0], x[0] - reach, x[0] + reach]
        found = analysis.jackknife(values, logs)
        np.testing.assert_allclose(list(found.values()), np.exp(wanted) if logs else wanted, rtol=1e-5)
    assert reach > 2.1 * error  # of 15 degrees of freedom, not of a normal


def test_a_cell_has_its_noise_scale_in_tokens_and_the_groups_that_it_is_in(rng):
    """Group g has (g + 1) parts of the variance; of all, a step has as much noise as signal at tokens * 25 / 0.5."""
    parts = np.arange(1, len(noise.NAMES) + 1)
    grads = rng.normal(0, (25 / 300) ** 0.5, (BLOCKS * 8, len(noise.NAMES), 300))
    grads = grads * (parts / parts.sum())[:, None] ** 0.5 + (0.5 / (300 * len(parts))) ** 0.5
    (run,) = analysis.analyse(found_of(entry_of(grads), batches=BLOCKS * 8))
    (cell,) = run["cells"]
    assert cell["spread"]["value"] == pytest.approx(25, rel=0.05)
    assert cell["scale"]["value"] == pytest.approx(2048 * cell["spread"]["value"] / cell["signal"]["value"], rel=1e-4)
    assert list(cell["groups"].values()) == pytest.approx(parts / parts.sum(), rel=0.1)
    table = noise_report.section([run], 8192).tables[1]
    assert table.rows[0][5] == f"{cell['scale']['value'] / 8192:.2f}"


def test_ratios_of_rows_shorter_than_a_piece_are_of_paired_rows_on_both_sides(rng):
    """Up to 512 of pieces of 2,048: the same text in either length; Muon's groups have a ratio of their own."""
    muon = np.isin(noise.NAMES, analysis.MATRICES)[:, None]

    def entry(order: str, length: int, spread: float, own: float = 1.0) -> dict:
        grads = rng.normal(0, spread**0.5, (BLOCKS * 8, len(noise.NAMES), 400)) * np.where(muon, own**0.5, 1)
        return entry_of(grads, order, length)

    cells = [entry("independent", 128, 1), entry("independent", 512, 2, own=4), entry("paired", 128, 3)]
    (run,) = analysis.analyse(found_of(*cells, entry("paired", 512, 6), batches=BLOCKS * 8))
    ratios = {name: ratio["value"] for name, ratio in run["ratios"].items()}
    total = 2 * (4 * 3 + 2) / 5  # three groups of five are Muon's
    wanted = dict(total=total, matrices=8, length=2, diversity=total / 2, place=3)
    assert ratios == pytest.approx(wanted, rel=0.06)


def test_without_a_signal_the_noise_scale_is_a_bound(rng):
    grads = rng.normal(0, 1, (BLOCKS * EACH, len(noise.NAMES), 50))
    found = found_of(entry_of(grads - grads.mean(0)))
    (cell,) = analysis.analyse(found)[0]["cells"]
    assert cell["scale"]["value"] is None
    assert cell["scale"]["low"] is None or cell["scale"]["low"] > 0


def found_of(*entries: dict, batches: int = BLOCKS * EACH) -> dict:
    return dict(tokens=2048, batches=batches, groups=list(noise.NAMES), measured=list(entries))


def test_ratios_are_of_spreads_at_equal_tokens_and_multiply(rng):
    """By construction: neighbours double the variance, rows four times as long add half of it again."""

    def entry(order: str, length: int, spread: float) -> dict:
        return entry_of(rng.normal(0.2, spread**0.5, (BLOCKS * 8, len(noise.NAMES), 400)), order, length)

    cells = entry("independent", 128, 1), entry("paired", 128, 2), entry("independent", 2048, 3)
    (run,) = analysis.analyse(found_of(*cells, batches=BLOCKS * 8))
    ratios = {name: ratio["value"] for name, ratio in run["ratios"].items()}
    assert ratios == pytest.approx(dict(total=3, matrices=3, length=1.5, diversity=2, place=2), rel=0.05)
    assert ratios["length"] * ratios["diversity"] == pytest.approx(ratios["total"], rel=1e-4)
    for ratio in run["ratios"].values():
        assert ratio["low"] < ratio["value"] < ratio["high"]
    assert [cell["relative"]["value"] for cell in run["cells"]] == pytest.approx([1, 2, 3], rel=0.05)
    (sentence,) = noise_report.finding([run])
    assert f"{run['ratios']['total']['value']:.2f} [" in sentence and "by diversity and" in sentence


@pytest.mark.parametrize(
    "spreads, verdict",
    [((1, 2, 3), VERDICTS[1]), ((3, 3, 1), VERDICTS[2]), ((1, 1, 1), VERDICTS[3]), ((1, 2, 2), VERDICTS[1])],
)
def test_the_verdict_on_noise_turns_with_the_ratios(rng, spreads, verdict):
    grads = rng.normal(0, 1, (BLOCKS * 8, len(noise.NAMES), 400))  # the same, so that equal spreads are equal
    places = ("independent", 128), ("paired", 128), ("independent", 2048)
    entries = [entry_of(0.2 + grads * s**0.5, *place) for place, s in zip(places, spreads, strict=True)]
    found = analysis.analyse(found_of(*entries, batches=BLOCKS * 8))
    judged, text = claims_batch.noise({"noise": found, "arms": []})
    assert judged == verdict
    assert ("nearly all of it because they come from more places" in text) == (spreads == (1, 2, 2))
    assert claims_batch.noise({"arms": []})[0] == VERDICTS[3]


def test_the_gradient_is_that_of_the_objective_without_its_other_parts(one_device, rng):
    model = MoETransformer(model_config(balance_weight=0.0, dropout=0.0))
    batch = sharding.put_batch(random_batch(rng, 4, 16), one_device)
    params = model.init(jax.random.key(0), batch["inputs"])["params"]
    params = jax.tree.map(jnp.asarray, bigger(params, rng))
    found = jax.jit(noise.gradient, static_argnums=2)(params, batch, model)
    scale = 1.0 / jnp.sum(batch["targets"] >= 0)
    wanted, _ = jax.jit(jax.grad(step.objective, has_aux=True), static_argnums=2)(
        params, batch, model, jax.random.key(1), scale
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_less(relative(x, y), 2e-5), found, wanted)
    noisy = MoETransformer(model_config(balance_weight=1.0, router_noise=1.0))
    same = jax.jit(noise.gradient, static_argnums=2)(params, batch, noisy)
    assert max(jax.tree.leaves(jax.tree.map(relative, same, found))) < 1e-6


def test_sums_of_a_block_are_those_of_its_gradients(one_device, rng):
    model = MoETransformer(model_config())
    rows = [random_batch(rng, 2, 16, ragged=False) for _ in range(3)]
    stacked = sharding.put_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]}, one_device)
    params = model.init(jax.random.key(0), stacked["inputs"][0])["params"]
    total, squares = noise.block_sums(params, stacked, model)
    step_of = jax.jit(noise.gradient, static_argnums=2)
    each = [step_of(params, sharding.put_batch(row, one_device), model) for row in rows]
    jax.tree.map(lambda t, *g: np.testing.assert_allclose(t, sum(g), rtol=2e-4, atol=1e-6), total, *each)
    gram = noise.inner_products(each)
    np.testing.assert_allclose(np.trace(gram), squares, rtol=1e-4)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]).astype(np.float64) for g in each]
    np.testing.assert_allclose(gram.sum(-1), np.array(flat) @ np.array(flat).T, rtol=1e-6)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert {noise.NAMES[noise.group(name)] for name in names} == set(noise.NAMES)
    assert {name for name in names if noise.group(name) == len(noise.GROUPS)} == {
        "attention_norm", "moe_norm", "final_norm",
    }  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A study of two strategies, trained for a few steps on words."""
    home = tmp_path_factory.mktemp("noise")
    (home / "text").mkdir()
    words = random.Random(0).choices(["a", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"], k=8000)
    for i in range(20):
        (home / "text" / f"{i}.txt").write_text(" ".join(words[400 * i : 400 * i + 400]))
    fields = [
        "model.num_layers=1", "model.d_model=16", "model.num_heads=2", "model.d_ff=16", "model.num_experts=2",
        "model.vocab_size=257", "model.loss_chunk=64", "model.moe_block=32", "model.attention_chunk=32",
        "train.steps=4", "train.checkpoint_every=2", "train.eval_every=0", "data.source=text", "data.tokenizer=bytes",
        "mesh.data=1", "eval.contexts=(8,)", "eval.num_targets=64", "eval.own_targets=128", "eval.batch_tokens=128",
        f"data.path={home / 'text'}", f"data.cache_dir={home / 'cache'}",
    ]  # fmt: skip
    runs = []
    for strategy, shape in (("large_batch", (16, 16)), ("long_seq", (4, 64))):
        own = [f"batch_size={shape[0]}", f"seq_len={shape[1]}"]
        own += ["train.stages=((16, 0.5),)"] * (strategy == "long_seq")  # its pieces are of one length all the same
        overrides = [f"--config.{field}" for field in (*fields, *own)]
        folder = home / "study" / f"{strategy}-independent-42"
        assert train.main([f"--config={ROOT}/configs/{strategy}.py:cpu", f"--workdir={folder}", *overrides]) == 0
        runs.append(dict(strategy=strategy, setting="independent", seed=42))
    (home / "study" / "ablation.json").write_text(json.dumps({"runs": runs, "exit_codes": {}}))
    return home / "study"


def test_paired_micro_batches_are_the_same_text_and_independent_ones_are_not(study):
    config = load.read_config(study / "long_seq-independent-42")
    corpus = tokens.open_corpus(config)
    layouts = {
        (order, length): noise.layout(config, order, length, 64, 0)
        for order, length in (("paired", 16), ("paired", 64), ("independent", 16), ("independent", 64))
    }
    for number in range(6):
        read = {place: stream.batch(corpus, c, 64 * number)["inputs"] for place, c in layouts.items()}
        assert all(x.size == 64 for x in read.values()) and read["paired", 16].shape == (4, 16)
        np.testing.assert_array_equal(read["paired", 16].ravel(), read["paired", 64].ravel())
        np.testing.assert_array_equal(read["independent", 64], read["paired", 64])
        assert not np.array_equal(read["independent", 16].ravel(), read["paired", 64].ravel())


def test_every_micro_batch_is_another_piece_of_text(study, monkeypatch):
    config = load.read_config(study / "long_seq-independent-42")
    shape, read = noise.layout(config, "independent", 64, 64, 0), []
    batch = stream.batch
    monkeypatch.setattr(
        stream, "batch", lambda corpus, config, cursor: read.append(cursor) or batch(corpus, config, cursor)
    )
    found = noise.measure(load.load(study / "long_seq-independent-42"), tokens.open_corpus(config), shape, 32)
    assert read == [64 * i for i in range(32)]
    assert np.shape(found["squares"]) == (BLOCKS, len(noise.NAMES))
    assert np.shape(found["gram"]) == (BLOCKS, BLOCKS, len(noise.NAMES))


def test_documents_masks_are_those_of_training(one_device, rng):
    model = MoETransformer(model_config())
    batch = sharding.put_batch(random_batch(rng, 2, 16, ragged=False), one_device)
    params = model.init(jax.random.key(0), batch["inputs"])["params"]
    halves = np.repeat([[1, 2]], 8, axis=1).repeat(2, axis=0).astype(np.int32)
    masked = batch | sharding.put_batch(
        dict(segments=halves, positions=np.tile(np.arange(8, dtype=np.int32), (2, 2))), one_device
    )
    found = jax.jit(noise.gradient, static_argnums=2)(params, masked, model)
    apart = jax.tree.map(
        lambda x: jax.reshard(jnp.asarray(np.asarray(x).reshape(4, 8)), jax.P(*sharding.TOKENS)), batch
    )
    wanted = jax.jit(noise.gradient, static_argnums=2)(params, apart, model)
    jax.tree.map(lambda x, y: np.testing.assert_array_less(relative(x, y), 1e-4), found, wanted)


def test_a_study_is_measured_once_and_its_report_says_it(study, capsys):
    assert script.main([f"--workdir={study}", "--batches=32"]) == 0
    said = capsys.readouterr().err
    assert "large_batch-independent-42: independent, rows of 16 (1 of 5)" in said
    state = json.loads((study / "noise.json").read_text())
    measured = {(e["strategy"], e["order"], e["length"]) for e in state["measured"]}
    assert measured == {
        ("large_batch", "independent", 16), ("large_batch", "paired", 16),  # no longer than its own rows
        ("long_seq", "independent", 16), ("long_seq", "paired", 16), ("long_seq", "independent", 64),
    }  # fmt: skip
    assert {(e["seq_len"], e["step"], e["consumed"]) for e in state["measured"]} == {(16, 4, 1024), (64, 4, 1024)}
    report = (study / "report" / "report.md").read_text()
    assert "## How noisy is the gradient?" in report and "figures/noise.png" in report
    assert "the gradient's variance in rows of 64 tokens over rows of 16 is" in report
    results = json.loads((study / "report" / "results.json").read_text())
    assert results["analysis"]["noise"] == analysis.analyse(state)
    assert len(analysis.analyse(state, {"long_seq-independent-42"})) == 1  # of a run that is finished
    before = (study / "noise.json").read_bytes()
    assert script.main([f"--workdir={study}", "--batches=32"]) == 0
    assert "rows of" not in capsys.readouterr().err and (study / "noise.json").read_bytes() == before
    lost = state["measured"].pop(1)  # what is missing alone is measured again
    (study / "noise.json").write_text(json.dumps(state))
    assert script.main([f"--workdir={study}", "--batches=32"]) == 0
    assert capsys.readouterr().err.count("rows of") == 1
    again = json.loads((study / "noise.json").read_text())["measured"]
    assert again[:-1] == state["measured"] and again[-1] == lost


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--batches=40"], "--batches=40: give a multiple of 16"),
        (["--batches=16"], "--batches=16: give a multiple of 16, 32 or more"),
        (["--batches=16000"], "--batches=16000: the text has room for "),
        (["--runs=balanced-independent-42"], "choose of large_batch-independent-42, long_seq-independent-42"),
    ],
)
def test_a_mistake_is_one_line_and_measures_nothing(study, capsys, arguments, named):
    (study / "noise.json").unlink(missing_ok=True)
    assert script.main([f"--workdir={study}", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and named in errors[0]
    assert not (study / "noise.json").exists()


def test_a_run_that_was_trained_again_is_measured_again_and_one_that_failed_is_not_shown(study, tmp_path, capsys):
    copy = tmp_path / "study"
    shutil.copytree(study, copy)
    path = copy / "large_batch-independent-42" / "result.json"
    path.write_text(path.read_text() + " ")
    assert script.main([f"--workdir={copy}", "--batches=32"]) == 0
    assert capsys.readouterr().err.count("large_batch-independent-42: ") == 2
    recorded = json.loads((copy / "ablation.json").read_text()) | {"exit_codes": {"long_seq-independent-42": 143}}
    (copy / "ablation.json").write_text(json.dumps(recorded))
    assert ablation.main([f"--workdir={copy}", "--report_only"]) == 143
    shown = json.loads((copy / "report" / "results.json").read_text())["analysis"]["noise"]
    assert [run["strategy"] for run in shown] == ["large_batch"]
    (copy / "noise.json").unlink()
    ablation.main([f"--workdir={copy}", "--report_only"])
    assert not (copy / "report" / "noise.json").exists()
    assert "How noisy" not in (copy / "report" / "report.md").read_text()


@pytest.mark.parametrize("change", [dict(gram=None), dict(squares=[[1.0]]), dict(length=3), dict(gram=[[["x"]]])])
def test_a_damaged_file_is_one_line_that_says_to_remove_it(tmp_path, rng, change):
    entry = entry_of(rng.normal(0, 1, (BLOCKS * EACH, len(noise.NAMES), 3)))
    entry |= {name: np.asarray(entry[name]).tolist() for name in ("squares", "gram")}
    (tmp_path / "noise.json").write_text(json.dumps(found_of(entry)))
    assert analysis.read(tmp_path)["measured"]
    (tmp_path / "noise.json").write_text(json.dumps(found_of(entry | change)))
    with pytest.raises(ConfigError, match="noise.json is damaged .*; remove it and measure again"):
        analysis.read(tmp_path)
    (tmp_path / "noise.json").write_text("{")
    with pytest.raises(ConfigError, match="remove it and measure again"):
        analysis.read(tmp_path)


def test_seeds_of_one_strategy_are_told_apart_and_one_length_has_no_ratio(rng):
    grads = rng.normal(0, 1, (BLOCKS * EACH, len(noise.NAMES), 9))
    found = analysis.analyse(found_of(*(entry_of(grads, length=2048, run=f"r{seed}", seed=seed) for seed in (1, 2))))
    assert [noise_report.label(run, found) for run in found] == ["s, independent, seed 1", "s, independent, seed 2"]
    assert [run["ratios"] for run in found] == [{}, {}] and noise_report.finding(found) == []
    judged, text = claims_batch.noise({"noise": found, "arms": []})
    assert judged == VERDICTS[3] and "Neighbouring" not in text


def test_runs_that_cannot_be_measured_are_refused(study, tmp_path, capsys):
    copy = tmp_path / "study"
    shutil.copytree(study, copy)
    (copy / "noise.json").unlink(missing_ok=True)
    shutil.rmtree(copy / "long_seq-independent-42" / "checkpoints")
    result = json.loads((copy / "large_batch-independent-42" / "result.json").read_text())
    (copy / "large_batch-independent-42" / "result.json").write_text(json.dumps(result | {"protocol": "published"}))
    for name, said in (("long_seq", "its checkpoints are gone"), ("large_batch", "LEAKING")):
        assert script.main([f"--workdir={copy}", f"--runs={name}-independent-42"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (copy / "noise.json").exists()


def test_measurements_of_another_size_are_kept(study, tmp_path, capsys):
    (study / "noise.json").write_text(json.dumps(found_of(batches=64) | dict(tokens=64, seed=0)))
    before = (study / "noise.json").read_bytes()
    assert script.main([f"--workdir={study}", "--batches=32"]) == 2
    assert "--batches=32: noise.json there is of batches 64; remove it" in capsys.readouterr().err
    assert (study / "noise.json").read_bytes() == before
    (study / "noise.json").unlink()
    assert script.main([f"--workdir={tmp_path}"]) == 2
    assert "holds no study" in capsys.readouterr().err
