"""The loop of one run: a pure function of (config, corpus, seed), whatever interrupts it.

config -> validate -> corpus -> state (new, or of the newest checkpoint) -> steps, evaluations, checkpoints -> result
"""

import contextlib
import dataclasses
import math
import os
import sys
from typing import Any

import jax
import numpy as np

from research import checkpoint, cores, evaluate, files, flops, heaps, metrics, planner, result, sharding, signals, step
from research.config import num_steps, validate
from research.data import stream, tokens
from research.model import ModelConfig, MoETransformer
from research.optimizer import make_optimizer, make_schedule
from research.stages import Stage, flops_until, stage_at, stages_of


class DivergedError(RuntimeError):
    """The loss or a gradient is not finite."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Any
    workdir: str
    corpus: tokens.Corpus
    mesh: jax.sharding.Mesh
    model: MoETransformer
    stages: tuple[Stage, ...]
    suites: dict[str, evaluate.Suite]
    clocks: metrics.Clocks
    signals: list[int]  # that came and ask to stop

    @property
    def num_steps(self) -> int:
        return self.stages[-1].end

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.seq_len


def prepare(config: Any) -> tuple[tokens.Corpus, dict[str, evaluate.Suite]]:
    """The corpus and the held-out suites of a (planned) config; nothing compiles, and only the token cache is written.

    Raises: ConfigError for every mistake in the config that a run would stop at.
    """
    mesh_shape = sharding.mesh_shape(config.mesh, len(cores.devices_of(config)))
    validate(config, mesh_shape, jax.default_backend())
    corpus = tokens.open_corpus(config)
    stream.check(corpus, config, num_steps(config) * config.batch_size * config.seq_len)
    return corpus, evaluate.make_suites(corpus, config, mesh_shape)


def run(config: Any, workdir: str) -> dict[str, Any]:
    """Train `config` in `workdir`, going on from its newest checkpoint; returns what result.json holds.

    A finished run is not run again. Raises: ConfigError (a mistake in the config, nothing written), signals.Interrupted
    (after saving, on SIGINT or SIGTERM), DivergedError (loss or gradient not finite).
    """
    clocks = metrics.Clocks()
    with clocks.measure("total"):
        with signals.at_once():
            config = planner.planned(config, workdir)
            with clocks.measure("data"):
                corpus, suites = prepare(config)
        return _run(config, workdir, corpus, suites, clocks)


def _run(config, workdir, corpus, suites, clocks) -> dict[str, Any]:
    with checkpoint.claim_workdir(workdir, config.to_dict(), corpus.fingerprint), signals.between_steps() as came:
        finished = result.read(workdir)
        if finished is not None:
            print(f"{workdir}: finished before, at step {finished['steps']}", file=sys.stderr)
            return finished
        keep_compiled(config)
        files.write_json(os.path.join(workdir, "environment.json"), metrics.environment())
        files.write_json(os.path.join(workdir, "data_manifest.json"), corpus.manifest)
        if corpus.tokenizer is not None:
            files.write_text(os.path.join(workdir, "tokenizer.json"), corpus.tokenizer)
        this = Run(
            config=config,
            workdir=workdir,
            corpus=corpus,
            mesh=sharding.make_mesh(config.mesh, cores.devices_of(config)),
            model=MoETransformer(ModelConfig(**config.model, fsdp=config.mesh.fsdp)),
            stages=stages_of(config),
            suites=suites,
            clocks=clocks,
            signals=came,
        )
        with jax.set_mesh(this.mesh):
            return _train(this)


def keep_compiled(config: Any) -> None:
    """What is compiled is kept beside the corpora, so that the next run of these shapes starts at once.

    Without effect where JAX has compiled before, or has a folder of its own (JAX_COMPILATION_CACHE_DIR).
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(tokens.cache_root(config) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _train(this: Run) -> dict[str, Any]:
    config = this.config
    optimizer = make_optimizer(config.optimizer, this.num_steps)
    schedule = make_schedule(config.optimizer, config.optimizer.learning_rate, this.num_steps)
    manager = checkpoint.open_manager(this.workdir, config.train.keep_last, config.train.keep_best)
    with contextlib.closing(manager):
        state, cursor = _start(this, manager, optimizer)
        with this.clocks.measure("compile"):
            compiled_steps = _compiled(this, step.make_train_step(this.model, optimizer, schedule), state)
        with (
            metrics.MetricsWriter(this.workdir, int(state.step)) as writer,
            metrics.Progress(this.num_steps, int(state.step), config.strategy) as progress,
        ):
            try:
                scores = _loop(this, state, cursor, compiled_steps, manager, writer, progress)
            except DivergedError as error:
                manager.wait_until_finished()
                newest = manager.latest_step()
                kept = "there is no checkpoint yet" if newest is None else f"the last checkpoint is of step {newest}"
                raise DivergedError(f"{error}; {kept}") from None
        with this.clocks.measure("checkpoint"):
            manager.wait_until_finished()
    return result.finish(this, scores, compiled_steps[this.stages[-1]])


def _compiled(this: Run, train_step: Any, state: step.TrainState) -> dict[Stage, Any]:
    """The step of each stage that is not over; of the last one always."""
    found = {}
    for stage in this.stages:
        if stage.end > int(state.step) or stage is this.stages[-1]:
            batch = _next_batch(this, stage.first * this.tokens_per_step)
            found[stage] = heaps.compiled(train_step.trace(state, batch), this.num_steps)
    return found


def _start(this: Run, manager: Any, optimizer: Any) -> tuple[step.TrainState, int]:
    """The state and the data cursor of the newest checkpoint that can be read, or of step 0."""
    shape = tuple(this.mesh.shape[axis] for axis in sharding.AXES)
    init = jax.jit(lambda: step.init_state(this.model, optimizer, this.config.seed, shape))
    restored = checkpoint.restore(manager, checkpoint.abstract(init, this.mesh))
    if restored is None:
        return init(), 0
    state, meta = restored
    this.clocks.add(meta["clocks"])
    print(f"{this.workdir}: goes on from step {int(state.step)}", file=sys.stderr)
    return state, meta["tokens"]


def _next_batch(this: Run, cursor: int) -> dict[str, jax.Array]:
    """The batch at a data position, cut into microbatches [A, B / A, T]."""
    parts = this.config.train.accumulation
    batch = stream.batch(this.corpus, this.config, cursor)
    return sharding.put_batch({k: x.reshape(parts, -1, x.shape[-1]) for k, x in batch.items()}, this.mesh)


def _loop(this, state, cursor, compiled_steps, manager, writer, progress):
    """All steps that are left. Metrics are fetched a step late, so that the device never waits for the host."""
    train, compiled_eval = this.config.train, {}
    now, scores, pending = int(state.step), None, None
    if now and _due(now, train.eval_every) and not _evaluated(this, now):  # a signal cut it short
        scores = _evaluate(this, state.params, compiled_eval, now, cursor, writer)
        if scores is None:
            raise _stopped(this, now)  # its checkpoint is there, and the evaluation is still owed
    while now < this.num_steps:
        compiled_step = compiled_steps[stage_at(this.stages, now)]
        state, fetched = _one_step(this, state, cursor, compiled_step, manager)
        with this.clocks.measure("train"):
            now, cursor = now + 1, cursor + this.tokens_per_step
            last = now == this.num_steps
            evaluates = last or _due(now, train.eval_every)
            stops = bool(this.signals)  # looked at once: a signal from here on is of the next step
            saves = last or _due(now, train.checkpoint_every) or stops
            if pending:
                _record(this, _fetch(this, *pending), writer, progress)
            pending = (now, cursor, fetched)
            if evaluates or saves:
                _record(this, _fetch(this, *pending), writer, progress)
                pending = None
        if evaluates:
            scores = _evaluate(this, state.params, compiled_eval, now, cursor, writer)
            stops = stops or scores is None
        if saves or stops:
            _save(this, manager, now, cursor, state, scores if evaluates else None)
        if stops and not last:
            raise _stopped(this, now)
    if scores is None:  # the newest checkpoint was of the last step, or a signal cut the evaluation short
        scores = _evaluate(this, state.params, compiled_eval, now, cursor, writer)
    if scores is None:
        raise signals.Interrupted(
            this.signals[0], "stopped in the last evaluation; the same command goes on from there"
        )
    return scores


def _one_step(this, state, cursor, compiled_step, manager):
    """(state, metrics). The write of a save overlaps one step, and no more: a kill loses no more than it must."""
    with this.clocks.measure("train"):
        state, fetched = compiled_step(state, _next_batch(this, cursor))
        if manager.is_saving_in_progress():
            jax.block_until_ready(fetched)
    with this.clocks.measure("checkpoint"):
        manager.wait_until_finished()
    return state, fetched


def _stopped(this: Run, now: int) -> signals.Interrupted:
    message = f"stopped at step {now} of {this.num_steps}, saved; the same command goes on from there"
    return signals.Interrupted(this.signals[0], message)


def _evaluated(this: Run, now: int) -> bool:
    rows = (row for row in result.read_rows(this.workdir) if row["step"] == now)
    return any(name.startswith("eval/") for row in rows for name in row)


def _due(now: int, every: int) -> bool:
    return every > 0 and now % every == 0


def _fetch(this: Run, now: int, cursor: int, fetched: dict[str, Any]) -> dict[str, Any]:
    """Waits for a step and returns its row; stops the run where it is not finite."""
    got = jax.tree.map(np.asarray, fetched)
    if got["count"] == 0:
        raise DivergedError(f"step {now}: none of its tokens is a target; give a larger config.batch_size or seq_len")
    if not (np.isfinite(got["loss"]) and np.isfinite(got["grad_norm"])):
        raise _diverged(now, f"loss {got['loss']}, gradient norm {got['grad_norm']}")
    return _position(this, now, cursor) | metrics.of_step(got)


def _diverged(now: int, what: str) -> DivergedError:
    return DivergedError(f"step {now}: {what}: not finite; lower config.optimizer.learning_rate, in a new --workdir")


def _position(this: Run, now: int, cursor: int) -> dict[str, Any]:
    """What every row of metrics.jsonl carries."""
    return {
        "step": now,
        "tokens": cursor,
        "flops": flops_until(this.config.model, this.stages, now),
        "train_seconds": this.clocks.total("train"),
    }


def _record(this: Run, row: dict[str, Any], writer: Any, progress: Any) -> None:
    """Adds the speed since the row before; to the progress line, and every log_every steps to disk."""
    seconds = this.clocks.lap("train", row["train_seconds"])
    speed = this.tokens_per_step / seconds
    row |= {"perf/step_s": seconds, "perf/tokens_per_s": speed}
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        per_token = flops.train_flops_per_token(this.config.model, stage_at(this.stages, row["step"] - 1).seq_len)
        row["perf/mfu"] = flops.mfu(speed / this.mesh.size, per_token, peak)
    if _due(row["step"], this.config.train.log_every) or row["step"] in {stage.end for stage in this.stages}:
        writer.write(row)
    progress.update(row)


def _evaluate(this, params, compiled, now, cursor, writer) -> dict[str, result.Scores] | None:
    """Scores of every suite (of those beyond the training length at the last step), and their row.

    None when a signal cut it short.
    """
    last, scores = now == this.num_steps, {}
    suites = {name: suite for name, suite in this.suites.items() if last or not suite.beyond}
    with this.clocks.measure("compile"):  # when it is first wanted, not before the first step
        new = {name: suite for name, suite in suites.items() if name not in compiled}
        compiled |= evaluate.compile_suites(this.model, params, new, this.mesh)
    with this.clocks.measure("eval"):
        for name, suite in suites.items():
            found = evaluate.score(compiled[name], params, suite, this.mesh, lambda: bool(this.signals))
            if found is None:
                return None
            scores[name] = result.Scores.of(*found, this.corpus.token_bytes, suite)
            if not math.isfinite(scores[name].summary["loss"]):  # the last update broke the model
                raise _diverged(now, f"held-out loss {scores[name].summary['loss']}")
    row = _position(this, now, cursor)
    for name, score in scores.items():
        for measure in ("loss", "perplexity", "accuracy", "bits_per_byte"):
            row[f"eval/{measure}@{name}"] = score.summary[measure]
    if not _evaluated(this, now):  # a run killed after its last evaluation has the row already
        writer.write(row)
    return scores


def _save(this, manager, now, cursor, state, scores) -> None:
    metric = None if scores is None else result.heldout_loss(scores)
    with this.clocks.measure("checkpoint"):
        meta = dict(
            tokens=cursor,
            config=this.config.to_dict(),
            fingerprint=this.corpus.fingerprint,
            clocks=this.clocks.to_dict(),
        )
        checkpoint.save(manager, now, state, meta, metric)
