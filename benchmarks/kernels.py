"""What a device can do: plain matrix products, and attention by each kernel beside attention in XLA."""

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
# (rows, tokens, key-value heads, query heads of each, head_dim, segments of a row; 0: causal, without segments)
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
    for name, what, measured in (
        ("matmul", "matrix products in bfloat16, and of the model's shapes", matmul),
        ("kernels", "attention kernels against XLA's, with gradients", kernels),
    ):
        parser = kinds.add_parser(name, parents=[common], help=what)
        parser.add_argument(
            "--small", action="store_true", help="sizes for a CPU, where kernels are interpreted"
        )
        parser.set_defaults(measure=measured, table=table)


def matmul(args: argparse.Namespace, _: Path) -> dict[str, Any]:
    """TFLOP/s of each product, and the best: the ceiling."""
    rates = {}
    for name, (tokens, inputs, outputs) in (SMALL_PRODUCTS if args.small else PRODUCTS).items():
        x, w = jnp.ones((tokens, inputs), jnp.bfloat16), jnp.ones((outputs, inputs), jnp.bfloat16)
        seconds = timed(jax.jit(partial(jnp.einsum, "ti,oi->to")), (x, w), args.rounds)
        rates[name] = {"seconds": seconds, "tflops": 2e-12 * tokens * inputs * outputs / seconds}
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
    """Of each kind of rows and each kernel that takes them: seconds, and how far it is from float32."""
    found = {}
    for name, sizes in (SMALL_ROWS if args.small else ROWS).items():
        qkv, ids = draw(*sizes)
        exact = both(*(x.astype(jnp.float32) for x in qkv), ids, "xla")
        taken = [
            kind for kind, kernel in KERNELS.items() if kernel.fits(qkv[0], ids, forced=args.small)
        ]
        for kind in ("xla", *taken):
            try:
                found[f"{name}: {kind}"] = compare(qkv, ids, kind, exact, args.rounds)
            except (
                jax.errors.JaxRuntimeError
            ) as error:  # a kernel that the device refuses; the others go on
                found[f"{name}: {kind}"] = {"failed": str(error).strip().splitlines()[0]}
    if all("failed" in row for row in found.values()):
        raise LcoError("no kernel ran on this device")
    return {"rows": found}


def draw(
    rows: int, tokens: int, heads: int, groups: int, size: int, segments: int
) -> tuple[list[Array], Any]:
    """Queries, keys and values in bfloat16, and segment ids [rows, tokens] or None. A row's end is padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, tokens, heads, groups, size), *[(rows, tokens, heads, size)] * 2
    qkv = [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]
    if not segments:
        return qkv, None
    ids = 1 + np.arange(tokens) * segments // max(tokens - tokens // 10, 1)
    return qkv, jnp.asarray(np.tile(np.where(ids > segments, 0, ids), (rows, 1)), jnp.int32)


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
    """Seconds forward and with gradients, and the largest error of the result and of each gradient over its largest."""
    forward = jax.jit(partial(attention, segment_ids=ids, causal=ids is None, implementation=kind))
    result = {"forward_s": timed(forward, tuple(qkv), rounds)}
    result["seconds"] = timed(both, (*qkv, ids, kind), rounds)
    errors = {}
    for name, got, want in zip(
        ("mixed", "dq", "dk", "dv"), both(*qkv, ids, kind), exact, strict=True
    ):
        errors[name] = float(jnp.abs(got.astype(jnp.float32) - want).max() / jnp.abs(want).max())
    return {**result, "errors": errors}


def table(result: dict[str, Any]) -> str:
    """A line a row."""
    lines = [result["command"]]
    for name, row in result["rows"].items():
        numbers = {key: value for key, value in row.items() if key != "errors"} | row.get(
            "errors", {}
        )
        parts = [
            f"{key} {value:.3g}" if isinstance(value, float) else value
            for key, value in numbers.items()
        ]
        lines.append(f"{name:<36}" + "  ".join(parts))
    return "\n".join(lines)
