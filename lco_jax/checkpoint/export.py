"""The merged model: the source checkpoint with the adapter added to its weights.

transformers, sentence-transformers and vLLM load it. Every file of the source that is not a weight
is copied, every key keeps its name, and one shard at a time is in memory.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.checkpoint.card import About, merged_card, write_card
from lco_jax.checkpoint.hf import DTYPES, Checkpoint, open_checkpoint
from lco_jax.checkpoint.sentence_transformers import (
    Usage,
    read_projection,
    read_usage,
    says_usage,
    write_modules,
    write_projection,
    write_usage,
)
from lco_jax.checkpoint.shapes import per_layer
from lco_jax.checkpoint.tensors import (
    INDEX,
    SHARD_BYTES,
    TensorFolder,
    check_finite,
    is_float,
    write_shards,
)
from lco_jax.core.console import progress_bar
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, write_json, written_aside
from lco_jax.core.lora import LoraConfig
from lco_jax.data.prompts import ChatTokenizer

# tokenizer, templates, processors, generation config, and a full Omni's speakers, which it needs
COPIED = ("*.json", "*.txt", "*.jinja", "*.model", "spk_dict.pt")


class _Merged:
    """Makes the tensors of the merged model one at a time, in float32 where it changes them."""

    def __init__(self, checkpoint: Checkpoint, tuned: dict[str, Any], config: LoraConfig | None):
        self._tensors = checkpoint.tensors
        self._scale = np.float32(config.scale if config else 0)
        self._adapters: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        self._replaced: dict[str, Any] = {}
        for part in tuned.keys() & checkpoint.keys.keys():
            for path, name, leaf, layer in per_layer(tuned[part]):
                matrix = name.removesuffix(".a").removesuffix(".b")
                key = checkpoint.keys[part].get(matrix)
                if key is None:
                    raise LcoError(
                        f"the adapter adapts {matrix}, which {checkpoint.folder} does not have"
                    )
                value = leaf if layer is None else leaf[layer]
                if path.endswith((".a", ".b")):
                    self._adapters[key][path[-1]] = np.asarray(value)
                else:
                    self._replaced[key] = value

    def __call__(self, key: str) -> np.ndarray:
        if key in self._replaced:
            return np.asarray(self._replaced[key])
        value = self._tensors.read(key)
        if key not in self._adapters:
            return value
        a, b = self._adapters[key]["a"], self._adapters[key]["b"]
        shape = (b.shape[0], a.shape[1])
        if value.shape != shape:
            raise LcoError(f"the adapter of {key} is for {shape}, and the matrix is {value.shape}")
        return value.astype(np.float32) + self._scale * (b @ a)


def export_merged(
    source: str | Path,
    output: Path,
    tuned: dict[str, Any] | None = None,
    config: LoraConfig | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int = SHARD_BYTES,
    about: About | None = None,
    checkpoint: Checkpoint | None = None,
    usage: Usage | None = None,
) -> None:
    """Write `source` with its trained parameters as a Hugging Face folder, as `write_model` does.

    tuned: the trainable parameters of a training state (`training/tuning.py`), or the adapters by
    part as `peft.read_adapter` reads them; None exports the source in another dtype or split.
    config: the adapters'. about: what its card tells of how it was made. checkpoint: the
    source, where it is open already. usage: by default the source's.
    """
    checkpoint = open_checkpoint(source) if checkpoint is None else checkpoint
    tuned = tuned or {}
    if tuned and about is None:
        about = About("This is {base} with what was trained added to its weights.", "tuned")
    projection = np.asarray(tuned["projection"]["weight"]) if "projection" in tuned else None
    merged = _Merged(checkpoint, tuned, config)
    write_model(
        checkpoint,
        output,
        merged,
        dtype,
        max_shard_bytes,
        projection=projection,
        source=source,
        about=about,
        usage=usage,
    )


def write_model(
    checkpoint: Checkpoint,
    output: Path,
    tensor: Callable[[str], np.ndarray],
    dtype: str = "bfloat16",
    max_shard_bytes: int = SHARD_BYTES,
    projection: np.ndarray | None = None,
    source: str | Path | None = None,
    about: About | None = None,
    usage: Usage | None = None,
) -> None:
    """Write a model like `checkpoint` aside, read back each file, then rename the folder.

    tensor: makes the tensor of a key. Floating-point tensors are written in `dtype`, all others as
    they are. projection: a matrix [D, D] for the pooled states, by default the checkpoint's, if it
    has one. source, about: for the card, the checkpoint as it was given, by default its folder, and
    how the model was made. usage: how it embeds, by default as the checkpoint does.
    """
    if projection is None:
        projection = read_projection(checkpoint.folder, checkpoint.config.hidden_size)
    dtypes = _written_dtypes(checkpoint.tensors, dtype)
    sizes = {
        key: math.prod(checkpoint.tensors.shape(key)) * written.itemsize
        for key, written in dtypes.items()
    }
    progress = progress_bar(total=len(sizes), desc="writing", unit="tensor", leave=False, delay=2)

    def rounded(key: str) -> np.ndarray:
        progress.update()
        value = tensor(key).astype(dtypes[key], copy=False)
        check_finite(value, f"{output}: {key}")
        return value

    with progress, written_aside(output) as aside:
        _copy_files(checkpoint.folder, aside, dtype)
        _describe(checkpoint, aside, projection, source, about or About(), usage)
        write_shards(aside, sizes, rounded, max_shard_bytes)
        open_checkpoint(aside)


def _written_dtypes(tensors: TensorFolder, dtype: str) -> dict[str, np.dtype]:
    if dtype not in DTYPES:
        raise LcoError(f"dtype {dtype!r} is not supported; these are: {', '.join(DTYPES)}")
    stored = {key: tensors.dtype(key) for key in tensors}
    return {key: np.dtype(DTYPES[dtype]) if is_float(x) else x for key, x in stored.items()}


def _copy_files(source: Path, target: Path, dtype: str) -> None:
    """Copy whatever is not a weight; config.json gets the new dtype."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name != INDEX and not file.name.startswith("."):
                shutil.copyfile(file, target / file.name)
    config = _with_dtype(read_json(source / "config.json"), dtype)
    if "dtype" not in config:
        config["torch_dtype"] = dtype  # transformers 4 reads this one, 5 reads both
    write_json(target / "config.json", config)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that states the dtype wherever it already does, in either spelling."""
    changed = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = _with_dtype(value, dtype)
        elif key in ("torch_dtype", "dtype") and isinstance(value, str):
            value = dtype
        changed[key] = value
    return changed


def _describe(
    checkpoint: Checkpoint,
    folder: Path,
    projection: np.ndarray | None,
    source: str | Path | None,
    about: About,
    usage: Usage | None,
) -> None:
    """Write what sentence-transformers and people read, and how the model is to be used."""
    hidden_size, projected = checkpoint.config.hidden_size, projection is not None
    usage = read_usage(checkpoint.folder, hidden_size) if usage is None else usage
    if projection is not None:
        write_projection(folder, projection)
    if checkpoint.backbone.in_sentence_transformers:
        template = ChatTokenizer(checkpoint.folder).tokenizer.chat_template
        modalities = checkpoint.backbone.modalities
        write_modules(folder, template, hidden_size, modalities, projected, usage)
    elif usage != Usage() or says_usage(folder):
        write_usage(folder, usage)
    source = checkpoint.folder if source is None else source
    write_card(folder, merged_card(checkpoint, source, about, projected, usage))
