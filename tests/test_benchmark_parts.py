"""The parts of a step: FLOPs and bytes that do not depend on the clock, and how time is set beside them."""

import jax
import pytest

from experiments import contestants, machine, parts
from research import flops, sharding, target
from research.analysis import compute
from tests.small import small_config


def config_of(rows: int = 4, length: int = 32, **model):
    config = small_config(**model)
    config.train.steps = 10
    config.update(dict(batch_size=rows, seq_len=length))
    return config


def mesh_of(devices: int):
    return jax.set_mesh(sharding.make_mesh({"data": devices, "expert": 1, "seq": 1}, jax.devices()[:devices]))


def flops_by_hand(config) -> dict[str, int]:
    """Of a step, by part: 2 for each multiply-add; a backward pass has two products for each of the forward pass."""
    c, tokens = config.model, config.batch_size * config.seq_len
    D, L, E, k = c.d_model, c.num_layers, c.num_experts, c.experts_per_token
    matrices = 3 if c.activation == "swiglu" else 2
    block = min(config.seq_len, c.attention_chunk)
    blocks = config.seq_len // block  # whole ones
    pairs = blocks * (blocks - 1) // 2 * block**2 + blocks * (block * block // 2 + (block // 2) ** 2)  # of a head's row
    return {
        "embedding": 0,
        "projections of attention": 6 * tokens * 4 * D * D * L,
        "attention": (2 + 5) * 2 * config.batch_size * pairs * D * L,  # the backward pass has the scores again
        "router and dispatch": 6 * tokens * D * (E + k) * L,  # logits, and the sum of a token's experts
        "experts": 6 * tokens * k * matrices * D * c.d_ff * L,
        "head and loss": 6 * tokens * D * c.vocab_size,
        "optimizer": sum(newton_schulz_by_hand(*matrix) for matrix in matrices_of(config)),
    }


def matrices_of(config) -> list[tuple[int, int, int]]:
    """(how many, smaller side, larger side) of what Muon makes orthogonal."""
    c = config.model
    D, F, E, L = c.d_model, c.d_ff, c.num_experts, c.num_layers
    experts = 3 if c.activation == "swiglu" else 2
    found = [(L, D, 3 * D), (L, D, D), (L, D, E), *[(L * E, D, F)] * experts]
    return [(stack, *sorted(sides)) for stack, *sides in found]


def newton_schulz_by_hand(stack: int, small: int, large: int) -> int:
    """Twice a Gram matrix and a product with it; nine and five squares between, of three and of two maps."""
    return stack * (2 * 2 * 2 * small**2 * large + (9 + 5) * 2 * small**3)


def bytes_by_hand(config, devices: int) -> dict[str, int]:
    """Of a step, by part: rows are divided over devices, and each has all weights."""
    c, tokens = config.model, config.batch_size * config.seq_len
    D, F, V, L, E, k = c.d_model, c.d_ff, c.vocab_size, c.num_layers, c.num_experts, c.experts_per_token
    size = 2 if c.dtype == "bfloat16" else 4
    matrices = 3 if c.activation == "swiglu" else 2
    hidden = tokens * D * size
    counts = flops.parameter_counts(c)["total"]
    muon = sum(stack * small * large for stack, small, large in matrices_of(config))
    state = muon + 2 * (counts - muon)
    found = {
        "embedding": 2 * hidden + 2 * devices * V * D * size + 4 * tokens,  # in and out; table and gradient; tokens
        "projections of attention": 4 * hidden + 2 * devices * (4 * D * D * size + 4 * D),
        "attention": 8 * hidden,  # queries, keys, values, result, and the gradients of each
        "router and dispatch": 4 * hidden + 2 * devices * (4 * D * E + 4 * D),
        "experts": 4 * k * hidden + 2 * 4 * k * tokens + 2 * devices * matrices * E * D * F * size,
        "head and loss": 2 * hidden + 2 * devices * (V * D * size + 4 * D) + 4 * tokens,
        "optimizer": devices * 4 * (counts + 2 * (counts + state)),  # gradients; in and out: parameters and state
    }
    once = ("embedding", "head and loss", "optimizer")
    return {name: amount * (1 if name in once else L) for name, amount in found.items()}


CHANGES = [dict(), dict(activation="swiglu", num_experts=5, d_ff=48), dict(dropout=0.1, attention_chunk=32)]


