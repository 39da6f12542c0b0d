"""Runs that were never run: folders as a real one leaves them, with losses that a test chooses."""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import numpy as np

SHAPES = {"balanced": (16, 512), "long_seq": (4, 2048), "large_batch": (64, 128)}
CONTEXTS = (24, 96, 384, 1536)
NUM_DOCUMENTS, A_DOCUMENT = 24, 96  # documents, and targets in each


def losses_at(offset: float, gain: float, seed: int) -> dict[int, np.ndarray]:
    """Per-target losses [targets] by context; all runs share how hard each target is.

    `offset` nats are added everywhere, `gain` nats taken for every doubling of the context.
    """
    size = NUM_DOCUMENTS * A_DOCUMENT
    shared = np.random.default_rng(0)
    hard = shared.gamma(4.0, 1.3, size) + shared.normal(0, 0.3, NUM_DOCUMENTS).repeat(A_DOCUMENT)
    own = np.random.default_rng(seed)
    found = {}
    for context in CONTEXTS:
        noise = own.normal(0, 0.02, NUM_DOCUMENTS).repeat(A_DOCUMENT) + own.normal(0, 0.3, size)
        found[context] = (hard + offset - gain * np.log2(context / 24) + noise).astype(np.float32)
    return found


def write_run(
    folder: Path,
    strategy: str,
    *,
    offset: float = 0.0,
    gain: float = 0.05,
    seconds: float = 70.0,
    contexts: tuple[int, ...] | None = None,
    protocol: str = "clean",
    tokens: int = 524_288,
    own_loss: float | None = None,
    targets_from: int = 2000,
    num_documents: int = NUM_DOCUMENTS,
    device_peak: float | None = None,
    unigram: float = 6.8,
    seed: int = 0,
) -> dict:
    """Writes a finished run's folder and returns its result."""
    folder.mkdir(parents=True, exist_ok=True)
    batch_size, seq_len = SHAPES.get(strategy, (8, 1024))
    contexts = contexts or tuple(c for c in CONTEXTS if 1.25 * c <= seq_len)
    losses = {c: a for c, a in losses_at(offset, gain, seed).items() if c in contexts}
    finals = {c: float(a.mean()) for c, a in losses.items()}
    scores = {str(c): _scores(loss) | {"targets": losses[c].size} for c, loss in finals.items()}
    own = max(finals) if own_loss is None else None
    result = {
        "status": "finished",
        "strategy": strategy,
        "scale": "cpu",
        "protocol": protocol,
        "seed": 42,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "tokens_per_step": batch_size * seq_len,
        "steps": tokens // (batch_size * seq_len),
        "tokens": tokens,
        "epochs": 0.17,
        "parameters": {"total": 4_985_472, "active": 1_839_744},
        "flops_per_token": 1.2e7,
        "flops": 6.3e12,
        "corpus": "stdlib",
        "fingerprint": "ab12cd34ef56ab12",
        "train_tokens": 2_900_000,
        "unigram_entropy": unigram,
        "seconds": {
            "train": seconds,
            "compile": 9.2,
            "eval": 12.0,
            "checkpoint": 0.4,
            "data": 0.6,
            "total": 95.0,
        },
        "tokens_per_second": tokens / seconds,
        "step_seconds": {
            "median": seconds / 64,
            "p10": 0.95 * seconds / 64,
            "p90": 1.12 * seconds / 64,
        },
        "mfu": None,
        "memory_bytes": {
            "compiled_step": 2e6 * seq_len + 4e8,
            "process_peak": 1.9e9,
            "device_peak": device_peak,
        },
        "train_loss_last": 4.9,
        "eval": {
            "contexts": scores,
            "own": _scores(finals[own] if own else own_loss) | {"context": seq_len},
        },
        "device": "a processor (2 cores)",
        "jax": "0.10.2",
        "date": "2026-11-22",
    }
    _write_curve(folder, finals, tokens, seconds, seed)
    config = {
        "strategy": strategy,
        "scale": "cpu",
        "seed": 42,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "optimizer": {
            "name": "muon",
            "learning_rate": 0.02,
            "adamw_learning_rate": 0.003,
            "schedule": "constant",
        },
        "data": {
            "source": "stdlib",
            "path": "/home/someone/texts",
            "cache_dir": "/home/someone/cache",
            "shuffle_block": 0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    documents = np.arange(NUM_DOCUMENTS, dtype=np.int32).repeat(A_DOCUMENT) % num_documents
    np.savez(
        folder / "heldout_losses.npz",
        document=documents,
        position=np.arange(documents.size) + targets_from,
        **{f"loss_{c}": array for c, array in losses.items()},
    )
    return result


def _scores(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": np.exp(loss), "accuracy": 0.21, "bits_per_byte": loss / 2.6}


def _write_curve(folder: Path, finals: dict[int, float], tokens: int, seconds: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(0, 65):
        share = step / 64
        row = {
            "step": step,
            "tokens": int(tokens * share),
            "flops": 0.0,
            "train_seconds": seconds * share,
        }
        fallen = 3.3 * np.exp(-4.5 * share) - 3.3 * np.exp(-4.5)
        if step:
            row |= {
                "train/loss": finals[24] + fallen + rng.normal(0, 0.05),
                "perf/tokens_per_s": 7000.0,
            }
            lines.append(row)
        if step % 8 == 0:
            scores = {f"eval/loss@{c}": loss + fallen for c, loss in finals.items()}
            lines.append({k: v for k, v in row.items() if "/" not in k} | scores)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def write_study(workdir: Path, **changes: dict) -> None:
    """Three runs of unlike merit. `changes` maps a strategy to arguments of `write_run`."""
    merits = {
        "balanced": {"offset": 0.06, "gain": 0.07, "seconds": 76.0, "seed": 1},
        "long_seq": {"offset": 0.13, "gain": 0.11, "seconds": 126.0, "seed": 2},
        "large_batch": {"offset": 0.0, "gain": 0.04, "seconds": 68.0, "seed": 3},
    }
    for strategy, merit in merits.items():
        write_run(workdir / strategy, strategy, **(merit | changes.get(strategy, {})))


def main() -> int:
    """Stands in for experiments.train. FAKE_EXITS={"balanced": 3} in the environment: fail so."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--workdir", type=Path)
    arguments, overrides = parser.parse_known_args()
    path, scale = arguments.config.split(":")
    strategy, folder = Path(path).stem, arguments.workdir
    folder.mkdir(parents=True, exist_ok=True)
    call = {"scale": scale, "overrides": overrides, "pid": os.getpid(), "parent": os.getppid()}
    call["group"] = os.getpgrp()
    (folder / "call.json").write_text(json.dumps(call))
    if code := json.loads(os.environ.get("FAKE_EXITS", "{}")).get(strategy):
        return code
    if os.environ.get("FAKE_HANGS") == strategy:
        return _hang(folder)
    write_run(folder, strategy)
    print(f"fake run of {strategy}")
    return 0


def _hang(folder: Path) -> int:
    """Waits for signals as a training loop does: saves at the first, and ends."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    (folder / "ready").touch()
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    (folder / "saved.json").write_text(json.dumps(received))
    return int(os.environ.get("FAKE_STOPPED", "130"))


if __name__ == "__main__":
    raise SystemExit(main())
