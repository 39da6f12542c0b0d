"""Our swiglu variant equals Mixtral of transformers: logits, and the gradients of all that both have."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from research.model import MoETransformer, output_table  # noqa: E402
from tests.parity import mixtral, original  # noqa: E402
from tests.parity.test_parity import random_params  # noqa: E402
from tests.small import model_config, placed, random_batch, relative, small_config  # noqa: E402

CHANGES = dict(activation="swiglu", tie_embeddings=False, dropout=0.0)


def in_their_layout(tree: dict, config) -> dict[str, np.ndarray]:
    """Our parameters (or gradients) by Mixtral's names, but for the embedding, which they do not scale.

    Rotated pairs are neighbours in ours and halves in theirs; weights are [in, out] in ours, [out, in] in theirs.
    """
    layers, D = jax.tree.map(np.asarray, tree["layers"]), config.d_model
    named = {"lm_head.weight": np.asarray(tree["head"]), "model.norm.weight": np.asarray(tree["final_norm"])}
    for i in range(config.num_layers):
        layer = {name: x[i] for name, x in layers.items()}
        at = f"model.layers.{i}."
        for j, name in enumerate("qkv"):
            weight = layer["qkv"][:, j]  # [D, H, K]
            if name != "v":
                weight = np.concatenate([weight[..., 0::2], weight[..., 1::2]], axis=-1)
            named[f"{at}self_attn.{name}_proj.weight"] = weight.reshape(D, D).T
        named[f"{at}self_attn.o_proj.weight"] = layer["attention_out"].reshape(D, D).T
        named[f"{at}mlp.gate.weight"] = layer["router"].T
        gate_up = np.concatenate([layer["gate"], layer["up"]], axis=-1)
        named[f"{at}mlp.experts.gate_up_proj"] = gate_up.swapaxes(1, 2)
        named[f"{at}mlp.experts.down_proj"] = layer["down"]
        named[f"{at}input_layernorm.weight"] = layer["attention_norm"]
        named[f"{at}post_attention_layernorm.weight"] = layer["moe_norm"]
    return named


@pytest.mark.parametrize("seed", range(3))
def test_logits_and_gradients_equal_mixtrals(seed, one_device):
    rng = np.random.default_rng(seed)
    config = model_config(**CHANGES)
    params = random_params(config, rng)
    batch = random_batch(rng, 3, 20, ragged=False)
    weighting = rng.standard_normal((3, 20, 61)).astype(np.float32)

    theirs = mixtral.build(small_config(**CHANGES).model, 20).eval()
    state = in_their_layout(params, config) | {"model.embed_tokens.weight": params["embedding"] * config.d_model**0.5}
    theirs.load_state_dict({name: torch.tensor(np.ascontiguousarray(x)) for name, x in state.items()}, strict=True)
    wanted = theirs(torch.tensor(batch["inputs"], dtype=torch.int64)).logits
    (wanted * torch.tensor(weighting)).sum().backward()

    def objective(params):
        hidden, _ = MoETransformer(config).apply({"params": params}, placed(batch["inputs"]))
        logits = jnp.einsum("btd,vd->btv", hidden, output_table(params, hidden.dtype))
        return jnp.sum(logits * placed(weighting)), logits

    gradients, logits = jax.jit(jax.grad(objective, has_aux=True))(params)
    assert relative(logits, wanted.detach()) < 1e-5
    found = in_their_layout(gradients, config)
    for name, parameter in theirs.named_parameters():
        if name != "model.embed_tokens.weight":
            assert relative(found[name], parameter.grad) < 1e-5, name
    scaled = np.asarray(gradients["embedding"]) / config.d_model**0.5
    assert relative(scaled, theirs.model.embed_tokens.weight.grad) < 1e-5


def test_the_peers_step_learns_a_batch():
    config = small_config(**CHANGES)
    torch.manual_seed(0)
    trainer = mixtral.Trainer(mixtral.build(config.model, 20), config.optimizer)
    batch = random_batch(np.random.default_rng(0), 3, 20)
    tensors = tuple(torch.tensor(batch[name], dtype=torch.int64) for name in ("inputs", "targets"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    losses = [trainer.step(tensors, 0.01) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def updates_of_matrices(d_model: int, d_ff: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """(weight before, random gradient, weight after one step) of what is Muon's in a model of one layer."""
    config = small_config(**CHANGES, d_model=d_model, d_ff=d_ff, num_layers=1)
    torch.manual_seed(0)
    trainer = mixtral.Trainer(mixtral.build(config.model, 20), config.optimizer)
    muon, _ = trainer.optimizers
    ids = {id(p) for group in muon.param_groups for p in group["params"]}
    named = {name: p for name, p in trainer.model.named_parameters() if id(p) in ids}
    for p in named.values():
        p.grad = torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in named.items()}
    muon.step()
    return {name: (before[name], p.grad, p.detach()) for name, p in named.items()}


@pytest.mark.parametrize(("d_model", "d_ff"), [(32, 64), (32, 32), (64, 32), (64, 48)])
def test_muon_of_a_stack_at_once_is_that_of_each_matrix_alone(d_model, d_ff):
    config = small_config(**CHANGES).optimizer
    beta = config.momentum
    updates = updates_of_matrices(d_model, d_ff)
    assert sum(before.ndim == 3 for before, _, _ in updates.values()) == 2 and len(updates) == 7
    for name, (before, gradient, after) in updates.items():
        ahead = gradient.lerp((1 - beta) * gradient, beta)  # of a momentum that was zero
        halves = ahead.chunk(2, dim=-2) if "gate_up_proj" in name else [ahead]
        shape = (d_ff, d_model) if "gate_up_proj" in name else before.shape[-2:]
        matrices = [matrix for half in halves for matrix in half.reshape(-1, *shape)]
        scale = config.learning_rate * max(1, shape[0] / shape[1]) ** 0.5
        alone = torch.stack([original.newton_schulz(matrix) for matrix in matrices]).reshape(len(halves), -1, *shape)
        wanted = before - scale * torch.cat(list(alone), dim=-2).reshape(before.shape)
        assert relative(after - before, wanted - before) < 1e-5, name


def test_a_stack_is_multiplied_in_batched_products(monkeypatch):
    """As many for all experts as for one, as in ours: the gates and ups of four, their outputs, and single matrices."""
    sizes = []
    monkeypatch.setattr(torch, "baddbmm", lambda *a, made=torch.baddbmm, **k: sizes.append(len(a[0])) or made(*a, **k))
    updates_of_matrices(32, 64)
    assert {size: sizes.count(size) for size in sizes} == {1: 5 * 2 * 5, 4: 2 * 5, 8: 2 * 5}  # two in each of five maps
