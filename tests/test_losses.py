"""The ring: what it finds is what gathered candidates give, and no device holds them all.

Dimensions: B records, M hard negatives a record, D hidden, P shards; C chunks, R streams, S sequences of a stream.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lco_jax import make_mesh
from lco_jax.core.sharding import ROWS, constrain
from lco_jax.training.losses import RING_BYTES, TILE_SCORES, by_record, info_nce, takes_ring

MESHES = [(8, 1, 1), (2, 2, 2), (1, 8, 1)]


def a_batch(records: int):
    """(embeddings [B, 4, D], present, content): absent negatives, a record left out, repeated content, a tie."""
    rng = np.random.default_rng(records)
    e = rng.normal(size=(records, 4, 16)).astype(np.float32)
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    e[: records // 2, 1] = e[: records // 2, 0]  # or hardly one anchor would find its positive
    e[1, 1] = e[0, 1]
    present = rng.random((records, 4)) < 0.8
    present[:, :2] = True
    present[[3, records - 2]] = False
    return e, present, rng.integers(0, 2 * records, (records, 4))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("records", "tile_scores"), [(24, TILE_SCORES), (17, 30)])
def test_on_a_mesh_it_is_the_same_with_the_ring_and_without(mesh, records, tile_scores):
    e, present, content = a_batch(records)
    weights = {"accuracy": 0.0, "loss": 1.0, "positive_similarity": 0.3, "negative_similarity": 0.7}

    def both(e, content, ring):
        _, metrics = info_nce(e, jnp.array(present), 0.05, content, tile_scores, ring)
        return sum(
            weights[key] * metrics[key] for key in weights
        ), metrics  # the metrics' gradients as well

    run = jax.jit(jax.value_and_grad(both, has_aux=True), static_argnums=2)
    for says in (content, None):
        want = run(e, says, False)
        assert 0 < want[0][1]["accuracy"] < 1
        assert want[0][1]["rows"][present[:, 0]].mean() == pytest.approx(
            float(want[0][1]["loss"]), abs=1e-6
        )
        assert np.all(want[0][1]["rows"][~present[:, 0]] == -np.inf)
        with jax.set_mesh(make_mesh(*mesh)):
            found = [run(e, says, ring) for ring in (True, False)]
        for got in found:
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_anchors_are_split_where_the_batch_does_not_divide():
    """1,057 records, a prime, on 8 devices: each compares 133 of them with all candidates, and no device more."""

    def loss(e):
        return info_nce(e, jnp.ones(e.shape[:2], bool), 0.03)[0]

    with jax.set_mesh(make_mesh()):
        program = (
            jax.jit(jax.grad(loss))
            .lower(jax.ShapeDtypeStruct((1057, 3, 16), jnp.float32))
            .compile()
        )
    shapes = re.findall(r"f32\[([\d,]+)\]", program.as_text())
    assert (
        133 * 2 * 1064
        <= max(math.prod(map(int, shape.split(","))) for shape in shapes)
        < 2 * 133 * 2 * 1064
    )


def test_tiles_are_few_where_anchors_are_a_prime_number():
    """Of 1,009 anchors four tiles, and not 1,009: a device holds a quarter of the scores."""
    e = jnp.asarray(np.random.default_rng(0).normal(size=(1009, 2, 8)), jnp.float32)
    program = (
        jax.jit(lambda e: info_nce(e, jnp.ones((1009, 2), bool), 0.3, None, 2**18)[0])
        .lower(e)
        .compile()
    )
    shapes = [
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", program.as_text())
    ]
    assert max(map(math.prod, shapes)) == 253 * 1012


@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_collects_its_records(mesh):
    """From streams [C, R, S, D], some of whose sequences are in several records and some in none."""
    rng = np.random.default_rng(0)
    streams = rng.normal(size=(3, 16, 5, 4)).astype(np.float32)
    sequences = rng.integers(-1, 3 * 16 * 5, (24, 3))
    weights = jnp.array(rng.normal(size=(24, 3, 4)) * (sequences >= 0)[..., None], jnp.float32)
    want = jax.value_and_grad(
        lambda e: jnp.sum(weights * e.reshape(-1, 4)[np.maximum(sequences, 0)] ** 2)
    )(streams)
    with jax.set_mesh(make_mesh(*mesh)):
        total = lambda e, at: jnp.sum(weights * by_record(constrain(e, None, ROWS), at) ** 2)
        got = jax.jit(jax.value_and_grad(total))(streams, sequences)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)


def compiled(ring: bool, devices: int, tile_scores: int):
    """The gradient for streams of 65,536 records, 131,072 candidates, D 256."""
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    placed = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
    )
    streams = placed((1, 8, 3 * 8192, 256), jnp.float32, None, ROWS)

    def loss(streams, at):
        e = (
            by_record(streams, at)
            if ring
            else constrain(streams.reshape(-1, 256))[jnp.maximum(at, 0)]
        )
        return info_nce(e, at >= 0, 0.03, None, tile_scores, ring)[0]

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=streams.sharding)
        return step.lower(streams, placed((65536, 3), jnp.int32)).compile()


def test_with_the_ring_no_device_holds_all_candidates():
    """Under 256 MiB of temporaries on each of 8 devices, 128 of them a tile of scores; less than half of the gathered
    form's. With small tiles they halve from 4 devices to 8."""
    ring, gathered, small, fewer = (
        compiled(*args)
        for args in (
            (True, 8, TILE_SCORES),
            (False, 8, TILE_SCORES),
            (True, 8, 2**22),
            (True, 4, 2**22),
        )
    )
    size = lambda program: program.memory_analysis().temp_size_in_bytes / 2**20
    assert size(ring) < min(256, size(gathered) / 2), (size(ring), size(gathered))
    assert size(small) < min(128, 0.6 * size(fewer)), (size(small), size(fewer))
    arrays = [
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", small.as_text())
    ]
    assert max(arrays) < 131072 * 256 / 4


def test_auto_takes_the_ring_where_candidates_are_many():
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert takes_ring("ring", 1, 1)
        assert not takes_ring("gather", RING_BYTES, 1)
        assert takes_ring("auto", RING_BYTES // 8 // 256 + 1, 256)
        assert not takes_ring("auto", RING_BYTES // 8 // 256, 256)
    with jax.set_mesh(make_mesh(1, 1, 8)):
        assert not takes_ring("ring", RING_BYTES, 1)  # one shard: there is no one to pass them to
