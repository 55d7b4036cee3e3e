"""The text decoder of every backbone: Qwen2.5, Mistral, Llama (upstream: modeling_qwen2_5_vl.py, modeling_llama.py).

Dimensions: R streams, T tokens of a stream, S sequences of a stream, N rows and W width of a group of attention rows,
D hidden, V vocabulary, L layers, K key-value heads, G query heads per key-value head, H head_dim, F MLP width, P shards
of the streams, M media tokens of a shard.

Parameter names are the checkpoint's; the layers are stacked along a leading axis L and run by a scan. There is no
vocabulary head (`models/head.py`): contrastive learning pools hidden states and never looks at logits. Nor is there
more of the last layer than it looks at: its queries, its output projection and its MLP are computed for each sequence's
last token alone, but where every token's state is asked for.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lco_jax.core.lora import split_frozen
from lco_jax.core.packing import PackedTokens
from lco_jax.core.sharding import ROWS, constrain
from lco_jax.core.weights import Split, dot, fold_in
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

# What a layer keeps for its backward pass, from the least memory to the least recomputation.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "attention": ("qkv", "mixed"),
    "gate": ("qkv", "mixed", "gate"),
    "mlp": ("qkv", "mixed", "gate", "up"),
    "none": None,
}


COLUMN, ROW = (
    Split(outputs="tensor"),
    Split(inputs="tensor"),
)  # matrices by the features that the mesh splits
_DROPOUT = {
    "qkv": 0,
    "o_proj": 1,
    "gate_up": 2,
    "down_proj": 3,
}  # the inputs of a layer that adapters drop

Past = tuple[Array | int, Cache]
Mixed = tuple[Array, Cache | list[list[Array]]]


class Attention(nn.Module):
    """Grouped-query attention; Qwen2.5's q, k and v have biases."""

    config: DecoderConfig
    param_dtype: Any
    implementation: str

    @nn.compact
    def __call__(
        self, x: Array, rotation: Array, tokens: PackedTokens, last: bool, past: Past | None
    ) -> Mixed:
        """x [R, T, D] -> [R, T, D], or, for the `last` layer, [R, S, D]; and what `past` becomes.

        past: where this is layer i of tokens that go on, (i, the cache of those before); else None, and it becomes the
        keys and values [R, N, K, W, H] of the rows.
        """
        c = self.config

        def at_last(y: Array) -> Array:
            return take(y, tokens.last_tokens) if last else y

        q, k, v = self._project(x, tokens, last)
        q = apply_rotary(
            rearrange(q, "r t (k g h) -> r t k g h", k=c.num_kv_heads, h=c.head_dim),
            at_last(rotation),
        )
        k = apply_rotary(rearrange(k, "r t (k h) -> r t k h", h=c.head_dim), rotation)
        v = rearrange(v, "r t (k h) -> r t k h", h=c.head_dim)
        q, k, v = (checkpoint_name(y, "qkv") for y in (q, k, v))
        if past is not None:
            layer, cache = past
            kept = cache.write(layer, k, v)
            mixed = kept.attend(layer, q)
        else:
            kept = [to_rows(y, tokens) for y in (k, v)]
            mixed = checkpoint_name((self._last if last else self._rows)(q, *kept, tokens), "mixed")
        mixed = rearrange(mixed, "r t k g h -> r t (k g h)")
        keys = fold_in(at_last(tokens.token_keys), _DROPOUT["o_proj"])
        return Linear(c.hidden_size, False, self.param_dtype, ROW, name="o_proj")(mixed, keys), kept

    def _project(self, x: Array, tokens: PackedTokens, last: bool) -> list[Array]:
        """Queries, of last tokens alone in the `last` layer, keys and values, their heads side by side."""
        c = self.config
        linear = partial(Linear, use_bias=c.qkv_bias, param_dtype=self.param_dtype, split=COLUMN)
        q = linear(c.num_heads * c.head_dim, name="q_proj")
        k = linear(c.num_kv_heads * c.head_dim, name="k_proj")
        v = linear(c.num_kv_heads * c.head_dim, name="v_proj")
        keys = fold_in(tokens.token_keys, _DROPOUT["qkv"])
        if not last:
            return linears(x, [q, k, v], keys)
        ends = tokens.last_tokens
        return [q(take(x, ends), take(keys, ends)), *linears(x, [k, v], keys)]

    def _rows(self, q: Array, k: list[Array], v: list[Array], tokens: PackedTokens) -> Array:
        """Every token: [R, T, K, G, H]."""
        groups = zip(to_rows(q, tokens), k, v, strict=True)
        return from_rows([attend_rows(*group, self.implementation) for group in groups], tokens)

    def _last(self, q: Array, k: list[Array], v: list[Array], tokens: PackedTokens) -> Array:
        """Every sequence's last token: [R, S, K, G, H]."""
        mixed, first = [], 0
        for rows, *kv in zip(tokens.rows, k, v, strict=True):
            streams, count, _ = rows.shape
            flat = [
                rearrange(y, "r n ... -> (r n) ...")
                for y in (q[:, first : first + count], *kv, rows >= 0)
            ]
            mixed.append(rearrange(attend_last(*flat), "(r n) ... -> r n ...", r=streams))
            first += count
        return jnp.concatenate(mixed, axis=1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    config: DecoderConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, token_keys: Array) -> Array:
        """x [R, T, D] -> [R, T, D]."""
        c = self.config
        wide = partial(Linear, c.intermediate_size, False, self.param_dtype, COLUMN)
        layers = [wide(name="gate_proj"), wide(name="up_proj")]
        gate, up = linears(x, layers, fold_in(token_keys, _DROPOUT["gate_up"]))
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        down = Linear(c.hidden_size, False, self.param_dtype, ROW, name="down_proj")
        return down(nn.silu(gate) * up, fold_in(token_keys, _DROPOUT["down_proj"]))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: DecoderConfig
    param_dtype: Any
    implementation: str

    @nn.compact
    def __call__(
        self,
        x: Array,
        rotation: Array,
        tokens: PackedTokens,
        last: bool = False,
        past: Past | None = None,
    ) -> Mixed:
        """x [R, T, D] -> [R, T, D], or [R, S, D], each sequence's last token, from the `last`; and the rest of
        `Attention`'s."""
        norm = partial(RMSNorm, self.config.rms_norm_eps, self.param_dtype)
        attention = Attention(self.config, self.param_dtype, self.implementation, name="self_attn")
        mixed, kept = attention(norm(name="input_layernorm")(x), rotation, tokens, last, past)
        at_last = (lambda y: take(y, tokens.last_tokens)) if last else (lambda y: y)
        x = constrain(at_last(x) + mixed, ROWS)
        mlp = MLP(self.config, self.param_dtype, name="mlp")
        x = constrain(
            x + mlp(norm(name="post_attention_layernorm")(x), at_last(tokens.token_keys)), ROWS
        )
        return x, kept


