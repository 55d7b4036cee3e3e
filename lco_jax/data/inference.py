"""Model inputs -> batches for one forward pass each, with little padding and in few shapes.

Dimensions: R streams (one on each shard), T tokens of a stream, S slots of a stream.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.core.bins import bucket, cheapest_cut
from lco_jax.core.errors import LcoError
from lco_jax.core.packing import PackedTokens, Stream, fill, pack_stream
from lco_jax.core.prefixes import common_length
from lco_jax.core.sharding import ROWS
from lco_jax.core.stream_shapes import Shape, width_of
from lco_jax.data.packed_media import MediaRows, pack_media
from lco_jax.data.tower_rows import Processed, TowerRows

MAX_TOKENS = 16_384  # of a device in a forward pass, unless one input has more
BLOCK_INPUTS = 8192  # of a block at most; a block is sorted by length and embedded together
BLOCK_BYTES = 2**27  # of a block's media at most, for each shard
PASS = 2048  # tokens of a device that one more pass costs, which reads the weights again
PARTS = 16  # a cluster of inputs has at most this part of a shard's tokens
ShapeRule = Callable[[Sequence[Stream]], Shape]  # the streams of a batch -> what holds each of them


@dataclass
class EmbeddedBlock:
    """The vectors of consecutive inputs.

    first: the index of the first input.
    vectors: float32 [n, D]; NaN for a skipped input.
    skipped: index of a skipped input -> why.
    """

    first: int
    vectors: np.ndarray
    skipped: dict[int, str] = field(default_factory=dict)


class HostBatch(NamedTuple):
    """A batch on the host.

    tokens: `PackedTokens` of [R, …].
    media: makes the arguments of each tower.
    streams: what each of the R streams has.
    slots: for each stream, its inputs' slots.
    """

    tokens: PackedTokens
    media: Callable[[], MediaRows]
    streams: list[Stream]
    slots: list[np.ndarray]


class InferenceBatch(NamedTuple):
    """A batch on the mesh, its streams and tower rows sharded.

    tokens: `PackedTokens` of [R, …].
    media: the arguments of each tower: tower -> argument -> rows.
    inputs: the indices of the n inputs.
    slots: int [n], the slot of each input among all R · S.
    at: for each input, the indices of its tokens among all R · T.
    """

    tokens: PackedTokens
    media: dict[str, dict[str, Array]]
    inputs: list[int]
    slots: np.ndarray
    at: list[np.ndarray]


# ---- inputs -> blocks


def blocks_of(
    prepared: Iterator[Processed | LcoError],
    block_inputs: int,
    raises: bool,
    units: Iterator[int] | None = None,
    shards: int = 1,
) -> Iterator[list[Processed | LcoError]]:
    """Consecutive inputs in blocks of at most `block_inputs`, and of bounded bytes.

    raises: raise the first error, instead of handing it on. units: numbers of inputs; no block has
    inputs of two of them. shards: the bytes are bounded for each.
    """
    block: list[Processed | LcoError] = []
    block_bytes = 0
    left_of_unit: float = 0
    for one in prepared:
        if isinstance(one, LcoError) and raises:
            raise one
        if not left_of_unit:
            left_of_unit = next(units) if units else math.inf
        left_of_unit -= 1
        block.append(one)
        block_bytes += _media_bytes(one)
        full = len(block) >= block_inputs or block_bytes >= BLOCK_BYTES * shards
        if full or not left_of_unit:
            yield block
            block, block_bytes = [], 0
    if block:
        yield block


def _media_bytes(one: Processed | LcoError) -> int:
    if isinstance(one, LcoError):
        return 0
    return sum(tokens.medium.nbytes for tokens in one.media)


# ---- a block -> the inputs of each batch


def batches_of(
    ready: Sequence[Processed], batch_size: int | None, max_tokens: int, shards: int
) -> Iterator[list[list[int]]]:
    """For each batch, the inputs of each shard.

    A batch has at most `batch_size` inputs, and a shard at most `max_tokens` tokens, where shared
    tokens count once. If one input has more tokens, every shard may have as many. Short inputs join
    long ones, in rows of the long ones' width, where that costs less than another pass.
    """

    def widest_first(i: int) -> tuple[int, bytes]:
        """By width, then by tokens, so that inputs that begin alike are neighbours."""
        return -width_of(len(ready[i])), ready[i].input_ids.tobytes()

    order = sorted(range(len(ready)), key=widest_first)
    counts = Counter(width_of(len(one)) for one in ready)
    widths = sorted(counts, reverse=True)
    ends = np.cumsum([0, *(counts[width] for width in widths)])

    def cost(begin: int, end: int) -> float:
        inputs = ends[end] - ends[begin]
        return PASS * shards + inputs * _row_cost(widths[begin])

    for begin, end in cheapest_cut(len(widths), cost):
        stretch = order[ends[begin] : ends[end]]
        yield from _cut(ready, stretch, batch_size, max_tokens, shards)


def _row_cost(width: int) -> float:
    """What attention in a row costs, in tokens.

    Its cells are gathered and returned, and each query meets as many keys as the row is wide.
    """
    return width * (1 / 16 + width / 8192)


def _cut(
    ready: Sequence[Processed],
    order: list[int],
    batch_size: int | None,
    max_tokens: int,
    shards: int,
) -> Iterator[list[list[int]]]:
    """Batches of inputs, in their order."""
    limit = batch_size or len(order)
    limit_of_shard = -(-limit // shards) if batch_size else limit
    clusters = deque(_clusters(ready, order, min(limit, len(order)), max_tokens, shards))
    while clusters:
        filling = _Filling(ready, shards, limit_of_shard)
        room = limit
        while clusters and room:
            cluster = clusters.popleft()
            fitting, rest = cluster[:room], cluster[room:]
            if rest:
                clusters.appendleft(rest)
            if not filling.take(fitting, max_tokens):
                clusters.appendleft(fitting)
                break
            room -= len(fitting)
        yield filling.members if clusters else filling.evened().members


def _clusters(
    ready: Sequence[Processed], order: list[int], inputs: int, max_tokens: int, shards: int
) -> Iterator[list[int]]:
    """Neighbours that share more than half of their tokens, up to a small part of a shard.

    On different shards, each would have a copy of the shared tokens. inputs: of a batch, at most.
    """
    shard_tokens = min(sum(len(ready[i]) for i in order) // shards, max_tokens)
    most_tokens = shard_tokens // PARTS
    most_inputs = inputs // shards // PARTS
    cluster: list[int] = []
    tokens = 0
    for i in order:
        length = len(ready[i])
        shared = _shared(ready[cluster[-1]], ready[i]) if cluster else 0
        full = len(cluster) >= most_inputs or tokens + length - shared > most_tokens
        if cluster and (full or 2 * shared <= length):
            yield cluster
            cluster, tokens, shared = [], 0, 0
        cluster.append(i)
        tokens += length - shared
    if cluster:
        yield cluster


def _shared(a: Processed, b: Processed) -> int:
    """How many tokens two inputs share; inputs with media share none."""
    return 0 if a.media or b.media else common_length(a.input_ids, b.input_ids)


class _Filling:
    """A batch that is being filled.

    members: the inputs of each shard, at most about `limit` of them.
    fullest: the tokens of the shard that has the most.
    """

    def __init__(self, ready: Sequence[Processed], shards: int, limit: int):
        self.members: list[list[int]] = [[] for _ in range(shards)]
        self.fullest = 0
        self._ready = ready
        self._limit = limit
        self._open = [(0, shard) for shard in range(shards)]  # a heap: (tokens, shard)
        self._taken: list[tuple[int, list[int]]] = []  # clusters, with the tokens they took

    def take(self, cluster: list[int], max_tokens: float) -> bool:
        """Give a cluster to the shard with the fewest tokens; False if it has no room."""
        filled, shard = self._open[0]
        members = self.members[shard]
        tokens = self._new_tokens(members[-1:], cluster)
        if filled and filled + tokens > max(max_tokens, self.fullest):
            return False
        members += cluster
        self._taken.append((tokens, cluster))
        filled += tokens
        self.fullest = max(self.fullest, filled)
        heapq.heappop(self._open)
        if len(members) < self._limit:
            heapq.heappush(self._open, (filled, shard))
        return True

    def _new_tokens(self, before: list[int], cluster: list[int]) -> int:
        """The tokens of a cluster that it does not share. before: the input before it, if any."""
        neighbours = pairwise([*before, *cluster])
        shared = sum(_shared(self._ready[a], self._ready[b]) for a, b in neighbours)
        return sum(len(self._ready[i]) for i in cluster) - shared

    def evened(self) -> "_Filling":
        """The same clusters, taken from the largest on, if that makes the fullest shard smaller."""
        other = _Filling(self._ready, len(self.members), self._limit)
        for _, cluster in sorted(self._taken, key=itemgetter(0), reverse=True):
            other.take(cluster, math.inf)
        return min(self, other, key=attrgetter("fullest"))


# ---- the inputs of a batch -> the batch


def pack(
    ready: Sequence[Processed],
    members: list[list[int]],
    tower_rows: dict[str, TowerRows],
    shape_of: ShapeRule | None = None,
) -> HostBatch:
    """Pack each shard's inputs into its stream. members: of each shard, as of `batches_of`.

    shape_of: gives a batch its shape; by default `fitting_shape`.
    """
    inputs = [[ready[i] for i in chosen] for chosen in members]
    media, sequences = pack_media(tower_rows, inputs)
    streams = [pack_stream(one, prefix=None) for one in sequences]
    tokens, slots = fill(streams, members, (shape_of or fitting_shape)(streams), prefix=None)
    return HostBatch(tokens, media, streams, slots)


def fitting_shape(streams: Sequence[Stream]) -> Shape:
    """The shape of a batch, one of few; large batches are padded little.

    All rows have one width, for a batch's inputs are alike in length. Beyond 2,048 tokens, T is a
    multiple of 128.
    """
    tokens = max(stream.length for stream in streams)
    rows = max(len(stream.at) for stream in streams)
    longest = max(len(at) for stream in streams for at in stream.at)
    granularity = 16 if tokens > 2048 else 8
    if tokens <= 256:
        granularity = 2
    rows = bucket(rows, 4 if rows > 64 else 2)
    return Shape(bucket(tokens, granularity), {width_of(longest): rows})


def pack_on_mesh(
    ready: Sequence[Processed],
    members: list[list[int]],
    tower_rows: dict[str, TowerRows],
    mesh: Mesh,
    shape_of: ShapeRule | None = None,
) -> InferenceBatch:
    """`pack`, and send the batch to the mesh."""
    batch = pack(ready, members, tower_rows, shape_of)
    slots, at = [], []
    for shard, stream in enumerate(batch.streams):
        slots.append(shard * batch.tokens.last_tokens.shape[1] + batch.slots[shard])
        first_token = shard * batch.tokens.input_ids.shape[1]
        at += [first_token + tokens for tokens in stream.at]
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))

    def to_mesh(x: np.ndarray) -> Array:
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    tokens, media = jax.tree.map(to_mesh, (batch.tokens, batch.media()))
    inputs = [i for chosen in members for i in chosen]
    return InferenceBatch(tokens, media, inputs, np.concatenate(slots), at)
