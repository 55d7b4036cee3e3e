"""LoRA as three pure functions over parameter trees: init, attach, merge.

Dimensions: L layers (leading axis of stacked leaves), O output features, I input features, r rank.

An adapter tree mirrors the parameter tree. In the place of every adapted matrix it has
{"a": [L, r, I], "b": [L, O, r]} (float32), and nothing elsewhere. `jax.grad` is taken of that tree
alone. A parameter that is trained itself stands in such a tree as an array: the three functions put
it where the parameter was.
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
from jax.sharding import Mesh

from lco_jax.core.errors import LcoError
from lco_jax.core.quantize import QuantizedWeight
from lco_jax.core.sharding import shardings
from lco_jax.core.weights import LoraWeight

Tree = dict[str, Any]
DECODER_LINEARS = r"layers\.(self_attn|mlp)\.\w+_proj"


@dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter.

    rank: r. dropout: the rate on the adapter's input. targets: a pattern of whole module paths.
    """

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
        """The factor of B A: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def target_paths(params: Tree, config: LoraConfig) -> list[str]:
    """Dotted paths of the matrices that `config.targets` selects, sorted. Raises if it has none."""
    weights = {path: leaf for path, leaf in _flat(params).items() if path.endswith(".weight")}
    try:
        pattern = re.compile(config.targets)
    except re.error as error:
        raise LcoError(
            f"lora.targets {config.targets!r} is not a regular expression: {error}"
        ) from error
    chosen = sorted(path for path in weights if pattern.fullmatch(path.removesuffix(".weight")))
    if not chosen:
        modules = sorted(path.removesuffix(".weight") for path in weights)
        raise LcoError(
            f"lora.targets {config.targets!r} matches no module; there are: {', '.join(modules)}"
        )
    for path in chosen:
        if len(weights[path].shape) < 2 or "norm" in path:
            raise LcoError(
                f"lora.targets {config.targets!r} matches {path}, which is no linear layer"
            )
    return chosen


def init(key: Array, params: Tree, config: LoraConfig) -> Tree:
    """A new adapter for `params` (arrays or shapes): A uniform in ±1/sqrt(I) as in PEFT, B zero."""
    leaves = _flat(params)
    adapters = {}
    for path in target_paths(params, config):
        *stack, outputs, inputs = leaves[path].shape
        bound = 1.0 / math.sqrt(inputs)
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        shape = *stack, config.rank, inputs
        adapters[path] = {
            "a": jax.random.uniform(path_key, shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((*stack, outputs, config.rank), jnp.float32),
        }
    return unflatten_dict(adapters, sep=".")


def attach(params: Tree, adapters: Tree, config: LoraConfig) -> Tree:
    """`params` with a `LoraWeight` in the place of every adapted matrix."""

    def attached(_: str, base: Any, a: Array, b: Array) -> LoraWeight:
        return LoraWeight(base, a, b, config.scale, config.dropout)

    return _adapt(params, adapters, attached)


def merge(params: Tree, adapters: Tree, config: LoraConfig) -> Tree:
    """`params` with the adapters added: same tree, same shapes, plain arrays.

    Raises for a quantised matrix.
    """

    def merged(path: str, base: Any, a: Array, b: Array) -> Array:
        if isinstance(base, QuantizedWeight):
            raise LcoError(
                f"{path} is quantised, and nothing can be merged into it; "
                "merge into the checkpoint's files"
            )
        return merge_weight(base, a, b, config.scale)

    return _adapt(params, adapters, merged)


def with_adapters(
    params: dict[str, Any],
    adapters: dict[str, Any],
    config: LoraConfig,
    mesh: Mesh,
    beside: bool,
) -> dict[str, Any]:
    """A model's parameters with a PEFT adapter merged; they are donated. Parts that are not loaded
    need none.

    beside: the decoder, whose matrices are quantised, gets it beside them.
    """
    config = replace(config, dropout=0.0)
    for part in adapters.keys() & params.keys():
        attached = beside and part == "decoder"
        place = shardings({part: params[part]}, mesh)[part]
        join = jax.jit(
            attach if attached else merge,
            static_argnums=2,
            donate_argnums=0,
            out_shardings=None if attached else place,
        )
        params[part] = join(params[part], adapters[part], config)
    return params


def merge_weight(base: Array, a: Array, b: Array, scale: float) -> Array:
    """base + scale · B A, computed in float32, in the dtype of base.

    It does one layer of a stack at a time, to save memory.
    """
    if base.ndim > 2:
        return jax.lax.map(lambda layer: merge_weight(*layer, scale), (base, a, b))
    delta = jnp.einsum("or,ri->oi", b, a, precision=jax.lax.Precision.HIGHEST)
    return (base.astype(jnp.float32) + scale * delta).astype(base.dtype)


def _adapt(params: Tree, adapters: Tree, adapted: Callable[[str, Any, Array, Array], Any]) -> Tree:
    """`params`, with adapted(path, matrix, a, b) in the place of every adapted matrix.

    A parameter that stands in `adapters` as an array replaces that of `params`.
    """
    leaves = _flat(params)
    trained = _flat(adapters)
    for path in sorted(trained):
        if path.endswith(".a"):
            matrix = path.removesuffix(".a")
            leaves[matrix] = adapted(matrix, leaves[matrix], trained[path], trained[f"{matrix}.b"])
        elif not path.endswith(".b"):
            leaves[path] = trained[path]
    return unflatten_dict(leaves, sep=".")


def _flat(tree: Tree) -> dict[str, Any]:
    """{dotted path: leaf}."""
    return flatten_dict(tree, sep=".")


def split_frozen(params: Tree, all_trainable: bool = False) -> tuple[Tree, Tree]:
    """The frozen and the trainable part of `params`: two trees, None where the other has the leaf.

    A `LoraWeight` is split: its base is frozen, and the pair of its factors is trainable.
    all_trainable: every leaf is trainable.
    """

    def frozen(leaf: Any) -> Any:
        if all_trainable:
            return None
        return leaf.base if _is_adapted(leaf) else leaf

    def trainable(leaf: Any) -> Any:
        if all_trainable:
            return leaf
        return (leaf.a, leaf.b) if _is_adapted(leaf) else None

    return (
        jax.tree.map(frozen, params, is_leaf=_is_adapted),
        jax.tree.map(trainable, params, is_leaf=_is_adapted),
    )


def join_frozen(params: Tree, frozen: Tree, trainable: Tree) -> Tree:
    """A tree like `params`, from two that `split_frozen` made of it, or from a layer of them."""

    def join(leaf: Any, frozen: Any, trainable: Any) -> Any:
        if trainable is None:
            return frozen
        if frozen is None:
            return trainable
        a, b = trainable
        return replace(leaf, base=frozen, a=a, b=b)

    return jax.tree.map(join, params, frozen, trainable, is_leaf=_is_adapted)


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, LoraWeight)
