"""Every measure at every layer; what a layer does not define is None, with a reason.

Dimensions: L + 1 layers (0 the token embeddings, L after the final norm), N pairs, D hidden.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from lco_jax.analysis import measures
from lco_jax.analysis.measures import Side
from lco_jax.core.errors import LcoError

ALIGNMENT = ("mutual_knn", "cka", "unbiased_cka", "cknna", "cycle_knn", "svcca")
MEASURES = ("anisotropy", *ALIGNMENT, "modality_gap")


def definitions() -> dict[str, str]:
    """Measure -> what it is and who defined it, in a sentence."""
    return {name: getattr(measures, name).__doc__.split("\n")[0] for name in MEASURES}


def measure_layers(a: np.ndarray, b: np.ndarray, names: tuple[str, str], k: int) -> dict[str, Any]:
    """Measures of two sides' states, each [L + 1, N, D] -> measure -> a number or None a layer.

    Under anisotropy such a list a side, by its name; under undefined {"layer", "measure", "reason"} of each None.
    """
    undefined: list[dict[str, Any]] = []

    def number(layer: int, name: str, *sides: Side) -> float | None:
        compute: Callable[..., float] = getattr(measures, name)
        try:
            return compute(*sides)
        except LcoError as error:
            undefined.append({"layer": layer, "measure": name, "reason": str(error)})
            return None

    found: dict[str, Any] = {"anisotropy": {name: [] for name in names}, **{name: [] for name in MEASURES[1:]}}
    for layer, states in enumerate(zip(tqdm(a, desc="measuring", unit="layer"), b, strict=True)):
        sides = [Side(x, name, k) for x, name in zip(states, names, strict=True)]
        for side in sides:
            found["anisotropy"][side.name].append(number(layer, "anisotropy", side))
        for name in MEASURES[1:]:
            found[name].append(number(layer, name, *sides))
    return {**found, "undefined": undefined}
