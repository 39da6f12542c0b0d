"""FLOPs counted in a traced program: those of the mathematics, each turn of a loop, each row with its own expert."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from research import attention, flops, sharding, target
from research.analysis import compute, frontier
from tests.small import small_config


def counted(run, *arrays) -> int:
    return compute.count(jax.make_jaxpr(run)(*arrays).jaxpr)


X, W = jnp.ones((6, 4)), jnp.ones((4, 3))
EXPERTS, SIZES = jnp.ones((2, 4, 3)), jnp.array([5, 1])


def test_products_are_counted_wherever_they_are():
    assert counted(jnp.dot, X, W) == 2 * 6 * 4 * 3
    assert counted(lambda x: jnp.einsum("bik,bjk->bij", x, x), jnp.ones((5, 6, 4))) == 2 * 5 * 6 * 6 * 4
    assert counted(jax.jit(jax.checkpoint(jnp.dot)), X, W) == 2 * 6 * 4 * 3
    turns = lambda x: jax.lax.scan(lambda x, _: (x @ jnp.ones((4, 4)), None), x, length=7)[0]  # noqa: E731
    assert counted(turns, X) == 7 * 2 * 6 * 4 * 4
    assert counted(jnp.tanh, X) == 0


def test_a_backward_pass_is_twice_the_forward_pass():
    assert counted(lambda x, w: jax.vjp(jnp.dot, x, w)[1](jnp.ones((6, 3))), X, W) == 2 * 2 * 6 * 4 * 3 + 2 * 6 * 4 * 3


def test_each_row_is_multiplied_by_its_own_expert_alone():
    run = lambda x, w: jax.lax.ragged_dot(x, w, SIZES)  # noqa: E731
    assert counted(run, X, EXPERTS) == 2 * 6 * 4 * 3
    assert counted(lambda x, w: jax.vjp(run, x, w)[1](jnp.ones((6, 3))), X, EXPERTS) == 3 * 2 * 6 * 4 * 3


@pytest.mark.parametrize("length", [8, 16, 24, 56])  # one block, written out, loops in loops
def test_attention_meets_the_keys_before_its_queries_and_half_of_those_beside_them(length):
    rows, width, block = 6, 4, 8
    attend = functools.partial(attention.attend, backend="chunked", chunk=block)
    with jax.set_mesh(sharding.make_mesh({"data": 1, "expert": 1, "seq": 1})):
        q = jax.device_put(jnp.ones((3, length, 2, width)), P(sharding.BATCH, "seq", None, None))
        forward = counted(attend, q, q, q)
        both = counted(lambda *qkv: jax.vjp(attend, *qkv)[1](q), q, q, q)
    blocks = length // block
    pairs = blocks * (blocks - 1) // 2 * block**2 + blocks * (block * block // 2 + (block // 2) ** 2)
    assert forward == 2 * 2 * rows * pairs * width
    assert both == (2 + 5) * 2 * rows * pairs * width


def test_what_cannot_be_known_is_refused():
    with pytest.raises(ValueError, match="while"):
        counted(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x.T @ x, x), X)


def step_of(**fields) -> int:
    config = small_config(remat="none", balance_weight=0.0)
    config.train.steps = 10
    config.optimizer.name = "adamw"  # no products of its own
    return compute.train_flops(frontier.with_fields(config, dict(batch_size=4, seq_len=32) | fields), target.at_hand())


def test_a_step_computes_what_the_formula_says_and_the_masked_half_where_it_is_not_skipped():
    model = small_config().model
    wanted = flops.train_flops_per_token(model, 32) * 4 * 32
    masked = 3 * model.num_layers * 4 * model.d_model * (32 - 1) / 2 * 4 * 32  # keys after the query
    assert step_of(**{"model.attention": "xla"}) == pytest.approx(wanted + masked, rel=0.02)
    again = step_of(**{"model.attention": "xla", "model.remat": "block"})
    forward = (wanted + masked) / 3 - 2 * model.vocab_size * model.d_model * 4 * 32
    assert again - step_of(**{"model.attention": "xla"}) == pytest.approx(forward, rel=0.05)


def test_rows_cost_alike():
    assert step_of(batch_size=8) == 2 * step_of()
