"""Hidden states of a sequence -> its embedding.

Dimensions: R streams, T tokens of a stream, S sequences of a stream, N rows and W width of a group
of rows, D hidden, L layers.

"last" takes the state of the last token. "mean" takes the mean over every token of the sequence:
the template's, the prompt's, those of media and of text. These are the tokens that an attention
mask has, and so what sentence-transformers averages. Tokens that sequences share are computed once,
and count for each of them.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from lco_jax.core.packing import PackedTokens
from lco_jax.core.weights import dot
from lco_jax.models.decoder import Decoder
from lco_jax.models.streams import to_rows

POOLINGS = ("last", "mean")


def pool(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None = None
) -> Array:
    """Each sequence's states after the final norm, pooled as `decoder.pooling` says: float32
    [R, S, D].

    media: as `Decoder` takes it. What an empty row has is arbitrary; the caller knows which rows
    have a sequence.
    """
    if decoder.pooling == "mean":
        states = decoder.apply({"params": params}, tokens, media, "tokens")
        return _mean(states, tokens)
    return decoder.apply({"params": params}, tokens, media, "last").astype(jnp.float32)


def last_by_layer(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None = None
) -> Array:
    """The state of each sequence's last token before the first layer and after each one, the last
    of them after the final norm: float32 [R, S, L + 1, D].
    """
    return decoder.apply({"params": params}, tokens, media, "layers").astype(jnp.float32)


def _mean(states: Array, tokens: PackedTokens) -> Array:
    """The mean of each sequence's states [R, T, D]: float32 [R, S, D]."""
    means = []
    for group, rows in zip(tokens.rows, to_rows(states[:, :, None], tokens), strict=True):
        is_token = (group >= 0)[..., None]
        of_sequence = jnp.where(is_token, rows[:, :, 0], 0)  # [R, N, W, D]
        total = jnp.sum(of_sequence, axis=2, dtype=jnp.float32)
        means.append(total / jnp.maximum(jnp.sum(is_token, axis=2), 1))
    return jnp.concatenate(means, axis=1)


def project(pooled: Array, params: dict[str, Any]) -> Array:
    """Pooled states [..., D] times the model's projection, if it has one."""
    return dot(pooled, params["projection"]["weight"]) if "projection" in params else pooled


def pool_or_layers(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None, of: str
) -> Array:
    """What `encode` makes vectors of, the pooled and projected states, if `of` is "pooled"; or
    `last_by_layer`. params: the model's.
    """
    if of == "layers":
        return last_by_layer(decoder, params["decoder"], tokens, media)
    return project(pool(decoder, params["decoder"], tokens, media), params)


def embed(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None = None
) -> Array:
    """`pool`, projected, of unit length: the embeddings [R, S, D].

    params: the model's, {"decoder": tree, …}.
    """
    pooled = project(pool(decoder, params["decoder"], tokens, media), params)
    norm = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
    return pooled / jnp.maximum(norm, 1e-12)
