"""The shape of packed streams: how many tokens, and how many rows of which width.

Shapes are few, because each is a program that has to be compiled.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lco_jax.core.bins import bucket

TILE = 128  # lanes of a TPU's registers
# Widths of rows, up to a million tokens. From 128 on they are multiples of 128, which the kernels
# tile, from 1,024 on of 256, from 2,048 on of 512. From 4,096 on, a row is at most an eighth
# longer than its sequence.
WIDTHS = (
    *(32, 48, 64, 96),
    *range(128, 1024, 128),
    *range(1024, 2048, 256),
    *range(2048, 4096, 512),
    *(eighths * 2**i for i in range(9, 17) for eighths in range(8, 16)),
    2**20,
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the arrays of a stream. tokens: T; rows: width W -> N; chunks: C; answers: A."""

    tokens: int = 0
    rows: Mapping[int, int] = field(default_factory=dict)
    chunks: int = 1
    answers: int = 0


def tiled(n: int) -> int:
    """n tokens, rounded up to a multiple of `TILE` where that costs little."""
    return -(-n // TILE) * TILE if n >= 32 * TILE else n


def width_of(length: int) -> int:
    """The width of the row that a sequence of `length` tokens gets."""
    return WIDTHS[bisect_left(WIDTHS, length)]


def padded_shape(need: Shape, floor: Shape) -> Shape:
    """A shape that holds `need`: `floor`'s sizes where they are enough, else one of few larger
    sizes.

    So batches that are alike have one shape. A sequence may get a wider row than it needs: what a
    group of rows lacks, the spare rows of wider groups provide.
    """
    rows = dict(floor.rows) or {WIDTHS[0]: 1}
    spare = 0  # rows of wider groups that are left over
    for width in sorted({*need.rows, *floor.rows}, reverse=True):
        needed = need.rows.get(width, 0)
        available = floor.rows.get(width, 0)
        missing = needed - available - spare
        if missing > 0:
            available = bucket(available + missing, 4)
            rows[width] = available
        spare += available - needed
    tokens, answers = floor.tokens, floor.answers
    if need.tokens > tokens:
        tokens = tiled(bucket(need.tokens, 16))
    if need.answers > answers:
        answers = bucket(need.answers, 16)
    return Shape(tokens, dict(sorted(rows.items())), max(need.chunks, floor.chunks), answers)


def in_widths(need: Shape, widths: Iterable[int]) -> Shape:
    """`need` with each row in the narrowest of `widths` that holds it, or unchanged without one.

    Streams whose longest sequences differ a little then need the same rows.
    """
    known = sorted(widths)
    rows = Counter[int]()
    for width, count in need.rows.items():
        fitting = next((one for one in known if one >= width), width)
        rows[fitting] += count
    return replace(need, rows=rows)


def largest(shapes: Iterable[Shape]) -> Shape:
    """The least shape that holds each of `shapes`."""
    shapes = list(shapes)
    widths = sorted({width for shape in shapes for width in shape.rows})
    return Shape(
        tokens=max(shape.tokens for shape in shapes),
        rows={width: max(shape.rows.get(width, 0) for shape in shapes) for width in widths},
        chunks=max(shape.chunks for shape in shapes),
        answers=max(shape.answers for shape in shapes),
    )
