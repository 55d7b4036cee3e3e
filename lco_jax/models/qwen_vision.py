"""The vision tower of Qwen2.5-VL and Qwen2.5-Omni (upstream: modeling_qwen2_5_vl.py, modeling_qwen2_5_omni.py).

Dimensions: B rows, T patches in a row, W sub-rows of whole windows in a row, V values of a patch (of one picture or of
as many as the convolution spans), C channels, D hidden, K heads, H head_dim, F MLP width, M merged patches (4 to a
token), O the decoder's hidden size.

Patches arrive in window order (`data/tower_rows.py` lays them out): most blocks attend within a window and so reshape
rows to short sub-rows; the others attend within a frame. Neither ever looks across, so cost grows with Σ n², and since
order is the host's business nothing is permuted here.
"""

import math
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
from lco_jax.models.config import positive, section
from lco_jax.models.layers import (
    Linear,
    Projector,
    RMSNorm,
    apply_rotary,
    leaf,
    normalised,
    rotation_of,
    stacked,
)

ROPE_THETA = 10_000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class VisionConfig:
    """Geometry. full_blocks: the blocks that attend to whole frames. fused: VL keeps q, k and v in one matrix."""

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
        """Read `vision_config`. Raises, by key, for what is missing or not implemented."""
        vision = section(config, "vision_config", where)
        if vision.get("hidden_act", "silu") != "silu":
            raise LcoError(
                f"{where}: vision_config.hidden_act {vision['hidden_act']!r} is not supported (silu is)"
            )
        need = partial(positive, vision, where=f"{where}: vision_config")
        return cls(
            in_channels=vision.get("in_channels") or vision.get("in_chans") or 3,
            full_blocks=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
            fused=fused,
            **{
                key: need(key)
                for key in (
                    "depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "temporal_patch_size",
                    "spatial_merge_size", "window_size", "out_hidden_size",
                )
            },
        )  # fmt: skip


class Attention(nn.Module):
    """Two-way attention within windows or frames, with 2-D rotary positions."""

    config: VisionConfig
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, rotation: Array, frame_ids: Array, window_ids: Array, full: Array
    ) -> Array:
        """x [B, T, D]; window_ids [B, W, T / W]; full: whether to attend to frames -> [B, T, D]."""
        size, heads = self.config.hidden_size, self.config.num_heads
        if self.config.fused:
            qkv = jnp.split(
                Linear(3 * size, use_bias=True, param_dtype=self.param_dtype, name="qkv")(x),
                3,
                axis=-1,
            )
        else:
            qkv = [
                Linear(size, use_bias=True, param_dtype=self.param_dtype, name=name)(x)
                for name in "qkv"
            ]
        q, k, v = (rearrange(y, "b t (k h) -> b t k 1 h", k=heads) for y in qkv)
        q, k = (apply_rotary(y.astype(jnp.float32), rotation).astype(x.dtype) for y in (q, k))

        def in_frames(q: Array, k: Array, v: Array) -> Array:
            return attention(q, k[..., 0, :], v[..., 0, :], frame_ids, causal=False)

        def in_windows(q: Array, k: Array, v: Array) -> Array:
            w = window_ids.shape[1]
            q, k, v = (rearrange(y, "b (w t) k 1 h -> (b w) t k 1 h", w=w) for y in (q, k, v))
            ids = rearrange(window_ids, "b w t -> (b w) t")
            mixed = attention(q, k[..., 0, :], v[..., 0, :], ids, causal=False)
            return rearrange(mixed, "(b w) t k 1 h -> b (w t) k 1 h", w=w)

        mixed = rearrange(
            jax.lax.cond(full, in_frames, in_windows, q, k, v), "b t k 1 h -> b t (k h)"
        )
        return Linear(size, use_bias=True, param_dtype=self.param_dtype, name="proj")(mixed)


class MLP(nn.Module):
    """SwiGLU with biases."""

    config: VisionConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        gate = Linear(self.config.intermediate_size, True, self.param_dtype, name="gate_proj")(x)
        up = Linear(self.config.intermediate_size, True, self.param_dtype, name="up_proj")(x)
        return Linear(self.config.hidden_size, True, self.param_dtype, name="down_proj")(
            nn.silu(gate) * up
        )


