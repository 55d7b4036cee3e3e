"""Arrays of other libraries, and what mappings with arrays are."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, explained


def with_arrays(value: Any, label: str) -> Any:
    """A value with numpy's arrays in the place of those of torch and jax."""
    if isinstance(value, Mapping) and "array" in value:
        return {**value, "array": with_arrays(value["array"], label)}
    if isinstance(value, list):
        return [with_arrays(one, label) for one in value]
    if isinstance(value, tuple):
        return tuple(with_arrays(one, label) for one in value)
    if is_table(value) or not (hasattr(value, "__array__") and hasattr(value, "shape")):
        return value
    with explained(f"{label} is no array that numpy reads", TypeError, ValueError, RuntimeError):
        return as_numpy(value)


def as_numpy(value: Any) -> np.ndarray:
    """An array of torch, jax or numpy as numpy's; bfloat16, which numpy lacks, as float32."""
    kind = str(getattr(value, "dtype", ""))
    if kind == "torch.bfloat16":
        value = value.float()
    elif kind == "bfloat16":
        value = np.asarray(value).astype(np.float32)
    return value if isinstance(value, np.ndarray | np.generic) else np.asarray(value)


def decoder_kind(value: Any) -> str | None:
    """The kind of medium that a decoder of torchcodec or datasets gives; None for other values."""
    if hasattr(value, "get_all_samples"):
        return "audio"
    return "video" if hasattr(value, "get_frames_at") else None


def is_table(value: Any) -> bool:
    """Whether this is a table of columns, such as a DataFrame of pandas or polars."""
    return hasattr(value, "columns") and hasattr(value, "shape")


def medium_of_array(given: Mapping) -> dict[str, Any]:
    """A mapping with an array, as the kind of medium that its other keys make it."""
    array = given["array"]
    is_line = np.ndim(array) == 1 if hasattr(array, "shape") else _is_numbers(array)
    if "sampling_rate" in given or "sample_rate" in given or is_line:
        return {"audio": given}
    return {"video": given}


def _is_numbers(value: Any) -> bool:
    """Whether this is a list of numbers, judged by the first."""
    return isinstance(value, list | tuple) and bool(value) and np.ndim(value[0]) == 0


def with_rate(value: Any, label: str) -> Any:
    """A video with its `fps` where it has it in `video_metadata`, as sentence-transformers has it.

    The metadata is a mapping, or an object of transformers.
    """
    if not isinstance(value, Mapping) or "video_metadata" not in value:
        return value
    metadata = value["video_metadata"]
    known = metadata.get if isinstance(metadata, Mapping) else partial(getattr, metadata)
    rate = known("fps", None)
    given = {key: value[key] for key in value if key != "video_metadata"}
    if rate is None:
        return given
    if given.get("fps", rate) != rate:
        raise LcoError(f"{label} has two rates, fps and video_metadata.fps; keep one")
    return {**given, "fps": rate}
