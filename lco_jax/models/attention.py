"""The one entry point to attention. It chooses a kernel; the plain one in XLA is here.

Dimensions: B rows, T query tokens, S key tokens (S = T), K key-value heads, G query heads per
key-value head, H head_dim, D hidden, R streams, N rows of a stream's group, W their width.

Decoders attend causally within rows. A row begins with a sequence's first token, so that no mask is
needed for the tokens after its last one. Towers attend both ways, within segments of a row. Query
heads share their key-value head; it is never repeated.
"""

import logging
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.core.weights import matmul_precision
from lco_jax.models.kernels import KERNELS
from lco_jax.models.layers import Linear, largest_divisor

IMPLEMENTATIONS = ("auto", "xla", *KERNELS)
BLOCK = 1024  # the queries of a row whose scores are in memory at once
SCORES = 2**26  # that are in memory at once, of all rows and heads (256 MiB of float32)

logger = logging.getLogger(__name__)
_logged: set[str] = set()


def attention(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None = None,
    causal: bool = True,
    implementation: str = "auto",
) -> Array:
    """Attention within rows, with scores and softmax in float32.

    query: [B, T, K, G, H]; key, value: [B, S, K, H] -> [B, T, K, G, H].
    segment_ids: int [B, T]; a token sees those of its own segment alone. Padding has segment 0 and
    attends to padding, so that no row of the softmax is empty.
    implementation: one of `IMPLEMENTATIONS`. "auto" takes the kernel that is made for the machine
    where it has one for these sizes. A kernel that is named is taken where it can do these sizes,
    and "xla" elsewhere.
    """
    chosen = _choose(query, segment_ids, implementation)
    if chosen == "xla":
        return _in_blocks(query, key, value, segment_ids, causal)
    return KERNELS[chosen].run(query, key, value, segment_ids, causal)


def _choose(query: Array, segment_ids: Array | None, asked: str) -> str:
    """The name of a kernel that fits. A choice is logged once."""
    if asked not in IMPLEMENTATIONS:
        raise LcoError(f"attention is {asked!r}; it is one of: {', '.join(IMPLEMENTATIONS)}")
    forced = asked in KERNELS
    candidates = [name for name in KERNELS if asked in ("auto", name)]
    fits = [name for name in candidates if KERNELS[name].fits(query, segment_ids, forced)]
    chosen = fits[0] if fits else "xla"
    kind = "causal" if segment_ids is None else "within segments"
    line = (
        f"attention {kind}, rows of {query.shape[1]}, head_dim {query.shape[-1]}, "
        f"{query.dtype}: {chosen}"
    )
    if line not in _logged:
        _logged.add(line)
        logger.debug(line)
    return chosen


# ---- the rows of a stream


def attend_rows(query: Array, key: Array, value: Array, implementation: str = "auto") -> Array:
    """Causal attention in a group of rows: query [R, N, K, W, G, H]; key, value [R, N, K, W, H].

    It returns [R, N, K, W, G, H].
    """
    by_token = rearrange(query, "r n k w g h -> (r n) w k g h")
    if _choose(by_token, None, implementation) == "xla":
        return _plain_rows(query, key, value)
    key = rearrange(key, "r n k w h -> (r n) w k h")
    value = rearrange(value, "r n k w h -> (r n) w k h")
    mixed = attention(by_token, key, value, implementation=implementation)
    return rearrange(mixed, "(r n) w k g h -> r n k w g h", r=len(query))


