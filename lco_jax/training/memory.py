"""What fits: the remat policy and the GradCache chunk for the memory of the devices.

Dimensions: L layers, R streams (one a device here), T tokens of a stream, W width and N rows of a group of attention
rows, S sequences of a stream, D hidden, F MLP width, r LoRA rank.

What a policy keeps is not written down here again: the backward pass is traced (shapes alone, a second), and what
it holds on to is counted. So a layer that keeps another array, or another kernel, is counted as it is.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.checkpoint.hf import abstract_params
from lco_jax.core import lora
from lco_jax.core.errors import LcoError
from lco_jax.core.packing import Batch, PackedTokens, Shape
from lco_jax.core.sharding import ROWS, replicated, row_shards
from lco_jax.models.config import DecoderConfig
from lco_jax.models.decoder import REMAT_POLICIES, Decoder, embed
from lco_jax.models.head import LOGITS
from lco_jax.models.model import Model
from lco_jax.training.losses import TILE_SCORES
from lco_jax.training.run import Training

MARGIN = 0.1  # of a device's memory, left to the runtime, to fragmentation and to batches larger than planned
WORKING = 0.75  # of what a layer computes, in memory at once as gradients (measured)
# Policies by speed, where least recomputation is not it: on CPU "none" was slower than "mlp" in every round, and
# takes twice the memory.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("mlp", "gate", "attention", "full")}
STEP = 128  # chunks are multiples of so many tokens
MIB, GIB = 2**20, 2**30


class Choice(NamedTuple):
    """remat: a key of `REMAT_POLICIES`. chunk_tokens: as `Layout` has it. need, memory: bytes a device, and there."""

    remat: str
    chunk_tokens: int
    need: int
    memory: int

    def __str__(self) -> str:
        chunk = f"chunks of {self.chunk_tokens:,} tokens" if self.chunk_tokens else "the batch in one chunk"
        return f"remat {self.remat}, {chunk}: about {self.need / GIB:.2f} of {self.memory / GIB:.2f} GiB a device"


def activation_bytes(
    config: DecoderConfig, policy: str, shape: Shape, dtype: Any, rank: int, dropout: float, tensor: int = 1,
    backend: str | None = None,
) -> int:  # fmt: skip
    """Bytes of a device in forward and backward pass of a chunk of `shape`, beyond what `resident_bytes` counts.

    It is what `policy` keeps, and beside it what a layer computes once more and the gradients on their way. tensor: the
    ways a product is split. backend: jax's name of what computes, by default the one here. An upper bound of what XLA
    says it takes on CPU: 1.03 to 1.41 times that (measured).
    """
    if (backend or jax.default_backend()) == "cpu":
        dtype = "float32"  # XLA's CPU programs compute bfloat16 in float32, and keep much of it so
    rows = tuple(shape.rows.items())
    here = _local(config, tensor)
    kept = partial(_kept, dtype=jnp.dtype(dtype).name, rank=rank, dropout=dropout, shape=(shape.tokens, rows))
    layer = lambda policy: kept(replace(here, num_layers=3), policy) - kept(replace(here, num_layers=2), policy)  # noqa: E731
    return int(kept(here, policy) + layer("none") - layer(policy) + WORKING * layer("none"))


def _local(config: DecoderConfig, tensor: int) -> DecoderConfig:
    """The geometry of one of `tensor` devices that share every product."""
    heads, width = math.gcd(tensor, config.num_kv_heads), math.gcd(tensor, config.intermediate_size)
    return replace(
        config,
        num_heads=config.num_heads // heads,
        num_kv_heads=config.num_kv_heads // heads,
        intermediate_size=config.intermediate_size // width,
    )


@lru_cache(maxsize=256)
def _kept(config: DecoderConfig, policy: str, dtype: str, rank: int, dropout: float, shape: tuple) -> int:
    """Bytes that the forward pass hands to the backward pass and that are not among its inputs."""
    decoder = Decoder(config, jnp.dtype(dtype), jnp.dtype(dtype), policy)
    params, settings = abstract_params(config, jnp.dtype(dtype)), lora.LoraConfig(rank=rank, dropout=dropout)
    adapters = jax.eval_shape(partial(lora.init, params=params, config=settings), jax.random.key(0))

    def residuals(adapters: Any, params: Any, tokens: PackedTokens) -> list[Array]:
        _, backward = jax.vjp(lambda a: embed(decoder, {"decoder": lora.attach(params, a, settings)}, tokens), adapters)
        inputs = {id(x) for x in jax.tree.leaves((adapters, params, tokens))}
        return [x for x in jax.tree.leaves(backward) if id(x) not in inputs]

    return held_bytes(jax.eval_shape(residuals, adapters, params, _abstract_tokens(*shape)))


def _abstract_tokens(
    tokens: int, rows: tuple[tuple[int, int], ...], leading: tuple[int, ...] = (1,), head: int = 0, place: Any = None
) -> PackedTokens:
    array = lambda *sizes, dtype=jnp.int32: jax.ShapeDtypeStruct((*leading, *sizes), dtype, sharding=place)  # noqa: E731
    one, groups = array(tokens), tuple(array(count, width) for width, count in rows)
    last = array(sum(count for _, count in rows))
    return PackedTokens(one, array(tokens, 3), array(tokens, dtype=jnp.uint32), one, groups, one, last, head)


def abstract_batch(shape: Shape, sides: tuple[int, int], head: int, mesh: Mesh) -> Batch:
    """A batch of texts as shapes on the mesh. sides: [B, 2 + M]; head: tokens that all texts share."""
    place = NamedSharding(mesh, PartitionSpec(None, ROWS))
    leading = shape.chunks, row_shards(mesh)
    tokens = _abstract_tokens(shape.tokens, tuple(sorted(shape.rows.items())), leading, head, place)
    table = jax.ShapeDtypeStruct(sides, jnp.int32, sharding=replicated(mesh))
    return Batch(tokens, table, table, {})


def held_bytes(tree: Any) -> int:
    """Of the arrays or shapes of a tree, those that one device holds."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


