"""The mesh, and the one place for every axis name.

Three explicit axes, any of size 1: `data` divides the rows of a batch, `seq` its positions, `expert` is kept for
expert parallelism. A batch's tokens are sharded P(('data', 'expert'), 'seq'); parameters are replicated, or sharded
over all axes along their width D when `config.mesh.fsdp` is set, and then gathered where they are used.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.config import ConfigError

AXES = ("data", "expert", "seq")
BATCH = ("data", "expert")
TOKENS = P(BATCH, "seq")  # [B, T]
HIDDEN = P(BATCH, "seq", None)  # [B, T, D]


def mesh_shape(mesh_config: Any, num_devices: int) -> tuple[int, int, int]:
    """Sizes of (data, expert, seq) on `num_devices` devices; one of them may be -1: what is left.

    Raises: ConfigError where the sizes do not fit the devices.
    """
    sizes = {axis: mesh_config[axis] for axis in AXES}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ConfigError(f"config.mesh.{axis}", size, "give a size of 1 or more, or -1: what is left")
    if sizes["expert"] != 1:
        raise ConfigError("config.mesh.expert", sizes["expert"], "experts are not sharded yet; set it to 1")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"config.mesh.{free[1]}", -1, f"only one axis may be -1, and {free[0]} is already")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    field = f"config.mesh.{'seq' if sizes['seq'] > 1 else 'data'}"
    if fixed > num_devices:
        raise ConfigError(
            field, sizes[field.rsplit(".", 1)[1]],
            f"a mesh of {fixed} devices is larger than the {num_devices} at hand; make the axes smaller (or simulate"
            f" devices on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count={fixed})",
        )  # fmt: skip
    if free:
        if num_devices % fixed:
            raise ConfigError(field, fixed, f"{num_devices} devices are not divisible by {fixed}; choose a divisor")
        sizes[free[0]] = num_devices // fixed
    return tuple(sizes[axis] for axis in AXES)


def make_mesh(mesh_config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config over `devices` (default: all of them; those left over stay idle)."""
    devices = list(devices or jax.devices())
    shape = mesh_shape(mesh_config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices[: math.prod(shape)])


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the mesh in use is of, at hand or only compiled for."""
    name = jax.sharding.get_abstract_mesh().abstract_device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def shard_dim(ndim: int, dim: int, fsdp: bool) -> P:
    """The spec of a parameter: axis `dim` over the whole mesh when `fsdp`, else replicated."""
    return P(*[AXES if fsdp and i == dim else None for i in range(ndim)])


def whole() -> P:
    """The spec of a parameter that every device holds, and whose gradient is the sum of the devices' parts."""
    return P(reduced=set(AXES)) if jax.sharding.get_abstract_mesh().size > 1 else P()


def gather(weight: jax.Array, dtype: Any) -> jax.Array:
    """A parameter where it is used, `whole`: cast first, so that the gather moves the smaller type.

    Parts of its gradient, one a device, are added up here: once, over the whole mesh, after all its uses. Of one that
    is `whole` already they are left as parts.
    """
    return jax.reshard(weight.astype(dtype), whole())


def hold(params: Any) -> Any:
    """The parameters, those that every device has marked `whole`: their gradients are left as parts, one a device."""

    def mark(weight: jax.Array) -> jax.Array:
        divided = any(axes is not None for axes in jax.typeof(weight).sharding.spec)
        return weight if divided else jax.reshard(weight, whole())

    return jax.tree.map(mark, params)


def add_up(grads: Any, params: Any) -> Any:
    """Gradients of `hold(params)`, the devices' parts added up: sharded as the parameters are."""
    return jax.tree.map(lambda g, weight: jax.reshard(g, jax.typeof(weight).sharding.spec), grads, params)


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """Inside shard_map: the mesh axes over which x differs from shard to shard."""
    return tuple(sorted(jax.typeof(x).manual_axis_type.varying))


def varying(tree: Any, axes: tuple[str, ...] = AXES) -> Any:
    """Inside shard_map: mark values as different on every shard (the transpose sums over the shards)."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in axes if a not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def put_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Host arrays [..., B, T] onto the mesh, each process giving the part that its devices hold."""

    def put(x: Any) -> jax.Array:
        spec = P(*[None] * (x.ndim - 2), *TOKENS)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    return {name: put(x) for name, x in batch.items()}
