"""A weight is a value that knows how to be multiplied: `dot(x, w)` dispatches on the leaf.

Dimensions: I input features, O output features, r LoRA rank, n matrices that read the same input.
Weights are stored as the checkpoints store them, [O, I].

A module never asks what its weight is. It reads a leaf from the parameter tree and calls `dot`. The
leaf may be an array, its 8 or 4 bits (`core/quantize.py`), or a `LoraWeight` around either. So LoRA
(`core/lora.py`) and quantisation are changes of the tree and never of the forward code.

Weights are stored split over the mesh axis fsdp, and every device computes with rows of a batch. So
a weight is gathered before its product. Without that, XLA's TPU compiler multiplies by one slice of
the weight after the other and adds the partial sums in bfloat16, which takes two to three times as
long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lco_jax.core.quantize import Int8Weight, QuantizedWeight, dequantize
from lco_jax.core.sharding import constrain
from lco_jax.core.target import target_platform

# 2^32 / phi: successive multiples of it spread evenly over the 32-bit integers
GOLDEN_RATIO = 0x9E3779B9


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b"],
    meta_fields=["scale", "dropout"],
)
@dataclass(frozen=True)
class LoraWeight:
    """W + scale · B A, stored as its factors (Hu et al. 2021, arXiv 2106.09685).

    base: the frozen weight, [O, I], itself any leaf that `dot` takes. It has no gradient.
    a: [r, I]; b: [O, r]. Both are float32, and cast to the dtype of what they are multiplied with.
    scale, dropout: static, so that a stack of them goes through a scan.
    """

    base: Array | QuantizedWeight
    a: Array
    b: Array
    scale: float
    dropout: float


Weight = Array | QuantizedWeight | LoraWeight


class Split(NamedTuple):
    """The mesh axes that a product's output and input features are split over.

    None: every device has all of them.
    """

    outputs: str | None = None
    inputs: str | None = None

    @property
    def of_a(self) -> "Split":
        """The split of the factor A [r, I]: r is never split."""
        return Split(None, self.inputs)

    @property
    def of_b(self) -> "Split":
        """The split of the factor B [O, r]: r is never split."""
        return Split(self.outputs, None)


UNSPLIT = Split()


# ---- the products of a model


def dot(x: Array, w: Weight, token_keys: Array | None = None, split: Split = UNSPLIT) -> Array:
    """x [..., I] times w [O, I] -> [..., O] in the dtype of x. Arguments are those of `dots`."""
    return dots(x, [w], token_keys, split)[0]


def dots(
    x: Array, weights: Sequence[Weight], token_keys: Array | None = None, split: Split = UNSPLIT
) -> list[Array]:
    """x [..., I] times each of n weights [O, I] -> n of [..., O], in the dtype of x.

    token_keys: uint32 [...], an identity of every input vector that does not depend on where it is
    packed. Adapters with dropout need it. All adapters of one input drop the same elements, so
    their mask is computed once.
    split: how the mesh splits the features of these products.
    """
    adapted = [w for w in weights if isinstance(w, LoraWeight)]
    if not adapted:
        return [_frozen_product(x, w, split) for w in weights]
    dropped = dropout(x, token_keys, adapted[0].dropout)
    factors = jnp.concatenate([w.a * w.scale for w in adapted])
    inner = _factor_product(dropped, factors, split.of_a)  # [..., n r]
    products = []
    first = 0
    for w in weights:
        if isinstance(w, LoraWeight):
            end = first + len(w.a)
            products.append(_adapted_product(x, inner[..., first:end], w, split))
            first = end
        else:
            products.append(_frozen_product(x, w, split))
    return products


def _frozen_product(x: Array, w: Array | QuantizedWeight, split: Split) -> Array:
    """The product with a weight that has no adapter."""
    w = gathered(w, split)
    return _quantized_product(x, w) if isinstance(w, QuantizedWeight) else _product(x, w)


def _adapted_product(x: Array, inner: Array, w: LoraWeight, split: Split) -> Array:
    """x [..., I] times W, plus `inner` [..., r] times B.

    A wide product is written once: its input is [x, inner] and its weight is [W, B]. To read it
    again and add the update would take longer than the update itself.
    """
    outputs, inputs = w.base.shape
    if outputs > inputs and not isinstance(w.base, QuantizedWeight):
        return _extended_product(x, inner, gathered(w.base, split), w.b, split)
    return _frozen_product(x, w.base, split) + _factor_product(inner, w.b, split.of_b)


def gathered(w: Any, split: Split) -> Any:
    """A weight, or one in fewer bits, with its matrices split as `split` says and no further."""

    def gather(array: Array) -> Array:
        return constrain(array, *split) if array.ndim == 2 else array

    return jax.tree.map(gather, w)


# ---- the plain product and its gradients


def matmul_precision(x: Array) -> jax.lax.Precision:
    """Exact products for float32 input, for which accelerators default to TF32 or bfloat16."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _product(x: Array, w: Array) -> Array:
    """x [..., I] times w [O, I] -> [..., O]."""
    return jnp.einsum("...i,oi->...o", x, w.astype(x.dtype), precision=matmul_precision(x))


def _input_gradient(g: Array, w: Array) -> Array:
    """The gradient of `_product`'s x: g [..., O] -> [..., I]."""
    return jnp.einsum("...o,oi->...i", g, w.astype(g.dtype), precision=matmul_precision(g))