class Decoder(nn.Module):
    """Token ids -> hidden states, after the final norm: of each sequence's last token, or as `of` says.

    dtype: of the activations. param_dtype: of newly initialised parameters. remat: a key of `REMAT_POLICIES`.
    attention: as `attention.attention` takes it. tuned: whether gradients are taken of its own weights, and not of
    adapters alone; every layer's are then scanned over.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "full"
    attention: str = "auto"
    tuned: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: PackedTokens,
        media: Array | None = None,
        of: str = "last",
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """tokens of [R, T], the media tokens [P, M, D] that their `media_slots` point to -> states in `dtype`.

        of: "last", each sequence's last token: [R, S, D]; "layers", the same before the first layer and after each
        one: [R, S, L + 1, D]; "tokens", every token: [R, T, D]; "cache", as "last", and a `Cache` of all tokens, which
        lie in rows of one width.
        cache: that of each sequence's tokens so far, with room for one more; `tokens` are then that one, [R, S], and
        the result as of "cache".
        """
        c = self.config
        x = Embedding(
            c.vocab_size, c.hidden_size, self.dtype, self.param_dtype, name="embed_tokens"
        )(tokens.input_ids)
        if media is not None:
            x = place_media(x, tokens.media_slots, media)
        angles = rotary_angles(tokens.position_ids, c.head_dim, c.rope_theta, c.mrope_section)
        rotation = rotation_of(angles).astype(x.dtype)
        layer = (c, self.param_dtype, self.attention)
        if self.is_initializing():
            x, _ = stacked(DecoderLayer, c.num_layers)(*layer, name="layers")(x, rotation, tokens)
            x = take(x, tokens.last_tokens)
        else:
            x, before, cache = self._layers(
                DecoderLayer(*layer, parent=None), x, rotation, tokens, of, cache
            )
        x = RMSNorm(c.rms_norm_eps, self.param_dtype, name="norm")(x)
        if cache is not None:
            return x, cache
        return jnp.stack([*before, x], axis=2) if of == "layers" else x

    def _layers(
        self,
        layer: DecoderLayer,
        x: Array,
        rotation: Array,
        tokens: PackedTokens,
        of: str,
        cache: Cache | None,
    ) -> tuple[Array, Sequence[Array], Cache | None]:
        """All layers: all but the last in a scan; what came before each, where `of` asks for it; and the cache, where
        there is one. What is frozen is indexed and not scanned over, for slices of it would be copies."""
        frozen, tuned, join = split_frozen(self.get_variable("params", "layers"), self.tuned)

        def run(
            i: Array | int, tuned: Any, x: Array, cache: Cache | None, last: bool
        ) -> tuple[Array, Any]:
            """Layer i. Its frozen weights are indexed in here, so that the backward pass does so again: what is indexed
            outside of the checkpoint is kept for it, a copy of every layer's."""
            mine = jax.tree.map(
                lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), frozen
            )
            past = None if cache is None else (i, cache)
            here = tokens.with_seed(i)
            x, kept = layer.apply({"params": join(mine, tuned)}, x, rotation, here, last, past)
            return x, kept if of == "cache" or cache is not None else None

        names = REMAT_POLICIES[self.remat]
        policy = (
            _all_but_slices
            if names is None
            else jax.checkpoint_policies.save_only_these_names(*names)
        )
        run = jax.checkpoint(run, policy=policy, prevent_cse=False, static_argnums=4)
        end = self.config.num_layers - 1

        def body(carry: tuple[Array, Cache | None], slices: tuple[Array, Any]) -> tuple[Any, Any]:
            x, cache = carry
            before = take(x, tokens.last_tokens) if of == "layers" else None
            x, kept = run(*slices, x, cache, False)
            return (x, None if cache is None else kept), (before, kept if cache is None else None)

        # Slices of what is tuned whole would be a second copy of the decoder, and so would be their gradients. Its last
        # layer goes through the scan with the others.
        alike = self.tuned and cache is None and of in ("last", "tokens")
        scanned = end + alike
        (x, going), (before, kept) = jax.lax.scan(
            body, (x, cache), (jnp.arange(scanned), jax.tree.map(lambda w: w[:scanned], tuned))
        )
        if alike:
            return x if of == "tokens" else take(x, tokens.last_tokens), [], None
        before = [*before, take(x, tokens.last_tokens)] if of == "layers" else []
        x, last = run(
            end, jax.tree.map(lambda w: w[end], tuned), x, going, of != "tokens" and cache is None
        )
        if cache is not None:
            cache = replace(last, generated=last.generated + 1)
        elif of == "cache":
            [keys], [values] = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), kept, last)
            lengths = jnp.sum(tokens.rows[0] >= 0, axis=-1, dtype=jnp.int32)
            cache = Cache(keys, values, lengths, jnp.int32(0), keys.shape[4])
        return x, before, cache


