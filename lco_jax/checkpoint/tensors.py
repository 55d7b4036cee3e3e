"""A folder of safetensors: read one slice of one tensor at a time, written one shard at a time."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, write_json

DTYPES = {  # safetensors' names of the dtypes
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


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
            files = sorted(f.name for f in folder.glob("*.safetensors") if not f.name.startswith("adapter"))
        else:
            if not isinstance(weight_map, dict) or not weight_map:
                raise LcoError(f"{index} has no weight_map of keys to files")
            files = sorted(set(weight_map.values()))
        if not files:
            raise LcoError(f"{folder} holds no *.safetensors (pickled weights are never loaded; convert them first)")
        self._file: dict[str, str] = {}
        self._header: dict[str, dict[str, Any]] = {}
        self._open: dict[str, Any] = {}
        for file in files:
            for key, header in _read_header(folder / file).items():
                if key in self._file:
                    raise LcoError(f"{folder}: the key {key} stands in both {self._file[key]} and {file}")
                self._file[key], self._header[key] = file, header
        for key, file in (weight_map or {}).items():
            if self._file.get(key) != file:
                raise LcoError(f"{index} says that {file} holds {key}, which it does not")

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._header[key]["shape"])

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(DTYPES[self._header[key]["dtype"]])

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor `key`, or the slice of it that `index` selects; nothing else is read."""
        file = self._file[key]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="numpy")
        if not index:
            return self._open[file].get_tensor(key)
        return self._open[file].get_slice(key)[index]


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """{key: {"dtype", "shape"}} of a safetensors file, checked against the file's size."""
    try:
        with safe_open(path, framework="numpy"):  # validates offsets and length
            pass
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    except FileNotFoundError:
        raise LcoError(f"{path} does not exist, and model.safetensors.index.json names it") from None
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise LcoError(f"{path} is torn or not a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise LcoError(f"{path}: {key} has dtype {entry['dtype']}, which is not supported")
    return header


def write_shards(
    folder: Path,
    sizes: dict[str, int],
    tensor: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Write tensors to `folder` as one `model.safetensors` or as shards with an index.

    sizes: bytes of each key; tensor: makes the tensor of a key. One shard at a time is in memory.
    """
    shards: list[list[str]] = [[]]
    for key in sizes:
        if shards[-1] and sum(sizes[k] for k in shards[-1]) + sizes[key] > max_shard_bytes:
            shards.append([])
        shards[-1].append(key)
    weight_map = {}
    for i, keys in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({key: np.ascontiguousarray(tensor(key)) for key in keys}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def nbytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize
