"""The audio tower of Qwen2.5-Omni (upstream: modeling_qwen2_5_omni.py).

Dimensions: B chunks, N mel frames in a chunk (2 · n_window), T tokens in a chunk before pooling (n_window), C mel
channels, D hidden, K heads, H head_dim, F MLP width, M = T / 2 tokens of the decoder, O its hidden size.

A clip is cut into chunks which never see each other, so every chunk is a row of its own, and an hour of clips costs an
hour.
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
from lco_jax.models.config import positive, section
from lco_jax.models.layers import LayerNorm, Linear, leaf, stacked

NORM_EPS = 1e-5


@dataclass(frozen=True)
class AudioConfig:
    """Geometry of the tower. n_window: half the mel frames of a chunk."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_mel_bins: int
    n_window: int
    out_hidden_size: int

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> "AudioConfig":
        """Read `audio_config`. Raises, by key, for what is missing or not implemented."""
        audio = section(config, "audio_config", where)
        if audio.get("activation_function", "gelu") != "gelu" or audio.get("scale_embedding"):
            raise LcoError(
                f"{where}: audio_config has an activation or scale_embedding that is not supported"
            )
        need = partial(positive, audio, where=f"{where}: audio_config")
        if need("n_window") % 2:  # pairs of pooled tokens would reach across chunks
            raise LcoError(
                f"{where}: audio_config.n_window is {audio['n_window']}; only even windows are supported"
            )
        return cls(
            num_layers=need("encoder_layers"),
            hidden_size=need("d_model"),
            intermediate_size=need("encoder_ffn_dim"),
            num_heads=need("encoder_attention_heads"),
            num_mel_bins=need("num_mel_bins"),
            n_window=need("n_window"),
            out_hidden_size=need("output_dim"),
        )


class Convolution(nn.Module):
    """A convolution over time, kernel 3 and padding 1."""

    features: int
    stride: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, N, C] -> [B, N / stride, D]."""
        shape = (self.features, x.shape[-1], 3)  # [D, C, 3], as the checkpoints have it
        weight = leaf(
            self,
            "weight",
            shape,
            nn.initializers.normal((3 * x.shape[-1]) ** -0.5),
            self.param_dtype,
        )
        bias = leaf(self, "bias", shape[:1], nn.initializers.zeros, self.param_dtype)
        y = jax.lax.conv_general_dilated(
            x,
            weight.astype(x.dtype),
            window_strides=(self.stride,),
            padding=((1, 1),),
            dimension_numbers=("NWC", "OIW", "NWC"),
            precision=matmul_precision(x),
        )
        return y + bias.astype(x.dtype)


class Layer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: AudioConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, valid: Array) -> tuple[Array, None]:
        """x [B, T, D] -> ([B, T, D], nothing to collect)."""
        norm = partial(LayerNorm, NORM_EPS, self.param_dtype)
        attention = TowerAttention(
            self.config.num_heads, key_bias=False, param_dtype=self.param_dtype, name="self_attn"
        )
        x += attention(norm(name="self_attn_layer_norm")(x), valid)
        y = Linear(self.config.intermediate_size, True, self.param_dtype, name="fc1")(
            norm(name="final_layer_norm")(x)
        )
        x += Linear(self.config.hidden_size, True, self.param_dtype, name="fc2")(
            nn.gelu(y, approximate=False)
        )
        return x, None


class QwenAudio(nn.Module):
    """Chunks of a mel spectrogram -> the decoder's tokens. dtype: of the activations."""

    config: AudioConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The least input, as shapes."""
        mel = jax.ShapeDtypeStruct(
            (1, 2 * self.config.n_window, self.config.num_mel_bins), jnp.float32
        )
        return {"mel": mel, "frames": jax.ShapeDtypeStruct((1,), jnp.int32)}

    def row_size(self, arguments: dict[str, Array]) -> int:
        """Mel frames in a row."""
        return arguments["mel"].shape[1]

    @nn.compact
    def __call__(self, mel: Array, frames: Array) -> Array:
        """mel: [B, N, C]; frames: int [B], how many of N there are -> [B, M, O], those of whole pairs meaningful."""
        c = self.config
        convolution = partial(Convolution, c.hidden_size, param_dtype=self.param_dtype)
        x = nn.gelu(convolution(stride=1, name="conv1")(mel.astype(self.dtype)), approximate=False)
        x *= (jnp.arange(x.shape[1]) < frames[:, None])[
            ..., None
        ]  # the next layer pads with zeros, not with a bias
        x = nn.gelu(convolution(stride=2, name="conv2")(x), approximate=False)
        x += _sinusoids(x.shape[1], c.hidden_size).astype(x.dtype)
        valid = (jnp.arange(x.shape[1]) < ((frames + 1) // 2)[:, None]).astype(jnp.int32)
        x, _ = stacked(Layer, c.num_layers)(c, self.param_dtype, name="layers")(x, valid)
        x = rearrange(x, "b (m pair) d -> b m pair d", pair=2).mean(axis=2)
        x = LayerNorm(NORM_EPS, self.param_dtype, name="ln_post")(x)
        return Linear(c.out_hidden_size, True, self.param_dtype, name="proj")(x)


def _sinusoids(length: int, channels: int) -> np.ndarray:
    """[T, D]: sines, then cosines, of wavelengths up to 10,000 · 2π."""
    step = np.log(10_000.0) / (channels // 2 - 1)
    rates = np.exp((-step * np.arange(channels // 2)).astype(np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
