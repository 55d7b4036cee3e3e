"""Hugging Face checkpoints → parameter trees, tensor by tensor, from disk to their shards.

The key table of each backbone (`models/registry.py`) says which key is which parameter.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
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
from lco_jax.checkpoint.shapes import abstract_params, per_layer, tower_module
from lco_jax.checkpoint.tensors import TensorFolder
from lco_jax.core.errors import LcoError
from lco_jax.core.files import check_is_file, read_json, resolve
from lco_jax.core.lora import DECODER_LINEARS, Tree
from lco_jax.core.quantize import quantize as quantize_matrix
from lco_jax.core.sharding import shardings, with_shardings
from lco_jax.models.attention import IMPLEMENTATIONS
from lco_jax.models.config import DecoderConfig
from lco_jax.models.decoder import REMAT_POLICIES, Decoder
from lco_jax.models.model import Model
from lco_jax.models.pooling import POOLINGS
from lco_jax.models.registry import Backbone, find_backbone

# No code, and no pickle that is ever opened: a full Qwen2.5-Omni needs its speakers copied along.
CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
# README.md names the licence.
CHECKPOINT_FILES = [*CONFIG_FILES, "*.safetensors", "spk_dict.pt", "README.md"]
HEAD = "lm_head.weight"
ADAPTER = "adapter_config.json"
# Sizes up to this one are not compared with the tensors: some, as windows, are no tensor's width.
_ANY_SIZE = 4096
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    config: the decoder's geometry. towers: each tower's, by name. model_config: the part of
    config.json that describes the model. keys: part ("decoder", a tower, or an untied "head") ->
    {our name, e.g. layers.3.mlp.up_proj.weight: key in the files}. If it was opened by its geometry
    alone, tensors is None and no part has a key.
    """

    folder: Path
    backbone: Backbone
    config: DecoderConfig
    towers: dict[str, Any]
    model_config: dict[str, Any]
    tensors: TensorFolder | None
    keys: dict[str, dict[str, str]]


# ---- opening


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """Open a folder or hub id. Raises for an unknown, missing, duplicate or misshapen key."""
    geometry = open_geometry(path_or_id, CHECKPOINT_FILES)
    tensors = TensorFolder(geometry.folder)
    _check_sizes(geometry, tensors)
    shapes = _expected_shapes(geometry)
    found = _match_keys(geometry, tensors)
    _check_keys(geometry, tensors, found, shapes)
    keys: dict[str, dict[str, str]] = {part: {} for part in geometry.keys}
    for name in shapes:
        part, _, rest = name.partition(".")
        if part in keys:
            keys[part][rest] = found[name]
    if "head" in keys:
        keys["head"]["weight"] = found[HEAD]
    return replace(geometry, tensors=tensors, keys=keys)


def open_geometry(path_or_id: str | Path, files: Sequence[str] = CONFIG_FILES) -> Checkpoint:
    """A checkpoint by its config.json, all that a folder needs to hold; it cannot be loaded.

    files: which files of a hub id are fetched, by default no tensors.
    """
    folder = builtin.find(str(path_or_id)) or resolve(path_or_id, [*files, ADAPTER])
    _check_folder(folder)
    where = str(folder / "config.json")
    backbone, model_config = find_backbone(read_json(folder / "config.json"), where)
    config = DecoderConfig.from_hf(model_config, where)
    towers = {}
    for name, (_, read_tower) in backbone.towers.items():
        towers[name] = read_tower(model_config, where, config)
    keys: dict[str, dict[str, str]] = {part: {} for part in ("decoder", *towers)}
    if not config.tie_word_embeddings:
        keys["head"] = {}
    return Checkpoint(folder, backbone, config, towers, model_config, None, keys)


def _check_folder(folder: Path) -> None:
    """Raise for a folder of another kind, and for an entry whose reading may take for ever."""
    config = folder / "config.json"
    if (folder / ADAPTER).exists() and not config.exists():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise LcoError(
            f"{folder} is an adapter; give its base, {base or 'a model'}, as the model, and "
            "this folder as the adapter"
        )
    if (folder / "checkpoints").is_dir() and "model_type" not in read_json(config):
        raise LcoError(
            f"{folder} is a training run; python -m lco_jax.convert --input={folder} --output=OUT "
            "writes its model to OUT"
        )
    for pattern in CHECKPOINT_FILES:
        for file in folder.glob(pattern):
            if file.exists():  # a broken link counts only where it is read
                check_is_file(file)


