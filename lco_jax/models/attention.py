"""The one entry point to attention: which kernel does it, and the plain one in XLA.

Dimensions: B rows, T query tokens, S key tokens (S = T), K key-value heads, G query heads per key-value head,
H head_dim, D hidden, R streams, N rows of a stream's group, W their width.

Decoders attend causally within rows that begin with a sequence's first token, so that no mask is needed for what comes
after its last; towers attend two-way, within segments of a row. A key-value head is shared, never repeated.
"""

import logging
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.core.weights import matmul_precision
from lco_jax.models import kernels
from lco_jax.models.layers import Linear

IMPLEMENTATIONS = ("auto", "xla", *kernels.KERNELS)
BLOCK = 1024  # queries of a row whose scores are in memory at once
SCORES = 2**26  # and of all rows and heads about so many (256 MiB of float32)

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
    """Attention within rows, scores and softmax in float32.

    query: [B, T, K, G, H]; key, value: [B, S, K, H] -> [B, T, K, G, H].
    segment_ids: int [B, T]; a token sees those of its own segment alone. Padding has segment 0 and attends to padding,
    so that no row of the softmax is empty.
    implementation: of `IMPLEMENTATIONS`. "auto" takes the kernel that is made for the machine where it has one for
    these sizes; one that is named is taken wherever it can be, and "xla" elsewhere.
    """
    chosen = _choose(query, segment_ids, implementation)
    if chosen == "xla":
        return _in_blocks(query, key, value, segment_ids, causal)
    return kernels.KERNELS[chosen].run(query, key, value, segment_ids, causal)


def attend_rows(query: Array, key: Array, value: Array, implementation: str = "auto") -> Array:
    """Causal attention in a group of rows: query [R, N, K, W, G, H]; key, value [R, N, K, W, H].

    The plain kernel takes a part of the N rows at a time, so that memory does not grow with their number.
    """
    streams, count, heads, width, groups, _ = query.shape  # a stream a device
    by_token = rearrange(query, "r n k w g h -> (r n) w k g h")
    if _choose(by_token, None, implementation) != "xla":
        keys = (rearrange(x, "r n k w h -> (r n) w k h") for x in (key, value))
        mixed = attention(by_token, *keys, implementation=implementation)
        return rearrange(mixed, "(r n) w k g h -> r n k w g h", r=streams)

    def attend(part: tuple[Array, Array, Array]) -> Array:
        if width <= BLOCK:
            return _by_head(*part, jnp.tri(width, dtype=bool)[None])
        mixed = _in_blocks(*(jnp.swapaxes(x, 1, 2) for x in part), None, causal=True)
        return jnp.swapaxes(mixed, 1, 2)

    most = max(SCORES // (heads * groups * width * min(width, BLOCK)), 1)
    size = next(n for n in range(min(most, count), 0, -1) if count % n == 0)
    parts = tuple(rearrange(x, "r (c n) ... -> c (r n) ...", n=size) for x in (query, key, value))
    if size == count:
        mixed = attend(jax.tree.map(lambda x: x[0], parts))[None]
    else:
        mixed = jax.lax.map(jax.checkpoint(attend), parts)
    return rearrange(mixed, "c (r n) ... -> r (c n) ...", r=streams)


def attend_last(query: Array, key: Array, value: Array, valid: Array) -> Array:
    """One query a row against the row's keys: query [B, K, G, H]; key, value [B, K, S, H]; valid bool [B, S]."""
    return _by_head(query[:, :, None], key, value, valid[:, None])[:, :, 0]


def _choose(query: Array, segment_ids: Array | None, asked: str) -> str:
    if asked not in IMPLEMENTATIONS:
        raise LcoError(f"attention is {asked!r}; it is one of: {', '.join(IMPLEMENTATIONS)}")
    names = kernels.KERNELS if asked == "auto" else [asked] if asked != "xla" else []
    fits = [
        name
        for name in names
        if kernels.KERNELS[name].fits(query, segment_ids, forced=asked != "auto")
    ]
    chosen = fits[0] if fits else "xla"
    kind = "causal" if segment_ids is None else "within segments"
    line = f"attention {kind}, rows of {query.shape[1]}, head_dim {query.shape[-1]}, {query.dtype}: {chosen}"
    if line not in _logged:
        _logged.add(line)
        logger.info(line)
    return chosen


def _in_blocks(
    query: Array, key: Array, value: Array, segment_ids: Array | None, causal: bool
) -> Array:
    """Long rows go through in blocks of queries: memory grows with T, not with T²."""
    tokens = query.shape[1]
    most = max(min(BLOCK, 4 * BLOCK**2 // tokens), 1)
    size = next(n for n in range(most, 0, -1) if tokens % n == 0)
    segments = None if segment_ids is None else (segment_ids, segment_ids)
    if tokens <= BLOCK or size < most // 4:  # short, or of a length with no good divisor
        return _attend(query, key, value, segments, jnp.int32(0), causal)

    @jax.checkpoint  # the backward pass recomputes a block's scores instead of keeping every block's
    def block(inputs: tuple[Array, Array, Array | None]) -> Array:
        ids = None if segment_ids is None else (inputs[2], segment_ids)
        return _attend(inputs[0], key, value, ids, inputs[1], causal)

    split = lambda x: rearrange(x, "b (n t) ... -> n b t ...", t=size)
    ids = None if segment_ids is None else split(segment_ids)
    mixed = jax.lax.map(block, (split(query), jnp.arange(0, tokens, size), ids))
    return rearrange(mixed, "n b t k g h -> b (n t) k g h")


def _attend(
    query: Array,
    key: Array,
    value: Array,
    segments: tuple[Array, Array] | None,
    first: Array,
    causal: bool,
) -> Array:
    """The queries that begin at token `first` of the row, against all keys. segments: the queries', the keys'."""
    tokens = query.shape[1]
    seen = jnp.ones((1, tokens, key.shape[1]), bool)
    if segments is not None:
        seen &= segments[0][:, :, None] == segments[1][:, None, :]
    if causal:
        seen &= first + jnp.arange(tokens)[:, None] >= jnp.arange(key.shape[1])
    query = rearrange(query, "b t k g h -> b k t g h")
    key, value = (rearrange(x, "b s k h -> b k s h") for x in (key, value))
    return rearrange(_by_head(query, key, value, seen), "b k t g h -> b t k g h")


def _by_head(query: Array, key: Array, value: Array, seen: Array) -> Array:
    """query [B, K, T, G, H]; key, value [B, K, S, H]; seen bool [B or 1, T, S] -> [B, K, T, G, H].

    The G axis is folded into T: plain batched matrix products, on CPU twice as fast as the einsums.
    """
    precision, groups = matmul_precision(query), query.shape[3]
    query = rearrange(query * query.shape[-1] ** -0.5, "b k t g h -> b k (t g) h")
    scores = jnp.einsum(
        "bkqh,bksh->bkqs", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    seen = jnp.repeat(seen, groups, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights.astype(value.dtype), value, precision=precision)
    return rearrange(mixed, "b k (t g) h -> b k t g h", g=groups)


class TowerAttention(nn.Module):
    """Two-way attention of a tower without rotary positions. key_bias: CLIP's keys have one, the audio tower's none."""

    num_heads: int
    key_bias: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, segment_ids: Array) -> Array:
        """x [B, T, D]; segment_ids as of `attention` -> [B, T, D]."""
        linear = partial(Linear, x.shape[-1], param_dtype=self.param_dtype)
        q = linear(use_bias=True, name="q_proj")(x)
        k = linear(use_bias=self.key_bias, name="k_proj")(x)
        v = linear(use_bias=True, name="v_proj")(x)
        q, k, v = (rearrange(y, "b t (k h) -> b t k h", k=self.num_heads) for y in (q, k, v))
        mixed = attention(q[..., None, :], k, v, segment_ids, causal=False)
        return linear(use_bias=True, name="out_proj")(rearrange(mixed, "b t k 1 h -> b t (k h)"))
