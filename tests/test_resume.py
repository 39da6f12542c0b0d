"""A run is a pure function of its config, whatever stops it: real processes, real signals."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import train
from research import load
from research.config import ConfigError
from research.data import heldout, tokens

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:the load_module")
ROOT = Path(__file__).parent.parent
STEPS, EVERY = 60, 10
TRAIN = ("-m", "experiments.train")
QUICK = "--xla_backend_optimization_level=0"
OVERRIDES = [
    "model.num_layers=1", "model.d_model=32", "model.num_heads=2", "model.d_ff=32", "model.num_experts=2",
    "model.vocab_size=257", "model.loss_chunk=64", "model.moe_block=32", "model.attention_chunk=32",
    "seq_len=64", "batch_size=8", f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.keep_last=9",
    "train.eval_every=20", "data.source=text", "data.tokenizer=bytes", "data.max_epochs=0", "mesh.data=1",
    "eval.contexts=(8,)", "eval.num_targets=64", "eval.own_targets=128", "eval.batch_tokens=128",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a text corpus; its caches are shared by all runs."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "text").mkdir()
    known = ["a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dogs", "of", "yesterday"]
    words = random.Random(0).choices(known, k=4000)
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(" ".join(words[200 * i : 200 * i + 200]))
    return folder


def arguments(home: Path, workdir: Path, *more: str) -> list[str]:
    folders = [f"data.path={home / 'text'}", f"data.cache_dir={home / 'cache'}"]
    overrides = [f"--config.{override}" for override in [*OVERRIDES, *folders, *more]]
    return [f"--config={ROOT / 'configs' / 'balanced.py'}:cpu", f"--workdir={workdir}", *overrides]


def start(
    home: Path, workdir: Path, *more: str, flags: str = QUICK, compiled: bool = True, run: Sequence[str] = TRAIN
) -> subprocess.Popen:
    """`compiled`: what is compiled is kept in a folder of the environment's, else in the run's own. run: of Python."""
    names = ("PATH", "HOME", "LD_LIBRARY_PATH", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= dict(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=flags,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    if compiled:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(home / "compiled")
    command = [sys.executable, *run, *arguments(home, workdir, *more)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(child: subprocess.Popen) -> tuple[int, str]:
    """(exit code, what it wrote to stderr)."""
    _, said = child.communicate(timeout=120)
    return child.returncode, said


def run(home: Path, workdir: Path, *more: str, **how: Any) -> str:
    code, said = finish(start(home, workdir, *more, **how))
    assert code == 0, said
    return said


def stop(home: Path, workdir: Path, number: int, step: int, *more: str, delay: float = 0.0) -> tuple[int, str]:
    """Starts a run, and sends it a signal some seconds after it has said that `step` is over."""
    child = start(home, workdir, *more)
    said = ""
    for line in child.stderr:
        said += line
        if f"step {step}/" in line:
            time.sleep(delay)
            child.send_signal(number)
            break
    code, rest = finish(child)
    return code, said + rest


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """The folder of a run that nothing interrupted."""
    run(home, home / "whole")
    return home / "whole"


def copy_until(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a finished run as it was just after `step` was saved, with rows of later steps."""
    shutil.copytree(whole, folder)
    for name in ("result.json", "heldout_losses.npz"):
        (folder / name).unlink()
    for saved in steps_saved(folder):
        if saved > step:
            shutil.rmtree(folder / "checkpoints" / str(saved))
    return folder


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def rows(folder: Path) -> list[dict]:
    """Of metrics.jsonl, without what a clock has measured."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "train_seconds" and not k.startswith("perf/")} for row in parsed]


def arrays(folder: Path) -> list[np.ndarray]:
    """Every array of the last step's checkpoint."""
    state = ocp.PyTreeCheckpointer().restore(folder / "checkpoints" / str(STEPS) / "state")
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def assert_same_run(folder: Path, whole: Path) -> None:
    """Bit for bit: parameters, optimiser state, every row, every held-out loss."""
    assert rows(folder) == rows(whole)
    found, wanted = arrays(folder), arrays(whole)
    assert len(found) > 10
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    with np.load(folder / "heldout_losses.npz") as a, np.load(whole / "heldout_losses.npz") as b:
        assert a["loss_8"].tobytes() == b["loss_8"].tobytes()


