"""Training and encoding text, beside the peer."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.data import write_triplets
from benchmarks.duel import Side, duel
from benchmarks.presets import ON_DEVICE, PRESETS, write_adapter, write_checkpoint
from lco_jax.core.errors import LcoError
from lco_jax.models.attention import IMPLEMENTATIONS
from lco_jax.models.decoder import REMAT_POLICIES


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`train` and `encode`."""
    shared = argparse.ArgumentParser(add_help=False, parents=[common])
    shared.add_argument("--preset", choices=PRESETS, default="small")
    shared.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    shared.add_argument(
        "--data-dir",
        default="",
        help="a TFDS folder with snli; without it, random ids of its lengths",
    )
    shared.add_argument(
        "--tokenizer", default="", help="a folder with Qwen's tokenizer.json, for --data-dir"
    )
    shared.add_argument(
        "--quantize", choices=("", "int8", "nf4"), default="", help="our frozen base"
    )
    shared.add_argument("--attention", choices=IMPLEMENTATIONS, default="auto", help="our kernel")
    shared.add_argument("--no-peer", action="store_true", help="measure our side alone")
    shared.add_argument(
        "--no-check", action="store_true", help="do not compare embeddings and gradients first"
    )
    train = kinds.add_parser("train", parents=[shared], help="contrastive LoRA steps")
    train.add_argument("--batch", type=int, default=96, help="triplets of a step")
    train.add_argument("--micro", type=int, default=32, help="the peer's micro-batch")
    train.add_argument("--dropout", type=float, default=0.05, help="of LoRA, on both sides")
    train.add_argument(
        "--remat",
        choices=REMAT_POLICIES,
        default="full",
        help="ours; the peer checkpoints its layers",
    )
    train.add_argument("--chunk-tokens", type=int, default=0, help="our GradCache chunk")
    encode = kinds.add_parser("encode", parents=[shared], help="texts to vectors")
    encode.add_argument("--batch", type=int, default=512, help="texts")
    encode.add_argument("--encode-batch", type=int, default=8, help="the peer's batch")
    for parser in (train, encode):
        parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make what both sides read, compare them on one batch, let them take turns."""
    training = args.kind == "train"
    spec = {
        key: value
        for key, value in vars(args).items()
        if isinstance(value, str | int | float) and key not in ("json", "rounds", "profile")
    }
    spec |= {"data": str(folder / "triplets.jsonl"), "checkpoint": "", "adapter": "", "dump": ""}
    spec = {
        "remat": "none",
        "dropout": 0.0,
        "chunk_tokens": 0,
        "micro": 0,
        "encode_batch": 0,
        **spec,
    }
    preset = PRESETS[args.preset]
    count = max(args.batch, 412) if training else -(-args.batch // 3)
    data = write_triplets(
        folder / "triplets.jsonl", count, preset.vocab, args.data_dir, args.tokenizer
    )
    if args.preset not in ON_DEVICE:
        write_checkpoint(preset, folder / "checkpoint")
        write_adapter(preset, folder / "adapter", str(folder / "checkpoint"), spec["dropout"])
        spec |= {"checkpoint": str(folder / "checkpoint"), "adapter": str(folder / "adapter")}
    exactness = {}
    if spec["checkpoint"] and not (args.no_check or args.no_peer):
        exactness = compare({**spec, "dropout": 0.0}, folder)
    sides = duel(spec, folder, args.rounds, peer=not args.no_peer, profile=args.profile)
    ours, peer = sides["ours"], sides.get("peer")
    rate = args.batch / ours["seconds"]
    result = {"data": data, "ours": {**ours, "per_second": rate}}
    if peer:
        result["peer"] = {**peer, "per_second": args.batch / peer["seconds"]}
        result["ratio"] = peer["seconds"] / ours["seconds"]
        result["memory_ratio"] = ours["peak_rss_gb"] / peer["peak_rss_gb"]
    if "flops" in ours:
        ceiling = matmul_ceiling(args.dtype)
        reached = ours["flops"] / ours["seconds"]
        result |= {
            "tflops": reached / 1e12,
            "ceiling_tflops": ceiling / 1e12,
            "mfu": reached / ceiling,
        }
    return {**result, "exactness": exactness}


def compare(spec: dict[str, Any], folder: Path) -> dict[str, float]:
    """Distances of embeddings and adapter gradients from the peer's, relative to each norm."""
    found = []
    for name in ("ours", "peer"):
        dump = str(folder / f"{name}.npz")
        side = Side(f"benchmarks.{name}", {**spec, "dump": dump}, folder, role="check")
        side.process.wait(timeout=60)
        found.append(dict(np.load(dump)))
    ours, peer = found
    if ours.keys() != peer.keys():
        raise LcoError(
            f"the sides have different gradients: {sorted(ours.keys() ^ peer.keys())[:3]}"
        )
    distance = {
        key: float(np.linalg.norm(ours[key] - x) / np.linalg.norm(x)) for key, x in peer.items()
    }
    tensors = [value for key, value in distance.items() if key not in ("loss", "embeddings")]
    result = {"embeddings": float(np.abs(ours["embeddings"] - peer["embeddings"]).max())}
    if tensors:
        result |= {
            "loss": distance["loss"],
            "gradient_worst": max(tensors),
            "gradient_median": float(np.median(tensors)),
        }
    return result


def matmul_ceiling(dtype: str) -> float:
    """FLOP/s of the largest of a few plain matrix products, here and now."""
    import jax
    import jax.numpy as jnp

    best = 0.0
    for n in (1024, 2048) if jax.default_backend() == "cpu" else (8192, 16384):
        a = jnp.ones((n, n), dtype)
        product = jax.jit(lambda a, b: a @ b)
        product(a, a).block_until_ready()
        for _ in tqdm(range(5), desc=f"matrix product {n}", leave=False):
            start = time.perf_counter()
            product(a, a).block_until_ready()
            best = max(best, 2.0 * n**3 / (time.perf_counter() - start))
    return best


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    unit = "triplets/s" if result["benchmark"] == "train" else "texts/s"
    ours, peer = result["ours"], result.get("peer", {})
    rows = [("", "ours", "peer")]

    def row(name: str, key: str, form: str) -> None:
        if key in ours or key in peer:
            rows.append((name, *(form.format(x[key]) if key in x else "-" for x in (ours, peer))))

    row(unit, "per_second", "{:.2f}")
    row("seconds a round (median)", "seconds", "{:.3f}")
    row("seconds to the end of the first", "first_s", "{:.1f}")
    row("peak resident GB", "peak_rss_gb", "{:.2f}")
    row("peak device GB", "peak_device_gb", "{:.2f}")
    row("programs compiled", "programs", "{}")
    lines = [f"{a:<34}{b:>12}{c:>12}" for a, b, c in rows]
    if "ratio" in result:
        lines.append(f"{'ratio':<34}{result['ratio']:>12.2f}")
    if "mfu" in result:
        lines.append(
            f"{'TFLOP/s, and of a plain product':<34}"
            f"{result['tflops']:>12.3f}{result['mfu']:>11.0%}"
        )
    lines += [
        f"{'difference: ' + key:<34}{value:>12.1e}"
        for key, value in result.get("exactness", {}).items()
    ]
    return "\n".join([f"{result['command']}   ({result['data']})", *lines])