def _plain_rows(query: Array, key: Array, value: Array) -> Array:
    """`attend_rows` in XLA, some of the N rows at a time: memory does not grow with N."""
    streams, count, heads, width, groups, _ = query.shape  # every device has one stream
    scores_of_row = heads * groups * width * min(width, BLOCK)
    most = max(SCORES // scores_of_row, 1)
    size = largest_divisor(count, most)

    def split(x: Array) -> Array:
        return rearrange(x, "r (c n) ... -> c (r n) ...", n=size)

    parts = split(query), split(key), split(value)
    if size == count:
        part = [x[0] for x in parts]
        mixed = _plain_part(part)[None]
    else:
        mixed = jax.lax.map(jax.checkpoint(_plain_part), parts)
    return rearrange(mixed, "c (r n) ... -> r (c n) ...", r=streams)


def _plain_part(part: Sequence[Array]) -> Array:
    """query [B, K, T, G, H]; key, value [B, K, S, H] -> [B, K, T, G, H], causal."""
    width = part[0].shape[2]
    if width <= BLOCK:
        return _by_head(*part, jnp.tri(width, dtype=bool)[None])
    by_token = [jnp.swapaxes(x, 1, 2) for x in part]
    return jnp.swapaxes(_in_blocks(*by_token, segment_ids=None, causal=True), 1, 2)


def attend_last(query: Array, key: Array, value: Array, valid: Array) -> Array:
    """One query a row against the row's keys: [B, K, G, H].

    query [B, K, G, H]; key, value [B, K, S, H]; valid bool [B, S].
    """
    return _by_head(query[:, :, None], key, value, valid[:, None])[:, :, 0]


# ---- the plain kernel


def _in_blocks(
    query: Array, key: Array, value: Array, segment_ids: Array | None, causal: bool
) -> Array:
    """Long rows go through in blocks of queries: memory grows with T, not with T²."""
    size = _block_size(query.shape[1])
    if size == query.shape[1]:
        segments = None if segment_ids is None else (segment_ids, segment_ids)
        return _attend(query, key, value, segments, jnp.int32(0), causal)

    @jax.checkpoint  # the backward pass computes a block's scores again: they are not stored
    def attend(block: tuple[Array, Array, Array | None]) -> Array:
        queries, first, ids = block
        segments = None if segment_ids is None else (ids, segment_ids)
        return _attend(queries, key, value, segments, first, causal)

    def split(x: Array) -> Array:
        return rearrange(x, "b (n t) ... -> n b t ...", t=size)

    queries = split(query)
    first = jnp.arange(0, query.shape[1], size)
    ids = None if segment_ids is None else split(segment_ids)
    mixed = jax.lax.map(attend, (queries, first, ids))
    return rearrange(mixed, "n b t k g h -> b (n t) k g h")


def _block_size(tokens: int) -> int:
    """Queries of a block: all of a row that is short, or of a length with no good divisor."""
    most = max(min(BLOCK, 4 * BLOCK**2 // tokens), 1)
    size = largest_divisor(tokens, most)
    return tokens if tokens <= BLOCK or size < most // 4 else size


def _attend(
    query: Array,
    key: Array,
    value: Array,
    segments: tuple[Array, Array] | None,
    first: Array,
    causal: bool,
) -> Array:
    """The queries [B, T, K, G, H] from token `first` of the row on, against all keys [B, S, K, H].

    segments: those of the queries and those of the keys.
    """
    tokens, keys = query.shape[1], key.shape[1]
    seen = jnp.ones((1, tokens, keys), bool)
    if segments is not None:
        of_queries, of_keys = segments
        seen &= of_queries[:, :, None] == of_keys[:, None, :]
    if causal:
        seen &= first + jnp.arange(tokens)[:, None] >= jnp.arange(keys)
    query = rearrange(query, "b t k g h -> b k t g h")
    key = rearrange(key, "b s k h -> b k s h")
    value = rearrange(value, "b s k h -> b k s h")
    mixed = _by_head(query, key, value, seen)
    return rearrange(mixed, "b k t g h -> b t k g h")


def _by_head(query: Array, key: Array, value: Array, seen: Array) -> Array:
    """query [B, K, T, G, H]; key, value [B, K, S, H]; seen bool [B or 1, T, S] -> [B, K, T, G, H].

    The G axis is folded into T: plain batched matrix products are twice as fast on CPU as einsums
    with both axes.
    """
    groups, head_dim = query.shape[3:]
    einsum = partial(jnp.einsum, precision=matmul_precision(query))
    query = rearrange(query * head_dim**-0.5, "b k t g h -> b k (t g) h")
    seen = jnp.repeat(seen, groups, axis=1)
    seen = rearrange(seen, "b q s -> b 1 q s")

    scores = einsum("bkqh,bksh->bkqs", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = weights.astype(value.dtype)
    mixed = einsum("bkqs,bksh->bkqh", weights, value)
    return rearrange(mixed, "b k (t g) h -> b k t g h", g=groups)


# ---- the attention of towers


class TowerAttention(nn.Module):
    """Attention of a tower both ways, without rotary positions.

    key_bias: CLIP's keys have a bias, the audio tower's have none.
    """

    num_heads: int
    key_bias: bool = True

    @nn.compact
    def __call__(self, x: Array, segment_ids: Array) -> Array:
        """x [B, T, D]; segment_ids as of `attention` -> [B, T, D]."""
        size = x.shape[-1]
        q = Linear(size, use_bias=True, name="q_proj")(x)
        k = Linear(size, use_bias=self.key_bias, name="k_proj")(x)
        v = Linear(size, use_bias=True, name="v_proj")(x)
        q = rearrange(q, "b t (k h) -> b t k 1 h", k=self.num_heads)
        k = rearrange(k, "b t (k h) -> b t k h", k=self.num_heads)
        v = rearrange(v, "b t (k h) -> b t k h", k=self.num_heads)
        mixed = attention(q, k, v, segment_ids, causal=False)
        mixed = rearrange(mixed, "b t k 1 h -> b t (k h)")
        return Linear(size, use_bias=True, name="out_proj")(mixed)
