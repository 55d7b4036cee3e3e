"""The parameters of a decoder or a tower as shapes, and what a checkpoint calls each of them."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from lco_jax.core.lora import Tree
from lco_jax.core.packing import PackedTokens
from lco_jax.models.config import DecoderConfig
from lco_jax.models.decoder import Decoder
from lco_jax.models.registry import Backbone

_STACK = re.compile(r"(layers|blocks)\.(.+)")  # parameters that are stacked along a leading axis


@lru_cache(maxsize=64)  # opening, loading and training each ask for it, and tracing takes time
def abstract_params(module: DecoderConfig | nn.Module, dtype: Any = jnp.float32) -> Tree:
    """The parameter tree of a decoder or a tower as shapes and dtypes, nothing allocated."""
    key = jax.random.key(0)
    if isinstance(module, DecoderConfig):
        params = jax.eval_shape(Decoder(module).init, key, _one_token())["params"]
    else:
        params = jax.eval_shape(module.init, key, **module.example())["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)


def _one_token() -> PackedTokens:
    one = jnp.zeros((1, 1), jnp.int32)
    per_axis = jnp.zeros((1, 1, 3), jnp.int32)
    rows = (jnp.zeros((1, 1, 1), jnp.int32),)
    return PackedTokens(one, per_axis, one, one, rows, one, one)


def tower_module(backbone: Backbone, name: str, config: Any, dtype: Any = jnp.float32) -> nn.Module:
    """The tower `name` of a backbone."""
    return backbone.towers[name][0](config, dtype=dtype)


def per_layer(params: Tree) -> Iterator[tuple[str, str, Any, int | None]]:
    """(path in the tree, name in a checkpoint, leaf, layer) of every parameter.

    A leaf that is stacked along its layers comes once a layer, in order; others have no layer.
    """
    for path, leaf in flatten_dict(params, sep=".").items():
        match = _STACK.fullmatch(path)
        if match is None:
            yield path, path, leaf, None
            continue
        for layer in range(leaf.shape[0]):
            yield path, f"{match[1]}.{layer}.{match[2]}", leaf, layer
