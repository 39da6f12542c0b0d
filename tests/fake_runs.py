"""Runs that were never run: folders as a real one leaves them, with losses that a test chooses.

The loss of a target is how hard it is (the same for all runs), plus an offset, less a gain for every doubling of the
context, plus the run's own part (of its seed) and noise.
"""

import argparse
import json
import os
import signal
import time
import zlib
from pathlib import Path

import numpy as np

from research.analysis.study import Key

SHAPES = {"balanced": (16, 512), "long_seq": (4, 2048), "large_batch": (64, 128)}
CONTEXTS = (24, 48, 96, 192, 384, 768, 1536)
NUM_DOCUMENTS, A_DOCUMENT = 24, 48  # documents, and targets in each
MERITS = {
    "large_batch": {"offset": 0.0, "gain": 0.02, "step_seconds": 0.66},
    "balanced": {"offset": 0.3, "gain": 0.03, "step_seconds": 0.73},
    "long_seq": {"offset": 0.7, "gain": 0.0, "step_seconds": 1.05},
}
TOKENS, STEPS = 655_360, 80


def shape_of(strategy: str) -> tuple[int, int]:
    """(rows, tokens of a row) of a name in SHAPES, or such as 16x128; of another, some."""
    rows, times, length = strategy.partition("x")
    named = rows.isdecimal() and times and length.isdecimal()
    return (int(rows), int(length)) if named else SHAPES.get(strategy, (8, 1024))


def losses_at(key: Key, offset: float, gain: float, noise: float = 0.2, spread: float = 0.02) -> dict[int, np.ndarray]:
    """Context -> [targets] nats."""
    size = NUM_DOCUMENTS * A_DOCUMENT
    shared = np.random.default_rng(0)
    hard = shared.gamma(4.0, 1.0, size) + shared.normal(0, 0.3, NUM_DOCUMENTS).repeat(A_DOCUMENT)
    own = np.random.default_rng(zlib.crc32(key.name.encode()))
    luck = own.normal(0, spread)
    return {
        c: (hard + offset + luck - gain * np.log2(c / 24) + own.normal(0, noise, size)).astype(np.float32)
        for c in CONTEXTS
    }


