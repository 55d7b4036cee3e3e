"""Measures of paired states of two modalities, layer by layer, in float64.

Dimensions: L + 1 layers, N pairs, D hidden, k nearest neighbours. Row i of one side is paired with
row i of the other.

All measures look at directions: rows are scaled to unit length first. Definitions are the papers'.
Numbers compare with those of github.com/minyoungg/platonic-rep (Huh et al. 2024), which does two
things that this file does not: it clips outlying values, and it adds 1e-6 to denominators, which is
not small beside the kernels of an anisotropic layer.
"""

from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse.linalg import svds

from lco_jax.core.console import progress_bar
from lco_jax.core.errors import LcoError

# unit vectors no farther apart are the same in float32, in which models compute
RESOLUTION = 1e-6
CCA_DIMENSIONS = 10


class Side:
    """One modality's states [N, D] at one layer, and what several measures need, computed once.

    k: how many neighbours are near. name: for errors. A property raises where the states do not
    define it.
    """

    def __init__(self, states: np.ndarray, name: str, k: int):
        if k < 2 or len(states) < k + 2:
            raise LcoError(
                f"{len(states)} pairs and {k} neighbours: "
                "there must be 2 neighbours, and 2 more pairs than neighbours"
            )
        self.states = states
        self.name = name
        self.k = k

    @cached_property
    def unit(self) -> np.ndarray:
        """Rows of unit length [N, D]."""
        states = np.asarray(self.states, np.float64)
        norms = np.linalg.norm(states, axis=1, keepdims=True)
        bad = int((~np.isfinite(norms) | (norms == 0)).sum())
        if bad:
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
        """The unit rows minus their centroid [N, D]."""
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
        """[N, N]; made from the kernel, since another product of that size would cost as much."""
        offset = self.unit @ self.mean
        return self.kernel + (offset[:, None] + offset[None, :] - self.mean @ self.mean)

    @cached_property
    def near(self) -> np.ndarray:
        """Whether j is one of the k inputs most similar to i: bool [N, N]."""
        similarity = self.cosines.copy()
        np.fill_diagonal(similarity, -np.inf)
        twins = int((similarity.max(axis=1) >= 1 - RESOLUTION**2 / 2).sum())
        if twins:
            raise LcoError(
                f"{twins} of the {self.name} states equal another, "
                "and neighbours would be arbitrary"
            )
        nearest = np.argpartition(similarity, -self.k, axis=1)[:, -self.k :]
        near = np.zeros(similarity.shape, bool)
        np.put_along_axis(near, nearest, True, axis=1)
        return near

    @cached_property
    def directions(self) -> np.ndarray:
        """Where the inputs are along the principal directions of the standardised columns.

        Orthonormal [N, 10].
        """
        varying = self.deviations.std(axis=0) > RESOLUTION * np.abs(self.unit).max(axis=0)
        columns = self.deviations[:, varying]
        rank = min(columns.shape) - 1  # at least
        if rank >= CCA_DIMENSIONS:
            standardised = columns / columns.std(axis=0)
            vectors, values = principal(standardised, CCA_DIMENSIONS)
            rank = int((values > RESOLUTION * values[0]).sum())
        if rank < CCA_DIMENSIONS:
            raise LcoError(
                f"the {self.name} states vary in {rank} directions, "
                f"and {CCA_DIMENSIONS} are compared"
            )
        return vectors


def anisotropy(side: Side) -> float:
    """Mean cosine of distinct inputs: 0: directions are even, 1: all are one (Ethayarajh 2019)."""
    n = len(side.unit)
    return float((n * side.mean @ side.mean - 1) / (n - 1))


def modality_gap(a: Side, b: Side) -> float:
    """Distance of the centroids of the two sides' unit vectors, in [0, 2] (Liang et al. 2022)."""
    return float(np.linalg.norm(a.mean - b.mean))


def mutual_knn(a: Side, b: Side) -> float:
    """Share of the k nearest neighbours common to both sides; chance: k / (N - 1) (Huh 2024)."""
    return float((a.near & b.near).sum() / a.near.sum())


def cycle_knn(a: Side, b: Side) -> float:
    """Share of inputs that are, in a, a neighbour of one of their neighbours in b (Huh's code)."""
    return float((a.near.T & b.near).any(axis=1).mean())


def cka(a: Side, b: Side) -> float:
    """Linear centred kernel alignment, in [0, 1]; high if D is large beside N (Kornblith 2019)."""
    norms = np.linalg.norm(a.kernel) * np.linalg.norm(b.kernel)
    return float(np.vdot(a.kernel, b.kernel) / norms)


