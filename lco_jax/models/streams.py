"""Between a stream of tokens and the rows in which it is attended: gathers both ways, also in their backward passes.

Dimensions: R streams, T tokens of a stream, N rows and W width of a group, K heads (of keys and values), P tokens of
the head that sequences share, I indices, … whatever else a token has of each head.

A scatter-add, which is what a gather's transpose would be, is slow and, on GPUs, in no fixed order. A token has one
home among the slots, so its gradient is gathered from there. Only the shared tokens stand in many rows, in the same
columns, and their gradient is a sum over rows.

Rows are [R, N, K, W, …]: attention multiplies head by head. A gather can write its result in that order, so every
token of every head is picked on its own. To move the heads afterwards is a pass over memory for each of queries, keys,
values and results; by a TPU compiler's cycles those cost more than the attention itself.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lco_jax.core.packing import PackedTokens
from lco_jax.core.sharding import ways


def take(x: Array, indices: Array) -> Array:
    """x [R, T, …] at indices int [R, I], each stream at its own -> [R, I, …]."""

    def pick(x: Array, i: Array) -> Array:
        return x.at[i].get(mode="promise_in_bounds")

    if x.shape[0] == 1:
        return pick(x[0], indices[0])[None]  # on CPU several times as fast as the batched gather
    return jax.vmap(pick)(x, indices)


def to_rows(x: Array, tokens: PackedTokens) -> list[Array]:
    """What the rows hold of x [R, T, K, …]: [R, N, K, W, …] of each width. Beyond a sequence's end it is arbitrary."""
    if tokens.prefix_length is None:
        return _to_rows(x, tokens.rows)
    return _shared_to_rows(x, tokens.rows, tokens.home, tokens.prefix_length)


@jax.custom_vjp
def _from_rows(rows: list[Array], home: Array, groups: tuple[Array, ...]) -> Array:
    """Each token as it stands in its home, zero for padding. groups: the tokens of the rows."""
    total, first = None, 0
    for one in rows:
        size = one.shape[1] * one.shape[3]
        slots = home - first
        here = (slots >= 0) & (slots < size)
        picked = _where(here, _pick_token(one, jnp.clip(slots, 0, size - 1)))
        total = picked if total is None else total + picked
        first += size
    return total


def from_rows(rows: list[Array], tokens: PackedTokens) -> Array:
    """Each token as it stands in its home: groups of [R, N, K, W, …] -> [R, T, K, …], zero for padding."""
    return _from_rows(rows, tokens.home, tokens.rows)


def _from_rows_forward(rows: list[Array], home: Array, groups: tuple[Array, ...]) -> tuple:
    return _from_rows(rows, home, groups), (home, groups)


def _from_rows_backward(saved: tuple, grad: Array) -> tuple:
    home, groups = saved
    grads, first = [], 0
    for group in groups:
        streams, count, width = group.shape
        token = jnp.maximum(group, 0)
        slots = first + jnp.arange(count * width)
        lives_here = take(home, token.reshape(streams, -1)) == slots
        lives_here = lives_here.reshape(group.shape) & (group >= 0)
        grads.append(_where(lives_here[:, :, None], _pick_rows(grad, token)))
        first += count * width
    return grads, None, None


_from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def _to_rows(x: Array, groups: Sequence[Array]) -> list[Array]:
    return [_pick_rows(x, jnp.maximum(group, 0)) for group in groups]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _shared_to_rows(
    x: Array, groups: tuple[Array, ...], home: Array, prefix_length: int
) -> list[Array]:
    """`to_rows` of streams whose first `prefix_length` tokens may stand in many rows, and others in one."""
    return _to_rows(x, groups)


def _shared_to_rows_forward(
    x: Array, groups: tuple[Array, ...], home: Array, prefix_length: int
) -> tuple:
    return _to_rows(x, groups), (groups, home)


def _shared_to_rows_backward(prefix_length: int, saved: tuple, grads: list[Array]) -> tuple:
    groups, home = saved
    at_home = _from_rows(grads, home, groups)
    if not prefix_length:
        return at_home, None, None
    total = jnp.zeros((home.shape[0], prefix_length, *at_home.shape[2:]), jnp.float32)
    for group, grad in zip(groups, grads, strict=True):
        columns = min(prefix_length, group.shape[2])
        here = group[:, :, None, :columns] == jnp.arange(columns)
        summed = jnp.sum(_where(here, grad[:, :, :, :columns]), axis=1, dtype=jnp.float32)
        total = total.at[:, :columns].add(jnp.swapaxes(summed, 1, 2))
    shared = total.astype(at_home.dtype)
    return jnp.concatenate([shared, at_home[:, prefix_length:]], axis=1), None, None


_shared_to_rows.defvjp(_shared_to_rows_forward, _shared_to_rows_backward)


def _pick_rows(x: Array, tokens: Array) -> Array:
    """x [R, T, K, …] at tokens int [R, N, W] -> [R, N, K, W, …]."""
    streams, count, width = tokens.shape
    x = _split_heads(x, axis=2)  # [parts, R, T, k, …]
    parts, _, _, heads = x.shape[:4]
    at = tokens[:, :, None] * heads + jnp.arange(heads)[:, None]
    picked = _take_parts(rearrange(x, "p r t k ... -> p r (t k) ..."), at.reshape(streams, -1))
    picked = picked.reshape(parts, streams, count, heads, width, *x.shape[4:])
    return _join_heads(picked, axis=2)


def _pick_token(rows: Array, slots: Array) -> Array:
    """rows [R, N, K, W, …] at slots int [R, I] among N · W -> [R, I, K, …]."""
    streams, count = slots.shape
    width = rows.shape[3]
    rows = _split_heads(rows, axis=2)  # [parts, R, N, k, W, …]
    parts, heads = rows.shape[0], rows.shape[3]
    row, column = jnp.divmod(slots, width)
    at = (row[..., None] * heads + jnp.arange(heads)) * width + column[..., None]
    flat = rearrange(rows, "p r n k w ... -> p r (n k w) ...")
    picked = _take_parts(flat, at.reshape(streams, -1))
    return _join_heads(picked.reshape(parts, streams, count, heads, *rows.shape[5:]), axis=2)


def _take_parts(x: Array, indices: Array) -> Array:
    """`take` of each of the parts of x [parts, R, T, …]."""
    if x.shape[0] == 1:
        return take(x[0], indices)[None]
    return jax.vmap(take, in_axes=(0, None))(x, indices)


def _split_heads(x: Array, axis: int) -> Array:
    """x with its K heads on `axis` in as many parts as the mesh splits them, the parts on a new first axis.

    Within a part heads and tokens can become one axis, which devices that split the heads could not.
    """
    heads = x.shape[axis]
    parts = ways(heads, "tensor")
    x = x.reshape(*x.shape[:axis], parts, heads // parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join_heads(x: Array, axis: int) -> Array:
    """The inverse: x [parts, …] with its parts back before the heads, which are to be on `axis`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _where(keep: Array, x: Array) -> Array:
    """x, zero where not keep, whose axes are the first ones of x."""
    return jnp.where(keep.reshape(*keep.shape, *[1] * (x.ndim - keep.ndim)), x, 0)
