"""The same held-out target tokens under several contexts, and a strategy's own length as the original measured it.

A suite is a set of windows: inputs [W, L] and targets [W, L], where -1 is not scored. The suite of context c scores
each target with c to 1.25 c tokens before it inside its document, and holds the same targets for every strategy. Where
its windows are longer than the training length it is `beyond`: the raw model, at rotary positions that it never saw.
(A window that slides sees no more than fits: its loss there is that of the longest context that is not beyond.)
The suite `own` scores every position of windows of the training length, so short lengths are charged for the little
context of their first tokens. The recall task has suites of its own (data/synthetic.py).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from research import loss, sharding
from research.data import heldout, synthetic
from research.data.tokens import Corpus
from research.model import MoETransformer, output_table

COMPILERS = 8  # at a time


@dataclasses.dataclass(frozen=True)
class Suite:
    """Batches of windows of one shape: every array is [batches, rows, L]; `context` in tokens.

    `beyond`: the windows are longer than the training length, and are scored at the end of a run only.
    """

    context: int
    batches: dict[str, np.ndarray]
    beyond: bool = False


def make_suites(corpus: Corpus, config: Any, mesh_shape: tuple[int, int, int]) -> dict[str, Suite]:
    """Suites by name: each context of config.eval.contexts, and `own`; for the recall task those of recall_windows.

    Raises: ConfigError where the held-out documents hold too few targets.
    """
    if corpus.heldout_scored is not None:
        windows = synthetic.recall_windows(corpus, config)
    else:
        targets = heldout.targets(corpus, config)
        windows = {str(c): (c, heldout.context_windows(targets, corpus, c)) for c in config.eval.contexts}
        windows["own"] = (config.seq_len, heldout.own_length_windows(corpus, config))
    return {
        name: Suite(context, _in_batches(arrays, config, mesh_shape), arrays["inputs"].shape[1] > config.seq_len)
        for name, (context, arrays) in windows.items()
    }


def _in_batches(arrays: dict[str, np.ndarray], config: Any, mesh_shape: tuple[int, int, int]) -> dict:
    """Pad rows to whole batches and positions to whole shards; what is added is not scored."""
    windows, length = arrays["inputs"].shape
    data, _, seq = mesh_shape
    rows = max(1, config.eval.batch_tokens // length // data) * data
    rows = min(rows, math.ceil(windows / data) * data)
    batches = math.ceil(windows / rows)
    padding = ((0, batches * rows - windows), (0, -length % seq))

    def shape(name: str, x: np.ndarray) -> np.ndarray:
        x = np.pad(x, padding, constant_values=-1 if name == "targets" else 0)
        return x.reshape(batches, rows, -1)

    return {name: shape(name, x) for name, x in arrays.items()}


def eval_step(model: MoETransformer, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(-log p [B, T] in nats, predicted right [B, T]) of a batch's targets; 0 and False where a target is -1."""
    hidden_BTD, _ = model.apply(
        {"params": params},
        batch["inputs"],
        segments_BT=batch.get("segments"),
        positions_BT=batch.get("positions"),
    )
    table_VD = output_table(params, hidden_BTD.dtype)
    return loss.token_losses(hidden_BTD, table_VD, batch["targets"], model.config.loss_chunk)


def compile_suites(model: MoETransformer, params: Any, suites: dict[str, Suite], mesh: Any) -> dict:
    """The compiled evaluation step of each suite; an accelerator's compiler, which uses one core, several at a time."""
    step = jax.jit(eval_step, static_argnums=0)
    lowered = {}
    for name, suite in suites.items():
        first = sharding.put_batch({k: x[0] for k, x in suite.batches.items()}, mesh)
        lowered[name] = step.lower(model, params, first)
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else COMPILERS) as threads:
        return dict(zip(lowered, threads.map(lambda x: x.compile(), lowered.values()), strict=True))


def score(
    compiled: Any, params: Any, suite: Suite, mesh: Any, stop: Callable[[], bool] = lambda: False
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(-log p, right, target id) of every scored target, in the order of the windows; None when `stop` said so."""
    parts = []
    for batch in _rows(suite):
        if stop():
            return None
        nll, right = compiled(params, sharding.put_batch(batch, mesh))
        scored = batch["targets"] >= 0
        parts.append((_host(nll)[scored], _host(right)[scored], batch["targets"][scored]))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _rows(suite: Suite) -> Iterator[dict[str, np.ndarray]]:
    for i in range(len(suite.batches["inputs"])):
        yield {name: x[i] for name, x in suite.batches.items()}


def _host(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