def unbiased_cka(a: Side, b: Side) -> float:
    """CKA by HSIC_1 (Song 2012); about 0 if the sides have nothing in common (Nguyen 2021)."""
    return _aligned(a.kernel, b.kernel, a.kernel, b.kernel)


def cknna(a: Side, b: Side) -> float:
    """Unbiased CKA of the cosines of inputs that are neighbours on both sides (Huh et al. 2024).

    As in the authors' code, other cosines are set to 0 first, and HSIC_1 centres afterwards. A side
    that is compared with itself keeps all its neighbours.
    """
    near = a.near & b.near
    return _aligned(
        near * a.cosines,
        near * b.cosines,
        a.near * a.cosines,
        b.near * b.cosines,
    )


def svcca(a: Side, b: Side) -> float:
    """Mean canonical correlation of the sides' 10 principal directions, in [0, 1] (Raghu 2017).

    10 directions of standardised columns as in Huh et al.'s code; Raghu et al. keep 99 % of the
    variance. The canonical correlations of orthonormal, centred bases are the singular values of
    their product, so nothing is iterated.
    """
    correlations = np.linalg.svd(a.directions.T @ b.directions, compute_uv=False)
    return float(np.minimum(correlations, 1.0).mean())


def principal(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors [N, count] of x [N, D], and the `count` largest singular values.

    count < min(N, D).
    """
    if not x.any():
        raise LcoError("all states are the same, and have no principal directions")
    start = np.random.default_rng(0).normal(size=min(x.shape))  # the solver's
    vectors, values, _ = svds(x, count, v0=start, return_singular_vectors="u")
    return vectors[:, ::-1], values[::-1]


def _aligned(
    x: np.ndarray,
    y: np.ndarray,
    alone_x: np.ndarray,
    alone_y: np.ndarray,
) -> float:
    """HSIC of kernels x and y over the geometric mean of each side's HSIC with itself."""
    scale_x = _hsic(alone_x, alone_x)
    scale_y = _hsic(alone_y, alone_y)
    if min(scale_x, scale_y) <= 0:
        raise LcoError("a side's HSIC with itself is not above 0")
    return float(_hsic(x, y) / np.sqrt(scale_x * scale_y))


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 of kernels [N, N], whose diagonals it ignores: equation 5 of Song et al. 2012."""
    n = len(x)
    diagonal_x, diagonal_y = np.diagonal(x), np.diagonal(y)
    from_x = x.sum(axis=0) - diagonal_x
    to_y = y.sum(axis=1) - diagonal_y
    both = np.einsum("ij,ji->", x, y) - diagonal_x @ diagonal_y
    apart = from_x.sum() * to_y.sum() / ((n - 1) * (n - 2))
    mixed = 2 * from_x @ to_y / (n - 2)
    return (both + apart - mixed) / (n * (n - 3))


ALIGNMENT = (
    mutual_knn,
    cka,
    unbiased_cka,
    cknna,
    cycle_knn,
    svcca,
)
BETWEEN = (*ALIGNMENT, modality_gap)  # the measures of two sides
DEFINITIONS = {
    measure.__name__: (measure.__doc__ or "").split("\n")[0] for measure in (anisotropy, *BETWEEN)
}


def measure_layers(a: np.ndarray, b: np.ndarray, names: tuple[str, str], k: int) -> dict[str, Any]:
    """Every measure of two sides' states, each [L + 1, N, D] -> {measure: a number for each layer}.

    A number is None where it is not defined; "undefined" then has the layer, measure and reason.
    "anisotropy" has a list for each side's name.
    """
    found: dict[str, Any] = {"anisotropy": {name: [] for name in names}}
    found |= {measure.__name__: [] for measure in BETWEEN}
    undefined: list[dict[str, Any]] = []
    layers = zip(progress_bar(a, desc="measuring", unit="layer"), b, strict=True)
    for layer, (states_a, states_b) in enumerate(layers):
        sides = (
            Side(states_a, names[0], k),
            Side(states_b, names[1], k),
        )
        wanted = [(found["anisotropy"][side.name], anisotropy, [side]) for side in sides]
        wanted += [(found[measure.__name__], measure, sides) for measure in BETWEEN]
        for values, measure, arguments in wanted:
            try:
                values.append(measure(*arguments))
            except LcoError as error:
                values.append(None)
                gap = {
                    "layer": layer,
                    "measure": measure.__name__,
                    "reason": str(error),
                }
                undefined.append(gap)
    return {**found, "undefined": undefined}
