"""What a compiled program does, read from the text that its compiler writes: work, time, what is sent, and by what.

XLA's own count of FLOPs takes a loop's body once, and says nothing of parts; so its final text is read, each loop as
often as it runs. A TPU's compiler says how many cycles it expects of every operation, and these are summed. Of a GPU's
kernels the roofline is taken: the longer of FLOPs at the peak and of bytes at the memory's bandwidth. Neither is a
measurement, and neither knows how long a collective is waited for.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lco_jax.cost_model.hardware import Hardware

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4,
    "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# kernels of a GPU that move nothing, or whose work stands elsewhere
FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "after-all", "partition-id", "replica-id",
    "while", "call", "conditional",
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather"}
WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")
LINEAR = re.compile(r"_proj/|oi->|\.\.\.o")
ATTENTION = re.compile(r"_rows|_last|attn|splash|fmha|bkt[hs]|branch_\d_fun")
NORM = re.compile(r"layernorm|/norm\d?/")
UNKNOWN = str(2**63 - 1)  # cycles, where a TPU's compiler does not know
LAUNCH = 3e-6  # seconds that a GPU kernel takes at least
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?([\w.-]+) = ((?:\((?:[^()]|\([^()]*\))*\)|\S+)) ([\w-]+)\((.*)"
)
_TILED = re.compile(
    r"{[\d,]*:[^{}]*}|/\*.*?\*/"
)  # a layout with its tiles, whose parentheses would mislead
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*)?\{\s*$")
_CALLED = re.compile(r"(?:to_apply|calls|called_computation)=%?([\w.-]+)")


class Instruction(NamedTuple):
    """type: what it returns; rest: the text after its opening parenthesis; root: whether its computation returns it."""

    name: str
    type: str
    op: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """The names of what it takes."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        """The names of the computations that it runs, or has a choice of: the one for false before the one for true."""
        branches = re.search(r"branch_computations={([^}]*)}", self.rest)
        named = dict(re.findall(r"(true|false)_computation=%?([\w.-]+)", self.rest))
        choice = [named[key] for key in ("false", "true") if key in named]
        return (
            _CALLED.findall(self.rest)
            + choice
            + (re.findall(r"[\w.-]+", branches[1]) if branches else [])
        )

    @property
    def path(self) -> str:
        """Where in the model it is from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclass
class Profile:
    """What one device does in one run of a program.

    flops: of products. seconds: modelled, by part (`Program.part_of`). count, sent: of each kind of collective,
    how many are started, and the bytes of their results. launches: of a GPU, its kernels. unestimated: how often a TPU
    runs what its compiler has no estimate for, which is in no seconds.
    """

    flops: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    count: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    unestimated: int = 0


