"""The contrastive loss.

Dimensions: B records, M hard negatives a record, D hidden, N candidates = B · (1 + M), P shards of the records, T
tiles; b anchors and n candidates of a shard or a tile; C chunks, R streams, S sequences of a stream.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.sharding import PartitionSpec

from lco_jax.core.sharding import ROWS, constrain, row_shards

TILE_SCORES = 2**25  # anchors × candidates that a device compares at once (128 MiB of float32)
Facts = tuple[Array, Array, Array]  # of each side [b, 2 + M]: index among the N, whether it is present, what it says
CANDIDATES = ("auto", "gather", "ring")
RING_BYTES = 2**30  # gathered candidates and their gradient, on one device, from which on "auto" takes the ring


def takes_ring(candidates: str, count: int, hidden: int) -> bool:
    """Whether `count` candidates of `hidden` float32 go round the ring: one of `CANDIDATES` on the current mesh."""
    return _shards() > 1 and (candidates == "ring" or (candidates == "auto" and 8 * count * hidden > RING_BYTES))


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
    ring: no device gathers the candidates: each keeps its share, and the shares go round (under `jit`, on a mesh).

    Returns the mean loss and its metrics. Written as if on one device: the compiler gathers the candidates, and the
    gradient is that of the global loss on any mesh (the reference's is divided by the world size). Paper, eq. 1.
    """
    shards, (records, sides) = _shards(), present.shape
    own = jnp.arange(records)[:, None]
    index = jnp.concatenate([own, own, records + own * (sides - 2) + jnp.arange(sides - 2)], axis=1)  # among the N
    facts = index, present, index if content is None else content  # if no two say the same, each says its index
    if ring and shards > 1:
        embeddings, facts = jax.tree.map(whole, (embeddings, facts))
        found = _ring(embeddings, facts, temperature, tile_scores)
    else:
        shards = 1 if records % shards else shards
        anchors, candidates = _anchors(embeddings, facts), _candidates(embeddings, facts)
        tiles = _tiles(records // shards, records * (sides - 1), tile_scores)
        if tiles == 1:
            found = _compare(jax.tree.map(lambda x: constrain(x, ROWS), anchors), candidates, temperature)
        else:
            split = lambda x: constrain(rearrange(x, "(p t b) ... -> t (p b) ...", p=shards, t=tiles), None, ROWS)  # noqa: E731
            one = jax.checkpoint(lambda tile: _compare(tile, candidates, temperature))
            found = jax.lax.map(one, jax.tree.map(split, anchors))
            found = jax.tree.map(lambda x: rearrange(x, "t (p b) -> (p t b)", p=shards), found)
    there, logit = facts[1][:, 0], found["positive"] / temperature
    total = lambda x: jnp.sum(jnp.where(there, x, 0.0))  # noqa: E731, over the anchors there are
    count, negatives = jnp.sum(there), jnp.maximum(total(found["negatives"]), 1)
    metrics = {  # of a batch without a record the mean is NaN, and its step is skipped
        "loss": total(found["logsumexp"] - logit) / count,
        "accuracy": total((found["before"] < logit) & (found["after"] <= logit)) / count,  # of equals, the first
        "positive_similarity": total(found["positive"]) / count,
        "negative_similarity": total(found["negative"]) / negatives,
    }
    return metrics["loss"], metrics


def _shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else row_shards(mesh)


def _tiles(anchors: int, candidates: int, tile_scores: int) -> int:
    """The least T that makes tiles of a device's anchors small enough."""
    need = -(-anchors * candidates // tile_scores)
    return next(tiles for tiles in range(min(need, anchors), anchors + 1) if anchors % tiles == 0)


def _anchors(embeddings: Array, facts: Facts) -> tuple[Array, ...]:
    """(vectors [b, D], the positive's index [b], what it says [b])"""
    index, _, says = facts
    return embeddings[:, 0], index[:, 1], says[:, 1]


def _candidates(embeddings: Array, facts: Facts) -> tuple[Array, ...]:
    """(vectors [n, D], index [n], present [n], what each says [n]): positives, then negatives."""
    return tuple(jnp.concatenate([x[:, 1], x[:, 2:].reshape(-1, *x.shape[2:])]) for x in (embeddings, *facts))


def _compare(anchors: tuple[Array, ...], candidates: tuple[Array, ...], temperature: float) -> dict[str, Array]:
    """What each anchor finds among some candidates, [b] each. before, after: its negatives' highest logit there."""
    (vectors, own, said), (others, index, real, says) = anchors, candidates
    cosines = jnp.einsum("bd,nd->bn", vectors, others, precision=jax.lax.Precision.HIGHEST)
    is_own, is_before = index == own[:, None], index < own[:, None]
    wrong = real & ~is_own & (says != said[:, None])
    logits = jnp.where(wrong | is_own, cosines / temperature, -jnp.inf)
    highest = lambda of: jnp.max(jnp.where(of, jax.lax.stop_gradient(logits), -jnp.inf), axis=-1)  # noqa: E731
    return {
        "logsumexp": jax.nn.logsumexp(logits, axis=-1),
        "before": highest(wrong & is_before),
        "after": highest(wrong & ~is_before),
        "positive": jnp.sum(jnp.where(is_own, cosines, 0.0), axis=-1),
        "negative": jnp.sum(jnp.where(wrong, cosines, 0.0), axis=-1),
        "negatives": jnp.sum(wrong, axis=-1).astype(jnp.float32),
    }


# ---- the ring: every shard of the candidates visits every device


def whole(x: Array, fill: int = 0) -> Array:
    """x [B, …] with records that are `fill` throughout (absent ones) up to a multiple of P."""
    return jnp.pad(x, ((0, -len(x) % _shards()), *[(0, 0)] * (x.ndim - 1)), constant_values=fill)


def _on_shards(fun: Callable, *args: Any) -> Any:
    mesh, rows = jax.sharding.get_abstract_mesh(), PartitionSpec(ROWS)
    return jax.shard_map(fun, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(*args)


def _around(visit: Callable, block: Any, state: Any) -> tuple[Any, Any]:
    """`visit(block, state)` makes both anew; then the block goes to the next device. After P visits it is home."""
    ring = [(i, (i + 1) % _shards()) for i in range(_shards())]

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        block, state = visit(*carry)
        return (jax.tree.map(lambda x: jax.lax.ppermute(x, ROWS, ring), block), state), None

    return jax.lax.scan(step, (block, state), length=_shards())[0]


def _local_tiles(tree: Any, candidates: int, tile_scores: int) -> Any:
    """What a shard has of its anchors [b, …], in tiles [T, b/T, …]."""
    tiles = _tiles(len(jax.tree.leaves(tree)[0]), candidates, tile_scores)
    return jax.tree.map(lambda x: rearrange(x, "(t b) ... -> t b ...", t=tiles), tree)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _ring(embeddings: Array, facts: Facts, temperature: float, tile_scores: int) -> dict[str, Array]:
    """`_compare` of all anchors with all candidates, [B] split over the shards.

    Its gradient is written out, for that of a scan would keep the candidates of every step: all N.
    """
    merge = dict.fromkeys(("positive", "negative", "negatives"), jnp.add)
    merge |= {"logsumexp": jnp.logaddexp, "before": jnp.maximum, "after": jnp.maximum}

    def here(embeddings: Array, facts: Facts) -> dict[str, Array]:
        anchors, block = _anchors(embeddings, facts), _candidates(embeddings, facts)
        tiles = _local_tiles(anchors, len(block[0]), tile_scores)

        def visit(block: tuple, found: dict[str, Array]) -> tuple[tuple, dict[str, Array]]:
            more = jax.lax.map(lambda tile: _compare(tile, block, temperature), tiles)
            return block, {key: merge[key](found[key], x.reshape(-1)) for key, x in more.items()}

        start = {key: jnp.full(len(embeddings), 0.0 if how is jnp.add else -jnp.inf) for key, how in merge.items()}
        return _around(visit, block, start)[1]

    return _on_shards(here, embeddings, facts)


def _ring_forward(embeddings: Array, facts: Facts, *settings: Any) -> tuple[dict[str, Array], tuple]:
    found = _ring(embeddings, facts, *settings)
    return found, (embeddings, facts, found["logsumexp"])


def _ring_backward(temperature: float, tile_scores: int, kept: tuple, grads: dict[str, Array]) -> tuple[Array, None]:
    """Round once more, comparing again: the gradient of a shard of the candidates travels with it."""

    def here(embeddings: Array, facts: Facts, total: Array, grads: dict[str, Array]) -> Array:
        anchors, block = _anchors(embeddings, facts), _candidates(embeddings, facts)
        tiles = _local_tiles((anchors, total, grads), len(block[0]), tile_scores)

        def visit(block: tuple, d_anchors: Array) -> tuple[tuple, Array]:
            (vectors, *of_block), d_vectors = block

            def pull(d_vectors: Array, tile: tuple) -> tuple[Array, Array]:
                (mine, *of_mine), total, grads = tile
                compare = lambda x, y: _compare((x, *of_mine), (y, *of_block), temperature)  # noqa: E731
                found, vjp = jax.vjp(compare, mine, vectors)
                share = jnp.exp(found["logsumexp"] - total)  # of this block's candidates in the whole sum
                d_mine, more = vjp({**grads, "logsumexp": grads["logsumexp"] * share})
                return d_vectors + more, d_mine

            d_vectors, more = jax.lax.scan(pull, d_vectors, tiles)
            return ((vectors, *of_block), d_vectors), d_anchors + more.reshape(d_anchors.shape)

        zeros = jax.tree.map(jnp.zeros_like, (block[0], anchors[0]))
        (_, d_vectors), d_anchors = _around(visit, (block, zeros[0]), zeros[1])
        d_positives, d_negatives = jnp.split(d_vectors, [len(embeddings)])
        rest = d_negatives.reshape(len(embeddings), -1, embeddings.shape[-1])
        return jnp.concatenate([d_anchors[:, None], d_positives[:, None], rest], axis=1)

    return _on_shards(here, *kept, grads), None


_ring.defvjp(_ring_forward, _ring_backward)


def by_record(embeddings: Array, sequences: Array) -> Array:
    """Embeddings of streams [C, R, S, D] as [B, 2 + M, D] split over the shards: each device picks its records' own.

    sequences: int [B, 2 + M], as a `Batch` has them. B and R are multiples of P. (The compiler would gather all.)
    """
    chunks, streams, slots, _ = embeddings.shape
    chunk, stream, slot = jnp.unravel_index(jnp.maximum(sequences, 0), (chunks, streams, slots))

    def here(block: Array, at: Array) -> Array:
        def visit(block: tuple[Array, Array], found: Array) -> tuple[tuple[Array, Array], Array]:
            vectors, first = block
            place = jnp.where(at < first, len(vectors), at - first)  # beyond the end lie zeros
            return block, found + vectors.at[place].get(mode="fill", fill_value=0)

        first = jax.lax.axis_index(ROWS) * len(block)
        return _around(visit, (block, first), jnp.zeros((*at.shape, block.shape[-1])))[1]

    at = (stream * chunks + chunk) * slots + slot
    return _on_shards(here, rearrange(embeddings, "c r s d -> (r c s) d"), at)
