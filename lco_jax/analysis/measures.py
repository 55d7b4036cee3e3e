"""Measures of paired states of two modalities, layer by layer, in float64.

Dimensions: L + 1 layers, N pairs, D hidden, k nearest neighbours. Row i of one side is paired with row i of the other.

All look at directions: rows are scaled to unit length first. Definitions are the papers'; numbers compare with those of
github.com/minyoungg/platonic-rep (Huh et al. 2024), but for two things that it does and we do not: it clips outlying
values, and adds 1e-6 to denominators, which is not small beside the kernels of an anisotropic layer.
"""

from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse.linalg import svds
from tqdm import tqdm

from lco_jax.core.errors import LcoError

RESOLUTION = 1e-6  # unit vectors no farther apart are the same in float32, in which models compute
CCA_DIMENSIONS = 10


class Side:
    """One modality's states [N, D] at one layer, and what several measures want to know of them, computed once.

    k: how many neighbours are near. name: in errors, which are raised when what the states do not define is asked for.
    """

    def __init__(self, states: np.ndarray, name: str, k: int):
        if k < 2 or len(states) < k + 2:
            raise LcoError(
                f"{len(states)} pairs and {k} neighbours: there must be 2 neighbours, and 2 more pairs"
            )
        self.states, self.name, self.k = states, name, k

    @cached_property
    def unit(self) -> np.ndarray:
        """Rows of unit length [N, D]."""
        states = np.asarray(self.states, np.float64)
        norms = np.linalg.norm(states, axis=1, keepdims=True)
        if bad := int((~np.isfinite(norms) | (norms == 0)).sum()):
            raise LcoError(
                f"{bad} of the {self.name} states are zero or not finite, and have no direction"
            )
        return states / norms

    @cached_property
    def mean(self) -> np.ndarray:
        """The centroid [D] of the unit rows."""
        return self.unit.mean(axis=0)

    @cached_property
    def deviations(self) -> np.ndarray:
        """The unit rows less their centroid [N, D]."""
        deviations = self.unit - self.mean
        if np.linalg.norm(deviations, axis=1).max() <= RESOLUTION:
            raise LcoError(f"the {self.name} states are all the same")
        return deviations

    @cached_property
    def kernel(self) -> np.ndarray:
        """Inner products of the deviations [N, N]."""
        return self.deviations @ self.deviations.T

    @cached_property
    def cosines(self) -> np.ndarray:
        """[N, N]; made from the kernel, since another product of that size would cost as much again."""
        offset = self.unit @ self.mean
        return self.kernel + (offset[:, None] + offset[None, :] - self.mean @ self.mean)

    @cached_property
    def near(self) -> np.ndarray:
        """bool [N, N]: whether j is one of the k inputs most similar to i."""
        similarity = self.cosines.copy()
        np.fill_diagonal(similarity, -np.inf)
        if twins := int((similarity.max(axis=1) >= 1 - RESOLUTION**2 / 2).sum()):
            raise LcoError(
                f"{twins} of the {self.name} states equal another, and neighbours would be arbitrary"
            )
        near = np.zeros(similarity.shape, bool)
        np.put_along_axis(
            near, np.argpartition(similarity, -self.k, axis=1)[:, -self.k :], True, axis=1
        )
        return near

    @cached_property
    def directions(self) -> np.ndarray:
        """Orthonormal [N, 10]: where the inputs lie along the principal directions of the standardised columns."""
        varying = self.deviations.std(axis=0) > RESOLUTION * np.abs(self.unit).max(axis=0)
        columns = self.deviations[:, varying]
        rank = min(columns.shape) - 1  # at least
        if rank >= CCA_DIMENSIONS:
            vectors, values = principal(columns / columns.std(axis=0), CCA_DIMENSIONS)
            rank = int((values > RESOLUTION * values[0]).sum())
        if rank < CCA_DIMENSIONS:
            raise LcoError(
                f"the {self.name} states vary in {rank} directions, and {CCA_DIMENSIONS} are compared"
            )
        return vectors


def anisotropy(side: Side) -> float:
    """Mean cosine of distinct inputs: 0 where directions are spread evenly, 1 where all are one (Ethayarajh 2019)."""
    n = len(side.unit)
    return float((n * side.mean @ side.mean - 1) / (n - 1))


def modality_gap(a: Side, b: Side) -> float:
    """Distance between the centroids of the two sides' unit vectors, in [0, 2] (Liang et al. 2022)."""
    return float(np.linalg.norm(a.mean - b.mean))


def mutual_knn(a: Side, b: Side) -> float:
    """Share of the k nearest neighbours that an input has in common on both sides; chance: k / (N - 1) (Huh 2024)."""
    return float((a.near & b.near).sum() / a.near.sum())


