"""Vectors of fewer numbers and fewer bits, as sentence-transformers makes them, and back.

Dimensions: N vectors, D numbers of each, W stored values of each (⌈D / 8⌉ bytes of signs, else D).
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError

LEVELS = ("int8", "uint8")  # each number as one of 256 levels of its dimension's range
SIGNS = ("binary", "ubinary")  # the sign of each number, eight in a byte
PRECISIONS = ("float32", "float16", *LEVELS, *SIGNS)
FEW = 100  # vectors, of which the ranges of their numbers are little more than a guess
BLOCK = 4096  # vectors that are restored at a time
logger = logging.getLogger(__name__)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, [..., D]."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def shortened(vectors: np.ndarray, dimension: int | None) -> np.ndarray:
    """The first `dimension` numbers of unit vectors [..., D], at length 1 again; None: all."""
    if dimension is None or dimension == vectors.shape[-1]:
        return vectors
    return unit(vectors[..., :dimension])


def quantize_embeddings(
    embeddings: Any,
    precision: str,
    ranges: Any = None,
    calibration_embeddings: Any = None,
) -> np.ndarray:
    """As sentence-transformers' function of this name, to the bit; "float16" is ours.

    embeddings: floats [N, D] or [D]. precision: one of `PRECISIONS`. For "int8" and "uint8" a
    number's level depends on the range of its dimension: the given ranges, [2, D] of least and
    most, or else those of calibration_embeddings [M, D], or else those of the embeddings. What lies
    outside of its range gets the first or last level. Returns [N, W] or [W]: float32, float16,
    int8 or uint8. "binary" is "ubinary" less 128.
    """
    check_precision(precision)
    vectors = np.asarray(embeddings)
    if vectors.dtype.kind != "f":
        raise LcoError(f"embeddings hold {vectors.dtype}; only floats can be quantized")
    if precision in ("float32", "float16"):
        return vectors.astype(precision)
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
    if vectors.ndim == 2 and not len(vectors):
        return vectors.astype(precision)
    if ranges is None:
        if calibration_embeddings is None and vectors.ndim == 2:
            warn_of_few(len(vectors), precision)
        given = vectors if calibration_embeddings is None else np.asarray(calibration_embeddings)
        ranges = ranges_of(given, precision)
    return _levels(vectors, precision, checked_ranges(ranges, vectors.shape[-1]))


def check_precision(precision: Any) -> None:
    """Raise for what is none of `PRECISIONS`."""
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise LcoError(f"precision is {precision!r:.60}; it is one of: {known}")


def ranges_of(vectors: np.ndarray, precision: str) -> np.ndarray:
    """The least and most of each number, [2, D], of vectors [N, D]. Raises for a single one."""
    if vectors.ndim != 2 or len(vectors) < 2:
        give = "give ranges, calibration_embeddings, or several vectors"
        raise LcoError(f"precision is {precision}, and a single vector has no range; {give}")
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def warn_of_few(count: int, precision: str) -> None:
    """Warn where ranges are of few vectors."""
    if count < FEW:
        logger.warning("%s: ranges of %d vectors are a rough guess", precision, count)


def checked_ranges(ranges: Any, dimension: int, where: str = "ranges") -> np.ndarray:
    """Ranges as float32 [2, D]. Raises for others. where: what errors call them."""
    found = np.asarray(ranges)
    if found.shape != (2, dimension) or found.dtype.kind not in "iuf":
        what = f"{found.dtype} of shape {found.shape}"
        raise LcoError(f"{where}: {what}; they must be numbers of shape (2, {dimension})")
    found = found.astype(np.float32)
    if not np.isfinite(found).all() or (found[0] > found[1]).any():
        raise LcoError(f"{where}: each least must be finite and no more than its most")
    return found


def _widths(ranges: np.ndarray) -> np.ndarray:
    """The widths of levels, [D]; 0 of a dimension without a range."""
    return (ranges[1] - ranges[0]) / 255


def _levels(vectors: np.ndarray, precision: str, ranges: np.ndarray) -> np.ndarray:
    widths = _widths(ranges)
    steps = np.where(widths == 0, 1, widths)  # a dimension without a range has one level
    levels = np.floor((vectors - ranges[0]) / steps).clip(0, 255)
    return (levels if precision == "uint8" else levels - 128).astype(precision)


def _as_float32(stored: np.ndarray) -> np.ndarray:
    return stored.astype(np.float32)


@dataclass(frozen=True)
class Storage:
    """How vectors of unit length are stored. dimension: D. ranges: of levels, [2, D]."""

    dimension: int
    precision: str = "float32"
    ranges: np.ndarray | None = None

    def __post_init__(self):
        check_precision(self.precision)
        if self.precision in LEVELS:
            ranges = checked_ranges(self.ranges, self.dimension)
            object.__setattr__(self, "ranges", ranges)

    @property
    def width(self) -> int:
        """W."""
        return -(-self.dimension // 8) if self.precision in SIGNS else self.dimension

    @property
    def dtype(self) -> np.dtype:
        """Of the stored values."""
        stored_as = {"binary": "int8", "ubinary": "uint8"}
        return np.dtype(stored_as.get(self.precision, self.precision)).newbyteorder("<")

    @property
    def bytes(self) -> int:
        """Of a vector."""
        return self.width * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dimension:,} numbers in {self.precision}, {self.bytes:,} bytes a vector"

    def store(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 [N, D or more] -> [N, W]. NaN stays NaN in floats alone."""
        vectors = shortened(vectors, self.dimension)
        if self.precision in LEVELS + SIGNS:
            vectors = np.nan_to_num(vectors)
        return quantize_embeddings(vectors, self.precision, self.ranges)

    def restore(self, stored: np.ndarray) -> np.ndarray:
        """What stored vectors [N, W] stand for, float32 [N, D]: the middle of each level; of signs,
        a vector of length 1.

        sentence-transformers restores the lower end of a level. That adds the same to the product
        of a query with every vector, so the order is the same.
        """
        if self.precision in SIGNS:
            signs = np.unpackbits(self.bits(stored), axis=-1, count=self.dimension)
            return (2 * signs.astype(np.float32) - 1) / np.float32(self.dimension**0.5)
        if self.precision not in LEVELS:
            return stored.astype(np.float32)
        steps, first = self._scale
        return stored.astype(np.float32) * steps + first

    @cached_property
    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """(the widths of levels, 0 of a dimension without a range; the middle of the level that is
        stored as 0), [D] each.
        """
        widths = _widths(self.ranges)
        before = 128 if self.precision == "int8" else 0
        return widths, self.ranges[0] + (before + np.float32(0.5)) * widths

    def bits(self, stored: np.ndarray) -> np.ndarray:
        """The signs of stored vectors, uint8 [N, ⌈D / 8⌉]."""
        if self.precision == "ubinary":
            return stored
        if self.precision == "binary":
            return (stored.astype(np.int16) + 128).astype(np.uint8)
        return quantize_embeddings(self.restore(stored), "ubinary")

    def all_bits(self, stored: np.ndarray) -> np.ndarray:
        """The same of many, a block at a time."""
        starts = range(0, len(stored), BLOCK)
        blocks = [self.bits(stored[start : start + BLOCK]) for start in starts]
        return np.concatenate(blocks or [np.zeros((0, -(-self.dimension // 8)), np.uint8)])

    def cosines(self, stored: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Of a query, float32 [D] of length 1, with stored vectors: [N]. The query is not rounded.

        They are exact of "float32", and approximate of all else.
        """
        if self.precision == "float32":
            return stored @ query
        restore, weights, constant = self.restore, query, np.float32(0)
        if self.precision in LEVELS:  # the same products, with one pass over what is stored
            steps, first = self._scale
            restore, weights, constant = _as_float32, query * steps, first @ query
        found = np.empty(len(stored), np.float32)
        for start in range(0, len(stored), BLOCK):
            block = slice(start, start + BLOCK)
            found[block] = restore(stored[block]) @ weights
        return found + constant


def words(bits: np.ndarray) -> np.ndarray:
    """Signs, uint8 [N, W], as uint64 [N, ⌈W / 8⌉], padded with zeros, for `distances`."""
    padding = -bits.shape[-1] % 8
    padded = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, padding)])
    return np.ascontiguousarray(padded).view(np.uint64)


def distances(signs: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Hamming's, of `words` [N, V] from those of a query [V]: how many signs differ, int64 [N]."""
    return np.bitwise_count(signs ^ query).sum(axis=-1, dtype=np.int64)


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """The indices of the lowest values, of equal ones the first, in no order."""
    if count >= len(values):
        return np.arange(len(values))
    last = np.partition(values, count - 1)[count - 1]
    lower = np.flatnonzero(values < last)
    return np.concatenate([lower, np.flatnonzero(values == last)[: count - len(lower)]])
