"""The MoE transformer: embed, blocks, tied head. Pure init and apply; a module holds only its config and parameters.

Letters: B batch, T sequence, D width, H heads, K head width, E experts, F expert hidden, V vocabulary, L layers.
Arrays carry their axes (`hidden_BTD`); activations are sharded P(('data', 'expert'), 'seq'). Every call runs under a
mesh (`with jax.set_mesh(sharding.make_mesh(...))`), on one device too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research import attention, grouped, moe, sharding
from research.dropout import apply, dropout, words
from research.linear import project
from research.remat import KEPT_ONLY


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.model` (see configs/base.py for what each means), and whether parameters are sharded."""

    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    activation: str = "silu"
    tie_embeddings: bool = True
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    init_stddev: float = 0.02
    dropout: float = 0.0
    router_noise: float = 0.0
    balance_weight: float = 0.01
    dtype: str = "float32"
    unroll: int = 1
    remat: str = "none"
    attention: str = "auto"
    attention_chunk: int = 256
    moe: str = "auto"
    moe_block: int = 256
    loss_chunk: int = 1024
    fsdp: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    Own gradient: it keeps x, which the residual stream keeps anyway, and one number a row.
    """
    return _rms_norm_forward(x, scale_D, epsilon)[0]


def _rms_norm_forward(x, scale_D, epsilon):
    y = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * inverse * scale_D).astype(x.dtype), (x, inverse, scale_D)


def _rms_norm_backward(epsilon, saved, d_out):
    x, inverse, scale_D = saved
    unit, d_out = x.astype(jnp.float32) * inverse, d_out.astype(jnp.float32)
    d_unit = d_out * scale_D
    d_x = inverse * (d_unit - unit * jnp.mean(d_unit * unit, axis=-1, keepdims=True))
    return d_x.astype(x.dtype), jnp.sum(d_out * unit, axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def normalize(hidden_BTD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """rms_norm of each shard's own positions."""
    local = lambda x, scale_D: rms_norm(x, sharding.varying(scale_D), epsilon)  # noqa: E731
    run = jax.shard_map(local, in_specs=(sharding.HIDDEN, sharding.whole()), out_specs=sharding.HIDDEN)
    return run(hidden_BTD, sharding.gather(scale_D, jnp.float32))


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x). Own gradient: it keeps x alone, where autodiff keeps the sigmoid as well."""
    return x * jax.nn.sigmoid(x)


def _silu_backward(x, d_out):
    sigmoid = jax.nn.sigmoid(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return ((d_out * sigmoid * (1 + x * (1 - sigmoid))).astype(x.dtype),)


silu.defvjp(lambda x: (silu(x), x), _silu_backward)


def make_expert(activation: str, dropout_rate: float) -> grouped.Expert:
    """down(drop(silu(up x))), or gated: down(drop(silu(gate x) * (up x))) (Shazeer 2020, arXiv:2002.05202)."""

    @jax.named_scope("expert")
    def expert(
        x_MD: jax.Array, weights: dict, multiply: Callable, key: jax.Array | None, share_M: jax.Array | None
    ) -> jax.Array:
        def rest(up_MF: jax.Array, gate_MF: jax.Array | None, down: Any, share_M: jax.Array | None) -> jax.Array:
            hidden_MF = silu(up_MF) if gate_MF is None else silu(gate_MF) * up_MF
            if key is not None:
                hidden_MF = apply(hidden_MF, *words(key, hidden_MF.shape), dropout_rate)
            if share_M is not None:
                hidden_MF = (hidden_MF * share_M[:, None]).astype(hidden_MF.dtype)
            return multiply(hidden_MF, down.mT)

        # The hidden layer is the largest array of a layer: the backward pass makes it again from the products before.
        gate_MF = multiply(x_MD, weights["gate"]) if activation == "swiglu" else None
        rest = jax.checkpoint(rest, prevent_cse=False)
        return rest(multiply(x_MD, weights["up"]), gate_MF, weights["down"], share_M)

    return expert


class Block(nn.Module):
    """Pre-norm attention and experts, each with a residual: hidden [B, T, D] -> (hidden, router sums)."""

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array, rotary: tuple, segments_BT: jax.Array | None):
        c, mix, think = self.config, Block.mix, Block.think
        if c.remat == "full":
            mix, think = nn.remat(mix), nn.remat(think)
        else:  # where memory is slow: what is cheap is computed again, not kept
            again = functools.partial(nn.remat, policy=KEPT_ONLY, prevent_cse=False)
            if sharding.platform() == "cpu" and self.attention_backend(segments_BT) == "chunked":
                mix = again(mix)
            if self.moe_backend() == "blocks":
                think = again(think)
        return think(self, mix(self, hidden_BTD, rotary, segments_BT))

    def mix(self, hidden_BTD: jax.Array, rotary: tuple, segments_BT: jax.Array | None) -> jax.Array:
        c = self.config
        scale_D = self.weight("attention_norm", (c.d_model,), None)
        out_BTD = self.attention(hidden_BTD, scale_D, rotary, segments_BT)
        return hidden_BTD + dropout(out_BTD, c.dropout, self.key("dropout"))

    def think(self, hidden_BTD: jax.Array) -> tuple[jax.Array, dict]:
        c = self.config
        normed = normalize(hidden_BTD, self.weight("moe_norm", (c.d_model,), None), c.norm_epsilon)
        out_BTD, sums = self.experts(normed)
        return hidden_BTD + dropout(out_BTD, c.dropout, self.key("dropout")), sums

    def attention(
        self, hidden_BTD: jax.Array, scale_D: jax.Array, rotary: tuple, segments_BT: jax.Array | None
    ) -> jax.Array:
        c = self.config
        D, H = c.d_model, c.num_heads
        K = D // H
        qkv = self.use(self.weight("qkv", (D, 3, H, K), 0))
        out = self.use(self.weight("attention_out", (H, K, D), 2))

        @functools.partial(jax.checkpoint, prevent_cse=False)  # normalised again in the backward pass, not kept
        def make_qkv(hidden_BTD: jax.Array, scale_D: jax.Array, qkv: jax.Array) -> tuple[jax.Array, ...]:
            return attention.make_qkv(normalize(hidden_BTD, scale_D, c.norm_epsilon), qkv, rotary)

        mixed_BTHK = attention.attend(
            *make_qkv(hidden_BTD, scale_D, qkv),
            backend=self.attention_backend(segments_BT), chunk=c.attention_chunk, segments_BT=segments_BT,
            dropout=c.dropout if self.train else 0.0, key=self.key("dropout"),
        )  # fmt: skip
        return project(mixed_BTHK, out)

    def attention_backend(self, segments_BT: jax.Array | None) -> str:
        c = self.config
        return attention.resolve_backend(
            c.attention, sharding.platform(), dtype=c.dtype, head_dim=c.d_model // c.num_heads,
            dropout=c.dropout if self.train else 0.0, masked=segments_BT is not None,
            seq=jax.sharding.get_abstract_mesh().shape["seq"],
        )  # fmt: skip

    def moe_backend(self) -> str:
        return grouped.resolve_backend(self.config.moe, sharding.platform())

    def experts(self, x_BTD: jax.Array) -> tuple[jax.Array, dict]:
        c = self.config
        D, E, F = c.d_model, c.num_experts, c.d_ff
        router = sharding.gather(self.weight("router", (D, E), 0), jnp.float32)
        names = ("up", "gate") if c.activation == "swiglu" else ("up",)
        weights = {name: self.use(self.weight(name, (E, D, F), 1)) for name in names}
        weights["down"] = self.use(self.weight("down", (E, D, F), 1))
        return moe.moe(
            x_BTD, router, weights, make_expert(c.activation, c.dropout),
            num_chosen=c.experts_per_token,
            backend=self.moe_backend(),
            block=c.moe_block,
            noise=c.router_noise,
            noise_key=self.key("router"),
            dropout_key=self.key("dropout") if c.dropout > 0 else None,
        )  # fmt: skip

    def weight(self, name: str, shape: tuple[int, ...], sharded_dim: int | None) -> jax.Array:
        return parameter(self, name, shape, sharded_dim, self.config)

    def use(self, weight: jax.Array) -> jax.Array:
        return sharding.gather(weight, self.config.dtype)

    def key(self, name: str) -> jax.Array | None:
        return self.make_rng(name) if self.train else None


def parameter(
    module: nn.Module, name: str, shape: tuple[int, ...], sharded_dim: int | None, config: ModelConfig
) -> jax.Array:
    """A float32 parameter born with its sharding: a norm's scale (sharded_dim None) of ones, else N(0, stddev^2)."""
    normal = nn.initializers.normal(config.init_stddev)
    init = nn.initializers.ones if sharded_dim is None else normal
    spec = sharding.shard_dim(len(shape), sharded_dim, config.fsdp)
    return module.param(name, init, shape, jnp.float32, out_sharding=spec)


