"""Records -> batches of packed rows on the mesh: deterministic, shuffled, sharded by process, resumable (grain).

Dimensions: C GradCache chunks, R rows, T tokens in a row, S slots, B records, M hard negatives a record (the most).

Global batch k holds records [k·B, (k+1)·B) of the shuffled mixture on any number of processes: process p of P reads
those whose index is p modulo P. The position of the stream is one number, so a run can resume on another mesh.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from lco_jax.data.prompts import ChatTokenizer, as_messages
from lco_jax.data.records import Record
from lco_jax.data.sources import Source, open_source

MAX_SIDES = 1024  # a dropout identity is record · MAX_SIDES + side


@dataclass(frozen=True)
class LocalBatch:
    """What one process read of a global batch: token ids by sequence, and (record, side) of each sequence."""

    tokens: list[np.ndarray]
    record: np.ndarray
    side: np.ndarray
    placement: Placement


@dataclass(frozen=True)
class Layout:
    """Shapes that stay fixed through a run. chunk_rows: rows per shard and GradCache chunk; 0: one chunk."""

    batch_size: int
    row_length: int
    max_negatives: int
    chunk_rows: int = 0


def open_sources(config: Mapping[str, Any]) -> dict[str, Source]:
    """Open and check every entry of `config.data.sources`."""
    if not config["sources"]:
        raise LcoError("config.data.sources is empty; name at least one source")
    return {name: open_source(name, spec, config["on_bad"]) for name, spec in config["sources"].items()}


def record_stream(sources: Mapping[str, Source], weights: Mapping[str, float], seed: int) -> grain.MapDataset:
    """The endless shuffled mixture: every epoch of every source in another order, drawn in proportion to weight."""
    for name in sources:
        if not isinstance(weights[name], int | float) or not weights[name] > 0:
            raise LcoError(f"config.data.sources.{name}.weight is {weights[name]!r}; it must be a number above 0")
    parts = [
        grain.MapDataset.source(source).seed(seed + i).shuffle().repeat() for i, source in enumerate(sources.values())
    ]
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, [weights[name] for name in sources])


def local_batches(
    stream: grain.MapDataset, layout: Layout, tokenizer: ChatTokenizer, max_length: int | None
) -> grain.DatasetIterator:
    """This process's share of each global batch, tokenised and placed ahead of time in threads."""
    processes, me = jax.process_count(), jax.process_index()
    if layout.batch_size % processes:
        raise LcoError(f"config.train.batch_size {layout.batch_size} does not divide by the {processes} processes")
    share = stream if processes == 1 else stream[me::processes]
    prepare = partial(_prepare, layout=layout, tokenizer=tokenizer, max_length=max_length, stride=processes, offset=me)
    batches = share.batch(layout.batch_size // processes, drop_remainder=True, batch_fn=list).map(prepare)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _prepare(
    records: Sequence[Record],
    layout: Layout,
    tokenizer: ChatTokenizer,
    max_length: int | None,
    stride: int,
    offset: int,
) -> LocalBatch:
    conversations, index, side = [], [], []
    for i, record in enumerate(records):
        for j, text in enumerate(record.texts[: 2 + layout.max_negatives]):
            conversations.append(as_messages(tokenizer.cut(text, max_length), record.where))
            index.append(i * stride + offset)
            side.append(j)
    tokens = tokenizer(conversations, [records[(i - offset) // stride].where for i in index])
    for ids, i in zip(tokens, index, strict=True):
        if len(ids) > layout.row_length:
            raise LcoError(
                f"{records[(i - offset) // stride].where}: a text of {len(ids)} tokens (template included) does not "
                f"fit config.data.row_length {layout.row_length}; raise it, or lower config.data.max_length"
            )
    placement = place([len(ids) for ids in tokens], layout.row_length)
    return LocalBatch(tokens, np.array(index), np.array(side), placement)


def global_batch(local: LocalBatch, layout: Layout, mesh: Mesh) -> Batch:
    """Every process's share -> one `Batch` on the mesh. Processes agree on its shape, which takes few values."""
    processes, me = jax.process_count(), jax.process_index()
    shards = row_shards(mesh) // processes  # the row shards that this process feeds
    place_ = local.placement
    need = np.array([place_.num_rows, place_.num_slots], np.int32)
    if processes > 1:
        need = multihost_utils.process_allgather(need).max(axis=0)
    num_rows, num_slots = int(need[0]), -(-int(need[1]) // 8) * 8
    per_shard = -(-num_rows // shards)
    if layout.chunk_rows:
        chunk_rows, chunks = layout.chunk_rows, bucket(-(-per_shard // layout.chunk_rows))
    else:
        chunk_rows, chunks = bucket(per_shard), 1
    here = chunk_rows * shards  # rows of one chunk on this process
    everywhere = here * processes

    identity = local.record * MAX_SIDES + local.side
    rows = fill_rows(local.tokens, identity, place_, chunks * here, layout.row_length, num_slots)
    split = NamedSharding(mesh, PartitionSpec(None, ROWS))

    def to_mesh(x: np.ndarray) -> Array:
        x = x.reshape(chunks, here, *x.shape[1:])
        return jax.make_array_from_process_local_data(split, x, (chunks, everywhere, *x.shape[2:]))

    chunk, row = np.divmod(place_.row, here)
    slots = (chunk * everywhere + me * here + row) * num_slots + place_.slot
    sequences = np.full((layout.batch_size, 2 + layout.max_negatives), -1, np.int32)
    sequences[local.record, local.side] = slots
    if processes > 1:
        sequences = multihost_utils.process_allgather(sequences).max(axis=0)
    placed = jax.make_array_from_callback(sequences.shape, replicated(mesh), lambda index: sequences[index])
    return Batch(rows.map(to_mesh), placed)


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


def batches(iterator: grain.DatasetIterator, layout: Layout, mesh: Mesh) -> Iterator[Batch]:
    """Global batches, one after the other."""
    for local in iterator:
        yield global_batch(local, layout, mesh)