def write_run(
    folder: Path,
    key: Key,
    *,
    offset: float = 0.0,
    gain: float = 0.02,
    step_seconds: float = 0.7,
    protocol: str = "clean",
    fingerprint: str = "ab12cd34ef56ab12",
    targets_from: int = 2000,
    memory: float = 4.5e8,
    device_peak: float | None = None,
    noise: float = 0.2,
    spread: float = 0.02,
) -> dict:
    """Writes the folder of a finished run on text and returns its result."""
    folder.mkdir(parents=True, exist_ok=True)
    batch_size, seq_len = shape_of(key.strategy)
    losses = losses_at(key, offset, gain, noise, spread)
    finals = {c: float(loss.mean(dtype=np.float64)) for c, loss in losses.items()}
    scores = {str(c): _scores(loss, c, 5 * c // 4 > seq_len) for c, loss in finals.items()}
    own = _scores(finals[24] + 0.2, seq_len, False)
    result = _result(key, batch_size, seq_len, protocol, fingerprint, step_seconds)
    memory_bytes = dict(compiled_step=memory, process_peak=1.5e9, device_peak=device_peak)
    result |= dict(eval=dict(contexts=scores, own=own), memory_bytes=memory_bytes)
    _write(folder, key, result, shuffle_block=2048 if key.setting == "paired" else 0)
    _write_curve(folder, {c: s["loss"] for c, s in scores.items() if not s["beyond"]}, step_seconds, result["flops"])
    documents = np.arange(NUM_DOCUMENTS, dtype=np.int32).repeat(A_DOCUMENT)
    arrays = {f"loss_{c}": loss for c, loss in losses.items()}
    windows = 2 * 2048 // seq_len
    rng = np.random.default_rng(1)
    places = np.arange(windows * seq_len).reshape(windows, seq_len)
    arrays |= dict(own_document=(places // 600).astype(np.int32), own_place=(places % 600).astype(np.int32))
    arrays["own_loss"] = rng.gamma(4.0, 1.0, places.shape).astype(np.float32)
    np.savez(
        folder / "heldout_losses.npz", document=documents, position=np.arange(documents.size) + targets_from, **arrays
    )
    return result


def write_recall(folder: Path, key: Key, reach: int) -> None:
    """Writes the folder of a finished run on the recall task that is right up to distances of `reach`."""
    folder.mkdir(parents=True, exist_ok=True)
    batch_size, seq_len = SHAPES[key.strategy]
    result = _result(key, batch_size, seq_len, "clean", "re11ca11re11ca11", 0.5)
    scores = {"2048": _scores(2.0, 2048, seq_len < 2048)}
    result |= dict(eval=dict(contexts=scores, window=_scores(2.1, seq_len, False)), memory_bytes={"compiled_step": 1e8})
    _write(folder, key, result, shuffle_block=0)
    _write_curve(folder, {"2048": 2.0}, 0.5, result["flops"])
    rng = np.random.default_rng(zlib.crc32(key.name.encode()))
    distance = (2 ** np.random.default_rng(2).uniform(3, 10, 800)).astype(np.int32)  # targets are those of all runs
    right = (distance <= reach) | (rng.random(800) < 1 / 32)
    arrays = {f"{what}_{suite}": right for suite in ("2048", "window") for what in ("right",)}
    arrays |= {f"loss_{suite}": np.where(right, 0.1, 3.5).astype(np.float32) for suite in ("2048", "window")}
    np.savez(
        folder / "heldout_losses.npz", document=np.arange(800, dtype=np.int32) // 40, position=np.arange(800),
        distance=distance, **arrays,
    )  # fmt: skip


def _result(key: Key, batch_size: int, seq_len: int, protocol: str, fingerprint: str, step_seconds: float) -> dict:
    return {
        "status": "finished", "strategy": key.strategy, "scale": "cpu", "protocol": protocol, "seed": key.seed,
        "batch_size": batch_size, "seq_len": seq_len, "tokens_per_step": batch_size * seq_len, "steps": STEPS,
        "tokens": TOKENS, "epochs": 0.2, "parameters": {"total": 4_985_984, "active": 1_839_744},
        "flops_per_token": 1e7 + 3e3 * seq_len, "flops": TOKENS * (1e7 + 3e3 * seq_len), "corpus": "stdlib",
        "fingerprint": fingerprint, "train_tokens": 2_900_000, "unigram_entropy": 6.6,
        "seconds": {"train": STEPS * step_seconds, "compile": 9.2, "eval": 12.0, "total": 95.0},
        "tokens_per_second": batch_size * seq_len / step_seconds,
        "step_seconds": {"median": step_seconds, "p10": 0.95 * step_seconds, "p90": 1.12 * step_seconds},
        "mfu": None, "train_loss_last": 4.9, "device": "a processor (2 cores)", "jax": "0.10.2", "date": "2026-11-22",
        "overlap": {"50": {"ngrams": 0.004, "documents": 0.01}},
    }  # fmt: skip


def _scores(loss: float, context: int, beyond: bool) -> dict:
    return dict(
        loss=loss, perplexity=float(np.exp(loss)), accuracy=0.21, bits_per_byte=loss / 2.6, targets=1152,
        context=context, beyond=beyond,
    )  # fmt: skip


def _write(folder: Path, key: Key, result: dict, shuffle_block: int) -> None:
    config = {
        "strategy": key.strategy, "scale": "cpu", "seed": key.seed,
        "batch_size": result["batch_size"], "seq_len": result["seq_len"],
        "optimizer": {"name": "muon", "learning_rate": 0.02, "adamw_learning_rate": 0.003, "schedule": "constant"},
        "data": {
            "source": "stdlib", "path": "/home/someone/texts", "cache_dir": "/home/someone/cache",
            "shuffle_block": shuffle_block, "recall": {"num_values": 32},
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))


def _write_curve(folder: Path, finals: dict[str, float], step_seconds: float, flops: float) -> None:
    lines = []
    for step in range(1, STEPS + 1):
        share = step / STEPS
        row = dict(step=step, tokens=int(TOKENS * share), flops=flops * share, train_seconds=1.5 * step * step_seconds)
        fallen = 3.3 * np.exp(-4.5 * share) - 3.3 * np.exp(-4.5)
        lines.append(row | {"train/loss": 4.0 + fallen})
        if step % 10 == 0:
            lines.append(row | {f"eval/loss@{c}": loss + fallen for c, loss in finals.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def write_study(
    workdir: Path, seeds: tuple[int, ...] = (42, 43, 44), settings: tuple[str, ...] = ("independent",), **changes: dict
) -> list[Key]:
    """The runs of three strategies of unlike merit; `changes` maps a strategy to arguments of `write_run`.

    Under paired order half of the offsets is left. Each recalls as far as half its rows.
    """
    keys = []
    for seed in seeds:
        for strategy, merit in MERITS.items():
            for setting in settings:
                if setting == "paired" and strategy == "long_seq":
                    continue
                key = Key(strategy, setting, seed)
                keys.append(key)
                write_any(workdir / key.name, key, **(merit | changes.get(strategy, {})))
    return keys


def write_any(folder: Path, key: Key, **merit) -> None:
    if key.setting == "recall":
        write_recall(folder, key, reach=SHAPES[key.strategy][1] // 2)
    elif key.setting == "paired":
        write_run(folder, key, **(merit | {"offset": 0.35 + merit.get("offset", 0) / 2}))
    else:
        write_run(folder, key, **merit)


def main() -> int:
    """Stands in for experiments.train. FAKE_EXITS={"balanced-independent-42": 3} in the environment: fail so."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--workdir", type=Path)
    arguments, overrides = parser.parse_known_args()
    folder = arguments.workdir
    strategy, setting, seed = folder.name.rsplit("-", 2)
    folder.mkdir(parents=True, exist_ok=True)
    call = {"config": arguments.config, "overrides": overrides, "pid": os.getpid(), "parent": os.getppid()}
    call["group"] = os.getpgrp()
    (folder / "call.json").write_text(json.dumps(call))
    if code := json.loads(os.environ.get("FAKE_EXITS", "{}")).get(folder.name):
        return code
    if os.environ.get("FAKE_HANGS") == folder.name:
        return _hang(folder)
    write_any(folder, Key(strategy, setting, int(seed)), **MERITS[strategy])
    print(f"fake run of {folder.name}")
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
