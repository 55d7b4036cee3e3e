"""Inputs that are ready for the model -> batches for one forward pass, few of whose sizes differ.

Dimensions: R streams (one a shard of the rows), T tokens of a stream, S sequences of a stream.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.core.errors import LcoError
from lco_jax.core.packing import (
    PackedTokens,
    Shape,
    Stream,
    bucket,
    common_length,
    fill,
    pack_stream,
    width_of,
)
from lco_jax.core.sharding import ROWS
from lco_jax.data.packed_media import MediaRows, pack_media
from lco_jax.data.tower_rows import Processed, TowerRows

MAX_TOKENS = 16_384  # of a device in one forward pass, unless a single input has more
BLOCK_INPUTS = 8192  # inputs sorted by length and embedded together: at most so many
BLOCK_BYTES = 2**27  # and of their media so many for each shard
PASS = (
    2048  # tokens of a device that one more pass costs: it reads the weights and rounds its shapes
)
PARTS = 16  # of a shard: inputs that share most of what they are are spread as one, up to a part


class InferenceBatch(NamedTuple):
    """tokens, and what each tower reads (tower -> argument -> rows): on the mesh, split over its rows.

    inputs: which inputs these are. sequences: of each, which of the R · S sequences it is: int [n]. at: of each, which
    of the R · T tokens are its own, in their order.
    """

    tokens: PackedTokens
    media: dict[str, dict[str, Array]]
    inputs: list[int]
    sequences: np.ndarray
    at: list[np.ndarray]


def blocks_of(
    prepared: Iterator[Processed | LcoError],
    block_inputs: int,
    raises: bool,
    units: Iterator[int] | None = None,
    shards: int = 1,
) -> Iterator[list[Processed | LcoError]]:
    """Blocks of at most so many inputs and, but for a single large one, bytes for each of the
    `shards`. units: sizes; no block has inputs of two."""
    ready: list[Processed | LcoError] = []
    held = left = 0
    for one in prepared:
        if isinstance(one, LcoError) and raises:
            raise one
        left = left or (next(units) if units else -1)
        left -= 1
        ready.append(one)
        if not isinstance(one, LcoError):
            held += sum(tokens.medium.nbytes for tokens in one.media)
        if len(ready) >= block_inputs or held >= BLOCK_BYTES * shards or left == 0:
            yield ready
            ready, held = [], 0
    if ready:
        yield ready


def batches_of(
    ready: Sequence[Processed], batch_size: int | None, max_tokens: int, shards: int
) -> Iterator[list[list[int]]]:
    """Which inputs go together, and which of them to each of the `shards`.

    A batch has at most so many inputs and, in a shard, tokens that its inputs do not share; but
    where a single input has more tokens, and then the other shards may have as many. Short inputs
    join long ones, whose width their rows of attention then have, where that costs little.
    """

    def by_width(i: int) -> tuple[int, bytes]:
        return -width_of(len(ready[i])), ready[i].input_ids.tobytes()  # the like lie side by side

    order = sorted(range(len(ready)), key=by_width)
    first = 0
    for count in _stretches(Counter(width_of(len(one)) for one in ready), shards):
        stretch = order[first : first + count]
        yield from _cut(ready, stretch, batch_size, max_tokens, shards)
        first += count


def _stretches(widths: Counter[int], shards: int) -> list[int]:
    """How many inputs, the longest first, have rows of the longest's width, how many follow that
    have rows of the longest's among them, and so on. widths: how many inputs are of each width."""
    counts = sorted(widths.items(), reverse=True)
    best: list[tuple[float, list[int]]] = [(0.0, [])]  # of the n largest widths: cost, stretches
    for end in range(1, len(counts) + 1):
        options = []
        for begin in range(end):
            width, inputs = counts[begin][0], sum(count for _, count in counts[begin:end])
            cost, stretches = best[begin]
            cost += PASS * shards + inputs * _row_cost(width)
            options.append((cost, [*stretches, inputs]))
        best.append(min(options, key=itemgetter(0)))
    return best[-1][1]


def _row_cost(width: int) -> float:
    """What a row costs attention, in tokens: its slots are gathered there and back, and each meets
    as many keys as the row is wide."""
    return width * (1 / 16 + width / 8192)


