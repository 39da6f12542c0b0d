"""Tiles hold every row once, waste little, and multiply each row by its own expert's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research import grouped, tile_kernels, tiles
from research.model import make_expert
from tests.precision import ROUNDING, roundings
from tests.small import relative


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum), rows=st.sampled_from([1, 2, 4, 8, 32]))
def test_every_row_has_a_place_in_a_tile_of_its_expert(sizes, rows):
    num_rows = sum(sizes)
    at = tiles.layout(jnp.asarray(sizes, jnp.int32), num_rows, rows)
    source, owner, place = (np.asarray(x) for x in (at.source_NR, at.owner_N, at.place_M))
    assert (source.reshape(-1)[place] == np.arange(num_rows)).all()
    assert (owner[place // rows] == np.repeat(np.arange(len(sizes)), sizes)).all()
    assert (source < num_rows).sum() == num_rows  # the other places are empty
    assert source.size <= num_rows + len(sizes) * (rows - 1)


@pytest.mark.parametrize(
    ("num_rows", "experts", "block"), [(53248, 8, 512), (16384, 8, 256), (100, 8, 256), (3, 8, 256)]
)
def test_a_fifth_of_the_places_are_empty_at_most(num_rows, experts, block):
    rows = tiles.tile_rows(num_rows, experts, block)
    assert 1 <= rows <= block and rows & (rows - 1) == 0
    assert experts * (rows - 1) <= num_rows / 4  # a quarter of the rows: a fifth of all places
    assert rows == block or num_rows < 8 * experts * block  # and no smaller than that asks for


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, roundings(12))])
@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_tiles_are_blocks_of_each_expert_in_float64(rng, dtype, tolerance, activation):
    """Values and gradients; the numbers that float64 sees are those of the lower precision."""
    sizes = jnp.asarray([130, 0, 1, 125], jnp.int32)
    shapes = dict(x=(256, 16), up=(4, 16, 24), gate=(4, 16, 24), down=(4, 16, 24), cotangent=(256, 16))
    arrays = {name: jnp.asarray(rng.standard_normal(shape) / 4, dtype) for name, shape in shapes.items()}

    def outcome(backend, arrays):
        weights = {name: arrays[name] for name in ("up", "gate", "down")}

        def run(x, weights):
            return grouped.apply_experts(make_expert(activation, 0.0), x, weights, sizes, backend=backend, block=16)

        out, vjp = jax.vjp(run, arrays["x"], weights)
        return out, vjp(arrays["cotangent"])

    found = jax.jit(outcome, static_argnums=0)("tiles", arrays)
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(array, np.float64)) for name, array in arrays.items()}
        wanted = jax.jit(outcome, static_argnums=0)("blocks", exact)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == dtype and b.dtype == np.float64
        assert relative(np.asarray(a, np.float64), b) < tolerance


@pytest.mark.parametrize("made_of_zeros", [1.0, jnp.nan])
def test_empty_places_take_no_part(rng, made_of_zeros):
    """What an expert makes of zeros reaches no row and no gradient."""
    x = jnp.asarray(rng.standard_normal((40, 8)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((3, 8, 8)), jnp.float32)
    sizes = jnp.asarray([17, 1, 22], jnp.int32)

    def outcome(backend):
        def expert(x, w, multiply, key, share):
            if np.isfinite(made_of_zeros):
                return multiply(jnp.cos(x), w)
            return multiply(x, w) + jnp.where((x == 0).all(axis=-1, keepdims=True), made_of_zeros, 0)

        run = lambda x, w: grouped.apply_experts(expert, x, w, sizes, backend=backend, block=8)  # noqa: E731
        out, vjp = jax.vjp(run, x, weights)
        return out, vjp(jnp.ones_like(out))

    for a, b in zip(jax.tree.leaves(outcome("tiles")), jax.tree.leaves(outcome("blocks")), strict=True):
        assert relative(a, b) < 1e-5


def test_products_are_of_tiles_and_not_of_every_expert_with_every_row():
    """The work of a step on the experts, forward and backward, in the compiled program: 3 products of the tiles."""
    experts, width, hidden, num_rows = 8, 32, 64, 2048
    shapes = [(num_rows, width), (experts, width, hidden), (num_rows, hidden)]
    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)

    def run(x, w, dy, sizes):
        expert = lambda x, w, multiply, key, share: multiply(x, w)  # noqa: E731
        return jax.vjp(lambda x, w: grouped.apply_experts(expert, x, w, sizes, backend="tiles", block=64), x, w)[1](dy)

    found = jax.jit(run).lower(x, w, dy, sizes).compile().cost_analysis()
    found = found[0] if isinstance(found, list) else found
    places = num_rows + experts * 64
    adding_up = 2 * (places // 64) * experts * width * hidden
    assert found["flops"] < 1.1 * (2 * 2 * places * width * hidden + adding_up)  # the value itself is not asked for


@settings(max_examples=4, deadline=None)
@given(
    owners=st.lists(st.integers(0, 4), min_size=1, max_size=6).map(sorted),  # 4: a tile that is left over
    rows=st.sampled_from([16, 32, 64]),
    width=st.sampled_from([16, 48, 96]),
    hidden=st.sampled_from([32, 80]),
    seed=st.integers(0, 99),
)
def test_kernels_are_the_products_of_tiles_in_float64(owners, rows, width, hidden, seed):
    """Interpreted, in blocks small enough that there are several of each: y, dx and dw, experts without tiles too.
    Tiles of nobody's, and weights of experts without a tile, are not read: they are no numbers here."""
    draw = np.random.default_rng(seed).standard_normal
    x, w, dy = (
        jnp.asarray(draw(shape), jnp.bfloat16)
        for shape in ((len(owners), rows, width), (4, width, hidden), (len(owners), rows, hidden))
    )
    owner = jnp.asarray(owners, jnp.int32)
    x, dy = (jnp.where(owner[:, None, None] < 4, a, jnp.nan) for a in (x, dy))
    w = jnp.where(jnp.isin(jnp.arange(4), owner)[:, None, None], w, jnp.nan)
    options = dict(blocks=tile_kernels.Blocks(32, 32, 16, warps=4, stages=2), interpret=True)
    found = (
        tile_kernels.product(x, w, owner, **options),
        tile_kernels.product(dy, w, owner, transposed=True, **options),
        tile_kernels.gradient(x, dy, owner, 4, **options),
    )
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for tile, expert in enumerate(owners):
        if expert < 4:
            y[tile], dx[tile] = x[tile] @ w[expert], dy[tile] @ w[expert].T
            dw[expert] += x[tile].T @ dy[tile]
    for a, b in zip(found, (y, dx, dw), strict=True):
        assert a.dtype == jnp.bfloat16 and relative(a, b) < 1.1 * ROUNDING  # of the result alone
        assert not np.any(np.asarray(a, np.float64)[b == 0])  # nobody's tiles, and experts without a tile


