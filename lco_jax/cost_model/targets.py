"""Devices of machines that are not here, for XLA's compilers, which need no device.

The wheel `libtpu` has the TPU's compiler (the extra `plan-tpu`), jax's CUDA plugin the GPU's
(`plan-gpu`). Programs are compiled for these devices; nothing can run on them.
"""

import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from lco_jax.core.errors import LcoError
from lco_jax.core.extras import install_line
from lco_jax.cost_model.hardware import Hardware

GPU_PLUGINS = ("xla_cuda13", "xla_cuda12")
# without these, libtpu asks the machine and its network what it is part of
TPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# Compiler options. GPU: do not choose kernels by timing them. CPU: programs widen bfloat16 before
# they compute; do not hoist that of all weights and activations out of the loop over layers. And do
# not optimise machine code that nobody runs, which changes no buffer.
OPTIONS = {
    "tpu": {},
    "gpu": {"xla_gpu_autotune_level": "0"},
    "cpu": {
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
        "xla_backend_optimization_level": "0",
    },
}
# TPU slices by their chips; Google's names of v5p count two cores a chip
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SLICES = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": {
        4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
        256: "4x8x8", 512: "8x8x8", 1024: "8x8x16",
    },
}  # fmt: skip
# What XLA's GPU compiler reads of a device (xla/stream_executor/device_description.proto). Numbers
# are from NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities.
GPU = """gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {most_shared}
  core_count: {cores}  fpus_per_core: {fpus}  clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}  l2_cache_size: {cache}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
"""
_HOPPER = {
    "major": 9, "cores": 132, "fpus": 128, "clock": 1.98, "shared": 233472, "most_shared": 232448,
    "cache": 52428800,
}  # fmt: skip
CORES = {
    "A100": {
        "major": 8, "cores": 108, "fpus": 64, "clock": 1.41, "shared": 167936,
        "most_shared": 166912, "cache": 41943040,
    },
    "H100": _HOPPER,
    "H200": _HOPPER,
}  # fmt: skip


class Target(NamedTuple):
    """compiler: "tpu", "gpu" or "cpu". devices: for a mesh. note: why it is the CPU's compiler."""

    compiler: str
    devices: list[jax.Device]
    note: str = ""

    @property
    def options(self) -> dict[str, str]:
        """The options for `Lowered.compile`."""
        return OPTIONS[self.compiler]


def target(hardware: Hardware, count: int) -> Target:
    """`count` devices of a kind, or this process's CPU devices if no compiler for it is installed.

    Raises if there are not as many.
    """
    absent = missing(hardware.backend)
    if not absent:
        devices = _tpus if hardware.backend == "tpu" else _gpus
        return Target(hardware.backend, devices(hardware, count))
    cpus = jax.devices("cpu")
    if len(cpus) < count:
        raise LcoError(
            f"{count} CPU devices are needed in the place of {hardware.name}; "
            "jax_num_cpu_devices sets them"
        )
    return Target("cpu", cpus[:count], f"compiled for CPU, since {absent}")


def missing(backend: str) -> str:
    """What a backend's compiler lacks, and how to install it; "" if it lacks nothing."""
    if backend == "tpu":
        found = importlib.util.find_spec("libtpu")
        return "" if found else f"libtpu is not installed ({install_line('plan-tpu')})"
    found = importlib.util.find_spec("jax_plugins") and any(
        importlib.util.find_spec(f"jax_plugins.{name}") for name in GPU_PLUGINS
    )
    package = f"no CUDA plugin of jax is installed ({install_line('plan-gpu')})"
    return "" if found else package


def _tpus(hardware: Hardware, count: int) -> list[jax.Device]:
    """Devices of the smallest slice that has enough; libtpu has none below a host's four chips."""
    slices = SLICES[hardware.name]
    size = next((size for size in slices if size >= count), None)
    if size is None:
        raise LcoError(f"{count} × {hardware.name}: the largest slice has {max(slices)} chips")
    for variable, value in TPU_VARIABLES.items():
        os.environ.setdefault(variable, value)
    name = f"{hardware.name}:{slices[size]}"
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    return list(topology.devices)[:count]


def _gpus(hardware: Hardware, count: int) -> list[jax.Device]:
    """GPUs of one node, as we describe them to their compiler."""
    jax.devices("cpu")  # jax looks for its plugins when it first looks for devices
    described = GPU.format(
        memory=hardware.memory, bandwidth=int(hardware.bandwidth), **CORES[hardware.name]
    )
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=described, topology=f"1x1x{count}"
    )
    return list(topology.devices)
