"""What contrastive learning costs the generator, and how sure that is.

Dimensions: N captions, B resamples.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError

RESAMPLES = 2000
Losses = tuple[
    np.ndarray, np.ndarray
]  # of each caption: its tokens' losses in nats, summed [N], and their number [N]


def token_cost(losses: Mapping[str, Losses], seed: int) -> dict[str, Any]:
    """The mean loss of a token "before" and, if given, "after", and a 95 % interval of the difference.

    The interval is a paired bootstrap's (Efron 1979). A resample draws whole captions, with both models' losses of
    them, since the tokens of one caption are not independent. Raises for losses that are not finite.
    """
    n = len(losses["before"][0])
    draws = np.random.default_rng(seed).multinomial(
        n, np.full(n, 1 / n), size=RESAMPLES
    )  # [B, N], how often each
    cost: dict[str, Any] = {"captions": n, "tokens": int(losses["before"][1].sum())}
    resampled = {}
    for run, (sums, counts) in losses.items():
        sums = np.asarray(sums, np.float64)
        if bad := int((~np.isfinite(sums)).sum()):
            raise LcoError(
                f"the losses of {bad} of {n} captions {run} are not finite; try --dtype=float32"
            )
        mean = float(sums.sum() / counts.sum())
        cost[run] = {
            "nats_per_token": mean,
            "perplexity": math.exp(mean) if mean < 700 else None,
        }  # no float beyond
        resampled[run] = (draws @ sums) / (draws @ counts)
    if "after" in losses:
        low, high = np.quantile(resampled["after"] - resampled["before"], (0.025, 0.975))
        mean = cost["after"]["nats_per_token"] - cost["before"]["nats_per_token"]
        cost["difference"] = {"nats_per_token": mean, "low": float(low), "high": float(high)}
    return cost
