"""The quantities of the paper's bound, estimated: what media and text share, and how far tuning
moved the decoder.

Dimensions: N pairs, D hidden.

The paper bounds the risk of a representation by what the generative prior already knows (the mutual
information of modality and text, less the generative loss) and by KL(Q ‖ P), what tuning departs
from that prior (section on GRSL). docs/laboratory.md says what these estimates are, and what they
are not.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp

from laboratory.measure import pairs
from lco_jax.checkpoint.hf import Checkpoint
from lco_jax.core.errors import LcoError

TEMPERATURE = (
    0.03  # the recipe's; so the loss is what training minimises, of pairs that it never saw
)


def info_nce(media: np.ndarray, texts: np.ndarray, temperature: float = TEMPERATURE) -> float:
    """The loss in nats of finding each row's own text among all N; both sides unit vectors [N, D]
    (paper, eq. 1).
    """
    logits = media.astype(np.float64) @ texts.astype(np.float64).T / temperature  # [N, N]
    return float((logsumexp(logits, axis=1) - logits.diagonal()).mean())


def information(
    encode: Callable[[list[Any]], np.ndarray], world: Path, temperature: float = TEMPERATURE
) -> dict[str, dict[str, float]]:
    """{"infonce", "mi_bound", "ceiling"}: {kind: nats} of every tests/retrieval_KIND.jsonl, media
    finding their texts.

    mi_bound: I(medium; text) >= log N - loss for any critic (van den Oord et al. 2018, arXiv
    1807.03748, section 2.3); it cannot exceed its ceiling, log N, and below 0 says nothing.
    """
    found: dict[str, dict[str, float]] = {"infonce": {}, "mi_bound": {}, "ceiling": {}}
    for kind, (media, texts) in pairs(world).items():
        vectors = encode([*media, *texts])
        loss, ceiling = (
            info_nce(vectors[: len(media)], vectors[len(media) :], temperature),
            math.log(len(media)),
        )
        found["infonce"][kind], found["mi_bound"][kind], found["ceiling"][kind] = (
            loss,
            ceiling - loss,
            ceiling,
        )
    return found


def gaussian_kl(base: np.ndarray, tuned: np.ndarray, variance: float | None = None) -> float:
    """KL(N(tuned, s² I) ‖ N(base, s² I)) = ‖tuned - base‖² / 2 s², in nats.

    variance: s², by default that of the base's own entries: a departure counts by the scale of what
    it departs from.
    """
    base, tuned = base.astype(np.float64), tuned.astype(np.float64)
    scale = float(base.var()) if variance is None else variance
    distance = float(((tuned - base) ** 2).sum())
    if distance and scale <= 0:
        raise LcoError(
            "the base's entries are all the same, and give no variance to measure a distance by"
        )
    return distance / (2 * scale) if distance else 0.0


def decoder_kl(base: Checkpoint, tuned: Checkpoint) -> float:
    """KL(Q ‖ P) in nats of two checkpoints of one geometry, summed over the decoder's tensors; one
    is read at a time.

    A matrix's variance is its own in the base. A bias or norm, whose entries may all be equal,
    takes that of all entries of the base's matrices. Whatever tuned them (LoRA, merged; all
    weights), what is compared is the weights.
    """
    names, others = (checkpoint.keys["decoder"] for checkpoint in (base, tuned))
    if names.keys() != others.keys():
        raise LcoError(
            f"the decoders of {base.folder} and {tuned.folder} differ in their tensors; "
            "compare two of one base"
        )
    total, moved, count, square, plain = 0.0, 0.0, 0, 0.0, 0.0
    for name, key in names.items():
        a, b = (
            base.tensors.read(key).astype(np.float64),
            tuned.tensors.read(others[name]).astype(np.float64),
        )
        if a.shape != b.shape:
            raise LcoError(
                f"{name} has shape {a.shape} in {base.folder}, and {b.shape} in {tuned.folder}"
            )
        if a.ndim < 2:
            moved += ((a - b) ** 2).sum()
            continue
        total += gaussian_kl(a, b)
        count, square, plain = count + a.size, square + (a**2).sum(), plain + a.sum()
    return float(total + moved / (2 * (square / count - (plain / count) ** 2)))


def projection_kl(matrix: np.ndarray) -> float:
    """The same, of a linear projection [D, D] that was tuned from the identity while the decoder
    stood still.
    """
    return gaussian_kl(np.eye(len(matrix)), matrix)