@pytest.mark.parametrize("changes", CHANGES)
def test_flops_of_every_part_are_what_its_shapes_say(changes):
    config = config_of(attention="chunked", **changes)
    with mesh_of(1):
        assert {part.name: part.flops() for part in parts.parts_of(config)} == flops_by_hand(config)


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_the_parts_products_are_all_of_the_steps(activation):
    """None is left out, none counted twice: their sum is that of the whole step."""
    config = config_of(activation=activation, attention="chunked")
    with mesh_of(1):
        found = {part.name: part.flops() for part in parts.parts_of(config)}
    assert sum(found.values()) == compute.train_flops(config, target.at_hand())
    assert {name for name, amount in found.items() if amount == 0} == {"embedding"}


@pytest.mark.parametrize(("moe", "of_experts"), [("ragged", 1), ("blocks", 7 / 6 * 5 / 4)])
def test_a_compiled_part_multiplies_as_often_as_it_is_said_to(moe, of_experts):
    """No product is left out because nobody asked for its result. Where each loop has one turn, XLA's own count can
    tell; it counts sums and exponentials too. (In blocks the hidden layer is computed twice, a seventh product, and a
    quarter of a block stands beside the block, for rows that are left.)"""
    shape = dict(d_model=128, d_ff=256, vocab_size=512, num_heads=2, num_layers=1, loss_chunk=128, moe_block=128)
    config = config_of(**shape, attention="xla", moe=moe, num_experts=1, experts_per_token=1)
    with mesh_of(1):
        found = {p.name: (p.compiled().cost_analysis()["flops"], p.flops()) for p in parts.parts_of(config)}
    counted, said = found.pop("router and dispatch")
    assert counted > said > 0  # of so small products most is not theirs
    assert found.pop("embedding")[1] == 0
    for name, (counted, said) in found.items():
        assert counted == pytest.approx(said * (of_experts if name == "experts" else 1), rel=0.03), name


@pytest.mark.parametrize(("devices", "changes"), zip((1, 2, 2), CHANGES, strict=True))
def test_compulsory_bytes_of_every_part_are_what_its_shapes_say(devices, changes):
    config = config_of(rows=8, length=64, attention="chunked", **changes)
    with mesh_of(devices):
        found = {
            part.name: part.times * contestants.compulsory_bytes(part.compiled(), devices)
            for part in parts.parts_of(config)
        }
    for name, wanted in bytes_by_hand(config, devices).items():
        assert found[name] == pytest.approx(wanted, rel=5e-3), name  # and a pointer for each result


def test_compulsory_bytes_of_a_step_are_its_state_in_and_out_and_its_batch():
    config = config_of(rows=8, length=64)
    config.mesh.data = 2
    _, facts = contestants.build_ours(config)
    gradients = 2 * 4 * flops.parameter_counts(config.model)["total"]  # no step's argument
    wanted = bytes_by_hand(config, 2)["optimizer"] - gradients + 2 * 4 * 8 * 64
    assert facts()["compulsory_bytes"] == pytest.approx(wanted, rel=5e-3)


def test_a_floor_is_of_the_slower_of_products_and_copies():
    speeds = {"matmul_jax": [1e9, 4e9], "matmul_torch": [2e9], "copy_jax": [5e8, 1e9], "copy_torch": [2e9]}
    found = machine.roofline(8e9, 2 * 10**9, 4.0, speeds)
    assert found == dict(floor_seconds=2.0, over_floor=2.0, matmul_share=0.5, copy_share=0.25)
    assert machine.roofline(8e9, 10 * 10**9, 10.0, speeds)["floor_seconds"] == 5.0
    assert machine.roofline(8e9, None, 4.0, speeds) == found | dict(copy_share=None)
    assert machine.roofline(0, None, 4.0, speeds)["over_floor"] is None


def test_a_copy_is_of_all_devices_and_writes_where_it_read():
    _, copy, each = machine._in_jax(8, 4096, 1, "float32")
    before, after = ([x.data.unsafe_buffer_pointer() for x in copy().addressable_shards] for _ in range(2))
    assert before == after and len(set(before)) == jax.device_count() and each == 1


def test_a_speed_is_work_over_seconds(monkeypatch):
    monkeypatch.setattr(machine, "seconds_of", lambda run: (0.5, run()))
    monkeypatch.setattr(machine, "MATMUL_SIZE", {"cpu": 16})
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 4096})
    found = {name: measure() for name, measure in machine.speeds("jax", "cpu", "float32").items()}
    assert found == dict(matmul_jax=2 * 16**3 / 0.5, copy_jax=2 * 4096 / 0.5)
