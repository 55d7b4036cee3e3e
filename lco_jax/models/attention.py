"""Attention over packed rows: never across segments; causal in decoders, two-way in towers.

Dimensions: B rows, T query tokens, S key tokens (S = T), K key-value heads, G query heads per key-value head,
H head_dim, D hidden.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.weights import matmul_precision
from lco_jax.models.layers import Linear

BLOCK = 1024  # queries whose scores are in memory at once
SCORES = 2**22  # and, in very long rows, about so many scores a head


def packed_attention(query: Array, key: Array, value: Array, segment_ids: Array, causal: bool = True) -> Array:
    """Block-diagonal attention, scores and softmax in float32.

    query: [B, T, K, G, H]; key, value: [B, S, K, H]; segment_ids: int [B, T]. Returns [B, T, K, G, H].
    Key-value heads are shared by the G axis, never repeated in memory. Padding (segment 0) attends to padding, so that
    no row of the softmax is empty. Long rows go through in blocks of queries: memory grows with T, not with T².
    """
    tokens = query.shape[1]
    most = max(min(BLOCK, SCORES // tokens), 1)
    size = next(n for n in range(most, 0, -1) if tokens % n == 0)
    if tokens <= BLOCK or size < most // 4:  # short, or of a length with no good divisor
        return _attend(query, key, value, segment_ids, segment_ids, jnp.int32(0), causal)

    @jax.checkpoint  # the backward pass recomputes a block's scores instead of keeping every block's
    def block(inputs: tuple[Array, Array, Array]) -> Array:
        return _attend(inputs[0], key, value, inputs[1], segment_ids, inputs[2], causal)

    queries = rearrange(query, "b (n t) k g h -> n b t k g h", t=size)
    segments = rearrange(segment_ids, "b (n t) -> n b t", t=size)
    mixed = jax.lax.map(block, (queries, segments, jnp.arange(0, tokens, size)))
    return rearrange(mixed, "n b t k g h -> b (n t) k g h")


def _attend(
    query: Array,
    key: Array,
    value: Array,
    query_segments: Array,
    key_segments: Array,
    first: Array,
    causal: bool,
) -> Array:
    """The queries that begin at token `first` of the row, against all of its keys."""
    precision = matmul_precision(query)
    groups = query.shape[3]
    # heads first and the G axis folded into T: plain batched matrix products (on CPU twice as fast as the einsums)
    query = rearrange(query * query.shape[-1] ** -0.5, "b t k g h -> b k (g t) h")
    key, value = (rearrange(x, "b s k h -> b k s h") for x in (key, value))
    scores = jnp.einsum("bkth,bksh->bkts", query, key, precision=precision, preferred_element_type=jnp.float32)
    seen = query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        seen &= first + jnp.arange(query_segments.shape[1])[:, None] >= jnp.arange(key_segments.shape[1])
    seen = jnp.tile(seen, (1, groups, 1))
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = jnp.einsum("bkts,bksh->bkth", weights.astype(value.dtype), value, precision=precision)
    return rearrange(mixed, "b k (g t) h -> b t k g h", g=groups)


class TowerAttention(nn.Module):
    """Two-way attention of a tower without rotary positions. key_bias: CLIP's keys have one, the audio tower's none."""

    num_heads: int
    key_bias: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, segment_ids: Array) -> Array:
        """x [B, T, D]; segment_ids as of `packed_attention` -> [B, T, D]."""
        linear = partial(Linear, x.shape[-1], param_dtype=self.param_dtype)
        q = linear(use_bias=True, name="q_proj")(x)
        k = linear(use_bias=self.key_bias, name="k_proj")(x)
        v = linear(use_bias=True, name="v_proj")(x)
        q, k, v = (rearrange(y, "b t (k h) -> b t k h", k=self.num_heads) for y in (q, k, v))
        mixed = packed_attention(q[..., None, :], k, v, segment_ids, causal=False)
        return linear(use_bias=True, name="out_proj")(rearrange(mixed, "b t k 1 h -> b t (k h)"))
