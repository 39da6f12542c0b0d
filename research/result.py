"""What a finished run leaves: result.json, and the loss of every held-out target."""

import dataclasses
import datetime
import io
import json
import logging
import math
import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from research import cores, files, flops, metrics, process
from research.config import ConfigError
from research.data import heldout, stream, synthetic, tokens
from research.stages import Stage, flops_until

if TYPE_CHECKING:
    from research import evaluate
    from research.train import Run

log = logging.getLogger(__name__)
LAST_ROWS = 20  # logged steps that the final training loss is averaged over


@dataclasses.dataclass(frozen=True)
class Scores:
    """nll float32 and right bool [targets], in the order of the suite's targets, and their summary; nll in nats."""

    nll: np.ndarray
    right: np.ndarray
    summary: dict[str, Any]

    @classmethod
    def of(
        cls, nll: np.ndarray, right: np.ndarray, ids: np.ndarray, token_bytes: np.ndarray, suite: "evaluate.Suite"
    ) -> "Scores":
        """Sums over counts: loss in nats per token, perplexity, accuracy, bits per byte of the targets' text."""
        total, num_bytes = float(nll.sum(dtype=np.float64)), int(token_bytes[ids].sum())
        mean = total / len(nll)
        summary = dict(
            loss=mean,
            perplexity=math.exp(min(mean, 700)),
            accuracy=float(right.mean()),
            bits_per_byte=total / math.log(2) / num_bytes if num_bytes else None,
            targets=len(nll),
            context=suite.context,
            beyond=suite.beyond,
        )
        return cls(nll.astype(np.float32), right, summary)


def heldout_loss(scores: dict[str, Scores]) -> float:
    """The one number that `best` means: the loss at the longest context trained at, else in windows of that length."""
    within = [name for name, s in scores.items() if name.isdecimal() and not s.summary["beyond"]]
    name = max(within, key=int) if within else next(name for name in scores if not name.isdecimal())
    return scores[name].summary["loss"]


def finish(this: "Run", scores: dict[str, Scores], compiled_step: Any) -> dict[str, Any]:
    """Writes heldout_losses.npz and result.json of a run at its last step; returns the result."""
    content = _content(this, scores, compiled_step)
    if jax.process_index() == 0:
        _write_losses(this, scores)
        files.write_json(os.path.join(this.workdir, "result.json"), content)
    return content


def _content(this: "Run", scores: dict[str, Scores], compiled_step: Any) -> dict[str, Any]:
    config = this.config
    total_tokens = this.num_steps * this.tokens_per_step
    total_flops = flops_until(config.model, this.stages, this.num_steps)
    rows = read_rows(this.workdir)
    step_seconds = [row["perf/step_s"] for row in rows if "perf/step_s" in row]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    stages = [_stage(this, stage, rows) for stage in this.stages]
    speed = total_tokens / sum(stage["steps"] * stage["step_seconds"] for stage in stages)
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    environment = metrics.environment()
    return dict(
        status="finished",
        strategy=config.strategy,
        scale=config.scale,
        protocol=config.data.protocol,
        seed=config.seed,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        tokens_per_step=this.tokens_per_step,
        steps=this.num_steps,
        tokens=total_tokens,
        epochs=total_tokens / stream.epoch_tokens(this.corpus, config),
        parameters=flops.parameter_counts(config.model),
        stages=stages,
        flops_per_token=total_flops / total_tokens,
        flops=total_flops,
        corpus=config.data.source if not config.data.path else os.path.basename(config.data.path.rstrip("/")),
        fingerprint=this.corpus.fingerprint,
        train_tokens=len(this.corpus.train),
        unigram_entropy=tokens.unigram_entropy(this.corpus, config.model.vocab_size),
        first_token_entropy=tokens.first_token_entropy(this.corpus, config.seq_len, config.model.vocab_size),
        overlap=this.corpus.manifest.get("overlap"),
        seconds={name: this.clocks.total(name) for name in ("train", "compile", "eval", "checkpoint", "data", "total")},
        tokens_per_second=speed,
        step_seconds=dict(
            zip(("p10", "median", "p90"), np.percentile(step_seconds, (10, 50, 90)).tolist(), strict=True)
        ),
        mfu=None if peak is None else flops.mfu(speed / this.mesh.size, total_flops / total_tokens, peak),
        memory_bytes=dict(
            compiled_step=compiled_bytes(compiled_step, this.mesh),
            process_peak=process.peak_bytes(),
            device_peak=metrics.device_peak_bytes(),
        ),
        train_loss_last=float(np.mean(losses[-LAST_ROWS:])),
        eval=dict(
            contexts={name: s.summary for name, s in scores.items() if name.isdecimal()},
            **{name: s.summary for name, s in scores.items() if not name.isdecimal()},
        ),
        mesh={axis: int(size) for axis, size in this.mesh.shape.items()},
        device=environment["device"],
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
    )


def _stage(this: "Run", stage: Stage, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A stage's shape, and the median of its steps' seconds. (The row of its last step is always written.)"""
    seconds = [row["perf/step_s"] for row in rows if "perf/step_s" in row and stage.first < row["step"] <= stage.end]
    if not seconds:
        message = "its metrics.jsonl has lost its steps, and with them losses and times; train anew in another folder"
        raise ConfigError("--workdir", this.workdir, message)
    shape = dict(steps=stage.steps, batch_size=stage.batch_size, seq_len=stage.seq_len)
    return shape | dict(step_seconds=float(np.median(seconds)))


def compiled_bytes(compiled: Any, mesh: jax.sharding.Mesh) -> int | None:
    """Bytes a device needs for a compiled program: arguments + outputs - aliased + temporaries.

    Of a CPU's devices, which share one memory, it is what all of them need. None where the backend does not say. (On
    CPU its field named peak leaves the temporaries out.)
    """
    m = compiled.memory_analysis()
    if m is None:
        return None
    bytes_ = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return int(bytes_) * cores.sharing_memory(mesh)


def _write_losses(this: "Run", scores: dict[str, Scores]) -> None:
    """heldout_losses.npz: the loss of every target of every suite, with its document and its place."""
    arrays = {f"loss_{name}": s.nll for name, s in scores.items() if name != "own"}
    if this.corpus.heldout_scored is not None:
        arrays |= {f"right_{name}": s.right for name, s in scores.items()}
        positions, documents, distances = synthetic.answers(this.corpus)
        arrays |= dict(document=documents, position=positions, distance=distances)
    else:
        targets = heldout.targets(this.corpus, this.config)
        documents_WT, places_WT = heldout.own_length_places(this.corpus, this.config)
        arrays |= dict(document=targets.documents, position=targets.positions)
        arrays["repeat"] = heldout.repeats(targets, this.corpus)
        arrays["own_loss"] = scores["own"].nll.reshape(documents_WT.shape)
        arrays |= dict(own_document=documents_WT, own_place=places_WT)
    path = os.path.join(this.workdir, "heldout_losses.npz")
    with io.BytesIO() as content:
        np.savez_compressed(content, **arrays)
        files.write_bytes(path, content.getvalue())


def read(workdir: str) -> dict[str, Any] | None:
    """The result of a finished run, or None; it has its losses beside it."""
    path = os.path.join(workdir, "result.json")
    if not all(os.path.exists(os.path.join(workdir, name)) for name in ("result.json", "heldout_losses.npz")):
        return None
    with open(path) as file:
        try:
            found = json.load(file)
        except ValueError:
            found = None
    if not isinstance(found, dict) or "status" not in found:
        log.warning("%s is damaged, and made again", path)
        return None
    return found


def read_rows(workdir: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]
