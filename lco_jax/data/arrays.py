"""Arrays of other libraries."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lco_jax.core.errors import explained


def with_arrays(value: Any, label: str) -> Any:
    """A value with numpy's arrays in the place of those of torch and jax."""
    if isinstance(value, Mapping) and "array" in value:
        return {**value, "array": with_arrays(value["array"], label)}
    if isinstance(value, list):
        return [with_arrays(one, label) for one in value]
    if isinstance(value, tuple):
        return tuple(with_arrays(one, label) for one in value)
    if isinstance(value, np.ndarray | np.generic) or is_table(value):
        return value
    if not (hasattr(value, "__array__") and hasattr(value, "shape")):
        return value
    with explained(f"{label} is no array that numpy reads", TypeError, ValueError, RuntimeError):
        return np.asarray(value)


def is_table(value: Any) -> bool:
    """Whether this is a table of columns, such as a DataFrame of pandas or polars."""
    return hasattr(value, "columns") and hasattr(value, "shape")


def medium_of_array(given: Mapping) -> dict[str, Any]:
    """A mapping with an array, as the kind of medium that its other keys make it."""
    if "sampling_rate" in given or "sample_rate" in given or np.ndim(given["array"]) == 1:
        return {"audio": given}
    if "video_metadata" in given:  # as sentence-transformers spells it
        metadata = given["video_metadata"]
        rate = metadata.get("fps") if isinstance(metadata, Mapping) else None
        given = {"array": given["array"]}
        if rate is not None:
            given["fps"] = rate
    return {"video": given}
