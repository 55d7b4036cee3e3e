"""The contrastive loss.

Dimensions: B records, M hard negatives a record, D hidden, N candidates = B · (1 + M).
"""

import jax
import jax.numpy as jnp
from jax import Array

from lco_jax.core.sharding import ROWS, constrain


def info_nce(
    embeddings: Array, present: Array, temperature: float, content: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """One-way InfoNCE of every anchor against all positives and all hard negatives of the global batch.

    embeddings: float32 [B, 2 + M, D], normalised: anchor, positive, negatives of each record.
    present: bool [B, 2 + M], False where a record has no such negative, and throughout for a record that was left out.
    content: int [B, 2 + M], equal for sides that say the same; given, whatever says the same as an anchor's positive is
    no negative of that anchor (captions of a few classes repeat in every batch).
    Returns the mean loss and its metrics. Written as if on one device: the compiler gathers the candidates, and the
    gradient is that of the global loss on any mesh (the reference's is divided by the world size). Paper, eq. 1.
    """
    anchors = constrain(embeddings[:, 0], ROWS)
    candidates = jnp.concatenate([embeddings[:, 1], embeddings[:, 2:].reshape(-1, embeddings.shape[-1])])
    real = jnp.concatenate([present[:, 1], present[:, 2:].reshape(-1)])
    cosines = jnp.einsum("bd,nd->bn", anchors, candidates, precision=jax.lax.Precision.HIGHEST)
    own = jnp.arange(anchors.shape[0])
    others = real & (jnp.arange(candidates.shape[0]) != own[:, None])
    if content is not None:
        others &= jnp.concatenate([content[:, 1], content[:, 2:].reshape(-1)]) != content[:, 1:2]
    logits = jnp.where(others.at[own, own].set(True), cosines / temperature, -jnp.inf)
    positive = cosines[own, own]
    there = present[:, 0]
    mean = lambda x: jnp.sum(jnp.where(there, x, 0.0)) / jnp.maximum(jnp.sum(there), 1)  # noqa: E731, of anchors there
    loss = mean(jax.nn.logsumexp(logits, axis=-1) - positive / temperature)
    others &= there[:, None]
    return loss, {
        "loss": loss,
        "accuracy": mean(jnp.argmax(logits, axis=-1) == own),
        "positive_similarity": mean(positive),
        "negative_similarity": jnp.sum(jnp.where(others, cosines, 0.0)) / jnp.maximum(jnp.sum(others), 1),
    }
