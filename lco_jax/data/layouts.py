"""Shapes that hold nearly every batch of a run, from a sample of its first ones: its programs are compiled once.

A function of the data and the configuration alone: a run that resumes plans the same shapes. A batch that does not fit
all the same is given a larger shape of its own.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from lco_jax.core.packing import Shape, bucket, in_widths, largest, tiled, width_of
from lco_jax.core.sharding import row_shards
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import as_messages
from lco_jax.data.share import Layout, LocalBatch, agree, agree_shape, pack_batch
from lco_jax.data.tower_rows import Processed

RECORDS, MEDIA_RECORDS = 512, 64  # sampled at least; media take their time to read
BATCHES, MEDIA_BATCHES = 4, 2
APART = 128  # the widest rows that are never shared with wider ones: short texts are many, and their margins small
MARGIN = 4.5  # standard deviations of a sum over a batch: one batch in 300,000 does not fit


def draw(batches: grain.MapDataset, layout: Layout, media: bool) -> list[LocalBatch]:
    """The sample: the first of `pipeline.local_batches`. media: whether the data hold more than text."""
    share = layout.batch_size // jax.process_count()
    least, records = (MEDIA_BATCHES, MEDIA_RECORDS) if media else (BATCHES, RECORDS)
    return [batches[i] for i in range(max(least, -(-records // share)))]


def choose_layout(
    sample: list[LocalBatch], layout: Layout, processor: Processor, mesh: Mesh, max_length: int
) -> Layout:
    """`layout` with floors, for a `sample` that `draw` drew."""
    layout = floor_of(sample, layout, processor, mesh)
    texts = 2 if layout.generative else 1  # of a sequence
    longest = width_of(
        texts * max_length + len(processor.tokenizer([as_messages("", "")])[0])
    )  # one may yet come
    rows = {**layout.floor.rows, longest: max(layout.floor.rows.get(longest, 0), 1)}
    return replace(layout, floor=agree_shape(replace(layout.floor, rows=rows)))


def floor_of(sample: list[LocalBatch], layout: Layout, processor: Processor, mesh: Mesh) -> Layout:
    """`layout` with floors that hold nearly every batch like those of the sample."""
    share = layout.batch_size // jax.process_count()
    shards = row_shards(mesh) // jax.process_count()
    packed = [pack_batch(local, layout, processor.rows, shards) for local in sample]
    layout = replace(layout, floor=Shape(chunks=max(one.chunks for one in packed)))
    if layout.floor.chunks > 1:  # all in as many chunks
        packed = [pack_batch(local, layout, processor.rows, shards) for local in sample]
    bins = shards * layout.floor.chunks
    rows = _rows(sample, bins)
    needs = [largest(in_widths(stream.need, rows) for stream in one.streams) for one in packed]
    prefix = len(layout.prefix)
    tokens = prefix + _sum(
        sample,
        [need.tokens - prefix for need in needs],
        lambda x: max(len(x) - prefix, 1),
        share,
        bins,
    )
    answers = 0
    if layout.generative:
        answers = _sum(
            sample, [need.answers for need in needs], lambda x: len(x.answer), share, bins
        )
    floor = largest([*needs, Shape(tokens, rows, layout.floor.chunks, answers)])
    tokens, answers = tiled(bucket(floor.tokens, 64)), bucket(floor.answers, 64)
    floor = agree_shape(Shape(tokens, floor.rows, floor.chunks, answers))
    return replace(layout, floor=floor, media_floor=_media(packed, processor))


def _sum(
    sample: list[LocalBatch],
    needs: list[int],
    size: Callable[[Processed], int],
    share: int,
    bins: int,
) -> int:
    """What a bin holds of a batch of independent records but once in a very long time.

    needs: what the fullest bin of each batch of the sample holds. size: of an input.
    """
    by_record, uneven = [], 0.0
    for local, need in zip(sample, needs, strict=True):
        own = np.array([size(one) for one in local.inputs])
        by_record.append(np.bincount(local.record, own))
        uneven = max(uneven, need - own.sum() / bins)
    each = np.concatenate(by_record)
    each = each[each > 0]
    if not each.size:  # every record of the sample was left out
        return 1
    return int(np.ceil((share * each.mean() + MARGIN * share**0.5 * each.std()) / bins + uneven))


def _rows(sample: list[LocalBatch], bins: int) -> dict[int, int]:
    """Rows of each width, likewise. Widths beyond `APART` share the rows of the widest among them where that makes
    fewer slots: every width has a margin of its own, which a few long sequences in many widths would pay many times.
    """
    counts = Counter(width_of(len(one)) for local in sample for one in local.inputs)
    total = sum(counts.values())
    here = total / len(sample) / bins

    def needed(widths: Sequence[int]) -> int:
        part = sum(counts[width] for width in widths) / total
        return bucket(int(np.ceil(here * part + MARGIN * (here * part * (1 - part)) ** 0.5)) + 1, 8)

    widths = sorted(counts)
    best: list[tuple[int, dict[int, int]]] = [
        (0, {})
    ]  # of the first n widths: the fewest slots, and their rows
    for end in range(1, len(widths) + 1):
        last, options = widths[end - 1], []
        for begin in range(end):
            if begin == end - 1 or widths[begin] > APART:
                slots, rows = best[begin]
                count = needed(widths[begin:end])
                options.append((slots + last * count, {**rows, last: count}))
        best.append(min(options, key=itemgetter(0)))
    return best[-1][1]


def _media(packed: list, processor: Processor) -> dict[str, tuple[int, int]]:
    """Of each tower, rows as wide as the widest of the sample, and as many as the most, and an eighth more."""
    floor = {}
    for tower in sorted(processor.rows):
        shapes = [one.media_need[tower] for one in packed if tower in one.media_need]
        width, count = agree(
            np.array(
                [max((x[0] for x in shapes), default=0), max((x[1] for x in shapes), default=0)]
            )
        )
        if count:
            floor[tower] = (int(width), bucket(int(np.ceil(count * 1.125)), 4))
    return floor
