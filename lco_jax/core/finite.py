"""Results that no model should make: an error that says whose fault it is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lco_jax.core.errors import LcoError


def check_results(results: np.ndarray, params: Any, dtype: Any) -> None:
    """Raise if a model made a NaN or an infinity. results: a row for each input.

    Inputs that hold such were refused before, so no input is at fault, and none may be skipped for
    it. dtype: of the model's states.
    """
    bad = int((~np.isfinite(results)).any(axis=-1).sum())
    if not bad:
        return
    what = f"{bad} of {len(results)} results are not finite, and their inputs are"
    for path, weight in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(weight.dtype, jnp.floating) and not jnp.isfinite(weight).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise LcoError(f"{what}: the model's {name} holds NaN or infinity; check its files")
    raise LcoError(f"{what}: the model overflows in {jnp.dtype(dtype).name}; try float32")


def check_vectors(vectors: np.ndarray) -> None:
    """Raise for a vector without a direction. vectors: [N, D].

    Its length is 0 where the norms of a model overflow.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise LcoError(
            "the model made a vector that is not finite, or of length 0; check its files, or try "
            "float32"
        )
