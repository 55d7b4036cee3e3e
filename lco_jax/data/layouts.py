"""Shapes that hold nearly every batch of a run, so that its programs are compiled once.

They come from a sample of the first batches, and depend on the data and the configuration alone: a
run that resumes gets the same shapes. A batch that does not fit still gets a larger shape.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from lco_jax.core.bins import bucket, cheapest_cut
from lco_jax.core.exchange import agree
from lco_jax.core.sharding import row_shards
from lco_jax.core.stream_shapes import Shape, in_widths, largest, tiled, width_of
from lco_jax.data.packed_media import MediaShape
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import as_messages
from lco_jax.data.share import Layout, LocalBatch, Share, agree_shape, pack_batch
from lco_jax.data.tower_rows import Processed

RECORDS, BATCHES = 512, 4  # a sample has at least so many of each
MEDIA_RECORDS, MEDIA_BATCHES = 64, 2  # with media, which take long to read
# Rows of up to this width are never exchanged for wider ones: short texts are many, so that the
# margin for them is small.
APART = 128
MARGIN = 4.5  # standard deviations of a sum over a batch: one batch in 300,000 exceeds them


def draw(batches: grain.MapDataset, layout: Layout, media: bool) -> list[LocalBatch]:
    """The sample: the first batches of `pipeline.local_batches`.

    media: whether records have more than text. Media take long to read, so their sample is smaller.
    """
    least_batches, least_records = BATCHES, RECORDS
    if media:
        least_batches, least_records = MEDIA_BATCHES, MEDIA_RECORDS
    records = layout.batch_size // jax.process_count()
    count = max(least_batches, math.ceil(least_records / records))
    return [batches[i] for i in range(count)]


def choose_layout(
    sample: list[LocalBatch], layout: Layout, processor: Processor, mesh: Mesh, max_length: int
) -> Layout:
    """`layout` with floors, from a `sample` that `draw` drew, and a row for the longest text.

    max_length: the tokens of a text at most.
    """
    layout = floor_of(sample, layout, processor, mesh)
    texts = 2 if layout.generative else 1
    empty = processor.tokenizer([as_messages("", "", one) for one in layout.instructions])
    template = max(map(len, empty))
    longest = width_of(texts * max_length + template)
    rows = {longest: 1, **layout.floor.rows}
    return replace(layout, floor=agree_shape(replace(layout.floor, rows=rows)))


def floor_of(sample: list[LocalBatch], layout: Layout, processor: Processor, mesh: Mesh) -> Layout:
    """`layout` with floors that hold nearly every batch like those of the sample."""
    shards = row_shards(mesh) // jax.process_count()
    packed = _pack(sample, layout, processor, shards)
    chunks = max(share.chunks for share in packed)
    layout = replace(layout, floor=Shape(chunks=chunks))
    if chunks > 1:
        packed = _pack(sample, layout, processor, shards)  # each in as many chunks as the others

    bins = shards * chunks
    rows = _rows(sample, bins)
    needs = [largest(in_widths(stream.need, rows) for stream in share.streams) for share in packed]
    tokens, answers = _tokens_and_answers(sample, layout, needs, bins)
    floor = largest([*needs, Shape(tokens, rows, chunks, answers)])
    tokens = tiled(bucket(floor.tokens, 64))
    answers = bucket(floor.answers, 64)
    floor = agree_shape(Shape(tokens, floor.rows, chunks, answers))
    return replace(layout, floor=floor, media_floor=_media_floor(packed, processor))


def _pack(
    sample: list[LocalBatch], layout: Layout, processor: Processor, shards: int
) -> list[Share]:
    return [pack_batch(local, layout, processor.rows, shards) for local in sample]


def _tokens_and_answers(
    sample: list[LocalBatch], layout: Layout, needs: list[Shape], bins: int
) -> tuple[int, int]:
    """Tokens of a stream, and answer tokens of it, in nearly every batch.

    needs: what the fullest stream of each batch of the sample needs.
    """
    records = layout.batch_size // jax.process_count()
    prefix = len(layout.prefix)

    def new_tokens(one: Processed) -> int:
        return layout.prefix.own(one.input_ids)

    def answer_tokens(one: Processed) -> int:
        return len(one.answer)

    most_tokens = [need.tokens - prefix for need in needs]
    tokens = prefix + _fullest_bin(sample, most_tokens, new_tokens, records, bins)
    if not layout.generative:
        return tokens, 0
    most_answers = [need.answers for need in needs]
    return tokens, _fullest_bin(sample, most_answers, answer_tokens, records, bins)


def _fullest_bin(
    sample: list[LocalBatch],
    fullest: list[int],
    size: Callable[[Processed], int],
    records: int,
    bins: int,
) -> int:
    """What the fullest of `bins` has in nearly every batch of independent records.

    fullest: what the fullest bin of each batch of the sample has. size: of an input. records: of a
    batch.
    """
    of_records = []
    uneven = 0.0  # how much more the fullest bin has than the mean
    for local, most in zip(sample, fullest, strict=True):
        sizes = np.array([size(one) for one in local.inputs])
        of_records.append(np.bincount(local.record, sizes))
        uneven = max(uneven, most - sizes.sum() / bins)
    each = np.concatenate(of_records)
    each = each[each > 0]
    if not each.size:  # every record of the sample was skipped
        return 1
    total = records * each.mean() + MARGIN * records**0.5 * each.std()
    return int(np.ceil(total / bins + uneven))


def _rows(sample: list[LocalBatch], bins: int) -> dict[int, int]:
    """How many rows of each width a bin needs in nearly every batch.

    Each width has a margin, which a few long sequences of many widths would pay many times. So
    widths beyond `APART` share the rows of the widest of them where that makes fewer cells.
    """
    counts = Counter(width_of(len(one)) for local in sample for one in local.inputs)
    widths = sorted(counts)
    total = counts.total()
    in_bin = total / len(sample) / bins

    def rows(begin: int, end: int) -> int:
        part = sum(counts[width] for width in widths[begin:end]) / total
        mean = in_bin * part
        deviation = (mean * (1 - part)) ** 0.5
        most = int(np.ceil(mean + MARGIN * deviation))
        return bucket(most + 1, 8)

    def cells(begin: int, end: int) -> float:
        several = end - begin > 1
        if several and widths[begin] <= APART:
            return math.inf
        return widths[end - 1] * rows(begin, end)

    pieces = cheapest_cut(len(widths), cells)
    return {widths[end - 1]: rows(begin, end) for begin, end in pieces}


def _media_floor(packed: list[Share], processor: Processor) -> MediaShape:
    """For each tower, the widest rows of the sample, and the most of them and an eighth more."""
    floor = {}
    for tower in sorted(processor.rows):
        shapes = [share.media_need.get(tower, (0, 0)) for share in packed]
        width, count = agree(np.max(shapes, axis=0))
        if count:
            floor[tower] = (int(width), bucket(int(np.ceil(count * 1.125)), 4))
    return floor
