"""Between a stream of tokens and the rows in which it is attended: gathers both ways, also in their backward passes.

Dimensions: R streams, T tokens of a stream, N rows and W width of a group, U slots of all groups (Σ N · W), P tokens of
the head.

A scatter-add, which is what a gather's transpose would be, is slow and, on GPUs, in no fixed order. A token has one
home among the slots, so its gradient is gathered from there; only the head's tokens stand in many rows, in the same
columns, and their gradient is a sum over rows.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from lco_jax.core.packing import PackedTokens


def take(x: Array, indices: Array) -> Array:
    """x [R, T, …] at indices int [R, I], each stream at its own -> [R, I, …]."""
    pick = lambda x, i: x.at[i].get(mode="promise_in_bounds")  # noqa: E731
    if x.shape[0] == 1:
        return pick(x[0], indices[0])[None]  # on CPU several times as fast as the batched gather
    return jax.vmap(pick)(x, indices)


def to_rows(x: Array, tokens: PackedTokens) -> list[Array]:
    """What the rows hold of x [R, T, …]: [R, N, W, …] of each width. Beyond a sequence's end it is arbitrary."""
    if tokens.head_length is None:
        return _to_rows(x, tokens.rows)
    return _shared_to_rows(x, tokens.rows, tokens.home, tokens.head_length)


def from_rows(rows: list[Array], tokens: PackedTokens) -> Array:
    """Each token as it stands in its home: groups of [R, N, W, …] -> [R, T, …], zero for padding."""
    return _home(_flat(rows), tokens.home, _flat(tokens.rows))


def _flat(groups: Sequence[Array]) -> Array:
    """Groups of [R, N, W, …] end to end: [R, U, …]."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, *x.shape[3:]) for x in groups], axis=1)


def _to_rows(x: Array, rows: tuple[Array, ...]) -> list[Array]:
    flat = take(x, jnp.maximum(_flat(rows), 0))
    parts, first = [], 0
    for group in rows:
        size = group.shape[1] * group.shape[2]
        parts.append(flat[:, first : first + size].reshape(*group.shape, *x.shape[2:]))
        first += size
    return parts


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _shared_to_rows(x: Array, rows: tuple[Array, ...], home: Array, head_length: int) -> list[Array]:
    return _to_rows(x, rows)


def _shared_to_rows_forward(x: Array, rows: tuple[Array, ...], home: Array, head_length: int) -> tuple:
    return _to_rows(x, rows), (rows, home)


def _shared_to_rows_backward(head_length: int, saved: tuple, grads: list[Array]) -> tuple:
    rows, home = saved
    flat = _flat(grads)
    at_home = _where(home >= 0, take(flat, jnp.maximum(home, 0)))
    if not head_length:
        return at_home, None, None
    total = jnp.zeros((home.shape[0], head_length, *flat.shape[2:]), jnp.float32)
    for group, grad in zip(rows, grads, strict=True):
        columns = min(head_length, group.shape[2])
        here = group[..., :columns] == jnp.arange(columns)
        part = jnp.sum(_where(here, grad[:, :, :columns]), axis=1, dtype=jnp.float32)
        total = total.at[:, :columns].add(part)
    return jnp.concatenate([total.astype(flat.dtype), at_home[:, head_length:]], axis=1), None, None


_shared_to_rows.defvjp(_shared_to_rows_forward, _shared_to_rows_backward)


@jax.custom_vjp
def _home(flat: Array, home: Array, slots: Array) -> Array:
    return _where(home >= 0, take(flat, jnp.maximum(home, 0)))


def _home_forward(flat: Array, home: Array, slots: Array) -> tuple:
    return _home(flat, home, slots), (home, slots)


def _home_backward(saved: tuple, grad: Array) -> tuple:
    home, slots = saved
    token = jnp.maximum(slots, 0)
    lives_here = (slots >= 0) & (take(home, token) == jnp.arange(slots.shape[1]))
    return _where(lives_here, take(grad, token)), None, None


_home.defvjp(_home_forward, _home_backward)


def _where(keep: Array, x: Array) -> Array:
    """x [R, …, *], zero where not keep [R, …]."""
    return jnp.where(keep.reshape(*keep.shape, *[1] * (x.ndim - keep.ndim)), x, 0)
