"""The vocabulary head, for whoever asks a checkpoint what it would say: a loss of tokens, and never all their logits.

Dimensions: N tokens, D hidden, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array

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
