"""The forms that callers ask of vectors: unit length, fewer numbers, fewer bits, tensors of torch.

Dimensions: N inputs, D numbers of a vector.
"""

import logging
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, check_at_least_1, check_bool

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
FEW = 100  # vectors, of which the ranges of their numbers are little more than a guess
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VectorForm:
    """What `encode` returns, in sentence-transformers' words. Raises for what cannot be.

    precision: one of `PRECISIONS`. "int8" and "uint8" cut each dimension's range, which these
    vectors have, into 256; "binary" and "ubinary" keep signs, eight in a byte.
    truncate_dim: keep so many of the first numbers.
    as_tensor: a tensor of torch. as_numpy: if False, and not as_tensor, a list of N tensors.
    """

    normalize: bool = True
    precision: str | None = "float32"
    truncate_dim: int | None = None
    as_numpy: bool = True
    as_tensor: bool = False

    def __post_init__(self):
        check_bool(
            normalize_embeddings=self.normalize,
            convert_to_numpy=self.as_numpy,
            convert_to_tensor=self.as_tensor,
        )
        check_at_least_1(truncate_dim=self.truncate_dim)
        if self.precision is not None and self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise LcoError(f"precision is {self.precision!r:.60}; it is one of: {known}")
        if self.wants_torch:
            _torch()

    @property
    def wants_torch(self) -> bool:
        """Whether tensors are asked for."""
        return self.as_tensor or not self.as_numpy

    @property
    def is_float(self) -> bool:
        """Whether a vector may have NaN, as those of skipped inputs do."""
        return self.precision in (None, "float32")

    def check(self, count: int, dimension: int, skips: bool) -> None:
        """Raise if so many vectors of such a dimension cannot have this form, before any is made.

        skips: whether bad inputs are skipped, so that their vectors are NaN.
        """
        if self.truncate_dim is not None and self.truncate_dim > dimension:
            raise LcoError(
                f"truncate_dim is {self.truncate_dim}; the model's vectors have {dimension}"
            )
        if skips and not self.is_float:
            skipped = "a skipped input's vector is NaN"
            raise LcoError(f'precision is {self.precision}, and {skipped}; use on_error="raise"')
        if count == 1 and self.precision in ("int8", "uint8"):
            give = "give several inputs, or quantize vectors with ranges of your own"
            raise LcoError(
                f"precision is {self.precision}, and a single vector has no range; {give}"
            )

    def of(self, vectors: np.ndarray, single: bool) -> Any:
        """Vectors, float32 [N, D], in this form. single: whether to return the only one of them."""
        if self.truncate_dim is not None:
            vectors = vectors[:, : self.truncate_dim]
            vectors = unit(vectors) if self.normalize else vectors.copy()
        if not self.is_float:
            vectors = _quantized(vectors, self.precision)
        result: Any = vectors
        if self.wants_torch:
            result = _torch().from_numpy(vectors)
            result = result if self.as_tensor else list(result)
        return result[0] if single else result


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, [..., D]."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _quantized(vectors: np.ndarray, precision: str | None) -> np.ndarray:
    """As sentence-transformers' `quantize_embeddings`: [N, D], or [N, D / 8] of signs."""
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
    if not len(vectors):
        return vectors.astype(precision)
    if len(vectors) < FEW:
        logger.warning("%s: ranges of %d vectors are a rough guess", precision, len(vectors))
    least, most = vectors.min(axis=0), vectors.max(axis=0)
    steps = (most - least) / 255
    levels = np.floor((vectors - least) / np.where(steps == 0, 1, steps)).clip(0, 255)
    return (levels if precision == "uint8" else levels - 128).astype(precision)


def _torch() -> ModuleType:
    """torch, for a caller who wants its tensors. Nothing else here imports it."""
    try:
        return import_module("torch")
    except ImportError as error:
        give = "leave convert_to_tensor and convert_to_numpy out for numpy's arrays"
        raise LcoError(f"torch is not installed; {give}") from error
