"""The vocabulary head, for whoever asks a checkpoint what it would say: a loss of tokens, never all their
logits, and the token that comes next.

Dimensions: N tokens, D hidden, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lco_jax.core.weights import matmul_precision

LOGITS = 2**26  # that exist at once


def token_losses(states: Array, weight: Array, targets: Array) -> Array:
    """-log p of each target under softmax(weight · state): float32 [N], in nats.

    states [N, D], after the final norm; weight [V, D]; targets int [N]. Some tokens at a time.
    """

    def loss(state: Array, target: Array) -> Array:
        logits = jnp.dot(weight, state, preferred_element_type=jnp.float32)
        return jax.nn.logsumexp(logits) - logits[target]

    at_once = max(LOGITS // weight.shape[0], 1)
    return jax.lax.map(jax.checkpoint(lambda one: loss(*one)), (states, targets), batch_size=at_once)


def greedy(states: Array, weight: Array) -> Array:
    """The token that is likeliest next: int32 [...]. states [..., D], after the final norm; weight [V, D]."""
    precision = matmul_precision(states)
    logits = jnp.einsum("...d,vd->...v", states, weight, precision=precision, preferred_element_type=jnp.float32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