def _check_sizes(checkpoint: Checkpoint, tensors: TensorFolder) -> None:
    """Raise for a size in config.json that no tensor has, before anything of that size is made."""
    where = checkpoint.folder / "config.json"
    shapes = [tensors.shape(key) for key in tensors]
    largest = max(chain(*shapes), default=0)
    for part, config in {"decoder": checkpoint.config, **checkpoint.towers}.items():
        for name, size in dataclasses.asdict(config).items():
            if type(size) is not int or name == "max_position_embeddings":
                continue
            if name in ("depth", "num_layers"):
                limit, what = len(shapes), f"there are {len(shapes)} tensors"
            else:
                limit, what = max(largest, _ANY_SIZE), f"no tensor is wider than {largest}"
            if size > limit:
                raise LcoError(f"{where}: the {part} has {name} {size}, and {what}")


def _expected_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that an embedder needs and of the head, by our name."""
    shapes = {HEAD: (checkpoint.config.vocab_size, checkpoint.config.hidden_size)}
    for part, tree in _abstract_parts(checkpoint).items():
        for _, name, leaf, layer in per_layer(tree):
            shapes[f"{part}.{name}"] = leaf.shape if layer is None else leaf.shape[1:]
    return shapes


def _match_keys(checkpoint: Checkpoint, tensors: TensorFolder) -> dict[str, str]:
    """{our name: key in the files}. Raises for unknown and duplicate keys."""
    folder, backbone = checkpoint.folder, checkpoint.backbone
    unused = [
        f"{tower}.layers.{i}"
        for tower, config in checkpoint.towers.items()
        for i in getattr(config, "unused_layers", ())
    ]
    keys: dict[str, str] = {}
    for key in tensors:
        if key.split(".")[0] in backbone.ignored:
            continue
        if not key.startswith(backbone.prefix):
            raise LcoError(
                f"{folder}: unknown key {key} "
                f"(a {backbone.model_type} key starts with {backbone.prefix})"
            )
        try:
            name = backbone.name_of(key.removeprefix(backbone.prefix))
        except KeyError as error:
            raise LcoError(f"{folder}: unknown key {key}") from error
        if name is None or ".".join(name.split(".")[:3]) in unused:
            continue
        if name in keys:
            raise LcoError(f"{folder}: {key} and {keys[name]} are the same parameter")
        keys[name] = key
    return keys


def _check_keys(
    checkpoint: Checkpoint,
    tensors: TensorFolder,
    keys: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Raise for the first unknown, misshapen or missing tensor."""
    folder = checkpoint.folder
    for name, key in keys.items():
        if name not in shapes:
            raise LcoError(f"{folder}: unknown key {key}")
        found, want = tensors.shape(key), shapes[name]
        if found != want:
            raise LcoError(f"{folder}: {key} has shape {found}, and config.json makes it {want}")
    missing = sorted(name.removeprefix("decoder.") for name in shapes.keys() - {HEAD} - keys.keys())
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LcoError(f"{folder}: missing key {missing[0]}{others}")
    if HEAD not in keys and not checkpoint.config.tie_word_embeddings:
        raise LcoError(
            f"{folder}: missing key {HEAD} (config.json does not tie it to embed_tokens)"
        )


# ---- parameters as shapes


def abstract_model(checkpoint: Checkpoint) -> Tree:
    """Every part of a checkpoint as shapes: decoder, towers, and a head that is not tied."""
    parts = _abstract_parts(checkpoint)
    if "head" in checkpoint.keys:
        parts["head"] = {"weight": parts["decoder"]["embed_tokens"]["weight"]}
    return parts


def _abstract_parts(checkpoint: Checkpoint) -> Tree:
    parts = {"decoder": abstract_params(checkpoint.config)}
    for name, config in checkpoint.towers.items():
        parts[name] = abstract_params(tower_module(checkpoint.backbone, name, config))
    return parts


def abstract_decoder(checkpoint: Checkpoint, mesh: Mesh, dtype: Any, quantize: str = "") -> Tree:
    """The parameters that `load_decoder` would load, as shapes with shardings."""
    abstract = abstract_params(checkpoint.config, _dtype(dtype))
    return unflatten_dict(_stored_leaves("decoder", abstract, mesh, quantize), sep=".")


# ---- loading


def load_decoder(
    checkpoint: Checkpoint, mesh: Mesh, dtype: Any = "float32", quantize: str = "", **settings: str
) -> tuple[Decoder, Tree]:
    """The decoder and its parameters in `dtype`, sharded over `mesh`.

    quantize: what each matrix of its layers becomes when it is read (`core/quantize.py`): int8 or
    nf4; "" leaves it. settings: `remat`, `attention` and `pooling` of `Decoder`. Each process reads
    only the slices that its devices hold; the host holds one tensor's slice at a time.
    """
    choices = {"remat": REMAT_POLICIES, "attention": IMPLEMENTATIONS, "pooling": POOLINGS}
    for name, known in choices.items():
        if name in settings and settings[name] not in known:
            raise LcoError(f"{name} is {settings[name]!r}; it is one of: {', '.join(known)}")
    dtype = _dtype(dtype)
    decoder = Decoder(checkpoint.config, dtype=dtype, **settings)
    abstract = abstract_params(checkpoint.config, dtype)
    return decoder, _load_part(checkpoint, "decoder", abstract, mesh, quantize)


