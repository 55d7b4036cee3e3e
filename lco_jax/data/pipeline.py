"""Records -> batches of packed streams on the mesh: deterministic, shuffled, sharded by process, resumable (grain).

Dimensions: C GradCache chunks, R streams, B records, M hard negatives a record (the most).

Global batch k holds records [k·B, (k+1)·B) of the shuffled mixture on any number of processes: process p of P reads
those whose index is p modulo P. The position of the stream is one number, so a run can resume on another mesh.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.core.errors import LcoError
from lco_jax.core.packing import (
    WIDTHS,
    Batch,
    Shape,
    Stream,
    fill,
    fill_answers,
    fit,
    in_widths,
    largest,
    lay_stream,
    spread,
)
from lco_jax.core.sharding import ROWS, replicated, row_shards
from lco_jax.data.inputs import conversation
from lco_jax.data.processor import MediaRows, MediaShape, Processor, lay_media
from lco_jax.data.prompts import asked
from lco_jax.data.records import Record, Side, answer_of, side_key
from lco_jax.data.scan import Source
from lco_jax.data.sources import open_source
from lco_jax.data.tower_rows import Processed, TowerRows

ENDLESS = 2**40
MAX_SIDES = 1024  # a dropout identity is record · MAX_SIDES + side

logger = logging.getLogger(__name__)


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

    head: token ids with which texts begin, computed once a stream. chunk_tokens: how many tokens of its own a stream,
    and so a GradCache chunk, is to have, but for a single longer sequence; 0: one chunk. on_bad: whether a record whose
    media cannot be read stops the run ("error") or is left out of its batch ("skip"). generative: a record is one
    sequence, its anchor with the positive as the answer to it. floor, media_floor: the least shapes (`data/plan.py`).
    """

    batch_size: int
    max_negatives: int
    head: np.ndarray
    chunk_tokens: int = 0
    on_bad: str = "error"
    generative: bool = False
    floor: Shape = field(default_factory=Shape)
    media_floor: MediaShape = field(default_factory=dict)

    @property
    def sides(self) -> int:
        """The most sequences that a record has."""
        return 1 if self.generative else 2 + self.max_negatives


def open_sources(config: Mapping[str, Any]) -> dict[str, Source]:
    """Open and check every entry of `config.data.sources`."""
    if not config["sources"]:
        raise LcoError("config.data.sources is empty; name at least one source")
    return {name: open_source(name, spec, config["on_bad"]) for name, spec in config["sources"].items()}