def _all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    """The policy of "none": all is kept but the layer's weights, sliced and gathered, and what merely reshapes."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape", "sharding_constraint")


def place_media(x: Array, media_slots: Array, media: Array) -> Array:
    """x [R, T, D] with media tokens in the place of those embeddings whose slot is not -1.

    media_slots: int [R, T]; media: [P, M, D]. The streams of shard p, which lie side by side, look into media[p] only,
    so no device needs another's media.
    """
    slots = rearrange(media_slots, "(p r) t -> p (r t)", p=media.shape[0])
    tokens = take(media, jnp.maximum(slots, 0)).reshape(x.shape)
    return constrain(jnp.where((media_slots >= 0)[..., None], tokens.astype(x.dtype), x), ROWS)


def pool(
    decoder: Decoder,
    params: dict[str, Any],
    tokens: PackedTokens,
    media: Array | None = None,
    of: str = "last",
) -> Array:
    """The hidden state at each sequence's last token, after the final norm: float32 [R, S, D].

    media, of: as `Decoder` takes them. Empty rows hold the state of their stream's first token; whoever reads the
    result knows which hold a sequence.
    """
    return decoder.apply({"params": params}, tokens, media, of).astype(jnp.float32)


def project(pooled: Array, params: dict[str, Any]) -> Array:
    """Pooled states [..., D] through the model's projection (`params["projection"]`), if it has one."""
    return dot(pooled, params["projection"]["weight"]) if "projection" in params else pooled


def embed(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None = None
) -> Array:
    """`pool`, projected, L2-normalised: the embeddings. params: the model's, {"decoder": tree, …}."""
    pooled = project(pool(decoder, params["decoder"], tokens, media), params)
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
