"""Orbax behind a few functions: save, restore the newest that is whole, and claim a folder for one run.

Saving is asynchronous: the arrays are copied off the device before `save` returns, and written in the background. A
step counts once Orbax has renamed its folder; a kill in between leaves the steps before it. Each step holds a checksum
of every array and of its metadata, so that what is damaged on disk later (cut off, missing, or changed; all but words
that swapped places) is skipped, not trained on.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from research.config import ConfigError, differences

log = logging.getLogger(__name__)


class DamagedError(RuntimeError):
    """There are checkpoints, and none of them can be read."""


def open_manager(workdir: str, keep_last: int, keep_best: bool) -> ocp.CheckpointManager:
    """The checkpoints of a run: the last `keep_last` are kept, and the one with the lowest held-out loss."""
    policies = [LatestN(n=keep_last)]
    if keep_best:
        policies.append(BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies),
        best_fn=_rank,  # without it metrics are dropped, and a resumed run has forgotten its best
    )
    folder = Path(workdir).absolute() / "checkpoints"
    _forget_damaged_losses(folder)
    return ocp.CheckpointManager(folder, options=options)


def _forget_damaged_losses(folder: Path) -> None:
    """Removes the held-out losses that cannot be read, which Orbax would not open the folder with."""
    for path in folder.glob("*/metrics/metrics"):
        try:
            _rank(json.loads(path.read_bytes()))
        except (ValueError, KeyError, TypeError):
            log.warning("the held-out loss in %s is damaged; it is not among the best", path)
            path.unlink(missing_ok=True)


def _rank(metrics: dict[str, float | None]) -> float:
    """Higher is better; a loss that was not measured, or is not a number, is worse than any."""
    loss = metrics["heldout_loss"]
    return -math.inf if loss is None else -loss


def save(manager: ocp.CheckpointManager, step: int, state: Any, meta: dict[str, Any], metric: float | None) -> None:
    """Starts to save `state` (a pytree of arrays) and `meta` (JSON); a step that is there already is left.

    metric: the held-out loss, lower is better; None where it was not measured. `state` may be donated afterwards.
    """
    if step in manager.all_steps():
        return
    content = dict(meta, checksums=_checksums(state), shapes=_shapes(state))
    content["checksum"] = _json_checksum(content)
    measured = metric is not None and not math.isnan(metric)
    manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(content)),
        metrics={"heldout_loss": float(metric) if measured else None},
        force=True,
    )


def restore(manager: ocp.CheckpointManager, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
    """(state, meta) of the newest checkpoint that is whole; None where there is none.

    abstract_state: pytree of jax.ShapeDtypeStruct with the shardings wanted, of any mesh (`abstract`). A damaged
    checkpoint is set aside as <step>.damaged, with a warning, and the one before is taken.
    Raises: DamagedError where there are checkpoints and none can be read (they stay where they are); ConfigError where
    one is whole, and of another model or optimiser.
    """
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            restored = _restore(manager, step, abstract_state)
        except Exception as error:  # whatever a damaged file makes the readers raise
            _refuse_unlike(manager, step, abstract_state)
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            log.warning("checkpoint of step %d is damaged and skipped: %s", step, reason)
            damaged.append(step)
            continue
        for other in damaged:
            _set_aside(manager, other)
        return restored
    if damaged:
        raise DamagedError(f"no checkpoint in {manager.directory} can be read; choose another --workdir to start anew")
    return None


def _refuse_unlike(manager: ocp.CheckpointManager, step: int, abstract_state: Any) -> None:
    """Raises: ConfigError where a checkpoint says that its arrays have other names or shapes than the state's."""
    try:
        meta = dict(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
        if meta.pop("checksum") != _json_checksum(meta):
            return
        saved = {name: tuple(shape) for name, shape in meta["shapes"].items()}
    except Exception:  # damaged, then
        return
    wanted = _shapes(abstract_state)
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            here, there = (f"is {shapes[name]}" if name in shapes else "is not" for shapes in (wanted, saved))
            message = f"its checkpoints are of another model or optimiser: {name} {there} in them, {here} in this code"
            folder = Path(manager.directory).parent
            raise ConfigError("--workdir", str(folder), f"{message}; choose another folder")


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _restore(manager: ocp.CheckpointManager, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
    found = manager.restore(step, args=args)
    state, meta = found["state"], dict(found["meta"])
    if meta.pop("checksum") != _json_checksum(meta):
        raise ValueError("the metadata is not what was saved")
    wanted, _ = meta.pop("checksums"), meta.pop("shapes", None)
    wrong = [name for name, value in _checksums(state).items() if wanted.get(name) != value]
    if wrong:
        raise ValueError(f"array {wrong[0]} is not what was saved")
    return state, meta


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    folder = Path(manager.directory) / str(step)
    target = folder.with_name(f"{step}.damaged")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{step}.damaged{number}")
    if jax.process_index() == 0:
        os.replace(folder, target)
    manager.reload()


def _checksums(state: Any) -> dict[str, int]:
    """Of each array by its path: the sum of its bits as 32-bit words (mod 2^32), on the devices that hold it."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(state), strict=True)
    sums = _bit_sums(list(leaves))
    return {jax.tree_util.keystr(path): int(value) for path, value in zip(paths, sums, strict=True)}


@jax.jit
def _bit_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    leaves = [x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x for x in leaves]
    bits = [jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]) for x in leaves]
    return [jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32) for x in bits]


def _json_checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def abstract(init: Callable[[], Any], mesh: Mesh) -> Any:
    """Shapes, types and shardings on `mesh` of what `init()` returns, computing nothing. Call under the mesh."""

    def bind(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(bind, jax.eval_shape(init))


@contextlib.contextmanager
def claim_workdir(workdir: str, config: dict[str, Any], fingerprint: str) -> Iterator[None]:
    """Holds a folder for one run of one config and corpus; writes config.json the first time.

    Raises: ConfigError where the folder cannot be written, another process is running in it, or it is the folder of
    another config or corpus (the first field that differs is named).
    """
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (held until the run ends)
    except OSError as error:
        raise ConfigError("--workdir", workdir, f"cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("--workdir", workdir, "another process is running in it") from None
        _claim(folder, config, fingerprint)
        yield


def _claim(folder: Path, config: dict[str, Any], fingerprint: str) -> None:
    path = folder / "config.json"
    if path.exists():
        refuse_another(folder, config, fingerprint)
        return
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(dict(config, fingerprint=fingerprint), indent=1) + "\n")
    os.replace(new, path)


def refuse_another(folder: Path, config: dict[str, Any], fingerprint: str) -> None:
    """Raises: ConfigError where a folder's config.json is of another config, or on another corpus."""
    try:
        before = json.loads((folder / "config.json").read_text())
        corpus = before.pop("fingerprint")
    except (ValueError, KeyError, TypeError, AttributeError):
        message = "its config.json is damaged or not a run's; choose another folder"
        raise ConfigError("--workdir", str(folder), message) from None
    for field, (old, new) in differences(before, json.loads(json.dumps(config))):
        raise ConfigError(f"config.{field}", new, f"{folder} holds a run with {old!r}; choose another --workdir")
    if corpus != fingerprint:  # by the same fields: a text or a tokenizer's file has changed since
        raise ConfigError("--workdir", str(folder), "holds a run on another corpus; choose another folder")
