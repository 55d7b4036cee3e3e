"""The keys and values of a decoder's earlier tokens, so that generation reads each token once.

Dimensions: R streams, S sequences of a stream, C columns (W of the prompts, then one for each token
generated), L layers, K key-value heads, G query heads per key-value head, H head_dim.
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

    A sequence's prompt lies at the left. Its generated tokens begin at column `width` (W), the
    same for all sequences, so that a token is written to one slice.
    lengths: int32 [R, S], of the prompts. generated: int32, how many tokens were written since.
    """

    keys: Array
    values: Array
    lengths: Array
    generated: Array
    width: int

    @property
    def columns(self) -> int:
        """C: room for the prompts and for generated tokens."""
        return self.keys.shape[4]

    def with_room(self, tokens: int) -> "Cache":
        """With columns for so many tokens more."""
        room = [(0, 0), (0, 0), (0, 0), (0, 0), (0, tokens), (0, 0)]
        return replace(self, keys=jnp.pad(self.keys, room), values=jnp.pad(self.values, room))

    def write(self, layer: Array | int, keys: Array, values: Array) -> "Cache":
        """With a layer's keys and values [R, S, K, H] of each sequence's newest token."""
        start = (layer, 0, 0, 0, self.width + self.generated, 0)

        def written(x: Array, newest: Array) -> Array:
            column = newest[None, :, :, :, None]  # [1, R, S, K, 1, H]
            return jax.lax.dynamic_update_slice(x, column, start)

        return replace(self, keys=written(self.keys, keys), values=written(self.values, values))

    def attend(self, layer: Array | int, query: Array) -> Array:
        """The newest tokens' queries [R, S, K, G, H] against their sequences: [R, S, K, G, H]."""
        columns = jnp.arange(self.columns)
        newest = self.width + self.generated
        is_prompt = columns < self.lengths[..., None]
        is_generated = (columns >= self.width) & (columns <= newest)
        seen = is_prompt | is_generated  # [R, S, C]

        index = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        keys = index(self.keys)
        values = index(self.values)
        by_sequence = [rearrange(x, "r s ... -> (r s) ...") for x in (query, keys, values, seen)]
        mixed = attend_last(*by_sequence)
        return mixed.reshape(query.shape)
