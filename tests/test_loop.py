"""What the loop of a run does where no real process is needed to see it."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from configs import base
from research import signals, stages, train
from research.config import ConfigError


def this_run(**fields) -> SimpleNamespace:
    clocks = train.metrics.Clocks()
    return SimpleNamespace(config=base.get_config("cpu"), workdir="", num_steps=80, signals=[], clocks=clocks, **fields)


def test_a_signal_in_the_evaluation_that_a_resume_owes_leaves_it_owed(monkeypatch):
    """Else the run goes on without it, and has an evaluation less than one that was never stopped."""
    this = this_run()
    this.signals.append(15)
    monkeypatch.setattr(train, "_evaluated", lambda this, now: False)
    monkeypatch.setattr(train, "_evaluate", lambda *_: None)
    with pytest.raises(signals.Interrupted, match="stopped at step 10 of 80") as stopped:
        train._loop(this, SimpleNamespace(step=10, params=None), 0, None, None, None, None)
    assert stopped.value.signal == 15


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_held_out_loss_that_is_not_finite_stops_the_run(monkeypatch, loss):
    """The last update broke the model: no training loss has seen it."""
    suite = SimpleNamespace(beyond=False, context=24)
    this = this_run(suites={"24": suite}, model=None, mesh=None, corpus=SimpleNamespace(token_bytes=np.ones(9, int)))
    monkeypatch.setattr(train.evaluate, "compile_suites", lambda *_: {"24": None})
    scores = np.array([1.0, loss]), np.zeros(2, bool), np.zeros(2, int)
    monkeypatch.setattr(train.evaluate, "score", lambda *_: scores)
    with pytest.raises(train.DivergedError, match="step 10: held-out loss (nan|inf): not finite"):
        train._evaluate(this, None, {}, 10, 0, None)


def test_waiting_for_a_checkpoint_is_not_train_time(monkeypatch):
    """Nor is the step's own time the checkpoint's: it is waited for first."""
    this, done = this_run(), []
    monkeypatch.setattr(train, "_next_batch", lambda *_: None)
    monkeypatch.setattr(train.jax, "block_until_ready", lambda _: done.append(time.sleep(0.1)))
    manager = SimpleNamespace(is_saving_in_progress=lambda: True, wait_until_finished=lambda: time.sleep(0.3))
    assert train._one_step(this, None, 0, lambda *_: ("state", "metrics"), manager) == ("state", "metrics")
    assert 0.1 <= this.clocks.total("train") < 0.3 <= this.clocks.total("checkpoint") and len(done) == 1
    manager.is_saving_in_progress = lambda: False
    train._one_step(this, None, 0, lambda *_: ("state", "metrics"), manager)
    assert len(done) == 1  # else the device would wait for the host at every step


@pytest.mark.parametrize(("step", "left"), [(0, (16, 64)), (29, (16, 64)), (30, (64,)), (40, (64,))])
def test_the_stages_that_are_left_are_compiled_as_a_run_of_its_length_is(monkeypatch, step, left):
    """A stage of few steps too has the program of a long run, or its steps would be slower than another strategy's."""
    monkeypatch.setattr(train, "_next_batch", lambda this, cursor: f"batch at {cursor}")
    monkeypatch.setattr(train.heaps, "compiled", lambda traced, steps: (traced, steps))
    this = this_run(stages=(stages.Stage(0, 30, 32, 16), stages.Stage(30, 40, 8, 64)), tokens_per_step=512)
    train_step = SimpleNamespace(trace=lambda state, batch: batch)
    found = train._compiled(this, train_step, SimpleNamespace(step=step))
    wanted = {16: ("batch at 0", 80), 64: ("batch at 15360", 80)}
    assert {stage.seq_len: program for stage, program in found.items()} == {length: wanted[length] for length in left}


def test_a_step_without_a_target_is_said_to_be_one():
    fetched = dict(count=np.float32(0), loss=np.float32(np.nan), grad_norm=np.float32(0))
    with pytest.raises(train.DivergedError, match="step 3: none of its tokens is a target; give a larger"):
        train._fetch(this_run(), 3, 24, fetched)


def test_a_damaged_result_is_made_again_and_a_run_without_its_rows_is_refused(tmp_path, monkeypatch, caplog):
    (tmp_path / "heldout_losses.npz").touch()
    for damaged in ('{"status": "fini', "[]", "{}", "3"):
        caplog.clear()
        (tmp_path / "result.json").write_text(damaged)
        assert train.result.read(str(tmp_path)) is None and "damaged" in caplog.text
    (tmp_path / "result.json").write_text('{"status": "finished"}')
    assert train.result.read(str(tmp_path)) == {"status": "finished"}
    (tmp_path / "heldout_losses.npz").unlink()
    assert train.result.read(str(tmp_path)) is None  # what it found is gone: it is made again
    (tmp_path / "metrics.jsonl").write_text("")
    this = SimpleNamespace(config=base.get_config("cpu"), workdir=str(tmp_path), num_steps=80, tokens_per_step=8)
    this.stages = (stages.Stage(0, 80, 2, 4),)
    with pytest.raises(ConfigError, match="metrics.jsonl has lost its steps"):
        train.result._content(this, {}, None)