def _factor_gradient(x: Array, g: Array, split: Split) -> Array:
    """The gradient of `_product`'s w, where w is a factor of an adapter: float32 [O, I].

    It is summed in float32. Factors are long on one side and short on the other. The compiler would
    transpose the wide one of x and g, which costs many times what the product costs on CPU. Here it
    transposes the narrow one.
    """
    precision = matmul_precision(g)
    tokens = tuple(range(x.ndim - 1))

    def sum_over_tokens(left: Array, right: Array) -> Array:
        return jnp.tensordot(
            left,
            right,
            axes=(tokens, tokens),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    # XLA's CPU products of bfloat16 give bfloat16
    dtype = jnp.float32 if target_platform() == "cpu" else g.dtype
    x, g = x.astype(dtype), g.astype(dtype)
    is_wide = g.shape[-1] > x.shape[-1]
    gradient = sum_over_tokens(x, g).T if is_wide else sum_over_tokens(g, x)
    return constrain(gradient, *split)


# ---- the product with one factor of an adapter


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _factor_product(x: Array, w: Array, split: Split) -> Array:
    """`_product` with a factor of an adapter, which is float32 and gathered in the dtype of x."""
    return _product(x, constrain(w.astype(x.dtype), *split))


def _factor_product_forward(x: Array, w: Array, split: Split) -> tuple[Array, tuple[Array, Array]]:
    return _factor_product(x, w, split), (x, w)


def _factor_product_backward(
    split: Split, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, w = saved
    of_x = _input_gradient(g, constrain(w.astype(g.dtype), *split))
    return of_x, _factor_gradient(x, g, split)


_factor_product.defvjp(_factor_product_forward, _factor_product_backward)


# ---- the product with a matrix and one factor of its adapter


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _extended_product(x: Array, inner: Array, base: Array, b: Array, split: Split) -> Array:
    """x times W plus `inner` times B, as one product. W has no gradient."""
    inputs = jnp.concatenate([x, inner], axis=-1)
    return _product(inputs, _extended_matrix(base, b, x.dtype, split))


def _extended_matrix(base: Array, b: Array, dtype: Any, split: Split) -> Array:
    """[W, B]: [O, I + r]."""
    factor = constrain(b.astype(dtype), *split.of_b)
    return jnp.concatenate([base.astype(dtype), factor], axis=-1)


def _extended_product_forward(
    x: Array, inner: Array, base: Array, b: Array, split: Split
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _extended_product(x, inner, base, b, split), (inner, base, b)


def _extended_product_backward(
    split: Split, saved: tuple[Array, Array, Array], g: Array
) -> tuple[Array, Array, None, Array]:
    inner, base, b = saved
    of_both = _input_gradient(g, _extended_matrix(base, b, g.dtype, split))
    of_x, of_inner = jnp.split(of_both, [base.shape[-1]], axis=-1)
    return of_x, of_inner, None, _factor_gradient(inner, g, split.of_b)


_extended_product.defvjp(_extended_product_forward, _extended_product_backward)


# ---- the product with a matrix in fewer bits


@jax.custom_vjp
def _quantized_product(x: Array, w: QuantizedWeight) -> Array:
    """`_product` with a matrix in fewer bits, which has no gradient.

    The dequantised matrix is never stored for the backward pass.
    """
    if isinstance(w, Int8Weight):
        return (_product(x, w.values) * w.scales).astype(x.dtype)
    return _product(x, dequantize(w, x.dtype))


def _quantized_product_forward(x: Array, w: QuantizedWeight) -> tuple[Array, QuantizedWeight]:
    return _quantized_product(x, w), w


def _quantized_product_backward(w: QuantizedWeight, g: Array) -> tuple[Array, None]:
    if isinstance(w, Int8Weight):
        scaled = (g * w.scales).astype(g.dtype)
        return _input_gradient(scaled, w.values), None
    return _input_gradient(g, dequantize(w, g.dtype)), None


_quantized_product.defvjp(_quantized_product_forward, _quantized_product_backward)


# ---- dropout


def mix_bits(x: Array) -> Array:
    """A bijection of uint32 in which each input bit moves all output bits (Wellons' lowbias32)."""
    x = x.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def fold_in(keys: Array, number: Array | int) -> Array:
    """Other keys for each number: uint32 [...]."""
    number = jnp.asarray(number).astype(jnp.uint32)
    return mix_bits(keys + mix_bits(number + jnp.uint32(GOLDEN_RATIO)))


def dropout(x: Array, token_keys: Array | None, rate: float) -> Array:
    """Zero each element of x [..., I] with probability `rate` and scale the rest by 1 / (1 - rate).

    The mask is a hash of (token key, channel). So the same token gets the same mask in any row,
    chunk or mesh, and the backward pass computes it again instead of storing it.
    """
    if rate == 0.0:
        return x
    if token_keys is None:
        raise ValueError("LoRA dropout needs token_keys")
    channels = jnp.arange(x.shape[-1], dtype=jnp.uint32)
    channels *= jnp.uint32(GOLDEN_RATIO)
    bits = mix_bits(token_keys[..., None] + channels)
    keep = bits >= jnp.uint32(round(rate * 2**32))
    scaled = x / (1.0 - rate)
    return jnp.where(keep, scaled, 0.0).astype(x.dtype)
