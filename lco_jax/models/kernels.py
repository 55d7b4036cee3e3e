"""Attention kernels of one kind of machine: cuDNN's and Triton's for NVIDIA GPUs, splash for TPUs.

All come with jax. Dimensions: B rows, T tokens, K key-value heads, G query heads per key-value
head, H head_dim.

`fits` says first whether a kernel can do some sizes on the program's machine (`core/target.py`).
cuDNN is compiled once before it is used: a library that is too old costs a line in the log and not
a run.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.experimental.pallas.ops.gpu import attention as triton
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from lco_jax.core.sharding import ROWS, row_shards
from lco_jax.core.target import target_platform

LANES = 128  # the width of a TPU's vector registers; blocks of queries and keys are multiples of it
# "auto" leaves shorter rows to XLA: their scores are small, and its fusions do better
SHORT = 512
SPLASH_BLOCKS = (512, 640, 384, 256)  # sizes that splash attention is fast with, the best first
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """fits(query, segment_ids, forced): whether it can do these sizes here.

    forced: the user named it. Otherwise it must also be the faster one.
    run: as `attention.attention`, without the choice.
    """

    fits: Callable[[Array, Array | None, bool], bool]
    run: Callable[[Array, Array, Array, Array | None, bool], Array]


# ---- NVIDIA GPUs


def _is_half(query: Array) -> bool:
    """Whether q has a dtype that the GPU's kernels compute with as it is."""
    return query.dtype in (jnp.bfloat16, jnp.float16)


def _cudnn_fits(query: Array, segment_ids: Array | None, forced: bool) -> bool:
    """It takes no segments: they would become a mask of T × T."""
    tokens, heads, groups, head_dim = query.shape[1:]
    if target_platform() != "gpu" or not _is_half(query) or segment_ids is not None:
        return False
    if tokens % 2 or head_dim % 8 or head_dim > 128:
        return False
    return (forced or tokens >= SHORT) and _cudnn_works(heads, groups, head_dim, str(query.dtype))


@lru_cache
def _cudnn_works(heads: int, groups: int, head_dim: int, dtype: str) -> bool:
    """Whether it and its gradient compile on this machine, at a small size."""
    query = jax.ShapeDtypeStruct((1, LANES, heads, groups, head_dim), dtype)
    key = jax.ShapeDtypeStruct((1, LANES, heads, head_dim), dtype)

    def total(query: Array, key: Array) -> Array:
        return _cudnn(query, key, key, None, True).astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(total)).lower(query, key).compile()
    except (RuntimeError, ValueError) as error:  # of the driver, of cuDNN, of jax's checks of them
        logger.warning("cuDNN's attention is not used: %s", str(error).strip().splitlines()[:1])
        return False
    return True


def _cudnn(query: Array, key: Array, value: Array, segment_ids: None, causal: bool) -> Array:
    by_head = rearrange(query, "b t k g h -> b t (k g) h")
    mixed = jax.nn.dot_product_attention(
        by_head, key, value, is_causal=causal, implementation="cudnn"
    )
    return mixed.reshape(query.shape)


def _triton_fits(query: Array, segment_ids: Array | None, forced: bool) -> bool:
    """It takes what cuDNN does not: segments, and machines without cuDNN."""
    if not _splits(query) or query.shape[-1] > 128:
        return False
    return forced or (target_platform() == "gpu" and _is_half(query) and query.shape[1] >= SHORT)


def _triton(query: Array, key: Array, value: Array, ids: Array, causal: bool) -> Array:
    tokens, _, groups, head_dim = query.shape[1:]
    room = -tokens % LANES
    query, key, value, ids = _lengthened(room, query, key, value, ids)
    # it needs a key for each query head
    key = jnp.repeat(key, groups, axis=2)
    value = jnp.repeat(value, groups, axis=2)
    mixed = triton.mha(
        rearrange(query, "b t k g h -> b t (k g) h"),
        key,
        value,
        ids,
        sm_scale=head_dim**-0.5,
        causal=causal,
        interpret=target_platform() != "gpu",
    )
    return mixed.reshape(query.shape)[:, :tokens]


