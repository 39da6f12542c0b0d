"""What compiled programs need, kept on disk: one small file for each (config, target, versions, code).

A program is compiled again whenever anything that it depends on has changed: a field of the model, the optimiser or the
mesh, the batch, the target, the version or flags of a compiler, or a line of the code that it is traced from.
"""

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from importlib import metadata
from pathlib import Path
from typing import Any

from research import heaps
from research.analysis import memory
from research.config import ConfigError, num_steps
from research.data.tokens import cache_root
from research.files import write_text
from research.target import Target

TRACED_BY = ("flax", "optax")  # their code is part of a program, as ours is
KINDS = {"train": memory.train_usage, "eval": memory.eval_usage}
SOURCES = (
    "analysis/hlo",
    "analysis/memory",
    "analysis/scratch",
    "attention",
    "chunked",
    "cores",
    "dropout",
    "evaluate",
    "flash",
    "grouped",
    "heaps",
    "jaxprs",
    "kernels",
    "linear",
    "loss",
    "loss_kernels",
    "model",
    "moe",
    "optimizer",
    "remat",
    "sharding",
    "step",
    "tile_kernels",
    "tiles",
)


@dataclasses.dataclass
class Programs:
    """Usages of programs on one target; `compiled` counts those that were not on disk. `saying` hears of each. After
    `stop` is set no more are compiled, for threads that share it."""

    target: Target
    saying: Callable[[str], None] = lambda text: None
    compiled: int = 0
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    _busy: dict[str, threading.Lock] = dataclasses.field(default_factory=dict)

    def usage(self, config: Any, kind: str = "train") -> memory.Usage:
        """Of the 'train' or 'eval' step of a config.

        Raises: ConfigError as `memory.train_usage` does; CancelledError after `stop`.
        """
        path = cache_root(config) / "memory" / f"{key(config, kind, self.target)}.json"
        with self._busy.setdefault(path.name, threading.Lock()):  # of threads that want one program, one compiles it
            if self.stop.is_set():
                raise CancelledError
            found = _read(path)
            if found is None:
                self.saying(describe(config, kind))
                found = KINDS[kind](config, self.target)
                self.compiled += 1
                _keep(path, found, config)
            return found


def _keep(path: Path, found: memory.Usage, config: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(dataclasses.asdict(found)) + "\n")
    except OSError as error:
        message = f"{path.parent} cannot be written: {error.strerror}"
        raise ConfigError("config.data.cache_dir", config.data.cache_dir, message) from None


def describe(config: Any, kind: str) -> str:
    """A program in a few words, for those who wait for it."""
    if kind == "eval":
        return f"evaluation at length {config.seq_len}"
    about = [f"remat {config.model.remat}", f"attention {config.model.attention}", config.model.dtype]
    about += [f"accumulation {config.train.accumulation}"] * (config.train.accumulation > 1)
    about += [f"mesh {config.mesh.data} x {config.mesh.seq}"] * (config.mesh.data > 1 or config.mesh.seq > 1)
    return f"step of {config.batch_size} x {config.seq_len}, {', '.join(about)}"


def key(config: Any, kind: str, target: Target) -> str:
    """A hash of all that the program of a config depends on."""
    if kind == "eval":
        config = memory.without_remat(config)
    shape = (config.batch_size, config.train.accumulation) if kind == "train" else (config.eval.batch_tokens,)
    fields = dict(
        kind=kind,
        shape=(config.seq_len, *shape),
        model=config.model.to_dict(),
        optimizer=config.optimizer.to_dict(),
        mesh=config.mesh.to_dict(),
        mask_documents=config.data.mask_documents,
        target=(target.name, len(target.devices), target.platform, target.versions, target.compiler_options),
        long=kind == "train" and num_steps(config) >= heaps.LONG,
        traced_by={name: metadata.version(name) for name in TRACED_BY},
        flags=os.environ.get("XLA_FLAGS", ""),
        code=_code(),
    )
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _code() -> str:
    folder = Path(__file__).resolve().parents[1]
    content = b"".join((folder / f"{name}.py").read_bytes() for name in SOURCES)
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> memory.Usage | None:
    """None where there is no such file, or a damaged one: then the program is compiled, and the file written again."""
    try:
        return memory.Usage(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
