"""Frozen matrices in 8 or 4 bits: leaves that `core.weights.dot` takes in the place of an array.

Dimensions: O output features, I input features, N = I / 64 blocks of a row, S = ceil(O N / 256) groups of blocks.
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
    positive = np.concatenate([(e[:-1] + e[1:]) / 2 * np.float32(10.0 ** (i - 6)) for i, e in enumerate(edges)])
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
    """NF4[codes] · absmax of the block, that absmax being DYNAMIC[absmax] · absmax2 of its group + offset.

    codes: uint8 [..., O, I / 2], two a byte, the first in the high bits. absmax: uint8 [..., O, N]. absmax2: float32
    [..., S]. offset: float32 [...]. 4.127 bits a weight; numbers and layout are bitsandbytes' (double quantisation).
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
        raise LcoError(f"{name} has rows of {w.shape[-1]}, and nf4 needs a multiple of {BLOCK}; quantize to int8")
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
    nearest = sum((scaled > bound).astype(jnp.uint8) for bound in (NF4[1:] + NF4[:-1]) / 2)  # fuses; no [O, I, 15]
    pairs = nearest.reshape(w.shape[0], -1, 2)
    absmax = constrain(absmax)  # whole on every device, so that the mean has the same bits on any mesh
    offset = jnp.mean(absmax)
    groups = jnp.pad((absmax - offset).ravel(), (0, -absmax.size % GROUP)).reshape(-1, GROUP)
    absmax2 = jnp.max(jnp.abs(groups), axis=1)
    codes2 = jnp.searchsorted((DYNAMIC[1:] + DYNAMIC[:-1]) / 2, groups / jnp.maximum(absmax2, _TINY)[:, None])
    codes2 = codes2.astype(jnp.uint8).ravel()[: absmax.size].reshape(absmax.shape)
    return Nf4Weight(pairs[..., 0] << 4 | pairs[..., 1], codes2, absmax2, offset)


def dequantize(leaf: QuantizedWeight, dtype: Any) -> Array:
    """The matrix [..., O, I] that a leaf stands for, computed in float32 and rounded once."""
    if len(leaf.shape) > 2:
        return jax.vmap(partial(dequantize, dtype=dtype))(leaf)
    if isinstance(leaf, Int8Weight):
        return (leaf.values * leaf.scales[:, None]).astype(dtype)
    group = jnp.arange(leaf.absmax.size).reshape(leaf.absmax.shape) // GROUP
    absmax = _look_up(DYNAMIC, leaf.absmax) * _look_up(leaf.absmax2, group) + leaf.offset
    codes = jnp.stack([leaf.codes >> 4, leaf.codes & 15], axis=-1).reshape(*absmax.shape, BLOCK)
    return (_look_up(NF4, codes) * absmax[..., None]).astype(dtype).reshape(leaf.shape)


def _look_up(table: Array | np.ndarray, index: Array) -> Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")
