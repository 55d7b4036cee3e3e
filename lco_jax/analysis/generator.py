"""What contrastive learning costs the generator: the loss of captions before and after, and how sure that is.

Dimensions: N captions, B resamples.
"""

from typing import Any

import numpy as np

RESAMPLES = 2000


def token_cost(
    before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray], seed: int
) -> dict[str, Any]:
    """Means over all tokens, and the 95 % interval of their difference by a paired bootstrap (Efron 1979).

    before, after: for the same captions, sums of next-token losses in nats [N] and counts of tokens [N]. A resample
    draws whole captions, both models' losses together, since the tokens of a caption are not independent.
    """
    n = len(before[0])
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # [B, N]: how often each
    means, resampled = [], []
    for sums, counts in (before, after):
        sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
        means.append(float(sums.sum() / counts.sum()))
        resampled.append((draws @ sums) / (draws @ counts))
    low, high = np.quantile(resampled[1] - resampled[0], (0.025, 0.975))
    return {
        "captions": n,
        "tokens": int(np.sum(before[1])),
        "before": {"nats_per_token": means[0], "perplexity": float(np.exp(means[0]))},
        "after": {"nats_per_token": means[1], "perplexity": float(np.exp(means[1]))},
        "difference": {"nats_per_token": means[1] - means[0], "low": float(low), "high": float(high)},
    }
