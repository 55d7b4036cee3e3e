"""Records -> batches of packed streams on the mesh, with grain: shuffled, sharded, resumable.

Dimensions: C GradCache chunks, R streams, B records, P processes, M hard negatives of a record (at
most).

Everything is deterministic. Global batch k has records k · B to (k + 1) · B of the shuffled mixture
on any number of processes: process p reads those whose index is p modulo P. The position in the
data is one number, so a run can resume on another mesh.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.core.errors import LcoError
from lco_jax.core.exchange import Exchange
from lco_jax.core.packing import Answers, Batch, PackedTokens, fill, fill_answers
from lco_jax.core.sharding import ROWS, replicated, row_shards
from lco_jax.core.stream_shapes import padded_shape
from lco_jax.data.guide import GuideVectors
from lco_jax.data.inputs import conversation, one_ahead
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import asked
from lco_jax.data.records import Content, Record, answer_of, content_number, modality_bits
from lco_jax.data.share import Layout, LocalBatch, Share, pack_batch
from lco_jax.data.tower_rows import Processed, TowerRows

MAX_SIDES = 1024  # a dropout identity is record · MAX_SIDES + side

logger = logging.getLogger(__name__)


# ---- records -> a process's share of a batch


def local_batches(
    stream: grain.MapDataset, layout: Layout, processor: Processor, max_length: int | None
) -> grain.MapDataset:
    """This process's share of each global batch, as `LocalBatch`es."""
    processes, me = jax.process_count(), jax.process_index()
    if layout.batch_size % processes:
        raise LcoError(
            f"config.train.batch_size {layout.batch_size} does not divide by the {processes} "
            "processes"
        )
    share = stream if processes == 1 else stream[me::processes]
    records = share.batch(layout.batch_size // processes, drop_remainder=True, batch_fn=list)
    prepare = partial(
        _prepare,
        layout=layout,
        processor=processor,
        max_length=max_length,
        stride=processes,
        offset=me,
    )
    return records.map(prepare)


def ahead(local: grain.MapDataset, threads: int) -> grain.DatasetIterator:
    """The batches one after another, prepared ahead of time in threads."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(local.to_iter_dataset(options))


class _Content(NamedTuple):
    """A content, and which side of which record it is. record: an index of a process's records."""

    record: int
    side: int
    content: Content


def _prepare(
    records: Sequence[Record],
    layout: Layout,
    processor: Processor,
    max_length: int | None,
    stride: int,
    offset: int,
) -> LocalBatch:
    """Prepare records, the first of which has the number `offset`, the next `offset + stride`."""
    contents = list(_contents(records, layout.sides))
    results = _process(records, contents, layout, processor, max_length)
    vectors = _guide_vectors(layout.guide, records, contents)
    results = _checked_by_guide(results, records, contents, layout.guide, vectors)
    skipped = _skipped(contents, results, layout.on_bad)
    kept = [i for i, one in enumerate(contents) if one.record not in skipped]
    good = [contents[i] for i in kept]
    return LocalBatch(
        inputs=[results[i] for i in kept],
        record=np.array([one.record for one in good], np.int64) * stride + offset,
        side=np.array([one.side for one in good], np.int64),
        guide=None if vectors is None else vectors[kept],
        **_labels(records, good),
        skipped=tuple(skipped.values()),
        where=tuple(record.where for record in records),
    )


def _labels(records: Sequence[Record], contents: Sequence[_Content]) -> dict[str, np.ndarray]:
    """What the loss knows of contents, as `LocalBatch` has it."""
    return {
        "content": np.array([content_number(one.content) for one in contents], np.int32),
        "kinds": np.array([modality_bits(one.content) for one in contents], np.int32),
        "teacher": np.array([records[one.record].score(one.side) for one in contents], np.float32),
    }


def _checked_by_guide(
    results: Sequence[Processed | LcoError],
    records: Sequence[Record],
    contents: Sequence[_Content],
    guide: GuideVectors | None,
    vectors: np.ndarray | None,
) -> list[Processed | LcoError]:
    """The results, with an error for each content whose vector of the guide is NaN."""
    checked = list(results)
    if guide is not None and vectors is not None:
        for i in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
            checked[i] = guide.fault(records[contents[i].record].where)
    return checked


def _guide_vectors(
    guide: GuideVectors | None, records: Sequence[Record], contents: Sequence[_Content]
) -> np.ndarray | None:
    """The guide's vectors of contents, [·, G]; None without a guide."""
    if guide is None:
        return None
    return guide.rows((one.content, records[one.record].where) for one in contents)


def _contents(records: Sequence[Record], sides: int) -> Iterator[_Content]:
    for i, record in enumerate(records):
        for side, content in enumerate(record.sides[:sides]):
            yield _Content(i, side, content)


def _skipped(
    contents: Sequence[_Content], results: Sequence[Processed | LcoError], on_bad: str
) -> dict[int, str]:
    """The records that have a bad content, and why; raises the first error if `on_bad` says so."""
    skipped: dict[int, str] = {}
    for one, result in zip(contents, results, strict=True):
        if isinstance(result, LcoError):
            if on_bad == "error":
                raise result
            skipped.setdefault(one.record, str(result))
    return skipped


def _process(
    records: Sequence[Record],
    contents: Sequence[_Content],
    layout: Layout,
    processor: Processor,
    max_length: int | None,
) -> list[Processed | LcoError]:
    """The model input of each content, or the error that it raises."""
    names = [records[one.record].where for one in contents]
    conversations = []
    for one, name in zip(contents, names, strict=True):
        instruction = records[one.record].instruction(one.side)
        prompt = asked if layout.generative else instruction
        conversations.append(
            conversation(one.content, name, processor.tokenizer, prompt, max_length)
        )
    results = processor.attempt(conversations, names)
    if layout.generative:
        return answered(results, records, processor, max_length)
    return results


def answered(
    prompts: Sequence[Processed | LcoError],
    records: Sequence[Record],
    processor: Processor,
    max_length: int | None,
) -> list[Processed | LcoError]:
    """Each record's prompt followed by its answer, the positive; an error for a bad record.

    max_length: an answer is cut to so many tokens, as texts are.
    """
    results = list(prompts)
    texts = {}
    for i, record in enumerate(records):
        if isinstance(results[i], LcoError):
            continue
        try:
            texts[i] = processor.tokenizer.cut(answer_of(record), max_length)
        except LcoError as error:
            results[i] = error
    answers = processor.tokenizer.answers(list(texts.values()))
    for i, ids in zip(texts, answers, strict=True):
        results[i] = processor.checked(results[i].answered(ids), records[i].where)
    return results


# ---- shares -> batches on the mesh


def global_batch(
    local: LocalBatch, layout: Layout, tower_rows: Mapping[str, TowerRows], mesh: Mesh
) -> Batch:
    """Every process's share -> one `Batch` on the mesh, at once. tower_rows: as `Share` has it."""
    shards = row_shards(mesh) // jax.process_count()
    return to_devices(pack_batch(local, layout, tower_rows, shards), mesh)


def to_devices(share: Share, mesh: Mesh) -> Batch:
    """Fill a finished share's arrays and send them to this process's devices.

    It does not wait for other processes.
    """
    tokens, answers, slots = _fill(share)
    tables = _tables(share, slots, tokens.last_tokens.shape[-1])

    def in_chunks(x: np.ndarray) -> np.ndarray:
        return x.reshape(share.chunks, share.shards, *x.shape[1:])

    to_mesh = jax.make_array_from_process_local_data
    by_chunk = NamedSharding(mesh, PartitionSpec(None, ROWS))
    tokens, answers = to_mesh(by_chunk, jax.tree.map(in_chunks, (tokens, answers)))
    media = to_mesh(NamedSharding(mesh, PartitionSpec(ROWS)), share.media_rows())
    if jax.process_count() == 1:
        on_mesh = to_mesh(replicated(mesh), tables)
    else:
        split = {name: _in_first_stream(table, share.shards) for name, table in tables.items()}
        on_mesh = to_mesh(by_chunk, split)
    return Batch(tokens=tokens, media=media, answers=answers, **on_mesh)


def _fill(share: Share) -> tuple[PackedTokens, Answers | None, list[np.ndarray]]:
    """The arrays of all streams of a share, [C · R, …], and for each stream its inputs' slots."""
    local, layout = share.local, share.layout
    records, identities = [], []
    for members in share.members:
        record, side = local.record[members], local.side[members]
        records.append(record)
        identities.append(record * MAX_SIDES + side)
    shape = padded_shape(share.need, layout.floor)
    tokens, slots = fill(share.streams, identities, shape, layout.prefix)
    answers = None
    if layout.generative:
        answers = fill_answers(share.streams, records, shape.answers)
    return tokens, answers, slots


def _tables(share: Share, slots: list[np.ndarray], slots_of_stream: int) -> dict[str, np.ndarray]:
    """The tables of a `Batch` for this process's records: [B / P, 2 + M, …] each.

    slots: for each stream, its sequences' slots.
    """
    local, layout, processes = share.local, share.layout, jax.process_count()

    def table(values: np.ndarray, absent: float, dtype: Any = np.int32) -> np.ndarray:
        shape = layout.batch_size // processes, layout.sides, *values.shape[1:]
        filled = np.full(shape, absent, dtype)
        filled[local.record // processes, local.side] = values
        return filled

    tables = {
        "sequences": table(_sequences(share, slots, slots_of_stream), -1),
        "content": table(local.content, -1),
        "kinds": table(local.kinds, 0),
    }
    if layout.teacher:
        tables["teacher"] = table(local.teacher, math.nan, np.float32)
    if local.guide is not None:
        tables["guide"] = table(local.guide, 0.0, np.float32)
    return tables


def _sequences(share: Share, slots: list[np.ndarray], slots_of_stream: int) -> np.ndarray:
    """For each input its slot, of those of all streams of all processes."""
    processes, me = jax.process_count(), jax.process_index()
    chunk, shard = np.divmod(share.bins, share.shards)
    stream = (chunk * processes + me) * share.shards + shard
    slot = np.zeros(len(share.local.inputs), np.int64)
    for members, slots_of_members in zip(share.members, slots, strict=True):
        slot[members] = slots_of_members
    return stream * slots_of_stream + slot


def _in_first_stream(table: np.ndarray, shards: int) -> np.ndarray:
    """[B / P, 2 + M, …] -> [B / P, R / P, 2 + M, …]: the table, and -1 for the other streams."""
    records, *sides = table.shape
    streams = np.full((records, shards, *sides), -1, table.dtype)
    streams[:, 0] = table
    return streams


# ---- the batches of a run


class Origin(NamedTuple):
    """Where a batch comes from.

    where: the origins of this process's records, in order.
    position: the position in the data after the batch, as a checkpoint stores it.
    """

    where: tuple[str, ...]
    position: dict[str, Any]


def batches(
    iterator: grain.DatasetIterator,
    layout: Layout,
    tower_rows: Mapping[str, TowerRows],
    mesh: Mesh,
    exchange: Exchange | None = None,
    count: int | None = None,
) -> Iterator[tuple[Batch, Origin]]:
    """`count` global batches, or batches without end (None). Logs the records that are skipped.

    While the caller has a batch, a thread reads and packs the next one and sends it to the devices.
    An exception in the thread is raised here. Nothing but the thread may use the iterator.
    tower_rows: as `Share` has it. exchange: with the other processes.
    """
    exchange = Exchange() if exchange is None else exchange
    shares = _shares(islice(iterator, count), iterator, layout, tower_rows, mesh)
    with closing(one_ahead(_sent(shares, mesh, exchange))) as ready:
        yield from ready


def _shares(
    read: Iterator[LocalBatch],
    iterator: grain.DatasetIterator,
    layout: Layout,
    tower_rows: Mapping[str, TowerRows],
    mesh: Mesh,
) -> Iterator[tuple[Share, Origin]]:
    shards = row_shards(mesh) // jax.process_count()
    for local in read:
        for reason in local.skipped:
            logger.warning("skipped: %s", reason)
        origin = Origin(local.where, iterator.get_state())
        yield Share(local, layout, tower_rows, shards), origin


def _sent(
    shares: Iterator[tuple[Share, Origin]], mesh: Mesh, exchange: Exchange
) -> Iterator[tuple[Batch, Origin]]:
    """Shares, packed and sent to the devices.

    Processes exchange numbers once a batch: what a share needs to be finished, together with what
    the next share needs to be packed.
    """
    first = next(shares, None)
    if first is None:
        return
    share, origin = first
    share.pack(exchange.most(share.to_pack))
    for next_share, next_origin in shares:
        numbers = np.concatenate([share.to_finish, next_share.to_pack])
        to_finish, to_pack = np.split(exchange.most(numbers), [len(share.to_finish)])
        share.finish(to_finish)
        yield to_devices(share, mesh), origin
        next_share.pack(to_pack)
        share, origin = next_share, next_origin
    share.finish(exchange.most(share.to_finish))
    yield to_devices(share, mesh), origin
