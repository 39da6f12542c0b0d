"""Our model, losses, gradients and training steps equal those of independent PyTorch code.

The same weights, larger than at initialisation so that no tensor is trivially small, go into both;
dropout and router noise are off, since the two draw differently. Every comparison is
||ours - theirs|| / ||theirs|| of each tensor.
"""

import functools
import itertools
import math

import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from research import sharding, step  # noqa: E402
from research.model import ModelConfig, MoETransformer, output_table  # noqa: E402
from research.optimizer import make_optimizer, make_schedule  # noqa: E402
from tests.parity import original  # noqa: E402
from tests.small import model_config, random_batch, relative, small_config  # noqa: E402

torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
CASES = {
    "silu_top2": {},
    "silu_top1": dict(experts_per_token=1),
    "swiglu_top2": dict(activation="swiglu"),
    "swiglu_top1": dict(activation="swiglu", experts_per_token=1),
    "one_expert": dict(num_experts=1, experts_per_token=1),
    "idle_experts": dict(num_experts=64, experts_per_token=1),  # more experts than tokens
    "untied_head": dict(tie_embeddings=False),
    "other_backends": dict(attention="xla", moe="ragged"),
}
SEEDS = range(3)
ROWS, LENGTH = 3, 20
NUM_STEPS = 40  # two of warm-up: three steps see the ramp and the plateau
TIGHT = 1e-5
# Of float32 updates: Newton-Schulz raises small singular values of a gradient, and the rounding
# error in them, up to 485 times (3.4445^5); and the change is a difference of rounded parameters.
# In float64 the updates agree to 1e-9: the last test.
UPDATES = 5e-4

each_case = pytest.mark.parametrize(("case", "seed"), list(itertools.product(CASES, SEEDS)))


def random_params(config: ModelConfig, rng: np.random.Generator) -> dict:
    """Our parameter tree, filled so that activations and logits are of the size of one."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(MoETransformer(config).init, jax.random.key(0), tokens)["params"]

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, normal = path[-1].key, rng.normal(size=leaf.shape)
        if name.endswith("norm"):
            return (1 + 0.3 * normal).astype(np.float32)
        if name in ("embedding", "head"):
            return (0.3 * normal).astype(np.float32)
        fan_in = config.d_ff if name == "down" else config.d_model
        return (1.5 * normal / math.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def make_case(case: str, seed: int) -> tuple[ModelConfig, dict, list[dict[str, np.ndarray]]]:
    """(config, params, three batches [ROWS, LENGTH]); some of their targets are not counted."""
    rng = np.random.default_rng(seed)
    config = model_config(**CASES[case])
    params = random_params(config, rng)
    return config, params, [random_batch(rng, ROWS, LENGTH) for _ in range(3)]


def in_torch_layout(tree: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters or gradients by the names of `original.Original`, each weight as [out, in]."""
    D = config.d_model
    tree = jax.tree.map(np.asarray, tree)
    named = {"embedding.weight": tree["embedding"], "final_norm.weight": tree["final_norm"]}
    if not config.tie_embeddings:
        named["head.weight"] = tree["head"]
    experts = {"w1": "up", "w2": "down"}
    if config.activation == "swiglu":
        experts = {"w1": "gate", "w2": "down", "w3": "up"}
    for i in range(config.num_layers):
        ours = {name: leaf[i] for name, leaf in tree["layers"].items()}
        named |= {
            f"blocks.{i}.attention_norm.weight": ours["attention_norm"],
            f"blocks.{i}.attention.qkv.weight": ours["qkv"].reshape(D, 3 * D).T,
            f"blocks.{i}.attention.out.weight": ours["attention_out"].reshape(D, D).T,
            f"blocks.{i}.moe_norm.weight": ours["moe_norm"],
            f"blocks.{i}.moe.router.weight": ours["router"].T,
        }
        for e, (theirs, name) in itertools.product(range(config.num_experts), experts.items()):
            weight = ours[name][e]
            named[f"blocks.{i}.moe.experts.{e}.{theirs}.weight"] = weight if name == "down" else weight.T
    return named


