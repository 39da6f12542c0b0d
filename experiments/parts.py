"""The parts of a training step, each compiled alone and timed: forward and backward from a random cotangent, and the
optimiser.

Their sum is not the step: in it, parts also add to the residual stream and keep arrays for the backward pass, they
fuse, one's arrays are in the cache for the next, and gradients are added up over devices once; here in each part that
has weights. Of every part there are the FLOPs of its matrix products, as written, and its compulsory bytes: what goes
in and what comes out, once (contestants.compulsory_bytes). `machine.roofline` sets its time beside both.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.contestants import compulsory_bytes, seconds_of
from research import attention, cores, grouped, heaps, loss, moe, sharding
from research.analysis import compute
from research.config import num_steps
from research.linear import project
from research.model import ModelConfig, MoETransformer, look_up, make_expert, rms_norm
from research.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Part:
    """`run(*arguments)` happens `times` a step (once a layer, or once). `counted`: what has the same products without
    loops whose length is not known, if `run` has such."""

    name: str
    times: int
    run: Callable
    arguments: tuple
    counted: Callable | None = None

    def flops(self) -> int:
        """Of its matrix products, as traced on one device; all that a step spends on this part."""
        return self.times * compute.count(jax.jit(self.counted or self.run).trace(*self.arguments).jaxpr.jaxpr)

    def compiled(self, short: bool = False) -> Any:
        """As the step of a short or a long run is (contestants.build_ours)."""
        return heaps.compiled(jax.jit(self.run).trace(*self.arguments), 1 if short else math.inf)


def measure(config: ConfigDict, repeats: int, short: bool = False) -> list[dict[str, Any]]:
    """A row for each part, on the mesh of the step, of all that a step spends on it: `seconds` (median, p10, p90 of
    `repeats`), `flops` and `compulsory_bytes` of all devices."""
    rows = []
    with jax.set_mesh(sharding.make_mesh({"data": 1, "expert": 1, "seq": 1}, jax.devices()[:1])):
        flops = {part.name: part.flops() for part in parts_of(config)}
    mesh = sharding.make_mesh(config.mesh, cores.devices_of(config))
    with jax.set_mesh(mesh):
        for part in parts_of(config):
            compiled = part.compiled(short)
            jax.block_until_ready(compiled(*part.arguments))
            taken = [
                part.times * seconds_of(lambda: jax.block_until_ready(compiled(*part.arguments)))[0]  # noqa: B023
                for _ in range(repeats)
            ]
            p10, median, p90 = np.percentile(taken, (10, 50, 90)).tolist()
            moved = compulsory_bytes(compiled, mesh.size)
            rows.append(
                dict(
                    part=part.name,
                    seconds=dict(p10=p10, median=median, p90=p90),
                    flops=flops[part.name],
                    compulsory_bytes=None if moved is None else part.times * moved,
                )
            )
    return rows


def with_gradients(function: Callable) -> Callable:
    """(cotangent, *arguments) -> the result and the gradients of all arguments; integers have none. (What is not a
    result is not computed: without its own, most of the forward pass is left out.)"""

    def run(cotangent: Any, *arguments: Any) -> Any:
        out, backward = jax.vjp(function, *arguments)
        return out, [g for g in jax.tree.leaves(backward(cotangent)) if g.dtype != jax.dtypes.float0]

    return run


def parts_of(config: ConfigDict) -> list[Part]:
    """The parts of a step of `config`, on random arrays; call it under a mesh that divides its rows.

    Routing is random, so the experts' loads are even but for chance.
    """
    c = ModelConfig(**config.model)
    B, T, D = config.batch_size, config.seq_len, c.d_model
    keys = iter(jax.random.split(jax.random.key(config.seed), 40))

    def draw(*shape: int, spec: Any = None, dtype: Any = c.dtype, scale: float = 1.0) -> jax.Array:
        x = (scale * jax.random.normal(next(keys), shape)).astype(dtype)
        return jax.reshard(x, spec) if spec is not None else x

    hidden, d_hidden = (draw(B, T, D, spec=sharding.HIDDEN) for _ in range(2))
    tokens = jax.reshard(jax.random.randint(next(keys), (B, T), 0, c.vocab_size), sharding.TOKENS)
    return [
        _embedding(c, tokens, d_hidden, draw),
        *_attention(c, hidden, d_hidden, draw),
        *_experts(c, hidden, d_hidden, draw),
        _head(c, hidden, tokens, draw),
        _optimizer(config),
    ]


def _embedding(c: ModelConfig, tokens_BT: jax.Array, d_hidden: jax.Array, draw: Callable) -> Part:
    def embed(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return look_up(sharding.gather(table_VD, c.dtype), tokens_BT) * c.d_model**0.5

    return Part("embedding", 1, with_gradients(embed), (d_hidden, draw(c.vocab_size, c.d_model), tokens_BT))


def _attention(c: ModelConfig, hidden: jax.Array, d_hidden: jax.Array, draw: Callable) -> list[Part]:
    """The products of Q, K, V and the output with the norm and the rotation, and attention itself."""
    B, T, D = hidden.shape
    H, K = c.num_heads, c.d_model // c.num_heads
    rotary = attention.rotary_tables(jnp.arange(T)[None], K, c.rope_base)

    def projections(x_BTD: jax.Array, scale_D: jax.Array, qkv: jax.Array, out: jax.Array) -> jax.Array:
        qkv, out = (sharding.gather(w, w.dtype) for w in (qkv, out))
        q, k, v = attention.make_qkv(rms_norm(x_BTD, scale_D, c.norm_epsilon), qkv, rotary)
        return project((q + k + v).reshape(B, T, D), out)

    backend = attention.resolve_backend(
        c.attention, sharding.platform(), dtype=c.dtype, head_dim=K, dropout=c.dropout, masked=False, seq=1
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        key = jax.random.key(0) if c.dropout else None
        return attention.attend(q, k, v, backend=backend, chunk=c.attention_chunk, dropout=c.dropout, key=key)

    heads = sharding.P(*sharding.TOKENS, None, None)
    weights = draw(D, dtype=jnp.float32), draw(D, 3, H, K, scale=D**-0.5), draw(H, K, D, scale=D**-0.5)
    qkv = tuple(draw(B, T, H, K, spec=heads) for _ in range(3))
    return [
        Part("projections of attention", c.num_layers, with_gradients(projections), (d_hidden, hidden, *weights)),
        Part("attention", c.num_layers, with_gradients(attend), (draw(B, T, H, K, spec=heads), *qkv)),
    ]


def _experts(c: ModelConfig, hidden: jax.Array, d_hidden: jax.Array, draw: Callable) -> list[Part]:
    """Routing with experts that do nothing, and the experts on rows that are sorted already."""
    B, T, D = hidden.shape
    E, F, M = c.num_experts, c.d_ff, B * T * c.experts_per_token
    backend = grouped.resolve_backend(c.moe, sharding.platform())

    def route(x_BTD: jax.Array, scale_D: jax.Array, router_DE: jax.Array) -> jax.Array:
        router_DE = sharding.gather(router_DE, router_DE.dtype)
        out, _ = moe.moe(
            rms_norm(x_BTD, scale_D, c.norm_epsilon), router_DE, {}, lambda x, weights, multiply, key, share: x,
            num_chosen=c.experts_per_token, backend="ragged", block=c.moe_block,
        )  # fmt: skip
        return out

    def experts(x_MD: jax.Array, share_M: jax.Array, weights: Any, sizes_E: jax.Array, *, backend: str) -> jax.Array:
        expert = make_expert(c.activation, 0.0)

        def local(x: jax.Array, share: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
            share = share if backend == "blocks" else None  # the others' is in combining
            return grouped.apply_experts(expert, x, sharding.varying(w), sharding.varying(sizes), share,
                                         backend=backend, block=c.moe_block)  # fmt: skip

        rows, weights = (
            sharding.P((*sharding.BATCH, "seq")),
            jax.tree.map(lambda w: sharding.gather(w, w.dtype), weights),
        )
        run = jax.shard_map(local, in_specs=(rows, rows, sharding.whole(), sharding.P()), out_specs=rows)
        return run(x_MD, share_M, weights, sizes_E)

    own = M // jax.sharding.get_abstract_mesh().size  # rows of a device
    sizes_E = jnp.full(E, own // E, jnp.int32)
    sizes_E = sizes_E.at[0].add(own - own // E * E)
    rows = sharding.P((*sharding.BATCH, "seq"))
    names = ("up", "gate") if c.activation == "swiglu" else ("up",)
    weights = {name: draw(E, D, F, scale=D**-0.5) for name in names} | {"down": draw(E, D, F, scale=F**-0.5)}
    share = jax.nn.sigmoid(draw(M, spec=rows, dtype=jnp.float32))
    arguments = (draw(M, D, spec=rows), draw(M, D, spec=rows), share, weights, sizes_E)

    def run(backend: str) -> Callable:
        return with_gradients(functools.partial(experts, backend=backend))

    routed = (d_hidden, hidden, draw(D, dtype=jnp.float32), draw(D, E, dtype=jnp.float32))
    return [
        Part("router and dispatch", c.num_layers, with_gradients(route), routed),
        Part("experts", c.num_layers, run(backend), arguments, counted=run("ragged")),
    ]


def _head(c: ModelConfig, hidden: jax.Array, tokens: jax.Array, draw: Callable) -> Part:
    def head(x_BTD: jax.Array, scale_D: jax.Array, table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
        table_VD = sharding.gather(table_VD, table_VD.dtype)
        return loss.cross_entropy_sums(rms_norm(x_BTD, scale_D, c.norm_epsilon), table_VD, tokens, c.loss_chunk)[0]

    scale, table = draw(c.d_model, dtype=jnp.float32), draw(c.vocab_size, c.d_model, scale=0.02)
    return Part("head and loss", 1, with_gradients(head), (jnp.ones(()), hidden, scale, table, tokens))


def _optimizer(config: ConfigDict) -> Part:
    """Clipping, Muon and AdamW, on gradients of the parameters' scale."""
    transform = make_optimizer(config.optimizer, num_steps(config))
    model = MoETransformer(ModelConfig(**config.model))
    mesh = jax.sharding.get_abstract_mesh()
    tokens = jnp.zeros((mesh.shape["data"], mesh.shape["seq"]), jnp.int32, out_sharding=sharding.TOKENS)
    params = jax.jit(lambda: model.init(jax.random.key(config.seed), tokens)["params"])()
    state = jax.jit(transform.init)(params)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Part("optimizer", 1, update, (params, state, params))
