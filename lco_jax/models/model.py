"""A decoder and the towers that turn other modalities into its tokens.

Dimensions: P shards of the rows, N rows of a tower's input (those of all shards), K tokens that a
row gives, M media tokens of a shard, D the decoder's hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.core.bins import bucket
from lco_jax.core.shapes import ShapeLog
from lco_jax.core.sharding import ROWS, constrain, row_shards
from lco_jax.models.decoder import Decoder
from lco_jax.models.layers import largest_divisor

# Patches, frames or the like that a shard has in a tower at once: what its activations cost
TOWER_INPUTS = 16_384

# tower -> argument -> array of N rows. A tower whose media are packed into rows of several kinds
# has a name for each kind: the tower's, and a part after a slash.
TowerInputs = Mapping[str, Mapping[str, Array]]


@dataclass(frozen=True)
class Model:
    """`decoder`, and `towers` by name. Parameters: {"decoder": tree, tower: tree, …}."""

    decoder: Decoder
    towers: dict[str, nn.Module]

    def tower_tokens(
        self, name: str, params: dict[str, Any], arguments: Mapping[str, Array], shards: int
    ) -> Array:
        """One tower's tokens, shard by shard: [P, N / P · K, D].

        arguments: N rows, split over the P = `shards` parts that rows are split in.
        """
        tokens = _in_chunks(self.towers[name], params, dict(arguments), shards)
        return rearrange(tokens, "(p n) k d -> p (n k) d", p=shards)

    def media_tokens(
        self, params: dict[str, Any], inputs: TowerInputs, shards: int
    ) -> Array | None:
        """Every tower's tokens, as `MediaPrograms` makes them, within a program of the caller's.

        Gradients reach the towers. Their backward pass computes each chunk again.
        """
        parts = []
        for name, tower in towers_of(inputs):
            parts.append(self.tower_tokens(tower, params[tower], inputs[name], shards))
        return constrain(_join(parts), ROWS) if parts else None


class MediaPrograms:
    """A model's towers, each compiled by itself: the shapes of one do not multiply another's.

    shapes: those that each tower was called with.
    """

    def __init__(self, model: Model, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(ROWS))
        jit = partial(jax.jit, out_shardings=self._sharding)
        shards = row_shards(mesh)
        self._towers = {
            name: jit(partial(model.tower_tokens, name, shards=shards)) for name in model.towers
        }
        self._join = jit(_join)
        self.shapes = {name: ShapeLog(name) for name in model.towers}

    def __call__(self, params: dict[str, Any], inputs: TowerInputs) -> Array | None:
        """Every tower's tokens, in the order of their names: [P, M, D]; None without media.

        M takes few values. What is beyond the last token is zero.
        """
        for name, tower in towers_of(inputs):
            self.shapes[tower].note(inputs[name])
        return self._tokens(params, inputs)

    def abstract(self, params: dict[str, Any], inputs: TowerInputs) -> jax.ShapeDtypeStruct | None:
        """The shape and sharding of the result for these arguments, or for their shapes."""
        tokens = jax.eval_shape(self._tokens, params, inputs)
        if tokens is None:
            return None
        return jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=self._sharding)

    def _tokens(self, params: dict[str, Any], inputs: TowerInputs) -> Array | None:
        parts = []
        for name, tower in towers_of(inputs):
            parts.append(self._towers[tower](params[tower], inputs[name]))
        return self._join(parts) if parts else None

    def __len__(self) -> int:
        """How many programs there are."""
        return sum(len(shapes) for shapes in self.shapes.values())


def towers_of(inputs: TowerInputs) -> list[tuple[str, str]]:
    """(name among the inputs, its tower), in the order of their tokens."""
    return [(name, name.partition("/")[0]) for name in sorted(inputs)]


def _join(parts: list[Array]) -> Array:
    """The towers' tokens one after the other, and zeros up to one of few sizes."""
    tokens = jnp.concatenate(parts, axis=1)
    room = bucket(tokens.shape[1], 1) - tokens.shape[1]
    return jnp.pad(tokens, ((0, 0), (0, room), (0, 0)))


def _in_chunks(
    tower: nn.Module, params: dict[str, Any], arguments: dict[str, Array], shards: int
) -> Array:
    """Rows through a tower -> [N, K, D], a part of each shard's rows at a time."""

    def run(chunk: dict[str, Array]) -> Array:
        return tower.apply({"params": params}, **chunk)

    def split(x: Array) -> Array:
        chunks = rearrange(x, "(p c n) ... -> c (p n) ...", p=shards, n=size)
        return constrain(chunks, None, ROWS)

    rows = len(next(iter(arguments.values()))) // shards
    size = largest_divisor(rows, max(TOWER_INPUTS // tower.row_size(arguments), 1))
    if size == rows:
        return run(arguments)
    tokens = jax.lax.map(jax.checkpoint(run), jax.tree.map(split, arguments))
    return rearrange(tokens, "c (p n) k d -> (p c n) k d", p=shards)
