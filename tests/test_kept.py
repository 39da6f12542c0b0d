"""What the forward pass of a layer keeps for its backward pass on a GPU, counted in the traced step."""

import math

import jax
import jax.numpy as jnp
import pytest

from configs import balanced
from research import attention, jaxprs, optimizer, sharding, step, tile_kernels
from research.model import ModelConfig, MoETransformer

LAYERS, ROWS, LENGTH = 3, 2, 128


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Programs are traced as a GPU runs them; they are not run."""
    for module, name in ((sharding, "platform"), (attention, "platform"), (tile_kernels, "_platform")):
        monkeypatch.setattr(module, name, lambda: "gpu")


def loops(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == LAYERS:
            yield equation
        for inner in jaxprs.inside(equation.params):
            yield from loops(inner)


@pytest.mark.parametrize("backend", ["flash", "chunked"])
def test_seven_arrays_of_the_stream_are_kept_of_each_layer(one_device, on_a_gpu, backend):
    """The stream before attention, before the experts' norm and after it; queries, keys, values, and their mixture,
    which attention and the product after it both want: once."""
    config = balanced.get_config("published")
    config.model.update(dict(num_layers=LAYERS, attention=backend))
    model = MoETransformer(ModelConfig(**config.model, fsdp=False))
    rule = optimizer.make_optimizer(config.optimizer, 100)
    run = step.make_train_step(model, rule, optimizer.make_schedule(config.optimizer, 0.03, 100))
    tokens = jax.ShapeDtypeStruct(
        (1, ROWS, LENGTH), jnp.int32, sharding=jax.NamedSharding(one_device, jax.P(None, *sharding.TOKENS))
    )
    state = jax.eval_shape(lambda: step.init_state(model, rule, 0, (1, 1, 1)))
    jaxpr = run.trace(state, dict(inputs=tokens, targets=tokens)).jaxpr.jaxpr
    assert ("flash_forward" in str(jaxpr)) == (backend == "flash")
    forward = next(loops(jaxpr))
    of_the_stream = LAYERS * ROWS * LENGTH * config.model.d_model
    kept = [v.aval for v in forward.outvars if math.prod(v.aval.shape) == of_the_stream and v.aval.shape[0] == LAYERS]
    assert len(kept) == 7 and all(aval.dtype == jnp.bfloat16 for aval in kept)
