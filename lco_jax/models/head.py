"""The vocabulary head: the loss of given tokens, and the token that comes next.

The logits of all tokens are never in memory at once.

Dimensions: R streams, A answer tokens of a stream, D hidden, V vocabulary, n parts of a tokens each
(A = n · a).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.sharding import ROWS, constrain, current_row_shards
from lco_jax.core.weights import matmul_precision

LOGITS = 2**26  # that exist at once on a device (256 MiB of float32)


def head_of(params: dict[str, Any]) -> Array:
    """The head's matrix [V, D], or that of the embeddings where they are tied."""
    return params.get("head", params["decoder"]["embed_tokens"])["weight"]


def token_losses(states: Array, weight: Array, targets: Array) -> Array:
    """-log p of each target under softmax(weight · state): float32 [R, A], in nats.

    It is 0 where the target is -1. A part of each stream's tokens goes through at a time, so that a
    device has about `LOGITS` logits. The backward pass computes them again.
    states: [R, A, D], after the final norm, split over the rows of the mesh. weight: [V, D].
    targets: int [R, A].
    """
    streams, count = targets.shape
    streams_here = math.ceil(streams / current_row_shards())
    most = max(LOGITS // (len(weight) * streams_here), 1)
    parts = math.ceil(count / most)
    room = -count % parts
    states = jnp.pad(states, ((0, 0), (0, room), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, room)), constant_values=-1)

    states = rearrange(states, "r (n a) d -> n r a d", n=parts)
    targets = rearrange(targets, "r (n a) -> n r a", n=parts)

    @jax.checkpoint
    def losses_of(part: tuple[Array, Array]) -> Array:
        return _losses(*part, weight)

    losses = jax.lax.map(losses_of, (states, targets))
    losses = rearrange(losses, "n r a -> r (n a)")
    return losses[:, :count]


def _losses(states: Array, targets: Array, weight: Array) -> Array:
    """`token_losses` of a part: states [R, a, D], targets [R, a] -> [R, a]."""
    logits = _logits(states, weight.astype(states.dtype))
    logits = constrain(logits, ROWS, None, "tensor")
    indices = jnp.maximum(targets, 0)[..., None]
    of_target = jnp.take_along_axis(logits, indices, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - of_target
    return jnp.where(targets >= 0, losses, 0.0)


def greedy(states: Array, weight: Array) -> Array:
    """The likeliest next token: int32 [...].

    states [..., D], after the final norm; weight [V, D].
    """
    return jnp.argmax(_logits(states, weight), axis=-1).astype(jnp.int32)


def _logits(states: Array, weight: Array) -> Array:
    """states [..., D] times weight [V, D]: float32 [..., V]."""
    return jnp.einsum(
        "...d,vd->...v",
        states,
        weight,
        precision=matmul_precision(states),
        preferred_element_type=jnp.float32,
    )
