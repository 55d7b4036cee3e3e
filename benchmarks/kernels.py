"""What a device can do: plain matrix products, and attention by each kernel and by XLA."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.models.attention import attention
from lco_jax.models.kernels import KERNELS

# (tokens, input features, output features); 60,016 tokens are a step of 768 NLI triplets
PRODUCTS = {
    "square": (16_384, 16_384, 16_384),
    "3b up": (60_016, 2_048, 11_008),
    "3b down": (60_016, 11_008, 2_048),
    "7b up": (60_016, 3_584, 18_944),
    "7b down": (60_016, 18_944, 3_584),
    "7b key": (60_016, 3_584, 512),
}
# (rows, tokens, key-value heads, query heads of each, head_dim, segments of a row)
# 0 segments: causal, without segments
ROWS = {
    "3b decoder, 1,024 tokens": (16, 1_024, 2, 8, 128, 0),
    "7b decoder, 4,096 tokens": (4, 4_096, 4, 7, 128, 0),
    "vision tower, frames": (4, 4_096, 16, 1, 80, 3),
    "CLIP, a tile": (32, 577, 16, 1, 64, 1),
}
SMALL_PRODUCTS = {"square": (64, 64, 64)}
SMALL_ROWS = {"causal": (1, 128, 1, 2, 16, 0), "segments": (1, 128, 2, 1, 16, 3)}


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`matmul` and `kernels`."""
    kinds_of_run = {
        "matmul": ("matrix products in bfloat16, and of the model's shapes", matmul),
        "kernels": ("attention kernels against XLA's, with gradients", kernels),
    }
    for name, (what, run) in kinds_of_run.items():
        parser = kinds.add_parser(name, parents=[common], help=what)
        parser.add_argument(
            "--small", action="store_true", help="sizes for a CPU, where kernels are interpreted"
        )
        parser.set_defaults(measure=run, table=table)


def matmul(args: argparse.Namespace, _: Path) -> dict[str, Any]:
    """TFLOP/s of each product, and the best: the ceiling."""
    product = jax.jit(partial(jnp.einsum, "ti,oi->to"))
    products = SMALL_PRODUCTS if args.small else PRODUCTS
    rates = {}
    for name, (tokens, inputs, outputs) in products.items():
        x = jnp.ones((tokens, inputs), jnp.bfloat16)
        w = jnp.ones((outputs, inputs), jnp.bfloat16)
        seconds = timed(product, (x, w), args.rounds)
        flops = 2 * tokens * inputs * outputs
        rates[name] = {"seconds": seconds, "tflops": 1e-12 * flops / seconds}
    return {"rows": rates, "ceiling_tflops": max(row["tflops"] for row in rates.values())}


def timed(run: Callable[..., Any], arguments: tuple[Any, ...], rounds: int) -> float:
    """The median of `rounds` calls, in seconds, after one that compiles."""
    jax.block_until_ready(run(*arguments))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def kernels(args: argparse.Namespace, _: Path) -> dict[str, Any]:
    """Seconds and error against float32 of each kernel, for each kind of rows that it takes."""
    found = {}
    for name, sizes in (SMALL_ROWS if args.small else ROWS).items():
        qkv, ids = draw(*sizes)
        in_float32 = [x.astype(jnp.float32) for x in qkv]
        exact = both(*in_float32, ids, "xla")
        kinds = ["xla"]
        kinds += [kind for kind, one in KERNELS.items() if one.fits(qkv[0], ids, args.small)]
        for kind in kinds:
            try:
                result = compare(qkv, ids, kind, exact, args.rounds)
            except jax.errors.JaxRuntimeError as error:  # a kernel that the device refuses
                result = {"failed": str(error).strip().splitlines()[0]}
            found[f"{name}: {kind}"] = result
    if all("failed" in row for row in found.values()):
        raise LcoError("no kernel ran on this device")
    return {"rows": found}


def draw(
    rows: int, tokens: int, heads: int, groups: int, size: int, segments: int
) -> tuple[list[Array], Any]:
    """Queries, keys and values in bfloat16, and segment ids [rows, tokens] or None.

    The end of a row is padding.
    """
    key_shape = rows, tokens, heads, size
    shapes = (rows, tokens, heads, groups, size), key_shape, key_shape
    seeds = jax.random.split(jax.random.key(0), 3)
    qkv = []
    for seed, shape in zip(seeds, shapes, strict=True):
        qkv.append(jax.random.normal(seed, shape, jnp.bfloat16))
    if not segments:
        return qkv, None
    content = max(tokens - tokens // 10, 1)
    ids = 1 + np.arange(tokens) * segments // content
    ids = np.where(ids > segments, 0, ids)
    return qkv, jnp.asarray(np.tile(ids, (rows, 1)), jnp.int32)


@partial(jax.jit, static_argnums=4)
def both(query: Array, key: Array, value: Array, ids: Array | None, kind: str) -> tuple[Array, ...]:
    """Attention and its gradients, for a loss in which every element counts otherwise."""

    def loss(*qkv: Array) -> tuple[Array, Array]:
        mixed = attention(*qkv, ids, causal=ids is None, implementation=kind)
        return jnp.sum(jnp.sin(mixed.astype(jnp.float32))), mixed

    gradients, mixed = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return mixed, *gradients


def compare(
    qkv: list[Array], ids: Array | None, kind: str, exact: tuple[Array, ...], rounds: int
) -> dict[str, Any]:
    """Seconds forward and with gradients, and the errors of the result and of each gradient.

    An error is the largest difference over the largest value.
    """
    forward = jax.jit(partial(attention, segment_ids=ids, causal=ids is None, implementation=kind))
    result = {"forward_s": timed(forward, tuple(qkv), rounds)}
    result["seconds"] = timed(both, (*qkv, ids, kind), rounds)
    errors = {}
    found = both(*qkv, ids, kind)
    for name, got, want in zip(("mixed", "dq", "dk", "dv"), found, exact, strict=True):
        difference = jnp.abs(got.astype(jnp.float32) - want).max()
        errors[name] = float(difference / jnp.abs(want).max())
    return {**result, "errors": errors}


def table(result: dict[str, Any]) -> str:
    """A line a row."""
    lines = [result["command"]]
    for name, row in result["rows"].items():
        cells = {**row, **row.get("errors", {})}
        cells.pop("errors", None)
        parts = []
        for key, value in cells.items():
            parts.append(f"{key} {value:.3g}" if isinstance(value, float) else value)
        lines.append(f"{name:<36}" + "  ".join(parts))
    return "\n".join(lines)
