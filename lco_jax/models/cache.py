"""What a decoder keeps of the tokens behind it, so that it reads each of them once while it says more.

Dimensions: R streams, S sequences of a stream, C columns (W of the prompts, then one for each token said), L layers,
K key-value heads, G query heads per key-value head, H head_dim.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.models.attention import attend_last


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "lengths", "said"], meta_fields=["width"])
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, [L, R, S, C, K, H], or of one, [R, S, C, K, H].

    A sequence's prompt lies at the left; what it says lies from column `width` (W) on, the same column for all: so a
    token is written to one slice, and where the columns are does not matter to attention, whose keys are rotated.
    lengths: int32 [R, S], of the prompts. said: int32, how many tokens have been written since.
    """

    keys: Array
    values: Array
    lengths: Array
    said: Array
    width: int

    def with_room(self, tokens: int) -> "Cache":
        """With columns for so many tokens more."""
        room = [(0, 0)] * (self.keys.ndim - 3) + [(0, tokens), (0, 0), (0, 0)]
        return replace(self, keys=jnp.pad(self.keys, room), values=jnp.pad(self.values, room))

    def write(self, layer: Array | int, keys: Array, values: Array) -> "Cache":
        """With a layer's keys and values [R, S, K, H] of the token that each sequence says now."""
        at = (layer, slice(None), slice(None), self.width + self.said)
        return replace(self, keys=self.keys.at[at].set(keys), values=self.values.at[at].set(values))

    def attend(self, layer: Array | int, query: Array) -> Array:
        """The said tokens' queries [R, S, K, G, H], each against its sequence: [R, S, K, G, H]."""
        columns = jnp.arange(self.keys.shape[3])
        said = (columns >= self.width) & (columns <= self.width + self.said)
        seen = (columns < self.lengths[..., None]) | said
        one = [jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (self.keys, self.values)]
        mixed = attend_last(*(rearrange(x, "r s ... -> (r s) ...") for x in (query, *one, seen)))
        return mixed.reshape(query.shape)
