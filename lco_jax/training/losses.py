"""The contrastive loss.

Dimensions: B records, M hard negatives a record, D hidden, N candidates = B · (1 + M), P shards of
the records, T tiles of a shard's records; b anchors of a tile, over all shards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.sharding import ROWS, constrain, current_row_shards

TILE_SCORES = 2**25  # anchors × candidates that a device compares at once (128 MiB of float32)


class Anchors(NamedTuple):
    """vectors: [b, D]; present: [b]; index, content: [b], those of their positives."""

    vectors: Array
    present: Array
    index: Array
    content: Array


class Candidates(NamedTuple):
    """vectors: [N, D]; present: [N]; index: [N], distinct, lowest for positives; content: [N]."""

    vectors: Array
    present: Array
    index: Array
    content: Array


class Comparison(NamedTuple):
    """What each of b anchors finds among the candidates, [b] each.

    logsumexp: over the logits of its positive and its negatives. positive, negatives: the cosine of
    the former, and the sum of those of the latter, of which there are `count`. before, after: the
    highest logit of the negatives whose index is below or above the positive's.
    """

    logsumexp: Array
    positive: Array
    negatives: Array
    count: Array
    before: Array
    after: Array


def info_nce(
    embeddings: Array,
    present: Array,
    temperature: float,
    content: Array | None = None,
    tile_scores: int = TILE_SCORES,
) -> tuple[Array, dict[str, Array]]:
    """One-way InfoNCE of every anchor against all positives and all hard negatives of the batch.

    embeddings: float32 [B, 2 + M, D], normalised: anchor, positive, negatives of each record.
    present: bool [B, 2 + M], False where a record has no such negative, and throughout for a record
    that was left out.
    content: int [B, 2 + M], equal for equal contents. If it is given, a candidate with the content
    of an anchor's positive is no negative of that anchor (captions of a few classes repeat in every
    batch).
    tile_scores: beyond this number of scores a device, anchors are compared in tiles, and the B × N
    matrix never exists.

    Returns the mean loss and its metrics. Among them `record_losses` [B]: NaN where a record's own
    embeddings are not finite, inf where those of another record are the cause, -inf where there is
    no such record. Written as if on one device: the compiler gathers the candidates, and the
    gradient is that of the global loss on any mesh (the reference's is divided by the world size).
    Paper, eq. 1.
    """
    records, shards = len(present), current_row_shards()
    tiles = _tiles(-(-records // shards), present[:, 1:].size, tile_scores)

    def tiled(x: Array) -> Array:
        tiles_first = rearrange(x, "(p t b) ... -> t (p b) ...", p=shards, t=tiles)
        return constrain(tiles_first, None, ROWS)

    def compare(tile: Anchors) -> Comparison:
        return _compare(tile, candidates, temperature)

    anchors, candidates = _split(embeddings, present, content, shards * tiles)
    anchors = jax.tree.map(tiled, anchors)
    found = jax.lax.map(compare if tiles == 1 else jax.checkpoint(compare), anchors)
    losses = found.logsumexp - found.positive / temperature
    metrics = _means(found, losses, anchors.present, temperature)
    by_record = rearrange(losses, "t (p b) -> (p t b)", p=shards)[:records]
    metrics["record_losses"] = _blamed(by_record, embeddings, present)
    return metrics["loss"], metrics


def _tiles(anchors: int, candidates: int, tile_scores: int) -> int:
    """The least T that makes tiles of a device's anchors small enough, and none of them empty."""
    return min(-(-anchors * candidates // tile_scores), anchors)


def _split(
    embeddings: Array, present: Array, content: Array | None, multiple: int
) -> tuple[Anchors, Candidates]:
    """All anchors, and all candidates, which every device holds.

    Absent records make B a multiple of `multiple`.
    """
    if content is None:
        content = jnp.arange(present.size).reshape(present.shape)
    missing = -len(present) % multiple

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

    def of_candidates(x: Array) -> Array:
        return constrain(rearrange(x, "b s ... -> (b s) ..."))

    embeddings, present, content = padded(embeddings), padded(present), padded(content)
    records, sides = present.shape
    index = jnp.arange(records * (sides - 1)).reshape(sides - 1, records).T
    anchors = Anchors(
        vectors=embeddings[:, 0],
        present=present[:, 0],
        index=index[:, 0],
        content=content[:, 1],
    )
    candidates = Candidates(
        vectors=of_candidates(embeddings[:, 1:]),
        present=of_candidates(present[:, 1:]),
        index=of_candidates(index),
        content=of_candidates(content[:, 1:]),
    )
    return anchors, candidates


def _compare(anchors: Anchors, candidates: Candidates, temperature: float) -> Comparison:
    """Compare b anchors with all candidates."""
    cosines = jnp.einsum(
        "bd,nd->bn", anchors.vectors, candidates.vectors, precision=jax.lax.Precision.HIGHEST
    )
    is_positive = candidates.index == anchors.index[:, None]
    is_before = candidates.index < anchors.index[:, None]
    differs = candidates.content != anchors.content[:, None]
    is_negative = candidates.present & ~is_positive & differs
    logits = jnp.where(is_negative | is_positive, cosines / temperature, -jnp.inf)

    def highest(chosen: Array) -> Array:
        return jnp.max(jnp.where(chosen, jax.lax.stop_gradient(logits), -jnp.inf), axis=-1)

    return Comparison(
        logsumexp=jax.nn.logsumexp(logits, axis=-1),
        positive=jnp.sum(jnp.where(is_positive, cosines, 0.0), axis=-1),
        negatives=jnp.sum(jnp.where(is_negative, cosines, 0.0), axis=-1),
        count=jnp.sum(is_negative, axis=-1).astype(jnp.float32),
        before=highest(is_negative & is_before),
        after=highest(is_negative & ~is_before),
    )


def _means(
    found: Comparison, losses: Array, present: Array, temperature: float
) -> dict[str, Array]:
    """The batch's metrics. present: of the anchors. All are [T, b].

    A batch without any record has the mean NaN, so that its step is skipped.
    """
    logit = found.positive / temperature
    is_first = (found.before < logit) & (found.after <= logit)  # of equals, the first counts
    records = jnp.sum(present)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(present, x, 0.0))

    return {
        "loss": total(losses) / records,
        "accuracy": total(is_first) / records,
        "positive_similarity": total(found.positive) / records,
        "negative_similarity": total(found.negatives) / jnp.maximum(total(found.count), 1),
    }


def _blamed(losses: Array, embeddings: Array, present: Array) -> Array:
    """Losses [B] of records as `info_nce` returns them: NaN, inf and -inf say who is the cause."""
    finite = jnp.all(jnp.isfinite(embeddings), axis=-1)
    is_cause = jnp.any(present & ~finite, axis=-1)
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    losses = jnp.where(is_cause, jnp.nan, losses)
    return jnp.where(present[:, 0], losses, -jnp.inf)
