"""The contrastive loss.

Dimensions: B records, M hard negatives a record, D hidden, N candidates = B · (1 + M), P shards of the anchors, T
tiles.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.sharding import ROWS, constrain

TILE_SCORES = 2**25  # anchors × candidates that a device compares at once (128 MiB of float32)


def info_nce(
    embeddings: Array,
    present: Array,
    temperature: float,
    content: Array | None = None,
    tile_scores: int = TILE_SCORES,
) -> tuple[Array, dict[str, Array]]:
    """One-way InfoNCE of every anchor against all positives and all hard negatives of the global batch.

    embeddings: float32 [B, 2 + M, D], normalised: anchor, positive, negatives of each record.
    present: bool [B, 2 + M], False where a record has no such negative, and throughout for a record that was left out.
    content: int [B, 2 + M], equal for sides that say the same; given, whatever says the same as an anchor's positive is
    no negative of that anchor (captions of a few classes repeat in every batch).
    tile_scores: beyond so many scores a device, anchors go through in tiles, and the B × N matrix never exists.

    Returns the mean loss and its metrics. Written as if on one device: the compiler gathers the candidates, and the
    gradient is that of the global loss on any mesh (the reference's is divided by the world size). Paper, eq. 1.
    """
    candidates = jnp.concatenate([embeddings[:, 1], embeddings[:, 2:].reshape(-1, embeddings.shape[-1])])
    real = jnp.concatenate([present[:, 1], present[:, 2:].reshape(-1)])
    says = None if content is None else jnp.concatenate([content[:, 1], content[:, 2:].reshape(-1)])

    def sums(anchors: Array, own: Array) -> dict[str, Array]:
        """Totals over some anchors [b, D], whose positives are the candidates `own` [b]."""
        there = present[own, 0]
        cosines = jnp.einsum("bd,nd->bn", anchors, candidates, precision=jax.lax.Precision.HIGHEST)
        is_own = jnp.arange(candidates.shape[0]) == own[:, None]
        others = real & ~is_own
        if says is not None:
            others &= says != says[own][:, None]
        logits = jnp.where(others | is_own, cosines / temperature, -jnp.inf)
        positive = jnp.sum(jnp.where(is_own, cosines, 0.0), axis=-1)
        total = lambda x: jnp.sum(jnp.where(there, x, 0.0))  # noqa: E731, over the anchors there are
        return {
            "loss": total(jax.nn.logsumexp(logits, axis=-1) - positive / temperature),
            "accuracy": total(jnp.argmax(logits, axis=-1) == own),
            "positive_similarity": total(positive),
            "negative_similarity": total(jnp.sum(jnp.where(others, cosines, 0.0), axis=-1)),
            "negatives": total(jnp.sum(others, axis=-1).astype(jnp.float32)),
        }

    anchors, own = constrain(embeddings[:, 0], ROWS), jnp.arange(embeddings.shape[0])
    shards, tiles = _tiles(len(own), candidates.shape[0], tile_scores)
    if tiles == 1:
        totals = sums(anchors, own)
    else:
        split = lambda x: constrain(rearrange(x, "(p t b) ... -> t (p b) ...", p=shards, t=tiles), None, ROWS)  # noqa: E731
        by_tile = jax.lax.map(lambda tile: jax.checkpoint(sums)(*tile), (split(anchors), split(own)))
        totals = jax.tree.map(jnp.sum, by_tile)
    negatives = jnp.maximum(totals.pop("negatives"), 1)
    count = jnp.sum(present[:, 0])  # of a batch without a record the mean is NaN, and its step is skipped
    metrics = {key: value / (negatives if key == "negative_similarity" else count) for key, value in totals.items()}
    return metrics["loss"], metrics


def _tiles(anchors: int, candidates: int, tile_scores: int) -> tuple[int, int]:
    """(P, T): the shards of the current mesh, and the least T that makes tiles of a shard's anchors small enough."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)
    if anchors % shards:
        shards = 1
    per_shard = anchors // shards
    need = -(-per_shard * candidates // tile_scores)
    return shards, next(tiles for tiles in range(min(need, per_shard), per_shard + 1) if per_shard % tiles == 0)
