"""Hugging Face checkpoints -> parameter trees, tensor by tensor, from disk to their shards.

Which key is which parameter is said by each backbone's key table (`models/registry.py`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.sentence_transformers import read_projection
from lco_jax.checkpoint.tensors import TensorFolder
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, resolve
from lco_jax.core.lora import DECODER_LINEARS
from lco_jax.core.packing import PackedTokens
from lco_jax.core.quantize import quantize as quantize_matrix
from lco_jax.core.sharding import shardings, with_shardings
from lco_jax.models.attention import IMPLEMENTATIONS
from lco_jax.models.config import DecoderConfig
from lco_jax.models.decoder import REMAT_POLICIES, Decoder
from lco_jax.models.model import Model
from lco_jax.models.registry import Backbone, find_backbone

# never code, and no pickle that is ever opened: a full Qwen2.5-Omni needs its speakers copied along
CHECKPOINT_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "spk_dict.pt"]
HEAD = "lm_head.weight"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_STACK = re.compile(r"(layers|blocks)\.(.+)")  # what is under these is stacked along a leading axis


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    config: the decoder's geometry; towers: each tower's, by name. model_config: the part of config.json that describes
    the model. keys: part ("decoder", a tower, or an untied "head") -> {our name, e.g. layers.3.mlp.up_proj.weight: key
    in the files}. Of one that was opened by its geometry alone, tensors is None, and no part has a key.
    """

    folder: Path
    backbone: Backbone
    config: DecoderConfig
    towers: dict[str, Any]
    model_config: dict[str, Any]
    tensors: TensorFolder | None
    keys: dict[str, dict[str, str]]


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """Open a folder or hub id and check every key: unknown, missing, duplicate or misshapen ones raise by name."""
    opened = open_geometry(path_or_id, CHECKPOINT_FILES)
    folder, backbone, config, towers = opened.folder, opened.backbone, opened.config, opened.towers
    tensors = TensorFolder(folder)
    parts = {"decoder": abstract_params(config)}
    parts |= {name: abstract_params(tower_module(backbone, name, towers[name])) for name in towers}
    expected = {
        f"{part}.{name}": leaf.shape[layer is not None :]
        for part, tree in parts.items()
        for _, name, leaf, layer in per_layer(tree)
    }
    keys = _match_keys(folder, backbone, tensors, towers)
    for name, key in keys.items():
        shape = (config.vocab_size, config.hidden_size) if name == HEAD else expected.get(name)
        if shape is None:
            raise LcoError(f"{folder}: unknown key {key}")
        if tensors.shape(key) != shape:
            raise LcoError(
                f"{folder}: {key} has shape {tensors.shape(key)}, and config.json makes it {shape}"
            )
    if missing := sorted(name.removeprefix("decoder.") for name in expected.keys() - keys.keys()):
        raise LcoError(
            f"{folder}: missing key {missing[0]}"
            + f" and {len(missing) - 1} more" * (len(missing) > 1)
        )
    if HEAD not in keys and not config.tie_word_embeddings:
        raise LcoError(
            f"{folder}: missing key lm_head.weight (config.json does not tie it to embed_tokens)"
        )
    by_part: dict[str, dict[str, str]] = {part: {} for part in parts}
    for name in expected:
        part, _, rest = name.partition(".")
        by_part[part][rest] = keys[name]
    if not config.tie_word_embeddings:
        by_part["head"] = {"weight": keys[HEAD]}
    return replace(opened, tensors=tensors, keys=by_part)


def open_geometry(
    path_or_id: str | Path, files: Sequence[str] = CHECKPOINT_FILES[:-2]
) -> Checkpoint:
    """A checkpoint by its config.json, all that a folder needs to hold; nothing can be loaded of it.

    files: what is fetched of a hub id, by default no tensors.
    """
    folder = builtin.find(str(path_or_id)) or resolve(path_or_id, files)
    where = str(folder / "config.json")
    backbone, model_config = find_backbone(read_json(folder / "config.json"), where)
    config = DecoderConfig.from_hf(model_config, where)
    towers = {
        name: read(model_config, where, config) for name, (_, read) in backbone.towers.items()
    }
    parts = ["decoder", *towers, *([] if config.tie_word_embeddings else ["head"])]
    return Checkpoint(
        folder, backbone, config, towers, model_config, None, {part: {} for part in parts}
    )


