"""LoRA as three pure functions over parameter trees: init, attach, merge.

Dimensions: L layers (leading axis of stacked leaves), O output features, I input features, r rank.

An adapter tree mirrors the parameter tree, holding {"a": [L, r, I], "b": [L, O, r]} (float32) in the place of every
adapted matrix and nothing elsewhere. `jax.grad` is taken of that tree alone. A leaf that is tuned whole stands in such
a tree as the array itself: the three functions put it where the parameter was.
"""

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.core.quantize import QuantizedWeight
from lco_jax.core.weights import LoraWeight

Tree = dict[str, Any]
DECODER_LINEARS = r"layers\.(self_attn|mlp)\.\w+_proj"


@dataclass(frozen=True)
class LoraConfig:
    """rank r; alpha; dropout rate on the adapter's input; targets: a pattern that matches whole module paths."""

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = DECODER_LINEARS
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LcoError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise LcoError(f"lora.dropout is {self.dropout}; it must lie in [0, 1)")

    @property
    def scale(self) -> float:
        """What B A is multiplied with: alpha / r (or alpha / sqrt(r), Kalajdzievski 2023, for `use_rslora`)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def target_paths(params: Tree, config: LoraConfig) -> list[str]:
    """Dotted paths of the matrices that `config.targets` selects, sorted. Raises if there are none."""
    leaves = flatten_dict(params, sep=".")
    modules = {path.removesuffix(".weight"): path for path in leaves if path.endswith(".weight")}
    try:
        chosen = sorted(
            path for module, path in modules.items() if re.fullmatch(config.targets, module)
        )
    except re.error as error:
        raise LcoError(
            f"lora.targets {config.targets!r} is not a regular expression: {error}"
        ) from None
    if not chosen:
        raise LcoError(
            f"lora.targets {config.targets!r} matches no module; there are: {', '.join(sorted(modules))}"
        )
    if flat := [path for path in chosen if len(leaves[path].shape) < 2 or "norm" in path]:
        raise LcoError(
            f"lora.targets {config.targets!r} matches {flat[0]}, which is no linear layer"
        )
    return chosen


def init(key: Array, params: Tree, config: LoraConfig) -> Tree:
    """A fresh adapter for `params` (arrays or shapes): A uniform in ±1/sqrt(I) as PEFT draws it, B zero."""
    leaves = flatten_dict(params, sep=".")
    adapters = {}
    for path in target_paths(params, config):
        *stack, out_features, in_features = leaves[path].shape
        bound = 1.0 / math.sqrt(in_features)
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        adapters[path] = {
            "a": jax.random.uniform(
                path_key, (*stack, config.rank, in_features), jnp.float32, -bound, bound
            ),
            "b": jnp.zeros((*stack, out_features, config.rank), jnp.float32),
        }
    return unflatten_dict(adapters, sep=".")


def _adapted_leaves(params: Tree, adapters: Tree) -> tuple[Tree, dict[str, tuple[Array, Array]]]:
    """The flat parameters, those that are tuned whole replaced, and {path: (a, b)} of the adapted ones."""
    leaves, pairs = flatten_dict(params, sep="."), flatten_dict(adapters, sep=".")
    paths = sorted(path.removesuffix(".a") for path in pairs if path.endswith(".a"))
    whole = {path: leaf for path, leaf in pairs.items() if not path.endswith((".a", ".b"))}
    return {**leaves, **whole}, {path: (pairs[f"{path}.a"], pairs[f"{path}.b"]) for path in paths}


def attach(params: Tree, adapters: Tree, config: LoraConfig) -> Tree:
    """`params` with a `LoraWeight` in the place of every adapted matrix."""
    leaves, pairs = _adapted_leaves(params, adapters)
    for path, (a, b) in pairs.items():
        leaves[path] = LoraWeight(leaves[path], a, b, config.scale, config.dropout)
    return unflatten_dict(leaves, sep=".")


def merge_weight(base: Array, a: Array, b: Array, scale: float) -> Array:
    """base + scale · B A, computed in float32, in the dtype of base; one layer of a stack at a time, to save memory."""
    if base.ndim > 2:
        return jax.lax.map(lambda layer: merge_weight(*layer, scale), (base, a, b))
    delta = jnp.einsum("or,ri->oi", b, a, precision=jax.lax.Precision.HIGHEST)
    return (base.astype(jnp.float32) + scale * delta).astype(base.dtype)


def merge(params: Tree, adapters: Tree, config: LoraConfig) -> Tree:
    """`params` with the adapters added in: same tree, same shapes, plain arrays. Raises for a quantised base."""
    leaves, pairs = _adapted_leaves(params, adapters)
    if quantized := [path for path in pairs if isinstance(leaves[path], QuantizedWeight)]:
        raise LcoError(
            f"{quantized[0]} is quantised, and nothing can be merged into it; merge into the checkpoint's files"
        )
    merged = {
        path: merge_weight(leaves[path], a, b, config.scale) for path, (a, b) in pairs.items()
    }
    return unflatten_dict({**leaves, **merged}, sep=".")


def split_frozen(
    params: Tree, all_tuned: bool = False
) -> tuple[list[Any], list[Any], Callable[[list[Any], list[Any]], Tree]]:
    """What of `params` no gradient is taken of, what is tuned, and the function that joins them again.

    Tuned are the factors of `LoraWeight`s (None elsewhere), or all leaves if `all_tuned`. Frozen is the rest.
    """
    if all_tuned:
        leaves, structure = jax.tree.flatten(params)
        return [], leaves, lambda _, tuned: structure.unflatten(tuned)

    def adapted(leaf: Any) -> bool:
        return isinstance(leaf, LoraWeight)

    leaves, structure = jax.tree.flatten(params, is_leaf=adapted)
    frozen = [leaf.base if adapted(leaf) else leaf for leaf in leaves]
    tuned = [(leaf.a, leaf.b) if adapted(leaf) else None for leaf in leaves]

    def join(frozen: list[Any], tuned: list[Any]) -> Tree:
        rebuilt = []
        for leaf, base, factors in zip(leaves, frozen, tuned, strict=True):
            if factors is not None:
                a, b = factors
                base = replace(leaf, base=base, a=a, b=b)
            rebuilt.append(base)
        return structure.unflatten(rebuilt)

    return frozen, tuned, join
