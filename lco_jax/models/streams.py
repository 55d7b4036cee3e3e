"""Between a stream of tokens and its attention rows: gathers both ways, also for the gradients.

Dimensions: R streams, T tokens of a stream, N rows and W width of a group, K heads (of keys and
values), P tokens of the prefix that sequences share, I indices, … what else a token has of each
head.

The transpose of a gather is a scatter-add, which is slow and, on GPUs, in no fixed order. A token
has one home among the slots, so its gradient is gathered from there. Only the tokens of the prefix
stand in many rows, in the same columns, and their gradient is a sum over rows. With several
instructions the prefix has several branches, and a row has the tokens of some.

Rows are [R, N, K, W, …], because attention multiplies head by head. A gather can write its result
in that order, so every head of every token is picked separately. To move the heads afterwards would
be a pass over memory for each of queries, keys, values and results. By a TPU compiler's cycles,
those cost more than the attention itself.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.packing import PackedTokens
from lco_jax.core.prefixes import Branch, Branches, prefix_length
from lco_jax.core.sharding import current_parts

Groups = tuple[
    Array, ...
]  # the stream's token in each slot of the rows: int [R, N, W] of each width


def take(x: Array, indices: Array) -> Array:
    """x [R, T, …] at indices int [R, I], each stream at its own -> [R, I, …]."""

    def pick(x: Array, i: Array) -> Array:
        return x.at[i].get(mode="promise_in_bounds")

    if len(x) == 1:
        return pick(x[0], indices[0])[None]  # on CPU several times as fast as the batched gather
    return jax.vmap(pick)(x, indices)


# ---- from the rows to the stream


def from_rows(rows: list[Array], tokens: PackedTokens) -> Array:
    """Each token as it stands in its home: [R, N, K, W, …] of each width -> [R, T, K, …].

    Padding is zero.
    """
    return _from_rows(rows, tokens.home, tokens.rows)


@jax.custom_vjp
def _from_rows(rows: list[Array], home: Array, groups: Groups) -> Array:
    total = None
    first = 0  # slot of the group
    for group in rows:
        size = group.shape[1] * group.shape[3]
        slots = home - first
        is_here = (slots >= 0) & (slots < size)
        picked = _pick_token(group, jnp.clip(slots, 0, size - 1))
        picked = _where(is_here, picked)
        total = picked if total is None else total + picked
        first += size
    return total


def _from_rows_forward(rows: list[Array], home: Array, groups: Groups) -> tuple:
    return _from_rows(rows, home, groups), (home, groups)


def _from_rows_backward(saved: tuple[Array, Groups], grad: Array) -> tuple:
    home, groups = saved
    grads = []
    first = 0
    for group in groups:
        token = jnp.maximum(group, 0)
        slots = jnp.arange(first, first + group[0].size)
        home_of_token = take(home, rearrange(token, "r n w -> r (n w)"))
        is_home = (home_of_token == slots).reshape(group.shape) & (group >= 0)
        grads.append(_where(is_home[:, :, None], _pick_rows(grad, token)))
        first += group[0].size
    return grads, None, None


_from_rows.defvjp(_from_rows_forward, _from_rows_backward)


# ---- from the stream to the rows


def to_rows(x: Array, tokens: PackedTokens) -> list[Array]:
    """The rows of x [R, T, K, …]: [R, N, K, W, …] of each width.

    Beyond a sequence's end they are arbitrary.
    """
    if tokens.branches is None:
        return _to_rows(x, tokens.rows)
    return _shared_to_rows(x, tokens.rows, tokens.home, tokens.branches)


def _to_rows(x: Array, groups: Sequence[Array]) -> list[Array]:
    return [_pick_rows(x, jnp.maximum(group, 0)) for group in groups]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _shared_to_rows(x: Array, groups: Groups, home: Array, branches: Branches) -> list[Array]:
    """`to_rows` of streams of whose tokens those of the branches may stand in many rows.

    Each of the others stands in one.
    """
    return _to_rows(x, groups)


def _shared_to_rows_forward(x: Array, groups: Groups, home: Array, branches: Branches) -> tuple:
    return _to_rows(x, groups), (groups, home)


def _shared_to_rows_backward(
    branches: Branches, saved: tuple[Groups, Array], grads: list[Array]
) -> tuple:
    groups, home = saved
    at_home = _from_rows(grads, home, groups)
    length = prefix_length(branches)
    if not length:
        return at_home, None, None
    total = jnp.zeros((len(home), length, *at_home.shape[2:]), jnp.float32)
    for group, grad in zip(groups, grads, strict=True):
        for branch in branches:
            total = _add_branch(total, group, grad, branch)
    of_prefix = total.astype(at_home.dtype)
    return jnp.concatenate([of_prefix, at_home[:, length:]], axis=1), None, None


def _add_branch(total: Array, group: Array, grad: Array, branch: Branch) -> Array:
    """Add to [R, P, K, …] what a group's rows have of the gradients of a branch's tokens."""
    first, column, length = branch
    length = min(length, group.shape[2] - column)
    if length <= 0:  # the rows are too short to have any
        return total
    columns, tokens = slice(column, column + length), slice(first, first + length)
    is_here = group[:, :, None, columns] == jnp.arange(first, first + length)
    of_rows = _where(is_here, grad[:, :, :, columns])
    of_group = jnp.sum(of_rows, axis=1, dtype=jnp.float32)
    return total.at[:, tokens].add(rearrange(of_group, "r k w ... -> r w k ..."))


_shared_to_rows.defvjp(_shared_to_rows_forward, _shared_to_rows_backward)


# ---- gathers head by head


def _pick_rows(x: Array, tokens: Array) -> Array:
    """x [R, T, K, …] at tokens int [R, N, W] -> [R, N, K, W, …]."""
    streams, count, width = tokens.shape
    x = _split_heads(x)  # [parts, R, T, k, …]
    parts, _, _, heads, *rest = x.shape
    indices = tokens[:, :, None] * heads + jnp.arange(heads)[:, None]  # [R, N, k, W]
    indices = indices.reshape(streams, -1)
    x = rearrange(x, "p r t k ... -> p r (t k) ...")
    picked = _take_parts(x, indices)
    picked = picked.reshape(parts, streams, count, heads, width, *rest)
    return _join_heads(picked)


def _pick_token(rows: Array, slots: Array) -> Array:
    """rows [R, N, K, W, …] at slots int [R, I] among N · W -> [R, I, K, …]."""
    rows = _split_heads(rows)  # [parts, R, N, k, W, …]
    parts, streams, _, heads, width, *rest = rows.shape
    row, column = jnp.divmod(slots, width)
    head = row[..., None] * heads + jnp.arange(heads)  # among N · k
    indices = head * width + column[..., None]  # [R, I, k]
    indices = indices.reshape(streams, -1)
    rows = rearrange(rows, "p r n k w ... -> p r (n k w) ...")
    picked = _take_parts(rows, indices)
    picked = picked.reshape(parts, streams, slots.shape[1], heads, *rest)
    return _join_heads(picked)


def _take_parts(x: Array, indices: Array) -> Array:
    """`take` of each of the parts of x [parts, R, T, …]."""
    if len(x) == 1:
        return take(x[0], indices)[None]
    return jax.vmap(take, in_axes=(0, None))(x, indices)


def _split_heads(x: Array) -> Array:
    """x [R, T, K, …] with its heads in as many parts as the mesh splits them: [parts, R, T, k, …].

    Within a part, heads and tokens can become one axis. Devices that split the heads could not make
    such an axis.
    """
    parts = current_parts(x.shape[2], "tensor")
    return rearrange(x, "r t (p k) ... -> p r t k ...", p=parts)


def _join_heads(x: Array) -> Array:
    """The inverse: [parts, R, T, k, …] -> [R, T, K, …]."""
    return rearrange(x, "p r t k ... -> r t (p k) ...")


def _where(keep: Array, x: Array) -> Array:
    """x, zero where not `keep`, whose axes are the first ones of x."""
    keep = keep.reshape(*keep.shape, *[1] * (x.ndim - keep.ndim))
    return jnp.where(keep, x, 0)
