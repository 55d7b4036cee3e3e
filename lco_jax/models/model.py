"""A decoder and the towers that turn other modalities into its tokens.

Dimensions: B rows, T tokens in a row, S slots, P shards of the rows, N rows of a tower's input (all shards'), K tokens
that such a row gives, M media tokens of a shard, D the decoder's hidden size.
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

from lco_jax.core.packing import bucket
from lco_jax.core.shapes import ShapeLog
from lco_jax.core.sharding import ROWS, constrain, row_shards
from lco_jax.models.decoder import Decoder

TOWER_INPUTS = 16_384  # patches, frames or the like that a shard has in a tower at once; what its activations cost

# tower -> argument -> array of N rows. A tower whose media are laid into rows of several kinds has
# each under a name of its own: the tower's, and a part after a slash.
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

        arguments: N rows, split over the P = `shards` ways that rows are split.
        """
        tokens = _in_chunks(self.towers[name], params, dict(arguments), shards)
        return rearrange(tokens, "(p n) k d -> p (n k) d", p=shards)

    def media_tokens(
        self, params: dict[str, Any], inputs: TowerInputs, shards: int
    ) -> Array | None:
        """Every tower's tokens, as `MediaPrograms` makes them, within a program of the caller's: gradients reach the
        towers, and their backward pass computes each chunk again."""
        towers = {name: tower_of(name) for name in sorted(inputs)}
        parts = [
            self.tower_tokens(tower, params[tower], inputs[name], shards)
            for name, tower in towers.items()
        ]
        return constrain(_join(parts), ROWS) if parts else None


class MediaPrograms:
    """A model's towers, each compiled by itself, so that the shapes of one do not multiply another's.

    shapes: what each tower has met.
    """

    def __init__(self, model: Model, mesh: Mesh):
        rows, shards = NamedSharding(mesh, PartitionSpec(ROWS)), row_shards(mesh)
        self._rows = rows
        self._towers = {
            name: jax.jit(partial(model.tower_tokens, name, shards=shards), out_shardings=rows)
            for name in model.towers
        }
        self._join = jax.jit(_join, out_shardings=rows)
        self.shapes = {name: ShapeLog(name) for name in model.towers}

    def __call__(self, params: dict[str, Any], inputs: TowerInputs) -> Array | None:
        """Every tower's tokens, in the order of the towers' names: [P, M, D]; None where there are no media.

        inputs: what each tower takes. M takes few values; what is beyond the last token is zero.
        """
        parts = []
        for name in sorted(inputs):
            tower = tower_of(name)
            self.shapes[tower].note(inputs[name])
            parts.append(self._towers[tower](params[tower], inputs[name]))
        return self._join(parts) if parts else None

    def abstract(self, params: dict[str, Any], inputs: TowerInputs) -> jax.ShapeDtypeStruct | None:
        """What calling it with these, or with their shapes, gives, as a shape that knows where it lies."""
        parts = []
        for name in sorted(inputs):
            tower = tower_of(name)
            parts.append(jax.eval_shape(self._towers[tower], params[tower], inputs[name]))
        if not parts:
            return None
        joined = jax.eval_shape(_join, parts)
        return jax.ShapeDtypeStruct(joined.shape, joined.dtype, sharding=self._rows)

    def __len__(self) -> int:
        """How many programs there are."""
        return sum(map(len, self.shapes.values()))


def tower_of(name: str) -> str:
    """Whose rows those of a name among `TowerInputs` are."""
    return name.partition("/")[0]


def _join(parts: list[Array]) -> Array:
    tokens = jnp.concatenate(parts, axis=1)
    room = (
        bucket(tokens.shape[1], 1) - tokens.shape[1]
    )  # few sizes: the decoder's program has one of them
    return jnp.pad(tokens, ((0, 0), (0, room), (0, 0)))


def _in_chunks(
    tower: nn.Module, params: dict[str, Any], arguments: dict[str, Array], shards: int
) -> Array:
    """Rows through a tower -> [N, K, D], a part of each shard's rows at a time."""
    per_shard = next(iter(arguments.values())).shape[0] // shards
    fits = max(TOWER_INPUTS // tower.row_size(arguments), 1)
    size = next(n for n in range(min(fits, per_shard), 0, -1) if per_shard % n == 0)
    if size == per_shard:
        return tower.apply({"params": params}, **arguments)
    chunks = {
        key: constrain(rearrange(x, "(p c n) ... -> c (p n) ...", p=shards, n=size), None, ROWS)
        for key, x in arguments.items()
    }
    one = jax.checkpoint(
        lambda chunk: tower.apply({"params": params}, **chunk)
    )  # where towers are tuned
    tokens = jax.lax.map(one, chunks)
    return rearrange(tokens, "c (p n) k d -> (p c n) k d", p=shards)