def load_model(
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: Any = "float32",
    towers: Iterable[str] | None = None,
    tower_dtype: Any = None,
    head: bool = False,
    **settings: str,
) -> tuple[Model, Tree]:
    """The decoder with `towers` (by default all of them), and their parameters by part.

    The parts are "decoder", each tower, a "head" if asked for, and the "projection" of a checkpoint
    that has one. tower_dtype: of the towers' parameters and activations, by default `dtype`. head:
    load the vocabulary head, too, unless it is tied to the embeddings. settings: as `load_decoder`
    has them; it also says how parameters are read.
    """
    decoder, params = load_decoder(checkpoint, mesh, dtype, **settings)
    tower_dtype = _dtype(dtype if tower_dtype is None else tower_dtype)
    modules: dict[str, nn.Module] = {}
    tree: Tree = {"decoder": params}
    for name in checkpoint.towers if towers is None else towers:
        module = tower_module(checkpoint.backbone, name, checkpoint.towers[name], tower_dtype)
        modules[name] = module
        tree[name] = _load_part(checkpoint, name, abstract_params(module, tower_dtype), mesh)
    if head and "head" in checkpoint.keys:
        table = params["embed_tokens"]["weight"]
        abstract = {"weight": jax.ShapeDtypeStruct(table.shape, table.dtype)}
        tree["head"] = _load_part(checkpoint, "head", abstract, mesh)
    projection = read_projection(checkpoint.folder, checkpoint.config.hidden_size)
    if projection is not None:
        part = {"projection": {"weight": projection}}
        tree |= jax.device_put(part, shardings(part, mesh))
    return Model(decoder, modules), tree


def _dtype(dtype: Any) -> Any:
    name = str(dtype)
    if not isinstance(dtype, str):
        with suppress(TypeError):  # no dtype of jax
            name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise LcoError(f"dtype {name!r} is not supported; these are: {', '.join(DTYPES)}")
    return DTYPES[name]


def _load_part(
    checkpoint: Checkpoint, part: str, abstract: Tree, mesh: Mesh, quantize: str = ""
) -> Tree:
    """One part's parameters, of the shapes and dtypes in `abstract`; a stack is filled by layer."""
    stored = _stored_leaves(part, abstract, mesh, quantize)
    params: Tree = {}
    for path, name, leaf, layer in per_layer(abstract):
        key = checkpoint.keys[part][name]
        # the first array of a quantised leaf is sharded as its matrix would be
        sharding = jax.tree.leaves(stored[path])[0].sharding
        if layer is None:
            params[path] = _read_sharded(checkpoint.tensors, key, sharding, leaf.dtype)
            continue
        if layer == 0:
            params[path] = jax.tree.map(_sharded_zeros, stored[path])
        one_layer = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
        tensor = _read_sharded(checkpoint.tensors, key, one_layer, leaf.dtype)
        kind = "" if isinstance(stored[path], jax.ShapeDtypeStruct) else quantize
        stack_shardings = jax.tree.map(lambda x: x.sharding, stored[path])
        with jax.set_mesh(mesh):
            params[path] = _write_layer(params[path], tensor, layer, kind, stack_shardings)
    return unflatten_dict(params, sep=".")


def _stored_leaves(part: str, abstract: Tree, mesh: Mesh, quantize: str) -> Tree:
    """A part's leaves as the devices store them, as shapes with shardings, by path."""
    leaves = flatten_dict(abstract, sep=".")
    for path, leaf in leaves.items():
        if quantize and re.fullmatch(rf"{DECODER_LINEARS}\.weight", path):
            quantized = partial(quantize_matrix, kind=quantize, name=path)
            leaves[path] = jax.eval_shape(quantized, leaf)
    tree = unflatten_dict(leaves, sep=".")
    return flatten_dict(with_shardings(tree, shardings({part: tree}, mesh)[part]), sep=".")


def _read_sharded(
    tensors: TensorFolder, key: str, sharding: NamedSharding, dtype: Any
) -> jax.Array:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(tensors.read(key, index)).astype(dtype, copy=False)

    return jax.make_array_from_callback(tensors.shape(key), sharding, read)


def _sharded_zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _write_layer(stack: Any, tensor: jax.Array, layer: jax.Array, kind: str, sharding: Any) -> Any:
    """Write a tensor, quantised if there is a `kind`, as one layer of the arrays of a stack."""

    def write(array: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, value, layer, 0)

    value = quantize_matrix(tensor, kind) if kind else tensor
    return jax.lax.with_sharding_constraint(jax.tree.map(write, stack, value), sharding)
