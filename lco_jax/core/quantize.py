"""Frozen matrices in 8 or 4 bits: leaves that `core.weights.dot` takes in the place of an array.

Dimensions: O output features, I input features, N = I / 64 blocks of a row, K the most groups of 256 blocks (counted
through the matrix) that a row's blocks lie in.
Every array of a leaf may have leading axes (the stacked layers'), the same for all, so `nn.scan` slices a leaf whole.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.core.sharding import constrain

KINDS = ("int8", "nf4")
BLOCK, GROUP = 64, 256  # weights that share an absmax; absmaxes that share theirs
# 4-bit NormalFloat: quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, arXiv 2305.14314, E)
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_TINY = float(np.finfo(np.float32).tiny)  # in the place of the absmax of zeros, to divide by


def _dynamic_map() -> np.ndarray:
    """Signed 8 bits, float32 [256]: 2^i steps in each decade 10^(i - 6), and 0 and 1 (Dettmers 2015, 1511.04561)."""
    edges = [np.linspace(0.1, 1, 2**i + 1, dtype=np.float32) for i in range(7)]
    positive = np.concatenate(
        [(e[:-1] + e[1:]) / 2 * np.float32(10.0 ** (i - 6)) for i, e in enumerate(edges)]
    )
    return np.sort(np.concatenate([-positive, [0, 1], positive])).astype(np.float32)


DYNAMIC = _dynamic_map()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """values · scales: values int8 [..., O, I], scales float32 [..., O]; symmetric, so there is no zero point."""

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., O, I]."""
        return self.values.shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4Weight:
    """NF4[codes] · absmax of its block; that is DYNAMIC[absmax] · the block's group's absmax2 + offset.

    codes: uint8 [..., O, I / 2], two a byte: of each block of 64, the first 32 in the high bits and the last 32 in the
    low ones. absmax: uint8 [..., O, N]. absmax2: float32 [..., K O], of each row's first group, then of the next ones.
    offset: float32 [...]. 4.13 to 4.16 bits a weight.

    The numbers are bitsandbytes' (double quantisation). The order is not, for TPUs, which are slow at shuffling the
    lanes of their registers and at gathers: bitsandbytes has neighbours in a byte and each group's absmax2 once. Blocks
    stay whole, so a shard of the codes holds the columns of the same shard of the matrix.
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


def quantize(w: Array, kind: str, name: str = "a matrix") -> QuantizedWeight:
    """w [..., O, I] as a leaf of `kind`. Raises, by `name`, for another kind and for rows that are no whole blocks."""
    if kind not in KINDS:
        raise LcoError(f"quantize is {kind!r}; it is one of: {', '.join(KINDS)}, or empty")
    if kind == "nf4" and w.shape[-1] % BLOCK:
        raise LcoError(
            f"{name} has rows of {w.shape[-1]}, and nf4 needs a multiple of {BLOCK}; quantize to int8"
        )
    if len(w.shape) > 2:
        return jax.vmap(partial(quantize, kind=kind))(w)
    w = w.astype(jnp.float32)
    return _int8(w) if kind == "int8" else _nf4(w)


def _int8(w: Array) -> Int8Weight:
    scales = jnp.maximum(jnp.max(jnp.abs(w), axis=1), _TINY) / 127
    return Int8Weight(jnp.clip(jnp.round(w / scales[:, None]), -127, 127).astype(jnp.int8), scales)


def _nf4(w: Array) -> Nf4Weight:
    blocks = w.reshape(w.shape[0], -1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=2)
    scaled = blocks * (1 / jnp.maximum(absmax, _TINY))[..., None]
    nearest = sum(
        (scaled > bound).astype(jnp.uint8) for bound in (NF4[1:] + NF4[:-1]) / 2
    )  # fuses; no [O, I, 15]
    pairs = nearest.reshape(w.shape[0], -1, 2, BLOCK // 2)
    absmax = constrain(
        absmax
    )  # whole on every device, so that the mean has the same bits on any mesh
    offset = jnp.mean(absmax)
    groups = jnp.pad((absmax - offset).ravel(), (0, -absmax.size % GROUP)).reshape(-1, GROUP)
    absmax2 = jnp.max(jnp.abs(groups), axis=1)
    codes2 = jnp.searchsorted(
        (DYNAMIC[1:] + DYNAMIC[:-1]) / 2, groups / jnp.maximum(absmax2, _TINY)[:, None]
    )
    codes2 = codes2.astype(jnp.uint8).ravel()[: absmax.size].reshape(absmax.shape)
    codes = (pairs[:, :, 0] << 4 | pairs[:, :, 1]).reshape(w.shape[0], -1)
    first = np.arange(len(absmax)) * absmax.shape[1] // GROUP  # of each row's groups
    of_rows = first + np.arange(_groups(*absmax.shape).max() + 1)[:, None]
    return Nf4Weight(codes, codes2, absmax2[np.minimum(of_rows, len(absmax2) - 1).ravel()], offset)


def dequantize(leaf: QuantizedWeight, dtype: Any) -> Array:
    """The matrix [..., O, I] that a leaf stands for, computed in float32 and rounded once."""
    if len(leaf.shape) > 2:
        return jax.vmap(partial(dequantize, dtype=dtype))(leaf)
    if isinstance(leaf, Int8Weight):
        return (leaf.values * leaf.scales[:, None]).astype(dtype)
    halves = leaf.codes >> 4, leaf.codes & 15
    values = [_select(NF4, x).reshape(*leaf.absmax.shape, BLOCK // 2) for x in halves]
    blocks = jnp.concatenate(values, axis=-1) * _absmax(leaf)[..., None]
    return blocks.astype(dtype).reshape(leaf.shape)


def _absmax(leaf: Nf4Weight) -> Array:
    """The absmax of each block, float32 [O, N]."""
    which = _groups(*leaf.absmax.shape)
    first, *others = jnp.split(leaf.absmax2, which.max() + 1)
    scale = jnp.broadcast_to(first[:, None], which.shape)
    for i, of_group in enumerate(others, start=1):
        scale = jnp.where(which == i, of_group[:, None], scale)
    return _dynamic(leaf.absmax) * scale + leaf.offset


def _groups(rows: int, blocks: int) -> np.ndarray:
    """In which group each block lies, counted from that of its row's first block: int [O, N]."""
    group = np.arange(rows * blocks).reshape(rows, blocks) // GROUP
    return group - group[:, :1]


def _dynamic(codes: Array) -> Array:
    """DYNAMIC[codes]."""

    def gather(codes: Array) -> Array:
        return jnp.asarray(DYNAMIC).at[codes].get(mode="promise_in_bounds")

    return jax.lax.platform_dependent(codes, tpu=_dynamic_select, default=gather)


def _dynamic_select(codes: Array) -> Array:
    """`_dynamic` without a gather, which TPUs are slow at. The map is symmetric, but for the 1 at its end."""
    zero = 127  # DYNAMIC[127] is 0
    place = codes.astype(jnp.int32) - zero
    size = _select(DYNAMIC[zero:-1], jnp.abs(place))
    return jnp.where(place > zero, 1.0, jnp.where(place < 0, -size, size))


def _select(table: np.ndarray, codes: Array) -> Array:
    """table[codes] of a table of 2^n numbers, without a gather: a bit of the code at a time halves the table."""
    codes, values = codes.astype(jnp.int32), list(table)
    while len(values) > 1:
        odd = codes & 1 != 0
        values = [
            jnp.where(odd, two, one) for one, two in zip(values[::2], values[1::2], strict=True)
        ]
        codes = codes >> 1
    return values[0]
