"""Hugging Face checkpoints -> parameter trees, tensor by tensor, from disk to their shards.

The key table: a decoder tensor keeps its name; what stands before it depends on who wrote the file.

| written by                        | decoder                  | head        | towers                       |
|-----------------------------------|--------------------------|-------------|------------------------------|
| the hub, transformers ≤ 4.57      | `model.*`                | `lm_head.*` | `visual.*`, `audio_tower.*`  |
| transformers 5.x                  | `model.language_model.*` | `lm_head.*` | `model.visual.*`, …          |
| a full Qwen2.5-Omni, before each  | `thinker.`               |             | `talker.*`, `token2wav.*` ignored |
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.tensors import TensorFolder
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, resolve
from lco_jax.core.packing import PackedRows
from lco_jax.core.sharding import shardings
from lco_jax.models.config import DecoderConfig
from lco_jax.models.decoder import REMAT_POLICIES, Decoder
from lco_jax.models.registry import Backbone, find_backbone

# never code, and no pickle that is ever opened: a full Qwen2.5-Omni needs its speakers copied along
CHECKPOINT_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "spk_dict.pt"]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_DECODER = re.compile(r"model\.(?:language_model\.)?((?:embed_tokens|layers|norm)\..+)")
_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")  # old files store this constant


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. `decoder_keys`: {our name, e.g. layers.3.mlp.up_proj.weight: key in the files}."""

    folder: Path
    backbone: Backbone
    config: DecoderConfig
    tensors: TensorFolder
    decoder_keys: dict[str, str]


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """Open a folder or hub id and check every key: unknown, missing, duplicate or misshapen ones raise by name."""
    folder = builtin.build() if str(path_or_id) == builtin.NAME else resolve(path_or_id, CHECKPOINT_FILES)
    backbone, config = find_backbone(read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = TensorFolder(folder)
    expected = {name: shape for _, name, shape in _per_layer(abstract_params(config))}
    head, head_shape = None, (config.vocab_size, config.hidden_size)
    decoder_keys: dict[str, str] = {}
    for key in tensors:
        inner = key.removeprefix(backbone.prefix)
        if key.split(".")[0] in backbone.ignored or _BUFFER.fullmatch(inner):
            continue
        if backbone.prefix and inner == key:
            raise LcoError(f"{folder}: unknown key {key} (a {backbone.model_type} key starts with {backbone.prefix})")
        if re.match(rf"(model\.)?({'|'.join(backbone.towers)})\.", inner):
            continue
        if inner == "lm_head.weight":
            head, name, shape = key, inner, head_shape
        elif match := _DECODER.fullmatch(inner):
            name = match[1]
            if name not in expected:
                raise LcoError(f"{folder}: unknown key {key}")
            if name in decoder_keys:
                raise LcoError(f"{folder}: {key} and {decoder_keys[name]} are the same parameter")
            decoder_keys[name], shape = key, expected[name]
        else:
            raise LcoError(f"{folder}: unknown key {key}")
        if tensors.shape(key) != shape:
            raise LcoError(f"{folder}: {key} has shape {tensors.shape(key)}, and config.json makes it {shape}")
    if missing := sorted(expected.keys() - decoder_keys.keys()):
        raise LcoError(f"{folder}: missing key {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
    if head is None and not config.tie_word_embeddings:
        raise LcoError(f"{folder}: missing key lm_head.weight (config.json does not tie it to embed_tokens)")
    return Checkpoint(folder, backbone, config, tensors, decoder_keys)


def abstract_params(config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The decoder's parameter tree as shapes and dtypes, nothing allocated."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    rows = PackedRows(one, one, jax.ShapeDtypeStruct((1, 1, 3), jnp.int32), one, one)
    return jax.eval_shape(Decoder(config, param_dtype=dtype).init, jax.random.key(0), rows)["params"]


def _per_layer(params: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(path in the tree, name in a checkpoint, shape there); a stacked leaf yields one entry a layer, in order."""
    for path, leaf in flatten_dict(params, sep=".").items():
        if path.startswith("layers."):
            for i in range(leaf.shape[0]):
                yield path, f"layers.{i}.{path.removeprefix('layers.')}", leaf.shape[1:]
        else:
            yield path, path, leaf.shape


def load_decoder(
    checkpoint: Checkpoint, mesh: Mesh, dtype: Any = "float32", remat: str = "full"
) -> tuple[Decoder, dict[str, Any]]:
    """The decoder and its parameters in `dtype`, sharded over `mesh`.

    Each process reads only the slices its devices hold; the host holds one tensor's slice at a time.
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise LcoError(f"dtype {name!r} is not supported; these are: {', '.join(DTYPES)}")
    if remat not in REMAT_POLICIES:
        raise LcoError(f"remat is {remat!r}; it is one of: {', '.join(REMAT_POLICIES)}")
    dtype = DTYPES[name]
    abstract = abstract_params(checkpoint.config, dtype)
    flat_shardings = flatten_dict(shardings(abstract, mesh), sep=".")
    leaves = flatten_dict(abstract, sep=".")
    params: dict[str, Any] = {}
    layer: dict[str, int] = {}
    for path, name, _ in _per_layer(abstract):
        key, sharding = checkpoint.decoder_keys[name], flat_shardings[path]
        if not path.startswith("layers."):
            params[path] = _read_sharded(checkpoint.tensors, key, sharding, leaves[path].dtype)
            continue
        if path not in params:
            params[path] = _zeros(leaves[path].shape, leaves[path].dtype, sharding)
        one_layer = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        tensor = _read_sharded(checkpoint.tensors, key, one_layer, leaves[path].dtype)
        params[path] = _write_layer(params[path], tensor, layer.setdefault(path, 0))
        layer[path] += 1
    decoder = Decoder(checkpoint.config, dtype=dtype, param_dtype=dtype, remat=remat)
    return decoder, unflatten_dict(params, sep=".")


def _read_sharded(tensors: TensorFolder, key: str, sharding: NamedSharding, dtype: Any) -> jax.Array:
    read = lambda index: np.asarray(tensors.read(key, index)).astype(dtype, copy=False)  # noqa: E731
    return jax.make_array_from_callback(tensors.shape(key), sharding, read)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, tensor, layer, 0)
