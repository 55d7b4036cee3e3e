"""The text decoder of every backbone: Qwen2.5, Mistral, Llama (upstream: modeling_qwen2_5_vl.py, modeling_llama.py).

Dimensions: B rows, T tokens in a row, S slots, D hidden, V vocabulary, L layers, K key-value heads,
G query heads per key-value head, H head_dim, F MLP width, P shards of the rows, M media tokens of a shard.

Parameter names are the checkpoint's; the layers are stacked along a leading axis L and run by `nn.scan`. There is no
vocabulary head: contrastive learning pools hidden states and never looks at logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.packing import PackedRows
from lco_jax.core.sharding import ROWS, constrain
from lco_jax.models.attention import packed_attention
from lco_jax.models.config import DecoderConfig
from lco_jax.models.layers import Embedding, Linear, RMSNorm, apply_rotary, rotary_angles, stacked

# What a layer keeps for its backward pass, from the least memory to the least recomputation.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": None,
}


class Attention(nn.Module):
    """Grouped-query attention; Qwen2.5's q, k and v have biases."""

    config: DecoderConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, angles: Array, rows: PackedRows) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        c = self.config
        linear = partial(Linear, param_dtype=self.param_dtype)
        q = linear(c.num_heads * c.head_dim, use_bias=c.qkv_bias, name="q_proj")(x, rows.token_keys)
        k = linear(c.num_kv_heads * c.head_dim, use_bias=c.qkv_bias, name="k_proj")(x, rows.token_keys)
        v = linear(c.num_kv_heads * c.head_dim, use_bias=c.qkv_bias, name="v_proj")(x, rows.token_keys)
        q = apply_rotary(rearrange(q, "b t (k g h) -> b t k g h", k=c.num_kv_heads, h=c.head_dim), angles)
        k = apply_rotary(rearrange(k, "b t (k h) -> b t k h", h=c.head_dim), angles)
        v = rearrange(v, "b t (k h) -> b t k h", h=c.head_dim)
        mixed = rearrange(packed_attention(q, k, v, rows.segment_ids), "b t k g h -> b t (k g h)")
        return linear(c.hidden_size, name="o_proj")(mixed, rows.token_keys)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    config: DecoderConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, token_keys: Array) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        linear = partial(Linear, param_dtype=self.param_dtype)
        gate = linear(self.config.intermediate_size, name="gate_proj")(x, token_keys)
        up = linear(self.config.intermediate_size, name="up_proj")(x, token_keys)
        return linear(self.config.hidden_size, name="down_proj")(nn.silu(gate) * up, token_keys)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: DecoderConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, angles: Array, rows: PackedRows) -> tuple[Array, None]:
        """x [B, T, D] -> ([B, T, D], nothing to collect)."""
        norm = partial(RMSNorm, self.config.rms_norm_eps, self.param_dtype)
        attention = Attention(self.config, self.param_dtype, name="self_attn")
        x = constrain(x + attention(norm(name="input_layernorm")(x), angles, rows), ROWS)
        mlp = MLP(self.config, self.param_dtype, name="mlp")
        x = constrain(x + mlp(norm(name="post_attention_layernorm")(x), rows.token_keys), ROWS)
        return x, None


class Decoder(nn.Module):
    """Token ids -> hidden states after the final norm.

    dtype: of the activations. param_dtype: of newly initialised parameters. remat: a key of `REMAT_POLICIES`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "full"

    @nn.compact
    def __call__(self, rows: PackedRows, media: Array | None = None) -> Array:
        """rows of [B, T], and the media tokens [P, M, D] that their `media_slots` point to -> [B, T, D] in `dtype`."""
        c = self.config
        x = Embedding(c.vocab_size, c.hidden_size, self.dtype, self.param_dtype, name="embed_tokens")(rows.input_ids)
        if media is not None:
            x = place_media(x, rows.media_slots, media)
        angles = rotary_angles(rows.position_ids, c.head_dim, c.rope_theta, c.mrope_section)
        layer = DecoderLayer
        if self.remat != "none":
            layer = nn.remat(DecoderLayer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        x, _ = stacked(layer, c.num_layers)(c, self.param_dtype, name="layers")(x, angles, rows)
        return RMSNorm(c.rms_norm_eps, self.param_dtype, name="norm")(x)


def place_media(x: Array, media_slots: Array, media: Array) -> Array:
    """x [B, T, D] with media tokens in the place of those embeddings whose slot is not -1.

    media_slots: int [B, T]; media: [P, M, D]. The rows of shard p, which lie side by side, look into media[p] only, so
    no device needs another's media.
    """
    slots = rearrange(media_slots, "(p b) t -> p (b t)", p=media.shape[0])
    tokens = jnp.take_along_axis(media, jnp.maximum(slots, 0)[..., None], axis=1).reshape(x.shape)
    return constrain(jnp.where((media_slots >= 0)[..., None], tokens.astype(x.dtype), x), ROWS)


def pool_rows(decoder: Decoder, params: dict[str, Any], rows: PackedRows, media: Array | None = None) -> Array:
    """The hidden state at each segment's last token, after the final norm: float32 [B, S, D].

    media: as `Decoder` takes it. Empty slots hold the state of their row's first token; whoever reads the result knows
    which slots are filled.
    """
    hidden = decoder.apply({"params": params}, rows, media)
    return jnp.take_along_axis(hidden, rows.last_tokens[..., None], axis=1).astype(jnp.float32)


def embed_rows(decoder: Decoder, params: dict[str, Any], rows: PackedRows, media: Array | None = None) -> Array:
    """`pool_rows`, L2-normalised: the embeddings."""
    pooled = pool_rows(decoder, params, rows, media)
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
