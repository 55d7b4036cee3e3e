"""The ring: what it finds is what gathered candidates give, and no device holds them all.

Dimensions: B records, M hard negatives a record, D hidden, P shards.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lco_jax import make_mesh
from lco_jax.training.losses import TILE_SCORES, info_nce

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
def test_the_ring_equals_gathered_candidates(mesh, records, tile_scores):
    e, present, content = a_batch(records)
    weights = {"accuracy": 0.0, "loss": 1.0, "positive_similarity": 0.3, "negative_similarity": 0.7}

    def both(e, content, ring):
        _, metrics = info_nce(e, jnp.array(present), 0.05, content, tile_scores, ring)
        return sum(weights[key] * value for key, value in metrics.items()), metrics  # the metrics' gradients as well

    run = jax.jit(jax.value_and_grad(both, has_aux=True), static_argnums=2)
    for says in (content, None):
        want = run(e, says, False)
        assert 0 < want[0][1]["accuracy"] < 1
        with jax.set_mesh(make_mesh(*mesh)):
            got = run(e, says, True)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)
