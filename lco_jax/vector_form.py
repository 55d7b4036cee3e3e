"""The forms that callers ask of vectors: unit length, fewer numbers, fewer bits, tensors of torch.

Dimensions: N inputs, D numbers of a vector.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, check_at_least_1, check_bool
from lco_jax.core.small_vectors import (
    LEVELS,
    check_precision,
    checked_ranges,
    quantize_embeddings,
    unit,
)


@dataclass(frozen=True)
class VectorForm:
    """What `encode` returns, in sentence-transformers' words. Raises for what cannot be.

    precision: one of `PRECISIONS`. "int8" and "uint8" cut each dimension's range into 256;
    "binary" and "ubinary" keep signs, eight in a byte.
    ranges: of "int8" and "uint8", [2, D] of least and most. By default those of these very vectors,
    so that a vector depends on those beside it.
    truncate_dim: keep so many of the first numbers, D.
    as_tensor: a tensor of torch. as_numpy: if False, and not as_tensor, a list of N tensors.
    """

    normalize: bool = True
    precision: str | None = "float32"
    truncate_dim: int | None = None
    as_numpy: bool = True
    as_tensor: bool = False
    ranges: Any = None

    def __post_init__(self):
        check_bool(
            normalize_embeddings=self.normalize,
            convert_to_numpy=self.as_numpy,
            convert_to_tensor=self.as_tensor,
        )
        check_at_least_1(truncate_dim=self.truncate_dim)
        if self.precision is not None:
            check_precision(self.precision)
        if self.ranges is not None and self.precision not in LEVELS:
            raise LcoError(f"ranges go with int8 and uint8, and precision is {self.precision}")
        if self.wants_torch:
            _torch()

    @property
    def wants_torch(self) -> bool:
        """Whether tensors are asked for."""
        return self.as_tensor or not self.as_numpy

    @property
    def is_float(self) -> bool:
        """Whether a vector may have NaN, as those of skipped inputs do."""
        return self.precision in (None, "float32", "float16")

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
        if self.ranges is not None:
            checked_ranges(self.ranges, self.truncate_dim or dimension)
        elif count == 1 and self.precision in LEVELS:
            give = "give ranges, or several inputs"
            raise LcoError(
                f"precision is {self.precision}, and a single vector has no range; {give}"
            )

    def of(self, vectors: np.ndarray, single: bool) -> Any:
        """Vectors, float32 [N, D], in this form. single: whether to return the only one of them."""
        if self.truncate_dim is not None:
            vectors = vectors[:, : self.truncate_dim]
            vectors = unit(vectors) if self.normalize else vectors.copy()
        if self.precision not in (None, "float32"):
            vectors = quantize_embeddings(vectors, self.precision, self.ranges)
        result: Any = vectors
        if self.wants_torch:
            result = _torch().from_numpy(vectors)
            result = result if self.as_tensor else list(result)
        return result[0] if single else result


def _torch() -> ModuleType:
    """torch, for a caller who wants its tensors. Nothing else here imports it."""
    try:
        return import_module("torch")
    except ImportError as error:
        give = "leave convert_to_tensor and convert_to_numpy out for numpy's arrays"
        raise LcoError(f"torch is not installed; {give}") from error
