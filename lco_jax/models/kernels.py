"""Attention kernels that belong to a machine: cuDNN's and a Triton kernel on NVIDIA GPUs, splash attention on TPUs.

All are jax's own. Dimensions: B rows, T tokens, K key-value heads, G query heads per key-value head, H head_dim.

Whether one can do some sizes is asked first (`fits`), and cuDNN is tried once before it is trusted: a library that is
too old costs a line in the log and not a run. The machine asked about is the program's (`core/target.py`).
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

LANES = (
    128  # the width of a TPU's vector registers; what blocks of queries and keys are multiples of
)
SHORT = 512  # rows below this are left to XLA by "auto": their scores are small, and its fusions do better
SPLASH_BLOCKS = (
    512,
    640,
    384,
    256,
)  # sizes of blocks that splash attention is fast with, the best first
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """fits(query, segment_ids, forced): whether it can do these sizes here. run: as `attention.attention`."""

    fits: Callable[..., bool]
    run: Callable[..., Array]


# ---- NVIDIA GPUs


def _is_half(query: Array) -> bool:
    """Whether q is of a dtype that the GPU's kernels take without a loss."""
    return query.dtype in (jnp.bfloat16, jnp.float16)


def _cudnn_fits(query: Array, segment_ids: Array | None, forced: bool) -> bool:
    """Without segments: it would take them as a mask over T × T."""
    tokens, heads, groups, head_dim = query.shape[1:]
    if target_platform() != "gpu" or not _is_half(query) or segment_ids is not None:
        return False
    if tokens % 2 or head_dim % 8 or head_dim > 128:
        return False
    return (forced or tokens >= SHORT) and _cudnn_works(heads, groups, head_dim, str(query.dtype))


@lru_cache
def _cudnn_works(heads: int, groups: int, head_dim: int, dtype: str) -> bool:
    """Compile it and its gradient once, at a small size, for the machine that is here."""
    query = jax.ShapeDtypeStruct((1, 128, heads, groups, head_dim), dtype)
    key = jax.ShapeDtypeStruct((1, 128, heads, head_dim), dtype)

    def total(query: Array, key: Array) -> Array:
        return _cudnn(query, key, key, None, True).astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(total)).lower(query, key).compile()
    except Exception as error:  # whatever the driver, cuDNN or jax's checks of them raise
        logger.warning("cuDNN's attention is not used: %s", str(error).strip().splitlines()[:1])
        return False
    return True


def _cudnn(query: Array, key: Array, value: Array, segment_ids: None, causal: bool) -> Array:
    mixed = jax.nn.dot_product_attention(
        rearrange(query, "b t k g h -> b t (k g) h"),
        key,
        value,
        is_causal=causal,
        implementation="cudnn",
    )
    return mixed.reshape(query.shape)


def _triton_fits(query: Array, segment_ids: Array | None, forced: bool) -> bool:
    """What cuDNN does not take: segments, and machines without it."""
    if not _splits(query) or query.shape[-1] > 128:
        return False
    return forced or (target_platform() == "gpu" and _is_half(query) and query.shape[1] >= SHORT)


def _triton(
    query: Array, key: Array, value: Array, segment_ids: Array | None, causal: bool
) -> Array:
    return _on_mesh(_triton_here, query, key, value, segment_ids, causal)


def _triton_here(query: Array, key: Array, value: Array, ids: Array, causal: bool) -> Array:
    tokens, _, groups, head_dim = query.shape[1:]
    query, key, value, ids = _lengthened(-tokens % LANES, query, key, value, ids)
    mixed = triton.mha(
        rearrange(query, "b t k g h -> b t (k g) h"),
        *(
            jnp.repeat(x, groups, axis=2) for x in (key, value)
        ),  # it has a key for each query's head
        ids,
        sm_scale=head_dim**-0.5,
        causal=causal,
        interpret=target_platform() != "gpu",
    )
    return mixed.reshape(query.shape)[:, :tokens]


# ---- TPUs


def _splash_fits(query: Array, segment_ids: Array | None, forced: bool) -> bool:
    return _splits(query) and (forced or (target_platform() == "tpu" and query.shape[1] >= SHORT))


def _splash(
    query: Array, key: Array, value: Array, segment_ids: Array | None, causal: bool
) -> Array:
    return _on_mesh(_splash_here, query, key, value, segment_ids, causal)


def _splash_here(query: Array, key: Array, value: Array, ids: Array, causal: bool) -> Array:
    count, (heads, groups, head_dim) = query.shape[1], query.shape[2:]
    block = _splash_block(count)
    query, key, value, ids = _lengthened(-count % block, query, key, value, ids)
    tokens = query.shape[1]
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
        interpret=target_platform() != "tpu",
    )

    def widened(x: Array) -> Array:
        """Zeros beyond head_dim change no product."""
        return jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, -head_dim % LANES)))

    query = rearrange(widened(query * head_dim**-0.5), "b t k g h -> b (k g) t h")
    key, value = (rearrange(widened(x), "b s k h -> b k s h") for x in (key, value))
    mixed = jax.vmap(kernel)(query, key, value, splash.SegmentIds(ids, ids))
    mixed = rearrange(mixed[..., :count, :head_dim], "b (k g) t h -> b t k g h", g=groups)
    return mixed.astype(query.dtype)


def _splash_block(tokens: int) -> int:
    """The block that rows are lengthened the least with; of equals the best."""
    if tokens < SHORT:
        return LANES

    def length(block: int) -> int:
        return -(-tokens // block) * block

    return min(SPLASH_BLOCKS, key=length)


# ---- both


def _splits(query: Array) -> bool:
    """Whether each device of the current mesh, if there is one, can be given rows and heads of its own."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, _, heads, *_ = query.shape
    return mesh.empty or (heads % mesh.shape["tensor"] == 0 and rows % row_shards(mesh) == 0)


def _on_mesh(
    run: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None,
    causal: bool,
) -> Array:
    """`run` on each device's rows and heads: kernels written in Pallas do not split themselves over a mesh."""
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


def _lengthened(room: int, query: Array, key: Array, value: Array, ids: Array) -> tuple[Array, ...]:
    """Rows with `room` more tokens, which are a segment of their own: -1, and segments are counted from 0."""

    def longer(x: Array, fill: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)

    return *(longer(x, 0) for x in (query, key, value)), longer(ids, -1)


KERNELS = {
    "cudnn": Kernel(_cudnn_fits, _cudnn),
    "triton": Kernel(_triton_fits, _triton),
    "splash": Kernel(_splash_fits, _splash),
}
