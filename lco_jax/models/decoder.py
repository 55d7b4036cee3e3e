"""The text decoder of every backbone: Qwen2.5, Mistral, Llama.

Upstream: modeling_qwen2_5_vl.py, modeling_mistral.py, modeling_llama.py.

Dimensions: R streams, T tokens of a stream, S sequences of a stream, N rows and W width of a group
of attention rows, D hidden, V vocabulary, L layers, K key-value heads, G query heads per key-value
head, H head_dim, F MLP width, P shards of the streams, M media tokens of a shard.

Parameter names are the checkpoint's. The layers are stacked along a leading axis L, and a scan runs
them. The vocabulary head is in `models/head.py`: contrastive learning pools hidden states, and it
needs no logits. It needs the last layer's state of each sequence's last token alone. So queries,
output projection and MLP of that layer are computed for those tokens, unless the caller asks for
the states of all.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lco_jax.core.lora import join_frozen, split_frozen
from lco_jax.core.packing import PackedTokens
from lco_jax.core.sharding import ROWS, constrain
from lco_jax.core.weights import Split, fold_in
from lco_jax.models.attention import attend_last, attend_rows
from lco_jax.models.cache import Cache
from lco_jax.models.config import DecoderConfig
from lco_jax.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    apply_rotary,
    linears,
    rotary_angles,
    rotation_of,
    stacked,
)
from lco_jax.models.streams import from_rows, take, to_rows

# What a layer stores for its backward pass, from the least memory to the least recomputation. The
# names are those of `checkpoint_name`; None stores all.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "attention": ("qkv", "mixed"),
    "gate": ("qkv", "mixed", "gate"),
    "mlp": ("qkv", "mixed", "gate", "up"),
    "none": None,
}

# Matrices by the features that the mesh splits
COLUMN = Split(outputs="tensor")
ROW = Split(inputs="tensor")

# A number for each input of a layer that adapters drop elements of
_DROPOUT = {"qkv": 0, "o_proj": 1, "gate_up": 2, "down_proj": 3}

Past = tuple[Array | int, Cache]  # (a layer's number, the keys and values of earlier tokens)
Rows = list[Array]  # of each width: [R, N, K, W, …]
# What attention keeps: keys and values of the rows, or the cache with those of one token more
Stored = tuple[Rows, Rows] | Cache


def _at(x: Array, outputs: Array | None) -> Array:
    """x [R, T, …] at the tokens whose states a layer computes, int [R, S]; None: all."""
    return x if outputs is None else take(x, outputs)


class DecoderAttention(nn.Module):
    """Grouped-query attention; Qwen2.5's q, k and v have biases."""

    config: DecoderConfig
    implementation: str

    @nn.compact
    def __call__(
        self,
        x: Array,
        rotation: Array,
        tokens: PackedTokens,
        outputs: Array | None,
        past: Past | None,
    ) -> tuple[Array, Stored]:
        """x [R, T, D] -> [R, T, D], and its keys and values.

        outputs: None, or each sequence's last token, int [R, S]; then the result is [R, S, D].
        past: None where the tokens are complete sequences. Otherwise each token continues a
        sequence, whose earlier keys and values are in the cache.
        """
        c = self.config
        q, k, v = self._project(x, tokens, outputs)
        q = apply_rotary(q, _at(rotation, outputs))
        k = apply_rotary(k, rotation)
        q, k, v = (checkpoint_name(y, "qkv") for y in (q, k, v))

        if past is None:
            stored = to_rows(k, tokens), to_rows(v, tokens)
            attend = self._attend_all if outputs is None else self._attend_last
            mixed = checkpoint_name(attend(q, *stored, tokens), "mixed")
        else:
            layer, cache = past
            stored = cache.write(layer, k, v)
            mixed = stored.attend(layer, q)

        mixed = rearrange(mixed, "r t k g h -> r t (k g h)")
        keys = fold_in(_at(tokens.token_keys, outputs), _DROPOUT["o_proj"])
        return Linear(c.hidden_size, split=ROW, name="o_proj")(mixed, keys), stored

    def _project(self, x: Array, tokens: PackedTokens, outputs: Array | None) -> list[Array]:
        """Queries [R, T or S, K, G, H], keys and values [R, T, K, H]."""
        c = self.config
        linear = partial(Linear, use_bias=c.qkv_bias, split=COLUMN)
        kv_size = c.num_kv_heads * c.head_dim
        to_q = linear(c.num_heads * c.head_dim, name="q_proj")
        to_k = linear(kv_size, name="k_proj")
        to_v = linear(kv_size, name="v_proj")

        keys = fold_in(tokens.token_keys, _DROPOUT["qkv"])
        if outputs is None:
            q, k, v = linears(x, [to_q, to_k, to_v], keys)
        else:
            q = to_q(take(x, outputs), take(keys, outputs))
            k, v = linears(x, [to_k, to_v], keys)
        q = rearrange(q, "r t (k g h) -> r t k g h", k=c.num_kv_heads, h=c.head_dim)
        k = rearrange(k, "r t (k h) -> r t k h", h=c.head_dim)
        v = rearrange(v, "r t (k h) -> r t k h", h=c.head_dim)
        return [q, k, v]

    def _attend_all(self, q: Array, k: Rows, v: Rows, tokens: PackedTokens) -> Array:
        """Every token: [R, T, K, G, H]."""
        groups = zip(to_rows(q, tokens), k, v, strict=True)
        mixed = [attend_rows(*group, self.implementation) for group in groups]
        return from_rows(mixed, tokens)

    def _attend_last(self, q: Array, k: Rows, v: Rows, tokens: PackedTokens) -> Array:
        """Every sequence's last token: [R, S, K, G, H]."""
        mixed = []
        first = 0
        for group, keys, values in zip(tokens.rows, k, v, strict=True):
            streams, count, _ = group.shape
            queries = q[:, first : first + count]
            inputs = queries, keys, values, group >= 0
            by_row = [rearrange(y, "r n ... -> (r n) ...") for y in inputs]
            of_group = attend_last(*by_row)
            mixed.append(rearrange(of_group, "(r n) ... -> r n ...", r=streams))
            first += count
        return jnp.concatenate(mixed, axis=1)


class DecoderMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, token_keys: Array) -> Array:
        """x [R, T, D] -> [R, T, D]."""
        c = self.config
        gate = Linear(c.intermediate_size, split=COLUMN, name="gate_proj")
        up = Linear(c.intermediate_size, split=COLUMN, name="up_proj")
        down = Linear(c.hidden_size, split=ROW, name="down_proj")

        keys = fold_in(token_keys, _DROPOUT["gate_up"])
        g, u = linears(x, [gate, up], keys)
        g = checkpoint_name(g, "gate")
        u = checkpoint_name(u, "up")
        keys = fold_in(token_keys, _DROPOUT["down_proj"])
        return down(nn.silu(g) * u, keys)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: DecoderConfig
    implementation: str

    @nn.compact
    def __call__(
        self,
        x: Array,
        rotation: Array,
        tokens: PackedTokens,
        outputs: Array | None = None,
        past: Past | None = None,
    ) -> tuple[Array, Stored]:
        """x [R, T, D] -> [R, T or S, D], and what its attention keeps.

        outputs, past: as of `DecoderAttention`.
        """
        c = self.config
        norm = partial(RMSNorm, c.rms_norm_eps)
        attention = DecoderAttention(c, self.implementation, name="self_attn")
        mlp = DecoderMLP(c, name="mlp")

        normed = norm(name="input_layernorm")(x)
        mixed, stored = attention(normed, rotation, tokens, outputs, past)
        x = constrain(_at(x, outputs) + mixed, ROWS)
        normed = norm(name="post_attention_layernorm")(x)
        x = constrain(x + mlp(normed, _at(tokens.token_keys, outputs)), ROWS)
        return x, stored