def _cut(
    ready: Sequence[Processed],
    order: list[int],
    batch_size: int | None,
    max_tokens: int,
    shards: int,
) -> Iterator[list[list[int]]]:
    """Batches of inputs in their order."""
    limit = batch_size or len(order)
    of_shard = -(-batch_size // shards) if batch_size else len(order)
    units = deque(_units(ready, order, min(limit, len(order)), max_tokens, shards))
    filling, room = _Filling(ready, shards, of_shard), limit
    while units:
        unit = units.popleft()
        if len(unit) > room:
            units.appendleft(unit[room:])
            unit = unit[:room]
        if filling.take(unit, max_tokens):
            room -= len(unit)
        else:
            units.appendleft(unit)
            room = 0
        if not units:
            yield filling.evened().members
        elif not room:
            yield filling.members
            filling, room = _Filling(ready, shards, of_shard), limit


def _units(
    ready: Sequence[Processed], order: list[int], inputs: int, max_tokens: int, shards: int
) -> Iterator[list[int]]:
    """Neighbours that share more than half of what they are, up to a small part of what a shard
    will have: apart, each of their shards would have again what they share. inputs: of a batch, at
    most."""
    most = min(sum(len(ready[i]) for i in order) // shards, max_tokens) // PARTS
    most_inputs = inputs // shards // PARTS
    unit: list[int] = []
    tokens = 0
    for i in order:
        length = len(ready[i])
        shared = _shared(ready[unit[-1]], ready[i]) if unit else 0
        full = len(unit) >= most_inputs or tokens + length - shared > most
        if unit and (full or 2 * shared <= length):
            yield unit
            unit, tokens, shared = [], 0, 0
        unit.append(i)
        tokens += length - shared
    if unit:
        yield unit


def _shared(a: Processed, b: Processed) -> int:
    """How many tokens they have in common at their beginning; media are never shared."""
    return 0 if a.media or b.media else common_length(a.input_ids, b.input_ids)


class _Filling:
    """A batch on its way. members: the inputs of each shard, at most about `inputs`. fullest: tokens
    of the shard that has the most."""

    def __init__(self, ready: Sequence[Processed], shards: int, inputs: int):
        self.members: list[list[int]] = [[] for _ in range(shards)]
        self.fullest = 0
        self._ready, self._inputs = ready, inputs
        self._open = [(0, shard) for shard in range(shards)]  # a heap of tokens
        self._taken: list[tuple[int, list[int]]] = []  # units with the tokens that they took

    def take(self, unit: list[int], max_tokens: float) -> bool:
        """Give a unit to the shard with the fewest tokens; False if that has no room for it."""
        filled, shard = self._open[0]
        mine = self.members[shard]
        pairs = pairwise([*mine[-1:], *unit])
        shared = sum(_shared(self._ready[a], self._ready[b]) for a, b in pairs)
        tokens = sum(len(self._ready[i]) for i in unit) - shared
        if filled and filled + tokens > max(max_tokens, self.fullest):
            return False
        mine += unit
        self._taken.append((tokens, unit))
        self.fullest = max(self.fullest, filled + tokens)
        heapq.heappop(self._open)
        if len(mine) < self._inputs:
            heapq.heappush(self._open, (filled + tokens, shard))
        return True

    def evened(self) -> "_Filling":
        """The same units, the largest first, or as they lie if that fills the fullest shard less."""
        other = _Filling(self._ready, len(self.members), self._inputs)
        for _, unit in sorted(self._taken, key=itemgetter(0), reverse=True):
            other.take(unit, math.inf)
        return min(self, other, key=attrgetter("fullest"))


class PackedBlock(NamedTuple):
    """A batch on the host: what `InferenceBatch` has, before it is on the mesh. streams: what lies in each stream."""

    tokens: PackedTokens
    media: Callable[[], MediaRows]
    streams: list[Stream]
    became: list[np.ndarray]


def pack(
    ready: Sequence[Processed], members: list[list[int]], rows: dict[str, TowerRows]
) -> PackedBlock:
    """Lay each shard's inputs into its stream, what they have in common packed once. rows: of each tower."""
    media, packed = pack_media(rows, [[ready[i] for i in mine] for mine in members])
    streams = [pack_stream(sequences, prefix=None) for sequences in packed]
    shape = _shape(streams)
    tokens, became = fill(streams, members, shape, prefix=None)
    return PackedBlock(tokens, media, streams, became)


def _shape(streams: Sequence[Stream]) -> Shape:
    """Few values, that waste little where a batch is large. Rows have one width: fewer programs,
    and a batch is alike in length. From 2,048 tokens on, T is a multiple of 128."""
    length, count = (
        max(sizes) for sizes in ((x.length for x in streams), (len(x.at) for x in streams))
    )
    tokens = bucket(length, 16 if length > 2048 else 8 if length > 256 else 2)
    width = width_of(max(len(at) for stream in streams for at in stream.at))
    return Shape(tokens, {width: bucket(count, 4 if count > 64 else 2)})


def pack_on_mesh(
    ready: Sequence[Processed], members: list[list[int]], rows: dict[str, TowerRows], mesh: Mesh
) -> InferenceBatch:
    """`pack`, and put it on the mesh."""
    packed = pack(ready, members, rows)
    sequences, at = [], []
    for shard, (stream, slots) in enumerate(zip(packed.streams, packed.became, strict=True)):
        sequences.append(shard * packed.tokens.last_tokens.shape[1] + slots)
        at += [shard * packed.tokens.input_ids.shape[1] + where for where in stream.at]
    split = NamedSharding(mesh, PartitionSpec(ROWS))
    tokens, media = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index]),
        (packed.tokens, packed.media()),
    )
    return InferenceBatch(
        tokens, media, [i for mine in members for i in mine], np.concatenate(sequences), at
    )
