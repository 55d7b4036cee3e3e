"""The text of a compiled program, parsed: its instructions, and how often each of them runs.

XLA's public counts take a loop's body once and know nothing of parts of a program, so we read the
text that its compilers write.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
    "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_INSTRUCTION = re.compile(
    r"\s+(ROOT )?%?([\w.-]+) = ((?:\((?:[^()]|\([^()]*\))*\)|\S+)) ([\w-]+)\((.*)"
)
_TILED = re.compile(r"{[\d,]*:[^{}]*}|/\*.*?\*/")  # layouts with tiles: their parentheses mislead
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*)?\{\s*$")
_CALLED = re.compile(r"(?:to_apply|calls|called_computation)=%?([\w.-]+)")


class Array(NamedTuple):
    """An array of a type: its dtype, as XLA calls it, and its sizes."""

    dtype: str
    sizes: list[int]

    @property
    def bytes(self) -> float:
        """Its size."""
        total = BYTES[self.dtype]
        for size in self.sizes:
            total *= size
        return total


@dataclass(eq=False)
class Instruction:
    """A line of a program.

    op: what it does. type: what it returns. rest: the text after its opening parenthesis. is_root:
    whether its computation returns it. computation: the instructions beside it, by name.
    program: the instructions of all computations, by the computations' names.
    """

    name: str
    op: str
    type: str
    rest: str
    is_root: bool
    computation: "Computation" = field(repr=False)
    program: "dict[str, Computation]" = field(repr=False)

    def find(self, pattern: str) -> str:
        """The first group of a pattern in its text; "" if it is not there."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    @cached_property
    def arrays(self) -> list[Array]:
        """The array that it returns, or those of the tuple that it returns."""
        found = _ARRAY.findall(self.type)
        return [Array(dtype, numbers(sizes)) for dtype, sizes in found if dtype in BYTES]

    @property
    def bytes(self) -> float:
        """The size of what it returns."""
        return sum(array.bytes for array in self.arrays)

    @cached_property
    def operands(self) -> list["Instruction"]:
        """What it takes."""
        names = re.findall(r"%([\w.-]+)", self.rest.split(")")[0])
        return [self.computation[name] for name in names if name in self.computation]

    @property
    def number(self) -> int:
        """The value of a constant, the position of a parameter."""
        return int(self.rest.split(")")[0])

    @property
    def index(self) -> int:
        """Which element of a tuple a get-tuple-element takes."""
        return int(self.find(r"index=(\d+)"))

    @cached_property
    def called(self) -> list[str]:
        """The computations that it runs, or has a choice of; the one for false before true's."""
        names = _CALLED.findall(self.rest)
        for kind in ("false", "true"):
            names += re.findall(rf"{kind}_computation=%?([\w.-]+)", self.rest)
        return names + re.findall(r"[\w.-]+", self.find(r"branch_computations={([^}]*)}"))

    @property
    def body(self) -> "Computation":
        """The computation of a fusion; empty for all others."""
        return self.program[self.called[0]] if self.op == "fusion" else {}

    @property
    def fused(self) -> Iterator["Instruction"]:
        """The instruction, and all that it fuses, at any depth."""
        yield self
        for inner in self.body.values():
            yield from inner.fused


Computation = dict[str, Instruction]


class Program:
    """A compiled program's text, parsed."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        for line in text.splitlines():
            match = _INSTRUCTION.match(_TILED.sub("", line))
            if match:
                root, name, type_, op, rest = match.groups()
                args = (name, op, type_, rest, bool(root), current, self.computations)
                current[name] = Instruction(*args)
                continue
            match = None if line.startswith(" ") else _COMPUTATION.match(line)
            if match:
                current = self.computations[match[2]] = {}
                if match[1]:
                    self.entry = match[2]

    def steps(self, taken: float = 0.5) -> Iterator[tuple[Instruction, float]]:
        """(instruction, how often it runs), through loops, calls and branches, not into fusions.

        taken: how often a condition is true, which the text does not say.
        """
        yield from self._steps(self.entry, 1.0, taken)

    def _steps(self, name: str, times: float, taken: float) -> Iterator[tuple[Instruction, float]]:
        for one in self.computations[name].values():
            if one.op == "while":
                yield from self._steps(one.find(r"body=%?([\w.-]+)"), times * trips(one), taken)
            elif one.op in ("call", "async-start"):
                for called in one.called:
                    yield from self._steps(called, times, taken)
            elif one.op == "conditional":
                shares = [1 / len(one.called)] * len(one.called)
                if len(shares) == 2:
                    shares = [1 - taken, taken]
                for called, share in zip(one.called, shares, strict=True):
                    yield from self._steps(called, times * share, taken)
            else:
                yield one, times


def numbers(text: str) -> list[int]:
    """The numbers of a list such as "1,2,3"."""
    return [int(x) for x in text.split(",") if x]


# ---- loops


def trips(loop: Instruction) -> int:
    """How often a loop runs: as its compiler says, or by jax's counter and its limit."""
    known = loop.find(r'known_trip_count":{"n":"(\d+)"')
    if known:
        return int(known)
    condition = loop.program[loop.find(r"condition=%?([\w.-]+)")].values()
    counters = [x for x in condition if x.op == "get-tuple-element"]
    limits = [x for x in condition if x.op == "constant" and x.type[:3] in ("s32", "u32")]
    if len(limits) != 1 or len(counters) != 1:
        raise ValueError(f"the loop {loop.name} does not say how often it runs")
    index = counters[0].index
    start = _constant(_element(loop.operands[0], index), default=0)
    body = loop.program[loop.find(r"body=%?([\w.-]+)")]
    step = _increment(_element(root(body), index))
    return max(-(-(limits[0].number - start) // step), 0)


def root(computation: Computation) -> Instruction:
    """The instruction that a computation returns."""
    return next(one for one in computation.values() if one.is_root)


def _element(tuple_: Instruction, index: int) -> Instruction | None:
    """The instruction that makes an element of a tuple, without copies of it; None if unknown."""
    if tuple_.op != "tuple":
        return None
    one = tuple_.operands[index]
    while one.op in ("copy", "bitcast", "convert") and one.operands:
        one = one.operands[0]
    return one


def _constant(one: Instruction | None, default: int) -> int:
    return one.number if one is not None and one.op == "constant" else default


def _increment(counter: Instruction | None) -> int:
    """The constant that is added to a counter; 1 if there is none."""
    if counter is None or counter.op != "add":
        return 1
    constants = [x.number for x in counter.operands if x.op == "constant"]
    return constants[0] if constants else 1
