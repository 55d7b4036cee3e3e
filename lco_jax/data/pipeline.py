"""Records -> batches of packed streams on the mesh: deterministic, shuffled, sharded by process, resumable (grain).

Dimensions: C GradCache chunks, R streams, B records, M hard negatives a record (the most).

Global batch k holds records [k·B, (k+1)·B) of the shuffled mixture on any number of processes: process p of P reads
those whose index is p modulo P. The position of the stream is one number, so a run can resume on another mesh.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.core.errors import LcoError
from lco_jax.core.exchange import Exchange
from lco_jax.core.packing import Batch, fill, fill_answers, padded_shape
from lco_jax.core.sharding import ROWS, row_shards
from lco_jax.data.inputs import conversation, one_ahead
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import asked
from lco_jax.data.records import Content, Record, answer_of, content_key
from lco_jax.data.scan import Source
from lco_jax.data.share import Layout, LocalBatch, PackedBatch, Share, pack_batch
from lco_jax.data.sources import open_source
from lco_jax.data.tower_rows import Processed, TowerRows

ENDLESS = 2**40
MAX_SIDES = 1024  # a dropout identity is record · MAX_SIDES + side

logger = logging.getLogger(__name__)


def open_sources(config: Mapping[str, Any]) -> dict[str, Source]:
    """Open and check every entry of `config.data.sources`."""
    if not config["sources"]:
        raise LcoError("config.data.sources is empty; name at least one source")
    return {
        name: open_source(name, spec, config["on_bad"]) for name, spec in config["sources"].items()
    }


def record_stream(
    sources: Mapping[str, Source], weights: Mapping[str, float], seed: int, run: int = 1
) -> grain.MapDataset:
    """The endless shuffled mixture: every epoch of every source in another order, drawn in proportion to weight.

    run: how many records in a row come from the same source; with that of a batch, batches are homogeneous.
    """
    for name in sources:
        if not isinstance(weights[name], int | float) or not weights[name] > 0:
            raise LcoError(
                f"config.data.sources.{name}.weight is {weights[name]!r}; it must be a number above 0"
            )
    parts = [
        grain.MapDataset.source(source).seed(seed + i).shuffle().repeat()
        for i, source in enumerate(sources.values())
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
        raise LcoError(
            f"config.train.batch_size {layout.batch_size} does not divide by the {processes} processes"
        )
    share = stream if processes == 1 else stream[me::processes]
    prepare = partial(
        _prepare,
        layout=layout,
        processor=processor,
        max_length=max_length,
        stride=processes,
        offset=me,
    )
    return share.batch(layout.batch_size // processes, drop_remainder=True, batch_fn=list).map(
        prepare
    )


def ahead(local: grain.MapDataset, threads: int) -> grain.DatasetIterator:
    """The batches one after the other, prepared ahead of time in threads."""
    return iter(
        local.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
    )


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
        for j, side in enumerate(record.sides[: layout.sides])
    ]
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
    kept = [
        (i, j, side, result)
        for (i, j, side), result in zip(sides, results, strict=True)
        if i not in bad
    ]
    return LocalBatch(
        inputs=[result for *_, result in kept],
        record=np.array([i * stride + offset for i, *_ in kept], np.int64),
        side=np.array([j for _, j, *_ in kept], np.int64),
        content=np.array([_number(side) for *_, side, _ in kept], np.int32),
        skipped=tuple(bad.values()),
        where=tuple(record.where for record in records),
    )


def answered(
    prompts: Sequence[Processed | LcoError],
    records: Sequence[Record],
    processor: Processor,
    max_length: int | None,
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
        found[i] = processor.checked_length(found[i].answered(ids), records[i].where)
    return found


def _number(side: Content) -> int:
    """A number that is equal for sides that say the same, in every process."""
    return int.from_bytes(
        blake2b(repr(content_key(side)).encode(), digest_size=4).digest(), "little", signed=True
    )


def to_devices(local: LocalBatch, packed: PackedBatch, layout: Layout, mesh: Mesh) -> Batch:
    """Fill a share's arrays and send them to this process's devices. No other process is waited
    for."""
    processes, shards = jax.process_count(), row_shards(mesh) // jax.process_count()
    shape = padded_shape(packed.need, layout.floor)
    identities = [
        local.record[chosen] * MAX_SIDES + local.side[chosen] for chosen in packed.members
    ]
    tokens, became = fill(packed.streams, identities, shape, layout.prefix)
    records = [local.record[chosen] for chosen in packed.members]
    answers = fill_answers(packed.streams, records, shape.answers) if layout.generative else None

    def to_mesh(x: np.ndarray, *axes: str | tuple[str, ...] | None) -> Array:
        sizes = [n * processes if axis else n for n, axis in zip(x.shape, axes, strict=False)]
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_process_local_data(place, x, (*sizes, *x.shape[len(axes) :]))

    def in_chunks(x: np.ndarray) -> Array:
        return to_mesh(x.reshape(packed.chunks, shards, *x.shape[1:]), None, ROWS)

    tables = _tables(local, packed, became, tokens.last_tokens.shape[-1], layout, shards)
    tokens, answers = jax.tree.map(in_chunks, (tokens, answers))
    media = jax.tree.map(lambda x: to_mesh(x, ROWS), packed.media())
    split = (None, ROWS) if processes > 1 else ()
    sequences, content = (to_mesh(table, *split) for table in tables)
    return Batch(tokens, sequences, content, media, answers)


def _tables(
    local: LocalBatch,
    packed: PackedBatch,
    became: list[np.ndarray],
    slots: int,
    layout: Layout,
    shards: int,
) -> np.ndarray:
    """This process's part of the batch's `sequences` and `content`, one behind the other.

    became: as of `fill`; slots: sequences of a stream.
    """
    processes, me = jax.process_count(), jax.process_index()
    which = np.zeros(len(local.inputs), np.int64)
    for chosen, numbers in zip(packed.members, became, strict=True):
        which[chosen] = numbers
    chunk, shard = np.divmod(packed.bins, shards)
    at = (chunk * shards * processes + me * shards + shard) * slots + which
    table = np.full((2, layout.batch_size // processes, layout.sides), -1, np.int32)
    table[:, local.record // processes, local.side] = at, local.content
    if processes == 1:
        return table
    split = np.full((*table.shape[:2], shards, layout.sides), -1, np.int32)
    split[:, :, 0] = table
    return split


def global_batch(
    local: LocalBatch, layout: Layout, layouts: Mapping[str, TowerRows], mesh: Mesh
) -> Batch:
    """Every process's share -> one `Batch` on the mesh, at once. layouts: as of `Share`."""
    shards = row_shards(mesh) // jax.process_count()
    return to_devices(local, pack_batch(local, layout, layouts, shards), layout, mesh)