class MoETransformer(nn.Module):
    """Tokens [B, T] -> (hidden [B, T, D] after the last norm, router statistics of all layers).

    Logits are `hidden @ output_table(params).T`: loss.py computes them a chunk at a time.
    segments: int [B, T], attention stays inside each; positions: int [B, T] (default 0..T-1) for the rotary embedding.
    train: dropout and router noise are on, drawn from the rngs `dropout` and `router`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        table = sharding.gather(parameter(self, "embedding", (c.vocab_size, c.d_model), 1, c), c.dtype)
        if not c.tie_embeddings:
            parameter(self, "head", (c.vocab_size, c.d_model), 1, c)
        with jax.named_scope("embed"):
            hidden_BTD = look_up(table, tokens_BT) * c.d_model**0.5
            hidden_BTD = dropout(hidden_BTD, c.dropout, self.make_rng("dropout") if train else None)
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        rotary = attention.rotary_tables(positions_BT, c.d_model // c.num_heads, c.rope_base)

        layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if c.remat in ("block", "full") else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True, "router": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            unroll=c.unroll,
            check_constancy_invariants=False,  # Flax's check does not know of parameters that are `whole`
        )(c, train, name="layers")
        hidden_BTD, sums = layers(hidden_BTD, rotary, segments_BT)
        scale_D = parameter(self, "final_norm", (c.d_model,), None, c)
        hidden_BTD = normalize(hidden_BTD, scale_D, c.norm_epsilon)
        hidden_BTD = dropout(hidden_BTD, c.dropout, self.make_rng("dropout") if train else None)
        return hidden_BTD, moe.router_statistics(sums, tokens_BT.size)


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of a table [B, T, D]. Its gradient adds up in float32: a common token has thousands of rows in a step, which
    in bfloat16 lose each other."""
    exact = table_VD.astype(jnp.promote_types(table_VD.dtype, jnp.float32))
    return exact.at[tokens_BT].get(out_sharding=sharding.HIDDEN).astype(table_VD.dtype)


def gather_tables(params: Any, dtype: Any) -> Any:
    """The parameters with the embedding, and the head, gathered: the gradients of looking up and of the logits are then
    added up on each device before they are added up over the mesh, once."""
    tables = {name: sharding.gather(params[name], dtype) for name in ("embedding", "head") if name in params}
    return {**params, **tables}


def output_table(params: Any, dtype: Any) -> jax.Array:
    """[V, D], gathered: the head, or the embedding where they are tied."""
    return sharding.gather(params.get("head", params["embedding"]), dtype)
