"""A folder of safetensors: read one slice of one tensor at a time, written one shard at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import read_json, write_json

DTYPES = {  # safetensors' names of the dtypes
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def is_float(dtype: np.dtype) -> bool:
    """Whether a tensor of this dtype holds floating-point numbers."""
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


class _Header(NamedTuple):
    key: str
    file: str
    shape: tuple[int, ...]
    dtype: str


class TensorFolder:
    """The tensors of a checkpoint folder: names, shapes and dtypes from the headers, data on demand.

    One `model.safetensors`, or shards with or without an index; raises for a shard that the index names and the
    folder lacks, for a key that the index puts in a file that lacks it, and for a key that stands twice.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        weight_map = read_json(index).get("weight_map", {}) if index.exists() else None
        if weight_map is None:
            files = sorted(
                f.name for f in folder.glob("*.safetensors") if not f.name.startswith("adapter")
            )
        else:
            if not isinstance(weight_map, dict) or not weight_map:
                raise LcoError(f"{index} has no weight_map of keys to files")
            files = sorted(set(weight_map.values()))
        if not files:
            raise LcoError(
                f"{folder} holds no *.safetensors (pickled weights are never loaded; convert them first)"
            )
        self._headers: dict[str, _Header] = {}
        self._open: dict[str, Any] = {}
        for file in files:
            for header in _read_headers(folder, file):
                if (twin := self._headers.setdefault(header.key, header)) is not header:
                    raise LcoError(
                        f"{folder}: the key {header.key} stands in both {twin.file} and {file}"
                    )
        for key, file in (weight_map or {}).items():
            if key not in self._headers or self._headers[key].file != file:
                raise LcoError(f"{index} says that {file} holds {key}, which it does not")

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._headers[key].shape

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(DTYPES[self._headers[key].dtype])

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor `key`, or the slice of it that `index` selects; nothing else is read."""
        file = self._headers[key].file
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="numpy")
        return self._open[file].get_slice(key)[index] if index else self._open[file].get_tensor(key)


def _read_headers(folder: Path, file: str) -> list[_Header]:
    """Of every tensor of a safetensors file, checked against the file's size."""
    path = folder / file
    if not path.exists():
        raise LcoError(f"{path} does not exist, and model.safetensors.index.json names it")
    with explained(
        f"{path} is torn or not a safetensors file", SafetensorError, OSError, ValueError
    ):
        with safe_open(path, framework="numpy") as content:  # validates offsets and length
            slices = [(key, content.get_slice(key)) for key in content.offset_keys()]
        headers = [_Header(key, file, tuple(x.get_shape()), x.get_dtype()) for key, x in slices]
    if strange := [header for header in headers if header.dtype not in DTYPES]:
        raise LcoError(
            f"{path}: {strange[0].key} has dtype {strange[0].dtype}, which is not supported"
        )
    return headers


def write_shards(
    folder: Path, sizes: dict[str, int], tensor: Callable[[str], np.ndarray], max_shard_bytes: int
) -> None:
    """Write tensors to `folder` as one `model.safetensors` or as shards with an index.

    sizes: bytes of each key; tensor: makes the tensor of a key. One shard at a time is in memory.
    """
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, keys in split.filename_to_tensors.items():
        save_file(
            {key: np.ascontiguousarray(tensor(key)) for key in keys},
            folder / file,
            metadata={"format": "pt"},
        )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
