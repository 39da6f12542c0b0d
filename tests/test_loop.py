"""What the loop of a run does where no real process is needed to see it."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs import base
from research import train


def this_run(**fields) -> SimpleNamespace:
    clocks = train.metrics.Clocks()
    return SimpleNamespace(config=base.get_config("cpu"), workdir="", num_steps=80, signals=[], clocks=clocks, **fields)


def test_a_signal_in_the_evaluation_that_a_resume_owes_leaves_it_owed(monkeypatch):
    """Else the run goes on without it, and has an evaluation less than one that was never stopped."""
    this = this_run()
    this.signals.append(15)
    monkeypatch.setattr(train, "_evaluated", lambda this, now: False)
    monkeypatch.setattr(train, "_evaluate", lambda *_: None)
    with pytest.raises(train.Interrupted, match="stopped at step 10 of 80") as stopped:
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
