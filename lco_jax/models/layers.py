"""The parts every backbone is made of. They read leaves from the tree and hand them to `core.weights.dot`.

Dimensions: B rows, T tokens, D hidden, I input features, O output features, H head_dim.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lco_jax.core.sharding import ROWS, constrain
from lco_jax.core.weights import WHOLE, Split, dots


def leaf(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    init: nn.initializers.Initializer,
    dtype: Any,
) -> Any:
    """The parameter `name`: whatever value the tree holds, or a new array when the module is being initialised.

    Not `module.param`, which compares shapes and so would turn away a leaf that is not an array.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, dtype)


def stacked(layer: type[nn.Module], length: int, in_axes: Any = nn.broadcast) -> Any:
    """`length` layers run one after the other, their parameters stacked along a leading axis L (`nn.scan`).

    A backward pass, if there is one, computes each layer again: what is kept is what went into it.
    """
    layer = nn.remat(layer, prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
    )


class Linear(nn.Module):
    """y = x Wᵀ + b, with W stored [O, I] as in the checkpoints. split: how the mesh splits its features."""

    features: int
    use_bias: bool = False
    param_dtype: Any = jnp.float32
    split: Split = WHOLE

    @nn.compact
    def leaves(self, inputs: int) -> tuple[Any, Any]:
        """(weight, bias or None), as the tree holds them."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
        weight = leaf(self, "weight", (self.features, inputs), init, self.param_dtype)
        if not self.use_bias:
            return weight, None
        return weight, leaf(self, "bias", (self.features,), nn.initializers.zeros, self.param_dtype)

    def __call__(self, x: Array, token_keys: Array | None = None) -> Array:
        """x [..., I] -> [..., O]; token_keys as in `dot`."""
        return linears(x, [self], token_keys)[0]


def linears(x: Array, layers: Sequence[Linear], token_keys: Array | None = None) -> list[Array]:
    """Several layers of one input, which are split alike: x [..., I] -> [..., O] of each; token_keys as in `dots`."""
    weights, biases = zip(*(layer.leaves(x.shape[-1]) for layer in layers), strict=True)
    products = dots(x, weights, token_keys, layers[0].split)
    return [
        y if b is None else y + b.astype(x.dtype) for y, b in zip(products, biases, strict=True)
    ]


def normalised(levels: Array, scale: Array) -> Array:
    """Pictures as their towers read them, as the processors round them: float32, (level / divisor - mean) / std.

    levels: uint8 [B, T, C, …]. scale: float32 [B, C, 3], divisor, mean and std of each channel.
    """
    divisor, mean, std = jnp.moveaxis(
        scale.reshape(levels.shape[0], 1, -1, *[1] * (levels.ndim - 3), 3), -1, 0
    )
    # a compiler multiplies by the reciprocal of a divisor that it sees repeated, which is rounded otherwise
    divisor, std = jax.lax.optimization_barrier(
        [jnp.broadcast_to(x, levels.shape) for x in (divisor, std)]
    )
    return (levels.astype(jnp.float32) / divisor - mean) / std


class Projector(nn.Module):
    """Two layers with exact GELU between them."""

    hidden: int
    features: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., I] -> [..., O]."""
        x = nn.gelu(
            Linear(self.hidden, True, self.param_dtype, name="linear_1")(x), approximate=False
        )
        return Linear(self.features, True, self.param_dtype, name="linear_2")(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, the gain applied in the activations' dtype (as Qwen2RMSNorm does)."""

    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D]."""
        gain = leaf(self, "weight", (x.shape[-1],), nn.initializers.ones, self.param_dtype)
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return gain.astype(x.dtype) * wide.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with gain and bias, in float32."""

    eps: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D]."""
        gain = leaf(self, "weight", (x.shape[-1],), nn.initializers.ones, self.param_dtype).astype(
            jnp.float32
        )
        bias = leaf(self, "bias", (x.shape[-1],), nn.initializers.zeros, self.param_dtype).astype(
            jnp.float32
        )
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * gain + bias).astype(x.dtype)


class Embedding(nn.Module):
    """Token ids -> vectors, in `dtype`."""

    vocab_size: int
    features: int
    dtype: Any
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """ids int [...] -> [..., D]."""
        init = nn.initializers.normal(1.0)
        table = leaf(self, "weight", (self.vocab_size, self.features), init, self.param_dtype)
        # Every device looks up its part of the features for all tokens of the devices that share the table. What it
        # sends is then parts of rows, and not a part of the table.
        parts = jnp.take(table, constrain(ids, "data"), axis=0)
        parts = constrain(parts, "data", *[None] * (ids.ndim - 1), "fsdp")
        return constrain(parts, ROWS).astype(self.dtype)


def rotary_angles(
    position_ids: Array, head_dim: int, theta: float, mrope_section: tuple[int, ...]
) -> Array:
    """Rotation angles [B, T, H/2] (float32) of M-RoPE (Qwen2-VL, arXiv 2409.12191).

    position_ids: [B, T, 3] (time, height, width). Section i of the H/2 frequencies turns with axis i mod 3; text has
    the same position on all three axes, which makes this plain RoPE.
    """
    frequencies = 1.0 / theta ** (
        np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    )
    axis = np.repeat(np.arange(len(mrope_section)) % 3, mrope_section)
    return position_ids[..., axis].astype(jnp.float32) * frequencies.astype(np.float32)


def apply_rotary(x: Array, rotation: Array) -> Array:
    """Rotate the halves of x [B, T, …, H]. rotation: [B, T, 2, H], factors of x and of its halves exchanged."""
    rotation = rotation.astype(x.dtype)
    rotation = rotation.reshape(*rotation.shape[:2], *[1] * (x.ndim - 3), *rotation.shape[2:])
    of_own, of_other = rotation[..., 0, :], rotation[..., 1, :]
    return x * of_own + jnp.roll(x, x.shape[-1] // 2, axis=-1) * of_other


def rotation_of(angles: Array) -> Array:
    """Angles [B, T, H/2] -> [B, T, 2, H], what `apply_rotary` takes: computed once for all layers.

    The left half becomes left · cos - right · sin, the right half becomes right · cos + left · sin.
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    of_own = jnp.concatenate([cos, cos], axis=-1)
    of_other = jnp.concatenate([-sin, sin], axis=-1)
    return jnp.stack([of_own, of_other], axis=-2)
