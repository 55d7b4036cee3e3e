"""Accelerators: what their makers say of one device, and what it costs by the hour.

TPUs: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e (read in November 2026). A100 80 GB, H100, H200:
NVIDIA's data sheets of the SXM parts; networks as in DGX systems.

Prices are approximate and change; `--price` overrides them. H100, H200: AWS's Capacity Blocks at
the end of 2024 (aws.amazon.com/ec2/capacityblocks/pricing). Not looked up again: TPUs, Google
Cloud's list on demand in the US in 2025; A100, AWS's p4de on demand since June 2025.
"""

from dataclasses import dataclass

from lco_jax.training.memory import MARGIN

GPU_SHARE = 0.92  # of a GPU: what launch/ lets jax allocate (XLA_PYTHON_CLIENT_MEM_FRACTION)


@dataclass(frozen=True)
class Hardware:
    """One device.

    flops: a second, in bfloat16, dense. memory: bytes; of a TPU, those that its compiler lets a
    program have. bandwidth: of memory, bytes a second. links: bytes a second that it can send to
    its neighbours, all links together, one way. domain: devices that links join. network: bytes a
    second to devices beyond the domain. clock: ticks a second in which a TPU's compiler counts: the
    peak over what the matrix units do in a tick (v5e has 4 units of 128 × 128 multiply-adds, v5p 8
    of these, v6e 4 of 256 × 256); 0 for GPUs. price: USD an hour.
    """

    name: str
    backend: str
    flops: float
    memory: int
    bandwidth: float
    links: float
    domain: int
    network: float
    clock: float
    price: float

    @property
    def room(self) -> int:
        """Bytes that a run may fill there, as `auto` has it."""
        share = GPU_SHARE if self.backend == "gpu" else 1
        return int(self.memory * share * (1 - MARGIN))


_G, _I, _T = 10**9, 2**30, 1e12
_NUMBERS = {  # flops, memory, bandwidth, links, domain, network, clock, price
    ("v5e", "tpu"): (197 * _T, int(15.75 * _I), 0.819 * _T, 200 * _G, 256, 3.1 * _G, 1.5e9, 1.20),
    ("v5p", "tpu"): (459 * _T, int(95.74 * _I), 2.765 * _T, 600 * _G, 8960, 6.25 * _G, 1.75e9, 4.2),
    ("v6e", "tpu"): (918 * _T, int(31.25 * _I), 1.638 * _T, 400 * _G, 256, 12.5 * _G, 1.75e9, 2.70),
    ("A100", "gpu"): (312 * _T, 80 * _G, 2.039 * _T, 300 * _G, 8, 25 * _G, 0, 3.43),
    ("H100", "gpu"): (989 * _T, 80 * _G, 3.35 * _T, 450 * _G, 8, 50 * _G, 0, 4.92),
    ("H200", "gpu"): (989 * _T, 141 * _G, 4.8 * _T, 450 * _G, 8, 50 * _G, 0, 5.41),
}
DEVICES = {name: Hardware(name, backend, *numbers) for (name, backend), numbers in _NUMBERS.items()}
