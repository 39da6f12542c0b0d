"""The peers that the benchmark times beside ours, in PyTorch: the original, the same compiled, and Mixtral.

On a GPU their products in float32 may use TF32, as XLA's do. Where config.model.dtype is bfloat16, forward and loss run
under torch.autocast, as the original's did, on parameters that stay float32, and Muon iterates in bfloat16.
PyTorch is imported where it is used: a process that is not a peer's does without.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from experiments.batch import random_batch
from research import process
from research.config import ConfigError, num_steps

# Steps before any is timed: kernels are chosen in the first, and torch.compile compiles again when the numbers of an
# expert's rows first differ.
WARM_UP = {"compiled": 5}


def build_original(config: ConfigDict, device: str, compiled: bool = False) -> tuple[Callable, Callable]:
    """A step of the PyTorch original, eager or with its model compiled by torch.compile."""
    torch = prepare(device, config.seed)
    from tests.parity.original import Original, Trainer

    def make() -> Any:
        model = Original(config.model).train().to(device)
        if compiled:
            torch.compiler.config.force_disable_caches = True  # ours is compiled anew too
            model.compile()
        return Trainer(model, config.optimizer, num_steps(config), *_types(torch, config))

    return _step(config, device, make)


def build_mixtral(config: ConfigDict, device: str) -> tuple[Callable, Callable]:
    """A step of transformers' Mixtral, at the same dimensions."""
    torch = prepare(device, config.seed)
    from tests.parity import mixtral

    def make() -> Any:
        model = mixtral.build(config.model, config.seq_len).train().to(device)
        return mixtral.Trainer(model, config.optimizer, *_types(torch, config))

    return _step(config, device, make)


BUILDERS = {
    "original": build_original,
    "compiled": functools.partial(build_original, compiled=True),
    "mixtral": build_mixtral,
}


def prepare(device: str, seed: int = 0) -> Any:
    """PyTorch, set up for a device, 'cpu' or 'cuda'. Raises: ConfigError where it has no such.

    Its threads are as many as it takes by itself: a core's second hyperthread, or a core that this process may not use,
    would make it slower.
    """
    import torch

    torch.manual_seed(seed)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--implementations", "peers", "JAX has a GPU, PyTorch none; install its CUDA or use ours")
        torch.set_float32_matmul_precision("high")
    return torch


def release() -> None:
    """Give the GPU back what peers have held, and forget what was compiled: other shapes are to be compiled for afresh,
    not for any shape."""
    import torch

    torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _types(torch: Any, config: ConfigDict) -> tuple[Any, Any]:
    """(Muon's type, autocast's or None)."""
    half = config.model.dtype == "bfloat16"
    return (torch.bfloat16, torch.bfloat16) if half else (torch.float32, None)


def _step(config: ConfigDict, device: str, make: Callable[[], Any]) -> tuple[Callable, Callable]:
    """(step, facts) of the trainer that `make` makes. All that it needs is imported by now.

    facts: `first_step_seconds`, in which torch.compile compiles. On a CPU `process_peak_bytes`: the most that the
    process has held, compilation included, less what it held before the model was made. On a GPU `device_peak_bytes`.
    """
    import torch

    on_gpu = device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else process.peak_bytes()
    trainer = make()
    batch = random_batch(config)
    tensors = tuple(torch.tensor(batch[k], dtype=torch.int64, device=device) for k in ("inputs", "targets"))
    first_step_seconds = None

    def take() -> float:
        nonlocal first_step_seconds
        began = time.perf_counter()
        loss = trainer.step(tensors, config.model.balance_weight)
        if on_gpu:
            torch.cuda.synchronize()
        first_step_seconds = first_step_seconds or time.perf_counter() - began
        return loss

    if on_gpu:
        take()  # until now its optimiser held nothing
    held = torch.cuda.memory_allocated() - before if on_gpu else 0

    def facts() -> dict[str, Any]:
        found = environment() | dict(device=device, first_step_seconds=first_step_seconds)
        if not on_gpu:
            return found | dict(process_peak_bytes=process.peak_bytes() - before)
        # Of one more step; the others' arrays, which are there too, are not its own.
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - held
        take()
        return found | dict(device_peak_bytes=torch.cuda.max_memory_allocated() - others)

    return take, facts


def environment() -> dict[str, Any]:
    """Of the process that peers run in: PyTorch's version, its `threads`, and how they wait for work."""
    import torch

    threads, wait_policy = torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY")
    return dict(torch=torch.__version__, threads=threads, wait_policy=wait_policy)
