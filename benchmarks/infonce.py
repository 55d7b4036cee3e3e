"""InfoNCE at the size of a very large batch: its memory by XLA's count, its speed beside torch."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`infonce`."""
    parser = kinds.add_parser(
        "infonce", parents=[common], help="the loss alone, forward and backward"
    )
    parser.add_argument(
        "--batch", type=int, default=65_536, help="anchors; twice as many candidates"
    )
    parser.add_argument("--timed", type=int, default=4096, help="anchors of the timed comparison")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--no-peer", action="store_true")
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile at full size; run both at a size that the dense form can hold."""
    import jax
    import jax.numpy as jnp

    from lco_jax.training.losses import info_nce

    def gradient(embeddings: Any, present: Any) -> Any:
        return jax.value_and_grad(lambda e: info_nce(e, present, 0.03)[0])(embeddings)

    shapes = (
        jax.ShapeDtypeStruct((args.batch, 3, args.dim), jnp.float32),
        jax.ShapeDtypeStruct((args.batch, 3), bool),
    )
    memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
    dense = 4.0 * args.batch * 2 * args.batch
    rng = np.random.default_rng(0)
    values = rng.standard_normal((args.timed, 3, args.dim), np.float32)
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    run = jax.jit(gradient)
    present = jnp.ones(values.shape[:2], bool)
    sides: dict[str, Any] = {"ours": lambda: jax.block_until_ready(run(values, present))}
    if not args.no_peer:
        import torch

        def peer() -> Any:
            e = torch.tensor(values, requires_grad=True)
            logits = e[:, 0] @ torch.cat([e[:, 1], e[:, 2]]).T / 0.03
            loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(e)))
            loss.backward()
            return loss.item(), e.grad.numpy()

        sides["peer"] = peer
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {name: side() for name, side in sides.items()}  # the first is not counted
    for _ in range(args.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(x)) for name, x in seconds.items()}
    result = {
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "dense_scores_gb": dense / 1e9,
        "anchors": args.batch,
        "candidates": 2 * args.batch,
        "dim": args.dim,
        "timed_anchors": args.timed,
        "seconds": medians,
    }
    if "peer" in results:
        (loss, grad), (peer_loss, peer_grad) = results["ours"], results["peer"]
        distance = np.linalg.norm(np.asarray(grad) - peer_grad) / np.linalg.norm(peer_grad)
        result |= {
            "ratio": medians["peer"] / medians["ours"],
            "exactness": {"loss": abs(float(loss) - peer_loss), "gradient": float(distance)},
        }
    return result


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    lines = [
        result["command"],
        f"{result['anchors']:,} anchors × {result['candidates']:,} candidates, D {result['dim']}, "
        f"with gradient: {result['temporaries_gb']:.2f} GB of temporaries "
        f"(the scores alone: {result['dense_scores_gb']:.1f} GB)",
    ]
    lines += [
        f"{name}, {result['timed_anchors']:,} anchors: {x:.3f} s"
        for name, x in result["seconds"].items()
    ]
    lines += [f"ratio {result['ratio']:.2f}"] if "ratio" in result else []
    return "\n".join(
        [*lines, *(f"difference: {k} {v:.1e}" for k, v in result.get("exactness", {}).items())]
    )
