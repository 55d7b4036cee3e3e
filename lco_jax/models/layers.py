"""The parts every backbone is made of. They read leaves from the tree and hand them to `core.weights.dot`.

Dimensions: B rows, T tokens, D hidden, I input features, O output features, H head_dim.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lco_jax.core.sharding import ROWS, constrain
from lco_jax.core.weights import dot


def leaf(module: nn.Module, name: str, shape: tuple[int, ...], init: nn.initializers.Initializer, dtype: Any) -> Any:
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
    return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, length=length)


class Linear(nn.Module):
    """y = x Wᵀ + b, with W stored [O, I] as in the checkpoints."""

    features: int
    use_bias: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, token_keys: Array | None = None) -> Array:
        """x [..., I] -> [..., O]; token_keys as in `dot`."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
        y = dot(x, leaf(self, "weight", (self.features, x.shape[-1]), init, self.param_dtype), token_keys)
        if self.use_bias:
            y += leaf(self, "bias", (self.features,), nn.initializers.zeros, self.param_dtype).astype(x.dtype)
        return y


def normalised(levels: Array, scale: Array) -> Array:
    """Pictures as their towers read them, as the processors round them: float32, (level / divisor - mean) / std.

    levels: uint8 [B, T, C, …]. scale: float32 [B, C, 3], divisor, mean and std of each channel.
    """
    divisor, mean, std = jnp.moveaxis(scale.reshape(levels.shape[0], 1, -1, *[1] * (levels.ndim - 3), 3), -1, 0)
    # a compiler multiplies by the reciprocal of a divisor that it sees repeated, which is rounded otherwise
    divisor, std = jax.lax.optimization_barrier([jnp.broadcast_to(x, levels.shape) for x in (divisor, std)])
    return (levels.astype(jnp.float32) / divisor - mean) / std


class Projector(nn.Module):
    """Two layers with exact GELU between them."""

    hidden: int
    features: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., I] -> [..., O]."""
        x = nn.gelu(Linear(self.hidden, True, self.param_dtype, name="linear_1")(x), approximate=False)
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
        gain = leaf(self, "weight", (x.shape[-1],), nn.initializers.ones, self.param_dtype).astype(jnp.float32)
        bias = leaf(self, "bias", (x.shape[-1],), nn.initializers.zeros, self.param_dtype).astype(jnp.float32)
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
        # gathered over fsdp like every other weight, looked up in shards of the vocabulary
        return constrain(jnp.take(constrain(table, "tensor"), ids, axis=0), ROWS).astype(self.dtype)


def rotary_angles(position_ids: Array, head_dim: int, theta: float, mrope_section: tuple[int, ...]) -> Array:
    """Rotation angles [B, T, H/2] (float32) of M-RoPE (Qwen2-VL, arXiv 2409.12191).

    position_ids: [B, T, 3] (time, height, width). Section i of the H/2 frequencies turns with axis i mod 3; text has
    the same position on all three axes, which makes this plain RoPE.
    """
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    axis = np.repeat(np.arange(len(mrope_section)) % 3, mrope_section)
    return position_ids[..., axis].astype(jnp.float32) * frequencies.astype(np.float32)


def apply_rotary(x: Array, rotation: Array) -> Array:
    """Rotate the halves of x [B, T, …, H]. rotation: [B, T, H/2, 2], the angles' cosines and sines (`rotation_of`)."""
    rotation = rotation.astype(x.dtype).reshape(*rotation.shape[:2], *[1] * (x.ndim - 3), *rotation.shape[2:])
    cos, sin = rotation[..., 0], rotation[..., 1]
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def rotation_of(angles: Array) -> Array:
    """Angles [B, T, H/2] -> [B, T, H/2, 2]: cosines and sines, computed once for all layers."""
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