def _match_keys(
    folder: Path, backbone: Backbone, tensors: TensorFolder, towers: dict[str, Any]
) -> dict[str, str]:
    """{our name: key in the files} of what an embedder needs, and the head. Raises for unknown and duplicate keys."""
    unused = {
        f"{tower}.layers.{i}"
        for tower, c in towers.items()
        for i in getattr(c, "unused_layers", ())
    }
    keys: dict[str, str] = {}
    for key in tensors:
        if key.split(".")[0] in backbone.ignored:
            continue
        if not key.startswith(backbone.prefix):
            raise LcoError(
                f"{folder}: unknown key {key} (a {backbone.model_type} key starts with {backbone.prefix})"
            )
        try:
            name = backbone.name_of(key.removeprefix(backbone.prefix))
        except KeyError:
            raise LcoError(f"{folder}: unknown key {key}") from None
        if name is None or ".".join(name.split(".")[:3]) in unused:
            continue
        if name in keys:
            raise LcoError(f"{folder}: {key} and {keys[name]} are the same parameter")
        keys[name] = key
    return keys


@lru_cache(
    maxsize=64
)  # opening, loading and training each ask for it, and tracing a module takes its time
def abstract_params(module: DecoderConfig | nn.Module, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree of a decoder or a tower as shapes and dtypes, nothing allocated."""
    if isinstance(module, DecoderConfig):
        one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        three = jax.ShapeDtypeStruct((1, 1, 3), jnp.int32)
        tokens = PackedTokens(
            one, three, one, one, (jax.ShapeDtypeStruct((1, 1, 1), jnp.int32),), one, one
        )
        init = partial(jax.eval_shape, Decoder(module).init, jax.random.key(0), tokens)
    else:
        init = partial(jax.eval_shape, module.init, jax.random.key(0), **module.example())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), init()["params"])


def abstract_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every part of a checkpoint as shapes: decoder, towers, and a head that is not tied."""
    modules = {
        name: tower_module(checkpoint.backbone, name, c) for name, c in checkpoint.towers.items()
    }
    parts = {
        name: abstract_params(module)
        for name, module in {"decoder": checkpoint.config, **modules}.items()
    }
    table = parts["decoder"]["embed_tokens"]["weight"]
    return parts | ({"head": {"weight": table}} if "head" in checkpoint.keys else {})


def tower_module(backbone: Backbone, name: str, config: Any, dtype: Any = jnp.float32) -> nn.Module:
    """The tower `name` of a backbone."""
    return backbone.towers[name][0](config, dtype=dtype)


def per_layer(params: dict[str, Any]) -> Iterator[tuple[str, str, Any, int | None]]:
    """(path in the tree, name in a checkpoint, leaf, layer); a stacked leaf comes once a layer, in their order."""
    for path, leaf in flatten_dict(params, sep=".").items():
        if match := _STACK.fullmatch(path):
            for i in range(leaf.shape[0]):
                yield path, f"{match[1]}.{i}.{match[2]}", leaf, i
        else:
            yield path, path, leaf, None


def load_decoder(
    checkpoint: Checkpoint, mesh: Mesh, dtype: Any = "float32", quantize: str = "", **settings: str
) -> tuple[Decoder, dict[str, Any]]:
    """The decoder and its parameters in `dtype`, sharded over `mesh`.

    quantize: what the matrices of its layers become, each as it is read (`core/quantize.py`): int8, nf4; "": nothing.
    settings: `remat` and `attention` of `Decoder`.
    Each process reads only the slices its devices hold; the host holds one tensor's slice at a time.
    """
    for name, known in (("remat", REMAT_POLICIES), ("attention", IMPLEMENTATIONS)):
        if name in settings and settings[name] not in known:
            raise LcoError(f"{name} is {settings[name]!r}; it is one of: {', '.join(known)}")
    dtype = _dtype(dtype)
    decoder = Decoder(checkpoint.config, dtype=dtype, **settings)
    return decoder, _load_part(
        checkpoint, "decoder", abstract_params(checkpoint.config, dtype), mesh, quantize
    )


def load_model(
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: Any = "float32",
    towers: Iterable[str] | None = None,
    tower_dtype: Any = None,
    head: bool = False,
    **settings: str,
) -> tuple[Model, dict[str, Any]]:
    """The decoder with `towers` (by default all of them), and {"decoder": parameters, tower: parameters}; and, of a
    checkpoint that has one, its "projection".

    tower_dtype: of the towers' parameters and activations, by default `dtype`. head: load the vocabulary head, too,
    unless it is the embeddings' (tied). settings: as of `load_decoder`, which also says how they are read.
    """
    decoder, params = load_decoder(checkpoint, mesh, dtype, **settings)
    modules, tree = {}, {"decoder": params}
    for name in checkpoint.towers if towers is None else towers:
        in_dtype = _dtype(dtype if tower_dtype is None else tower_dtype)
        modules[name] = tower_module(checkpoint.backbone, name, checkpoint.towers[name], in_dtype)
        tree[name] = _load_part(checkpoint, name, abstract_params(modules[name], in_dtype), mesh)
    if head and "head" in checkpoint.keys:
        table = params["embed_tokens"]["weight"]
        tree["head"] = _load_part(
            checkpoint, "head", {"weight": jax.ShapeDtypeStruct(table.shape, table.dtype)}, mesh
        )
    projection = read_projection(checkpoint.folder, checkpoint.config.hidden_size)
    if projection is not None:
        part = {"projection": {"weight": projection}}
        tree |= jax.device_put(part, shardings(part, mesh))
    return Model(decoder, modules), tree


def _dtype(dtype: Any) -> Any:
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise LcoError(f"dtype {name!r} is not supported; these are: {', '.join(DTYPES)}")
    return DTYPES[name]


def _load_part(
    checkpoint: Checkpoint, part: str, abstract: dict[str, Any], mesh: Mesh, quantize: str = ""
) -> dict[str, Any]:
    """One part's parameters. Each process reads only the slices its devices hold; the host holds one tensor's slice."""
    leaves, kept = flatten_dict(abstract, sep="."), _placed(part, abstract, mesh, quantize)
    params: dict[str, Any] = {}
    for path, name, _, layer in per_layer(abstract):
        key, leaf = checkpoint.keys[part][name], kept[path]
        matrix = jax.tree.leaves(leaf)[
            0
        ].sharding  # a quantised leaf's first array lies as its matrix would
        if layer is None:
            params[path] = _read_sharded(checkpoint.tensors, key, matrix, leaves[path].dtype)
            continue
        if path not in params:
            params[path] = jax.tree.map(lambda x: _zeros(x.shape, x.dtype, x.sharding), leaf)
        one_layer = NamedSharding(mesh, PartitionSpec(*matrix.spec[1:]))
        tensor = _read_sharded(checkpoint.tensors, key, one_layer, leaves[path].dtype)
        kind = "" if isinstance(leaf, jax.ShapeDtypeStruct) else quantize
        places = jax.tree.map(lambda x: x.sharding, leaf)
        with jax.set_mesh(mesh):
            params[path] = _write_layer(params[path], tensor, layer, kind, places)
    return unflatten_dict(params, sep=".")


def _placed(part: str, abstract: dict[str, Any], mesh: Mesh, quantize: str = "") -> dict[str, Any]:
    """What is kept of a part, as shapes that know where they lie, by path."""

    def keep(path: str, leaf: Any) -> Any:
        if quantize and re.fullmatch(rf"{DECODER_LINEARS}\.weight", path):
            return jax.eval_shape(partial(quantize_matrix, kind=quantize, name=path), leaf)
        return leaf

    kept = unflatten_dict(
        {path: keep(path, leaf) for path, leaf in flatten_dict(abstract, sep=".").items()}, sep="."
    )
    return flatten_dict(with_shardings(kept, shardings({part: kept}, mesh)[part]), sep=".")


def placed_decoder(
    checkpoint: Checkpoint, mesh: Mesh, dtype: Any, quantize: str = ""
) -> dict[str, Any]:
    """The parameters that `load_decoder` would load, as shapes that know where they lie."""
    abstract = abstract_params(checkpoint.config, _dtype(dtype))
    return unflatten_dict(_placed("decoder", abstract, mesh, quantize), sep=".")


def _read_sharded(
    tensors: TensorFolder, key: str, sharding: NamedSharding, dtype: Any
) -> jax.Array:
    read = lambda index: np.asarray(tensors.read(key, index)).astype(dtype, copy=False)
    return jax.make_array_from_callback(tensors.shape(key), sharding, read)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _write_layer(stack: Any, tensor: jax.Array, layer: jax.Array, kind: str, sharding: Any) -> Any:
    """`tensor`, quantised where there is a `kind`, as layer number `layer` of every array of the stacked leaf."""
    value = quantize_matrix(tensor, kind) if kind else tensor
    written = jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, layer, 0), stack, value
    )
    return jax.lax.with_sharding_constraint(written, sharding)
