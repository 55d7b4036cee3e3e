"""The few shapes of a server's passes, so that all of those for texts are compiled at the start.

`encode` fits its shapes to a long list of inputs, and a new shape costs seconds. Here inputs come
one by one, and a pass is padded to one of these shapes.
"""

from collections.abc import Sequence

import jax

from lco_jax.core.bins import bucket
from lco_jax.core.console import progress_bar
from lco_jax.core.packing import Stream
from lco_jax.core.stream_shapes import Shape, width_of
from lco_jax.data.inference import ShapeRule
from lco_jax.data.tower_rows import Processed
from lco_jax.embedder import OmniEmbedder

ROWS = (1, 4, 16, 64)  # of a pass, on each device
ROW_TOKENS = 4096  # rows times their width, at most, where there are several rows
# tokens of a stream, as parts of rows times width: inputs share the beginning of the template
EIGHTHS = (4, 5, 6, 8)
DOUBLING = 1024  # up to here a width is twice the one before; from here on the steps are finer
ROOM = 16  # tokens of a short text, beside its template and prompt


class PassShapes:
    """A function from the streams of a pass to their shape. Its values are few.

    shortest: tokens of an input whose text is empty. longest: of any input, as the model's context.
    """

    def __init__(self, shortest: int, longest: int):
        self.widths = _widths(shortest + ROOM, longest)

    def width(self, length: int) -> int:
        """The width of the rows that an input of `length` tokens gets."""
        return next(width for width in self.widths if width >= length)

    def most(self, width: int) -> int:
        """How many inputs of such rows a device gets in a pass."""
        return max(rows for rows in ROWS if rows == 1 or rows * width <= ROW_TOKENS)

    def __call__(self, streams: Sequence[Stream]) -> Shape:
        """The shape of a pass with these streams, one for each device."""
        width = self.width(max(len(at) for stream in streams for at in stream.at))
        need = max(len(stream.at) for stream in streams)
        rows = next(rows for rows in ROWS if rows >= need)
        tokens = max(stream.length for stream in streams)
        return Shape(
            next(some for some in _stream_sizes(rows, width) if some >= tokens), {width: rows}
        )

    def of_texts(self, longest: int) -> list[Shape]:
        """Every shape of passes whose inputs have at most `longest` tokens each."""
        widths = [width for width in self.widths if longest and width <= self.width(longest)]
        return [
            Shape(tokens, {width: rows})
            for width in widths
            for rows in ROWS
            if rows <= self.most(width)
            for tokens in _stream_sizes(rows, width)
        ]


def _widths(first: int, longest: int) -> list[int]:
    """Widths of rows, up to the one that holds `longest`."""
    widths = [width_of(first)]
    while widths[-1] < longest:
        doubled = widths[-1] <= DOUBLING
        widths.append(width_of(2 * widths[-1] if doubled else bucket(widths[-1] + 1, 4)))
    return widths


def _stream_sizes(rows: int, width: int) -> list[int]:
    """How many tokens a stream may have."""
    if rows == 1:
        return [width]
    return [rows * width * eighths // 8 for eighths in EIGHTHS]


def warm_up(embedder: OmniEmbedder, shapes: PassShapes, text: Processed, longest: int) -> int:
    """Compile the programs of texts of up to `longest` tokens, and have `embedder` use `shapes`.

    text: a short one. Returns how many programs these are.
    """
    wanted = shapes.of_texts(longest)
    for shape in progress_bar(wanted, desc="compiling", unit="shape", disable=not wanted):
        embedder.shape_of = _always(shape)
        jax.block_until_ready(embedder.embed([text]))
    embedder.shape_of = shapes
    return len(wanted)


def _always(shape: Shape) -> ShapeRule:
    """A rule that gives every pass this shape."""

    def rule(streams: Sequence[Stream]) -> Shape:
        return shape

    return rule
