"""The product of tokens and a weight, [B, T, D] with [D, F], on each shard's own tokens.

Letters: B batch, T sequence, N tokens of a shard, D width in, F width out.
"""

import jax

from research.sharding import HIDDEN, varying, whole


@jax.custom_vjp
def linear(x_ND: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """x @ weight. Own gradient of the weight: x^T d, where autodiff multiplies d^T x and turns the result around. A CPU
    is the slower the wider the operand is that it has to turn."""
    return x_ND @ weight_DF


def _linear_backward(saved, d_NF):
    x_ND, weight_DF = saved
    return d_NF @ weight_DF.T, jax.lax.dot_general(x_ND, d_NF, (((0,), (0,)), ((), ())))


linear.defvjp(lambda x_ND, weight_DF: (linear(x_ND, weight_DF), (x_ND, weight_DF)), _linear_backward)


def project(x_BTD: jax.Array, weight: jax.Array) -> jax.Array:
    """[B, T, F], sharded as x is: P(('data', 'expert'), 'seq').

    weight: `whole` (sharding.gather), [D, F]; D and F may be several axes each. Tokens are one axis in each shard: over
    two, B and T, XLA turns both operands of the weight's gradient around.
    """

    def local(x_BTD, weight):
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        out_NF = linear(x_ND, varying(weight).reshape(x_ND.shape[1], -1))
        return out_NF.reshape(*x_BTD.shape[:2], -1)

    return jax.shard_map(local, in_specs=(HIDDEN, whole()), out_specs=HIDDEN)(x_BTD, weight)
