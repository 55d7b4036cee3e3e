"""LLaVA-NeXT's vision side: a CLIP tower, the projector, and the newline token.

Upstream: modeling_llava_next.py.

Dimensions: B tiles, C channels, X height and width of a tile, T patches of a tile, D hidden, K
heads, H head_dim, F MLP width, O the decoder's hidden size.

Tiles never see each other. The processor (`data/llava.py`) cuts an image into tiles, and chooses
which of their tokens reach the decoder in which order.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.core.weights import dot
from lco_jax.models.attention import TowerAttention
from lco_jax.models.config import MOST_LAYERS, check_multiple, positive, section
from lco_jax.models.layers import LayerNorm, Linear, Projector, leaf, normalised, stacked


@dataclass(frozen=True)
class ClipConfig:
    """The sizes of the tower.

    depth: the layers of the checkpoint. num_layers: those that run, up to the one whose hidden
    states are the features.
    """

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
        """Read `vision_config` and the choice of features.

        Raises, by key, for what is missing or not supported.
        """
        vision = section(config, "vision_config", where)
        _check_supported(config, vision, where)
        need = partial(positive, vision, where=f"{where}: vision_config")
        depth = need("num_hidden_layers", most=MOST_LAYERS)
        heads, width = need("num_attention_heads"), need("hidden_size")
        check_multiple(("vision_config.hidden_size", width), ("num_attention_heads", heads), where)
        patch = need("patch_size")
        size = ("vision_config.image_size", need("image_size"))
        check_multiple(size, ("patch_size", patch), where)
        epsilon = vision["layer_norm_eps"]
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise LcoError(
                f"{where}: vision_config.layer_norm_eps is {epsilon!r:.60}, and must lie in (0, 1)"
            )
        return cls(
            depth=depth,
            num_layers=_feature_layer(config, depth, where),
            hidden_size=width,
            intermediate_size=need("intermediate_size"),
            num_heads=heads,
            num_channels=need("num_channels"),
            image_size=need("image_size"),
            patch_size=patch,
            layer_norm_eps=epsilon,
            out_hidden_size=out_hidden_size,
        )


def _check_supported(config: dict[str, Any], vision: dict[str, Any], where: str) -> None:
    """Raise for a setting that the tower does not have."""

    def check(key: str, value: Any, supported: Any) -> None:
        if value != supported:
            raise LcoError(f"{where}: {key} is {value!r:.60}; only {supported!r} is supported")

    check("hidden_act of vision_config", vision["hidden_act"], "quick_gelu")
    for key, supported in {
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "use_image_newline_parameter": True,
        "multimodal_projector_bias": True,
    }.items():
        check(key, config.get(key, supported), supported)


def _feature_layer(config: dict[str, Any], depth: int, where: str) -> int:
    """After how many layers the features are read."""
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise LcoError(
            f"{where}: vision_feature_layer is {layer!r:.60}, and must be one of the {depth} layers"
        )
    return layer if layer >= 0 else depth + 1 + layer


class ClipMLP(nn.Module):
    """Two layers with quick GELU, x · sigmoid(1.702 x), between them."""

    config: ClipConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, 1 + T, D] -> [B, 1 + T, D]."""
        c = self.config
        x = Linear(c.intermediate_size, use_bias=True, name="fc1")(x)
        x *= nn.sigmoid(1.702 * x)
        return Linear(c.hidden_size, use_bias=True, name="fc2")(x)


class ClipLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: ClipConfig

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        """x [B, 1 + T, D] -> ([B, 1 + T, D], nothing to collect)."""
        c = self.config
        one_segment = jnp.ones(x.shape[:2], jnp.int32)
        y = LayerNorm(c.layer_norm_eps, name="layer_norm1")(x)
        x += TowerAttention(c.num_heads, name="self_attn")(y, one_segment)
        y = LayerNorm(c.layer_norm_eps, name="layer_norm2")(x)
        x += ClipMLP(c, name="mlp")(y)
        return x, None


class ClipEmbeddings(nn.Module):
    """Pixels -> patch vectors with their learned positions, a class vector before them."""

    config: ClipConfig

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """pixels [B, C, X, X] -> [B, 1 + T, D]."""
        c = self.config
        normal = nn.initializers.normal
        size = c.patch_size
        patches = rearrange(pixels, "b c (n p) (m q) -> b (n m) (c p q)", p=size, q=size)
        shape = (c.hidden_size, c.num_channels, size, size)
        weight = leaf(self, "patch_embedding", shape, normal(patches.shape[-1] ** -0.5))
        weight = rearrange(weight, "d c p q -> d (c p q)")
        x = dot(patches, weight)

        of_class = leaf(self, "class_embedding", (c.hidden_size,), normal(1.0))
        of_class = repeat(of_class.astype(x.dtype), "d -> b 1 d", b=len(x))
        shape = (1 + x.shape[1], c.hidden_size)
        positions = leaf(self, "position_embedding", shape, normal(1.0))
        x = jnp.concatenate([of_class, x], axis=1)
        return x + positions.astype(x.dtype)


class LlavaVision(nn.Module):
    """Tiles -> the decoder's tokens. dtype: of the activations."""

    config: ClipConfig
    dtype: Any = jnp.float32

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The smallest input, as shapes."""
        c = self.config
        tile = (1, c.num_channels, c.image_size, c.image_size)
        return {
            "pixels": jax.ShapeDtypeStruct(tile, jnp.uint8),
            "scale": jax.ShapeDtypeStruct((1, c.num_channels, 3), jnp.float32),
        }

    def row_size(self, arguments: dict[str, Array]) -> int:
        """Patches of a tile."""
        return (self.config.image_size // self.config.patch_size) ** 2

    @nn.compact
    def __call__(self, pixels: Array, scale: Array) -> Array:
        """pixels uint8 [B, C, X, X] -> [B, T + 1, O]: a token a patch, then the newline token.

        scale: float32 [B, C, 3], how the levels of each channel are normalised.
        """
        c = self.config
        size = c.out_hidden_size
        # `normalised` takes the frames of clips: a tile is a clip of one frame
        x = normalised(pixels[:, None], scale)[:, 0]
        x = ClipEmbeddings(c, name="embeddings")(x.astype(self.dtype))
        x = LayerNorm(c.layer_norm_eps, name="pre_layrnorm")(x)
        layers = stacked(ClipLayer, c.num_layers)(c, name="layers")
        x, _ = layers(x, None)
        of_patches = x[:, 1:]
        x = Projector(size, size, name="projector")(of_patches)

        newline = leaf(self, "image_newline", (size,), nn.initializers.normal(1.0))
        newline = repeat(newline.astype(x.dtype), "d -> b 1 d", b=len(x))
        return jnp.concatenate([x, newline], axis=1)
