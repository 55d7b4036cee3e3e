"""A process's share of a batch: its inputs, and the streams and tower rows that they are packed in.

Dimensions: C GradCache chunks, R streams that this process feeds in each chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lco_jax.core.bins import spread
from lco_jax.core.exchange import agree
from lco_jax.core.packing import TokenSequence, pack_stream
from lco_jax.core.prefixes import Prefixes
from lco_jax.core.stream_shapes import WIDTHS, Shape, in_widths, largest
from lco_jax.data.guide import GuideVectors
from lco_jax.data.instructions import Instruction
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
    """The inputs that one process read of a global batch.

    record, side, content: for each input, the number of its record in the global batch, its side
        (0: anchor, 1: positive, then negatives), and a number that equals that of equal contents.
    kinds: for each input, the bits of its modalities.
    teacher: for each input, a teacher's score of it with its record's anchor; NaN where there is
        none.
    guide: for each input, the vector of a guide, [·, G]; None without one.
    skipped: why records were skipped (`on_bad` "skip").
    where: the origin of every record of the share, in order.
    """

    inputs: list[Processed]
    record: np.ndarray
    side: np.ndarray
    content: np.ndarray
    kinds: np.ndarray
    teacher: np.ndarray
    guide: np.ndarray | None = None
    skipped: tuple[str, ...] = ()
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The settings that every batch of a run is packed with.

    prefix: what texts begin with, computed once a stream.
    chunk_tokens: how many tokens besides the prefix a stream of a chunk has at most, unless one
        sequence has more; 0: a batch is one chunk.
    on_bad: "error" stops the run at a record whose media cannot be read; "skip" skips the record.
    teacher: batches have a teacher's scores. guide: the vectors of another model, which they have,
        too.
    generative: a record is one sequence, its anchor with its positive as the answer.
    instructions: the different ones of its contents; None among them where some have none.
    floor, media_floor: the least shapes of streams and tower rows (`data/layouts.py`).
    """

    batch_size: int
    max_negatives: int
    prefix: Prefixes
    chunk_tokens: int = 0
    on_bad: str = "error"
    generative: bool = False
    teacher: bool = False
    guide: GuideVectors | None = None
    instructions: tuple[Instruction | None, ...] = (None,)
    floor: Shape = field(default_factory=Shape)
    media_floor: MediaShape = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """What is learned, as config.json and results.json of a run name it."""
        return "generative" if self.generative else "contrastive"

    @property
    def sides(self) -> int:
        """How many sequences a record has at most."""
        return 1 if self.generative else 2 + self.max_negatives


class Share:
    """A process's share of a batch, packed in two steps: `pack`, then `finish`.

    Each step takes numbers that all processes have agreed on, the largest of what each needs:
    to_pack: C, and the width of each tower's rows.
    to_finish: the sizes of streams as they are packed, and how many rows each tower has.

    After `finish`:
    bins: for each input its stream, of C · R that are numbered chunk by chunk.
    members: for each stream, the indices of its inputs.
    streams: what each stream has.
    need, media_need: the least shapes that hold every process's streams and tower rows.
    """

    def __init__(
        self,
        local: LocalBatch,
        layout: Layout,
        tower_rows: Mapping[str, TowerRows],
        shards: int,
    ):
        """tower_rows: how each tower's rows are filled (`Processor.rows`). shards: R."""
        self.local = local
        self.layout = layout
        self.shards = shards
        self._tower_rows = tower_rows
        self._towers = sorted(tower_rows)
        self._lengths = [layout.prefix.own(one.input_ids) for one in local.inputs]
        self.chunks = 1
        if layout.chunk_tokens:
            self.chunks = -(-sum(self._lengths) // (shards * layout.chunk_tokens))
        widths = row_widths(tower_rows, local.inputs)
        self.to_pack = np.array([self.chunks, *(widths[tower] for tower in self._towers)], np.int64)

    def pack(self, agreed: np.ndarray) -> None:
        """Choose each input's stream, and pack streams and tower rows. agreed: on `to_pack`."""
        chunks, *widths = map(int, agreed)
        self.chunks = max(chunks, self.layout.floor.chunks)
        bins = self.chunks * self.shards
        self.bins = spread(self._lengths, bins)
        self.members = [np.flatnonzero(self.bins == number) for number in range(bins)]
        self._pack_media(widths)
        all_sequences = self._sequences(self._media.need)
        self.streams = [pack_stream(one, self.layout.prefix) for one in all_sequences]
        widths_at_hand = self.layout.floor.rows
        need = largest(in_widths(stream.need, widths_at_hand) for stream in self.streams)
        counts = [self._media.need.get(tower, (0, 0))[1] for tower in self._towers]
        self.to_finish = np.array([*_sizes(need), *counts], np.int64)

    def _pack_media(self, widths: list[int]) -> None:
        """Pack the tower rows of each shard. widths: of each tower's rows."""
        padded = {}
        for tower, width in zip(self._towers, widths, strict=True):
            least, _ = self.layout.media_floor.get(tower, (0, 0))
            padded[tower] = max(width, least)
        shards = self.bins % self.shards
        self._by_shard = [np.flatnonzero(shards == number) for number in range(self.shards)]
        inputs = [[self.local.inputs[i] for i in chosen] for chosen in self._by_shard]
        self._media = PackedMedia(self._tower_rows, inputs, padded)

    def finish(self, agreed: np.ndarray) -> None:
        """Let sequences refer to tower rows of the agreed sizes. agreed: on `to_finish`."""
        sizes, counts = np.split(agreed, [len(agreed) - len(self._towers)])
        self.need = _shape(sizes)
        rows = dict(zip(self._towers, map(int, counts), strict=True))
        self.media_need = {
            tower: (width, rows[tower]) for tower, (width, _) in self._media.need.items()
        }
        self._media_shape = padded_media_shape(self.media_need, self.layout.media_floor)
        all_sequences = self._sequences(self._media_shape)
        self.streams = [
            stream._replace(sequences=sequences)
            for stream, sequences in zip(self.streams, all_sequences, strict=True)
        ]

    def _sequences(self, shape: MediaShape) -> list[list[TokenSequence]]:
        """Each stream's sequences. shape: of the tower rows that their media tokens come from."""
        by_shard = self._media.sequences(shape)
        sequences = {}
        for chosen, packed in zip(self._by_shard, by_shard, strict=True):
            sequences.update(zip(chosen, packed, strict=True))
        return [[sequences[i] for i in chosen] for chosen in self.members]

    def media_rows(self) -> MediaRows:
        """The arguments of each tower, filled."""
        return self._media.fill(self._media_shape)


def pack_batch(
    local: LocalBatch, layout: Layout, tower_rows: Mapping[str, TowerRows], shards: int
) -> Share:
    """A finished `Share`, with whose arguments it is called. Its agreements are collectives."""
    share = Share(local, layout, tower_rows, shards)
    share.pack(agree(share.to_pack))
    share.finish(agree(share.to_finish))
    return share


def agree_shape(need: Shape) -> Shape:
    """The least shape that holds every process's `need`."""
    return _shape(agree(_sizes(need)))


def _sizes(shape: Shape) -> np.ndarray:
    counts = [shape.rows.get(width, 0) for width in WIDTHS]
    return np.array([shape.tokens, shape.chunks, shape.answers, *counts], np.int64)


def _shape(sizes: np.ndarray) -> Shape:
    tokens, chunks, answers, *counts = map(int, sizes)
    rows = {width: count for width, count in zip(WIDTHS, counts, strict=True) if count}
    return Shape(tokens, rows, chunks, answers)
