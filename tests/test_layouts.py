"""Layouts with floors: one program for all batches of a run."""

import jax
import numpy as np
import pytest

from lco_jax import make_mesh
from lco_jax.checkpoint import builtin
from lco_jax.core.stream_shapes import Shape, in_widths, largest, padded_shape
from lco_jax.data import pipeline
from lco_jax.data.layouts import choose_layout, draw, floor_of
from lco_jax.data.pipeline import Layout, local_batches, pack_batch
from lco_jax.data.positions import line_positions
from lco_jax.data.processor import Processor
from lco_jax.data.record_stream import record_stream
from lco_jax.data.records import TEXT, Record
from lco_jax.data.scan import ListSource
from lco_jax.data.tower_rows import Processed


@pytest.fixture(scope="module")
def processor(cache):
    return Processor(builtin.build())


def varied(count, seed=0):
    """Records whose texts are as uneven as captions are: most short, a few ten times as long."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(["word"] * int(n)) for n in rng.lognormal(1.8, 0.8, 3 * count).clip(1, 120)]
    return ListSource(
        [Record(*texts[3 * i : 3 * i + 2], (texts[3 * i + 2],), f"mem:{i}") for i in range(count)]
    )


def planned(processor, source, mesh, **settings):
    settings = {
        "batch_size": 24,
        "max_negatives": 1,
        "prefix": processor.tokenizer.prefix,
        **settings,
    }
    batches = local_batches(
        record_stream({"a": source}, {"a": 1.0}, 0), Layout(**settings), processor, 128
    )
    layout = Layout(**settings)
    return batches, choose_layout(draw(batches, layout, media=False), layout, processor, mesh, 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "chunk_tokens"), [((1, 1, 1), 0), ((2, 2, 2), 0), ((1, 1, 1), 900)]
)
def test_five_hundred_varied_batches_have_one_shape(processor, shape, chunk_tokens):
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    batches, layout = planned(processor, varied(12_000), mesh, chunk_tokens=chunk_tokens)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    shapes, filled = set(), []
    for i in range(500):
        packed = pack_batch(batches[i], layout, processor.rows, shards)
        got = padded_shape(largest(stream.need for stream in packed.streams), layout.floor)
        shapes.add((packed.chunks, got.tokens, *got.rows.items()))
        filled.append(
            sum(stream.length for stream in packed.streams) / (len(packed.streams) * got.tokens)
        )
    assert len(shapes) == 1
    assert np.mean(filled) > (
        0.75 if shape == (1, 1, 1) and not chunk_tokens else 0.5
    )  # small batches vary more


def test_large_batches_are_nearly_full(processor):
    """The margin is that of a sum: relative to it, it vanishes as batches grow."""
    mesh = make_mesh(devices=jax.devices()[:1])
    batches, layout = planned(processor, varied(2000), mesh, batch_size=400)
    packed = pack_batch(batches[20], layout, processor.rows, 1)
    assert 0.9 < packed.streams[0].length / layout.floor.tokens <= 1


def test_a_floor_depends_on_the_data_alone(processor):
    mesh = make_mesh(devices=jax.devices()[:1])
    assert (
        planned(processor, varied(300), mesh)[1].floor
        == planned(processor, varied(300), mesh)[1].floor
    )


def test_a_batch_beyond_the_floor_gets_a_larger_shape(processor):
    mesh = make_mesh(devices=jax.devices()[:1])
    _, layout = planned(processor, varied(300), mesh)
    long = ListSource(
        [Record(*[" ".join(["long"] * 100)] * 2, ("long " * 100,), "") for _ in range(24)]
    )
    local = local_batches(record_stream({"a": long}, {"a": 1.0}, 0), layout, processor, None)[0]
    batch = pipeline.global_batch(local, layout, processor.rows, mesh)
    assert batch.tokens.input_ids.shape[-1] > layout.floor.tokens
    assert (np.asarray(batch.sequences) >= 0).sum() == 72
    assert layout.floor != Shape()


def test_a_sample_without_a_good_record(cache):
    """Every record was skipped: the floor is small, and later batches get larger shapes."""
    mesh = make_mesh(devices=jax.devices()[:1])
    short = Processor(builtin.build(), max_tokens=10)
    bad = ListSource([Record("a", "b", (), f"mem:{i}") for i in range(24)])
    _, layout = planned(short, bad, mesh, on_bad="skip", max_negatives=0)
    assert layout.floor.tokens >= len(layout.prefix)
    assert sum(layout.floor.rows.values()) >= 1


@pytest.mark.parametrize("shards", [1, 8])
def test_long_sequences_of_many_lengths_have_one_shape_and_few_slots(processor, shards):
    """Each of many widths would need a margin: few long sequences share wider rows instead."""
    rng = np.random.default_rng(0)
    layout = Layout(batch_size=48, max_negatives=0, prefix=processor.tokenizer.prefix)

    def batch():
        lengths = np.where(np.arange(96) % 2, rng.integers(30, 90, 96), rng.integers(300, 3000, 96))
        inputs = [Processed(np.zeros(n, np.int32), line_positions(0, n)) for n in lengths]
        record, side = np.divmod(np.arange(96), 2)
        return pipeline.LocalBatch(
            inputs,
            record,
            side,
            content=np.zeros(96, np.int32),
            kinds=np.full(96, TEXT, np.int32),
            teacher=np.full(96, np.nan, np.float32),
        )

    mesh = make_mesh(devices=jax.devices()[:shards])
    layout = floor_of([batch() for _ in range(11)], layout, processor, mesh)
    assert sum(width > 128 for width in layout.floor.rows) <= 4
    slots = shards * sum(width * count for width, count in layout.floor.rows.items())
    tokens = 0
    for local in (batch() for _ in range(20)):
        packed = pack_batch(local, layout, processor.rows, shards)
        need = largest(in_widths(stream.need, layout.floor.rows) for stream in packed.streams)
        assert padded_shape(need, layout.floor).rows == layout.floor.rows
        tokens += sum(map(len, local.inputs))
    assert 20 * slots / tokens < (3 if shards == 1 else 5.5)