def make_original(config: ModelConfig, params: dict) -> original.Original:
    model = original.Original(config).train()
    weights = {name: torch.tensor(w) for name, w in in_torch_layout(params, config).items()}
    if config.tie_embeddings:
        weights["head.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights)  # strict: both hold the same tensors
    return model


def torch_batch(batch: dict[str, np.ndarray]) -> original.Batch:
    return tuple(torch.tensor(batch[name], dtype=torch.int64) for name in ("inputs", "targets"))


def torch_params(model: original.Original) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest distance over the tensors."""
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    assert all(np.isfinite(x).all() for x in ours.values())
    return max(relative(ours[name], theirs[name]) for name in ours)


def changes(after: dict, before: dict) -> dict[str, np.ndarray]:
    return {name: after[name] - before[name] for name in before}


def watch_settled(model: original.Original) -> dict[str, np.ndarray]:
    """Which entries of each parameter float32 can tell the updates of, kept up to date while the model trains.

    AdamW divides a gradient by its own size: of one far below the others of its tensor nothing but their rounding
    errors may be left, and it moves as far as any. The matrices, which are Muon's, are compared whole.
    """
    settled = {name: np.ones(tuple(p.shape), bool) for name, p in model.named_parameters()}

    def watch(name: str, parameter: torch.Tensor) -> None:
        size = parameter.grad.abs().numpy()
        settled[name] &= (size > 1e-4 * np.sqrt(np.mean(size**2))) | (size == 0)

    for name, parameter in model.named_parameters():
        if "norm" in name or name in ("embedding.weight", "head.weight"):
            parameter.register_post_accumulate_grad_hook(functools.partial(watch, name))
    return settled


def as_microbatch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    return sharding.put_batch({name: x[None] for name, x in batch.items()}, mesh)


@functools.cache
def compiled_forward_and_gradients(config: ModelConfig):
    """(params, batch) -> (logits [B, T, V], sums, gradients); compiled once a case."""
    model = MoETransformer(config)

    def run(params, batch):
        hidden, _ = model.apply({"params": params}, batch["inputs"][0])
        grads, sums = step.accumulate(params, batch, model, jax.random.key(0))
        return hidden @ output_table(params, hidden.dtype).T, sums, grads

    return jax.jit(run)


@functools.cache
def compiled_train_step(config: ModelConfig):
    optimizer = small_config().optimizer
    transform = make_optimizer(optimizer, NUM_STEPS)
    schedule = make_schedule(optimizer, optimizer.learning_rate, NUM_STEPS)
    return transform, step.make_train_step(MoETransformer(config), transform, schedule)


@each_case
def test_logits_losses_and_gradients_equal_the_originals(case, seed, one_device):
    config, params, (batch, *_) = make_case(case, seed)
    forward_and_gradients = compiled_forward_and_gradients(config)
    logits, sums, grads = forward_and_gradients(params, as_microbatch(batch, one_device))

    theirs = make_original(config, params)
    expected_logits, expected_balance = theirs(torch_batch(batch)[0])
    cross_entropy, balance_loss = original.losses(theirs, torch_batch(batch))
    (cross_entropy + config.balance_weight * balance_loss).backward()
    expected_grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    assert relative(logits, expected_logits.detach()) < TIGHT
    assert relative(sums["loss"] / sums["count"], cross_entropy.detach()) < TIGHT
    assert relative(sums["router"]["balance"] / sums["count"], expected_balance.detach()) < TIGHT
    assert relative(sums["balance_loss"] / sums["count"], balance_loss.detach()) < TIGHT
    assert worst(in_torch_layout(grads, config), expected_grads) < TIGHT


@each_case
def test_three_training_steps_equal_the_originals(case, seed, one_device):
    config, params, batches = make_case(case, seed)
    transform, train_step = compiled_train_step(config)
    placed = jax.device_put(params, jax.sharding.NamedSharding(one_device, jax.P()))
    zero, key = jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(0))
    state = step.TrainState(zero, placed, transform.init(placed), key)
    losses = []
    for batch in batches:
        state, metrics = train_step(state, as_microbatch(batch, one_device))
        losses.append(float(metrics["loss"]))

    theirs = make_original(config, params)
    trainer, settled = original.Trainer(theirs, small_config().optimizer, NUM_STEPS), watch_settled(theirs)
    expected_losses = [trainer.step(torch_batch(b), config.balance_weight) for b in batches]

    before, after, expected = (
        {name: x[settled[name]] for name, x in tree.items()}
        for tree in (in_torch_layout(params, config), in_torch_layout(state.params, config), torch_params(theirs))
    )
    assert all(whole.mean() > 0.9 for whole in settled.values() if whole.size > 1000)
    assert relative(losses, expected_losses) < TIGHT
    assert worst(after, expected) < TIGHT
    assert worst(changes(after, before), changes(expected, before)) < UPDATES


@pytest.mark.parametrize("seed", SEEDS)
def test_optimiser_steps_in_float64_equal_the_originals(seed, one_device):
    """The same gradients into both: without float32's rounding the three updates are the same."""
    config, params, _ = make_case("swiglu_top2", seed)
    optimizer = small_config().optimizer
    optimizer.update(dict(learning_rate=2**-6, adamw_learning_rate=2**-8))  # exact in float32
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        ours = jax.tree.map(lambda x: jnp.array(x, jnp.float64), params)
        transform = make_optimizer(optimizer, NUM_STEPS)
        state = transform.init(ours)
        # Large, because torch's clipping adds 1e-6 to the norm.
        all_grads = [jax.tree.map(lambda x: 1e4 * rng.normal(size=x.shape), params) for _ in range(3)]
        for grads in all_grads:
            updates, state = jax.jit(transform.update)(jax.tree.map(jnp.array, grads), state, ours)
            ours = jax.tree.map(jnp.add, ours, updates)
        ours = in_torch_layout(ours, config)

    theirs = make_original(config, params).double()
    trainer = original.Trainer(theirs, optimizer, NUM_STEPS, dtype=torch.float64)
    for grads in all_grads:
        named = in_torch_layout(grads, config)
        for name, parameter in theirs.named_parameters():
            parameter.grad = torch.tensor(named[name])
        trainer.apply_gradients()
    before, expected = in_torch_layout(params, config), torch_params(theirs)
    assert all(x.dtype == np.float64 for x in ours.values())
    assert worst(changes(ours, before), changes(expected, before)) < 1e-9
