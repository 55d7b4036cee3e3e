"""Looks up runs of the laboratory, and computes means, intervals and a straight line.

Dimensions: S seeds, n points, B resamples.

A run is an object of results.json ("runs"); a missing number, and one that is not finite, is None
and is left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata, t

MODALITIES = ("image", "video", "audio", "page")
METHOD = "lora"  # the paper's way of tuning: text alone, low rank
RESAMPLES = 2000
TINY = 1e-12  # a scale of which nothing is told apart
Run = dict[str, Any]


class Estimate(NamedTuple):
    """A mean over n seeds, or a correlation of n points, and its 95 % interval; None where there is
    no such value.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int


class Points(NamedTuple):
    """x, y [n] and the seed of each."""

    x: np.ndarray
    y: np.ndarray
    seeds: np.ndarray


def number(run: Run | None, *path: str) -> float | None:
    """The finite number at a path of keys; None for whatever else."""
    value: Any = run
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of what is there."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def retrieval_of(run: Run | None, *modalities: str) -> float | None:
    """Recall@1: the mean of text to media and media to text, over the modalities of the run."""
    each = [
        (
            number(run, "representation", f"text_to_{m}"),
            number(run, "representation", f"{m}_to_text"),
        )
        for m in modalities
    ]
    return mean_of([None if None in both else sum(both) / 2 for both in each])


def retrieval(*modalities: str) -> Callable[[Run | None], float | None]:
    """`retrieval_of` these modalities."""
    return lambda run: retrieval_of(run, *modalities)


def exact(kind: str) -> Callable[[Run], float | None]:
    """Generative quality: the share of held-out answers that a run meets to the letter."""
    return lambda run: number(run, "generative", kind, "exact")


def negative_loss(kind: str) -> Callable[[Run], float | None]:
    """Generative quality: minus the held-out loss, in nats a token."""

    def quality(run: Run) -> float | None:
        loss = number(run, "generative", kind, "loss")
        return None if loss is None else -loss

    return quality


def last_layer(run: Run | None, measure: str, kind: str) -> float | None:
    """A measure of the embedding itself."""
    layers = ((run or {}).get("layers") or {}).get(measure) or {}
    return number({"last": (layers.get(kind) or [None])[-1]}, "last")


def find(runs: Sequence[Run], seed: int, steps: int, tune: str) -> Run | None:
    """The run of a seed, of a generator trained for so many steps, tuned so."""
    return next((run for run in of_all_seeds(runs, steps, tune) if run["seed"] == seed), None)


def of_all_seeds(runs: Sequence[Run], steps: int, tune: str) -> list[Run]:
    """The runs of generators trained for so many steps, tuned so."""
    return [run for run in runs if (run["generative_steps"], run["tune"]) == (steps, tune)]


def qualities(runs: Sequence[Run]) -> list[int]:
    """The generative steps that occur, ascending."""
    return sorted({run["generative_steps"] for run in runs})


def seeds_of(runs: Sequence[Run]) -> list[int]:
    """The seeds that occur, ascending."""
    return sorted({run["seed"] for run in runs})


def over_seeds(runs: Sequence[Run], value: Callable[[int], float | None]) -> Estimate | None:
    """The mean of `value` (of a seed) with Student's interval over seeds; without two seeds there
    is no interval.
    """
    found = [one for one in map(value, seeds_of(runs)) if one is not None]
    return interval(found) if found else None


def interval(values: Sequence[float]) -> Estimate:
    """The mean of one value or more, with Student's interval if there are two."""
    found = np.asarray(values, float)
    if found.size < 2:
        return Estimate(float(found.mean()), None, None, 1)
    half = float(t.ppf(0.975, found.size - 1) * found.std(ddof=1) / math.sqrt(found.size))
    return Estimate(
        float(found.mean()), float(found.mean() - half), float(found.mean() + half), found.size
    )


def scaling(
    runs: Sequence[Run],
    x: Callable[[Run], float | None],
    y: Callable[[Run], float | None],
    least_steps: int = 0,
    method: str = METHOD,
) -> Points:
    """A point for every seed and generator: x of it before contrastive learning, y after text-only
    LoRA.

    method: what that is called. least_steps: leaves out generators that were trained less.
    """
    found = []
    for run in runs:
        if run["tune"] == "none" and run["generative_steps"] >= least_steps:
            point = x(run), y(find(runs, run["seed"], run["generative_steps"], method) or {})
            found += [] if None in point else [(*point, run["seed"])]
    return Points(*(np.array([row[i] for row in found], float) for i in range(3)))


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the last axis; NaN where a side does not vary."""
    x, y = (side - side.mean(axis=-1, keepdims=True) for side in (x, y))
    scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.where(scale > TINY, (x * y).sum(axis=-1) / np.maximum(scale, TINY), np.nan)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis, tied ranks sharing their mean; NaN where a side
    does not vary.
    """
    return pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))


def correlation(
    points: Points, measure: Callable[[np.ndarray, np.ndarray], np.ndarray] = pearson, seed: int = 0
) -> Estimate | None:
    """A correlation of three points or more, and its bootstrap interval (Efron 1979), seeds as
    clusters.

    A resample puts a seed drawn with replacement in the place of each seed, and for each of its
    points one of the drawn seed's; one in which nothing varies is passed over. Without two seeds,
    or where most are passed over, there is no interval; where nothing varies at all, there is no
    number either. None of fewer points.
    """
    n, rng = len(points.x), np.random.default_rng(seed)
    if n < 3:
        return None
    if np.isnan(value := float(measure(points.x, points.y))):
        return Estimate(None, None, None, n)
    order = np.argsort(points.seeds, kind="stable")
    _, first, place, size = np.unique(
        points.seeds[order], return_index=True, return_inverse=True, return_counts=True
    )
    drawn = rng.integers(len(first), size=(RESAMPLES, len(first)))[
        :, place
    ]  # [B, n]: of each point, whose it is
    at = order[first[drawn] + (rng.random((RESAMPLES, n)) * size[drawn]).astype(int)]
    found = measure(points.x[at], points.y[at])
    found = found[~np.isnan(found)]
    if len(first) < 2 or len(found) < RESAMPLES / 2:
        return Estimate(value, None, None, n)
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(value, float(low), float(high), n)
