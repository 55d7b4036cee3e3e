"""What a decoder keeps of the tokens behind it, so that it reads each of them once while it generates.

Dimensions: R streams, S sequences of a stream, C columns (W of the prompts, then one for each token generated), L
layers, K key-value heads, G query heads per key-value head, H head_dim.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.models.attention import attend_last


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "lengths", "generated"],
    meta_fields=["width"],
)
@dataclass(frozen=True)
class Cache:
    """Keys (rotated) and values, [L, R, S, K, C, H].

    A sequence's prompt lies at the left; what it generates from column `width` (W) on, the same column for all
    sequences, so that a token is written to one slice.
    lengths: int32 [R, S], of the prompts. generated: int32, how many tokens have been written since.
    """

    keys: Array
    values: Array
    lengths: Array
    generated: Array
    width: int

    @property
    def columns(self) -> int:
        """C: room for prompts and for what is generated."""
        return self.keys.shape[4]

    def with_room(self, tokens: int) -> "Cache":
        """With columns for so many tokens more."""
        room = [(0, 0), (0, 0), (0, 0), (0, 0), (0, tokens), (0, 0)]
        return replace(self, keys=jnp.pad(self.keys, room), values=jnp.pad(self.values, room))

    def write(self, layer: Array | int, keys: Array, values: Array) -> "Cache":
        """With a layer's keys and values [R, S, K, H] of each sequence's newest token."""
        at = (layer, 0, 0, 0, self.width + self.generated, 0)

        def put(x: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(x, new[None, :, :, :, None], at)

        return replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def attend(self, layer: Array | int, query: Array) -> Array:
        """The newest tokens' queries [R, S, K, G, H], each against its sequence: [R, S, K, G, H]."""
        columns = jnp.arange(self.columns)
        since = (columns >= self.width) & (columns <= self.width + self.generated)
        seen = (columns < self.lengths[..., None]) | since
        one = [
            jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (self.keys, self.values)
        ]
        mixed = attend_last(*(rearrange(x, "r s ... -> (r s) ...") for x in (query, *one, seen)))
        return mixed.reshape(query.shape)