def resident_bytes(
    params: Any, training: Training, config: DecoderConfig, mesh: Mesh, sides: tuple[int, int], media_tokens: int
) -> int:
    """Bytes of a device that do not depend on policy and chunk.

    Parameters as they lie; what is tuned, its moments, gradient and update; embeddings and scores of a batch of `sides`
    [B, 2 + M]; `media_tokens` of a shard; a layer's matrices whole, where they are gathered or widened before use.
    """
    state = training.placed
    records, width = sides
    scores = min(records * records * (width - 1) // row_shards(mesh), TILE_SCORES)
    total = held_bytes(params) + held_bytes(state) + 2 * held_bytes(state["tuned"])
    total += 4 * (3 * records * width * config.hidden_size + 4 * scores)
    table = params["decoder"]["embed_tokens"]["weight"]
    total += 2 * media_tokens * config.hidden_size * table.dtype.itemsize  # the towers' and, joined, the decoder's
    layers = params["decoder"]["layers"]
    quantized = len(jax.tree.leaves(layers)) > len(flatten_dict(layers))
    if quantized or mesh.shape["fsdp"] > 1:
        matrices = jax.tree.leaves(abstract_params(config)["layers"])
        total += sum(map(math.prod, (x.shape[1:] for x in matrices))) * 4 // mesh.shape["tensor"]
    return total + (mesh.shape["fsdp"] > 1) * held_bytes(table) * mesh.shape["fsdp"]


def device_bytes(held: int) -> int:
    """Memory of a device that a run may fill, the least in any process. held: by parameters that are there already."""
    device = jax.local_devices()[0]
    total = (device.memory_stats() or {}).get("bytes_limit")
    if total is None:  # a CPU: its devices share what is free
        total = held + _free_memory() // jax.local_device_count()
    total = int(total * (1 - MARGIN))
    if jax.process_count() == 1:
        return total
    return int(multihost_utils.process_allgather(np.int32(total // MIB)).min()) * MIB  # jax's integers have 32 bits


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def choose(
    memory: int, remat: str, chunk_tokens: int, shape_of: Callable[[int], Shape], need: Callable[[str, Shape], int],
    backend: str | None = None,
) -> Choice:  # fmt: skip
    """The policy and chunk for `memory` bytes a device.

    remat, chunk_tokens: the configuration's; "auto" and -1 are chosen: the first policy of `ORDER` under which a whole
    batch fits, for chunks cost a second forward pass; if none does, the largest chunks that fit under the last.
    shape_of: chunk_tokens -> the planned shape of a stream. need: bytes a device for a policy and a shape.
    Raises where nothing fits.
    """
    fastest = ORDER.get(backend or jax.default_backend(), tuple(reversed(REMAT_POLICIES)))
    order = fastest if remat == "auto" else (remat,)
    whole = shape_of(max(chunk_tokens, 0))
    for policy in order:
        if (bytes_ := need(policy, whole)) <= memory:
            return Choice(policy, max(chunk_tokens, 0), bytes_, memory)
    policy, advice = order[-1], "raise config.mesh.fsdp, or quantize the model"
    if chunk_tokens < 0:
        bytes_ = need(policy, shape_of(STEP))
    else:
        advice = f"set config.train.chunk_tokens to -1 (auto), {advice}"
    if chunk_tokens >= 0 or bytes_ > memory:
        raise LcoError(
            f"a training step needs about {bytes_ / GIB:.1f} GiB a device with remat {policy!r} and chunks of "
            f"{STEP if chunk_tokens < 0 else whole.tokens} tokens, and there are {memory / GIB:.1f}; {advice}"
        )
    low, high = 1, -(-whole.tokens // STEP)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(policy, shape_of(middle * STEP)) <= memory else (low, middle)
    return Choice(policy, low * STEP, need(policy, shape_of(low * STEP)), memory)


def choose_for(
    config: Mapping[str, Any],
    model: Model,
    params: dict[str, Any],
    training: Training,
    mesh: Mesh,
    sides: tuple[int, int],
    shape_of: Callable[[int], Shape],
    there: int | None = None,
    backend: str | None = None,
) -> Choice:
    """`choose` for a run: its configuration, what is on its devices, and the shapes that its data are planned to take.

    sides: records of a batch, and texts of a record (the most). there, backend: bytes that a run may fill, and jax's
    name, of devices that are not these.
    """
    decoder, settings = model.decoder, training.lora
    whole = shape_of(0)
    resident = resident_bytes(params, training, decoder.config, mesh, sides, whole.tokens if model.towers else 0)

    def need(policy: str, shape: Shape) -> int:
        logits = 3 * 4 * LOGITS if shape.answers else 0  # themselves, their softmax, and the gradient
        given = decoder.dtype, settings.rank, settings.dropout, mesh.shape["tensor"], backend
        return logits + resident + activation_bytes(decoder.config, policy, shape, *given)

    there = device_bytes(held=held_bytes(params)) if there is None else there
    return choose(there, config["model"]["remat"], config["train"]["chunk_tokens"], shape_of, need, backend)