class Program:
    """A compiled program's text, parsed.

    rank: LoRA's, by which its products are told from a matrix's; 0: no LoRA. taken: how often a condition is true,
    which the text does not say.
    """

    def __init__(self, text: str, rank: int = 0, taken: float = 0.5):
        self.computations: dict[str, Computation] = {}
        self.rank, self.taken = rank, taken
        self.entry = mine = ""
        for line in text.splitlines():
            if match := _INSTRUCTION.match(_TILED.sub("", line)):
                one = Instruction(*match.groups(), root=line.lstrip().startswith("ROOT"))
                self.computations[mine][one.name] = one
            elif not line.startswith(" ") and (match := _COMPUTATION.match(line)):
                mine = match[2]
                self.computations[mine] = {}
                self.entry = mine if match[1] else self.entry

    def profile(self, hardware: Hardware) -> Profile:
        """What a device of this kind does; seconds of a TPU's or a GPU's own program alone mean anything."""
        found = Profile()
        for one, where, times in self._steps(self.entry, 1.0):
            found.flops += times * self._flops(one, where)
            seconds = times * self._seconds(one, where, hardware)
            found.unestimated += int(times) if f'"estimated_cycles":"{UNKNOWN}"' in one.rest else 0
            if seconds:
                found.seconds[self.part_of(one, where)] += seconds
                found.launches += int(times) if hardware.backend == "gpu" else 0
        for kind, size, times in self._collectives(self.entry, 1.0):
            found.count[kind] += times
            found.sent[kind] += times * size
        return found

    def _steps(self, name: str, times: float) -> Iterator[tuple[Instruction, Computation, float]]:
        """(instruction, its computation, how often it runs), through loops, calls and branches, not into fusions."""
        where = self.computations[name]
        for one in where.values():
            if one.op == "while":
                body, trips = self._loop(one, where)
                yield from self._steps(body, times * trips)
            elif one.op in ("call", "conditional", "async-start"):
                shares = [1.0] * len(one.called)
                if one.op == "conditional":
                    two = len(shares) == 2
                    shares = (
                        [1 - self.taken, self.taken] if two else [1 / len(shares)] * len(shares)
                    )
                for called, share in zip(one.called, shares, strict=True):
                    yield from self._steps(called, times * share)
            else:
                yield one, where, times

    def _loop(self, one: Instruction, where: Computation) -> tuple[str, int]:
        """(body, how often it runs): as the compiler says, or else jax's count from a start below a limit."""
        named = dict(re.findall(r"(condition|body)=%?([\w.-]+)", one.rest))
        if known := re.search(r'known_trip_count":{"n":"(\d+)"', one.rest):
            return named["body"], int(known[1])
        condition, body = self.computations[named["condition"]], self.computations[named["body"]]
        limits = [
            _constant(x)
            for x in condition.values()
            if x.op == "constant" and x.type[:3] in ("s32", "u32")
        ]
        counters = [x for x in condition.values() if x.op == "get-tuple-element"]
        if len(limits) != 1 or len(counters) != 1:
            raise ValueError(f"the loop {one.name} does not say how often it runs")
        index = _index(counters[0])
        start = self._start(where.get(one.operands[0]), where, index)
        return named["body"], max(-(-(limits[0] - start) // _step(body, index)), 0)

    def _start(self, given: Instruction | None, where: Computation, index: int) -> int:
        """The constant with which a loop's counter begins; 0 where it is not one."""
        if given is None or given.op != "tuple":
            return 0
        one = where.get(given.operands[index])
        while one is not None and one.op in ("copy", "bitcast", "convert"):
            one = where.get(one.operands[0])
        return _constant(one) if one is not None and one.op == "constant" else 0

    def _inner(
        self, one: Instruction, where: Computation
    ) -> Iterator[tuple[Instruction, Computation]]:
        """It, or what it fuses, however deep."""
        yield one, where
        if one.op == "fusion":
            inside = self.computations[one.called[0]]
            for part in inside.values():
                yield from self._inner(part, inside)

    def _flops(self, one: Instruction, where: Computation) -> float:
        return sum(_product_flops(part, inside)[0] for part, inside in self._inner(one, where))

    def _seconds(self, one: Instruction, where: Computation, hardware: Hardware) -> float:
        """Of one operation: a TPU's cycles as its compiler has them, a GPU kernel's roofline."""
        if hardware.backend == "tpu":
            cycles = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
            return int(cycles[1]) / hardware.clock if cycles and cycles[1] != UNKNOWN else 0.0
        if (
            one.op in FREE
            or one.op.endswith("-done")
            or one.op.removesuffix("-start") in COLLECTIVES
        ):
            return 0.0
        moved = self._moved(one, where) / hardware.bandwidth
        return max(self._flops(one, where) / hardware.flops, moved, LAUNCH)

    def _moved(self, one: Instruction, where: Computation) -> float:
        """Bytes that a kernel reads and writes: of what it only slices, the slices; of what it updates, the update."""
        inside = self.computations[one.called[0]] if one.op == "fusion" and one.called else {}
        if not inside:
            read = sum(_size(where[name].type) for name in one.operands if name in where)
            return read + _size(one.type) if one.op not in SLICES else 2 * _size(one.type)
        parameters = {_constant(x): x.name for x in inside.values() if x.op == "parameter"}
        read = sum(
            _read(inside, parameters[i]) for i in range(len(one.operands)) if i in parameters
        )
        root = next(x for x in inside.values() if x.root)
        parts = [inside[name] for name in root.operands] if root.op == "tuple" else [root]
        return read + sum(_written(part, inside) for part in parts)

    def _collectives(self, name: str, times: float) -> Iterator[tuple[str, float, float]]:
        """(kind, bytes of the result, how often). A TPU's may stand in several fusions, each of which does a part."""
        seen = set()
        for one, where, often in self._steps(name, times):
            for part, _ in self._inner(one, where):
                kind = part.op.removesuffix("-start")
                channel = None if part is one else re.search(r"channel_id=(\d+)", part.rest)
                mark = (id(where), channel[1] if channel else part.name)
                if kind in COLLECTIVES and mark not in seen:
                    seen.add(mark)
                    yield kind, _result_size(part, kind), often

    def part_of(self, one: Instruction, where: Computation) -> str:
        """What an operation is for: by the products in it, or else by the path that jax wrote down for it."""
        path = one.path
        if one.op.removesuffix("-start") in COLLECTIVES:
            return "collectives"
        linear, attention = LINEAR.search(path), ATTENTION.search(path)
        for part, inside in self._inner(one, where):
            _, sizes = _product_flops(part, inside)
            if sizes and linear and self.rank in sizes and "_proj" in path:
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


def _constant(one: Instruction) -> int:
    return int(one.rest.split(")")[0])


def _index(one: Instruction) -> int:
    return int(re.search(r"index=(\d+)", one.rest)[1])


def _step(body: Computation, index: int) -> int:
    """By how much a loop's body raises element `index` of what it carries: the constant that is added; else 1."""
    root = next(x for x in body.values() if x.root)
    if root.op != "tuple":
        return 1
    one = body.get(root.operands[index])
    while one is not None and one.op in ("copy", "bitcast"):
        one = body.get(one.operands[0])
    if one is None or one.op != "add":
        return 1
    added = [
        _constant(body[name])
        for name in one.operands
        if name in body and body[name].op == "constant"
    ]
    return added[0] if added else 1


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _arrays(type_: str) -> list[tuple[str, list[int]]]:
    """(dtype, sizes) of an array type, or of each part of a tuple's."""
    return [(dtype, _numbers(sizes)) for dtype, sizes in _ARRAY.findall(type_) if dtype in BYTES]


def _size(type_: str) -> float:
    return sum(BYTES[dtype] * math.prod(sizes) for dtype, sizes in _arrays(type_))


def _result_size(one: Instruction, kind: str) -> float:
    """Bytes of a collective's result; one that has only begun returns its operands before them, and numbers."""
    arrays = [(dtype, sizes) for dtype, sizes in _arrays(one.type) if sizes]
    if one.op.endswith("-start") and one.type.startswith("(") and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]
    return sum(BYTES[dtype] * math.prod(sizes) for dtype, sizes in arrays)


def _read(inside: Computation, parameter: str) -> float:
    """Bytes that a fusion reads of a parameter."""
    users = [x for x in inside.values() if parameter in x.operands]
    if users and all(x.op == "dynamic-update-slice" and x.operands[0] == parameter for x in users):
        return 0.0  # updated where it lies
    if users and all(x.op in SLICES and x.operands[0] == parameter for x in users):
        return min(sum(_size(x.type) for x in users), _size(inside[parameter].type))
    return _size(inside[parameter].type)


def _written(part: Instruction, inside: Computation) -> float:
    while part.op in ("bitcast", "copy") and part.operands[0] in inside:
        part = inside[part.operands[0]]
    if part.op == "dynamic-update-slice":
        return _size(inside[part.operands[1]].type)
    return _size(part.type)


def _product_flops(one: Instruction, where: Computation) -> tuple[float, list[int]]:
    """(FLOPs, sizes of the axes of result and sum) of a matrix product, however the compiler writes it; 0 of others."""
    if one.op == "dot":
        return _dot_flops(one, where, re.search(r"lhs_contracting_dims={([\d,]*)}", one.rest)[1])
    if one.op == "convolution":
        return _convolution_flops(one, where)
    if one.op == "custom-call" and (
        found := re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', one.rest)
    ):
        return _dot_flops(one, where, found[1].replace('"', ""))  # cuBLAS
    return 0.0, []


def _dot_flops(one: Instruction, where: Computation, contracted: str) -> tuple[float, list[int]]:
    left, out = _arrays(where[one.operands[0]].type)[0][1], _arrays(one.type)[0][1]
    summed = [left[i] for i in _numbers(contracted)]
    return 2.0 * math.prod(out) * math.prod(summed), out + summed


def _convolution_flops(one: Instruction, where: Computation) -> tuple[float, list[int]]:
    """A TPU writes every product as a convolution, batches as windows whose places but one meet padding."""
    left, kernel, out = (
        _arrays(type_)[0][1] for type_ in (*(where[x].type for x in one.operands[:2]), one.type)
    )
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    window = dict(
        re.findall(r"(\w+)=([\dx_-]+)", re.search(r"window={([^}]*)}|$", one.rest)[1] or "")
    )
    pairs = 1
    for i, axis in enumerate(sorted(set(labels[3]) - {"b", "f"})):
        at = {key: window[key].split("x")[i] if key in window else None for key in WINDOW}
        pairs *= _met(
            left[labels[1].index(axis)],
            kernel[labels[2].index(axis)],
            out[labels[3].index(axis)],
            at,
        )
    inner, batch, features = (
        kernel[labels[2].index("i")],
        out[labels[3].index("b")],
        out[labels[3].index("f")],
    )
    return 2.0 * batch * features * inner * pairs, [batch, features, inner]


def _met(size: int, kernel: int, out: int, at: dict[str, str | None]) -> int:
    """How many pairs of a place of the result and one of the window meet a number along one axis, and no padding."""
    stride, dilate, spread = (int(at[key] or 1) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int((at["pad"] or "0_0").split("_")[0])
    places = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * spread - low
    return int(((places >= 0) & (places < (size - 1) * dilate + 1) & (places % dilate == 0)).sum())