def check_mesh(mesh: Mesh) -> None:
    """Raise unless every process holds whole rows: the tensor axis must not reach across processes."""
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    by_row = owners.reshape(row_shards(mesh), -1)
    in_order = np.repeat(
        np.arange(jax.process_count()), row_shards(mesh) // jax.process_count() or 1
    )
    if (by_row != by_row[:, :1]).any() or not np.array_equal(by_row[:, 0], in_order):
        raise LcoError(
            f"mesh {dict(mesh.shape)} over {jax.process_count()} processes: the tensor axis must stay within one "
            "process, and data × fsdp must be a multiple of the processes"
        )


class Origin(NamedTuple):
    """Where a batch comes from. where: the origins of this process's share of its records, in
    order.

    position: the data's, once it is consumed, as a checkpoint keeps it.
    """

    where: tuple[str, ...]
    position: dict[str, Any]


def batches(
    iterator: grain.DatasetIterator,
    layout: Layout,
    layouts: Mapping[str, TowerRows],
    mesh: Mesh,
    exchange: Exchange | None = None,
    count: int | None = None,
) -> Iterator[tuple[Batch, Origin]]:
    """Global batches, so many (None: without end). Says which records were left out.

    The next is read, packed, filled and sent to the devices in a thread while the caller has the one
    before; an exception there is raised here. The thread alone has the iterator. layouts: as of
    `Share`. exchange: with the other processes.
    """
    exchange = Exchange() if exchange is None else exchange
    shares = _shares(islice(iterator, count), iterator, layout, layouts, mesh)
    with closing(one_ahead(_sent(shares, layout, mesh, exchange))) as ready:
        yield from ready


def _shares(
    read: Iterator[LocalBatch],
    iterator: grain.DatasetIterator,
    layout: Layout,
    layouts: Mapping[str, TowerRows],
    mesh: Mesh,
) -> Iterator[tuple[Share, Origin]]:
    shards = row_shards(mesh) // jax.process_count()
    for local in read:
        for reason in local.skipped:
            logger.warning("skipped: %s", reason)
        origin = Origin(local.where, iterator.get_state())
        yield Share(local, layout, layouts, shards), origin


def _sent(
    shares: Iterator[tuple[Share, Origin]], layout: Layout, mesh: Mesh, exchange: Exchange
) -> Iterator[tuple[Batch, Origin]]:
    """Shares, sent to the devices.

    One exchange a batch: what a share needs second is told with what the next one needs first.
    """

    def send(share: Share, second: np.ndarray) -> Batch:
        return to_devices(share.local, share.packed(second), layout, mesh)

    before: tuple[Share, Origin] | None = None
    for share, origin in shares:
        if before is None:
            first = exchange.most(share.first)
        else:
            waiting, its_origin = before
            told = exchange.most(np.concatenate([waiting.second, share.first]))
            second, first = np.split(told, [len(waiting.second)])
            yield send(waiting, second), its_origin
        share.pack(first)
        before = share, origin
    if before is not None:
        waiting, its_origin = before
        yield send(waiting, exchange.most(waiting.second)), its_origin
