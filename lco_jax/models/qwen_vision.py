"""The vision tower of Qwen2.5-VL and Qwen2.5-Omni.

Upstream: modeling_qwen2_5_vl.py, modeling_qwen2_5_omni.py.

Dimensions: B rows, T patches of a row, W windows of a row, V values of a patch (of one picture or
of as many as the convolution spans), C channels, D hidden, K heads, H head_dim, F MLP width, M
merged patches (4 to a token), O the decoder's hidden size.

Patches arrive in window order (`data/tower_rows.py` packs them). Most blocks attend within a
window, and reshape rows to short rows of windows. The others attend within a frame. No block looks
across, so the cost grows with Σ n². The host orders the patches, and nothing is permuted here.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.core.weights import dot
from lco_jax.models.attention import attention
from lco_jax.models.config import LARGEST, MOST_LAYERS, check_multiple, positive, section
from lco_jax.models.layers import (
    Linear,
    Projector,
    RMSNorm,
    apply_rotary,
    leaf,
    normalised,
    rotary_frequencies,
    rotation_of,
    stacked,
)

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class VisionConfig:
    """The sizes of the tower.

    full_blocks: the blocks that attend to frames. fused: VL's q, k and v are one matrix.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    full_blocks: tuple[int, ...]
    out_hidden_size: int
    fused: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str, fused: bool) -> "VisionConfig":
        """Read `vision_config`. Raises, by key, for what is missing or not supported."""
        vision = section(config, "vision_config", where)
        activation = vision.get("hidden_act", "silu")
        if activation != "silu":
            raise LcoError(
                f"{where}: vision_config.hidden_act {activation!r} is not supported (silu is)"
            )
        need = partial(positive, vision, where=f"{where}: vision_config")
        heads = need("num_heads")
        quarters = ("four times num_heads", 4 * heads)  # a head turns by row and by column
        check_multiple(("vision_config.hidden_size", need("hidden_size")), quarters, where)
        full_blocks = vision.get("fullatt_block_indexes", (7, 15, 23, 31))
        if not isinstance(full_blocks, list | tuple) or not all(
            type(block) is int and 0 <= block < LARGEST for block in full_blocks
        ):
            raise LcoError(
                f"{where}: vision_config.fullatt_block_indexes is {full_blocks!r:.60}, and must be "
                "a list of blocks"
            )
        channels = "in_channels" if vision.get("in_channels") else "in_chans"
        return cls(
            depth=need("depth", most=MOST_LAYERS),
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_heads=heads,
            in_channels=need(channels) if vision.get(channels) else 3,
            patch_size=need("patch_size"),
            temporal_patch_size=need("temporal_patch_size"),
            spatial_merge_size=need("spatial_merge_size"),
            window_size=need("window_size"),
            full_blocks=tuple(full_blocks),
            out_hidden_size=need("out_hidden_size"),
            fused=fused,
        )


class VisionAttention(nn.Module):
    """Attention both ways within windows or frames, with 2-D rotary positions."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        rotation: Array,
        frame_ids: Array,
        window_ids: Array,
        full: Array,
    ) -> Array:
        """x [B, T, D] -> [B, T, D].

        frame_ids: [B, T]. window_ids: [B, W, T / W]. full: whether to attend to frames.
        """
        c = self.config
        q, k, v = self._project(x)
        q = _rotate(q, rotation)
        k = _rotate(k, rotation)

        def in_frames(q: Array, k: Array, v: Array) -> Array:
            return _attend(q, k, v, frame_ids)

        def in_windows(q: Array, k: Array, v: Array) -> Array:
            windows = window_ids.shape[1]
            qkv = [rearrange(y, "b (w t) k h -> (b w) t k h", w=windows) for y in (q, k, v)]
            ids = rearrange(window_ids, "b w t -> (b w) t")
            mixed = _attend(*qkv, ids)
            return rearrange(mixed, "(b w) t k h -> b (w t) k h", w=windows)

        mixed = jax.lax.cond(full, in_frames, in_windows, q, k, v)
        mixed = rearrange(mixed, "b t k h -> b t (k h)")
        return Linear(c.hidden_size, use_bias=True, name="proj")(mixed)

    def _project(self, x: Array) -> list[Array]:
        """Queries, keys and values: [B, T, K, H]."""
        c = self.config
        if c.fused:
            qkv = Linear(3 * c.hidden_size, use_bias=True, name="qkv")(x)
            outputs = jnp.split(qkv, 3, axis=-1)
        else:
            linear = partial(Linear, c.hidden_size, use_bias=True)
            outputs = [linear(name=name)(x) for name in ("q", "k", "v")]
        return [rearrange(y, "b t (k h) -> b t k h", k=c.num_heads) for y in outputs]


def _rotate(x: Array, rotation: Array) -> Array:
    """`apply_rotary` in float32."""
    return apply_rotary(x.astype(jnp.float32), rotation).astype(x.dtype)


def _attend(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """Attention both ways, of one query head per key-value head: [B, T, K, H]."""
    query = rearrange(q, "b t k h -> b t k 1 h")
    mixed = attention(query, k, v, segment_ids, causal=False)
    return rearrange(mixed, "b t k 1 h -> b t k h")


class VisionMLP(nn.Module):
    """SwiGLU with biases."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        c = self.config
        gate = Linear(c.intermediate_size, use_bias=True, name="gate_proj")(x)
        up = Linear(c.intermediate_size, use_bias=True, name="up_proj")(x)
        return Linear(c.hidden_size, use_bias=True, name="down_proj")(nn.silu(gate) * up)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array, full: Array, *where: Array) -> tuple[Array, None]:
        """x [B, T, D] -> ([B, T, D], nothing to collect).

        full: whether this block attends to frames. where: rotation, frame_ids and window_ids.
        """
        y = RMSNorm(NORM_EPS, name="norm1")(x)
        x += VisionAttention(self.config, name="attn")(y, *where, full)
        y = RMSNorm(NORM_EPS, name="norm2")(x)
        x += VisionMLP(self.config, name="mlp")(y)
        return x, None


