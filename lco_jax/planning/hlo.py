"""What one device does in a partitioned program, counted from its HLO text: products and collectives, loops by trips.

Dimensions: G groups of n devices each that talk to one another.

The text is that which XLA has right after it splits the program over the mesh: dtypes are the program's own (its CPU
compiler widens bfloat16 afterwards), and collectives are those that were asked for. Its own count of FLOPs takes each
loop's body once, so nothing is taken from there.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:.* )?{$")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


class Instruction(NamedTuple):
    """type: what it returns; rest: the text after its opening parenthesis."""

    type: str
    op: str
    rest: str


@dataclass
class Counts:
    """Of one device and one run of the program.

    flops: of products, by precision: default, or highest (full float32). moved: bytes that products read and write.
    sent: bytes that the device sends in a ring, by (kind of collective, mesh axes, whether it reaches beyond a domain).
    """

    flops: Counter[str] = field(default_factory=Counter)
    moved: float = 0.0
    sent: Counter[tuple[str, str, bool]] = field(default_factory=Counter)


def count(text: str, mesh: dict[str, int], domain: int = 2**31) -> Counts:
    """Of a program. mesh: sizes of its axes, devices in row-major order; domain: how many in a row links join."""
    computations, entry = _parse(text)
    counts = Counts()

    def visit(name: str, times: int) -> None:
        mine = computations[name]
        for one in mine.values():
            kind = one.op.removesuffix("-start")
            if one.op == "while":
                called = dict(re.findall(r"(condition|body)=%?([\w.-]+)", one.rest))
                visit(called["body"], times * _trips(computations[called["condition"]], name))
            elif one.op in ("call", "fusion", "conditional"):
                branches = re.findall(r"(?:to_apply|calls|\w+_computation)=%?([\w.-]+)", one.rest)
                listed = re.search(r"branch_computations={([^}]*)}", one.rest)
                for branch in branches + (re.findall(r"[\w.-]+", listed[1]) if listed else []):
                    visit(branch, times)
            elif one.op == "dot":
                left, right = (mine[name].type for name in re.findall(r"[\w.-]+", one.rest.split(")")[0])[:2])
                (_, sizes), (_, out) = _arrays(left)[0], _arrays(one.type)[0]
                contracted = re.search(r"lhs_contracting_dims={([\d,]*)}", one.rest)[1]
                inner = math.prod(sizes[i] for i in _numbers(contracted))
                counts.flops["highest" if "{highest" in one.rest else "default"] += 2 * times * inner * math.prod(out)
                counts.moved += times * sum(map(_size, (left, right, one.type)))
            elif kind in COLLECTIVES:
                groups = _groups(one.rest)
                places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, G, n]
                axes = "+".join(a for a, at in zip(mesh, places, strict=True) if (at != at[:, :1]).any())
                far = bool((groups // domain != groups[:, :1] // domain).any())
                counts.sent[kind, axes, far] += times * _sent(kind, _size(one.type), groups.shape[1])

    visit(entry, 1)
    counts.sent = Counter({key: value for key, value in counts.sent.items() if value})
    return counts


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, which one the program is)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = mine = ""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            computations[mine][match[1]] = Instruction(*match.groups()[1:])
        elif match := _COMPUTATION.match(line):
            mine = match[2]
            computations[mine] = {}
            entry = mine if match[1] else entry
    return computations, entry


def _trips(condition: dict[str, Instruction], where: str) -> int:
    """How often a loop runs: jax's count from 0 up to a constant, the only whole number in their condition."""
    whole = (x for x in condition.values() if x.op == "constant" and x.type.startswith("s32[]"))
    limits = [int(x.rest.split(")")[0]) for x in whole]
    if len(limits) != 1:
        raise ValueError(f"a loop in {where} does not say how often it runs")
    return limits[0]


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _arrays(type_: str) -> list[tuple[str, list[int]]]:
    """(dtype, sizes) of an array type, or of each part of a tuple's."""
    return [(dtype, _numbers(sizes)) for dtype, sizes in _ARRAY.findall(type_) if dtype in BYTES]


def _size(type_: str) -> int:
    return sum(BYTES[dtype] * math.prod(sizes) for dtype, sizes in _arrays(type_))


def _groups(rest: str) -> np.ndarray:
    """Which devices talk to one another, [G, n], in each of the spellings that HLO has."""
    if listed := re.search(r"(?:source_target_pairs|replica_groups)={({.*?})}", rest):
        return np.array([_numbers(group) for group in re.findall(r"{([\d,]+)}", listed[1])])
    if iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", rest):
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    axes = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? {(.*?)}", rest)
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
    order = re.match(_IOTA, axes[2]) if axes[2] else None
    devices = _iota(order[1], order[2]) if order else np.arange(math.prod(sizes.values()))
    talking = re.findall(r"'(\w+)'", axes[3])
    last = [list(sizes).index(name) for name in talking]
    devices = np.moveaxis(devices.reshape(tuple(sizes.values())), last, range(-len(last), 0))
    return devices.reshape(-1, math.prod(sizes[name] for name in talking))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    devices = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return devices.transpose(_numbers(order) if order else range(devices.ndim)).ravel()


def _sent(kind: str, size: int, ways: int) -> float:
    """Bytes that a device sends in a ring of so many, for a result of `size` bytes."""
    if kind == "collective-permute":
        return size
    whole = size * ways if kind == "reduce-scatter" else size
    return (2 if kind == "all-reduce" else 1) * whole * (ways - 1) / ways