def record_stream(
    sources: Mapping[str, Source], weights: Mapping[str, float], seed: int, run: int = 1
) -> grain.MapDataset:
    """The endless shuffled mixture: every epoch of every source in another order, drawn in proportion to weight.

    run: how many records in a row come from the same source; with that of a batch, batches are homogeneous.
    """
    for name in sources:
        if not isinstance(weights[name], int | float) or not weights[name] > 0:
            raise LcoError(f"config.data.sources.{name}.weight is {weights[name]!r}; it must be a number above 0")
    parts = [
        grain.MapDataset.source(source).seed(seed + i).shuffle().repeat() for i, source in enumerate(sources.values())
    ]
    if len(parts) == 1:
        return parts[0]
    shares = [weights[name] for name in sources]
    if run == 1:
        return grain.MapDataset.mix(parts, shares)
    turns = grain.MapDataset.mix(
        [grain.MapDataset.range(ENDLESS).map(partial(_turn, i)) for i in range(len(parts))], shares
    )

    def record(index: int) -> Record:
        part, turn = turns[index // run]
        return parts[part][turn * run + index % run]

    return grain.MapDataset.range(ENDLESS).map(record)


def _turn(part: int, turn: int) -> tuple[int, int]:
    return part, turn


def local_batches(
    stream: grain.MapDataset, layout: Layout, processor: Processor, max_length: int | None
) -> grain.MapDataset:
    """This process's share of each global batch."""
    processes, me = jax.process_count(), jax.process_index()
    if layout.batch_size % processes:
        raise LcoError(f"config.train.batch_size {layout.batch_size} does not divide by the {processes} processes")
    share = stream if processes == 1 else stream[me::processes]
    prepare = partial(_prepare, layout=layout, processor=processor, max_length=max_length, stride=processes, offset=me)
    return share.batch(layout.batch_size // processes, drop_remainder=True, batch_fn=list).map(prepare)


def ahead(local: grain.MapDataset, threads: int) -> grain.DatasetIterator:
    """The batches one after the other, prepared ahead of time in threads."""
    return iter(local.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def _prepare(
    records: Sequence[Record],
    layout: Layout,
    processor: Processor,
    max_length: int | None,
    stride: int,
    offset: int,
) -> LocalBatch:
    sides = [(i, j, side) for i, record in enumerate(records) for j, side in enumerate(record.sides[: layout.sides])]
    names = [records[i].where for i, _, _ in sides]
    prompt = asked if layout.generative else None
    conversations = [
        conversation(x, name, processor.tokenizer, prompt, max_length)
        for (*_, x), name in zip(sides, names, strict=True)
    ]
    bad: dict[int, str] = {}
    results = processor.attempt(conversations, names)
    if layout.generative:
        results = answered(results, records, processor, max_length)
    for (i, _, _), result in zip(sides, results, strict=True):
        if isinstance(result, LcoError):
            if layout.on_bad == "error":
                raise result
            bad.setdefault(i, str(result))
    kept = [(i, j, side, result) for (i, j, side), result in zip(sides, results, strict=True) if i not in bad]
    return LocalBatch(
        inputs=[result for *_, result in kept],
        record=np.array([i * stride + offset for i, *_ in kept], np.int64),
        side=np.array([j for _, j, *_ in kept], np.int64),
        content=np.array([_number(side) for *_, side, _ in kept], np.int32),
        skipped=tuple(bad.values()),
        where=tuple(record.where for record in records),
    )


def answered(
    prompts: Sequence[Processed | LcoError], records: Sequence[Record], processor: Processor, max_length: int | None
) -> list[Processed | LcoError]:
    """Each record's prompt with its positive as the answer, which is cut as texts are; an error for one that is bad."""
    found, texts = list(prompts), {}
    for i, record in enumerate(records):
        if not isinstance(found[i], LcoError):
            try:
                texts[i] = processor.tokenizer.cut(answer_of(record), max_length)
            except LcoError as error:
                found[i] = error
    for i, ids in zip(texts, processor.tokenizer.answers(list(texts.values())), strict=True):
        found[i] = processor.fitting(found[i].answered(ids), records[i].where)
    return found


def _number(side: Side) -> int:
    """A number that is equal for sides that say the same, in every process."""
    return int.from_bytes(blake2b(repr(side_key(side)).encode(), digest_size=4).digest(), "little", signed=True)


class LaidBatch(NamedTuple):
    """A process's share of a batch, laid into its streams. bins: of each input, its stream, chunk by chunk.

    members: of each stream, its inputs' numbers. media: makes the towers' rows.
    """

    chunks: int
    bins: np.ndarray
    members: list[np.ndarray]
    streams: list[Stream]
    media: Callable[[], MediaRows]
    media_shape: MediaShape


def lay_batch(local: LocalBatch, layout: Layout, layouts: Mapping[str, TowerRows], shards: int) -> LaidBatch:
    """Spread a share over the `shards` that this process feeds, and over chunks, and lay each part into its stream.

    layouts: how each tower's rows are laid out (`Processor.rows`).
    """
    own = [max(len(one) - len(layout.head), 1) for one in local.inputs]
    chunks = -(-sum(own) // (shards * layout.chunk_tokens)) if layout.chunk_tokens else 1
    chunks = max(int(agree(np.array([chunks]))[0]), layout.floor.chunks)
    bins = spread(own, chunks * shards)
    by_shard = [np.flatnonzero(bins % shards == shard) for shard in range(shards)]
    media, laid, media_shape = lay_media(
        layouts, [[local.inputs[i] for i in chosen] for chosen in by_shard], agree, layout.media_floor
    )
    sequences = dict(zip(np.concatenate(by_shard), (one for ones in laid for one in ones), strict=True))
    members = [np.flatnonzero(bins == i) for i in range(chunks * shards)]
    streams = [lay_stream([sequences[i] for i in chosen], layout.head) for chosen in members]
    return LaidBatch(chunks, bins, members, streams, media, media_shape)


def global_batch(local: LocalBatch, layout: Layout, layouts: Mapping[str, TowerRows], mesh: Mesh) -> Batch:
    """Every process's share -> one `Batch` on the mesh. Processes agree on its shape, which is nearly always the same.

    layouts: how each tower's rows are laid out (`Processor.rows`).
    """
    processes, me = jax.process_count(), jax.process_index()
    shards = row_shards(mesh) // processes  # the row shards that this process feeds
    laid = lay_batch(local, layout, layouts, shards)
    need = largest(in_widths(stream.need, layout.floor.rows) for stream in laid.streams)
    shape = fit(agree_shape(need), layout.floor)
    identities = [local.record[chosen] * MAX_SIDES + local.side[chosen] for chosen in laid.members]
    tokens, became = fill(laid.streams, identities, shape, layout.head)
    records = [local.record[chosen] for chosen in laid.members]
    answers = fill_answers(laid.streams, records, shape.answers) if layout.generative else None
    split, split_media = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, ROWS), (ROWS,)))

    def to_mesh(x: np.ndarray) -> Array:
        x = x.reshape(laid.chunks, shards, *x.shape[1:])
        return jax.make_array_from_process_local_data(split, x, (laid.chunks, shards * processes, *x.shape[2:]))

    def media_to_mesh(x: np.ndarray) -> Array:
        return jax.make_array_from_process_local_data(split_media, x, (len(x) * processes, *x.shape[1:]))

    which = np.zeros(len(local.inputs), np.int64)
    for chosen, slots in zip(laid.members, became, strict=True):
        which[chosen] = slots
    chunk, shard = np.divmod(laid.bins, shards)
    slots = (chunk * shards * processes + me * shards + shard) * tokens.last_tokens.shape[-1] + which
    table = np.full((2, layout.batch_size, layout.sides), -1, np.int32)
    table[:, local.record, local.side] = slots, local.content
    if processes > 1:
        every = multihost_utils.process_allgather(table)  # a record is one process's, which has its slots
        table = np.where(every[:, :1] >= 0, every, np.iinfo(np.int32).min).max(axis=0)
        table[0] = np.maximum(table[0], -1)
    everywhere_same = [jax.make_array_from_callback(x.shape, replicated(mesh), x.__getitem__) for x in table]
    tokens, answers = jax.tree.map(to_mesh, (tokens, answers))
    return Batch(tokens, *everywhere_same, jax.tree.map(media_to_mesh, laid.media()), answers)


def agree(need: np.ndarray) -> np.ndarray:
    """The largest of every process's numbers."""
    return need if jax.process_count() == 1 else multihost_utils.process_allgather(need).max(axis=0)


def agree_shape(need: Shape) -> Shape:
    """The least shape that holds every process's."""
    counts = [need.rows.get(width, 0) for width in WIDTHS]
    sizes = np.array([need.tokens, need.chunks, need.answers, *counts], np.int64)
    tokens, chunks, answers, *counts = (int(x) for x in agree(sizes))
    rows = {width: count for width, count in zip(WIDTHS, counts, strict=True) if count}
    return Shape(tokens, rows, chunks, answers)


def check_mesh(mesh: Mesh) -> None:
    """Raise unless every process holds whole rows: the tensor axis must not reach across processes."""
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    by_row = owners.reshape(row_shards(mesh), -1)
    in_order = np.repeat(np.arange(jax.process_count()), row_shards(mesh) // jax.process_count() or 1)
    if (by_row != by_row[:, :1]).any() or not np.array_equal(by_row[:, 0], in_order):
        raise LcoError(
            f"mesh {dict(mesh.shape)} over {jax.process_count()} processes: the tensor axis must stay within one "
            "process, and data × fsdp must be a multiple of the processes"
        )


def batches(
    iterator: grain.DatasetIterator, layout: Layout, layouts: Mapping[str, TowerRows], mesh: Mesh
) -> Iterator[tuple[Batch, tuple[str, ...]]]:
    """Global batches, each with the origins of this process's share of its records. Says which were left out."""
    for local in iterator:
        for reason in local.skipped:
            logger.warning("skipped: %s", reason)
        yield global_batch(local, layout, layouts, mesh), local.where
