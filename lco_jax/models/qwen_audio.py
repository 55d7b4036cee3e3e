"""The audio tower of Qwen2.5-Omni (upstream: modeling_qwen2_5_omni.py).

Dimensions: B chunks, N mel frames of a chunk (2 · n_window), T tokens of a chunk before pooling
(n_window), C mel channels, D hidden, K heads, H head_dim, F MLP width, M = T / 2 tokens of the
decoder, O its hidden size.

A clip is cut into chunks that never see each other. So every chunk is a row, and the cost is linear
in the length of the clips.
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
from lco_jax.core.weights import matmul_precision
from lco_jax.models.attention import TowerAttention
from lco_jax.models.config import MOST_LAYERS, check_multiple, positive, section
from lco_jax.models.layers import LayerNorm, Linear, leaf, stacked

NORM_EPS = 1e-5


@dataclass(frozen=True)
class AudioConfig:
    """The sizes of the tower. n_window: half the mel frames of a chunk."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_mel_bins: int
    n_window: int
    out_hidden_size: int

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> "AudioConfig":
        """Read `audio_config`. Raises, by key, for what is missing or not supported."""
        audio = section(config, "audio_config", where)
        if audio.get("activation_function", "gelu") != "gelu" or audio.get("scale_embedding"):
            raise LcoError(
                f"{where}: audio_config has an activation or scale_embedding that is not supported"
            )
        need = partial(positive, audio, where=f"{where}: audio_config")
        n_window = need("n_window")
        if n_window % 2:  # pairs of pooled tokens would reach across chunks
            raise LcoError(
                f"{where}: audio_config.n_window is {n_window}; only even windows are supported"
            )
        heads, width = need("encoder_attention_heads"), need("d_model")
        check_multiple(("audio_config.d_model", width), ("encoder_attention_heads", heads), where)
        if width % 2 or width < 4:  # half of it are sines, half cosines
            raise LcoError(f"{where}: audio_config.d_model is {width}, and must be even, 4 or more")
        return cls(
            num_layers=need("encoder_layers", most=MOST_LAYERS),
            hidden_size=width,
            intermediate_size=need("encoder_ffn_dim"),
            num_heads=heads,
            num_mel_bins=need("num_mel_bins"),
            n_window=n_window,
            out_hidden_size=need("output_dim"),
        )


class AudioConvolution(nn.Module):
    """A convolution over time, kernel 3 and padding 1."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, N, C] -> [B, N / stride, D]."""
        channels = x.shape[-1]
        init = nn.initializers.normal((3 * channels) ** -0.5)
        weight = leaf(self, "weight", (self.features, channels, 3), init)
        bias = leaf(self, "bias", (self.features,), nn.initializers.zeros)
        y = jax.lax.conv_general_dilated(
            x,
            weight.astype(x.dtype),
            window_strides=(self.stride,),
            padding=((1, 1),),
            dimension_numbers=("NWC", "OIW", "NWC"),
            precision=matmul_precision(x),
        )
        return y + bias.astype(x.dtype)


class AudioLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: AudioConfig

    @nn.compact
    def __call__(self, x: Array, valid: Array) -> tuple[Array, None]:
        """x [B, T, D] -> ([B, T, D], nothing to collect)."""
        c = self.config
        y = LayerNorm(NORM_EPS, name="self_attn_layer_norm")(x)
        x += TowerAttention(c.num_heads, key_bias=False, name="self_attn")(y, valid)
        y = LayerNorm(NORM_EPS, name="final_layer_norm")(x)
        y = Linear(c.intermediate_size, use_bias=True, name="fc1")(y)
        y = nn.gelu(y, approximate=False)
        x += Linear(c.hidden_size, use_bias=True, name="fc2")(y)
        return x, None


class QwenAudio(nn.Module):
    """Chunks of a mel spectrogram -> the decoder's tokens. dtype: of the activations."""

    config: AudioConfig
    dtype: Any = jnp.float32

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The smallest input, as shapes."""
        chunk = (1, 2 * self.config.n_window, self.config.num_mel_bins)
        return {
            "mel": jax.ShapeDtypeStruct(chunk, jnp.float32),
            "frames": jax.ShapeDtypeStruct((1,), jnp.int32),
        }

    def row_size(self, arguments: dict[str, Array]) -> int:
        """Mel frames of a chunk."""
        return arguments["mel"].shape[1]

    @nn.compact
    def __call__(self, mel: Array, frames: Array) -> Array:
        """mel [B, N, C] -> [B, M, O].

        frames: int [B], how many of the N there are. Tokens of less than a pair mean nothing.
        """
        c = self.config
        x = AudioConvolution(c.hidden_size, stride=1, name="conv1")(mel.astype(self.dtype))
        x = nn.gelu(x, approximate=False)
        is_frame = _is_before(frames, x.shape[1])
        x *= is_frame[..., None]  # the next convolution pads with zeros, not with biases
        x = AudioConvolution(c.hidden_size, stride=2, name="conv2")(x)
        x = nn.gelu(x, approximate=False)
        positions = _sinusoids(x.shape[1], c.hidden_size)
        x += positions.astype(x.dtype)

        layers = stacked(AudioLayer, c.num_layers)
        tokens = (frames + 1) // 2
        valid = _is_before(tokens, x.shape[1]).astype(jnp.int32)
        x, _ = layers(c, name="layers")(x, valid)
        x = rearrange(x, "b (m pair) d -> b m pair d", pair=2)
        x = x.mean(axis=2)
        x = LayerNorm(NORM_EPS, name="ln_post")(x)
        return Linear(c.out_hidden_size, use_bias=True, name="proj")(x)


def _is_before(counts: Array, length: int) -> Array:
    """Which of `length` positions are before each row's count: bool [B, length]."""
    return jnp.arange(length) < counts[:, None]


def _sinusoids(length: int, channels: int) -> np.ndarray:
    """[T, D]: sines, then cosines, of wavelengths up to 10,000 · 2π."""
    half = channels // 2
    step = np.log(10_000.0) / (half - 1)
    rates = np.exp((-step * np.arange(half)).astype(np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
