"""The parts every backbone is made of. They read leaves from the tree and call `core.weights.dot`.

Dimensions: B rows, T tokens, D hidden, I input features, O output features, H head_dim, L layers.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lco_jax.core.sharding import ROWS, constrain
from lco_jax.core.weights import UNSPLIT, Split, dots


def leaf(
    module: nn.Module, name: str, shape: tuple[int, ...], init: nn.initializers.Initializer
) -> Any:
    """The parameter `name` as the tree holds it, or a new array while the module is initialised.

    It does not call `module.param` for a parameter that is there: that compares shapes, and turns
    away a leaf that is no array.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


def stacked(layer: type[nn.Module], length: int, in_axes: Any = nn.broadcast) -> Any:
    """`length` layers that run one after the other, their parameters stacked along an axis L.

    A backward pass computes each layer again: only the layers' inputs are stored for it.
    """
    layer = nn.remat(layer, prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
    )


def largest_divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is not above `most`."""
    return next(n for n in range(min(most, size), 0, -1) if size % n == 0)


# ---- linear layers


class Linear(nn.Module):
    """y = x Wᵀ + b, with W stored [O, I] as in the checkpoints.

    split: how the mesh splits its features.
    """

    features: int
    use_bias: bool = False
    split: Split = UNSPLIT

    @nn.compact
    def leaves(self, inputs: int) -> tuple[Any, Any]:
        """(weight, bias or None), as the tree holds them."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
        weight = leaf(self, "weight", (self.features, inputs), init)
        if not self.use_bias:
            return weight, None
        return weight, leaf(self, "bias", (self.features,), nn.initializers.zeros)

    def __call__(self, x: Array, token_keys: Array | None = None) -> Array:
        """x [..., I] -> [..., O]; token_keys as in `dot`."""
        return linears(x, [self], token_keys)[0]


def linears(x: Array, layers: Sequence[Linear], token_keys: Array | None = None) -> list[Array]:
    """Several layers of one input, which are split alike: x [..., I] -> [..., O] of each.

    token_keys: as in `dots`.
    """
    weights, biases = zip(*(layer.leaves(x.shape[-1]) for layer in layers), strict=True)
    outputs = []
    for y, bias in zip(dots(x, weights, token_keys, layers[0].split), biases, strict=True):
        outputs.append(y if bias is None else y + bias.astype(x.dtype))
    return outputs


class Projector(nn.Module):
    """Two layers with exact GELU between them."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., I] -> [..., O]."""
        x = Linear(self.hidden, use_bias=True, name="linear_1")(x)
        x = nn.gelu(x, approximate=False)
        return Linear(self.features, use_bias=True, name="linear_2")(x)


# ---- norms


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, with the gain in the dtype of x, as in Qwen2RMSNorm."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D]."""
        gain = leaf(self, "weight", (x.shape[-1],), nn.initializers.ones)
        normed = _unit_variance(x.astype(jnp.float32), self.eps)
        return gain.astype(x.dtype) * normed.astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with gain and bias, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D]."""
        features = (x.shape[-1],)
        gain = leaf(self, "weight", features, nn.initializers.ones)
        bias = leaf(self, "bias", features, nn.initializers.zeros)
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        normed = _unit_variance(wide, self.eps)
        normed = normed * gain.astype(jnp.float32)
        normed += bias.astype(jnp.float32)
        return normed.astype(x.dtype)


def _unit_variance(x: Array, eps: float) -> Array:
    """x [..., D] over its root mean square."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps)


# ---- inputs


class Embedding(nn.Module):
    """Token ids -> vectors, in `dtype`."""

    vocab_size: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """ids int [R, T] -> [R, T, D]."""
        table = leaf(self, "weight", (self.vocab_size, self.features), nn.initializers.normal(1.0))
        # Every device looks up its part of the features, for all tokens of the devices that share
        # the table. So it sends parts of vectors, and not its part of the table.
        x = jnp.take(table, constrain(ids, "data"), axis=0)
        x = constrain(x, "data", None, "fsdp")
        return constrain(x, ROWS).astype(self.dtype)


def normalised(levels: Array, scale: Array) -> Array:
    """Pictures as their towers read them: float32, (level / divisor - mean) / std.

    It rounds as the processors do.
    levels: uint8 [B, T, C, …]. scale: float32 [B, C, 3], the divisor, mean and std of each channel.
    """
    of_channel = scale.reshape(len(levels), 1, -1, *[1] * (levels.ndim - 3), 3)
    divisor, mean, std = jnp.moveaxis(of_channel, -1, 0)
    # A compiler multiplies by the reciprocal of a divisor that it sees repeated, which is rounded
    # otherwise. The barrier hides the repetition.
    divisors = [jnp.broadcast_to(x, levels.shape) for x in (divisor, std)]
    divisor, std = jax.lax.optimization_barrier(divisors)
    return (levels.astype(jnp.float32) / divisor - mean) / std


# ---- rotary positions


def rotary_frequencies(size: int, theta: float) -> np.ndarray:
    """The size / 2 frequencies of a rotation of `size` features: float32."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return (1.0 / theta**exponents).astype(np.float32)


def rotary_angles(
    position_ids: Array, head_dim: int, theta: float, mrope_section: tuple[int, ...]
) -> Array:
    """Rotation angles [B, T, H/2] (float32) of M-RoPE (Qwen2-VL, arXiv 2409.12191).

    position_ids: [B, T, 3] (time, height, width). Section i of the H/2 frequencies turns with axis
    i mod 3. Text has the same position on all three axes, which makes this plain RoPE.
    """
    axis = np.repeat(np.arange(len(mrope_section)) % 3, mrope_section)
    positions = position_ids[..., axis].astype(jnp.float32)
    return positions * rotary_frequencies(head_dim, theta)


def rotation_of(angles: Array) -> Array:
    """Angles [B, T, H/2] -> the rotation [B, T, 2, H] that `apply_rotary` takes.

    It is computed once for all layers. The left half becomes left · cos - right · sin, the right
    half becomes right · cos + left · sin.
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    of_x = jnp.concatenate([cos, cos], axis=-1)
    of_exchanged = jnp.concatenate([-sin, sin], axis=-1)
    return jnp.stack([of_x, of_exchanged], axis=-2)


def apply_rotary(x: Array, rotation: Array) -> Array:
    """Rotate the halves of x [B, T, …, H].

    rotation: [B, T, 2, H], the factors of x and of x with its halves exchanged.
    """
    heads = [1] * (x.ndim - 3)
    rotation = rotation.astype(x.dtype)
    rotation = rotation.reshape(*rotation.shape[:2], *heads, *rotation.shape[2:])
    of_x, of_exchanged = rotation[..., 0, :], rotation[..., 1, :]
    exchanged = jnp.roll(x, x.shape[-1] // 2, axis=-1)
    return x * of_x + exchanged * of_exchanged
