"""Frozen matrices in 8 or 4 bits: leaves that `core.weights.dot` takes in the place of an array.

Dimensions: O output features, I input features, N = I / 64 blocks of a row, K the most groups of
256 blocks (counted through the matrix) that a row's blocks lie in.

Every array of a leaf may have leading axes (the stacked layers'). They are the same for all arrays,
so `nn.scan` slices a leaf as it does an array.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.core.sharding import constrain

KINDS = ("int8", "nf4")
BLOCK = 64  # weights that share an absmax
GROUP = 256  # absmaxes that share an absmax of theirs
TINY = float(np.finfo(np.float32).tiny)  # stands for the absmax of zeros, to divide by

# 4-bit NormalFloat: quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023,
# arXiv 2305.14314, appendix E)
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def _midpoints(table: np.ndarray) -> np.ndarray:
    """The bounds between which a number is nearest to a value of the sorted table."""
    return (table[1:] + table[:-1]) / 2


def _dynamic_map() -> np.ndarray:
    """The values of signed 8-bit dynamic quantisation, float32 [256] (Dettmers 2015, 1511.04561).

    They are 2^i steps in each decade 10^(i - 6), and 0 and 1.
    """
    decades = []
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        decades.append(_midpoints(edges) * np.float32(10.0 ** (i - 6)))
    positive = np.concatenate(decades)
    return np.sort(np.concatenate([-positive, [0, 1], positive])).astype(np.float32)


DYNAMIC = _dynamic_map()
DYNAMIC_ZERO = 127  # the code of 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """values · scales: values int8 [..., O, I], scales float32 [..., O].

    It is symmetric, so there is no zero point.
    """

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., O, I]."""
        return self.values.shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4Weight:
    """NF4[codes] · absmax of the block, where absmax is DYNAMIC[its code] · absmax2 + offset.

    codes: uint8 [..., O, I / 2], two a byte. The high bits have the first 32 of a block of 64, the
    low bits have the last 32.
    absmax: uint8 [..., O, N], codes of `DYNAMIC`.
    absmax2: float32 [..., K O], that of each row's first group, then of the next ones.
    offset: float32 [...].
    All this takes 4.13 to 4.16 bits a weight.

    The numbers are those of bitsandbytes' double quantisation. Their order is not: bitsandbytes
    has neighbours in one byte, and each group's absmax2 once. TPUs are slow at shuffling the lanes
    of their registers and at gathers. A block's codes lie side by side, so a shard of the codes has
    the columns of the same shard of the matrix.
    """

    codes: Array
    absmax: Array
    absmax2: Array
    offset: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., O, I]."""
        return *self.codes.shape[:-1], 2 * self.codes.shape[-1]


QuantizedWeight = Int8Weight | Nf4Weight


# ---- from a matrix


def quantize(w: Array, kind: str, name: str = "a matrix") -> QuantizedWeight:
    """w [..., O, I] as a leaf of `kind`.

    Raises, by `name`, for another kind and for rows that do not divide into blocks.
    """
    if kind not in KINDS:
        raise LcoError(f"quantize is {kind!r}; it is one of: {', '.join(KINDS)}, or empty")
    if kind == "nf4" and w.shape[-1] % BLOCK:
        raise LcoError(
            f"{name} has rows of {w.shape[-1]}, and nf4 needs a multiple of {BLOCK}; "
            "quantize to int8"
        )
    if len(w.shape) > 2:
        return jax.vmap(partial(quantize, kind=kind))(w)
    w = w.astype(jnp.float32)
    return _int8(w) if kind == "int8" else _nf4(w)


def _int8(w: Array) -> Int8Weight:
    scales = jnp.maximum(jnp.max(jnp.abs(w), axis=1), TINY) / 127
    values = jnp.clip(jnp.round(w / scales[:, None]), -127, 127)
    return Int8Weight(values.astype(jnp.int8), scales)


def _nf4(w: Array) -> Nf4Weight:
    blocks = rearrange(w, "o (n b) -> o n b", b=BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=2)
    codes = _pack(_nearest_nf4(blocks, absmax))
    # Every device has every absmax, so that their mean has the same bits on any mesh.
    absmax = constrain(absmax)
    offset = jnp.mean(absmax)
    absmax_codes, absmax2 = _quantize_absmax(absmax - offset)
    return Nf4Weight(codes, absmax_codes, _groups_of_rows(absmax2, *absmax.shape), offset)


def _nearest_nf4(blocks: Array, absmax: Array) -> Array:
    """The codes of blocks [O, N, 64]: uint8."""
    scaled = blocks * (1 / jnp.maximum(absmax, TINY))[..., None]
    # a sum of comparisons fuses: there is no array [O, I, 15]
    return sum((scaled > bound).astype(jnp.uint8) for bound in _midpoints(NF4))


def _pack(codes: Array) -> Array:
    """Codes [O, N, 64] of 4 bits, two a byte: [O, I / 2]."""
    first, last = jnp.split(codes, 2, axis=2)
    return rearrange(first << 4 | last, "o n b -> o (n b)")


def _quantize_absmax(absmax: Array) -> tuple[Array, Array]:
    """absmax [O, N] less its mean -> codes of `DYNAMIC`, uint8 [O, N], and each group's scale."""
    room = -absmax.size % GROUP
    groups = jnp.pad(absmax.ravel(), (0, room)).reshape(-1, GROUP)
    scales = jnp.max(jnp.abs(groups), axis=1)
    scaled = groups / jnp.maximum(scales, TINY)[:, None]
    codes = jnp.searchsorted(_midpoints(DYNAMIC), scaled).astype(jnp.uint8)
    return codes.ravel()[: absmax.size].reshape(absmax.shape), scales


