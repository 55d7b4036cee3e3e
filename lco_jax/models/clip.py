"""LLaVA-NeXT's vision side: a CLIP tower, the projector, and the newline token (upstream: modeling_llava_next.py).

Dimensions: B tiles, X height and width of a tile, T patches of a tile, D hidden, K heads, H head_dim, F MLP width, O
the decoder's hidden size.

Tiles never see each other. How an image is cut into tiles, and which of their tokens reach the decoder in which order,
is the processor's business (`data/llava.py`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.core.weights import dot
from lco_jax.models.attention import TowerAttention
from lco_jax.models.config import positive, section
from lco_jax.models.layers import LayerNorm, Linear, Projector, leaf, normalised, stacked


@dataclass(frozen=True)
class ClipConfig:
    """Geometry. num_layers: how many of depth are run, up to the one whose hidden states are the features."""

    depth: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    out_hidden_size: int

    @property
    def unused_layers(self) -> range:
        """Those after the features', which a checkpoint has all the same."""
        return range(self.num_layers, self.depth)

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str, out_hidden_size: int) -> "ClipConfig":
        """Read `vision_config` and the choice of features. Raises, by key, for what is missing or not implemented."""
        vision = section(config, "vision_config", where)
        expected = {
            "hidden_act of vision_config": (vision["hidden_act"], "quick_gelu"),
            "projector_hidden_act": (config.get("projector_hidden_act", "gelu"), "gelu"),
            "vision_feature_select_strategy": (
                config.get("vision_feature_select_strategy", "default"),
                "default",
            ),
            "use_image_newline_parameter": (config.get("use_image_newline_parameter", True), True),
            "multimodal_projector_bias": (config.get("multimodal_projector_bias", True), True),
        }
        for key, (value, supported) in expected.items():
            if value != supported:
                raise LcoError(f"{where}: {key} is {value!r:.60}; only {supported!r} is supported")

        need = partial(positive, vision, where=f"{where}: vision_config")
        depth, feature = need("num_hidden_layers"), config.get("vision_feature_layer", -2)
        if not isinstance(feature, int) or not -depth - 1 <= feature <= depth:
            raise LcoError(
                f"{where}: vision_feature_layer is {feature!r:.60}, and must be one of the {depth} layers"
            )
        return cls(
            depth=depth,
            num_layers=feature if feature >= 0 else depth + 1 + feature,
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_heads=need("num_attention_heads"),
            num_channels=need("num_channels"),
            image_size=need("image_size"),
            patch_size=need("patch_size"),
            layer_norm_eps=vision["layer_norm_eps"],
            out_hidden_size=out_hidden_size,
        )


class MLP(nn.Module):
    """Two layers with quick GELU, x · sigmoid(1.702 x), between them."""

    config: ClipConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, 1 + T, D] -> [B, 1 + T, D]."""
        x = Linear(self.config.intermediate_size, True, self.param_dtype, name="fc1")(x)
        return Linear(self.config.hidden_size, True, self.param_dtype, name="fc2")(
            x * nn.sigmoid(1.702 * x)
        )


class Layer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: ClipConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        """x [B, 1 + T, D] -> ([B, 1 + T, D], nothing to collect)."""
        norm = partial(LayerNorm, self.config.layer_norm_eps, self.param_dtype)
        everyone = jnp.ones(x.shape[:2], jnp.int32)
        attention = TowerAttention(
            self.config.num_heads, param_dtype=self.param_dtype, name="self_attn"
        )
        x += attention(norm(name="layer_norm1")(x), everyone)
        x += MLP(self.config, self.param_dtype, name="mlp")(norm(name="layer_norm2")(x))
        return x, None


class Embeddings(nn.Module):
    """Pixels -> patch vectors with their learned positions, a class vector before them."""

    config: ClipConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """pixels [B, channels, X, X] -> [B, 1 + T, D]."""
        c = self.config
        patches = rearrange(
            pixels, "b c (n p) (m q) -> b (n m) (c p q)", p=c.patch_size, q=c.patch_size
        )
        shape = (c.hidden_size, c.num_channels, c.patch_size, c.patch_size)
        init = nn.initializers.normal(patches.shape[-1] ** -0.5)
        weight = leaf(self, "patch_embedding", shape, init, self.param_dtype)
        x = dot(patches, weight.reshape(c.hidden_size, -1))
        first = leaf(
            self, "class_embedding", (c.hidden_size,), nn.initializers.normal(1.0), self.param_dtype
        )
        first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, c.hidden_size))
        positions = leaf(
            self,
            "position_embedding",
            (1 + x.shape[1], c.hidden_size),
            nn.initializers.normal(1.0),
            self.param_dtype,
        )
        return jnp.concatenate([first, x], axis=1) + positions.astype(x.dtype)


class LlavaVision(nn.Module):
    """Tiles -> the decoder's tokens. dtype: of the activations."""

    config: ClipConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The least input, as shapes."""
        c = self.config
        return {
            "pixels": jax.ShapeDtypeStruct(
                (1, c.num_channels, c.image_size, c.image_size), jnp.uint8
            ),
            "scale": jax.ShapeDtypeStruct((1, c.num_channels, 3), jnp.float32),
        }

    def row_size(self, arguments: dict[str, Array]) -> int:
        """Patches of a tile."""
        return (self.config.image_size // self.config.patch_size) ** 2

    @nn.compact
    def __call__(self, pixels: Array, scale: Array) -> Array:
        """pixels uint8 [B, channels, X, X] -> [B, T + 1, O]: a token a patch, and after them the newline token.

        scale: float32 [B, channels, 3], how the levels of each channel are normalised.
        """
        c = self.config
        x = normalised(pixels[:, None], scale)[:, 0].astype(self.dtype)
        x = Embeddings(c, self.param_dtype, name="embeddings")(x)
        x = LayerNorm(c.layer_norm_eps, self.param_dtype, name="pre_layrnorm")(x)
        x, _ = stacked(Layer, c.num_layers)(c, self.param_dtype, name="layers")(x, None)
        x = Projector(c.out_hidden_size, c.out_hidden_size, self.param_dtype, name="projector")(
            x[:, 1:]
        )
        newline = leaf(
            self,
            "image_newline",
            (c.out_hidden_size,),
            nn.initializers.normal(1.0),
            self.param_dtype,
        )
        newline = jnp.broadcast_to(newline.astype(x.dtype), (x.shape[0], 1, c.out_hidden_size))
        return jnp.concatenate([x, newline], axis=1)
