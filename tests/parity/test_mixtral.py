"""Our swiglu variant equals Mixtral of transformers: logits, and the gradients of all that both have."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from research.model import MoETransformer, output_table  # noqa: E402
from tests.parity import mixtral  # noqa: E402
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
