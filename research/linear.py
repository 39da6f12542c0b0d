"""The product of tokens and a weight, [B, T, D] with [D, F], on each shard's own tokens.

Letters: B batch, T sequence, N tokens of a shard, D width in, F width out.
"""

import math

import jax

from research.sharding import HIDDEN, TOKENS, varying, whole


@jax.custom_vjp
def linear(x: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """[N, F]: x @ weight of x [B, T, ...], whose other axes make up D.

    Own gradient of the weight: x^T d, where autodiff multiplies d^T x and turns the result around. A CPU is the slower
    the wider the operand is that it has to turn. x is kept in its own shape: who made it may keep it too, and one is
    enough.
    """
    return _rows(x) @ weight_DF


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0] * x.shape[1], -1)


def _linear_backward(saved, d_NF):
    x, weight_DF = saved
    d_weight_DF = jax.lax.dot_general(_rows(x), d_NF, (((0,), (0,)), ((), ())))
    return (d_NF @ weight_DF.T).reshape(x.shape), d_weight_DF


linear.defvjp(lambda x, weight_DF: (linear(x, weight_DF), (x, weight_DF)), _linear_backward)


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """[B, T, F], sharded as x is: P(('data', 'expert'), 'seq').

    x: [B, T, D], weight: `whole` (sharding.gather), [D, F]; D and F may be several axes each. Tokens are one axis in
    each shard: over two, B and T, XLA turns both operands of the weight's gradient around.
    """

    def local(x, weight):
        width = math.prod(x.shape[2:])
        return linear(x, varying(weight).reshape(width, -1)).reshape(*x.shape[:2], -1)

    return jax.shard_map(local, in_specs=(TOKENS, whole()), out_specs=HIDDEN)(x, weight)
