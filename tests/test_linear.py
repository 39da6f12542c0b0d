"""The product of tokens and a weight against an einsum in float64: values and gradients, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.linear import project
from tests.small import placed


@pytest.mark.parametrize("sizes", [(1, 1), (8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize(
    ("shape", "product"), [((12, 5), "btd,df->btf"), ((12, 3, 2, 4), "btd,dihk->btihk"), ((3, 4, 5), "bthk,hkf->btf")]
)
def test_it_is_an_einsum_whatever_the_mesh(rng, sizes, shape, product):
    x, weight = rng.standard_normal((8, 16, 12)), rng.standard_normal(shape)
    cotangent = rng.standard_normal((8, 16, weight.size // 12))

    def plain(x, weight):
        x = x.reshape(8, 16, *shape[:2]) if product.startswith("bthk") else x
        return jnp.einsum(product, x, weight).reshape(cotangent.shape)

    def ours(x, weight):
        return project(x, sharding.gather(weight, weight.dtype))

    def outcome(run, x, weight, cotangent):
        out, vjp = jax.vjp(run, x, weight)
        return out, *vjp(cotangent)

    with jax.enable_x64(True):
        wanted = outcome(plain, *map(jnp.asarray, (x, weight, cotangent)))
        with jax.set_mesh(sharding.make_mesh({"data": sizes[0], "expert": 1, "seq": sizes[1]})):
            found = jax.jit(lambda *arrays: outcome(ours, *arrays))(placed(x), jnp.asarray(weight), placed(cotangent))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