def _groups_of_rows(scales: Array, rows: int, blocks: int) -> Array:
    """The scale of each row's first group, then of each row's next ones: float32 [K O]."""
    groups = _groups_of_blocks(rows, blocks)
    first, last = groups[:, 0], groups[:, -1]
    most = np.max(last - first) + 1
    numbers = first + np.arange(most)[:, None]
    return scales[np.minimum(numbers, len(scales) - 1).ravel()]


def _groups_of_blocks(rows: int, blocks: int) -> np.ndarray:
    """Which group each block lies in: int [O, N]."""
    return np.arange(rows * blocks).reshape(rows, blocks) // GROUP


# ---- to a matrix


def dequantize(leaf: QuantizedWeight, dtype: Any) -> Array:
    """The matrix [..., O, I] that a leaf stands for, computed in float32 and rounded once."""
    if len(leaf.shape) > 2:
        return jax.vmap(partial(dequantize, dtype=dtype))(leaf)
    if isinstance(leaf, Int8Weight):
        return (leaf.values * leaf.scales[:, None]).astype(dtype)
    blocks = _nf4_values(leaf) * _absmax(leaf)[..., None]
    return blocks.astype(dtype).reshape(leaf.shape)


def _nf4_values(leaf: Nf4Weight) -> Array:
    """NF4[codes], block by block: float32 [O, N, 64]."""
    first, last = leaf.codes >> 4, leaf.codes & 15
    values = [_select(NF4, half) for half in (first, last)]
    blocks = [rearrange(x, "o (n b) -> o n b", b=BLOCK // 2) for x in values]
    return jnp.concatenate(blocks, axis=-1)


def _absmax(leaf: Nf4Weight) -> Array:
    """The absmax of each block, float32 [O, N]."""
    groups = _groups_of_blocks(*leaf.absmax.shape)
    within_row = groups - groups[:, :1]
    most = within_row.max() + 1
    first, *others = jnp.split(leaf.absmax2, most)
    scale = jnp.broadcast_to(first[:, None], groups.shape)
    for i, of_group in enumerate(others, start=1):
        is_in_group = within_row == i
        scale = jnp.where(is_in_group, of_group[:, None], scale)
    absmax = _look_up_dynamic(leaf.absmax)
    return absmax * scale + leaf.offset


def _look_up_dynamic(codes: Array) -> Array:
    """DYNAMIC[codes]."""

    def gather(codes: Array) -> Array:
        return jnp.asarray(DYNAMIC).at[codes].get(mode="promise_in_bounds")

    return jax.lax.platform_dependent(codes, tpu=_select_dynamic, default=gather)


def _select_dynamic(codes: Array) -> Array:
    """DYNAMIC[codes] without a gather, at which TPUs are slow.

    The table is symmetric, but for the 1 at its end.
    """
    signed = codes.astype(jnp.int32) - DYNAMIC_ZERO
    size = _select(DYNAMIC[DYNAMIC_ZERO:-1], jnp.abs(signed))
    return jnp.where(signed > DYNAMIC_ZERO, 1.0, jnp.where(signed < 0, -size, size))


def _select(table: np.ndarray, codes: Array) -> Array:
    """table[codes] of a table of 2^n numbers, without a gather.

    Each bit of the code, from the lowest one, halves the table.
    """
    codes = codes.astype(jnp.int32)
    values = list(table)
    while len(values) > 1:
        is_odd = codes & 1 != 0
        even, odd = values[::2], values[1::2]
        values = [jnp.where(is_odd, y, x) for x, y in zip(even, odd, strict=True)]
        codes = codes >> 1
    return values[0]
