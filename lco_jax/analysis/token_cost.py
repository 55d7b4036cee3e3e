"""What contrastive learning costs the generator, and how sure that is.

Dimensions: N captions, B resamples.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError

RESAMPLES = 2000
# for each caption: the sum of its tokens' losses in nats [N], and the number of its tokens [N]
Losses = tuple[np.ndarray, np.ndarray]


def token_cost(losses: Mapping[str, Losses], seed: int) -> dict[str, Any]:
    """The mean loss of a token "before" and, if given, "after", and the difference's 95 % interval.

    The interval is a paired bootstrap's (Efron 1979). A resample draws captions, each with both
    models' losses, since the tokens of one caption are not independent. Raises for losses that are
    not finite.
    """
    n = len(losses["before"][0])
    # how often each resample draws each caption [B, N]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    cost: dict[str, Any] = {
        "captions": n,
        "tokens": int(losses["before"][1].sum()),
    }
    resampled = {}
    for run, (sums, counts) in losses.items():
        sums = np.asarray(sums, np.float64)
        bad = n - int(np.isfinite(sums).sum())
        if bad:
            raise LcoError(
                f"the losses of {bad} of {n} captions {run} are not finite; try --dtype=float32"
            )
        cost[run] = _mean(float(sums.sum() / counts.sum()))
        resampled[run] = (draws @ sums) / (draws @ counts)
    if "after" in losses:
        low, high = np.quantile(
            resampled["after"] - resampled["before"],
            (0.025, 0.975),
        )
        change = cost["after"]["nats_per_token"] - cost["before"]["nats_per_token"]
        cost["difference"] = _difference(change, low, high)
    return cost


def _difference(change: float, low: float, high: float) -> dict[str, float]:
    return {
        "nats_per_token": change,
        "low": float(low),
        "high": float(high),
    }


def _mean(nats: float) -> dict[str, float | None]:
    perplexity = math.exp(nats) if nats < 700 else None  # no float is larger
    return {"nats_per_token": nats, "perplexity": perplexity}
