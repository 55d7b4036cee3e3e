"""A weight is a value that knows how to be multiplied: `dot(x, w)` dispatches on the leaf.

Dimensions: I input features, O output features, r LoRA rank; weights are stored as the checkpoints store them, [O, I].

A module never asks what its weight is. It reads a leaf from the parameter tree and calls `dot`; the leaf may be an
array, its 8 or 4 bits (`core/quantize.py`), or a `LoraWeight` around either, so LoRA (`core/lora.py`) and quantisation
are changes of the tree and never of the forward code.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from lco_jax.core.quantize import Int8Weight, QuantizedWeight, dequantize

GOLDEN_RATIO = 0x9E3779B9  # 2^32 / phi: successive multiples of it spread evenly over the 32-bit integers


@partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "seed"], meta_fields=["scale", "dropout"])
@dataclass(frozen=True)
class LoraWeight:
    """W + scale · B A, kept factored (Hu et al. 2021, arXiv 2106.09685).

    base: the frozen weight, [O, I], itself any leaf that `dot` takes.
    a: [r, I]; b: [O, r]; both float32, cast to the activations' dtype where they are multiplied.
    seed: uint32 scalar, the dropout key of this matrix in this step.
    scale, dropout: static, so that a stack of them goes through `nn.scan`.
    """

    base: Array | QuantizedWeight
    a: Array
    b: Array
    seed: Array
    scale: float
    dropout: float


def matmul_precision(x: Array) -> jax.lax.Precision:
    """Full float32 products where the input is float32 (accelerators default to TF32 or bfloat16 passes)."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def dot(x: Array, w: Array | QuantizedWeight | LoraWeight, token_keys: Array | None = None) -> Array:
    """x [..., I] times w [O, I] -> [..., O] in the dtype of x.

    token_keys: uint32 [...], an identity of every token that does not depend on where it is packed; needed
    by a LoRA leaf with dropout, ignored otherwise.
    """
    if isinstance(w, LoraWeight):
        update = _factor_product(dropout(x, token_keys, w.seed, w.dropout), w.a) * w.scale
        return dot(x, w.base) + _factor_product(update, w.b)
    if isinstance(w, QuantizedWeight):
        return _frozen_product(x, w)
    return _product(x, w)


def _product(x: Array, w: Array) -> Array:
    return jnp.einsum("...i,oi->...o", x, w.astype(x.dtype), precision=matmul_precision(x))


def _product_back(g: Array, w: Array) -> Array:
    """The gradient of `_product`'s x: g [..., O] -> [..., I]."""
    return jnp.einsum("...o,oi->...i", g, w.astype(g.dtype), precision=matmul_precision(g))


@jax.custom_vjp
def _factor_product(x: Array, w: Array) -> Array:
    """`_product` with a factor of an adapter, long on one side and short on the other. Its gradient is float32.

    The compiler would transpose the wide one of x and the gradient for it, many times what the product itself costs on
    CPU; here it is the narrow one.
    """
    return _product(x, w)


def _factor_gradients(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    tokens = tuple(range(x.ndim - 1))
    sums = partial(
        jnp.tensordot, axes=(tokens, tokens), precision=matmul_precision(g), preferred_element_type=jnp.float32
    )
    wide = jnp.float32 if jax.default_backend() == "cpu" else g.dtype  # XLA's CPU products of bfloat16 give bfloat16
    a, b = x.astype(wide), g.astype(wide)
    of_w = sums(a, b).T if w.shape[0] > w.shape[1] else sums(b, a)
    return _product_back(g, w), of_w.astype(w.dtype)


_factor_product.defvjp(lambda x, w: (_product(x, w), (x, w)), _factor_gradients)


@jax.custom_vjp
def _frozen_product(x: Array, w: QuantizedWeight) -> Array:
    """`_product` with a matrix that has no gradient. What is kept for x's is w as it is, never its wide form."""
    if isinstance(w, Int8Weight):
        return (_product(x, w.values) * w.scales).astype(x.dtype)
    return _product(x, dequantize(w, x.dtype))


def _frozen_gradient(w: QuantizedWeight, g: Array) -> tuple[Array, None]:
    if isinstance(w, Int8Weight):
        return _product_back((g * w.scales).astype(g.dtype), w.values), None
    return _product_back(g, dequantize(w, g.dtype)), None


_frozen_product.defvjp(lambda x, w: (_frozen_product(x, w), w), _frozen_gradient)


def mix_bits(x: Array) -> Array:
    """A bijection of the uint32s in which every input bit moves every output bit (Wellons' lowbias32)."""
    x = x.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def dropout(x: Array, token_keys: Array | None, seed: Array, rate: float) -> Array:
    """Zero each element of x [..., I] with probability `rate` and scale the rest by 1 / (1 - rate).

    The mask is a hash of (seed, token key, channel): the same token gets the same mask in any row, chunk or mesh,
    and the backward pass recomputes it instead of storing it.
    """
    if rate == 0.0:
        return x
    if token_keys is None:
        raise ValueError("LoRA dropout needs token_keys")
    channels = jnp.arange(x.shape[-1], dtype=jnp.uint32) * jnp.uint32(GOLDEN_RATIO)
    bits = mix_bits(mix_bits(token_keys ^ seed)[..., None] + channels)
    keep = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)