def test_experts_on_kernels_are_experts_on_einsum(rng, monkeypatch):
    """Through `multiply` and its own gradient, as a GPU runs it: against float32, of the same numbers."""
    sizes = jnp.asarray([40, 0, 71, 17], jnp.int32)
    shapes = dict(x=(128, 32), up=(4, 32, 48), down=(4, 32, 48), cotangent=(128, 32))
    arrays = {name: jnp.asarray(rng.standard_normal(shape) / 4, jnp.bfloat16) for name, shape in shapes.items()}

    def outcome(arrays):
        def run(x, weights):
            return grouped.apply_experts(make_expert("silu", 0.0), x, weights, sizes, backend="tiles", block=16)

        def both(arrays):
            out, vjp = jax.vjp(run, arrays["x"], {name: arrays[name] for name in ("up", "down")})
            return out, vjp(arrays["cotangent"])

        return jax.jit(both)(arrays)

    monkeypatch.setattr(tiles, "tile_rows", lambda *_: 16)  # more than so few rows ask for
    wanted = outcome(jax.tree.map(lambda a: a.astype(jnp.float32), arrays))
    used = []
    for name in ("product", "gradient"):
        kernel = getattr(tile_kernels, name)

        def interpreted(*args, kernel=kernel, **options):
            used.append(kernel.__name__)
            return kernel(*args, interpret=True, **options)

        monkeypatch.setattr(tile_kernels, name, interpreted)
    monkeypatch.setattr(tile_kernels, "_platform", lambda: "gpu")
    found = outcome(arrays)
    assert sorted(used) == ["gradient"] * 2 + ["product"] * 5  # one is traced for its operand alone, and dropped
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.bfloat16 and relative(a, b) < roundings(12)


@pytest.mark.parametrize(
    ("rows", "width", "hidden", "dtype", "served"),
    [
        (512, 384, 1536, jnp.bfloat16, True),
        (512, 384, 1536, jnp.float32, False),
        (8, 384, 1536, jnp.bfloat16, False),
        (512, 40, 1536, jnp.bfloat16, False),
        (512, 384, 24, jnp.bfloat16, False),
    ],
)
def test_kernels_serve_what_they_can(monkeypatch, rows, width, hidden, dtype, served):
    shapes = jax.ShapeDtypeStruct((112, rows, width), dtype), jax.ShapeDtypeStruct((8, width, hidden), dtype)
    assert not tile_kernels.served(*shapes)  # not on a CPU
    monkeypatch.setattr(tile_kernels, "_platform", lambda: "gpu")
    assert tile_kernels.served(*shapes) == served


@pytest.mark.parametrize("chosen", [tile_kernels.SHORT, tile_kernels.LONG, tile_kernels.GRADIENT])
@pytest.mark.parametrize("sides", [(512, 1536, 384), (512, 384, 1536), (16, 48, 80), (64, 320, 32)])
def test_blocks_divide_what_they_are_of(chosen, sides):
    b = chosen.within(*sides)
    for side, block in zip(sides, (b.rows, b.columns, b.inner), strict=True):
        assert block >= tile_kernels.SMALLEST and block & (block - 1) == 0 and side % block == 0