# ---- TPUs


def _splash_fits(query: Array, segment_ids: Array | None, forced: bool) -> bool:
    return _splits(query) and (forced or (target_platform() == "tpu" and query.shape[1] >= SHORT))


def _splash(query: Array, key: Array, value: Array, ids: Array, causal: bool) -> Array:
    tokens, heads, groups, head_dim = query.shape[1:]
    block = _splash_block(tokens)
    room = -tokens % block
    query, key, value, ids = _lengthened(room, query, key, value, ids)
    query = _to_lanes(query * head_dim**-0.5)
    query = rearrange(query, "b t k g h -> b (k g) t h")
    key = rearrange(_to_lanes(key), "b s k h -> b k s h")
    value = rearrange(_to_lanes(value), "b s k h -> b k s h")

    kernel = _splash_kernel(tokens + room, heads * groups, block, causal)
    mixed = jax.vmap(kernel)(query, key, value, splash.SegmentIds(ids, ids))
    mixed = mixed[..., :tokens, :head_dim]
    mixed = rearrange(mixed, "b (k g) t h -> b t k g h", g=groups)
    return mixed.astype(query.dtype)


def _splash_block(tokens: int) -> int:
    """The block size that lengthens rows the least; among equals the best."""
    if tokens < SHORT:
        return LANES
    return min(SPLASH_BLOCKS, key=lambda block: -tokens % block)


def _splash_kernel(tokens: int, heads: int, block: int, causal: bool) -> Callable[..., Array]:
    """The kernel of one row: [heads, tokens, H] -> [heads, tokens, H]."""
    mask = splash.CausalMask if causal else splash.FullMask
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([mask((tokens, tokens))] * heads),
        block_sizes=sizes,
        interpret=target_platform() != "tpu",
    )


def _to_lanes(x: Array) -> Array:
    """x [..., H], with H a multiple of the lanes. The zeros beyond head_dim change no product."""
    room = -x.shape[-1] % LANES
    return jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, room)))


# ---- both


def _splits(query: Array) -> bool:
    """Whether the devices of the current mesh, if there is one, divide the rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, _, heads, *_ = query.shape
    return mesh.empty or (heads % mesh.shape["tensor"] == 0 and rows % row_shards(mesh) == 0)


def _on_mesh(run: Callable[..., Array]) -> Callable[..., Array]:
    """`run` on each device's rows and heads. Pallas kernels do not split themselves over a mesh."""

    def run_on_mesh(
        query: Array, key: Array, value: Array, segment_ids: Array | None, causal: bool
    ) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        ids = jnp.ones(query.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        if mesh.empty:
            return run(query, key, value, ids, causal)
        split = PartitionSpec(ROWS, None, "tensor")
        return jax.shard_map(
            partial(run, causal=causal),
            mesh=mesh,
            in_specs=(split, split, split, PartitionSpec(ROWS)),
            out_specs=split,
            check_vma=False,
        )(query, key, value, ids)

    return run_on_mesh


def _lengthened(room: int, query: Array, key: Array, value: Array, ids: Array) -> tuple[Array, ...]:
    """Rows with `room` more tokens. These have segment -1, which no other token has."""

    def longer(x: Array, fill: int) -> Array:
        widths = ((0, 0), (0, room), *[(0, 0)] * (x.ndim - 2))
        return jnp.pad(x, widths, constant_values=fill)

    return longer(query, 0), longer(key, 0), longer(value, 0), longer(ids, -1)


KERNELS = {
    "cudnn": Kernel(_cudnn_fits, _cudnn),
    "triton": Kernel(_triton_fits, _on_mesh(_triton)),
    "splash": Kernel(_splash_fits, _on_mesh(_splash)),
}