def resumed_at(said: str) -> int:
    return int(re.search(r"goes on from step (\d+)", said)[1])


def test_training_learns(whole):
    losses = [row["train/loss"] for row in rows(whole) if "train/loss" in row]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 1


SLOW = """
import sys, time
from research.data import tokens

def build(folder, config, quick=tokens.build):
    quick(folder, config)
    print("built", file=sys.stderr, flush=True)
    time.sleep(60)

tokens.build = build
from experiments import train
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_corpus_is_built_leaves_nothing(home, tmp_path, number):
    cache = tmp_path / "cache"
    child = start(home, tmp_path / "run", f"data.cache_dir={cache}", run=("-c", SLOW))
    assert child.stderr.readline() == "built\n"
    assert [*cache.glob(".*/new/manifest.json")]  # not yet under its name
    child.send_signal(number)
    code, said = finish(child)
    assert code == 128 + number and said == "stopped before the first step; the same command begins again\n"
    assert not (tmp_path / "run").exists() and not [*cache.iterdir()]


def stopped_at(said: str) -> int:
    assert "Traceback" not in said
    return int(re.search(rf"stopped at step (\d+) of {STEPS}, saved; the same command goes on", said)[1])


def test_a_signal_saves_and_the_same_command_goes_on(home, whole, tmp_path):
    code, said = stop(home, tmp_path, signal.SIGTERM, 12)
    assert code == 143, said
    at = stopped_at(said)
    assert 12 <= at < STEPS and steps_saved(tmp_path)[-1] == at
    assert not (tmp_path / "result.json").exists()
    assert resumed_at(run(home, tmp_path)) == at
    assert_same_run(tmp_path, whole)


GROWS = "train.stages=((16, 0.3), (32, 0.4))"  # to step 18, to step 42, and rows of 64 to step 60


@pytest.fixture(scope="module")
def grown(home) -> Path:
    """The folder of a run of rows that grow, that nothing interrupted."""
    run(home, home / "grown", GROWS)
    return home / "grown"


@pytest.mark.parametrize("at", [10, 40, 50])  # in the first stage, just before a border, in the last one
def test_rows_that_grow_go_on_in_any_stage(home, grown, tmp_path, at):
    copy_until(grown, tmp_path / "run", at)
    assert resumed_at(run(home, tmp_path / "run", GROWS)) == at
    assert_same_run(tmp_path / "run", grown)
    found, wanted = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "run", grown))
    for result in (found, wanted):
        assert [(s["steps"], s["batch_size"], s["seq_len"]) for s in result["stages"]] == [
            (18, 32, 16), (24, 16, 32), (18, 8, 64),
        ]  # fmt: skip
        assert all(stage["step_seconds"] > 0 for stage in result["stages"])
    assert found["flops"] == wanted["flops"] == rows(grown)[-1]["flops"]
    assert found["memory_bytes"]["compiled_step"] == wanted["memory_bytes"]["compiled_step"]


def test_rows_that_grow_train_alike_on_a_mesh_and_in_microbatches(home, tmp_path):
    """Rows and positions of every stage divided over four devices, two microbatches a step: the same losses."""
    few = (GROWS, "train.steps=20", "train.checkpoint_every=0", "model.router_noise=0.0")
    run(home, tmp_path / "one", *few)
    divided = ("mesh.data=2", "mesh.seq=2", "train.accumulation=2")
    run(home, tmp_path / "mesh", *few, *divided, flags=f"{QUICK} --xla_force_host_platform_device_count=4")
    found, wanted = ([r["train/loss"] for r in rows(tmp_path / name) if "train/loss" in r] for name in ("mesh", "one"))
    assert len(found) == 20
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_rows_that_grow_do_not_go_on_as_another_run(home, grown, tmp_path):
    shutil.copytree(grown, tmp_path / "run")
    code, said = finish(start(home, tmp_path / "run"))
    assert code == 2 and "config.train.stages" in said


def test_an_interrupt_from_the_keyboard_saves(home, whole, tmp_path):
    code, said = stop(home, tmp_path, signal.SIGINT, 6, "train.eval_every=0")
    assert code == 130, said
    at = stopped_at(said)
    assert 6 <= at < STEPS and steps_saved(tmp_path)[-1] == at
    written = [row["step"] for row in rows(tmp_path) if "train/loss" in row]
    assert written == list(range(1, at + 1))


def test_a_kill_loses_no_more_than_the_steps_between_checkpoints(home, whole, tmp_path):
    delay = np.random.default_rng().uniform(0, 0.2)
    code, said = stop(home, tmp_path, signal.SIGKILL, 24, delay=delay)
    assert code == -signal.SIGKILL, f"delay {delay}: {said}"
    reached, saved = rows(tmp_path)[-1]["step"], steps_saved(tmp_path)[-1]
    # the step after a save waits for it to be written
    assert reached - saved <= EVERY, f"delay {delay}"
    assert resumed_at(run(home, tmp_path)) == saved
    assert_same_run(tmp_path, whole)


def test_a_damaged_newest_checkpoint_is_skipped(home, whole, tmp_path):
    folder = copy_until(whole, tmp_path / "run", STEPS)
    for path in (folder / "checkpoints" / str(STEPS) / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = run(home, folder)
    assert f"WARNING: checkpoint of step {STEPS} is damaged and skipped" in said
    assert resumed_at(said) == STEPS - EVERY
    assert_same_run(folder, whole)


def test_a_run_goes_on_over_other_devices(home, whole, tmp_path):
    folder = copy_until(whole, tmp_path / "run", 40)
    eight = f"{QUICK} --xla_force_host_platform_device_count=8"
    said = run(home, folder, "mesh.data=4", "mesh.seq=2", flags=eight)
    assert resumed_at(said) == 40
    assert json.loads((folder / "result.json").read_text())["mesh"] == dict(data=4, expert=1, seq=2)
    for found, wanted in zip(rows(folder), rows(whole), strict=True):
        assert found.keys() == wanted.keys() and found["step"] == wanted["step"]
        for name in found:
            if "loss" in name:
                assert found[name] == pytest.approx(wanted[name], abs=1e-4), (name, found["step"])


def test_another_config_is_refused(home, whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"}
    assert train.main(arguments(home, whole, "optimizer.momentum=0.5")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: config.optimizer.momentum=0.5")
    assert "0.95" in said
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"} == before


def test_a_finished_run_is_not_run_again(home, whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    assert train.main(arguments(home, whole)) == 0
    assert "finished before, at step 60" in capsys.readouterr().err
    after = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(home, tmp_path):
    huge = ("optimizer.learning_rate=1e38", "optimizer.adamw_learning_rate=1e38")
    code, said = finish(start(home, tmp_path, *huge))
    assert code == 3 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    step = int(re.match(r"error: step (\d+): loss ", last)[1])
    assert step > 1 and all(row["step"] < step for row in rows(tmp_path))
    assert not (tmp_path / "result.json").exists()
    assert all(saved < step for saved in steps_saved(tmp_path))


def test_what_is_compiled_is_kept_beside_the_corpora_and_used_again(home, tmp_path):
    def kept():  # the slowest program: of quick ones only those are kept that took half a second, which load decides
        return set((home / "cache" / "compiled").glob("jit_train_step-*-cache"))

    run(home, tmp_path / "one", "train.steps=1", compiled=False)
    files = kept()
    assert files
    run(home, tmp_path / "two", "train.steps=1", "seed=7", compiled=False)
    assert kept() == files


def test_a_run_is_loaded_and_predicts_what_it_was_scored_by(whole, tmp_path):
    """On one device, from the folder and the corpus alone: the same loss of every position of its own windows."""
    found = load.load(whole)
    assert found.step == STEPS
    corpus = tokens.open_corpus(found.config)
    windows = heldout.own_length_windows(corpus, found.config)
    logprobs = np.asarray(jax.nn.log_softmax(found.logits(windows["inputs"])), np.float64)
    loss = -np.take_along_axis(logprobs, windows["targets"][..., None], axis=-1)[..., 0]
    with np.load(whole / "heldout_losses.npz") as arrays:
        np.testing.assert_allclose(loss, arrays["own_loss"], atol=2e-5)
    text = "def main(argv):\n"
    assert found.tokenizer.decode(found.tokenizer.encode(text).ids) == text
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    for folder, said in ((tmp_path / "run", "no checkpoint yet"), (tmp_path / "none", "holds no run")):
        with pytest.raises(ConfigError, match=said):
            load.load(folder)
        assert not (folder / "checkpoints").exists()
