"""Records -> batches of packed rows on the mesh: deterministic, shuffled, sharded by process, resumable (grain).

Dimensions: C GradCache chunks, R rows, T tokens in a row, S slots, B records, M hard negatives a record (the most).

Global batch k holds records [k·B, (k+1)·B) of the shuffled mixture on any number of processes: process p of P reads
those whose index is p modulo P. The position of the stream is one number, so a run can resume on another mesh.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import grain
import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.core.errors import LcoError
from lco_jax.core.packing import Batch, Placement, bucket, fill_rows, place
from lco_jax.core.sharding import ROWS, replicated, row_shards
from lco_jax.data.inputs import conversation
from lco_jax.data.processor import Processor, lay_media
from lco_jax.data.prompts import ChatTokenizer, as_messages
from lco_jax.data.records import Record, Side, side_key
from lco_jax.data.scan import Source
from lco_jax.data.sources import open_source
from lco_jax.data.tower_rows import Processed, TowerRows

ENDLESS = 2**40
MAX_SIDES = 1024  # a dropout identity is record · MAX_SIDES + side

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalBatch:
    """What one process read of a global batch: its inputs, and of each input its record, side and content's number.

    skipped: why records were left out (`on_bad` "skip").
    """

    inputs: list[Processed]
    record: np.ndarray
    side: np.ndarray
    content: np.ndarray
    placement: Placement
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Shapes that stay fixed through a run. chunk_rows: rows per shard and GradCache chunk; 0: one chunk.

    on_bad: whether a record whose media cannot be read stops the run ("error") or is left out of its batch ("skip").
    """

    batch_size: int
    row_length: int
    max_negatives: int
    chunk_rows: int = 0
    on_bad: str = "error"


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
    stream: grain.MapDataset, layout: Layout, processor: Processor, max_length: int | None, threads: int = 2
) -> grain.DatasetIterator:
    """This process's share of each global batch, prepared and placed ahead of time in threads."""
    processes, me = jax.process_count(), jax.process_index()
    if layout.batch_size % processes:
        raise LcoError(f"config.train.batch_size {layout.batch_size} does not divide by the {processes} processes")
    share = stream if processes == 1 else stream[me::processes]
    prepare = partial(_prepare, layout=layout, processor=processor, max_length=max_length, stride=processes, offset=me)
    batches = share.batch(layout.batch_size // processes, drop_remainder=True, batch_fn=list).map(prepare)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def _prepare(
    records: Sequence[Record],
    layout: Layout,
    processor: Processor,
    max_length: int | None,
    stride: int,
    offset: int,
) -> LocalBatch:
    sides = [
        (i, j, side)
        for i, record in enumerate(records)
        for j, side in enumerate(record.sides[: 2 + layout.max_negatives])
    ]
    names = [records[i].where for i, _, _ in sides]
    conversations = [
        conversation(x, name, processor.tokenizer, None, max_length) for (*_, x), name in zip(sides, names, strict=True)
    ]
    bad: dict[int, str] = {}
    results = processor.attempt(conversations, names)
    for (i, _, _), result in zip(sides, results, strict=True):
        if not isinstance(result, LcoError) and len(result) > layout.row_length:
            result = LcoError(
                f"{records[i].where}: a side of {len(result)} tokens (template included) does not fit "
                f"config.data.row_length {layout.row_length}; raise it, or lower config.data.max_length or the caps of "
                "config.data.media"
            )
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
        placement=place([len(result) for *_, result in kept], layout.row_length),
        skipped=tuple(bad.values()),
    )


def _number(side: Side) -> int:
    """A number that is equal for sides that say the same, in every process."""
    return int.from_bytes(blake2b(repr(side_key(side)).encode(), digest_size=4).digest(), "little", signed=True)


def global_batch(local: LocalBatch, layout: Layout, layouts: Mapping[str, TowerRows], mesh: Mesh) -> Batch:
    """Every process's share -> one `Batch` on the mesh. Processes agree on its shape, which takes few values.

    layouts: how each tower's rows are laid out (`Processor.rows`).
    """
    processes, me = jax.process_count(), jax.process_index()
    shards = row_shards(mesh) // processes  # the row shards that this process feeds
    place_ = local.placement
    need = _agree(np.array([place_.num_rows, place_.num_slots], np.int32))
    num_rows, num_slots = max(int(need[0]), 1), max(bucket(int(need[1]), 4), 8)
    per_shard = -(-num_rows // shards)
    if layout.chunk_rows:
        chunk_rows, chunks = layout.chunk_rows, bucket(-(-per_shard // layout.chunk_rows))
    else:
        chunk_rows, chunks = bucket(per_shard), 1
    here = chunk_rows * shards  # rows of one chunk on this process
    everywhere = here * processes

    chunk, row = np.divmod(place_.row, here)
    by_shard = [np.flatnonzero(row // chunk_rows == shard) for shard in range(shards)]
    media, laid = lay_media(layouts, [[local.inputs[i] for i in chosen] for chosen in by_shard], _agree)
    order = np.concatenate(by_shard)
    identity = (local.record * MAX_SIDES + local.side)[order]
    placed = Placement(*(x[order] for x in place_))
    sequences = [one for inputs in laid for one in inputs]
    rows = fill_rows(sequences, identity, placed, chunks * here, layout.row_length, num_slots)
    split, split_media = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, ROWS), (ROWS,)))

    def to_mesh(x: np.ndarray) -> Array:
        x = x.reshape(chunks, here, *x.shape[1:])
        return jax.make_array_from_process_local_data(split, x, (chunks, everywhere, *x.shape[2:]))

    def media_to_mesh(x: np.ndarray) -> Array:
        return jax.make_array_from_process_local_data(split_media, x, (len(x) * processes, *x.shape[1:]))

    slots = (chunk * everywhere + me * here + row) * num_slots + place_.slot
    table = np.full((2, layout.batch_size, 2 + layout.max_negatives), -1, np.int32)
    table[:, local.record, local.side] = slots, local.content
    if processes > 1:
        every = multihost_utils.process_allgather(table)  # a record is one process's, which has its slots
        table = np.where(every[:, :1] >= 0, every, np.iinfo(np.int32).min).max(axis=0)
        table[0] = np.maximum(table[0], -1)
    everywhere_same = [jax.make_array_from_callback(x.shape, replicated(mesh), x.__getitem__) for x in table]
    return Batch(rows.map(to_mesh), *everywhere_same, jax.tree.map(media_to_mesh, media))


def _agree(need: np.ndarray) -> np.ndarray:
    """The largest of every process's numbers."""
    return need if jax.process_count() == 1 else multihost_utils.process_allgather(need).max(axis=0)


def check_lengths(layout: Layout, tokenizer: ChatTokenizer, max_length: int) -> None:
    """Raise unless a row holds a text of `max_length` tokens with its template, so that none fails hours into a run."""
    template = len(tokenizer([as_messages("", "")])[0])
    if layout.row_length < max_length + template:
        raise LcoError(
            f"config.data.row_length {layout.row_length} does not hold config.data.max_length {max_length} tokens with "
            f"their template of {template}; it must be at least {max_length + template}"
        )


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
) -> Iterator[Batch]:
    """Global batches, one after the other. Says which records were left out."""
    for local in iterator:
        for reason in local.skipped:
            logger.warning("skipped: %s", reason)
        yield global_batch(local, layout, layouts, mesh)
