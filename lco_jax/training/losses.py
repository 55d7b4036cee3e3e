"""The contrastive loss.

Dimensions: B records, M hard negatives a record, D hidden, N candidates = B · (1 + M), P shards of the records, T
tiles; b anchors and n candidates of a shard or a tile; C chunks, R streams, S sequences of a stream.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.sharding import PartitionSpec

from lco_jax.core.sharding import ROWS, constrain, current_row_shards

TILE_SCORES = 2**25  # anchors × candidates that a device compares at once (128 MiB of float32)
CANDIDATES = ("auto", "gather", "ring")
RING_BYTES = (
    2**30
)  # gathered candidates and their gradient, on one device, from which on "auto" takes the ring


def takes_ring(candidates: str, count: int, hidden: int) -> bool:
    """Whether `count` candidates of `hidden` float32 stay split over the current mesh. candidates: of `CANDIDATES`."""
    large = 8 * count * hidden > RING_BYTES
    return current_row_shards() > 1 and (candidates == "ring" or (candidates == "auto" and large))


def info_nce(
    embeddings: Array,
    present: Array,
    temperature: float,
    content: Array | None = None,
    tile_scores: int = TILE_SCORES,
    ring: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """One-way InfoNCE of every anchor against all positives and all hard negatives of the global batch.

    embeddings: float32 [B, 2 + M, D], normalised: anchor, positive, negatives of each record.
    present: bool [B, 2 + M], False where a record has no such negative, and throughout for a record that was left out.
    content: int [B, 2 + M], equal for sides that say the same; given, whatever says the same as an anchor's positive is
    no negative of that anchor (captions of a few classes repeat in every batch).
    tile_scores: beyond so many scores a device, anchors go through in tiles, and the B × N matrix never exists.
    ring: no device gathers the candidates: each keeps its share, and anchors visit it tile by tile (under `jit`).

    Returns the mean loss and its metrics, among them `rows` [B], each record's loss: NaN where its own embeddings are
    not finite, inf where that is another's fault, -inf where there is no such record. Written as if on one device: the
    compiler gathers the candidates, and the gradient is that of the global loss on any mesh (the reference's is divided
    by the world size). Paper, eq. 1.
    """
    shards, asked = current_row_shards(), len(present)
    ring = ring and shards > 1
    tiles = _tiles(-(-asked // shards), present[:, 1:].size, tile_scores)
    equal = partial(
        whole, parts=shards * tiles
    )  # records that are absent make shards and tiles equal
    embeddings, present = equal(embeddings), equal(present)
    content = None if content is None else equal(content)
    records, sides = present.shape
    own = jnp.arange(records)
    index = jnp.concatenate(
        [own[:, None], records + jnp.arange(records * (sides - 2)).reshape(records, -1)], axis=1
    )
    says = index if content is None else content[:, 1:]  # positives come first; no two say the same
    parts = embeddings[:, 1:], index, present[:, 1:], says
    candidates = tuple(rearrange(x, "b s ... -> (b s) ...") for x in parts)
    split = lambda x: constrain(
        rearrange(x, "(p t b) ... -> t (p b) ...", p=shards, t=tiles), None, ROWS
    )
    anchors = split(embeddings[:, 0]), split(own), split(says[:, 0])
    candidates = jax.tree.map(lambda x: constrain(x, *([ROWS] if ring else [])), candidates)
    one = lambda tile: _compare(tile, candidates, temperature)
    found = jax.lax.map(one if tiles == 1 else jax.checkpoint(one), anchors)
    there, logit = split(present[:, 0]), found["positive"] / temperature
    rows = rearrange(found["logsumexp"] - logit, "t (p b) -> (p t b)", p=shards)
    own_fault = jnp.any(present & ~jnp.all(jnp.isfinite(embeddings), axis=-1), axis=-1)
    rows = jnp.where(own_fault, jnp.nan, jnp.where(jnp.isfinite(rows), rows, jnp.inf))
    total = lambda x: jnp.sum(jnp.where(there, x, 0.0))
    count = jnp.sum(there)  # of a batch without a record the mean is NaN, and its step is skipped
    metrics = {
        "loss": total(found["logsumexp"] - logit) / count,
        "accuracy": total((found["before"] < logit) & (found["after"] <= logit))
        / count,  # of equals, the first
        "positive_similarity": total(found["positive"]) / count,
        "negative_similarity": total(found["negative"]) / jnp.maximum(total(found["negatives"]), 1),
        "rows": jnp.where(present[:, 0], rows, -jnp.inf)[:asked],
    }
    return metrics["loss"], metrics


def _tiles(anchors: int, candidates: int, tile_scores: int) -> int:
    """The least T that makes tiles of a device's anchors small enough; a tile has an anchor at least."""
    return min(-(-anchors * candidates // tile_scores), anchors)


def _compare(
    anchors: tuple[Array, ...], candidates: tuple[Array, ...], temperature: float
) -> dict[str, Array]:
    """What each anchor finds among some candidates, [b] each. before, after: the highest logit of its negatives there.

    anchors: vectors [b, D], the positive's index, what it says. candidates: vectors [n, D], index, presence, what they
    say. An index is a place in the order of the global batch: first all positives, then all negatives.
    """
    (vectors, own, said), (others, index, real, says) = anchors, candidates
    cosines = jnp.einsum("bd,nd->bn", vectors, others, precision=jax.lax.Precision.HIGHEST)
    is_own, is_before = index == own[:, None], index < own[:, None]
    wrong = real & ~is_own & (says != said[:, None])
    logits = jnp.where(wrong | is_own, cosines / temperature, -jnp.inf)
    highest = lambda of: jnp.max(jnp.where(of, jax.lax.stop_gradient(logits), -jnp.inf), axis=-1)
    return {
        "logsumexp": jax.nn.logsumexp(logits, axis=-1),
        "before": highest(wrong & is_before),
        "after": highest(wrong & ~is_before),
        "positive": jnp.sum(jnp.where(is_own, cosines, 0.0), axis=-1),
        "negative": jnp.sum(jnp.where(wrong, cosines, 0.0), axis=-1),
        "negatives": jnp.sum(wrong, axis=-1).astype(jnp.float32),
    }


# ---- the ring: how each device comes by its records' sides when no device may hold them all


def whole(x: Array, fill: int = 0, parts: int | None = None) -> Array:
    """x [B, …] with records that are `fill` throughout up to a multiple of `parts`, or of P."""
    room = -len(x) % (parts or current_row_shards())
    return jnp.pad(x, ((0, room), *[(0, 0)] * (x.ndim - 1)), constant_values=fill)


def by_record(embeddings: Array, sequences: Array) -> Array:
    """Embeddings of streams [C, R, S, D] as [B, 2 + M, D] split over the shards: each device picks its records' own.

    sequences: int [B, 2 + M], as a `Batch` has them. B and R are multiples of P. The compiler would gather all; here
    each shard's streams visit every device, and after P visits are home.
    """
    mesh, shards = jax.sharding.get_abstract_mesh(), current_row_shards()
    places = jnp.unravel_index(jnp.maximum(sequences, 0), embeddings.shape[:3])
    ring = [(i, (i + 1) % shards) for i in range(shards)]

    def here(block: Array, chunk: Array, stream: Array, slot: Array) -> Array:
        streams = block.shape[1]

        def visit(
            carry: tuple[Array, Array, Array], _: None
        ) -> tuple[tuple[Array, Array, Array], None]:
            block, first, found = carry
            at = jnp.where(stream < first, streams, stream - first)  # beyond the last lie zeros
            found += block.at[chunk, at, slot].get(mode="fill", fill_value=0)
            block, first = (jax.lax.ppermute(x, ROWS, ring) for x in (block, first))
            return (block, first, found), None

        found = jnp.zeros((*slot.shape, block.shape[-1]))
        return jax.lax.scan(
            visit, (block, jax.lax.axis_index(ROWS) * streams, found), length=shards
        )[0][2]

    share, streams = PartitionSpec(ROWS), PartitionSpec(None, ROWS)
    split = jax.shard_map(
        here, mesh=mesh, in_specs=(streams, *[share] * 3), out_specs=share, check_vma=False
    )
    return split(embeddings, *places)
