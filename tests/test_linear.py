"""The product of tokens and a weight against an einsum in float64: values and gradients, on any mesh, of any type."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.linear import project
from tests.precision import errors, outcome, roundings
from tests.small import placed


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1), (8, 1), (2, 4), (1, 8)])
@pytest.mark.parametrize(
    ("shape", "product"), [((12, 5), "btd,df->btf"), ((12, 3, 2, 4), "btd,dihk->btihk"), ((3, 4, 5), "bthk,hkf->btf")]
)
def test_it_is_an_einsum_whatever_the_mesh(rng, sizes, shape, product, dtype):
    """Of bfloat16 each device's part of the weight's gradient is rounded, and so are the sums of the parts."""
    inputs = shape[:2] if product.startswith("bthk") else (12,)
    arrays = (8, 16, *inputs), shape, (8, 16, math.prod(shape) // 12)
    x, weight, cotangent = (np.asarray(rng.standard_normal(shape), dtype) for shape in arrays)

    def plain(x, weight):
        return jnp.einsum(product, x, weight).reshape(cotangent.shape)

    def ours(x, weight):
        return project(x, sharding.gather(weight, weight.dtype))

    with jax.enable_x64(True):
        exact = [jnp.asarray(a, jnp.float64) for a in (x, weight, cotangent)]
        wanted = outcome(plain, exact[:2], exact[2])
        with jax.set_mesh(sharding.make_mesh({"data": sizes[0], "expert": 1, "seq": sizes[1]})):
            run = jax.jit(lambda x, weight, cotangent: outcome(ours, (x, weight), cotangent))
            found = run(placed(x), jnp.asarray(weight), placed(cotangent))
    assert {a.dtype for a in found} == {jnp.dtype(dtype)}
    tolerance = 1e-14 if dtype == jnp.float64 else roundings(2 if sizes == (1, 1) else 4)
    assert errors(found, wanted).max() < tolerance, errors(found, wanted)