class Decoder(nn.Module):
    """Token ids -> hidden states after the final norm.

    dtype: of the activations. remat: a key of `REMAT_POLICIES`. attention: as
    `attention.attention` takes it. tuned: whether gradients are taken of the decoder's parameters,
    and not of adapters alone. pooling: which states `models/pooling.py` makes an embedding of.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "full"
    attention: str = "auto"
    tuned: bool = False
    pooling: str = "last"

    @nn.compact
    def __call__(
        self,
        tokens: PackedTokens,
        media: Array | None = None,
        of: str = "last",
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """Tokens of [R, T] -> states in `dtype`.

        media: the media tokens [P, M, D] that the tokens' `media_slots` point to.
        of: "last", each sequence's last token: [R, S, D].
        "layers", the same before the first layer and after each one: [R, S, L + 1, D].
        "tokens", every token: [R, T, D].
        "cache", as "last", and a `Cache` of all tokens, whose rows have one width.
        cache: that of each sequence's tokens so far, with room for one more. `tokens` are then that
        one, [R, S], and the result is as of "cache".
        """
        c = self.config
        embedding = Embedding(c.vocab_size, c.hidden_size, self.dtype, name="embed_tokens")
        x = embedding(tokens.input_ids)
        if media is not None:
            x = _insert_media(x, tokens.media_slots, media)
        angles = rotary_angles(tokens.position_ids, c.head_dim, c.rope_theta, c.mrope_section)
        rotation = rotation_of(angles)
        rotation = rotation.astype(x.dtype)

        collected = None
        if self.is_initializing():
            layers = stacked(DecoderLayer, c.num_layers)
            x, _ = layers(c, self.attention, name="layers")(x, rotation, tokens)
        else:
            x, collected = self._layers(x, rotation, tokens, of, cache)

        x = RMSNorm(c.rms_norm_eps, name="norm")(x)
        if of == "layers":
            return jnp.stack([*collected, x], axis=2)
        return x if collected is None else (x, collected)

    def _layers(
        self,
        x: Array,
        rotation: Array,
        tokens: PackedTokens,
        of: str,
        cache: Cache | None,
    ) -> tuple[Array, Any]:
        """All layers: the states, and the states before each layer, the cache or None, by `of`."""
        run, trainable = self._layer_function(rotation, tokens, of)
        depth = self.config.num_layers
        outputs = None if of == "tokens" or cache is not None else tokens.last_tokens
        # The last layer runs by itself, on the last tokens. But if all parameters are trainable, a
        # scan over fewer layers needs a slice of them: a second copy of the decoder, and so are its
        # gradients. Then the last layer goes through the scan with the others.
        if self.tuned and cache is None and of in ("last", "tokens"):
            x, _, _ = _scan_layers(run, trainable, depth, x, cache)
            return _at(x, outputs), None

        x, past, collected = _scan_layers(run, trainable, depth - 1, x, cache)
        of_last_layer = jax.tree.map(lambda w: w[depth - 1], trainable)
        x, of_last = run(depth - 1, of_last_layer, x, past, outputs)
        if cache is not None:
            return x, replace(of_last, generated=of_last.generated + 1)
        if of == "cache":
            return x, _new_cache(collected, of_last, tokens)
        if of == "layers":
            return x, [*collected, of_last]
        return x, None

    def _layer_function(
        self, rotation: Array, tokens: PackedTokens, of: str
    ) -> tuple[Callable[..., tuple[Array, Any]], Any]:
        """The function that runs a layer, and the layers' trainable parameters.

        The function returns the states, and what `of` asks for of the layer. The backward pass
        computes it again.
        """
        layer = DecoderLayer(self.config, self.attention, parent=None)
        params = self.get_variable("params", "layers")
        frozen, trainable = split_frozen(params, self.tuned)

        def run(
            i: Array | int,
            trainable: Any,
            x: Array,
            cache: Cache | None,
            outputs: Array | None,
        ) -> tuple[Array, Any]:
            # Frozen parameters are indexed and not scanned over: slices of them would be copies.
            # They are indexed in here, so that the backward pass does it again. If they were
            # indexed outside of the checkpoint, it would store every layer's copy.
            index = partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
            indexed = jax.tree.map(index, frozen)
            of_layer = join_frozen(params, indexed, trainable)
            past = None if cache is None else (i, cache)
            inputs = x, rotation, tokens.with_seed(i), outputs, past
            y, stored = layer.apply({"params": of_layer}, *inputs)
            if of == "layers":
                return y, take(x, tokens.last_tokens)
            stores = of == "cache" or cache is not None
            return y, stored if stores else None

        policy = _remat_policy(self.remat)
        return jax.checkpoint(run, policy=policy, prevent_cse=False), trainable


def _scan_layers(
    run: Callable[..., tuple[Array, Any]],
    trainable: Any,
    count: int,
    x: Array,
    cache: Cache | None,
) -> tuple[Array, Cache | None, Any]:
    """The first `count` layers: the states, the cache, and what else each layer returns."""

    def body(carry: tuple[Array, Cache | None], inputs: tuple[Array, Any]) -> tuple[Any, Any]:
        x, collected = run(*inputs, *carry, None)
        if cache is None:
            return (x, None), collected
        return (x, collected), None

    of_layers = jax.tree.map(lambda w: w[:count], trainable)
    inputs = jnp.arange(count), of_layers
    (x, cache), collected = jax.lax.scan(body, (x, cache), inputs)
    return x, cache, collected


def _remat_policy(name: str) -> Callable[..., bool]:
    """What the checkpoint around a layer stores; see `REMAT_POLICIES`."""
    names = REMAT_POLICIES[name]
    if names is None:
        return _stores_results
    return jax.checkpoint_policies.save_only_these_names(*names)


def _stores_results(primitive: Any, *_: Any, **__: Any) -> bool:
    """Store all but the layer's weights, indexed and gathered, and what only reshapes."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape", "sharding_constraint")


def _new_cache(stored: Any, last: Any, tokens: PackedTokens) -> Cache:
    """The cache of rows of one width, from what all layers but the last store, and the last."""
    [keys], [values] = stored
    [last_keys], [last_values] = last
    keys = jnp.concatenate([keys, last_keys[None]])
    values = jnp.concatenate([values, last_values[None]])
    lengths = jnp.sum(tokens.rows[0] >= 0, axis=-1, dtype=jnp.int32)
    return Cache(keys, values, lengths, generated=jnp.int32(0), width=keys.shape[4])


def _insert_media(x: Array, media_slots: Array, media: Array) -> Array:
    """x [R, T, D] with media tokens in the place of those embeddings whose slot is not -1.

    media_slots: int [R, T]; media: [P, M, D]. The streams of shard p, which lie side by side, look
    into media[p] only, so that no device needs another's media.
    """
    slots = rearrange(media_slots, "(p r) t -> p (r t)", p=len(media))
    media_tokens = take(media, jnp.maximum(slots, 0)).reshape(x.shape)
    is_media = (media_slots >= 0)[..., None]
    return constrain(jnp.where(is_media, media_tokens.astype(x.dtype), x), ROWS)
