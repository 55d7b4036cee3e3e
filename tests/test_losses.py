"""The contrastive loss on a mesh, and in tiles.

Dimensions: B records, D hidden.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lco_jax import make_mesh
from lco_jax.training.losses import TILE_SCORES, info_nce

MESHES = [(8, 1, 1), (2, 2, 2), (1, 8, 1)]


def a_batch(records: int):
    """(embeddings [B, 4, D], present, content).

    With absent negatives, an absent record, repeated content and a tie.
    """
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
@pytest.mark.parametrize(
    ("records", "tile_scores"),
    [(17, 30), pytest.param(24, TILE_SCORES, marks=pytest.mark.slow)],
)
def test_on_a_mesh_it_is_the_same(mesh, records, tile_scores):
    e, present, content = a_batch(records)
    weights = {"accuracy": 0.0, "loss": 1.0, "positive_similarity": 0.3, "negative_similarity": 0.7}

    def weighted(e, content):
        """The metrics' gradients as well."""
        _, metrics = info_nce(e, jnp.array(present), 0.05, content, tile_scores)
        return sum(weights[key] * metrics[key] for key in weights), metrics

    run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
    for contents in (content, None):
        want = run(e, contents)
        metrics = want[0][1]
        losses = metrics["record_losses"]
        assert 0 < metrics["accuracy"] < 1
        assert losses[present[:, 0]].mean() == pytest.approx(float(metrics["loss"]), abs=1e-6)
        assert np.all(losses[~present[:, 0]] == -np.inf)
        with jax.set_mesh(make_mesh(*mesh)):
            got = run(e, contents)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_anchors_are_split_where_the_batch_does_not_divide():
    """1,057 records, a prime, on 8 devices: each compares 133 of them with all candidates."""

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
