"""Meshes from configs."""

import jax
import numpy as np
import pytest

from research import sharding
from research.config import ConfigError


@pytest.mark.parametrize(
    ("data", "seq", "devices", "shape"),
    [(-1, 1, 8, (8, 1, 1)), (-1, 4, 8, (2, 1, 4)), (2, -1, 8, (2, 1, 4)), (1, 1, 8, (1, 1, 1)), (3, 2, 8, (3, 1, 2))],
)
def test_mesh_fills_what_is_left(data, seq, devices, shape):
    assert sharding.mesh_shape({"data": data, "expert": 1, "seq": seq}, devices) == shape


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"data": 16, "expert": 1, "seq": 1}, "larger than the 8"),
        ({"data": 4, "expert": 1, "seq": 4}, "larger than the 8"),
        ({"data": -1, "expert": 1, "seq": 3}, "not divisible by 3"),
        ({"data": -1, "expert": 1, "seq": -1}, "only one axis"),
        ({"data": 0, "expert": 1, "seq": 1}, "1 or more"),
        ({"data": 1, "expert": 2, "seq": 1}, "not sharded yet"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, says):
    with pytest.raises(ConfigError, match=says) as error:
        sharding.mesh_shape(sizes, 8)
    assert "config.mesh." in str(error.value) and "\n" not in str(error.value)


def test_a_batch_lies_on_the_mesh_as_rows_and_positions():
    mesh = sharding.make_mesh({"data": 2, "expert": 1, "seq": 4})
    host = np.arange(2 * 4 * 8, dtype=np.int32).reshape(2, 4, 8)
    put = sharding.put_batch({"inputs": host}, mesh)["inputs"]
    assert put.sharding.spec == jax.P(None, *sharding.TOKENS)
    np.testing.assert_array_equal(put, host)
    assert put.addressable_shards[0].data.shape == (2, 2, 2)
