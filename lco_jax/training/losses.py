"""The contrastive loss.

Dimensions: B records, M hard negatives a record, D hidden, N candidates = B · (1 + M).
"""

import jax
import jax.numpy as jnp
from jax import Array

from lco_jax.core.sharding import ROWS, constrain


def info_nce(embeddings: Array, present: Array, temperature: float) -> tuple[Array, dict[str, Array]]:
    """One-way InfoNCE of every anchor against all positives and all hard negatives of the global batch.

    embeddings: float32 [B, 2 + M, D], normalised: anchor, positive, negatives of each record.
    present: bool [B, 2 + M], False where a record has no such negative.
    Returns the mean loss and its metrics. Written as if on one device: the compiler gathers the candidates, and the
    gradient is that of the global loss on any mesh (the reference's is divided by the world size). Paper, eq. 1.
    """
    anchors = constrain(embeddings[:, 0], ROWS)
    candidates = jnp.concatenate([embeddings[:, 1], embeddings[:, 2:].reshape(-1, embeddings.shape[-1])])
    real = jnp.concatenate([present[:, 1], present[:, 2:].reshape(-1)])
    cosines = jnp.einsum("bd,nd->bn", anchors, candidates, precision=jax.lax.Precision.HIGHEST)
    logits = jnp.where(real, cosines / temperature, -jnp.inf)
    own = jnp.arange(anchors.shape[0])
    positive = cosines[own, own]
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - positive / temperature)
    others = real & (jnp.arange(candidates.shape[0]) != own[:, None])
    return loss, {
        "loss": loss,
        "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == own),
        "positive_similarity": jnp.mean(positive),
        "negative_similarity": jnp.sum(jnp.where(others, cosines, 0.0)) / jnp.maximum(jnp.sum(others), 1),
    }
