"""Attention over packed rows: causal, and never across segments.

Dimensions: B rows, T query tokens, S key tokens (S = T), K key-value heads, G query heads per key-value head, H head_dim.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lco_jax.core.weights import matmul_precision


def packed_attention(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
    """Block-diagonal causal attention, scores and softmax in float32.

    query: [B, T, K, G, H]; key, value: [B, S, K, H]; segment_ids: int [B, T]. Returns [B, T, K, G, H].
    Key-value heads are shared by the G axis of the einsum, never repeated in memory. Padding (segment 0) attends to
    padding, so that no row of the softmax is empty.
    """
    precision = matmul_precision(query)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where((same & causal)[:, None, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value, precision=precision)