class Block(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: VisionConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, full: Array, *where: Array) -> tuple[Array, None]:
        """x [B, T, D]; full: whether this block attends to frames; where: rotation, frame_ids and window_ids.

        Returns [B, T, D], and nothing to collect.
        """
        y = RMSNorm(NORM_EPS, self.param_dtype, name="norm1")(x)
        x += Attention(self.config, self.param_dtype, name="attn")(y, *where, full)
        x += MLP(self.config, self.param_dtype, name="mlp")(
            RMSNorm(NORM_EPS, self.param_dtype, name="norm2")(x)
        )
        return x, None


class PatchEmbed(nn.Module):
    """Patches -> vectors: a convolution whose stride is its kernel, which is a matrix."""

    config: VisionConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, patches: Array, scale: Array, dtype: Any) -> Array:
        """patches uint8 [B, T, V], their values in the order (channel, time, height, width) -> [B, T, D] of `dtype`.

        A still has one picture, which the convolution sees at each time.
        """
        c = self.config
        patches = rearrange(patches, "b t (c p v) -> b t c p v", c=c.in_channels, v=c.patch_size**2)
        x = normalised(patches, scale).astype(dtype)
        x = jnp.repeat(x, c.temporal_patch_size // x.shape[3], axis=3)
        shape = (c.hidden_size, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
        init = nn.initializers.normal(math.prod(shape[1:]) ** -0.5)
        x = rearrange(x, "b t c p v -> b t (c p v)")
        return dot(
            x, leaf(self, "weight", shape, init, self.param_dtype).reshape(c.hidden_size, -1)
        )


class Merger(nn.Module):
    """Four patches of a square -> one of the decoder's tokens."""

    config: VisionConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, T, D], the patches of a square side by side -> [B, M, O]."""
        merge = self.config.spatial_merge_size**2
        x = rearrange(
            RMSNorm(NORM_EPS, self.param_dtype, name="ln_q")(x), "b (m u) d -> b m (u d)", u=merge
        )
        return Projector(x.shape[-1], self.config.out_hidden_size, self.param_dtype, name="mlp")(x)


class QwenVision(nn.Module):
    """Rows of patches -> rows of the decoder's tokens. dtype: of the activations."""

    config: VisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The least input, as shapes."""
        c = self.config
        values, unit = (
            c.in_channels * c.temporal_patch_size * c.patch_size**2,
            c.spatial_merge_size**2,
        )
        ids = jax.ShapeDtypeStruct((1, unit), jnp.int32)
        return {
            "patches": jax.ShapeDtypeStruct((1, unit, values), jnp.uint8),
            "scale": jax.ShapeDtypeStruct((1, c.in_channels, 3), jnp.float32),
            "coordinates": jax.ShapeDtypeStruct((1, unit, 2), jnp.int32),
            "frame_ids": ids,
            "window_ids": jax.ShapeDtypeStruct((1, 1, unit), jnp.int32),
        }

    def row_size(self, arguments: dict[str, Array]) -> int:
        """Patches in a row."""
        return arguments["patches"].shape[1]

    @nn.compact
    def __call__(
        self, patches: Array, scale: Array, coordinates: Array, frame_ids: Array, window_ids: Array
    ) -> Array:
        """Rows in window order -> [B, M, O], M = T / 4.

        patches: uint8 [B, T, V]. scale: float32 [B, C, 3], how the levels of each of C channels are normalised.
        coordinates: int [B, T, 2], row and column of each patch in its frame.
        frame_ids: int [B, T], 0 for padding. window_ids: int [B, W, T / W], 0 for padding.
        """
        c = self.config
        x = PatchEmbed(c, self.param_dtype, name="patch_embed")(patches, scale, self.dtype)
        rotation = rotation_of(_angles(coordinates, c.hidden_size // c.num_heads))
        blocks = stacked(Block, c.depth, (0, nn.broadcast, nn.broadcast, nn.broadcast))
        full = jnp.isin(jnp.arange(c.depth), np.array(c.full_blocks, np.int32))
        x, _ = blocks(c, self.param_dtype, name="blocks")(x, full, rotation, frame_ids, window_ids)
        return Merger(c, self.param_dtype, name="merger")(x)


def _angles(coordinates: Array, head_dim: int) -> Array:
    """Rotation angles [B, T, H / 2]: the first half turns with the row, the second with the column."""
    frequencies = 1.0 / ROPE_THETA ** (
        np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2)
    )
    angles = coordinates[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    return rearrange(angles, "b t a f -> b t (a f)")
