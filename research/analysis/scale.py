"""A step on many devices, on paper: what each computes and sends, and the least time that takes on a machine.

What is sent is read from the program that is compiled for as many simulated devices (collectives.py); what is computed
is counted in the traced step (compute.py). Floors: every product at the machine's peak, every byte at its bandwidth.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from research.analysis import compute, memory
from research.analysis.collectives import Collective, collectives
from research.analysis.frontier import with_fields
from research.config import ConfigError
from research.optimizer import make_schedule, newton_schulz_share
from research.step import make_train_step
from research.target import Target

SPENT_ON = ("gradients", "keys and values", "optimizer")
# What has two bytes on an accelerator has two here too: the CPU's compiler would send bfloat16 as float32.
TWO_BYTES = {"bfloat16": "float16"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """`flops` a second of a device in bfloat16, `flops32` of float32 operands at JAX's default precision; bytes that
    one sends a second: `near`, to the others of its node of `node` devices, and `far`, to other nodes."""

    name: str
    flops: float
    flops32: float
    near: float
    far: float
    node: int

    def seconds(self, collective: Collective) -> float:
        """At least. Across nodes: within each first, then a device of each with its like, each by a way of its own."""
        blocks = [number // self.node for number in collective.group]
        counts = [blocks.count(block) for block in set(blocks)]  # a node that is not full has fewer ways out
        nodes, fewest, most = len(counts), min(counts), max(counts)
        near = (most - 1) / most / self.near
        far = (nodes - 1) / nodes / fewest / self.far
        return collective.times * collective.passes * collective.bytes * (near + far)


MACHINES = (
    # NVIDIA's data sheets of the H200 SXM and the DGX H200: NVLink 900 GB/s and NDR 400 Gb/s a GPU, both ways together
    # and each way. Float32 operands go through TensorFloat-32 there, at half the rate.
    Machine("H200, nodes of 8", 989e12, 494.5e12, 450e9, 50e9, 8),
    # Google Cloud's page of the TPU v5p: links of 1,200 GB/s a chip, both ways together; all chips in one torus.
    # Float32 operands are multiplied as bfloat16.
    Machine("TPU v5p", 459e12, 459e12, 600e9, 600e9, 1 << 20),
)


def plan(config: Any, target: Target, tokens: int, mesh: tuple[int, int]) -> dict[str, Any]:
    """A step of `tokens` tokens in rows of the config's length, over (data, seq) devices: a row of the table.

    Raises: ConfigError where rows or positions cannot be divided so.
    """
    data, seq = mesh
    rows = tokens // config.seq_len
    if tokens % config.seq_len or rows % data:
        raise ConfigError("--tokens", tokens, f"not divisible into rows of {config.seq_len} on {data} devices each")
    fields = {"batch_size": rows, "mesh.data": data, "mesh.expert": 1, "mesh.seq": seq, "mesh.fsdp": False}
    fields |= {"train.accumulation": 1, "model.unroll": 1}  # `spent_on` tells layers by their loop
    if config.model.num_layers == 1:
        raise ConfigError("config.model.num_layers", 1, "give 2 or more: what a layer sends is told by their loop")
    dtype = TWO_BYTES.get(config.model.dtype, config.model.dtype)
    config = with_fields(config, fields)
    devices = data * seq
    total = compute.train_flops(with_fields(config, {"batch_size": 1}), target)
    optimizer = 2 * total - compute.train_flops(with_fields(config, {"batch_size": 2}), target)
    found, share = _compile(with_fields(config, {"model.dtype": dtype}), target)
    sent = dict.fromkeys(SPENT_ON, 0.0)
    for collective in found:
        sent[spent_on(collective)] += collective.sent
    flops = dict(model=(total - optimizer) * rows / devices, optimizer=optimizer * share)
    floors = {
        machine.name: dict(
            compute=flops["model"] / machine.flops + flops["optimizer"] / machine.flops32,
            send=sum(machine.seconds(collective) for collective in found),
        )
        for machine in MACHINES
    }
    return dict(strategy=config.strategy, seq_len=config.seq_len, rows=rows, devices=devices, data=data, seq=seq,
                flops=flops, sent=sent, floors=floors)  # fmt: skip


def spent_on(collective: Collective) -> str:
    """One of SPENT_ON: gradients are reduced, keys and values move once a layer, matrices are gathered once a step."""
    if collective.kind == "all-reduce":
        return "gradients"
    return "keys and values" if collective.times > 1 else "optimizer"


def _compile(config: Any, target: Target) -> tuple[list[Collective], float]:
    """The collectives of a step, and the share of the orthogonalisation that each device does."""
    mesh = memory.mesh_of(config, target)
    with jax.set_mesh(mesh):
        model, optimizer, state = memory.abstract_state(config, mesh)
        schedule = make_schedule(config.optimizer, config.optimizer.learning_rate, memory.STEPS)
        batch = memory.abstract_batch(config, mesh, config.batch_size, config.seq_len, 1)
        lowered = make_train_step(model, optimizer, schedule).lower(state, batch)
        share = newton_schulz_share(state.params) if config.optimizer.name == "muon" else 0.0
    text = lowered.compile(compiler_options=target.compiler_options or None).as_text()
    return collectives(text, tuple(mesh.shape.values())), share


def meshes(devices: int, config: Any, tokens: int, seqs: Sequence[int]) -> list[tuple[int, int]]:
    """The (data, seq) of `devices` that can hold the rows and the positions of a step."""
    rows = tokens // config.seq_len
    return [
        (devices // seq, seq)
        for seq in seqs
        if devices % seq == 0 and rows % (devices // seq) == 0 and config.seq_len % seq == 0
    ]


def best(rows: Sequence[dict[str, Any]], machine: str) -> dict[str, Any]:
    """Of rows of one strategy and number of devices: that with the lowest floor of computing and sending in turn."""
    return min(rows, key=lambda row: math.fsum(row["floors"][machine].values()))
