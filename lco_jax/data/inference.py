"""Inputs that are ready for the model -> batches for one forward pass, few of whose sizes differ.

Dimensions: R streams (one a shard of the rows), T tokens of a stream, S sequences of a stream.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.core.errors import LcoError
from lco_jax.core.packing import PackedTokens, Shape, bucket, common_length, fill, lay_stream, spread, width_of
from lco_jax.core.sharding import ROWS, row_shards
from lco_jax.data.processor import lay_media
from lco_jax.data.tower_rows import Processed, TowerRows

MAX_TOKENS = 16_384  # in one forward pass, unless a single input has more
BLOCK_INPUTS, BLOCK_BYTES = 8192, 2**27  # inputs sorted by length and embedded together: at most so many, so large
FINE = 4096  # tokens beyond which a pass is padded by an eighth at most, and not by half


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
    prepared: Iterator[Processed | LcoError], block_inputs: int, raises: bool, units: Iterator[int] | None = None
) -> Iterator[list[Processed | LcoError]]:
    """Blocks of at most so many inputs and, but for a single large one, bytes. units: sizes; no block has of two."""
    ready: list[Processed | LcoError] = []
    held = left = 0
    for one in prepared:
        if isinstance(one, LcoError) and raises:
            raise one
        left = left or (next(units) if units else -1)
        left -= 1
        ready.append(one)
        held += 0 if isinstance(one, LcoError) else sum(placed.item.values.nbytes for placed in one.media)
        if len(ready) >= block_inputs or held >= BLOCK_BYTES or left == 0:
            yield ready
            ready, held = [], 0
    if ready:
        yield ready


def batches_of(ready: Sequence[Processed], batch_size: int | None, max_tokens: int) -> Iterator[list[int]]:
    """Which inputs go together: at most so many and, but for a single long one, tokens that they do not share.

    Short inputs join long ones, whose width their rows of attention then have, only where that costs little.
    """
    order = sorted(range(len(ready)), key=lambda i: (-width_of(len(ready[i])), ready[i].input_ids.tobytes()))
    batch: list[int] = []
    tokens = width = 0
    for i in order:
        ids, before = ready[i].input_ids, ready[batch[-1]] if batch else None
        shared = common_length(ids, before.input_ids) if before and not (before.media or ready[i].media) else 0
        costly = width_of(len(ids)) < width and (len(batch) + 1) * width > 2 * (tokens + FINE)
        if batch and (len(batch) == batch_size or tokens + len(ids) - shared > max_tokens or costly):
            yield batch
            batch, tokens, shared = [], 0, 0
        width = width if batch else width_of(len(ids))
        batch.append(i)
        tokens += len(ids) - shared
    if batch:
        yield batch


def lay(ready: Sequence[Processed], chosen: list[int], rows: dict[str, TowerRows], mesh: Mesh) -> InferenceBatch:
    """Pack the `chosen` inputs, what they have in common laid once. rows: of each tower."""
    batch, shards = [ready[i] for i in chosen], row_shards(mesh)
    bins = spread(map(len, batch), shards)
    members = [np.flatnonzero(bins == shard) for shard in range(shards)]
    media, laid, _ = lay_media(rows, [[batch[i] for i in mine] for mine in members])
    streams = [lay_stream(sequences, head=None) for sequences in laid]
    length, count = max(one.length for one in streams), max(map(len, members))
    width = width_of(max(map(len, batch)))  # one width for all: fewer programs, and the batch is alike in length
    shape = Shape(bucket(length, 8 if length > FINE else 2), {width: bucket(count, 2)})
    tokens, became = fill(streams, members, shape, head=None)
    sequences, at = np.zeros(len(batch), np.int64), [np.zeros(0, np.int32)] * len(batch)
    for shard, (mine, slots) in enumerate(zip(members, became, strict=True)):
        sequences[mine] = shard * tokens.last_tokens.shape[1] + slots
        for i, where in zip(mine, streams[shard].at, strict=True):
            at[i] = shard * shape.tokens + where
    split = NamedSharding(mesh, PartitionSpec(ROWS))
    tokens, media = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index]), (tokens, media())
    )
    return InferenceBatch(tokens, media, chosen, sequences, at)
