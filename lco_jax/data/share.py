"""A process's share of a batch: what it holds, how it is laid into streams, and what processes agree on for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from lco_jax.core.packing import (
    WIDTHS,
    Shape,
    Stream,
    TokenSequence,
    in_widths,
    largest,
    pack_stream,
    spread,
)
from lco_jax.data.packed_media import (
    MediaRows,
    MediaShape,
    PackedMedia,
    padded_media_shape,
    row_widths,
)
from lco_jax.data.tower_rows import Processed, TowerRows


@dataclass(frozen=True)
class LocalBatch:
    """What one process read of a global batch: its inputs, and of each input its record, side and content's number.

    skipped: why records were left out (`on_bad` "skip"). where: the origin of every record of the share, in order.
    """

    inputs: list[Processed]
    record: np.ndarray
    side: np.ndarray
    content: np.ndarray
    skipped: tuple[str, ...] = ()
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What stays fixed through a run.

    prefix: token ids with which texts begin, computed once a stream. chunk_tokens: how many tokens of its own a stream,
    and so a GradCache chunk, is to have, but for a single longer sequence; 0: one chunk. on_bad: whether a record whose
    media cannot be read stops the run ("error") or is left out of its batch ("skip"). generative: a record is one
    sequence, its anchor with the positive as the answer to it. floor, media_floor: the least shapes (`data/layouts.py`).
    """

    batch_size: int
    max_negatives: int
    prefix: np.ndarray
    chunk_tokens: int = 0
    on_bad: str = "error"
    generative: bool = False
    floor: Shape = field(default_factory=Shape)
    media_floor: MediaShape = field(default_factory=dict)

    @property
    def sides(self) -> int:
        """The most sequences that a record has."""
        return 1 if self.generative else 2 + self.max_negatives


class PackedBatch(NamedTuple):
    """A process's share of a batch, laid into its streams. bins: of each input, its stream, chunk by chunk.

    members: of each stream, its inputs' numbers. need: the least shape that holds every process's
    streams. media: makes the towers' rows; media_need: the least shape that holds every process's.
    """

    chunks: int
    bins: np.ndarray
    members: list[np.ndarray]
    streams: list[Stream]
    need: Shape
    media: Callable[[], MediaRows]
    media_need: MediaShape


class Share:
    """A process's share of a batch, spread over the `shards` that it feeds, and over chunks, and
    laid into streams.

    Two times all processes agree on the most that one of them needs: on `first`, chunks and the
    width of each tower's rows, without which nothing can be packed; then on `second`, the sizes of
    streams and towers' rows as packed.
    layouts: how each tower's rows are laid out (`Processor.rows`).
    """

    def __init__(
        self, local: LocalBatch, layout: Layout, layouts: Mapping[str, TowerRows], shards: int
    ):
        self.local, self.layout, self.layouts, self.shards = local, layout, layouts, shards
        self.towers = sorted(layouts)
        self.own = [max(len(one) - len(layout.prefix), 1) for one in local.inputs]
        most = shards * layout.chunk_tokens
        chunks = -(-sum(self.own) // most) if most else 1
        widths = row_widths(layouts, local.inputs)
        self.first = np.array([chunks, *(widths[tower] for tower in self.towers)], np.int64)

    def pack(self, agreed: np.ndarray) -> None:
        """Lay it. agreed: on `first`. Afterwards there is `second`."""
        chunks, *widths = map(int, agreed)
        self.chunks = max(chunks, self.layout.floor.chunks)
        floor = self.layout.media_floor
        wide = {
            tower: max(width, floor.get(tower, (0, 0))[0])
            for tower, width in zip(self.towers, widths, strict=True)
        }
        self.bins = spread(self.own, self.chunks * self.shards)
        self.by_shard = [
            np.flatnonzero(self.bins % self.shards == shard) for shard in range(self.shards)
        ]
        shards = [[self.local.inputs[i] for i in chosen] for chosen in self.by_shard]
        self.media = PackedMedia(self.layouts, shards, wide)
        self.members = [np.flatnonzero(self.bins == i) for i in range(self.chunks * self.shards)]
        self.streams = [
            pack_stream(ones, self.layout.prefix) for ones in self._sequences(self.media.need)
        ]
        planned = self.layout.floor.rows
        need = largest(in_widths(stream.need, planned) for stream in self.streams)
        rows = [self.media.need.get(tower, (0, 0))[1] for tower in self.towers]
        self.second = np.array([*_sizes(need), *rows], np.int64)

    def packed(self, agreed: np.ndarray) -> PackedBatch:
        """The end of it. agreed: on `second`."""
        sizes, rows = np.split(agreed, [len(agreed) - len(self.towers)])
        counts = dict(zip(self.towers, map(int, rows), strict=True))
        media_need = {
            tower: (width, counts[tower]) for tower, (width, _) in self.media.need.items()
        }
        shape = padded_media_shape(media_need, self.layout.media_floor)
        streams = [
            stream._replace(
                sequences=ones
            )  # which lie where they lay, and know their media's tokens
            for stream, ones in zip(self.streams, self._sequences(shape), strict=True)
        ]
        return PackedBatch(
            self.chunks,
            self.bins,
            self.members,
            streams,
            _shape(sizes),
            partial(self.media.fill, shape),
            media_need,
        )

    def _sequences(self, media: MediaShape) -> list[list[TokenSequence]]:
        """Of each stream, if the towers' rows have a shape."""
        packed = (one for ones in self.media.sequences(media) for one in ones)
        sequences = dict(zip(np.concatenate(self.by_shard), packed, strict=True))
        return [[sequences[i] for i in chosen] for chosen in self.members]


def pack_batch(
    local: LocalBatch, layout: Layout, layouts: Mapping[str, TowerRows], shards: int
) -> PackedBatch:
    """A share, packed; what processes agree on they do at once. Arguments: as of `Share`."""
    share = Share(local, layout, layouts, shards)
    share.pack(agree(share.first))
    return share.packed(agree(share.second))


def agree(need: np.ndarray) -> np.ndarray:
    """The largest of every process's numbers."""
    return need if jax.process_count() == 1 else multihost_utils.process_allgather(need).max(axis=0)


def agree_shape(need: Shape) -> Shape:
    """The least shape that holds every process's."""
    return _shape(agree(_sizes(need)))


def _sizes(shape: Shape) -> np.ndarray:
    counts = [shape.rows.get(width, 0) for width in WIDTHS]
    return np.array([shape.tokens, shape.chunks, shape.answers, *counts], np.int64)


def _shape(sizes: np.ndarray) -> Shape:
    tokens, chunks, answers, *counts = map(int, sizes)
    rows = {width: count for width, count in zip(WIDTHS, counts, strict=True) if count}
    return Shape(tokens, rows, chunks, answers)
