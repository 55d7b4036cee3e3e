"""The merged model: the source checkpoint with the adapter added in, for transformers, sentence-transformers and vLLM.

Every file of the source that is not a weight is copied, every key keeps its name, and one shard at a time is in memory.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lco_jax.checkpoint.hf import DTYPES, Checkpoint, open_checkpoint, per_layer
from lco_jax.checkpoint.peft import layer_tensors
from lco_jax.checkpoint.sentence_transformers import (
    read_projection,
    write_modules,
    write_projection,
)
from lco_jax.checkpoint.tensors import TensorFolder, is_float, write_shards
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, write_json, written_aside
from lco_jax.core.lora import LoraConfig
from lco_jax.data.prompts import ChatTokenizer

# tokenizer, templates, processors, generation config, and the speakers that a full Omni does not load without
COPIED = ("*.json", "*.txt", "*.jinja", "*.model", "spk_dict.pt")


class _Merged:
    """The tensors of the merged model, made one at a time, and rounded by whoever writes them."""

    def __init__(self, checkpoint: Checkpoint, tuned: dict, config: LoraConfig | None):
        self.tensors = checkpoint.tensors
        self.scale = np.float32(config.scale if config else 0)
        self.pairs, self.whole = {}, {}
        for layer, module, a, b in layer_tensors(tuned.get("decoder", {})):
            name = f"layers.{layer}.{module}.weight"
            if name not in checkpoint.keys["decoder"]:
                raise LcoError(
                    f"the adapter adapts {name}, which {checkpoint.folder} does not have"
                )
            self.pairs[checkpoint.keys["decoder"][name]] = (a, b)
        for part in tuned.keys() & checkpoint.keys.keys():
            for path, name, leaf, layer in per_layer(tuned[part]):
                if not path.endswith((".a", ".b")):
                    self.whole[checkpoint.keys[part][name]] = leaf if layer is None else leaf[layer]

    def __call__(self, key: str) -> np.ndarray:
        if key in self.whole:
            return np.asarray(self.whole[key])
        value = self.tensors.read(key)
        if key in self.pairs:
            a, b = self.pairs[key]
            if value.shape != (shape := (b.shape[0], a.shape[1])):
                raise LcoError(
                    f"the adapter of {key} is for {shape}, and the matrix is {value.shape}"
                )
            value = value.astype(np.float32) + self.scale * (b @ a)
        return value


def export_merged(
    source: str | Path,
    out: Path,
    tuned: dict | None = None,
    config: LoraConfig | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `source` with what was tuned of it as a Hugging Face folder, as `write_model` does.

    tuned: as of a training state (`training/tuning.py`); {"decoder": adapters} of what `peft.read_peft` reads; None
    exports the source in another dtype or split. config: the adapters'.
    """
    checkpoint, tuned = open_checkpoint(source), tuned or {}
    projection = np.asarray(tuned["projection"]["weight"]) if "projection" in tuned else None
    write_model(
        checkpoint, out, _Merged(checkpoint, tuned, config), dtype, max_shard_bytes, projection
    )


def write_model(
    checkpoint: Checkpoint,
    out: Path,
    tensor: Callable[[str], np.ndarray],
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * 10**9,
    projection: np.ndarray | None = None,
) -> None:
    """Write a model like `checkpoint`: aside, read back tensor by tensor, compared, then renamed.

    tensor: makes the tensor of a key. Floating-point ones change dtype; whatever else is there stays as it is.
    projection: a matrix [D, D] for the pooled states, by default the checkpoint's own, if it has one.
    """
    if dtype not in DTYPES:
        raise LcoError(f"dtype {dtype!r} is not supported; these are: {', '.join(DTYPES)}")
    tensors = checkpoint.tensors
    kept = {
        key: DTYPES[dtype] if is_float(tensors.dtype(key)) else tensors.dtype(key)
        for key in tensors
    }
    sizes = {key: math.prod(tensors.shape(key)) * np.dtype(kept[key]).itemsize for key in tensors}
    progress = tqdm(
        total=2 * len(sizes), desc="writing and comparing", unit="tensor", leave=False, delay=2
    )

    def rounded(key: str) -> np.ndarray:
        progress.update()
        return tensor(key).astype(kept[key], copy=False)

    with progress, written_aside(out) as aside:
        for pattern in COPIED:
            for file in checkpoint.folder.glob(pattern):
                if file.name != "model.safetensors.index.json" and not file.name.startswith("."):
                    shutil.copyfile(file, aside / file.name)
        write_json(
            aside / "config.json", _with_dtype(read_json(checkpoint.folder / "config.json"), dtype)
        )
        if projection is None:
            projection = read_projection(checkpoint.folder, checkpoint.config.hidden_size)
        if projection is not None:
            write_projection(aside, projection)
        if (
            not checkpoint.backbone.prefix
        ):  # transformers' AutoModel, and so that library, has no full Qwen2.5-Omni
            template = ChatTokenizer(checkpoint.folder).tokenizer.chat_template
            hidden, kinds = checkpoint.config.hidden_size, checkpoint.backbone.modalities
            write_modules(aside, template, hidden, kinds, projection is not None)
        write_shards(aside, sizes, rounded, max_shard_bytes)
        written = TensorFolder(aside)
        if set(written) != set(sizes):
            raise LcoError(
                f"{out}: the written files lack {sorted(set(sizes) - set(written))[0]}; is the disk full?"
            )
        for key in sizes:
            want, got = rounded(key), written.read(key)
            if want.dtype != got.dtype or not np.array_equal(
                want.view(np.uint8), got.view(np.uint8)
            ):
                raise LcoError(
                    f"{out}: {key} reads back differently from what was written; is the disk sound?"
                )
        open_checkpoint(aside)


def _with_dtype(config: dict, dtype: str) -> dict:
    """A config.json that announces the dtype, in whichever spelling and wherever it already does."""

    def spelled(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: spelled(k, v) for k, v in value.items()}
        return dtype if key in ("torch_dtype", "dtype") and isinstance(value, str) else value

    config = spelled("", config)
    return (
        config if "dtype" in config else {**config, "torch_dtype": dtype}
    )  # 4.x reads this one, 5.x both
