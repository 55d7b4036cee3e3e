"""Hidden states of last tokens -> embeddings.

Dimensions: R streams, S sequences of a stream, D hidden.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from lco_jax.core.packing import PackedTokens
from lco_jax.core.weights import dot
from lco_jax.models.decoder import Decoder


def pool(
    decoder: Decoder,
    params: dict[str, Any],
    tokens: PackedTokens,
    media: Array | None = None,
    of: str = "last",
) -> Array:
    """The hidden state at each sequence's last token, after the final norm: float32 [R, S, D].

    media, of: as `Decoder` takes them. Empty rows have the state of their stream's first token; the
    caller knows which rows have a sequence.
    """
    return decoder.apply({"params": params}, tokens, media, of).astype(jnp.float32)


def project(pooled: Array, params: dict[str, Any]) -> Array:
    """Pooled states [..., D] times the model's projection, if it has one."""
    return dot(pooled, params["projection"]["weight"]) if "projection" in params else pooled


def embed(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None = None
) -> Array:
    """`pool`, projected, of unit length: the embeddings [R, S, D].

    params: the model's, {"decoder": tree, …}.
    """
    pooled = project(pool(decoder, params["decoder"], tokens, media), params)
    norm = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
    return pooled / jnp.maximum(norm, 1e-12)