def cycle_knn(a: Side, b: Side) -> float:
    """Share of inputs that are, in a, a neighbour of one of their own neighbours in b (Huh et al. 2024's code)."""
    return float((a.near.T & b.near).any(axis=1).mean())


def cka(a: Side, b: Side) -> float:
    """Linear centred kernel alignment, in [0, 1]; high for any sides if D is large beside N (Kornblith et al. 2019)."""
    return float(
        np.vdot(a.kernel, b.kernel) / (np.linalg.norm(a.kernel) * np.linalg.norm(b.kernel))
    )


def unbiased_cka(a: Side, b: Side) -> float:
    """CKA by HSIC_1 of Song et al. 2012, about 0 where sides have nothing in common (Nguyen et al. 2021)."""
    return _aligned(a.kernel, b.kernel, a.kernel, b.kernel)


def cknna(a: Side, b: Side) -> float:
    """Unbiased CKA of the cosines of inputs that are nearest neighbours on both sides, others 0 (Huh et al. 2024).

    As in the authors' code: masked first, then centred by HSIC_1; a side by itself keeps all its neighbours.
    """
    near = a.near & b.near
    return _aligned(near * a.cosines, near * b.cosines, a.near * a.cosines, b.near * b.cosines)


def svcca(a: Side, b: Side) -> float:
    """Mean canonical correlation of the sides' 10 principal directions, in [0, 1] (Raghu et al. 2017).

    10 directions of standardised columns as in Huh et al.'s code; Raghu et al. keep 99 % of the variance. Canonical
    correlations of orthonormal, centred bases are the singular values of their product, so nothing is iterated.
    """
    return float(
        np.minimum(np.linalg.svd(a.directions.T @ b.directions, compute_uv=False), 1.0).mean()
    )


def principal(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest singular values of x [N, D], count < min(N, D), and their left vectors [N, count]."""
    if not x.any():
        raise LcoError("all states are the same, and have no principal directions")
    start = np.random.default_rng(0).normal(size=min(x.shape))  # the solver's
    vectors, values, _ = svds(x, count, v0=start, return_singular_vectors="u")
    return vectors[:, ::-1], values[::-1]


def _aligned(x: np.ndarray, y: np.ndarray, own_x: np.ndarray, own_y: np.ndarray) -> float:
    """HSIC of two kernels over the geometric mean of each side's own."""
    scales = _hsic(own_x, own_x), _hsic(own_y, own_y)
    if min(scales) <= 0:
        raise LcoError("a side's HSIC with itself is not above 0")
    return float(_hsic(x, y) / np.sqrt(scales[0] * scales[1]))


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 of kernels [N, N], whose diagonals it ignores: equation 5 of Song et al. 2012."""
    n, own_x, own_y = len(x), np.diagonal(x), np.diagonal(y)
    from_x, to_y = x.sum(axis=0) - own_x, y.sum(axis=1) - own_y
    both = np.einsum("ij,ji->", x, y) - own_x @ own_y
    return (
        both + from_x.sum() * to_y.sum() / ((n - 1) * (n - 2)) - 2 * from_x @ to_y / (n - 2)
    ) / (n * (n - 3))


ALIGNMENT = (mutual_knn, cka, unbiased_cka, cknna, cycle_knn, svcca)
MEASURES = {measure.__name__: measure for measure in (anisotropy, *ALIGNMENT, modality_gap)}


def measure_layers(a: np.ndarray, b: np.ndarray, names: tuple[str, str], k: int) -> dict[str, Any]:
    """Every measure of two sides' states, each [L + 1, N, D] -> {measure: a number or None a layer}.

    "anisotropy" has such a list for each side's name; "undefined" says of each None its layer, measure and reason.
    """
    found: dict[str, Any] = {name: [] for name in MEASURES} | {
        "anisotropy": {name: [] for name in names}
    }
    undefined: list[dict[str, Any]] = []

    def note(into: list, layer: int, name: str, *sides: Side) -> None:
        try:
            into.append(MEASURES[name](*sides))
        except LcoError as error:
            into.append(None)
            undefined.append({"layer": layer, "measure": name, "reason": str(error)})

    for layer, states in enumerate(zip(tqdm(a, desc="measuring", unit="layer"), b, strict=True)):
        sides = [Side(side, name, k) for side, name in zip(states, names, strict=True)]
        for side in sides:
            note(found["anisotropy"][side.name], layer, "anisotropy", side)
        for name in [name for name in MEASURES if name != "anisotropy"]:
            note(found[name], layer, name, *sides)
    return {**found, "undefined": undefined}
