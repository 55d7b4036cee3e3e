"""Accelerators: what their makers say of one device, and what it costs by the hour.

v5e, v5p, v6e: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e (read in November 2026). A100 80 GB, H100, H200: NVIDIA's
data sheets of the SXM parts; networks as in DGX systems. Prices are approximate and move; `--price` says another. H100,
H200: AWS's Capacity Blocks at the end of 2024 (aws.amazon.com/ec2/capacityblocks/pricing). Not looked up again: TPUs,
Google Cloud's list on demand in the US in 2025; A100, AWS's p4de on demand since June 2025.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One device.

    flops: bfloat16, a second, dense. memory: bytes. bandwidth: of memory, bytes a second. links: bytes a second that it
    can send to its neighbours, all links together, one way; network: to devices beyond the `domain` that links join.
    float32: how many times as long a product in full float32 takes (of six in bfloat16 on TPUs). price: USD an hour.
    """

    name: str
    backend: str
    flops: float
    memory: int
    bandwidth: float
    links: float
    domain: int
    network: float
    float32: float
    price: float


_G, _T = 10**9, 1e12
DEVICES = {
    device.name: device
    for device in (
        Hardware("v5e", "tpu", 197 * _T, 16 * _G, 0.819 * _T, 200 * _G, 256, 3.1 * _G, 6, 1.20),
        Hardware("v5p", "tpu", 459 * _T, 95 * _G, 2.765 * _T, 600 * _G, 8960, 6.25 * _G, 6, 4.20),
        Hardware("v6e", "tpu", 918 * _T, 32 * _G, 1.638 * _T, 400 * _G, 256, 12.5 * _G, 6, 2.70),
        Hardware("A100", "gpu", 312 * _T, 80 * _G, 2.039 * _T, 300 * _G, 8, 25 * _G, 16, 3.43),
        Hardware("H100", "gpu", 989 * _T, 80 * _G, 3.35 * _T, 450 * _G, 8, 50 * _G, 15, 4.92),
        Hardware("H200", "gpu", 989 * _T, 141 * _G, 4.8 * _T, 450 * _G, 8, 50 * _G, 15, 5.41),
    )
}