class VisionPatchEmbed(nn.Module):
    """Patches -> vectors: a convolution whose stride is its kernel, which is a matrix."""

    config: VisionConfig

    @nn.compact
    def __call__(self, patches: Array, scale: Array, dtype: Any) -> Array:
        """patches uint8 [B, T, V] -> [B, T, D] of `dtype`.

        Their values are in the order (channel, time, height, width). A still has one picture, which
        the convolution sees at each time.
        """
        c = self.config
        pixels = c.patch_size**2
        patches = rearrange(patches, "b t (c p v) -> b t c p v", c=c.in_channels, v=pixels)
        x = normalised(patches, scale)
        x = x.astype(dtype)
        pictures = x.shape[3]
        x = jnp.repeat(x, c.temporal_patch_size // pictures, axis=3)
        x = rearrange(x, "b t c p v -> b t (c p v)")

        init = nn.initializers.normal(x.shape[-1] ** -0.5)
        shape = (
            c.hidden_size,
            c.in_channels,
            c.temporal_patch_size,
            c.patch_size,
            c.patch_size,
        )
        weight = leaf(self, "weight", shape, init)
        weight = rearrange(weight, "d c p h w -> d (c p h w)")
        return dot(x, weight)


class VisionMerger(nn.Module):
    """Four patches of a square -> one of the decoder's tokens."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, T, D], the patches of a square side by side -> [B, M, O]."""
        c = self.config
        x = RMSNorm(NORM_EPS, name="ln_q")(x)
        x = rearrange(x, "b (m square) d -> b m (square d)", square=c.spatial_merge_size**2)
        return Projector(x.shape[-1], c.out_hidden_size, name="mlp")(x)


class QwenVision(nn.Module):
    """Rows of patches -> rows of the decoder's tokens. dtype: of the activations."""

    config: VisionConfig
    dtype: Any = jnp.float32

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The smallest input, as shapes."""
        c = self.config
        square = c.spatial_merge_size**2
        values = c.in_channels * c.temporal_patch_size * c.patch_size**2
        return {
            "patches": jax.ShapeDtypeStruct((1, square, values), jnp.uint8),
            "scale": jax.ShapeDtypeStruct((1, c.in_channels, 3), jnp.float32),
            "coordinates": jax.ShapeDtypeStruct((1, square, 2), jnp.int32),
            "frame_ids": jax.ShapeDtypeStruct((1, square), jnp.int32),
            "window_ids": jax.ShapeDtypeStruct((1, 1, square), jnp.int32),
        }

    def row_size(self, arguments: dict[str, Array]) -> int:
        """Patches of a row."""
        return arguments["patches"].shape[1]

    @nn.compact
    def __call__(
        self,
        patches: Array,
        scale: Array,
        coordinates: Array,
        frame_ids: Array,
        window_ids: Array,
    ) -> Array:
        """Rows in window order -> [B, M, O], M = T / 4.

        patches: uint8 [B, T, V]. scale: float32 [B, C, 3], how the levels of each channel are
        normalised. coordinates: int [B, T, 2], row and column of each patch in its frame.
        frame_ids: int [B, T], 0 for padding. window_ids: int [B, W, T / W], 0 for padding.
        """
        c = self.config
        x = VisionPatchEmbed(c, name="patch_embed")(patches, scale, self.dtype)
        angles = _angles(coordinates, c.hidden_size // c.num_heads)
        rotation = rotation_of(angles)
        full_blocks = np.array(c.full_blocks, np.int32)
        full = jnp.isin(jnp.arange(c.depth), full_blocks)

        of_block, shared = 0, nn.broadcast
        in_axes = (of_block, shared, shared, shared)
        stack = stacked(VisionBlock, c.depth, in_axes)
        x, _ = stack(c, name="blocks")(x, full, rotation, frame_ids, window_ids)
        return VisionMerger(c, name="merger")(x)


def _angles(coordinates: Array, head_dim: int) -> Array:
    """Rotation angles [B, T, H / 2]: the first half turns with the row, the second with the column.

    coordinates: int [B, T, 2].
    """
    frequencies = rotary_frequencies(head_dim // 2, ROPE_THETA)
    angles = coordinates[..., None].astype(jnp.float32) * frequencies
    return rearrange(angles, "b t a f -> b t (a f)")
