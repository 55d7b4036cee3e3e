"""What callers pass to `OmniEmbedder`, checked: each mistake is one sentence."""

import os
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lco_jax.core.errors import LcoError, check_at_least_1, explained
from lco_jax.data.media import MediaConfig


def check_types(path_or_id: Any, adapter: Any, mesh: Any, media: Any) -> None:
    """Raise for what `from_pretrained` cannot take, before anything is read."""
    path = str | os.PathLike
    for name, value, kind, give in (
        ("path_or_id", path_or_id, path, "a folder or the id of a checkpoint"),
        ("adapter", adapter, path | None, "an adapter's folder, or None"),
        ("mesh", mesh, Mesh | None, "one from lco_jax.make_mesh, or None"),
        ("media", media, MediaConfig | None, "a MediaConfig, or None"),
    ):
        if not isinstance(value, kind):
            raise LcoError(f"{name} is {value!r:.60}; give {give}")


def check_on_error(on_error: str) -> None:
    """Raise for another value than the two that there are."""
    if on_error not in ("raise", "skip"):
        raise LcoError(f"on_error is {on_error!r:.60}; it is one of: raise, skip")


def check_passes(max_tokens: Any, progress: Any) -> None:
    """Raise for options of forward passes that cannot be."""
    if max_tokens is None:
        raise LcoError("max_tokens is None; it must be a whole number of at least 1")
    check_at_least_1(max_tokens=max_tokens)
    if progress is not None and not hasattr(progress, "update"):
        raise LcoError(f"progress is {progress!r:.60}; give a bar of tqdm, or show_progress=True")


def as_vectors(given: Any, name: str) -> np.ndarray:
    """Vectors as float32 [N, D]; [D] is one row. name: of the argument, for errors."""
    what = f"{name} is a {type(given).__name__}; give vectors"
    with explained(what, TypeError, ValueError, RuntimeError):
        array = np.asarray(given)
    if array.dtype.kind not in "iuf":
        raise LcoError(f"{name} holds {array.dtype}; give vectors of numbers")
    if np.isinf(array).any():
        raise LcoError(f"{name} holds infinity")
    return np.atleast_2d(array.astype(np.float32))
