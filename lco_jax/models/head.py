"""The vocabulary head, for whoever asks a checkpoint what it would say: a loss of tokens, never all their logits, and
the token that comes next.

Dimensions: R streams, A answer tokens of a stream, D hidden, V vocabulary, n parts of a tokens each (A = n · a).
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.sharding import ROWS, constrain, current_row_shards
from lco_jax.core.weights import matmul_precision

LOGITS = 2**26  # that exist at once on a device (256 MiB of float32)


def head_of(params: dict[str, Any]) -> Array:
    """The head's matrix [V, D]: its own, or the embeddings' where they are tied."""
    return params.get("head", params["decoder"]["embed_tokens"])["weight"]


def token_losses(states: Array, weight: Array, targets: Array) -> Array:
    """-log p of each target under softmax(weight · state): float32 [R, A], in nats; 0 where the target is -1.

    states [R, A, D], after the final norm, split over the rows of the mesh; weight [V, D]; targets int [R, A]. Some
    tokens of each stream at a time, so many that a device holds `LOGITS` of them; the backward pass makes them again.
    """
    streams, count = targets.shape
    at_once = max(LOGITS // (weight.shape[0] * -(-streams // current_row_shards())), 1)
    parts = -(-count // at_once)
    room = parts * -(-count // parts) - count

    def split(x: Array, fill: int) -> Array:
        x = jnp.pad(x, ((0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return rearrange(x, "r (n a) ... -> n r a ...", n=parts)

    def one(part: tuple[Array, Array]) -> Array:
        states, targets = part
        precision, weights = matmul_precision(states), weight.astype(states.dtype)
        scores = jnp.einsum(
            "rad,vd->rav", states, weights, precision=precision, preferred_element_type=jnp.float32
        )
        scores = constrain(scores, ROWS, None, "tensor")
        said = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(targets >= 0, jax.nn.logsumexp(scores, axis=-1) - said, 0.0)

    losses = jax.lax.map(jax.checkpoint(one), (split(states, 0), split(targets, -1)))
    return rearrange(losses, "n r a -> r (n a)")[:, :count]


def greedy(states: Array, weight: Array) -> Array:
    """The token that is likeliest next: int32 [...]. states [..., D], after the final norm; weight [V, D]."""
    precision = matmul_precision(states)
    logits = jnp.einsum(
        "...d,vd->...v", states, weight, precision=precision, preferred_element_type=jnp.float32
    )
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
