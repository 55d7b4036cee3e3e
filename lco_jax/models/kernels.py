"""Attention kernels that belong to a machine: cuDNN's on NVIDIA GPUs, splash attention on TPUs. Both are jax's own.

Dimensions: B rows, T tokens, K key-value heads, G query heads per key-value head, H head_dim.

Whether one can do some sizes is asked first (`fits`), and cuDNN is tried once before it is trusted: a library that is
too old costs a line in the log and not a run.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from lco_jax.core.sharding import ROWS, row_shards

LANES = 128  # the width of a TPU's vector registers, which splash attention's blocks are multiples of
SHORT = 512  # rows below this are left to XLA by "auto": their scores are small, and its fusions do better
DENSE = 1024  # the longest rows for which a mask over T × T is laid out
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """fits(query, segment_ids, forced): whether it can do these sizes here. run: as `attention.attention`."""

    fits: Callable[..., bool]
    run: Callable[..., Array]


def _cudnn_fits(query: Array, segment_ids: Array | None, forced: bool) -> bool:
    tokens, heads, groups, head_dim = query.shape[1:]
    if jax.default_backend() != "gpu" or query.dtype not in (jnp.bfloat16, jnp.float16) or head_dim % 8:
        return False
    if tokens % 2 or head_dim > 128 or (segment_ids is not None and (tokens > DENSE or not forced)):
        return False
    return (forced or tokens >= SHORT) and _cudnn_works(heads, groups, head_dim, str(query.dtype))


@lru_cache
def _cudnn_works(heads: int, groups: int, head_dim: int, dtype: str) -> bool:
    """Compile it and its gradient once, at a small size."""
    query = jax.ShapeDtypeStruct((1, 128, heads, groups, head_dim), dtype)
    key = jax.ShapeDtypeStruct((1, 128, heads, head_dim), dtype)
    try:
        total = lambda q, k: _cudnn(q, k, k, None, True).astype(jnp.float32).sum()  # noqa: E731
        jax.jit(jax.grad(total)).lower(query, key).compile()
    except Exception as error:  # whatever the driver, cuDNN or jax's checks of them raise
        logger.warning("cuDNN's attention is not used: %s", str(error).strip().splitlines()[:1])
        return False
    return True


def _cudnn(query: Array, key: Array, value: Array, segment_ids: Array | None, causal: bool) -> Array:
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    mixed = jax.nn.dot_product_attention(
        rearrange(query, "b t k g h -> b t (k g) h"),
        key,
        value,
        mask=mask,
        is_causal=causal,
        implementation="cudnn",
    )
    return mixed.reshape(query.shape)


def _splash_fits(query: Array, segment_ids: Array | None, forced: bool) -> bool:
    tokens, heads = query.shape[1:3]
    mesh = jax.sharding.get_abstract_mesh()
    if tokens % LANES or (not mesh.empty and (heads % mesh.shape["tensor"] or query.shape[0] % row_shards(mesh))):
        return False
    return forced or (jax.default_backend() == "tpu" and tokens >= SHORT)


def _splash(query: Array, key: Array, value: Array, segment_ids: Array | None, causal: bool) -> Array:
    """Splash attention does not split itself over a mesh: each device is given its own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    ids = jnp.ones(query.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    if mesh.empty:
        return _splash_here(query, key, value, ids, causal)
    split = PartitionSpec(ROWS, None, "tensor")
    return jax.shard_map(
        lambda q, k, v, ids: _splash_here(q, k, v, ids, causal),
        mesh=mesh,
        in_specs=(split, split, split, PartitionSpec(ROWS)),
        out_specs=split,
        check_vma=False,
    )(query, key, value, ids)


def _splash_here(query: Array, key: Array, value: Array, ids: Array, causal: bool) -> Array:
    tokens, heads, groups, head_dim = query.shape[1:]
    block = next(size for size in (512, 256, LANES) if tokens % size == 0)
    mask = (splash.CausalMask if causal else splash.FullMask)((tokens, tokens))
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * (heads * groups)),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=jax.default_backend() != "tpu",
    )
    room = -head_dim % LANES  # zeros beyond head_dim change no product
    pad = lambda x: jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, room)))  # noqa: E731
    query = rearrange(pad(query * head_dim**-0.5), "b t k g h -> b (k g) t h")
    key, value = (rearrange(pad(x), "b s k h -> b k s h") for x in (key, value))
    mixed = jax.vmap(kernel)(query, key, value, splash.SegmentIds(ids, ids))
    return rearrange(mixed[..., :head_dim], "b (k g) t h -> b t k g h", g=groups).astype(query.dtype)


KERNELS = {"cudnn": Kernel(_cudnn_fits, _cudnn), "splash": Kernel(_splash_fits, _splash)}
