"""The devices that a program is compiled for: those at hand, simulated ones, or an accelerator that is not here.

An accelerator that is not here is named by --topology: `v5e:2x4` for a TPU (needs `pip install libtpu`), `h200`,
`h100` or `a100` for a GPU, `h200:8` for eight (needs `pip install "jax[cuda13]"`). Programs are compiled, never run.
"""

import contextlib
import dataclasses
import os
from importlib import metadata

import jax
from jax.experimental import topologies

from research import cores
from research.config import ConfigError

# What XLA asks of a GPU that is not there. Sources: NVIDIA's data sheets (memory, bandwidth, clock) and the tables of
# compute capabilities in the CUDA C++ programming guide.
GPUS = {
    "h200": dict(kind="NVIDIA H200", cores=132, gib=141 * 1e9 / 2**30, bandwidth=4.8e12, l2=50, major=9, shared=233472),
    "h100": dict(kind="NVIDIA H100", cores=132, gib=80, bandwidth=3.35e12, l2=50, major=9, shared=233472),
    "a100": dict(kind="NVIDIA A100", cores=108, gib=80, bandwidth=2.0e12, l2=40, major=8, shared=167936),
}
TPUS = ("v4", "v5e", "v5p", "v6e")
GPU_DESCRIPTION = """
platform_name: "CUDA"
device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} }}
  core_count: {cores}
  device_memory_size: {bytes}
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  clock_rate_ghz: 1.7
  fpus_per_core: {fpus}
  shared_memory_per_block: 49152
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""
PLUGINS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt")


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for. `name`: as tables say it. `absent`: programs can be compiled, not run."""

    name: str
    devices: tuple[jax.Device, ...]
    absent: bool
    memory: int | None = None  # bytes of one that is not here, where its compiler does not refuse what is larger

    @property
    def platform(self) -> str:
        """'cpu', 'gpu' or 'tpu'."""
        name = self.devices[0].platform
        return "gpu" if name in ("cuda", "rocm") else name

    @property
    def compiler_options(self) -> dict[str, object]:
        """CPU: quicker machine code of the same buffers. A GPU that is not here: no kernels can be tried out on it."""
        if self.platform == "cpu":
            return {"xla_backend_optimization_level": 0}
        return {"xla_gpu_autotune_level": 0} if self.platform == "gpu" and self.absent else {}

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that compile."""
        found = {}
        for name in PLUGINS:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        return found


def at_hand(num_devices: int = 1) -> Target:
    """The devices of this process; on a machine without an accelerator as many simulated ones as are asked for.

    Call it before anything else uses JAX, if more than one has to be simulated. Raises: ConfigError where there are
    fewer.
    """
    cores.set_options()  # a plan is of the program that runs
    if num_devices > 1:
        with contextlib.suppress(RuntimeError):  # JAX has begun: what there is has to do
            jax.config.update("jax_num_cpu_devices", num_devices)
    devices = jax.devices()
    if len(devices) < num_devices:
        raise ConfigError(
            "--mesh", num_devices,
            f"only {len(devices)} {devices[0].device_kind} here; name a --topology, or simulate: JAX_PLATFORMS=cpu",
        )  # fmt: skip
    kind = devices[0].device_kind
    simulated = f" x {num_devices}, simulated" if num_devices > 1 and kind == "cpu" else ""
    return Target((kind.upper() if kind == "cpu" else kind) + simulated, tuple(devices), absent=False)


def absent(topology: str) -> Target:
    """The devices of a topology. Raises: ConfigError where it is unknown, or its compiler is not installed."""
    kind, _, size = topology.partition(":")
    known = ", ".join((*GPUS, *TPUS))
    if kind in GPUS:
        return _gpus(topology, kind, size or "1")
    if kind not in TPUS:
        raise ConfigError("--topology", topology, f"unknown; choose one of {known}, such as h200, h200:8 or v5e:2x4")
    return _tpus(topology, size or "1x1")


def _gpus(topology: str, kind: str, size: str) -> Target:
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError("--topology", topology, f"write the number of GPUs, such as {kind}:8")
    facts = GPUS[kind]
    description = GPU_DESCRIPTION.format(
        **facts | dict(bandwidth=int(facts["bandwidth"]), l2=facts["l2"] * 2**20),
        bytes=int(facts["gib"] * 2**30), optin=facts["shared"] - 1024, fpus=128 if facts["major"] == 9 else 64,
    )  # fmt: skip
    devices = _devices(topology, 'jax[cuda13]"', "cuda", topology=f"1x1x{size}", target_config=description)
    name = f"{facts['kind']} x {size}" if size != "1" else facts["kind"]
    return Target(name, devices, absent=True, memory=int(facts["gib"] * 2**30))


def _tpus(topology: str, size: str) -> Target:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu looks for the machines of a pod
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    kind = topology.partition(":")[0]
    devices = _devices(topology, 'libtpu"', "tpu", topology_name=f"{kind}:{size}")
    return Target(f"TPU {kind} {size}", devices, absent=True)


def _devices(wanted: str, package: str, platform: str, **options: str) -> tuple[jax.Device, ...]:
    if jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")  # or JAX would look for the accelerator itself
    try:
        return tuple(topologies.get_topology_desc(platform=platform, **options).devices)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        message = (
            f'cannot be compiled for here ({reason}); pip install "{package}, and write sizes as 8 (GPU) or 2x4 (TPU)'
        )
        raise ConfigError("--topology", wanted, message) from None
