"""What contrastive learning costs the generator, and how sure that is.

Dimensions: N captions, B resamples.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

RESAMPLES = 2000
Losses = tuple[
    np.ndarray, np.ndarray
]  # of each caption: the sum of its tokens' losses in nats [N], and their number [N]


def token_cost(losses: Mapping[str, Losses], seed: int) -> dict[str, Any]:
    """The mean loss of a token "before" and, if given, "after", and a 95 % interval of the difference.

    The interval is a paired bootstrap's (Efron 1979). A resample draws whole captions, with both models' losses of
    them, since the tokens of one caption are not independent.
    """
    n = len(losses["before"][0])
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # [B, N], how often each
    cost: dict[str, Any] = {"captions": n, "tokens": int(losses["before"][1].sum())}
    resampled = {}
    for run, (sums, counts) in losses.items():
        sums = np.asarray(sums, np.float64)
        mean = float(sums.sum() / counts.sum())
        cost[run] = {"nats_per_token": mean, "perplexity": float(np.exp(mean))}
        resampled[run] = (draws @ sums) / (draws @ counts)
    if "after" in losses:
        low, high = np.quantile(resampled["after"] - resampled["before"], (0.025, 0.975))
        mean = cost["after"]["nats_per_token"] - cost["before"]["nats_per_token"]
        cost["difference"] = {"nats_per_token": mean, "low": float(low), "high": float(high)}
    return cost
