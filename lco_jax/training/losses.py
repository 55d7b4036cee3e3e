"""InfoNCE: each anchor's positive among all candidates of the batch.

Dimensions: B records, M hard negatives a record, D hidden, G of a guide's vectors, N candidates =
B · (1 + M), P shards of the records, T tiles of a shard's records; b anchors of a tile, over all
shards.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.sharding import ROWS, constrain, current_row_shards

TILE_SCORES = 2**25  # anchors × candidates that a device compares at once (128 MiB of float32)


class Negatives(NamedTuple):
    """Which candidates are negatives, and how much they count; by default the paper's.

    margin: a candidate whose score is above the positive's less this margin is no negative of that
        anchor: it may be a second positive. None: all are negatives. (GISTEmbed, Solatorio 2024,
        arXiv 2402.16829, whose margin is 0.)
    guide: vectors of unit length [B, 2 + M, G] of another model, whose cosines are those scores.
        None: the batch's own cosines.
    hard_weight: how many times a record's own hard negatives count in its sum over candidates.
    """

    margin: float | None = None
    guide: Array | None = None
    hard_weight: float = 1.0


PAPER = Negatives()


class Contents(NamedTuple):
    """Contents of a batch: the anchors of a tile [b, …], or all candidates [N, …].

    vectors: [·, D]. present: bool. index: of a candidate, distinct, lowest for positives; of an
    anchor, that of its positive. content: equal for equal contents; of an anchor, that of its
    positive. record: its number. temperature: None where all pairs have one. guide: [·, G], or
    None.
    """

    vectors: Array
    present: Array
    index: Array
    content: Array
    record: Array
    temperature: Array | None
    guide: Array | None


class Comparison(NamedTuple):
    """What each of b anchors finds among the candidates, [b] each.

    logsumexp: over the logits of its positive and its negatives. logit: the positive's. positive,
    negatives: the cosine of the former, and the sum of those of the latter, of which there are
    `count`. false: how many others the margin takes for positives. before, after: the
    highest logit of the negatives whose index is below or above the positive's.
    """

    logsumexp: Array
    logit: Array
    positive: Array
    negatives: Array
    count: Array
    false: Array
    before: Array
    after: Array


def info_nce(
    embeddings: Array,
    present: Array,
    temperature: float | Array,
    content: Array | None = None,
    tile_scores: int = TILE_SCORES,
    negatives: Negatives = PAPER,
) -> tuple[Array, dict[str, Array]]:
    """One-way InfoNCE of every anchor against all positives and all hard negatives of the batch.

    embeddings: float32 [B, 2 + M, D], normalised: anchor, positive, negatives of each record.
    present: bool [B, 2 + M], False where a record has no such negative, and throughout for a record
    that was left out.
    temperature: of all pairs; or [B, 2 + M], that of each content, and a pair has the mean of both
    (e5-omni, Chen et al. 2026, arXiv 2601.03666).
    content: int [B, 2 + M], equal for equal contents. If it is given, a candidate with the content
    of an anchor's positive is no negative of that anchor (captions of a few classes repeat in every
    batch).
    tile_scores: beyond this number of scores a device, anchors are compared in tiles, and the B × N
    matrix never exists.
    negatives: which candidates are negatives, and their weight.

    Returns the mean loss and its metrics. Among them `record_losses` [B]: NaN where a record's own
    embeddings are not finite, inf where those of another record are the cause, -inf where there is
    no such record. Written as if on one device: the compiler gathers the candidates, and the
    gradient is that of the global loss on any mesh (the reference's is divided by the world size).
    Paper, eq. 1.
    """
    records, shards = len(present), current_row_shards()
    tiles = _tiles(-(-records // shards), present[:, 1:].size, tile_scores)
    contents = _numbered(embeddings, present, content, temperature, negatives, shards * tiles)
    anchors, candidates = _split(contents)
    anchors = _in_tiles(anchors, shards, tiles)

    def compare(tile: Contents) -> Comparison:
        return _compare(tile, candidates, temperature, negatives)

    found = jax.lax.map(compare if tiles == 1 else jax.checkpoint(compare), anchors)
    losses = found.logsumexp - found.logit
    metrics = _means(found, losses, anchors.present)
    if negatives.margin is None:
        del metrics["false_negatives"]
    by_record = rearrange(losses, "t (p b) -> (p t b)", p=shards)[:records]
    metrics["record_losses"] = _blamed(by_record, embeddings, present)
    return metrics["loss"], metrics


def _tiles(anchors: int, candidates: int, tile_scores: int) -> int:
    """The least T that makes tiles of a device's anchors small enough, and none of them empty."""
    return min(-(-anchors * candidates // tile_scores), anchors)


def _in_tiles(anchors: Contents, shards: int, tiles: int) -> Contents:
    """The anchors of each device cut into tiles: [A, …] -> [tiles, A / tiles, …]."""

    def cut(x: Array) -> Array:
        tiles_first = rearrange(x, "(p t b) ... -> t (p b) ...", p=shards, t=tiles)
        return constrain(tiles_first, None, ROWS)

    return jax.tree.map(cut, anchors)


def _numbered(
    embeddings: Array,
    present: Array,
    content: Array | None,
    temperature: float | Array,
    negatives: Negatives,
    multiple: int,
) -> Contents:
    """What `info_nce` is given, and the numbers of records and candidates: [B, 2 + M, …].

    Absent records make B a multiple of `multiple`.
    """
    missing = -len(present) % multiple
    more = partial(_with_absent, missing=missing)
    if content is None:
        content = jnp.arange(present.size).reshape(present.shape)
    records, sides = len(present) + missing, present.shape[1]
    index = jnp.arange(records * (sides - 1)).reshape(sides - 1, records).T
    record = jnp.broadcast_to(jnp.arange(records)[:, None], (records, sides))
    return Contents(
        vectors=more(embeddings),
        present=jnp.pad(present, [(0, missing), (0, 0)]),
        index=_with_positives(index),
        content=_with_positives(more(content)[:, 1:]),
        record=record,
        temperature=more(temperature) if jnp.ndim(temperature) == 2 else None,
        guide=None if negatives.guide is None else more(negatives.guide),
    )


def _with_absent(x: Array, missing: int) -> Array:
    """With so many more records, copies of the last."""
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge") if missing else x


def _with_positives(of_candidates: Array) -> Array:
    """The candidates' numbers [B, 1 + M], and before them, for the anchor, its positive's."""
    return jnp.concatenate([of_candidates[:, :1], of_candidates], axis=1)


def _split(contents: Contents) -> tuple[Contents, Contents]:
    """The anchors [B, …], and all candidates [N, …], which every device holds."""

    def of_candidates(x: Array) -> Array:
        return constrain(rearrange(x[:, 1:], "b s ... -> (b s) ..."))

    anchors = jax.tree.map(lambda x: x[:, 0], contents)
    return anchors, jax.tree.map(of_candidates, contents)


def _compare(
    anchors: Contents, candidates: Contents, temperature: float | Array, negatives: Negatives
) -> Comparison:
    """Compare b anchors with all candidates."""
    cosines = _cosines(anchors.vectors, candidates.vectors)
    is_positive = candidates.index == anchors.index[:, None]
    differs = candidates.content != anchors.content[:, None]
    is_other = candidates.present & ~is_positive & differs
    is_false = is_other & _near_the_positive(anchors, candidates, cosines, is_positive, negatives)
    is_negative = is_other & ~is_false
    scaled = cosines / _of_pairs(temperature, anchors, candidates)
    logits = jnp.where(is_negative | is_positive, scaled, -jnp.inf)
    before, after = _highest(logits, is_negative, candidates.index < anchors.index[:, None])
    is_own = is_negative & (candidates.record == anchors.record[:, None])
    return Comparison(
        logsumexp=jax.nn.logsumexp(_weighted(logits, is_own, negatives.hard_weight), axis=-1),
        logit=_sum(logits, is_positive),
        positive=_sum(cosines, is_positive),
        negatives=_sum(cosines, is_negative),
        count=_sum(1.0, is_negative),
        false=_sum(1.0, is_false),
        before=before,
        after=after,
    )


def _of_pairs(temperature: float | Array, anchors: Contents, candidates: Contents) -> float | Array:
    """The temperature of all pairs, or of each: [b, N]."""
    if anchors.temperature is None:
        return temperature
    return (anchors.temperature[:, None] + candidates.temperature) / 2


def _sum(x: Array | float, chosen: Array) -> Array:
    """Of each anchor's chosen candidates: [b]."""
    return jnp.sum(jnp.where(chosen, x, 0.0), axis=-1)


def _weighted(logits: Array, is_own: Array, weight: float) -> Array:
    """The logits, in which a record's own hard negatives count `weight` times."""
    return logits if weight == 1 else logits + jnp.where(is_own, jnp.log(weight), 0.0)


def _highest(logits: Array, is_negative: Array, is_before: Array) -> tuple[Array, Array]:
    """The highest logit of the negatives before, and of those after the positive: [b] each."""
    logits = jax.lax.stop_gradient(logits)

    def highest(chosen: Array) -> Array:
        return jnp.max(jnp.where(chosen, logits, -jnp.inf), axis=-1)

    return highest(is_negative & is_before), highest(is_negative & ~is_before)


def _cosines(a: Array, b: Array) -> Array:
    """Of unit vectors [b, D] with [N, D]: [b, N]."""
    return jnp.einsum("bd,nd->bn", a, b, precision=jax.lax.Precision.HIGHEST)


def _near_the_positive(
    anchors: Contents,
    candidates: Contents,
    cosines: Array,
    is_positive: Array,
    negatives: Negatives,
) -> Array:
    """Whose score is above that of the anchor's positive, less the margin: bool [b, N]."""
    if negatives.margin is None:
        return jnp.zeros_like(is_positive)
    scores = cosines if anchors.guide is None else _cosines(anchors.guide, candidates.guide)
    scores = jax.lax.stop_gradient(scores)
    return scores > _sum(scores, is_positive)[:, None] - negatives.margin


def _means(found: Comparison, losses: Array, present: Array) -> dict[str, Array]:
    """The batch's metrics. present: of the anchors. All are [T, b].

    A batch without any record has the mean NaN, so that its step is skipped.
    """
    is_first = (found.before < found.logit) & (
        found.after <= found.logit
    )  # of equals, the first counts
    records = jnp.sum(present)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(present, x, 0.0))

    return {
        "loss": total(losses) / records,
        "accuracy": total(is_first) / records,
        "positive_similarity": total(found.positive) / records,
        "negative_similarity": total(found.negatives) / jnp.maximum(total(found.count), 1),
        "false_negatives": total(found.false) / records,
    }


def _blamed(losses: Array, embeddings: Array, present: Array) -> Array:
    """Losses [B] of records as `info_nce` returns them: NaN, inf and -inf say who is the cause."""
    finite = jnp.all(jnp.isfinite(embeddings), axis=-1)
    is_cause = jnp.any(present & ~finite, axis=-1)
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    losses = jnp.where(is_cause, jnp.nan, losses)
    return jnp.where(present[:, 0], losses, -jnp.inf)
