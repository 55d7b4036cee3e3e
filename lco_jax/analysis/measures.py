"""Measures of paired embeddings of two modalities at one layer, in float64 numpy.

Dimensions: N pairs, D hidden, k nearest neighbours. Row i of one side is paired with row i of the other.

All look at directions: rows are scaled to unit length first. Definitions are the papers'; numbers compare with those of
github.com/minyoungg/platonic-rep (Huh et al. 2024), but for two things that it does and we do not: it clips outlying
values, and adds 1e-6 to denominators, which is not small beside the kernels of an anisotropic layer.
"""

from functools import cached_property

import numpy as np
from scipy.sparse.linalg import svds

from lco_jax.core.errors import LcoError

RESOLUTION = 1e-6  # unit vectors no farther apart are the same in float32, in which models compute
CCA_DIMENSIONS = 10


class Side:
    """One modality's embeddings, and what several measures want to know of them, computed once.

    states: [N, D]; name: of the modality, for errors; k: how many neighbours are near. What embeddings do not define
    raises when it is asked for.
    """

    def __init__(self, states: np.ndarray, name: str, k: int = 10):
        if k < 2:
            raise LcoError(f"k is {k}; a neighbourhood has at least 2 inputs")
        if len(states) < k + 2:
            raise LcoError(f"{len(states)} pairs are too few for {k} nearest neighbours, which take at least {k + 2}")
        self.states, self.name, self.k = states, name, k

    @cached_property
    def unit(self) -> np.ndarray:
        """Rows of unit length [N, D]."""
        states = np.asarray(self.states, np.float64)
        norms = np.linalg.norm(states, axis=1, keepdims=True)
        if not np.isfinite(norms).all():
            raise LcoError(f"{(~np.isfinite(norms)).sum()} of the {self.name} embeddings are not finite")
        if not norms.all():
            raise LcoError(f"{(norms == 0).sum()} of the {self.name} embeddings are zero and have no direction")
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
            raise LcoError(f"the {self.name} embeddings are all the same")
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
            raise LcoError(f"{twins} of the {self.name} embeddings equal another, so that neighbours are arbitrary")
        chosen = np.argpartition(similarity, -self.k, axis=1)[:, -self.k :]
        near = np.zeros(similarity.shape, bool)
        np.put_along_axis(near, chosen, True, axis=1)
        return near

    @cached_property
    def directions(self) -> np.ndarray:
        """Orthonormal [N, 10]: where the inputs lie along the principal directions of the standardised columns."""
        scale = self.deviations.std(axis=0)
        columns = self.deviations[:, scale > RESOLUTION * np.abs(self.unit).max(axis=0)]
        rank = min(columns.shape) - 1  # at least
        if rank >= CCA_DIMENSIONS:
            vectors, values = principal(columns / columns.std(axis=0), CCA_DIMENSIONS)
            rank = int((values > RESOLUTION * values[0]).sum())
        if rank < CCA_DIMENSIONS:
            raise LcoError(f"the {self.name} embeddings span {rank} dimensions, and {CCA_DIMENSIONS} are compared")
        return vectors


def anisotropy(side: Side) -> float:
    """Mean cosine of distinct inputs: 0 where directions are spread evenly, 1 where all are one (Ethayarajh 2019)."""
    n = len(side.unit)
    return float((n * side.mean @ side.mean - 1) / (n - 1))


def modality_gap(a: Side, b: Side) -> float:
    """Distance of the centroids of the two sides' unit vectors, in [0, 2] (Liang et al. 2022)."""
    return float(np.linalg.norm(a.mean - b.mean))


def mutual_knn(a: Side, b: Side) -> float:
    """Share of an input's k neighbours on one side that are neighbours on the other too (Huh et al. 2024).

    Chance gives k / (N - 1).
    """
    return float((a.near & b.near).sum() / a.near.sum())


def cycle_knn(a: Side, b: Side) -> float:
    """Share of inputs that are, in a, a neighbour of one of their own neighbours in b (Huh et al. 2024)."""
    return float((b.near & a.near.T).any(axis=1).mean())


def cka(a: Side, b: Side) -> float:
    """Linear centred kernel alignment, in [0, 1] (Kornblith et al. 2019).

    It is biased: with D not far below N it is high for sides that have nothing in common.
    """
    return float(np.vdot(a.kernel, b.kernel) / (np.linalg.norm(a.kernel) * np.linalg.norm(b.kernel)))


def unbiased_cka(a: Side, b: Side) -> float:
    """CKA by HSIC_1 (Song et al. 2012), about 0 where the sides have nothing in common (Nguyen et al. 2021)."""
    return _aligned(a.kernel, b.kernel, a.kernel, b.kernel)


def cknna(a: Side, b: Side) -> float:
    """Unbiased CKA of cosines of which only those of inputs near on both sides are kept (Huh et al. 2024).

    As in the authors' code, which masks first and leaves centring to HSIC_1; a side by itself keeps all its neighbours.
    """
    near = a.near & b.near
    return _aligned(near * a.cosines, near * b.cosines, a.near * a.cosines, b.near * b.cosines)


def svcca(a: Side, b: Side) -> float:
    """Mean canonical correlation of the two sides' 10 principal directions, in [0, 1] (Raghu et al. 2017).

    10 as Huh et al. have it, of standardised columns; Raghu et al. keep 99 % of the variance. Canonical correlations of
    orthonormal, centred bases are the singular values of their product, so none are estimated by iteration.
    """
    return float(np.minimum(np.linalg.svd(a.directions.T @ b.directions, compute_uv=False), 1.0).mean())


def principal(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest singular values of x [N, D], count < min(N, D), and their left vectors [N, count]."""
    start = np.random.default_rng(0).normal(size=min(x.shape))  # the solver's; it decides no digit that counts
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
    return (both + from_x.sum() * to_y.sum() / ((n - 1) * (n - 2)) - 2 * from_x @ to_y / (n - 2)) / (n * (n - 3))
