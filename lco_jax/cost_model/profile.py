"""What a device does in one run of a compiled program: work, modelled time, and what it sends.

A TPU's compiler says how many cycles it expects of every operation; we sum them. A GPU's kernel
takes its roofline: the longer of its FLOPs at the peak and of its bytes at the memory's bandwidth.
Neither is a measurement, and neither knows how long a device waits for a collective.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lco_jax.cost_model.hardware import Hardware
from lco_jax.cost_model.hlo import Instruction, Program, numbers, root

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# GPU operations that move nothing, or whose work is counted elsewhere
FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all",
    "partition-id", "replica-id", "while", "call", "conditional",
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather"}
LINEAR = re.compile(r"_proj/|oi->|\.\.\.o")
ATTENTION = re.compile(r"_rows|_last|attn|splash|fmha|bkt[hs]|branch_\d_fun")
NORM = re.compile(r"layernorm|/norm\d?/")
UNKNOWN = str(2**63 - 1)  # the cycles that a TPU's compiler writes if it has no estimate
LAUNCH = 3e-6  # seconds that a GPU kernel takes at least
# of a dot, and of cuBLAS
_CONTRACTED = r'lhs_contracting_dim(?:s={|ensions":\[)([\d,"]*)'


@dataclass
class Profile:
    """What one device does in one run of a program.

    flops: of matrix products. seconds: modelled, by part (`part_of`). count, sent: of each kind of
    collective, how many are started, and the bytes of their results. launches: kernels of a GPU.
    unestimated: how often a TPU runs an operation that its compiler has no estimate for; the
    seconds leave it out.
    """

    flops: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    count: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    unestimated: int = 0


def profile(text: str, hardware: Hardware, rank: int = 0, taken: float = 0.5) -> Profile:
    """Read the text of a program. Its seconds are meaningful on a TPU or a GPU that it is for.

    rank: LoRA's, which distinguishes its products from those of matrices; 0 means no LoRA. taken:
    how often a condition is true.
    """
    found = Profile()
    seen: set[tuple[int, str]] = set()
    for one, times in Program(text).steps(taken):
        found.flops += times * _flops(one)
        found.unestimated += int(times) if _cycles(one) == UNKNOWN else 0
        seconds = times * _seconds(one, hardware)
        if seconds:
            found.seconds[part_of(one, rank)] += seconds
            found.launches += int(times) if hardware.backend == "gpu" else 0
        for kind, size in _collectives(one, seen):
            found.count[kind] += times
            found.sent[kind] += times * size
    return found


def part_of(one: Instruction, rank: int) -> str:
    """What an operation is for: by the products in it, or else by the path that jax wrote."""
    if one.op.removesuffix("-start") in COLLECTIVES:
        return "collectives"
    path = one.find(r'op_name="([^"]*)"')
    linear, attention = LINEAR.search(path), ATTENTION.search(path)
    for inner in one.fused:
        sizes = _product(inner).sizes
        if sizes and linear and rank in sizes and "_proj" in path:
            return "LoRA's products"
        if sizes:
            return "attention" if attention and not linear else "matrices"
    if NORM.search(path):
        return "norms"
    if linear:
        return "beside products"
    if attention:
        return "attention"
    if "/mlp" in path:
        return "activation"
    return "embedding" if "embed" in path else "the rest"


# ---- seconds


def _cycles(one: Instruction) -> str:
    return one.find(r'"estimated_cycles":"(\d+)"')


def _seconds(one: Instruction, hardware: Hardware) -> float:
    """Of a TPU the cycles that its compiler expects, of a GPU the roofline."""
    if hardware.backend == "tpu":
        cycles = _cycles(one)
        return int(cycles) / hardware.clock if cycles and cycles != UNKNOWN else 0.0
    waits = one.op.endswith("-done") or one.op.removesuffix("-start") in COLLECTIVES
    if one.op in FREE or waits:
        return 0.0
    return max(_flops(one) / hardware.flops, _moved(one) / hardware.bandwidth, LAUNCH)


def _moved(one: Instruction) -> float:
    """The bytes that a GPU kernel reads and writes.

    Of an array that it only slices these are the slices, of one that it updates the update.
    """
    if one.op in SLICES:
        return 2 * one.bytes
    if not one.body:
        return one.bytes + sum(x.bytes for x in one.operands)
    parameters = [x for x in one.body.values() if x.op == "parameter"]
    result = root(one.body)
    results = result.operands if result.op == "tuple" else [result]
    return sum(_read(x) for x in parameters) + sum(_written(x) for x in results)


def _read(parameter: Instruction) -> float:
    """The bytes that a fusion reads of a parameter."""
    users = [x for x in parameter.computation.values() if parameter in x.operands]
    first = all(x.operands[0] is parameter for x in users)
    ops = {x.op for x in users}
    if first and ops == {"dynamic-update-slice"}:
        return 0.0  # updated in place
    if first and ops and ops <= SLICES:
        return min(sum(x.bytes for x in users), parameter.bytes)
    return parameter.bytes


def _written(result: Instruction) -> float:
    while result.op in ("bitcast", "copy") and result.operands:
        result = result.operands[0]
    return result.operands[1].bytes if result.op == "dynamic-update-slice" else result.bytes


# ---- collectives


def _collectives(one: Instruction, seen: set[tuple[int, str]]) -> Iterator[tuple[str, float]]:
    """(kind, bytes of the result) of the collectives that an instruction starts.

    Several fusions of a TPU may each do a part of one collective; it counts once. seen: those that
    were counted.
    """
    for inner in one.fused:
        kind = inner.op.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        channel = "" if inner is one else inner.find(r"channel_id=(\d+)")
        mark = (id(one.computation), channel or inner.name)
        if mark not in seen:
            seen.add(mark)
            yield kind, _result_bytes(inner, kind)


def _result_bytes(one: Instruction, kind: str) -> float:
    arrays = [array for array in one.arrays if array.sizes]
    begins = one.op.endswith("-start") and one.type.startswith("(")
    if begins and kind != "all-reduce":  # its operands come before its results
        arrays = arrays[len(arrays) // 2 :]
    return sum(array.bytes for array in arrays)


# ---- products


class Product(NamedTuple):
    """A matrix product. sizes: of the axes of its result and of its sum; none if it is none."""

    flops: float
    sizes: list[int]


def _flops(one: Instruction) -> float:
    return sum(_product(inner).flops for inner in one.fused)


def _product(one: Instruction) -> Product:
    """The matrix product that an instruction is, in whatever way its compiler writes it."""
    if one.op == "convolution":
        return _convolution(one)
    contracted = one.find(_CONTRACTED)
    if one.op == "dot" or (one.op == "custom-call" and contracted):
        left = one.operands[0].arrays[0].sizes
        summed = [left[axis] for axis in numbers(contracted.replace('"', ""))]
        sizes = one.arrays[0].sizes + summed
        return Product(2.0 * math.prod(sizes), sizes)
    return Product(0.0, [])


def _convolution(one: Instruction) -> Product:
    """A product as a TPU writes it.

    Axes of a batch are windows, of whose positions all but one meet padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    left = _axes(one.operands[0], labels[1])
    kernel = _axes(one.operands[1], labels[2])
    out = _axes(one, labels[3])
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", one.find(r"window={([^}]*)}")))
    pairs = 1
    for axis in out.keys() - {"b", "f"}:
        settings = {key: value.split("x")[int(axis)] for key, value in window.items()}
        pairs *= _pairs(left[axis], kernel[axis], out[axis], settings)
    sizes = [out["b"], out["f"], kernel["i"]]
    return Product(2.0 * math.prod(sizes) * pairs, sizes)


def _axes(one: Instruction, labels: str) -> dict[str, int]:
    return dict(zip(labels, one.arrays[0].sizes, strict=True))


def _pairs(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """How many pairs of a position of the result and one of the window meet no padding."""
    stride = int(window.get("stride", 1))
    dilation = int(window.get("lhs_dilate", 1))
    spread = int(window.get("rhs_dilate", 1))
    padding = int(window.get("pad", "0_0").split("_")[0])
    results = np.arange(out)[:, None] * stride
    positions = results + np.arange(kernel) * spread - padding
    last = (size - 1) * dilation
    inside = (positions >= 0) & (positions <= last)
    return int(np.sum(inside & (positions % dilation == 0)))
